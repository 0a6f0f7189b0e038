"""Which idle instances a worker may keep, and which make room: a choice over numbers. Knows no process."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

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

    @property
    def room(self) -> Room:
        """What its end would free, on its worker and its device."""
        return Room(0 if self.asleep else 1, self.bytes, self.device_bytes)

    @property
    def worth(self) -> float:
        """Seconds of loading that keeping one mebibyte of it saves: reload seconds by uses by size."""
        return self.seconds * (1 + self.uses) * 2**20 / max(2**20, self.bytes + self.device_bytes)


def leaves_first(policy: Policy) -> Callable[[Idle], tuple[object, ...]]:
    """Sort key: who leaves first. ``lru``: least recently used; ``cost``: the cheapest to do without."""

    def lru(one: Idle) -> tuple[object, ...]:
        return (one.protected, one.priority, one.since, one.instance)

    def cost(one: Idle) -> tuple[object, ...]:
        return (one.protected, one.priority, one.worth, one.since, one.instance)

    return lru if policy == "lru" else cost


def evict(idle: tuple[Idle, ...], now: datetime, most: int, ttl_s: float, policy: Policy = "lru") -> dict[str, str]:
    """Choose what leaves: instance → reason. By the policy; what an undo needs goes last, what is pinned stays.

    Args:
        idle: all idle instances of all workers.
        now: UTC.
        most: instances kept on each worker; pinned ones count, and are kept beyond it.
        ttl_s: seconds after which an idle instance leaves in any case.
        policy: who leaves first.
    """
    leaving: dict[str, str] = {}
    kept: dict[str, list[Idle]] = {}
    for one in idle:
        if one.pinned:
            kept.setdefault(one.worker, []).append(one)
    by = "least recently used" if policy == "lru" else "cheapest to load again"
    for one in sorted((i for i in idle if not i.pinned), key=leaves_first(policy), reverse=True):
        if now - one.since >= timedelta(seconds=ttl_s):
            leaving[one.instance] = f"idle for {ttl_s:g} s (model_ttl_seconds)"
        elif len(kept.setdefault(one.worker, [])) >= most:
            leaving[one.instance] = f"{by} of more than {most} (max_cached_models)"
        else:
            kept[one.worker].append(one)
    return leaving


def make_room(idle: tuple[Idle, ...], short: Room, device: str, policy: Policy) -> tuple[Idle, ...] | None:
    """The instances whose end frees what is short, none of them in vain; None where not even all of them do.

    Args:
        idle: those that may leave, all of one worker.
        short: what is missing; what is not positive is not missing.
        device: the device that ``short.device_bytes`` is missing on.
        policy: who leaves first.
    """

    def freed(chosen: list[Idle]) -> Room:
        total = Room()
        for one in chosen:
            total += one.room if one.device == device else Room(one.room.places, one.bytes)
        return total

    chosen: list[Idle] = []
    for one in sorted((i for i in idle if not i.pinned), key=leaves_first(policy)):
        if (freed(chosen) - short).enough:
            break
        chosen.append(one)
    if not (freed(chosen) - short).enough:
        return None
    for one in tuple(reversed(chosen)):  # the dearest first: what came after it may have made it needless
        without = [other for other in chosen if other is not one]
        if (freed(without) - short).enough:
            chosen = without
    return tuple(chosen)
