"""The placement saga: which instances should exist, where, and which may go. Pure; knows no process.

It restores what a model needs, repairs routes whose instances came or went, and lets go of what nobody needs — but only
once no live gateway can have a request on it (invariant 2; the worker adds its own proof of quiet).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from turnout.core.cache import Idle, Leave, Room, evict, leaves_first
from turnout.core.config import CACHE, CacheConfig
from turnout.core.decider import Rejected
from turnout.core.instance import DrainInstance, InstanceState, RequestInstance, SleepInstance, WakeInstance
from turnout.core.memory import estimate
from turnout.core.model import ReportInspected, digest
from turnout.core.placement import FITS, FULL, SOON, Ledger, Offer
from turnout.core.residence import EndPreload, Wish
from turnout.core.sagas import routes
from turnout.core.sagas.owed import Agenda, Owed, Write
from turnout.core.switch import ENDED
from turnout.core.worker import ReleaseSpare
from turnout.events import subjects
from turnout.events.units import size

if TYPE_CHECKING:
    from turnout.core.config import ModelSwitchingConfig
    from turnout.core.world import World

Writes = tuple[Write, ...]

#: Cause of an instance that nobody has switched to yet.
PRELOAD = "preload"
_LOADING = ("requested", "loading", "waking")

#: Seconds before the n-th retry of a failed load: 1, 2, 4, … at most this.
BACK_OFF_S_MAX = 60.0


def agenda(world: World, config: ModelSwitchingConfig, now: datetime, cache: CacheConfig = CACHE) -> Agenda:
    """Restore, repair, let go, preload: everything that is owed outside the steps of a switch."""
    owed: list[Owed] = []
    wakes: list[datetime] = []
    models = sorted(world.models, key=lambda name: _turn(world, name))
    wanted = [(model, version) for model in models for version in needed(world, model)]
    first: list[tuple[str, str]] = []
    for model, version in sorted(wanted, key=lambda one: one[1] != world.models[one[0]].active):
        again = _restore(world, model, version, now, tuple(first))
        if isinstance(again, Owed):
            owed.append(again)
            continue
        if again is not None:
            wakes.append(again)
        if version == world.models[model].active and missing(world, model, version) and loadable(world, model, version):
            first.append((model, version))  # what serves gets its room back before a rule's version takes it
    owed.extend(repair for model in models if (repair := _repair(world, model)))
    owed.extend(rejected for model in models for rejected in _reject_unseen(world, model))
    let_go, short = _let_go(world, config, cache, now)
    owed.extend(let_go)
    owed.extend(_preload(world, config, cache, short=short))
    wakes.extend(
        since + timedelta(seconds=config.model_ttl_seconds * (2 if world.instances[id].phase == "asleep" else 1))
        for id, since in world.idle_since.items()
        if world.instances[id].phase in ("ready", "asleep")
    )
    later = [w for w in wakes if w > now]
    return Agenda(tuple(owed), min(later) if later else None)


def _reject_unseen(world: World, model: str) -> list[Owed]:
    """Versions of which every live worker says that it can't see the files: the last that might have is gone."""
    state = world.models[model]
    owed: list[Owed] = []
    for version, said in state.unseen.items():
        spec = state.versions.get(version)
        if spec is None:
            continue
        able = [w.worker for w in world.workers.values() if w.live and spec.kind in w.engines]
        if not able or not said.keys() >= set(able):
            continue
        newest = said[able[-1]]
        report = ReportInspected(
            model,
            version,
            newest.worker,
            digest(spec),
            code=newest.code,
            reason=newest.reason,
            hint="copy the files there: a worker that joins looks again; or register the version again",
        )
        id = f"unseen.{world.last_event(subjects.event('model', model))}.{version}"
        owed.append(Owed(id, (Write("model", model, report),), model))
    return owed


def _turn(world: World, model: str) -> tuple[float, str]:
    """In which order models get free places: those that are asked for after all others, the longest wait first."""
    wanted_at = world.models[model].wanted_at
    return 0.0 if wanted_at is None else wanted_at.timestamp(), model


def request(
    world: World,
    model: str,
    version: str,
    *,
    cause: str,
    attempt: int = 1,
    count: int = 1,
    first: tuple[tuple[str, str], ...] = (),
) -> Writes | None:
    """Ask the best fitting workers for so many instances, all or none; None where there is no room for all now.

    Sleeping ones are woken before others are loaded. ``first``: (model, version) whose room must be left.
    """
    ledger = Ledger(world, ())
    for other, theirs in first:
        plan(world, ledger, other, theirs, missing(world, other, theirs))
    planned = plan(world, ledger, model, version, count)
    if any(offer.verdict != FITS for offer in planned) or len(planned) < count:
        return None
    woken = [_request(world, offer, model, version, cause=cause) for offer in planned if offer.wake]
    loaded = [
        _request(world, offer, model, version, cause=cause, attempt=attempt, number=number)
        for number, offer in enumerate(offer for offer in planned if not offer.wake)
    ]
    return (*woken, *loaded)


