"""ModelCache: what is loaded on this host, how much it holds, and whose turn it is to load.

Which instances stay is decided from the log (core/cache.py); this is the worker's half: it keeps loads apart, switches
before preloads, and notices when an engine has grown.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from typing import TYPE_CHECKING, TypeVar

import msgspec

from turnout.workers.inference.runner import Usage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

#: An engine's memory is news when it differs from what was told last by this share and by this much.
NEWS_SHARE = 0.1
NEWS_BYTES = 16 << 20


class CachedModel(msgspec.Struct):
    """One proven instance of this host. ``told``: its memory as the control plane knows it."""

    instance: str
    model: str
    version: str
    told: Usage = Usage()


class ModelCache:
    """The proven instances of one host, and the queue of those that load."""

    def __init__(self) -> None:
        self._models: dict[str, CachedModel] = {}
        #: Device → loads that wait for it, by rank; and devices on which one runs.
        self._queues: dict[str, list[tuple[int, int, asyncio.Future[None]]]] = {}
        self._busy: set[str] = set()
        self._numbers = itertools.count()

    def get_model(self, model: str, version: str) -> tuple[CachedModel, ...]:
        """The proven instances of a version on this host."""
        return tuple(one for one in self._models.values() if (one.model, one.version) == (model, version))

    def put_model(self, one: CachedModel) -> None:
        """It has been proven here."""
        self._models[one.instance] = one

    def evict_model(self, instance: str) -> None:
        """It is gone, or about to go."""
        self._models.pop(instance, None)

    async def preload_model(self, load: Callable[[], Awaitable[T]], *, device: str = "", priority: int = 0) -> T:
        """Load when it is its turn: one at a time on each device, the highest priority first, then the first to ask.

        Two engines that start together charge each other's memory, and both would be measured wrongly.
        """
        if device in self._busy:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._queues.setdefault(device, []), (-priority, next(self._numbers), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # its turn came while it was being called off
                    self._pass_on(device)
                raise
        self._busy.add(device)
        try:
            return await load()
        finally:
            self._pass_on(device)

    def news(self, instance: str, usage: Usage) -> bool:
        """Whether an instance holds so much more or less that it must be told again; then it counts as told."""
        one = self._models.get(instance)
        if one is None:
            return False
        if not differs(one.told.bytes, usage.bytes) and not differs(one.told.device_bytes, usage.device_bytes):
            return False
        one.told = usage
        return True

    @property
    def models(self) -> tuple[CachedModel, ...]:
        """All proven instances of this host."""
        return tuple(self._models.values())

    def _pass_on(self, device: str) -> None:
        """The next one's turn; without one the device is free."""
        queue = self._queues.get(device, [])
        while queue:
            _, _, turn = heapq.heappop(queue)
            if not turn.done():
                turn.set_result(None)
                return
        self._busy.discard(device)


def differs(told: int, now: int) -> bool:
    """Whether an engine holds so much more or less, in bytes, that it must be told again."""
    return abs(now - told) > max(NEWS_BYTES, int(told * NEWS_SHARE))
