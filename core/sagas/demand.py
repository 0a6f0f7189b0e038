"""The demand saga: when a model that is served on demand goes back to zero. Pure; loading it is placement's.

A gateway with a waiting request has asked for the model (``DemandSeen``), and placement restores its active version. It
is let go when nobody has used it for its ``keep_alive``, when it can't be loaded, or when another model that is asked
for finds every place taken: not before its minimum residency is over, so that two models in turn on one place are
served in batches and do not chase each other out.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from turnout.core.model import EndDemand
from turnout.core.sagas import placement, routes
from turnout.core.sagas.owed import Agenda, Owed, Write

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turnout.core.model import ModelState
    from turnout.core.world import World


#: How long the last requests of a model that is let go may run, where no switch has said it, seconds.
DRAIN_S = 600.0


class Use(msgspec.Struct, frozen=True):
    """What all live gateways together do with a model, by its newest route.

    Attributes:
        in_flight: requests whose last byte has not come.
        held: requests that wait.
        idle_s: seconds since the last byte of the last request, or since it could be used at all; 0 while it is in use.
    """

    in_flight: int
    held: int
    idle_s: float


def agenda(world: World, uses: Mapping[str, Use], now: datetime) -> Agenda:
    """What must be let go now. ``uses``: of the models that every live gateway has told about."""
    owed: list[Owed] = []
    wakes: list[datetime] = []
    for name in sorted(world.models):
        state = world.models[name]
        if not state.serving.on_demand or not state.wanted or state.switch:
            continue
        ended = _failed(world, state, now) or _idle(world, state, uses.get(name), now)
        if isinstance(ended, Owed):
            owed.append(ended)
        elif ended is not None:
            wakes.append(ended)
    if not owed:
        displaced = _displaced(world, uses, now)
        if isinstance(displaced, Owed):
            owed.append(displaced)
        elif displaced is not None:
            wakes.append(displaced)
    return Agenda(tuple(owed), min(wakes) if wakes else None)


def _failed(world: World, state: ModelState, now: datetime) -> Owed | None:
    """A load that was asked for has failed: who waits is told, and the next request tries again."""
    failures = world.failures.get((state.model, state.active))
    if failures is None or failures.stage == "serving" or state.wanted_at is None or failures.last < state.wanted_at:
        return None
    if world.instances_of(state.model, state.active, "requested", "loading", "waking", "ready"):
        return None
    return _end(world, state, "failed", failures.reason or "it could not be loaded", now)


def _idle(world: World, state: ModelState, use: Use | None, now: datetime) -> Owed | datetime | None:
    """Its keep_alive is over; else when it will be, if nobody comes."""
    keep_s = state.serving.keep_alive_s
    if keep_s < 0 or use is None or use.in_flight or use.held or not world.ready(state.model, state.active):
        return None
    if use.idle_s < keep_s:
        return now + timedelta(seconds=keep_s - use.idle_s)
    return _end(world, state, "idle", f"not used for {use.idle_s:.0f} s (keep_alive {keep_s:g} s)", now)


def _displaced(world: World, uses: Mapping[str, Use], now: datetime) -> Owed | datetime | None:
    """The model that makes room for the one that has waited longest; a time where its residency has to pass first."""
    waiting = [
        state
        for state in world.models.values()
        if state.serving.on_demand and state.wanted and _waits_for_a_place(world, state)
    ]
    if not waiting:
        return None
    first = min(waiting, key=lambda state: (state.wanted_at is not None, state.wanted_at, state.model))
    kind = first.versions[first.active].kind
    homes = {w.worker for w in world.workers.values() if w.live and kind in w.engines}
    if any(world.instances[i].worker in homes and _leaves(world, i) for i in world.alive):
        return None  # room is being made already
    found: list[tuple[bool, datetime, ModelState]] = []
    for state in world.models.values():
        if not state.serving.on_demand or not state.wanted or state.switch or state.model == first.model:
            continue
        here = [one for one in world.ready(state.model, state.active) if one.worker in homes]
        since = max((t for one in here if (t := world.ready_at(one.instance)) is not None), default=None)
        if since is not None:
            use = uses.get(state.model)
            busy = use is None or bool(use.in_flight)
            found.append((busy, since + timedelta(seconds=state.serving.residency_s), state))
    due = [(busy, until, state) for busy, until, state in found if until <= now]
    if due:
        _, _, victim = min(due, key=lambda one: (one[0], one[1], one[2].model))
        return _end(world, victim, "room", f"makes room for {first.model} {first.active}", now)
    return min((until for _, until, _ in found), default=None)


def _waits_for_a_place(world: World, state: ModelState) -> bool:
    if world.instances_of(state.model, state.active, "requested", "loading", "waking", "ready"):
        return False
    return placement.no_room(world, state.model, state.active) is not None


def _leaves(world: World, instance: str) -> bool:
    """Whether an instance is on its way out."""
    one = world.instances[instance]
    if one.phase == "draining":
        return True
    if one.phase == "ready" and world.makes_room(one):
        return True
    state = world.models.get(one.model)
    return state is not None and state.at_zero and state.active == one.version


def _end(world: World, state: ModelState, cause: str, reason: str, now: datetime) -> Owed:
    """Let it go: the fact, and the route without it, in one write."""
    route = world.state("route", state.model)
    write, revision = routes.change(
        world,
        state.model,
        routes.source_only(""),
        salt=route.salt,
        drain_s=route.drain_s or DRAIN_S,
        cause="repair",
        waits=routes.hold(world, state.model, reason if cause == "failed" else ""),
    )
    end = Write("model", state.model, EndDemand(state.model, cause, reason, now))
    return Owed(f"demand.{state.model}.{revision}", (end, write), state.model)
