"""The shape of every decision: initial, evolve, decide. Knows no aggregate, no store and no clock.

An aggregate's module has three members: ``initial`` (the state before any event), ``evolve(state, event)`` (total: it
never raises, whatever the order) and ``decide(state, command)`` (the events that make the command true, none where it
is true already, or why it can't be). The source of the shape is Chassaing's "decider" (dddeu-2023-deciders).
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec


class Rejected(msgspec.Struct, frozen=True, tag="rejected", tag_field="status"):
    """The answer to a command that can't be: an answer, not an error of turnout.

    Attributes:
        code: stable word for programs, e.g. ``version_unknown``.
        reason: one sentence with the names and numbers.
        hint: what to do next.
    """

    code: str
    reason: str
    hint: str


class Accepted(msgspec.Struct, frozen=True, tag="accepted", tag_field="status"):
    """The command is in the log.

    Attributes:
        stream: subject of the first event (or of the aggregate, where nothing was left to do).
        sequence: stream sequence of the last event; how far the log had come, where nothing was left to do.
        ids: what the command made, e.g. the switch id.
        events: ids of the events; empty where the command was true already.
    """

    stream: str
    sequence: int
    ids: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


class Failed(msgspec.Struct, frozen=True, tag="error", tag_field="status"):
    """No decision could be made or stored: the infrastructure failed (``code``), or turnout did (``bug``).

    The same command may be sent again with the same id.
    """

    code: str
    reason: str
    hint: str


Answer = Accepted | Rejected | Failed

S = TypeVar("S")
E = TypeVar("E", contravariant=True)
C = TypeVar("C", contravariant=True)


class Decider(Protocol[S, E, C]):
    """One aggregate: a module (or object) with these three members."""

    initial: S

    def evolve(self, state: S, event: E) -> S:
        """State after the event."""
        ...

    def decide(self, state: S, command: C) -> tuple[object, ...] | Rejected:
        """Events that make the command true, or why not."""
        ...