def awaits_inspection(world: World, model: str, version: str) -> bool:
    """Whether a load must wait until a worker has looked at the version's files.

    What was loaded before is not held up: it was registered before files were looked at, and may be needed at once.
    """
    return world.models[model].awaits_inspection(version) and (model, version) not in world.loads


def loadable(world: World, model: str, version: str) -> bool:
    """Whether its files have been looked at, where it has any, and nothing speaks against loading them."""
    return world.models[model].rejection(version) is None and not awaits_inspection(world, model, version)


def too_large(world: World, model: str, version: str) -> Rejected | None:
    """Why no live worker can ever load it, whatever is unloaded, with the numbers; None where one may."""
    kind = world.models[model].versions[version].kind
    fitting = [w for w in world.workers.values() if w.live and kind in w.engines]
    whys: list[str] = []
    for worker in fitting:
        need = estimate(world, model, version, worker.worker)
        if not worker.memory_bytes or need.bytes <= worker.memory_bytes:
            return None
        whys.append(f"{worker.worker}: needs {size(need.bytes)} ({need.source}), has {size(worker.memory_bytes)}")
    if not fitting:
        return None
    hint = "give a worker more memory ([worker] memory), or register it smaller"
    return Rejected("no_memory", f"{model} {version} can never be loaded: {'; '.join(whys)}", hint)


def plan(world: World, ledger: Ledger, model: str, version: str, count: int) -> tuple[Offer, ...]:
    """The best offers for so many instances, one after the other; ends with the first that is full."""
    planned: list[Offer] = []
    for _ in range(count):
        best = next(iter(ledger.offers(model, version)), None)
        if best is None:
            break
        planned.append(best)
        if best.verdict == FULL:
            break
        ledger.take(best, model, version)
    return tuple(planned)


def missing(world: World, model: str, version: str) -> int:
    """How many instances a version lacks: of the wanted ones, those that are neither ready nor on the way."""
    homes = {w.worker for w in world.workers.values() if w.live}
    here = world.instances_of(model, version, "requested", "loading", "waking", "ready")
    counted = [i for i in here if i.worker in homes or not homes]
    return max(0, world.models[model].residence.wanted(version) - len(counted))


def something_needed_waits(world: World) -> bool:
    """Whether an instance that something needs is still to be asked for."""
    return any(
        missing(world, model, version) and loadable(world, model, version)
        for model in world.models
        for version in needed(world, model)
    )


def no_room(world: World, model: str, version: str, cache: CacheConfig = CACHE) -> Rejected | None:
    """Why the instances that a version lacks can't be loaded, with the numbers; None where they can.

    Nothing is unloaded for it: what would have to go is only counted.
    """
    count = missing(world, model, version)
    ledger = Ledger(world, (*evictable(world), *_loading_ahead(world)), cache.policy)
    planned = plan(world, ledger, model, version, count)
    if len(planned) == count and all(offer.verdict != FULL for offer in planned):
        return None
    kind = world.models[model].versions[version].kind
    start = f"start a worker that may run {kind} engines (turnout worker), or raise its capacity"
    if any(state.residence.pinned for state in world.models.values()):
        start += "; or let something go that is pinned (turnout unpin MODEL VERSION)"
    if not planned:
        return Rejected("no_capacity", f"{model} {version} can't be loaded: no worker is live", start)
    offers = [planned[-1], *(o for o in ledger.offers(model, version) if o.worker != planned[-1].worker)]
    whys = "; ".join(f"{offer.worker}: {offer.why}" for offer in offers)
    which = f" ({len(planned) - 1} of {count} instances would fit)" if count > 1 else ""
    lacks = {offer.lacks for offer in offers}
    if "memory" in lacks:
        hint = "deregister or unpin something, give a worker more memory ([worker] memory), or register it smaller"
        return Rejected("no_memory", f"{model} {version} can't be loaded{which}: {whys}", hint)
    if lacks == {"engine"}:
        whys = f"none of the {len(offers)} live workers may start {kind} engines"
    return Rejected("no_capacity", f"{model} {version} can't be loaded{which}: {whys}", start)


