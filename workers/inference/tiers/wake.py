"""Tier ``wake``: an engine whose version is not used sleeps, and is woken and proven when it is wanted again.

Rules that were paid for by others: it sleeps only when no request runs; after level 2 its weights are read again before
its cache is made; a wake that fails is never tried again, as it leaves memory half mapped: the process is killed. Both
happen behind a socket name that no gateway has ever heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import msgspec

from turnout.workers.inference import client, control, golden
from turnout.workers.inference.process import SHUT
from turnout.workers.inference.runner import Failure, Loaded, Slept
from turnout.workers.inference.starting import LoadFailed, Running

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from turnout.workers.inference.memory import MemoryManager
    from turnout.workers.inference.process import EngineProcess, Record
    from turnout.workers.inference.runner import Order
    from turnout.workers.inference.starting import Starter

NAME = "wake"


class Sleepers:
    """Puts engines of this host to sleep, and wakes them."""

    def __init__(self, starter: Starter, running: dict[str, Running], memory: MemoryManager) -> None:
        """``running``: the worker's engines by instance."""
        self._starter = starter
        self._running = running
        self._memory = memory

    async def adopt(self, record: Record) -> Slept:
        """One that an earlier worker has left asleep: it has been taken over, and sleeps on."""
        self._running[record.instance].asleep = record.level
        usage = await asyncio.to_thread(self._memory.usage, record.pid)
        return Slept(record.level, 0.0, usage.bytes, usage.device_bytes, record.slept)

    async def sleep(self, order: Order, level: int) -> Slept | Failure:
        """Put one to sleep whose door is shut. See the port."""
        instance = order.instance
        starter, running = self._starter, self._running[instance]
        process = running.process
        if process is None or not running.quiet or not running.launch.sleeps:
            return await self._fail(instance, running, "sleeping", "it can't be put to sleep, or is not quiet")
        began = starter.clock.monotonic()
        here = starter.folder.socket(instance, starter.clock.id()[:6])
        self._keep(process, role="filling", proven=False)  # should this worker die now, the next one kills it
        os.rename(running.launch.address.removeprefix("unix:") + SHUT, here)
        running.launch = msgspec.structs.replace(running.launch, address=f"unix:{here}")
        running.asleep, running.quiet = level, False
        try:
            await self._do(running, control.sleep(running.launch.address, level, starter.proof_timeout_s))
        except (control.ControlFailed, LoadFailed) as e:
            return await self._fail(instance, running, "sleeping", str(e))
        seconds = starter.clock.monotonic() - began
        self._keep(process, role="asleep", launch=running.launch, bound=running.bound, level=level, slept=order.slept)
        usage = await asyncio.to_thread(self._memory.usage, process.pid)
        return Slept(level, seconds, usage.bytes, usage.device_bytes, order.slept)

    async def slumber(self, instance: str) -> Failure:
        """See the port."""
        running = self._running[instance]
        assert running.process is not None  # noqa: S101  what runs elsewhere never sleeps
        await running.process.wait()
        return await self._fail(instance, running, "sleeping", "the engine ended while it slept")

    async def wake(self, order: Order) -> Loaded | Failure:
        """See the port."""
        starter, running = self._starter, self._running[order.instance]
        began, patience = starter.clock.monotonic(), starter.proof_timeout_s
        launch, process = running.launch, running.process
        assert process is not None  # noqa: S101  what runs elsewhere never sleeps
        self._keep(process, role="filling")  # a wake that this worker does not see to its end is not tried again
        try:
            await self._do(running, control.wake(launch.address, running.asleep, launch.weights, patience))
            with contextlib.suppress(client.Unreachable, ValueError):  # its first token; what it says is void
                await golden.ask(launch.address, launch.model, patience)
            seconds = starter.clock.monotonic() - began
            verdict = await starter.prove(running, order)
        except (control.ControlFailed, LoadFailed) as e:
            return await self._fail(order.instance, running, "waking", str(e))
        running.asleep, running.trouble, running.probes, running.row = 0, "", 0, 0
        process.record = msgspec.structs.replace(process.record, tier=NAME, level=0)
        proven = await starter.proven(running, verdict, seconds, starter.clock.monotonic() - began - seconds)
        usage = await asyncio.to_thread(self._memory.usage, process.pid)
        slept = process.record.slept
        return msgspec.structs.replace(proven, tier=NAME, device_bytes=usage.device_bytes, slept=slept)

    def _keep(self, process: EngineProcess, **changed: object) -> None:
        process.record = msgspec.structs.replace(process.record, **changed)
        self._starter.folder.write(process.record)

    async def _do(self, running: Running, work: Awaitable[None]) -> None:
        """Ask it.

        Raises:
            ControlFailed: it has not done it.
            LoadFailed: it ended.
        """
        await self._starter.unless_exit(running, asyncio.ensure_future(work))
        if running.exited:
            raise LoadFailed("waking", "the engine ended")

    async def _fail(self, instance: str, running: Running, stage: str, reason: str) -> Failure:
        self._running.pop(instance, None)
        return await self._starter.fail(instance, running, stage, reason)
