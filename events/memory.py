"""The event store in memory: for tests, simulation and trying things out. Nothing outlives the process.

Answers at once and never waits, so that a simulation decides when things happen: a tail is called inside ``append``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from turnout.events.codec import decode, record
from turnout.events.envelope import START
from turnout.events.store import Conflict, LogReplaced, check_appends

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turnout.events.codec import Context
    from turnout.events.envelope import Recorded
    from turnout.events.store import Append


_PAGE = 1000


class _Tail:
    def __init__(
        self, store: MemoryStore, after: int, deliver: Callable[[Recorded], None], lost: Callable[[Exception], None]
    ) -> None:
        self._store = store
        self._deliver = deliver
        self._lost = lost
        self._next = after

    def catch_up(self) -> None:
        while self in self._store.tails and self._next < len(self._store.log):
            recorded = self._store.log[self._next]
            self._next += 1  # before the call: a delivery may append, which comes back here
            try:
                self._deliver(recorded)
            except Exception as e:  # noqa: BLE001  a tail must not skip the event that its reader could not take
                self._store.tails.remove(self)
                self._lost(e)

    async def close(self) -> None:
        """Stop; nothing is delivered after it returns."""
        if self in self._store.tails:
            self._store.tails.remove(self)


class MemoryStore:
    """An :class:`~turnout.events.store.EventStore` that keeps the log in a list."""

    def __init__(self) -> None:
        self.log: list[Recorded] = []
        self.tails: list[_Tail] = []
        self._subjects: dict[str, list[Recorded]] = {}

    async def append(self, appends: Sequence[Append], context: Context) -> tuple[Recorded, ...]:
        """Store all events or none. See the port."""
        check_appends(appends)
        for a in appends:
            held = self._subjects.get(a.subject)
            if (held[-1].sequence if held else START.sequence) != a.expected.sequence:
                raise Conflict(f"{a.subject} is not at {a.expected.sequence} any more")
        stored: list[Recorded] = []
        for a in appends:
            position = a.expected
            for event in a.events:
                name, envelope, body = record(a.subject, event, context, len(stored), position)
                stored.append(decode(a.subject, len(self.log) + len(stored) + 1, name, envelope, body))
                position = stored[-1].position
        self.log += stored
        for recorded in stored:
            self._subjects.setdefault(recorded.subject, []).append(recorded)
        for tail in tuple(self.tails):
            tail.catch_up()
        return tuple(stored)

    async def read(self, subject: str) -> tuple[Recorded, ...]:
        """All events of one subject, oldest first."""
        return tuple(self._subjects.get(subject, ()))

    async def last_sequence(self) -> int:
        """Sequence of the newest event, 0 where there is none."""
        return len(self.log)

    async def page(self, after: int) -> tuple[tuple[Recorded, ...], int]:
        """The next events above ``after``, and how many there are behind them."""
        events = tuple(self.log[after : after + _PAGE])
        return events, max(0, len(self.log) - after - len(events))

    async def tail(self, after: int, deliver: Callable[[Recorded], None], lost: Callable[[Exception], None]) -> _Tail:
        """Deliver every event above ``after``: those that are there before this returns, new ones inside append."""
        tail = _Tail(self, after, deliver, lost)
        if after > len(self.log):
            lost(LogReplaced(f"the log ends at {len(self.log)}, but was read up to {after} before"))
            return tail
        self.tails.append(tail)
        tail.catch_up()
        return tail
