"""Which versions are worth loading ahead, and why: guesses from a model's history. Pure; knows no memory, no process.

What is guessed holds from its ``since`` on. Whether there is room, and for how long a guess is good, is the saga's.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from turnout.core.world import Turn

#: Days whose switches are looked at for the hour of day, and on how many of them it must have happened.
DAYS = 7
DAYS_LEAST = 2
#: So long before the hour begins is loaded.
LEAD = timedelta(minutes=15)
#: Switches there and back that make two versions alternate.
_TURNS = 4


class Guess(msgspec.Struct, frozen=True):
    """A version that may be wanted soon. ``since``: what it rests on happened then (UTC)."""

    version: str
    since: datetime
    reason: str


def predicted(turns: tuple[Turn, ...], undo_target: str, now: datetime) -> tuple[Guess, ...]:
    """What the switches so far let expect, the likeliest first: an undo, the way back, the same hour of other days.

    Args:
        turns: which versions became active and when, oldest first.
        undo_target: where an undo goes, empty where there is none.
        now: UTC.
    """
    if not turns:
        return ()
    found: list[Guess] = []
    newest = turns[-1]
    if undo_target:
        found.append(Guess(undo_target, newest.at, f"predicted: an undo of {newest.version} goes there"))
    names = [turn.version for turn in turns[-_TURNS:]]
    if len(names) == _TURNS and names[0] == names[2] != names[1] == names[3]:
        listed = ", ".join(names)
        found.append(Guess(names[2], newest.at, f"predicted: they alternate, the last switches went to {listed}"))
    found.extend(_by_the_hour(turns, now))
    return tuple(found)


def _by_the_hour(turns: tuple[Turn, ...], now: datetime) -> list[Guess]:
    """Versions that were switched to in this hour of the day (from a little before it begins) on several days."""
    hour = (now + LEAD).replace(minute=0, second=0, microsecond=0)
    days: dict[str, set[int]] = {}
    for turn in turns:
        ago = (hour.date() - turn.at.date()).days
        if turn.at.hour == hour.hour and 1 <= ago <= DAYS:
            days.setdefault(turn.version, set()).add(ago)
    often = sorted((-len(on), version) for version, on in days.items() if len(on) >= DAYS_LEAST)
    return [
        Guess(
            version,
            hour - LEAD,
            f"predicted: on {-count} of the last {DAYS} days it was switched to from {hour:%H}:00 to {hour:%H}:59 UTC",
        )
        for count, version in often
    ]
