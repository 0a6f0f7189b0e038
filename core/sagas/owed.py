"""The shape of a saga's answer, and what its commands come to together. Knows no saga."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from turnout.core.decider import Rejected
from turnout.core.world import DECIDERS
from turnout.events import subjects

if TYPE_CHECKING:
    from turnout.core.world import World


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


def decide(world: World, writes: tuple[Write, ...]) -> dict[str, tuple[object, ...]] | Rejected:
    """Subject → events of all writes together; one refusal refuses all.

    Several writes to one aggregate are decided one after the other, each on what the one before has made true.
    """
    states: dict[str, Any] = {}
    decided: dict[str, tuple[object, ...]] = {}
    for write in writes:
        subject = subjects.event(write.aggregate, write.id)
        decider = DECIDERS[write.aggregate]
        state = states.get(subject, world.state(write.aggregate, write.id))
        events = decider.decide(state, write.command)
        if isinstance(events, Rejected):
            return events
        for event in events:
            state = decider.evolve(state, event)
        states[subject] = state
        decided[subject] = (*decided.get(subject, ()), *events)
    return {subject: events for subject, events in decided.items() if events}