def must_swap(world: World, model: str, source: str, target: str) -> bool:
    """Whether the instances that the target lacks have room only where those of the source leave."""
    count = missing(world, model, target)
    serving = tuple(
        _idle(world, one, since)
        for one in world.ready(model, source)
        if (since := world.ready_at(one.instance)) is not None
    )
    spare = (*evictable(world), *_loading_ahead(world))
    return (
        count > 0
        and not _has_room(world, spare, model, target, count)
        and _has_room(world, (*spare, *serving), model, target, count)
    )


def _has_room(world: World, idle: tuple[Idle, ...], model: str, version: str, count: int) -> bool:
    """Whether so many instances have room, now or once what stops and some of the idle ones have left."""
    planned = plan(world, Ledger(world, idle), model, version, count)
    return len(planned) == count and all(offer.verdict != FULL for offer in planned)


def evictable(world: World) -> tuple[Idle, ...]:
    """Ready and sleeping instances that no route uses and nothing needs."""
    found: list[Idle] = []
    for id, since in world.idle_since.items():
        one = world.instances[id]
        state = world.models.get(one.model)
        if state is None or one.phase not in ("ready", "asleep"):
            continue
        surplus = one.phase == "asleep" and one.version in state.versions and not missing(world, one.model, one.version)
        if surplus or one.version not in needed(world, one.model):
            found.append(_idle(world, one, since))
    return tuple(found)


def _loading_ahead(world: World) -> tuple[Idle, ...]:
    """Preloads that are under way and nothing needs: they give way to what is needed, and their wishes wait again."""
    found: list[Idle] = []
    for id in sorted(world.alive):
        one = world.instances[id]
        state = world.models.get(one.model)
        wish = None if state is None else state.residence.wishes.get(one.version)
        ahead = one.cause == PRELOAD and one.phase in _LOADING
        if wish is not None and ahead and one.version not in needed(world, one.model):
            found.append(_idle(world, one, wish.at))
    return tuple(found)


def _idle(world: World, one: InstanceState, since: datetime) -> Idle:
    state = world.models[one.model]
    load = world.loads.get((one.model, one.version))
    rest = world.rests.get((one.worker, one.model, one.version))
    known = (rest.bytes, rest.device_bytes) if rest is not None else (one.bytes, 0)  # the device's is what it gives up
    return Idle(
        one.instance,
        one.worker,
        since,
        one.version == state.undo_target,
        one.device,
        one.bytes,
        one.device_bytes,
        max(one.priority, 0) if one.instance in world.served else one.priority,
        load.seconds if load else 0.0,
        world.uses.get((one.model, one.version), 0),
        one.version in state.residence.pinned,
        one.phase == "asleep",
        one.phase == "ready" and one.sleeps,
        Room(0, *known),
        one.shares,
    )


def needed(world: World, model: str) -> tuple[str, ...]:
    """Versions that must have a ready instance or be on the way to one."""
    state = world.models[model]
    switch = world.state("switch", state.switch) if state.switch else None
    away = state.at_zero or (switch is not None and switch.alone and switch.source == state.active)
    found = [state.active] if state.active and not away else []
    found.extend(rule.version for rule in state.rules if rule.version and rule.version not in found)
    if switch is not None and switch.phase not in ENDED:
        target = "" if switch.phase == "rolling_back" else switch.target  # it makes room for what takes its traffic
        found.extend(v for v in (target, switch.to) if v and v not in found)
    return tuple(v for v in found if v in state.versions)  # only what is registered can be loaded


def _restore(
    world: World, model: str, version: str, now: datetime, first: tuple[tuple[str, str], ...]
) -> Owed | datetime | None:
    """Replace a needed version's lost instance; a time where the back-off has to pass first."""
    state = world.models[model]
    switch = world.state("switch", state.switch) if state.switch else None
    if switch is not None and version == switch.target and (switch.step == 0 or (switch.source and not switch.alone)):
        return None  # the switch loads its target itself, and rolls back where the last of it dies
    if not loadable(world, model, version):
        return None
    if not missing(world, model, version):
        return None
    failures = world.failures.get((model, version))
    attempt = 1 if failures is None else failures.count + 1
    if failures is not None:
        due = failures.last + timedelta(seconds=min(BACK_OFF_S_MAX, 2.0 ** (failures.count - 1)))
        if now < due:
            return due
    writes = request(world, model, version, cause="restore", attempt=attempt, first=first)
    if writes is None:
        return None
    known = world.instances.get(writes[0].id)
    which = f"{writes[0].id}.{known.slept}" if known is not None else writes[0].id  # one instance is woken often
    return Owed(f"restore.{which}", writes, model)


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


