"""Decisions of one model's routing table: revisions that only grow."""

from __future__ import annotations

import msgspec

from turnout.core.decider import Rejected
from turnout.core.persistent import PersistentMap
from turnout.events.route import Hold, Mirror, RouteChanged, RouteEvent, Rule, Split


class RouteState(msgspec.Struct, frozen=True):
    """The newest revision, and for each version that left, the revision that it left with."""

    model: str = ""
    revision: int = 0
    splits: tuple[Split, ...] = ()
    salt: str = ""
    drain_s: float = 0.0
    left: PersistentMap[str, int] = msgspec.field(default_factory=PersistentMap[str, int])
    rules: tuple[Rule, ...] = ()
    mirrors: tuple[Mirror, ...] = ()
    candidate: str = ""
    hold: Hold | None = None

    def names(self, instance: str) -> bool:
        """Whether a gateway that routes by this revision may send to the instance."""
        return any(e.instance == instance for part in self.parts for e in part.endpoints)

    @property
    def parts(self) -> tuple[Split | Mirror, ...]:
        """Everything that has a version and instances."""
        return (*self.splits, *self.mirrors) if self.mirrors else self.splits


initial = RouteState()


def evolve(state: RouteState, event: RouteEvent) -> RouteState:
    """State after the event. A revision that is not newer changes nothing."""
    if event.revision <= state.revision:
        return state
    here = [split.version for split in event.splits]
    if event.mirrors:
        here += [mirror.version for mirror in event.mirrors]
    left = state.left
    for version in here:
        left = left.minus(version)
    for part in state.parts:
        if part.version not in here:
            left = left.plus(part.version, event.revision)
    return RouteState(
        event.model,
        event.revision,
        event.splits,
        event.salt,
        event.drain_s,
        left,
        event.rules,
        event.mirrors,
        event.candidate,
        event.hold,
    )


class ChangeRoute(msgspec.Struct, frozen=True):
    """Make this the table. ``revision`` is the one that it shall have: the newest plus one."""

    model: str
    revision: int
    splits: tuple[Split, ...]
    salt: str
    drain_s: float
    cause: str
    rules: tuple[Rule, ...] = ()
    mirrors: tuple[Mirror, ...] = ()
    candidate: str = ""
    hold: Hold | None = None


RouteCommand = ChangeRoute


def decide(state: RouteState, command: RouteCommand) -> tuple[RouteEvent, ...] | Rejected:
    """A new revision, if it says something new and was made from the newest."""
    if same(state, command):
        return ()
    if command.revision != state.revision + 1:
        return Rejected(
            "revision_stale",
            f"revision {command.revision} of {command.model} was made from an old table; the newest is "
            f"{state.revision}",
            "decide again from the newest revision",
        )
    total = sum(split.weight for split in command.splits)
    if command.splits and abs(total - 100) > 1e-6:
        return Rejected("weights_off", f"the weights of {command.model} add up to {total:g}", "make them add up to 100")
    return (
        RouteChanged(
            command.model,
            command.revision,
            command.splits,
            command.salt,
            command.drain_s,
            command.cause,
            command.rules,
            command.mirrors,
            command.candidate,
            command.hold,
        ),
    )


def same(state: RouteState, command: ChangeRoute) -> bool:
    """Whether the command asks for the table that is there."""
    return (
        command.splits == state.splits
        and command.salt == state.salt
        and command.rules == state.rules
        and command.mirrors == state.mirrors
        and command.candidate == state.candidate
        and command.hold == state.hold
    )
