"""The shape of a saga's answer. Knows no saga."""

from __future__ import annotations

from datetime import datetime

import msgspec


class Write(msgspec.Struct, frozen=True):
    """A command for one aggregate (``model``, ``switch``, ``route``, …)."""

    aggregate: str
    id: str
    command: object


class Owed(msgspec.Struct, frozen=True):
    """Commands that take effect together or not at all.

    ``id`` is made from what is owed, never at random: two leaders that see the same world owe the same command, and it
    takes effect once.
    """

    id: str
    writes: tuple[Write, ...]
    correlation: str


class Agenda(msgspec.Struct, frozen=True):
    """What is owed now, and when (UTC) to look again even if nothing happens; None where only events matter."""

    owed: tuple[Owed, ...] = ()
    wake: datetime | None = None


def merge(agendas: tuple[Agenda, ...]) -> Agenda:
    """All that is owed, in order, and the earliest wake-up."""
    wakes = [a.wake for a in agendas if a.wake is not None]
    return Agenda(tuple(o for a in agendas for o in a.owed), min(wakes) if wakes else None)