def _let_go(world: World, config: ModelSwitchingConfig, cache: CacheConfig, now: datetime) -> tuple[list[Owed], bool]:
    """What leaves, and whether something that is needed waits for room."""
    leaving: dict[str, Leave] = {}
    for id in sorted(world.alive):
        one = world.instances[id]
        if one.phase in ("requested", "loading", "ready", "asleep") and (leave := _unwanted(world, config, one)):
            leaving[id] = leave
    idle = tuple(i for i in evictable(world) if i.instance not in leaving)
    leaving.update(evict(idle, now, config.max_cached_models, config.model_ttl_seconds, cache.policy))
    staying = tuple(i for i in idle if i.instance not in leaving)
    shrunk = _shrink(world, cache, staying)
    room, short = _make_room(world, cache, tuple(i for i in staying if i.instance not in shrunk))
    leaving.update(shrunk | room)
    return _all_leave(world, leaving), short


def _all_leave(world: World, leaving: dict[str, Leave]) -> list[Owed]:
    """What of it may leave now: no gateway can use it."""
    return [
        _leave(world, name, how) for name, how in leaving.items() if how.spare or safe(world, world.instances[name])
    ]


def _leave(world: World, instance: str, how: Leave) -> Owed:
    """It stops, or sleeps where that is enough."""
    if how.spare:
        release = Write("worker", how.spare, ReleaseSpare(how.spare, instance, how.reason))
        return Owed(f"release.{how.spare}.{instance}", (release,), "")
    one = world.instances[instance]
    if how.sleeps:
        sleep = SleepInstance(instance, _level(world, one, how.bytes), how.reason)
        return Owed(f"sleep.{instance}.{one.slept}", (Write("instance", instance, sleep),), one.model)
    drain = Write("instance", instance, DrainInstance(instance, how.reason))
    return Owed(f"drain.{instance}", (drain,), one.model)


def _level(world: World, one: InstanceState, free: int) -> int:
    """1, which keeps the weights in host memory, where that has room for them and for so many bytes; else 2."""
    bound = world.workers[one.worker].memory_bytes
    held = Ledger(world, ()).held(one.worker).bytes
    return 1 if not bound or held + one.device_bytes + free <= bound else 2


def _unwanted(world: World, config: ModelSwitchingConfig, one: InstanceState) -> Leave | None:
    """How it leaves that nobody wants at all; None where it is needed or may be kept."""
    state = world.models.get(one.model)
    may_sleep = one.phase == "ready" and one.sleeps and config.max_cached_models > 0
    if state is None or one.version not in state.versions:
        return Leave(f"{one.version} was deregistered")
    if one.phase == "ready" and world.makes_room(one):
        return Leave("makes room for another model", sleeps=may_sleep)
    if one.version in needed(world, one.model):
        return None
    asked, since = state.residence.evicted.get(one.version), world.idle_since.get(one.instance)
    if asked is not None and since is not None and since <= asked.at and one.version not in state.residence.pinned:
        return Leave(asked.reason)
    if state.at_zero and one.version == state.active and not state.switch and one.phase != "asleep":
        return Leave("nobody uses it: it is loaded again on demand", sleeps=may_sleep)
    if one.phase in ("ready", "asleep"):
        return None
    if one.cause == PRELOAD and one.version in state.residence.wishes:
        return None
    if one.cause == PRELOAD:
        return Leave("nobody wishes it to be preloaded any more")
    return Leave("no switch waits for it any more")


def _shrink(world: World, cache: CacheConfig, idle: tuple[Idle, ...]) -> dict[str, Leave]:
    """What leaves workers that hold more than they may: the bound was lowered, or engines grew."""
    ledger = Ledger(world, idle, cache.policy)
    return {
        instance: how
        for worker, state in sorted(world.workers.items())
        if state.live and (state.memory_bytes or state.device_bytes)
        for instance, how in ledger.over(worker).items()
    }


def _make_room(world: World, cache: CacheConfig, idle: tuple[Idle, ...]) -> tuple[dict[str, Leave], bool]:
    """What a switch or a restore that finds no room makes leave, and whether one finds none: one version at a time."""
    short = False
    for model in sorted(world.models):
        for version in needed(world, model):
            count = missing(world, model, version)
            if not count or not loadable(world, model, version):
                continue  # nothing is unloaded for what nobody has looked at yet
            ledger = Ledger(world, (*idle, *_loading_ahead(world)), cache.policy)
            planned = plan(world, ledger, model, version, count)
            short = short or any(offer.verdict != FITS for offer in planned)
            if any(offer.verdict == FULL for offer in planned):
                continue  # all or nothing: nothing is unloaded for what does not fit in the end
            why = f"makes room for {model} {version}"
            leaving = {name: how for offer in planned for name, how in _makes_room(offer, why).items()}
            if leaving:
                return leaving, True
    return {}, short


