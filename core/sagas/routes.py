"""Which table a model should have, given its switch and its proven instances. Pure; the sagas turn it into commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turnout.core.route import ChangeRoute, same
from turnout.core.sagas.owed import Write
from turnout.core.switch import SwitchState
from turnout.events.route import Endpoint, Hold, Mirror, Split

if TYPE_CHECKING:
    from turnout.core.instance import InstanceState
    from turnout.core.model import ModelState
    from turnout.core.world import World


class Table(msgspec.Struct, frozen=True):
    """What a route shall say, before it is known which instances are there.

    Attributes:
        shares: version → percent; 0 for a version at hand for retries or for a rule; empty: nothing serves.
        mirror: version that gets copies of ``mirrored`` percent of the requests; empty for none.
        candidate: the running switch's target, empty where none runs.
    """

    shares: dict[str, float]
    mirror: str = ""
    mirrored: float = 0.0
    candidate: str = ""


def table(world: World, model: str) -> Table:
    """What the model's state asks for."""
    state = world.state("model", model)
    switch: SwitchState = world.state("switch", state.switch) if state.switch else SwitchState()
    match switch.phase:
        case "draining":
            return Table({switch.target: 100.0})
        case "rolling_back":
            return source_only(switch.home)
        case "holding":
            return Table({})
        case "stepping" | "stepped" | "baking":
            return split(switch, switch.weight, switch.mirror)
        case _:
            # At zero, also while it is being loaded again: only a version that is absent has left the gateways.
            gone = state.serving.on_demand and not (state.wanted and _usable(world, model, state.active))
            return source_only("" if gone else state.active)


def way_back(world: World, switch: SwitchState) -> str:
    """The version that can take everything from the target now: the source, else the newest that is known to be good.

    Only what has a ready instance counts; empty where nothing has. What a rollback has chosen stays while it is ready.
    """
    known = reversed(world.state("model", switch.model).known_good)
    choice = (switch.home, switch.source, *(version for version in known if version != switch.target))
    return next((version for version in choice if version and world.ready(switch.model, version)), "")


def source_only(version: str) -> Table:
    """Everything on one version; nothing at all where there is none."""
    return Table({version: 100.0} if version else {})


def split(switch: SwitchState, weight: float, mirror: float = 0.0) -> Table:
    """The switch's two versions, the target with ``weight`` percent, or with copies only."""
    if not switch.source or switch.alone:
        return Table({switch.target: 100.0})
    if not weight:
        shares = {switch.source: 100.0}
        return Table(shares, switch.target if mirror else "", mirror, switch.target)
    return Table({switch.source: 100.0 - weight, switch.target: weight}, candidate=switch.target)


def change(
    world: World,
    model: str,
    wanted: Table,
    *,
    salt: str,
    drain_s: float,
    cause: str,
    waits: Hold | msgspec.UnsetType | None = msgspec.UNSET,
) -> tuple[Write, int]:
    """The route that says so over all proven instances, and the revision that it will have.

    ``waits``: how requests wait; unset for what the model's state asks for.
    """
    route = world.state("route", model)
    rules = world.state("model", model).rules
    shares = dict(wanted.shares)
    for rule in rules:
        if rule.version and shares:
            shares.setdefault(rule.version, 0.0)

    def endpoints(version: str) -> tuple[Endpoint, ...]:
        return tuple(Endpoint(i.instance, i.address, i.served) for i in _usable(world, model, version))

    command = ChangeRoute(
        model,
        route.revision + 1,
        tuple(Split(version, weight, endpoints(version)) for version, weight in shares.items()),
        salt,
        drain_s,
        cause,
        rules,
        (Mirror(wanted.mirror, wanted.mirrored, endpoints(wanted.mirror)),) if wanted.mirror else (),
        wanted.candidate,
        hold(world, model) if isinstance(waits, msgspec.UnsetType) else waits,
    )
    if same(route, command):  # already the table: the decider will write nothing
        command = msgspec.structs.replace(command, revision=route.revision)
    return Write("route", model, command), command.revision


def hold(world: World, model: str, failed: str = "") -> Hold | None:
    """Where requests wait while the model has no instance. ``failed``: why one more load on demand has failed."""
    state: ModelState = world.state("model", model)
    switch: SwitchState = world.state("switch", state.switch) if state.switch else SwitchState()
    return switch.hold if switch.holds else demand(state, failed)


def demand(state: ModelState, failed: str = "") -> Hold | None:
    """Where requests wait for a model that is loaded on demand. ``failed``: why one more load has failed."""
    serving = state.serving
    if not serving.on_demand or not state.active:
        return None
    failures, why = (state.failed + 1, failed) if failed else (state.failed, state.why)
    return Hold(serving.queue, serving.max_wait_s, True, failures, why)


def _usable(world: World, model: str, version: str) -> tuple[InstanceState, ...]:
    """Ready instances that may be routed to."""
    return tuple(one for one in world.ready(model, version) if not world.makes_room(one))


def applied(world: World, model: str, revision: int) -> tuple[str, ...] | None:
    """The live gateways, if every one of them routes by the revision or a later one; else None."""
    live = sorted(world.live_gateways)
    if all(world.gateways[g].applied.get(model, 0) >= revision for g in live):
        return tuple(live)
    return None


def drained(world: World, model: str, version: str) -> bool:
    """Whether no live gateway can have a request in flight on the version, nor send one."""
    route = world.state("route", model)
    if any(part.version == version for part in route.parts):
        return False
    left = route.left.get(version)
    if left is None:
        return True  # it was never in a route
    return all(world.gateways[g].has_drained(model, version, left) for g in world.live_gateways)
