"""Which idle instances a worker may keep, which make room, and which of them need only sleep. Knows no process.

Sleep is tried before an end wherever it frees what is missing, as waking is faster than loading.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Policy = Literal["lru", "cost"]


class Room(msgspec.Struct, frozen=True):
    """Room on a worker, or the want of it: places for engines, host memory, memory of one device. Bytes."""

    places: int = 0
    bytes: int = 0
    device_bytes: int = 0

    def __add__(self, other: Room) -> Room:
        return Room(self.places + other.places, self.bytes + other.bytes, self.device_bytes + other.device_bytes)

    def __sub__(self, other: Room) -> Room:
        return Room(self.places - other.places, self.bytes - other.bytes, self.device_bytes - other.device_bytes)

    @property
    def enough(self) -> bool:
        """Nothing of it is negative."""
        return self.places >= 0 and self.bytes >= 0 and self.device_bytes >= 0


class Idle(msgspec.Struct, frozen=True):
    """A proven instance that no route uses and nothing needs.

    Attributes:
        since: UTC, when it was last used.
        protected: an undo goes there: it leaves last.
        device, bytes, device_bytes: what it holds, and where.
        priority: what has a lower one leaves first.
        seconds: what loading it again would take.
        uses: how often its version was switched to.
        pinned: it never leaves by itself.
        asleep: it sleeps, and takes no place.
        sleeps: it is awake and can be put to sleep; then it still holds ``rest``, as far as that is known.
        shares: it shares its engine, which is charged by itself and stays.
        spare: it is an engine without a version, the first to leave; ``instance`` is its name then.
    """

    instance: str
    worker: str
    since: datetime
    protected: bool
    device: str = ""
    bytes: int = 0
    device_bytes: int = 0
    priority: int = 0
    seconds: float = 0.0
    uses: int = 0
    pinned: bool = False
    asleep: bool = False
    sleeps: bool = False
    rest: Room = Room()
    shares: bool = False
    spare: bool = False

    @property
    def room(self) -> Room:
        """What its end would free, on its worker and its device."""
        return Room(0 if self.asleep or self.shares else 1, self.bytes, self.device_bytes)

    @property
    def sleep_room(self) -> Room:
        """What its sleep would free; its end's where it can't be put to sleep."""
        return self.room - self.rest if self.sleeps else self.room

    @property
    def worth(self) -> float:
        """Seconds of loading that keeping one mebibyte of it saves: reload seconds by uses by size."""
        return self.seconds * (1 + self.uses) * 2**20 / max(2**20, self.bytes + self.device_bytes)


class Leave(msgspec.Struct, frozen=True):
    """How an instance or a spare leaves.

    Attributes:
        reason: why.
        spare: of a spare, its worker; empty for an instance.
        sleeps: it sleeps; else it stops.
        bytes: host memory that must stay free for what it makes room for, where that is known.
    """

    reason: str
    sleeps: bool = False
    bytes: int = 0
    spare: str = ""


def leaves_first(policy: Policy) -> Callable[[Idle], tuple[object, ...]]:
    """Sort key: who leaves first, spares before all else. ``lru``: least recently used; ``cost``: the cheapest."""

    def lru(one: Idle) -> tuple[object, ...]:
        return (not one.spare, one.protected, one.priority, one.since, one.instance)

    def cost(one: Idle) -> tuple[object, ...]:
        return (not one.spare, one.protected, one.priority, one.worth, one.since, one.instance)

    return lru if policy == "lru" else cost


def evict(idle: tuple[Idle, ...], now: datetime, most: int, ttl_s: float, policy: Policy = "lru") -> dict[str, Leave]:
    """Choose what leaves: instance → how. By the policy; what an undo needs goes last, what is pinned stays.

    What is too much or too old awake sleeps where it can; what is too much or too old asleep stops.

    Args:
        idle: all idle instances of all workers.
        now: UTC.
        most: instances kept awake on each worker, and as many asleep; pinned ones count, and are kept beyond it.
        ttl_s: seconds after which an idle instance leaves in any case; one that sleeps after twice that.
        policy: who leaves first.
    """
    leaving: dict[str, Leave] = {}
    kept = Counter((one.worker, one.asleep) for one in idle if one.pinned)
    by = "least recently used" if policy == "lru" else "cheapest to load again"
    for one in sorted((i for i in idle if not i.pinned), key=leaves_first(policy), reverse=True):
        age_s = (now - one.since).total_seconds()
        awake, asleep = (one.worker, False), (one.worker, True)
        may_sleep = (one.asleep or one.sleeps) and age_s < 2 * ttl_s and kept[asleep] < most
        if not one.asleep and age_s < ttl_s and kept[awake] < most:
            kept[awake] += 1
            continue
        if may_sleep:
            kept[asleep] += 1
        if one.asleep and may_sleep:
            continue
        old_s = 2 * ttl_s if one.asleep else ttl_s
        if age_s >= old_s:
            twice = "twice " if one.asleep else ""
            why = f"idle for {old_s:g} s ({twice}model_ttl_seconds)"
        else:
            why = f"{by} of more than {most}{' that sleep' if one.asleep else ''} (max_cached_models)"
        leaving[one.instance] = Leave(why, sleeps=may_sleep)
    return leaving


def make_room(idle: tuple[Idle, ...], short: Room, device: str, policy: Policy) -> tuple[Idle, ...] | None:
    """The instances whose end frees what is short, none of them in vain; None where not even all of them do.

    Args:
        idle: those that may leave, all of one worker.
        short: what is missing; what is not positive is not missing.
        device: the device that ``short.device_bytes`` is missing on.
        policy: who leaves first.
    """
    chosen: list[Idle] = []
    for one in sorted((i for i in idle if not i.pinned), key=leaves_first(policy)):
        if (_freed(chosen, (), device) - short).enough:
            break
        chosen.append(one)
    if not (_freed(chosen, (), device) - short).enough:
        return None
    for one in tuple(reversed(chosen)):  # the dearest first: what came after it may have made it needless
        without = [other for other in chosen if other is not one]
        if (_freed(without, (), device) - short).enough:
            chosen = without
    return tuple(chosen)


def sleepers(chosen: tuple[Idle, ...], short: Room, device: str) -> tuple[str, ...]:
    """Of those that make room, the instances for which it is enough that they sleep. Arguments as in ``make_room``."""
    asleep = [one for one in chosen if one.sleeps]
    ending = [one for one in chosen if not one.sleeps]
    while asleep and not (_freed(ending, asleep, device) - short).enough:
        ending.append(asleep.pop(0))
    return tuple(one.instance for one in asleep)


def _freed(ending: Sequence[Idle], asleep: Sequence[Idle], device: str) -> Room:
    total = Room()
    for one, room in (*((one, one.room) for one in ending), *((one, one.sleep_room) for one in asleep)):
        total += room if one.device == device else Room(room.places, room.bytes)
    return total