def _makes_room(offer: Offer, why: str) -> dict[str, Leave]:
    """What would have to go for an offer, and how."""
    leaving = {id: Leave(why, id in offer.sleep, offer.need.bytes) for id in offer.evict}
    return leaving | {name: Leave(why, spare=offer.worker) for name in offer.ends}


def _preload(world: World, config: ModelSwitchingConfig, cache: CacheConfig, *, short: bool) -> list[Owed]:
    """Fulfil, give up or wait with each wish; the highest priority first, one load at a time."""
    wishes = sorted(
        ((-wish.priority, wish.at, model, version) for model, state in world.models.items()
         for version, wish in state.residence.wishes.items()
         if version in state.versions),
    )  # fmt: skip
    owed: list[Owed] = []
    busy = short or any(
        world.instances[i].cause == PRELOAD and world.instances[i].phase in _LOADING for i in world.alive
    )
    for _, at, model, version in wishes:
        wish = world.models[model].residence.wishes[version]
        if world.ready(model, version):
            owed.append(_end_wish(model, version, wish, "ready"))
            continue
        if world.instances_of(model, version, *_LOADING) or awaits_inspection(world, model, version):
            continue
        if (refused := world.models[model].rejection(version)) is not None:
            owed.append(_end_wish(model, version, wish, "failed", refused.reason))
            continue
        if (large := too_large(world, model, version)) is not None:
            owed.append(_end_wish(model, version, wish, "failed", large.reason))
            continue
        failures = world.failures.get((model, version))
        if failures is not None and failures.last >= at:
            owed.append(_end_wish(model, version, wish, "failed", "its instance failed: turnout log tells why"))
            continue
        if busy:
            continue
        step = _preload_one(world, config, cache, model, version, wish.priority)
        busy = step is not None
        owed.extend(step or ())
    return owed


def _preload_one(
    world: World, config: ModelSwitchingConfig, cache: CacheConfig, model: str, version: str, priority: int
) -> tuple[Owed, ...] | None:
    """Load it where there is room, or let go of what has a lower priority; None where it has to wait."""
    idle = evictable(world)
    for offer in Ledger(world, idle, cache.policy).offers(model, version, priority):
        if offer.verdict == FULL:
            return None
        if offer.verdict == SOON:
            return ()
        kept = [i for i in idle if i.worker == offer.worker and not i.asleep and i.instance not in offer.evict]
        lower = sorted((i for i in kept if i.priority < priority and not i.pinned), key=leaves_first(cache.policy))
        beyond = max(0, len(kept) + 1 - config.max_cached_models)
        if beyond > len(lower):
            continue  # this worker keeps as many as it may, none of them worth less
        why = f"makes room to preload {model} {version}"
        leaving = {i.instance: Leave(why, i.sleeps, offer.need.bytes) for i in lower[:beyond]} | _makes_room(offer, why)
        if not leaving:
            write = _request(world, offer, model, version, cause=PRELOAD, priority=priority)
            which = f"{write.id}.{world.instances[offer.wake].slept}" if offer.wake else write.id
            return (Owed(f"preload.{which}", (write,), model),)
        return tuple(_all_leave(world, leaving))
    return None


def _end_wish(model: str, version: str, wish: Wish, outcome: str, reason: str = "") -> Owed:
    end = Write("model", model, EndPreload(model, version, outcome, reason))
    return Owed(f"preloaded.{model}.{version}.{wish.at.timestamp():.6f}", (end,), model)


def _request(
    world: World,
    offer: Offer,
    model: str,
    version: str,
    *,
    cause: str,
    attempt: int = 1,
    number: int = 0,
    priority: int = 0,
) -> Write:
    """Wake or load. ``number``: how many further instances are asked for before it in the same write."""
    if offer.wake:
        one = world.instances[offer.wake]
        admitted = one.bytes + offer.need.bytes, one.device_bytes + offer.need.device_bytes
        return Write("instance", offer.wake, WakeInstance(offer.wake, cause, *admitted))
    instance = f"i{world.requested_instances + 1 + number}"
    engine = world.models[model].versions[version]
    command = RequestInstance(
        instance, model, version, offer.worker, engine, cause, attempt,
        offer.need.bytes, offer.need.device_bytes, offer.device, priority, offer.into,
    )  # fmt: skip
    return Write("instance", instance, command)


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
