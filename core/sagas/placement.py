"""The placement saga: which instances should exist, where, and which may go. Pure; knows no process.

It restores what a model needs, repairs routes whose instances came or went, and lets go of what nobody needs — but only
once no live gateway can have a request on it (invariant 2; the worker adds its own proof of quiet).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from turnout.core.cache import Idle, evict
from turnout.core.instance import DrainInstance, InstanceState, RequestInstance
from turnout.core.sagas import routes
from turnout.core.sagas.owed import Agenda, Owed, Write
from turnout.core.switch import ENDED

if TYPE_CHECKING:
    from turnout.core.config import ModelSwitchingConfig
    from turnout.core.world import World

#: Seconds before the n-th retry of a failed load: 1, 2, 4, … at most this.
BACK_OFF_S_MAX = 60.0


def agenda(world: World, config: ModelSwitchingConfig, now: datetime) -> Agenda:
    """Restore, repair, let go: everything that is owed outside the steps of a switch."""
    owed: list[Owed] = []
    wakes: list[datetime] = []
    for model in sorted(world.models):
        for version in _needed(world, model):
            again = _restore(world, model, version, now)
            if isinstance(again, Owed):
                owed.append(again)
            elif again is not None:
                wakes.append(again)
        if repair := _repair(world, model):
            owed.append(repair)
    owed.extend(_let_go(world, config, now))
    wakes.extend(
        since + timedelta(seconds=config.model_ttl_seconds)
        for id, since in world.idle_since.items()
        if world.instances[id].phase == "ready"
    )
    later = [w for w in wakes if w > now]
    return Agenda(tuple(owed), min(later) if later else None)


def request(world: World, model: str, version: str, *, cause: str, attempt: int = 1) -> Write | None:
    """Ask the emptiest fitting worker for an instance; None where none has room. ``id`` is the new instance's."""
    engine = world.models[model].versions[version]
    counts = {w.worker: 0 for w in world.workers.values() if w.live and engine.kind in w.engines}
    for id in world.alive:
        worker = world.instances[id].worker
        if worker in counts:
            counts[worker] += 1
    free = [w for w, n in counts.items() if n < world.workers[w].capacity]
    if not free:
        return None
    worker = min(free, key=lambda w: (counts[w], w))
    instance = f"i{world.requested_instances + 1}"
    return Write("instance", instance, RequestInstance(instance, model, version, worker, engine, cause, attempt))


def awaits_inspection(world: World, model: str, version: str) -> bool:
    """Whether a load must wait until a worker has looked at the version's files.

    What was loaded before is not held up: it was registered before files were looked at, and may be needed at once.
    """
    return world.models[model].awaits_inspection(version) and (model, version) not in world.loads


def no_room(world: World, kind: str) -> str:
    """Why no worker can take an instance of this engine kind, with the numbers."""
    live = [w for w in world.workers.values() if w.live]
    fitting = [w for w in live if kind in w.engines]
    if not live:
        return "no worker is live"
    if not fitting:
        return f"none of the {len(live)} live workers may start {kind} engines"
    return f"all {sum(w.capacity for w in fitting)} places of the {len(fitting)} fitting workers are taken"


def evictable(world: World) -> tuple[Idle, ...]:
    """Ready instances that no route uses and nothing needs."""
    found: list[Idle] = []
    for id, since in world.idle_since.items():
        one = world.instances[id]
        state = world.models.get(one.model)
        if state is None or one.phase != "ready" or one.version in _needed(world, one.model):
            continue
        found.append(Idle(id, one.worker, since, one.version == state.undo_target))
    return tuple(found)


def _needed(world: World, model: str) -> tuple[str, ...]:
    """Versions that must have a ready instance or be on the way to one."""
    state = world.models[model]
    switch = world.state("switch", state.switch) if state.switch else None
    needed = [state.active] if state.active and not state.at_zero else []
    needed.extend(rule.version for rule in state.rules if rule.version and rule.version not in needed)
    if switch is not None and switch.phase not in ENDED:
        needed.extend(v for v in (switch.target, switch.to) if v and v not in needed)
    return tuple(v for v in needed if v in state.versions)  # only what is registered can be loaded


