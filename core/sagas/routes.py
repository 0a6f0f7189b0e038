"""Which table a model should have, given its switch and its proven instances. Pure; the sagas turn it into commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turnout.core.route import ChangeRoute
from turnout.core.sagas.owed import Write
from turnout.core.switch import SwitchState
from turnout.events.route import Endpoint, Split

if TYPE_CHECKING:
    from turnout.core.world import World


def weights(world: World, model: str) -> dict[str, float]:
    """Version → percent that the model's state asks for; 0 for a version at hand for retries; empty: nothing serves."""
    state = world.state("model", model)
    switch: SwitchState = world.state("switch", state.switch) if state.switch else SwitchState()
    match switch.phase:
        case "draining":
            return {switch.target: 100.0}
        case "stepping" | "stepped" | "baking":
            return split(switch, switch.weight)
        case _:
            return {state.active: 100.0} if state.active else {}


def split(switch: SwitchState, weight: float) -> dict[str, float]:
    """The switch's two versions, the target with ``weight`` percent."""
    if not switch.source:
        return {switch.target: 100.0}
    return {switch.source: 100.0 - weight, switch.target: weight}


def change(
    world: World, model: str, shares: dict[str, float], *, salt: str, drain_s: float, cause: str
) -> tuple[Write, int]:
    """The route with these shares over all proven instances, and the revision that it will have."""
    route = world.state("route", model)
    splits = tuple(
        Split(version, weight, tuple(Endpoint(i.instance, i.address) for i in world.ready(model, version)))
        for version, weight in shares.items()
    )
    revision = route.revision + 1
    if splits == route.splits and salt == route.salt:
        revision = route.revision  # already the table: the decider will write nothing
    return Write("route", model, ChangeRoute(model, revision, splits, salt, drain_s, cause)), revision


def applied(world: World, model: str, revision: int) -> tuple[str, ...] | None:
    """The live gateways, if every one of them routes by the revision or a later one; else None."""
    live = sorted(world.live_gateways)
    if all(world.gateways[g].applied.get(model, 0) >= revision for g in live):
        return tuple(live)
    return None


def drained(world: World, model: str, version: str) -> bool:
    """Whether no live gateway can have a request in flight on the version, nor send one."""
    route = world.state("route", model)
    if any(s.version == version for s in route.splits):
        return False
    left = route.left.get(version)
    if left is None:
        return True  # it was never in a route
    return all(world.gateways[g].has_drained(model, version, left) for g in world.live_gateways)
