"""Decisions of one gateway process: whether it is awaited, and what it has acknowledged."""

from __future__ import annotations

import msgspec

from turnout.core.decider import Rejected
from turnout.core.persistent import PersistentMap
from turnout.events.gateway import (
    GatewayEvent,
    GatewayJoined,
    GatewayLeft,
    GatewayLost,
    RouteApplied,
    VersionDrained,
)


class GatewayState(msgspec.Struct, frozen=True, gc=False):
    """What one gateway has said.

    Attributes:
        gateway: its id, one for each process start.
        address: its URL.
        live: its acknowledgements are awaited.
        left: it stopped by itself.
        applied: model → revision that it routes by.
        first: model → the first revision that it ever routed by: versions that left before it were never used here.
        drained: (model, version) → revision that the version had left by when nothing was in flight any more.
    """

    gateway: str = ""
    address: str = ""
    live: bool = False
    left: bool = False
    applied: PersistentMap[str, int] = msgspec.field(default_factory=PersistentMap[str, int])
    first: PersistentMap[str, int] = msgspec.field(default_factory=PersistentMap[str, int])
    drained: PersistentMap[tuple[str, str], int] = msgspec.field(default_factory=PersistentMap[tuple[str, str], int])

    def has_drained(self, model: str, version: str, revision: int) -> bool:
        """Whether nothing of the version, which left the route with ``revision``, can be in flight here."""
        if self.applied.get(model, 0) < revision:
            return False
        return self.drained.get((model, version), 0) >= revision or self.first.get(model, 0) >= revision


initial = GatewayState()


def evolve(state: GatewayState, event: GatewayEvent) -> GatewayState:
    """State after the event. A later revision is never replaced by a lower one."""
    match event:
        case RouteApplied():  # the bulk of a log: no captures, which cost more than the rest of it
            before = state.applied.get(event.model, 0)
            if event.revision <= before:
                return state
            applied = state.applied.plus(event.model, event.revision)
            first = state.first if before else state.first.plus(event.model, event.revision)
            return GatewayState(event.gateway, state.address, state.live, state.left, applied, first, state.drained)
        case VersionDrained():
            key = event.model, event.version
            if event.revision <= state.drained.get(key, 0):
                return state
            drained = state.drained.plus(key, event.revision)
            return GatewayState(
                event.gateway, state.address, state.live, state.left, state.applied, state.first, drained
            )
        case GatewayJoined(gateway, address):
            return GatewayState(gateway, address, True, False, state.applied, state.first, state.drained)
        case GatewayLost():
            return msgspec.structs.replace(state, live=False)
        case GatewayLeft():
            return msgspec.structs.replace(state, live=False, left=True)


class JoinGateway(msgspec.Struct, frozen=True):
    """A gateway will take requests."""

    gateway: str
    address: str


class ReportApplied(msgspec.Struct, frozen=True):
    """The gateway routes by this revision from now on."""

    gateway: str
    model: str
    revision: int


class ReportDrained(msgspec.Struct, frozen=True):
    """The gateway has nothing in flight on a version that its revision does not name."""

    gateway: str
    model: str
    version: str
    revision: int
    ended: int = 0


class LeaveGateway(msgspec.Struct, frozen=True):
    """The gateway stops; nothing is in flight."""

    gateway: str


class LoseGateway(msgspec.Struct, frozen=True):
    """The leader has not heard of the gateway for too long."""

    gateway: str
    silent_s: float


GatewayCommand = JoinGateway | ReportApplied | ReportDrained | LeaveGateway | LoseGateway


def decide(state: GatewayState, command: GatewayCommand) -> tuple[GatewayEvent, ...] | Rejected:
    """Record what the gateway says, if it is known and it is news."""
    match command:
        case JoinGateway(gateway, address):
            if state.live and state.address == address:
                return ()
            return (GatewayJoined(gateway, address),)
        case _ if not state.gateway:
            return Rejected(
                "gateway_unknown",
                f"gateway {command.gateway} has not joined",
                "send gateway.join first",
            )
        case LoseGateway(gateway, silent_s):
            return (GatewayLost(gateway, silent_s),) if state.live else ()
        case LeaveGateway(gateway):
            return () if state.left else (GatewayLeft(gateway),)
        case ReportApplied(gateway, model, revision):
            return (RouteApplied(gateway, model, revision),) if revision > state.applied.get(model, 0) else ()
        case ReportDrained(gateway, model, version, revision, ended):
            if revision <= state.drained.get((model, version), 0):
                return ()
            return (VersionDrained(gateway, model, version, revision, ended),)
