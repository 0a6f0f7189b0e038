"""What of a model shall be loaded, and stay so: pins, wishes to preload, replicas. A part of the model's decisions."""

from __future__ import annotations

from datetime import datetime

import msgspec

from turnout.core.decider import Rejected
from turnout.events.model import (
    EvictionRequested,
    ModelEvent,
    PreloadEnded,
    PreloadRequested,
    ReplicasChanged,
    VersionPinned,
    VersionUnpinned,
)

#: Priorities go from minus this to this.
PRIORITY_MOST = 100
REPLICAS_MOST = 64


class Wish(msgspec.Struct, frozen=True):
    """What was asked of a version, when (UTC) and why; fields as in ``PreloadRequested``."""

    priority: int
    at: datetime
    reason: str = ""


class Residence(msgspec.Struct, frozen=True):
    """What was asked for.

    Attributes:
        pinned: versions whose instances are kept.
        wishes: version to preload → its wish.
        replicas: version → instances while it serves, where that is not one.
        evicted: version → when its idle instances were asked to go, and why.
    """

    pinned: tuple[str, ...] = ()
    wishes: dict[str, Wish] = {}
    replicas: dict[str, int] = {}
    evicted: dict[str, Wish] = {}

    def wanted(self, version: str) -> int:
        """Instances that the version has while it serves."""
        return self.replicas.get(version, 1)


class PinVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keep the version's instances whatever the cache says."""

    model: str
    version: str
    reason: str = ""


class UnpinVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Let the cache decide again."""

    model: str
    version: str


class WishPreload(msgspec.Struct, frozen=True):
    """Load the version once there is room; fields as in ``PreloadRequested``."""

    model: str
    version: str
    priority: int
    at: datetime
    reason: str = ""


class EndPreload(msgspec.Struct, frozen=True):
    """The wish is fulfilled, has failed, or is withdrawn."""

    model: str
    version: str
    outcome: str
    reason: str = ""


class Evict(msgspec.Struct, frozen=True):
    """Let the version's idle instances go; fields as in ``EvictionRequested``."""

    model: str
    version: str
    at: datetime
    reason: str = ""


class SetReplicas(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many instances while the version serves."""

    model: str
    version: str
    replicas: int


ResidenceCommand = PinVersion | UnpinVersion | WishPreload | EndPreload | Evict | SetReplicas


def evolve(state: Residence, event: ModelEvent) -> Residence:
    """State after the event; events of other things change nothing."""
    replace = msgspec.structs.replace
    match event:
        case VersionPinned(_, version):
            return replace(state, pinned=(*(v for v in state.pinned if v != version), version))
        case VersionUnpinned(_, version):
            return replace(state, pinned=tuple(v for v in state.pinned if v != version))
        case PreloadRequested(_, version, priority, at, reason):
            others = {v: wish for v, wish in state.wishes.items() if v != version}
            return replace(state, wishes={**others, version: Wish(priority, at, reason)})
        case PreloadEnded(_, version):
            return replace(state, wishes={v: wish for v, wish in state.wishes.items() if v != version})
        case EvictionRequested(_, version, at, reason):
            others = {v: wish for v, wish in state.wishes.items() if v != version}
            return replace(state, wishes=others, evicted={**state.evicted, version: Wish(0, at, reason)})
        case ReplicasChanged(_, version, replicas):
            single = {v: n for v, n in state.replicas.items() if v != version}
            return replace(state, replicas=single if replicas == 1 else {**single, version: replicas})
        case _:
            return state


def forget(state: Residence, version: str) -> Residence:
    """The version is gone."""
    return Residence(
        tuple(v for v in state.pinned if v != version),
        {v: wish for v, wish in state.wishes.items() if v != version},
        {v: n for v, n in state.replicas.items() if v != version},
        {v: wish for v, wish in state.evicted.items() if v != version},
    )


def decide(state: Residence, command: ResidenceCommand, versions: frozenset[str]) -> tuple[ModelEvent, ...] | Rejected:
    """Record what is news. ``versions``: those that are registered."""
    model, version = command.model, command.version
    if version not in versions:
        if isinstance(command, EndPreload | UnpinVersion):
            return ()
        known = ", ".join(sorted(versions)) or "none"
        return Rejected(
            "version_unknown",
            f"{model} has no version {version!r} (registered: {known})",
            f"register it first: turnout register {model} {version} --engine …",
        )
    match command:
        case PinVersion():
            return () if version in state.pinned else (VersionPinned(model, version, command.reason),)
        case UnpinVersion():
            return (VersionUnpinned(model, version),) if version in state.pinned else ()
        case WishPreload():
            if not -PRIORITY_MOST <= command.priority <= PRIORITY_MOST:
                return Rejected(
                    "parameters_invalid",
                    f"priority is {command.priority}",
                    f"give a whole number from -{PRIORITY_MOST} to {PRIORITY_MOST}",
                )
            wish = state.wishes.get(version)
            if wish is not None and wish.priority >= command.priority:
                return ()
            return (PreloadRequested(model, version, command.priority, command.at, command.reason),)
        case EndPreload():
            if version not in state.wishes:
                return ()
            return (PreloadEnded(model, version, command.outcome, command.reason),)
        case Evict():
            before = state.evicted.get(version)
            if before is not None and before.at >= command.at and version not in state.wishes:
                return ()
            return (EvictionRequested(model, version, command.at, command.reason),)
        case SetReplicas():
            if not 1 <= command.replicas <= REPLICAS_MOST:
                return Rejected(
                    "parameters_invalid",
                    f"replicas is {command.replicas}",
                    f"give a whole number from 1 to {REPLICAS_MOST}",
                )
            if state.wanted(version) == command.replicas:
                return ()
            return (ReplicasChanged(model, version, command.replicas),)