def _restore(world: World, model: str, version: str, now: datetime) -> Owed | datetime | None:
    """Replace a needed version's lost instance; a time where the back-off has to pass first."""
    state = world.models[model]
    switch = world.state("switch", state.switch) if state.switch else None
    if switch is not None and version == switch.target and (switch.source or switch.step == 0):
        return None  # the switch loads its target itself, and rolls back where it dies
    if state.rejection(version) is not None or awaits_inspection(world, model, version):
        return None
    homes = {w.worker for w in world.workers.values() if w.live}
    here = world.instances_of(model, version, "requested", "loading", "ready")
    if any(i.worker in homes or not homes for i in here):
        return None
    failures = world.failures.get((model, version))
    attempt = 1 if failures is None else failures.count + 1
    if failures is not None:
        due = failures.last + timedelta(seconds=min(BACK_OFF_S_MAX, 2.0 ** (failures.count - 1)))
        if now < due:
            return due
    write = request(world, model, version, cause="restore", attempt=attempt)
    if write is None:
        return None
    return Owed(f"restore.{write.id}", (write,), model)


def _repair(world: World, model: str) -> Owed | None:
    """Bring the route's instances up to date where they came or went."""
    route = world.state("route", model)
    wanted = routes.table(world, model)
    switch = world.state("switch", world.models[model].switch)
    salt = switch.switch if switch.phase not in ENDED and switch.step > 0 else route.salt
    waits = world.models[model].serving.on_demand
    if not route.revision and not waits and not any(world.ready(model, v) for v in wanted.shares):
        return None
    write, revision = routes.change(world, model, wanted, salt=salt, drain_s=route.drain_s, cause="repair")
    if revision == route.revision:
        return None
    return Owed(f"repair.{model}.{revision}", (write,), model)


def _let_go(world: World, config: ModelSwitchingConfig, now: datetime) -> list[Owed]:
    leaving: dict[str, str] = {}
    for id in sorted(world.alive):
        one = world.instances[id]
        if one.phase in ("requested", "loading", "ready") and (why := _unwanted(world, one)):
            leaving[id] = why
    idle = tuple(i for i in evictable(world) if i.instance not in leaving)
    leaving.update(evict(idle, now, config.max_cached_models, config.model_ttl_seconds))
    leaving.update(_make_room(world, tuple(i for i in idle if i.instance not in leaving)))
    return [
        Owed(f"drain.{id}", (Write("instance", id, DrainInstance(id, why)),), world.instances[id].model)
        for id, why in leaving.items()
        if safe(world, world.instances[id])
    ]


def _unwanted(world: World, one: InstanceState) -> str:
    """Why nobody wants it at all; empty where it is needed or may be kept warm."""
    state = world.models.get(one.model)
    if state is None or one.version not in state.versions:
        return f"{one.version} was deregistered"
    if one.version in _needed(world, one.model):
        return ""
    if state.at_zero and one.version == state.active and not state.switch:
        return "nobody uses it: it is loaded again on demand"
    if one.phase == "ready":
        return ""
    return "no switch waits for it any more"


def _make_room(world: World, idle: tuple[Idle, ...]) -> dict[str, str]:
    """The least recently used idle instance, where a switch or a restore finds every place taken."""
    for model in world.models:
        for version in _needed(world, model):
            if world.instances_of(model, version, "requested", "loading", "ready"):
                continue
            kind = world.models[model].versions[version].kind
            if request(world, model, version, cause="") is not None:
                continue
            homes = {w.worker for w in world.workers.values() if w.live and kind in w.engines}
            fitting = [i for i in idle if i.worker in homes]
            leaving = (world.instances[i] for i in world.alive if world.instances[i].phase == "draining")
            if fitting and not any(i.worker in homes for i in leaving):
                oldest = min(fitting, key=lambda i: (i.protected, i.since, i.instance))
                return {oldest.instance: f"makes room for {model} {version}"}
    return {}


def users(world: World, one: InstanceState) -> tuple[str, ...]:
    """Live gateways that may send to the instance or have a request on it."""
    route = world.state("route", one.model)
    if route.names(one.instance):
        return tuple(sorted(world.live_gateways))
    left = route.left.get(one.version, 0)
    drained = {g for g in world.live_gateways if world.gateways[g].has_drained(one.model, one.version, left)}
    return tuple(sorted(world.live_gateways - drained))


def safe(world: World, one: InstanceState) -> bool:
    """Invariant 2, the controller's half: no live gateway can send to it or has a request on it."""
    if one.phase != "ready":
        return True
    if world.state("route", one.model).names(one.instance):
        return False
    return routes.drained(world, one.model, one.version)
