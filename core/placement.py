"""Where a version can be loaded, at whose cost, and why not elsewhere: a ledger of memory and places. Pure.

The ledger charges each instance with what it was admitted with until it has been measured, and with that from then on.
What is asked to stop is charged until it has stopped. What sleeps is charged with what it still holds, and no place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turnout.core.cache import Idle, Leave, Room, make_room, sleepers
from turnout.core.memory import Need, estimate
from turnout.events.units import size

if TYPE_CHECKING:
    from turnout.core.cache import Policy
    from turnout.core.instance import InstanceState
    from turnout.core.worker import WorkerState
    from turnout.core.world import World

#: Of what is not bounded, or not known.
UNBOUNDED = 1 << 62

#: How well a place is: it fits now; once what stops has stopped; once idle instances have made room; not at all.
FITS, SOON, EVICTS, FULL = "fits", "soon", "evicts", "full"
_BEST_FIRST = (FITS, SOON, EVICTS, FULL)


class Offer(msgspec.Struct, frozen=True):
    """What one worker can offer a version, on its best device.

    Attributes:
        verdict: fits, soon (once what stops has stopped), evicts (once ``evict`` have made room) or full.
        why: one sentence with the numbers.
        need: what it was charged with.
        evict: idle instances that would have to go; for those in ``sleep`` it is enough that they sleep.
        lacks: places, memory or engine, where it is full.
        wake: the sleeping instance that would be woken; empty where a new one is loaded.
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
        for one in idle:
            self._idle.setdefault(one.worker, []).append(one)
        for id in world.alive:
            one_state = world.instances[id]
            asleep = one_state.phase == "asleep"
            room = Room(0 if asleep else 1, one_state.bytes, one_state.device_bytes)
            self._charge(self._held, one_state.worker, one_state.device, room)
            if asleep:
                self._asleep.setdefault((one_state.model, one_state.version), []).append(one_state)
            elif one_state.phase in ("draining", "sleeping"):  # of what sleeps the rest is known once it does
                self._charge(self._leaving, one_state.worker, one_state.device, room)
            else:
                self._homes.setdefault((one_state.model, one_state.version), []).append(one_state.worker)

    def held(self, worker: str) -> Room:
        """Places and host memory that are taken on a worker."""
        return self._held.get((worker, ""), Room())

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
        for worker in self._world.workers.values():
            if not worker.live:
                continue
            offer = self._best_device(worker, model, version, priority)
            total = worker.memory_bytes
            share = round(self.held(worker.worker).bytes / total, 1) if total else 0.0
            key = (
                offer.verdict == FULL,
                not offer.wake,
                _BEST_FIRST.index(offer.verdict),
                places.count(worker.place),
                homes.count(worker.worker),
                len(offer.evict),
                share,
                self.held(worker.worker).places,
                worker.worker,
            )
            found.append((key, offer))
        return tuple(offer for _, offer in sorted(found, key=lambda pair: pair[0]))

    def take(self, offer: Offer, model: str, version: str) -> None:
        """Plan with it: its room is taken, and what it evicts is leaving."""
        self._charge(self._held, offer.worker, offer.device, Room(1, offer.need.bytes, offer.need.device_bytes))
        self._homes.setdefault((model, version), []).append(offer.worker)
        sleepers = self._asleep.get((model, version), [])
        self._asleep[model, version] = [one for one in sleepers if one.instance != offer.wake]
        stay: list[Idle] = []
        for one in self._idle.get(offer.worker, []):
            if one.instance in offer.evict:
                room = one.sleep_room if one.instance in offer.sleep else one.room
                self._charge(self._leaving, one.worker, one.device, room)
            else:
                stay.append(one)
        self._idle[offer.worker] = stay

    def over(self, worker: str) -> dict[str, Leave]:
        """Idle instances that must go, as a worker holds more than it may: its bound was lowered, or engines grew."""
        state = self._world.workers[worker]
        idle = tuple(self._idle.get(worker, ()))
        for device in state.device_bytes or ("",):
            short = Room() - self._free(state, device) - self._of(self._leaving, worker, device)
            if short.bytes > 0 or short.device_bytes > 0:
                only_memory = msgspec.structs.replace(short, places=0)
                chosen = make_room(idle, only_memory, device, self._policy) or tuple(i for i in idle if not i.pinned)
                asleep = sleepers(chosen, only_memory, device)
                why = f"{worker} holds more than its memory"
                return {one.instance: Leave(why, sleeps=one.instance in asleep) for one in chosen}
        return {}

    def _best_device(self, worker: WorkerState, model: str, version: str, priority: int | None) -> Offer:
        spec = self._world.models[model].versions[version]
        need = estimate(self._world, model, version, worker.worker)
        if spec.kind not in worker.engines:
            kinds = ", ".join(worker.engines) or "none"
            why = f"it may not start {spec.kind} engines (only {kinds})"
            return Offer(worker.worker, "", FULL, why, need, lacks="engine")
        for one in self._asleep.get((model, version), ()):
            if one.worker == worker.worker:
                more = Need(max(0, need.bytes - one.bytes), max(0, need.device_bytes - one.device_bytes), need.source)
                offer = self._offer(worker, one.device, more, priority, one.instance)
                if offer.verdict != FULL:
                    return offer
        offers = [self._offer(worker, device, need, priority) for device in worker.device_bytes or ("",)]
        return min(offers, key=lambda o: (_BEST_FIRST.index(o.verdict), len(o.evict), self._held_on(worker, o.device)))

    def _held_on(self, worker: WorkerState, device: str) -> int:
        return self._of(self._held, worker.worker, device).device_bytes

    def _offer(self, worker: WorkerState, device: str, need: Need, priority: int | None, wake: str = "") -> Offer:
        free = self._free(worker, device)
        wanted = Room(1, need.bytes, need.device_bytes)
        numbers = self._numbers(worker, device, need, free)
        if (free - wanted).enough:
            return Offer(worker.worker, device, FITS, numbers, need, wake=wake)
        soon = free + self._of(self._leaving, worker.worker, device)
        if (soon - wanted).enough:
            why = f"{numbers}, and more once what stops has stopped"
            return Offer(worker.worker, device, SOON, why, need, wake=wake)
        idle = tuple(
            one
            for one in self._idle.get(worker.worker, ())
            if one.instance != wake and (priority is None or (one.priority < priority and not one.protected))
        )
        chosen = make_room(idle, wanted - soon, device, self._policy)
        if chosen is not None:
            names = ", ".join(self._name(one.instance) for one in chosen)
            return Offer(
                worker.worker,
                device,
                EVICTS,
                f"{numbers}; makes room: {names}",
                need,
                tuple(i.instance for i in chosen),
                wake=wake,
                sleep=sleepers(chosen, wanted - soon, device),
            )
        lacks = "places" if (soon - msgspec.structs.replace(wanted, places=0)).enough else "memory"
        return Offer(worker.worker, device, FULL, f"{numbers}; {self._kept(worker, device, idle)}", need, lacks=lacks)

    def _numbers(self, worker: WorkerState, device: str, need: Need, free: Room) -> str:
        parts: list[str] = []
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

    def _kept(self, worker: WorkerState, device: str, idle: tuple[Idle, ...]) -> str:
        """What could go, and what stays and why."""
        going = {one.instance: one for one in idle if not one.pinned}
        could = sum(one.bytes for one in going.values())
        stays: list[str] = []
        for id in sorted(self._world.alive):
            one = self._world.instances[id]
            if one.worker == worker.worker and id not in going and one.phase != "draining":
                stays.append(f"{self._name(id)} {size(one.bytes)}, {why_kept(self._world, one)}")
        kept = "; ".join(stays) or "nothing"
        return f"{size(could)} could be evicted; stays: {kept}"

    def _name(self, instance: str) -> str:
        one = self._world.instances[instance]
        return f"{one.model} {one.version} ({instance})"

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
