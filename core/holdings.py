"""What the cache of each worker holds, why each instance stays or goes, and who waits for room. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from turnout.core.cache import leaves_first
from turnout.core.placement import Ledger, why_kept
from turnout.core.sagas import placement

if TYPE_CHECKING:
    from turnout.core.cache import Idle, Policy
    from turnout.core.config import CacheConfig, ModelSwitchingConfig
    from turnout.core.instance import InstanceState
    from turnout.core.worker import WorkerState
    from turnout.core.world import World
    from turnout.events.worker import KeptEngine


class Held(msgspec.Struct, frozen=True):
    """One instance.

    Attributes:
        bytes: host memory that it is charged with, ``estimate`` until it has been measured.
        idle_since: UTC, since when no route uses it; None where one does.
        pinned: an operator wants it kept.
        leaves: its turn among those of its worker that make room, 1 for the next; 0 where it can't leave.
        why: why it stays, or why it would go.
    """

    instance: str
    model: str
    version: str
    phase: str
    tier: str
    bytes: int
    device: str
    device_bytes: int
    priority: int
    idle_since: datetime | None
    pinned: bool
    leaves: int
    why: str


class HeldEngine(msgspec.Struct, frozen=True):
    """An engine that is no instance's; fields as in ``KeptEngine``. ``leaves``, ``why``: as of an instance."""

    name: str
    role: str
    holds: str
    bytes: int
    device: str
    device_bytes: int
    leaves: int
    why: str


class WorkerHoldings(msgspec.Struct, frozen=True):
    """One live worker. Memory and places: what is held, of how much (0: not bounded).

    ``engines``: those that take room beside the instances.
    """

    worker: str
    places: int
    capacity: int
    bytes: int
    memory_bytes: int
    instances: tuple[Held, ...]
    engines: tuple[HeldEngine, ...] = ()


class Waiting(msgspec.Struct, frozen=True):
    """A version that shall be preloaded, and what it waits for."""

    model: str
    version: str
    priority: int
    reason: str
    waits_for: str


class Holdings(msgspec.Struct, frozen=True, tag="cache", tag_field="status"):
    """Everything; ``policy``, ``most`` and ``ttl_s`` as configured."""

    policy: str
    most: int
    ttl_s: float
    workers: tuple[WorkerHoldings, ...]
    waiting: tuple[Waiting, ...]


def holdings(world: World, config: ModelSwitchingConfig, cache: CacheConfig) -> Holdings:
    """What is held where, now."""
    idle = placement.evictable(world)
    ledger = Ledger(world, idle, cache.policy)
    workers: list[WorkerHoldings] = []
    for id, state in sorted(world.workers.items()):
        if not state.live:
            continue
        ours = sorted((one for one in ledger.may_leave(id) if not one.pinned), key=leaves_first(cache.policy))
        turns = {one.instance: turn for turn, one in enumerate(ours, 1)}
        here = sorted((world.instances[i] for i in world.alive if world.instances[i].worker == id), key=_by_name)
        held = ledger.held(id)
        kept = tuple(_held(world, one, turns.get(one.instance, 0), cache.policy) for one in here)
        engines = tuple(_engine(state, engine, here, turns.get(engine.name, 0)) for engine in ledger.kept(id))
        workers.append(WorkerHoldings(id, held.places, state.capacity, held.bytes, state.memory_bytes, kept, engines))
    full = _full(world, idle, config.max_cached_models)
    waiting = [
        Waiting(name, version, wish.priority, wish.reason, _waits_for(world, ledger, full, name, version))
        for name, model in sorted(world.models.items())
        for version, wish in model.residence.wishes.items()
    ]
    return Holdings(cache.policy, config.max_cached_models, config.model_ttl_seconds, tuple(workers), tuple(waiting))


def _by_name(one: InstanceState) -> tuple[str, str, str]:
    return (one.model, one.version, one.instance)


def _engine(worker: WorkerState, engine: KeptEngine, here: list[InstanceState], turn: int) -> HeldEngine:
    if engine.name in worker.released:
        why = "asked to end"
    elif engine.role == "base":
        users = sum(one.base == engine.name for one in here)
        why = f"{users} adapter{'' if users == 1 else 's'} on it: it ends with the last"
    else:
        why = f"number {turn} to make room (spares first); a version of its kind is put into it"
    return HeldEngine(
        engine.name, engine.role, engine.holds, engine.bytes, engine.device, engine.device_bytes, turn, why
    )


def _held(world: World, one: InstanceState, turn: int, policy: Policy) -> Held:
    state = world.models.get(one.model)
    since = world.idle_since.get(one.instance)
    pinned = state is not None and one.version in state.residence.pinned
    if one.phase == "draining":
        why = one.reason
    elif turn and since is not None:
        undo = "; an undo goes there" if state is not None and one.version == state.undo_target else ""
        by = "least recently used" if policy == "lru" else "cheapest to load again"
        why = f"number {turn} to make room ({by} first){undo}"
    else:
        why = why_kept(world, one)
    return Held(
        one.instance,
        one.model,
        one.version,
        one.phase,
        one.tier,
        one.bytes,
        one.device,
        one.device_bytes,
        one.priority,
        since,
        pinned,
        turn,
        why,
    )


def _full(world: World, idle: tuple[Idle, ...], most: int) -> dict[str, str]:
    """Workers that may keep no further idle instance, with the reason."""
    awake = {id: [one for one in idle if one.worker == id and not one.asleep] for id in world.workers}
    return {
        id: f"keeps {len(ours)} idle instances, {sum(one.pinned for one in ours)} of them pinned (max_cached_models)"
        for id, ours in awake.items()
        if len(ours) >= most
    }


def _waits_for(world: World, ledger: Ledger, full: dict[str, str], model: str, version: str) -> str:
    if world.instances_of(model, version, "requested", "loading", "waking"):
        return "its load"
    priority = world.models[model].residence.wishes[version].priority
    offers = ledger.offers(model, version, priority)
    if not offers:
        return "a worker"
    return "; ".join(
        f"{offer.worker}: {offer.why}" + (f", {full[offer.worker]}" if offer.worker in full else "") for offer in offers
    )
