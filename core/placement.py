"""Where a version can be loaded, at whose cost, and why not elsewhere: a ledger of memory and places. Pure.

The ledger charges each instance with what it was admitted with until it has been measured, and with that from then on.
What is asked to stop is charged until it has stopped. What sleeps is charged with what it still holds, and no place.
Engines that are no instance's are charged, too: a base by itself, and its adapters with no place; a spare until it gets
a version's weights, whose instance is then charged instead. A spare is the first to make room.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from turnout.core.cache import Idle, Leave, Room, leaves_first, make_room, sleepers
from turnout.core.fit import fit
from turnout.core.memory import Need, adapter_need, estimate
from turnout.core.residence import PRIORITY_MOST
from turnout.core.world import TIERS
from turnout.events.units import size

if TYPE_CHECKING:
    from turnout.core.cache import Policy
    from turnout.core.instance import InstanceState
    from turnout.core.worker import WorkerState
    from turnout.core.world import World
    from turnout.events.worker import KeptEngine

#: Of what is not bounded, or not known.
UNBOUNDED = 1 << 62

#: How well a place is: it fits now; once what stops has stopped; once idle instances have made room; not at all.
FITS, SOON, EVICTS, FULL = "fits", "soon", "evicts", "full"
_BEST_FIRST = (FITS, SOON, EVICTS, FULL)
#: Ways to make a version ready where it is not warm, the fastest first.
ADAPTER, WAKE, SPARE, COLD = TIERS


class Offer(msgspec.Struct, frozen=True):
    """What one worker can offer a version, on its best device.

    Attributes:
        verdict: fits, soon (once what stops has stopped), evicts (once ``evict`` have made room) or full.
        why: one sentence with the numbers.
        need: what its instance is charged with.
        evict: idle instances that would have to go; for those in ``sleep`` it is enough that they sleep.
        lacks: places, memory or engine, where it is full.
        wake: the sleeping instance that would be woken; empty where a new one is loaded.
        tier: how it would be made ready: adapter, wake, spare or cold.
        into: the running engine that it would be put into, or share; empty for none.
        ends: spares that would have to go.
    """

    worker: str
    device: str
    verdict: str
    why: str
    need: Need
    evict: tuple[str, ...] = ()
    lacks: str = ""
    wake: str = ""
    sleep: tuple[str, ...] = ()
    tier: str = COLD
    into: str = ""
    ends: tuple[str, ...] = ()


class _Way(msgspec.Struct, frozen=True):
    """One way to load a version on a worker. ``uses``: the engine, or the sleeping instance, that it begins with.

    ``wanted``: the room that it takes beyond what is charged already.
    """

    tier: str
    device: str
    need: Need
    wanted: Room
    uses: str = ""


class Ledger:
    """What is held on each live worker. One pass over the living instances; ``take`` plans further ones.

    Args:
        world: the fold.
        idle: what may be evicted.
        policy: who leaves first.
    """

    def __init__(self, world: World, idle: tuple[Idle, ...], policy: Policy = "lru") -> None:
        self._world = world
        self._policy: Policy = policy
        self._idle: dict[str, list[Idle]] = {}
        #: (worker, device) → room that is held there, and how much of it is about to be free. Device "" is the host.
        self._held: dict[tuple[str, str], Room] = {}
        self._leaving: dict[tuple[str, str], Room] = {}
        #: (model, version) → where its instances are.
        self._homes: dict[tuple[str, str], list[str]] = {}
        self._asleep: dict[tuple[str, str], list[InstanceState]] = {}
        #: Worker → engines that a version could be put into, or share.
        self._usable: dict[str, list[KeptEngine]] = {}
        self._kept_there: dict[str, list[KeptEngine]] = {}
        here: dict[str, list[InstanceState]] = {}
        for id in world.alive:
            one = world.instances[id]
            here.setdefault(one.worker, []).append(one)
            asleep = one.phase == "asleep"
            room = Room(0 if asleep or one.shares else 1, one.bytes, one.device_bytes)
            self._charge(self._held, one.worker, one.device, room)
            if asleep:
                self._asleep.setdefault((one.model, one.version), []).append(one)
            elif one.phase in ("draining", "sleeping"):  # of what sleeps the rest is known once it does
                self._charge(self._leaving, one.worker, one.device, room)
            else:
                self._homes.setdefault((one.model, one.version), []).append(one.worker)
        for state in world.workers.values():
            if state.live:
                ours = [one for one in idle if one.worker == state.worker]
                self._idle[state.worker] = self._count_kept(state, ours, here.get(state.worker, []))

    def _count_kept(self, worker: WorkerState, idle: list[Idle], here: list[InstanceState]) -> list[Idle]:
        """Charge the engines that are no instance's. Returns what may leave, spares and bases among it."""
        for engine in worker.kept:
            of = next((one.phase for one in here if one.instance == engine.instance), "")
            claimed = any(one.into == engine.name and one.phase in ("requested", "loading") for one in here)
            if not engine.is_charged(of, claimed=claimed):
                continue
            self._kept_there.setdefault(worker.worker, []).append(engine)
            self._charge(self._held, worker.worker, engine.device, _room(engine))
            if engine.role == "base":
                users = [one for one in here if engine.name in (one.base, one.into)]
                staying = [one for one in users if one.phase != "draining"]
                if not staying:
                    self._charge(self._leaving, worker.worker, engine.device, _room(engine))
                    continue
                idle = self._with_base(engine, {one.instance for one in staying}, idle)
            elif engine.name in worker.released:
                self._charge(self._leaving, worker.worker, engine.device, _room(engine))
                continue
            else:
                idle = [*idle, _idle_spare(worker.worker, engine)]
            self._usable.setdefault(worker.worker, []).append(engine)
        return idle

    def _with_base(self, engine: KeptEngine, users: set[str], idle: list[Idle]) -> list[Idle]:
        """A base leaves with the last of its adapters: what that one frees, where all of them may leave."""
        leaving = [one for one in idle if one.instance in users and not one.pinned]
        if len(leaving) < len(users):
            return idle
        last = max(leaving, key=leaves_first(self._policy))
        both = msgspec.structs.replace(
            last, bytes=last.bytes + engine.bytes, device_bytes=last.device_bytes + engine.device_bytes, shares=False
        )
        return [both if one is last else one for one in idle]

    def held(self, worker: str) -> Room:
        """Places and host memory that are taken on a worker."""
        return self._held.get((worker, ""), Room())

    def may_leave(self, worker: str) -> tuple[Idle, ...]:
        """What may make room on a worker: idle instances and spares."""
        return tuple(self._idle.get(worker, ()))

    def kept(self, worker: str) -> tuple[KeptEngine, ...]:
        """Engines that are no instance's and take room of their own."""
        return tuple(self._kept_there.get(worker, ()))

    def offers(self, model: str, version: str, priority: int | None = None) -> tuple[Offer, ...]:
        """What each live worker can offer, the best first.

        Args:
            model: the served name.
            version: what shall be loaded.
            priority: evict only what has a lower one, and nothing that an undo needs; None: whatever is idle.
        """
        found: list[tuple[tuple[object, ...], Offer]] = []
        homes = self._homes.get((model, version), [])
        places = [self._world.workers[home].place for home in homes]
        several = self._world.models[model].residence.wanted(version) > 1
        for worker in self._world.workers.values():
            if not worker.live:
                continue
            offer = self._best_way(worker, model, version, priority)
            total = worker.memory_bytes
            share = round(self.held(worker.worker).bytes / total, 1) if total else 0.0
            tier = TIERS.index(offer.tier)
            spread = (places.count(worker.place), homes.count(worker.worker))
            key = (
                offer.verdict == FULL,
                not offer.wake,
                _BEST_FIRST.index(offer.verdict),
                *((*spread, tier) if several else (tier, *spread)),
                len(offer.evict) + len(offer.ends),
                share,
                self.held(worker.worker).places,
                worker.worker,
            )
            found.append((key, offer))
        return tuple(offer for _, offer in sorted(found, key=lambda pair: pair[0]))

    def take(self, offer: Offer, model: str, version: str) -> None:
        """Plan with it: its room is taken, and what it evicts is leaving."""
        room = Room(1, offer.need.bytes, offer.need.device_bytes)
        usable = self._usable.get(offer.worker, [])
        if offer.tier == ADAPTER:
            room = msgspec.structs.replace(room, places=0)
        elif offer.tier == SPARE:
            room -= _room(next(engine for engine in usable if engine.name == offer.into))
        self._charge(self._held, offer.worker, offer.device, room)
        self._homes.setdefault((model, version), []).append(offer.worker)
        sleepers = self._asleep.get((model, version), [])
        self._asleep[model, version] = [one for one in sleepers if one.instance != offer.wake]
        gone = {*offer.ends, offer.into if offer.tier == SPARE else ""}
        self._usable[offer.worker] = [engine for engine in usable if engine.name not in gone]
        stay: list[Idle] = []
        for one in self._idle.get(offer.worker, []):
            if one.instance in offer.evict or one.instance in offer.ends:
                room = one.sleep_room if one.instance in offer.sleep else one.room
                self._charge(self._leaving, one.worker, one.device, room)
            elif one.instance not in gone:
                stay.append(one)
        self._idle[offer.worker] = stay

    def lacks(self, worker: str, engine: KeptEngine) -> str:
        """Why one more engine has no room on a worker, in numbers; empty where it has."""
        state = self._world.workers[worker]
        free = self._free(state, engine.device)
        if (free - _room(engine)).enough:
            return ""
        taken = f"{self.held(worker).places} of {state.capacity} places are taken"
        on_device = ""
        if engine.device:
            on_device = f"{size(engine.device_bytes)} of {engine.device} ({size(free.device_bytes)} are free), "
        return f"it needs {size(engine.bytes)}, {size(free.bytes)} are free, {on_device}and {taken}"

    def over(self, worker: str) -> dict[str, Leave]:
        """What must go, as a worker holds more than it may: its bound was lowered, or engines grew."""
        state = self._world.workers[worker]
        idle = tuple(self._idle.get(worker, ()))
        for device in state.device_bytes or ("",):
            short = Room() - self._free(state, device) - self._of(self._leaving, worker, device)
            if short.bytes > 0 or short.device_bytes > 0:
                only_memory = msgspec.structs.replace(short, places=0)
                chosen = make_room(idle, only_memory, device, self._policy) or tuple(i for i in idle if not i.pinned)
                asleep = sleepers(chosen, only_memory, device)
                why = f"{worker} holds more than its memory"
                return {
                    one.instance: Leave(why, sleeps=one.instance in asleep, spare=worker if one.spare else "")
                    for one in chosen
                }
        return {}

    def _best_way(self, worker: WorkerState, model: str, version: str, priority: int | None) -> Offer:
        spec = self._world.models[model].versions[version]
        need = estimate(self._world, model, version, worker.worker)
        if spec.kind not in worker.engines:
            kinds = ", ".join(worker.engines) or "none"
            why = f"it may not start {spec.kind} engines (only {kinds})"
            return Offer(worker.worker, "", FULL, why, need, lacks="engine")
        for one in self._asleep.get((model, version), ()):
            if one.worker == worker.worker:
                more = Need(max(0, need.bytes - one.bytes), max(0, need.device_bytes - one.device_bytes), need.source)
                way = _Way(WAKE, one.device, more, Room(1, more.bytes, more.device_bytes), one.instance)
                offer = self._offer(worker, way, priority)
                if offer.verdict != FULL:
                    return offer
        wanted = Room(1, need.bytes, need.device_bytes)
        ways = [_Way(COLD, device, need, wanted) for device in worker.device_bytes or ("",)]
        fits = fit(spec, self._world.models[model].validated.get(version))
        struck = self._world.struck.get((worker.worker, model, version), frozenset())
        for engine in self._usable.get(worker.worker, ()):
            known_bad = (ADAPTER if spec.adapter else SPARE, engine.holds) in struck
            if fits and engine.fit == fits and (engine.role == "base") == bool(spec.adapter) and not known_bad:
                if spec.adapter:
                    little = adapter_need(self._world, model, version)
                    room = Room(0, little.bytes, little.device_bytes)
                    ways.append(_Way(ADAPTER, engine.device, little, room, engine.name))
                else:
                    ways.append(_Way(SPARE, engine.device, need, wanted - _room(engine), engine.name))
        offers = [self._offer(worker, way, priority) for way in ways]
        return min(
            offers,
            key=lambda o: (
                _BEST_FIRST.index(o.verdict),
                TIERS.index(o.tier),
                len(o.evict) + len(o.ends),
                self._held_on(worker, o.device),
            ),
        )

    def _held_on(self, worker: WorkerState, device: str) -> int:
        return self._of(self._held, worker.worker, device).device_bytes

    def _offer(self, worker: WorkerState, way: _Way, priority: int | None) -> Offer:
        device, need, wanted = way.device, way.need, way.wanted
        free = self._free(worker, device)
        numbers = self._numbers(worker, way, free)
        made = Offer(
            worker.worker,
            device,
            FITS,
            numbers,
            need,
            tier=way.tier,
            wake=way.uses if way.tier == WAKE else "",
            into=way.uses if way.tier in (ADAPTER, SPARE) else "",
        )
        if (free - wanted).enough:
            return made
        replace = msgspec.structs.replace
        soon = free + self._of(self._leaving, worker.worker, device)
        if (soon - wanted).enough:
            return replace(made, verdict=SOON, why=f"{numbers}, and more once what stops has stopped")
        idle = tuple(
            one
            for one in self._idle.get(worker.worker, ())
            if one.instance != way.uses and (priority is None or (one.priority < priority and not one.protected))
        )
        chosen = make_room(idle, wanted - soon, device, self._policy)
        if chosen is not None:
            names = ", ".join(self._name(one) for one in chosen)
            return replace(
                made,
                verdict=EVICTS,
                why=f"{numbers}; makes room: {names}",
                evict=tuple(i.instance for i in chosen if not i.spare),
                ends=tuple(i.instance for i in chosen if i.spare),
                sleep=sleepers(chosen, wanted - soon, device),
            )
        lacks = "places" if (soon - replace(wanted, places=0)).enough else "memory"
        return replace(made, verdict=FULL, why=f"{numbers}; {self._kept(worker, idle)}", lacks=lacks)

    def _numbers(self, worker: WorkerState, way: _Way, free: Room) -> str:
        need, device = way.need, way.device
        parts: list[str] = []
        if way.tier in (ADAPTER, SPARE):
            engine = next(e for e in self._usable[worker.worker] if e.name == way.uses)
            what = f"holds {engine.holds or 'nothing yet'} and {size(engine.bytes)}"
            parts.append(
                f"shares {engine.name}, which {what}" if way.tier == ADAPTER else f"takes {engine.name}, which {what}"
            )
        if worker.memory_bytes:
            known = f"needs {size(need.bytes)} ({need.source})" if need.known else "needs an unknown size"
            parts.append(f"{known}, free {size(free.bytes)} of {size(worker.memory_bytes)}")
        if device:
            parts.append(
                f"needs {size(need.device_bytes)} of {device}, free {size(free.device_bytes)} of "
                f"{size(worker.device_bytes[device])}"
            )
        taken = self.held(worker.worker).places
        parts.append(f"{taken} of {worker.capacity} places taken")
        return ", ".join(parts)

    def _kept(self, worker: WorkerState, idle: tuple[Idle, ...]) -> str:
        """What could go, and what stays and why."""
        going = {one.instance: one for one in idle if not one.pinned}
        could = sum(one.bytes for one in going.values())
        stays: list[str] = []
        for id in sorted(self._world.alive):
            one = self._world.instances[id]
            if one.worker == worker.worker and id not in going and one.phase != "draining":
                stays.append(f"{_instance_name(one)} {size(one.bytes)}, {why_kept(self._world, one)}")
        kept = "; ".join(stays) or "nothing"
        return f"{size(could)} could be evicted; stays: {kept}"

    def _name(self, one: Idle) -> str:
        return one.instance if one.spare else _instance_name(self._world.instances[one.instance])

    def _free(self, worker: WorkerState, device: str) -> Room:
        total = Room(
            worker.capacity,
            worker.memory_bytes or UNBOUNDED,
            worker.device_bytes.get(device, 0) if device else UNBOUNDED,
        )
        return total - self._of(self._held, worker.worker, device)

    @staticmethod
    def _of(book: dict[tuple[str, str], Room], worker: str, device: str) -> Room:
        """Places and host memory of a worker, with the memory of one of its devices."""
        host = book.get((worker, ""), Room())
        if not device:
            return host
        return Room(host.places, host.bytes, book.get((worker, device), Room()).device_bytes)

    @staticmethod
    def _charge(book: dict[tuple[str, str], Room], worker: str, device: str, room: Room) -> None:
        book[worker, ""] = book.get((worker, ""), Room()) + Room(room.places, room.bytes)
        if device:
            book[worker, device] = book.get((worker, device), Room()) + Room(0, 0, room.device_bytes)


def _instance_name(one: InstanceState) -> str:
    return f"{one.model} {one.version} ({one.instance})"


def _room(engine: KeptEngine) -> Room:
    return Room(1, engine.bytes, engine.device_bytes)


def _idle_spare(worker: str, engine: KeptEngine) -> Idle:
    """A spare among what may make room: what is loaded ahead for the lowest of wishes does not push it out."""
    return Idle(
        engine.name,
        worker,
        datetime.min.replace(tzinfo=UTC),
        protected=False,
        device=engine.device,
        bytes=engine.bytes,
        device_bytes=engine.device_bytes,
        priority=-PRIORITY_MOST,
        spare=True,
    )


def why_kept(world: World, one: InstanceState) -> str:
    """Why an instance can't be evicted, in a word or two."""
    state = world.models.get(one.model)
    if state is None:
        return "in use"
    if one.version == state.active:
        return "active"
    if one.version == state.target:
        return "target of a switch"
    if any(rule.version == one.version for rule in state.rules):
        return "named by a rule"
    if one.version in state.residence.pinned:
        return "pinned"
    return "loading" if one.phase in ("requested", "loading", "waking") else "in use or of no lower priority"
