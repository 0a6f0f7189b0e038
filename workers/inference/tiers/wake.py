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

    async def sleep(self, instance: str, level: int) -> Slept | Failure:
        """Put one to sleep whose door is shut. See the port."""
        starter, running = self._starter, self._running[instance]
        process = running.process
        if process is None or not running.quiet or not running.launch.sleeps:
            return await self._fail(instance, running, "sleeping", "it can't be put to sleep, or is not quiet")
        began = starter.clock.monotonic()
        here = starter.folder.socket(instance, starter.clock.id()[:6])
        # Until it has been woken nobody but this worker knows what state it is in: the next one kills it.
        process.record = msgspec.structs.replace(process.record, role="filling", proven=False)
        starter.folder.write(process.record)
        os.rename(running.launch.address.removeprefix("unix:") + SHUT, here)
        running.launch = msgspec.structs.replace(running.launch, address=f"unix:{here}")
        running.asleep, running.quiet = level, False
        try:
            await self._do(running, control.sleep(running.launch.address, level, starter.proof_timeout_s))
        except (control.ControlFailed, LoadFailed) as e:
            return await self._fail(instance, running, "sleeping", str(e))
        seconds = starter.clock.monotonic() - began
        usage = await asyncio.to_thread(self._memory.usage, process.pid)
        return Slept(seconds, usage.bytes, usage.device_bytes)

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
        launch = running.launch
        try:
            await self._do(running, control.wake(launch.address, running.asleep, launch.weights, patience))
            with contextlib.suppress(client.Unreachable, ValueError):  # its first token; what it says is void
                await golden.ask(launch.address, launch.model, patience)
            seconds = starter.clock.monotonic() - began
            verdict = await starter.prove(running, order)
        except (control.ControlFailed, LoadFailed) as e:
            return await self._fail(order.instance, running, "waking", str(e))
        running.asleep, running.trouble, running.probes, running.row = 0, "", 0, 0
        assert running.process is not None  # noqa: S101  what runs elsewhere never sleeps
        running.process.record = msgspec.structs.replace(running.process.record, tier=NAME)
        proven = await starter.proven(running, verdict, seconds, starter.clock.monotonic() - began - seconds)
        usage = await asyncio.to_thread(self._memory.usage, running.process.pid)
        return msgspec.structs.replace(proven, tier=NAME, device_bytes=usage.device_bytes)

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
