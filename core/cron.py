"""Five-field cron expressions: does a minute match, and which one matched last. Pure; time comes in, always UTC.

Fields: minute, hour, day of month, month, day of week (0 and 7 are Sunday). Each is ``*``, a number, a range ``a-b``,
any of these with a step ``/n``, or several with commas; months and days also by their first three letters. Where day of
month and day of week both name days, either will do, as cron has always had it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
#: Name, lowest, highest, and words for the numbers from the lowest on.
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 7, _DAYS),
)
_LONGEST = {1: 31, 2: 29, 3: 31, 4: 30, 5: 31, 6: 30, 7: 31, 8: 31, 9: 30, 10: 31, 11: 30, 12: 31}


class Cron(msgspec.Struct, frozen=True):
    """A read expression. ``either``: day of month and day of week both name days, and one of them is enough."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either: bool

    def matches(self, at: datetime) -> bool:
        """Whether it means the minute that ``at`` is in."""
        day, weekday = at.day in self.days, at.isoweekday() % 7 in self.weekdays
        return (
            at.minute in self.minutes
            and at.hour in self.hours
            and at.month in self.months
            and (day or weekday if self.either else day and weekday)
        )

    def last(self, now: datetime, within: timedelta) -> datetime | None:
        """The newest minute that matches and began at ``now`` or less than ``within`` before; None without one."""
        at = now.replace(second=0, microsecond=0)
        while now - at < within:
            if self.matches(at):
                return at
            at -= timedelta(minutes=1)
        return None


def parse(text: str) -> Cron | str:
    """The expression, or why it can't be meant, in one sentence."""
    words = text.lower().split()
    if len(words) != len(_FIELDS):
        return f"{text!r} has {len(words)} fields: give five (minute, hour, day of month, month, day of week)"
    read: list[frozenset[int]] = []
    for word, (name, low, high, names) in zip(words, _FIELDS, strict=True):
        numbers = _field(word, low, high, names)
        if numbers is None:
            also = f" or {names[0]} to {names[-1]}" if names else ""
            return (
                f"{text!r}: {name} {word!r} can't be read: give *, a number from {low} to {high}{also}, a-b, */n or a,b"
            )
        read.append(numbers)
    minutes, hours, days, months, weekdays = read
    every_weekday = words[4].startswith("*")
    if every_weekday and min(days) > max(_LONGEST[month] for month in months):
        return f"{text!r} never comes: no month that it names has so many days"
    either = not every_weekday and not words[2].startswith("*")
    return Cron(minutes, hours, days, months, frozenset(day % 7 for day in weekdays), either)


def _field(word: str, low: int, high: int, names: tuple[str, ...]) -> frozenset[int] | None:
    """The numbers that a field means, None where it can't be read."""
    found: set[int] = set()
    for part in word.split(","):
        span, slash, stride = part.partition("/")
        step = _number(stride, ()) if slash else 1
        first, dash, second = span.partition("-")
        start = low if span == "*" else _number(first, names, low)
        last = high if slash or span == "*" else start
        end = _number(second, names, low) if dash else last
        if start is None or end is None or not step or not low <= start <= end <= high:
            return None
        found.update(range(start, end + 1, step))
    return frozenset(found)


def _number(word: str, names: tuple[str, ...], low: int = 0) -> int | None:
    if word in names:
        return names.index(word) + low
    return int(word) if word.isascii() and word.isdigit() and len(word) <= 2 else None
