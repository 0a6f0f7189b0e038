"""The event store's port: what every adapter must do. Held by tests/conformance against each of them.

Knows nothing of NATS. A write names the position that the writer has seen of each subject it writes to; if any of them
has moved on, nothing is stored and the writer hears ``Conflict``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from turnout.events.codec import Context, Damaged
from turnout.events.envelope import Position, Recorded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Append", "Conflict", "Damaged", "EventStore", "LogReplaced", "StoreFull", "Tail", "Unavailable"]


class Conflict(Exception):
    """A subject has moved on, or the command is stored already. Reload, look for the command id, decide again."""


class Unavailable(Exception):
    """The store did not answer, or not clearly. The write may or may not be stored: reload before a retry.

    The message says what to do; ``code`` is stable (``store_unavailable``, ``store_full``).
    """

    code = "store_unavailable"


class StoreFull(Unavailable):
    """The store refuses writes until there is room (disk or stream limit). Nothing was stored."""

    code = "store_full"


class LogReplaced(Exception):
    """The log is not the one that was read before: every fold of it must be dropped and rebuilt from the start."""


class Append(msgspec.Struct, frozen=True):
    """Events for one subject, and the position that the writer has seen of it (``START`` for a new subject)."""

    subject: str
    expected: Position
    events: tuple[object, ...]


def check_appends(appends: Sequence[Append]) -> None:
    """Refuse what no adapter can store atomically: a subject named twice, or an expectation without an event.

    Raises:
        ValueError: a bug of the caller.
    """
    subjects = [a.subject for a in appends]
    if not appends or len(set(subjects)) != len(subjects) or not all(a.events for a in appends):
        raise ValueError(f"an append names each subject once, with at least one event; this one names {subjects}")


class Tail(Protocol):
    """A running delivery."""

    async def close(self) -> None:
        """Stop; nothing is delivered after it returns."""
        ...


class EventStore(Protocol):
    """An append-only log with one sequence over all subjects."""

    async def append(self, appends: Sequence[Append], context: Context) -> tuple[Recorded, ...]:
        """Store all events or none, in the order given.

        Raises:
            Conflict: a subject is not where ``expected`` says.
            Unavailable: no clear answer; the events may be stored.
            StoreFull: no room; nothing is stored.
        """
        ...

    async def read(self, subject: str) -> tuple[Recorded, ...]:
        """All events of one subject, oldest first; empty where there is none. As new as the newest append.

        Raises:
            Unavailable: no answer.
            Damaged: an event cannot be read.
        """
        ...

    async def last_sequence(self) -> int:
        """Sequence of the newest event of the log, 0 where it is empty.

        Raises:
            Unavailable: no answer.
        """
        ...

    async def page(self, after: int) -> tuple[tuple[Recorded, ...], int]:
        """The next events with a sequence above ``after``, at most 1000, and how many the log has behind them.

        For those who read the log once, with no more rights than to read it; ``tail`` is faster and goes on.

        Raises:
            Unavailable: no answer.
            Damaged: an event cannot be read, or is missing.
        """
        ...

    async def tail(self, after: int, deliver: Callable[[Recorded], None], lost: Callable[[Exception], None]) -> Tail:
        """Deliver every event with a sequence above ``after``, once, in order, and go on with new ones.

        Survives restarts of the server without a gap. ``lost`` is called once, instead of a wrong delivery, where the
        tail cannot go on; nothing is delivered after it. It gets ``LogReplaced`` where the log turns out to be
        another one than was read before, ``Damaged`` where an event cannot be read, or whatever ``deliver`` raised.
        """
        ...
