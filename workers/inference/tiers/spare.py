"""Tier ``spare``: an engine that runs without a version gets the weights in place, is proven, and then serves.

An engine that is evicted becomes a spare, and one may be started ahead without weights. Rules that were paid for (see
engines/vllm_side): the engine is outside every route; prefixes are forgotten with the old weights; tied output heads
are packed again; what it computes is compared with the files; after any error the process is killed, never asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from turnout.core.fit import fit
from turnout.events.worker import KeptEngine
from turnout.workers.inference import client, control, courtesy, golden, shape
from turnout.workers.inference.process import SHUT, EngineProcess, Record, memory_bytes
from turnout.workers.inference.runner import Failure, Loaded
from turnout.workers.inference.starting import LoadFailed, Running
from turnout.workers.inference.weights import Unusable, read_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.workers.inference.engines.base import Launch
    from turnout.workers.inference.runner import Keeper
    from turnout.workers.inference.starting import Planned, Starter

log = structlog.get_logger()

#: Share of an engine's measured memory that must be free before another one is started ahead.
_ROOM = 1.2
_AHEAD = "spare"


class Spares:
    """The engines of this host that belong to no instance."""

    def __init__(self, starter: Starter, keeper: Keeper) -> None:
        """``keeper``: is asked before one is started ahead."""
        self._starter = starter
        self._keeper = keeper
        self._most = starter.settings.spares
        self._kept: dict[str, Running] = {}
        self._ahead: Running | None = None
        self._ahead_shape = ""
        #: The one that is asked for or started, and whether it may be.
        self._planned: KeptEngine | None = None
        self._allowed = False
        self._starting: asyncio.Task[None] | None = None

    @property
    def kept(self) -> tuple[KeptEngine, ...]:
        """All of them, as the control plane knows them. What is only asked for is not: it would be charged unasked."""
        ahead = (self._planned,) if self._planned is not None and self._allowed else ()
        return (*ahead, *(one.kept(name, "spare") for name, one in self._kept.items() if not one.exited))

    @property
    def running(self) -> dict[str, Running]:
        """Those that wait for weights, by name."""
        return self._kept

    def find(self, wanted: str) -> tuple[str, Running] | None:
        """A spare of this shape, with its name."""
        found = ((name, one) for name, one in self._kept.items() if one.shape == wanted and not one.exited)
        return next(found, None) if wanted else None

    def take(self, name: str) -> Running:
        """It is a spare no more."""
        return self._kept.pop(name)

    def adopt(self, record: Record, process: EngineProcess) -> None:
        """One that an earlier worker has kept."""
        self._kept[record.instance] = running = Running.adopt(record, process)
        running.quiet = True

    def keep(self, instance: str, running: Running) -> bool:
        """Keep an engine that nobody uses any more, if there is room for it. Its socket has lost its name already."""
        process = running.process
        if (
            process is None
            or running.asleep
            or not running.quiet
            or running.exited
            or running.trouble
            or not running.shape
        ):
            return False
        if len(self._kept) >= self._most:
            return False
        name = f"{_AHEAD}-{self._starter.clock.id()[:8]}"
        path = running.launch.address.removeprefix("unix:")
        here = self._starter.folder.socket(name, self._starter.clock.id()[:6])
        os.rename(path + SHUT, here)
        running.was = instance
        self._put(name, running, here)
        self._starter.folder.forget(instance)
        log.info("engine_kept_as_spare", instance=instance, spare=name, holds=running.source)
        return True

    def _put(self, name: str, running: Running, path: str) -> None:
        assert running.process is not None  # noqa: S101  what runs elsewhere is never a spare
        running.launch = msgspec.structs.replace(running.launch, address=f"unix:{path}")
        record = msgspec.structs.replace(
            running.process.record,
            instance=name,
            launch=running.launch,
            bound=running.bound,
            shape=running.shape,
            source=running.source,
            fit=running.fit,
            device=running.device,
            bytes=running.bytes,
            role="spare",
        )
        if name == running.process.record.instance:
            running.process.record = record
            self._starter.folder.write(record)
        else:
            running.process.hand_over(record, self._starter.folder)
        self._kept[name] = running

    async def make_way(self, wanted: str) -> None:
        """A load that somebody waits for goes first: it waits for a start ahead that it can use, and ends any other."""
        task, ahead = self._starting, self._ahead
        if task is None or task.done():
            return
        if wanted != self._ahead_shape or self.find(wanted):
            task.cancel()
        elif ahead is not None and ahead.process is not None:
            courtesy.restore(ahead.process.pid)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def start_ahead(self, planned: Planned, size: int, device_size: int) -> None:
        """Start another engine of this shape without weights, where there is none and ``size`` bytes are free.

        ``device_size``: what one holds on its accelerator.
        """
        if not planned.shape or len(self._kept) >= self._most or self.find(planned.shape):
            return
        if self._starting is not None and not self._starting.done():
            return
        if _free_bytes() < _ROOM * size:
            log.info("no_spare_started", reason="too little memory is free", needed=int(_ROOM * size))
            return
        self._ahead_shape = planned.shape
        self._starting = asyncio.create_task(self._ask_and_start(planned, size, device_size))

    async def _ask_and_start(self, model: Planned, size: int, device_size: int) -> None:
        name = f"{_AHEAD}-{self._starter.clock.id()[:8]}"
        order = msgspec.structs.replace(model.order, instance=name, bytes=size)
        planned = self._starter.plan(order, weights=False)
        if isinstance(planned, Failure):
            log.warning("no_spare_started", reason=planned.reason)
            return
        fits = fit(order.engine, order.inspection)
        self._planned = KeptEngine(name, "spare", fits, bytes=size, device=order.device, device_bytes=device_size)
        try:
            if reason := await self._keeper.may_start(self._planned):
                log.info("no_spare_started", reason=reason, needed=size)
                return
            self._allowed = True
            await self._start(name, planned)
        finally:
            self._planned, self._allowed = None, False
            self._keeper.changed()

    async def _start(self, name: str, planned: Planned) -> None:
        starter = self._starter
        started = starter.start(name, planned, courtesy.AHEAD)
        if isinstance(started, Failure) or started.process is None:
            return
        started.source, started.quiet = "", True
        started.process.record = msgspec.structs.replace(started.process.record, role="filling")
        starter.folder.write(started.process.record)
        self._ahead = started
        try:
            await starter.wait_listening(started, _untold)
            with contextlib.suppress(
                client.Unreachable, ValueError
            ):  # the first answer allocates; what it says is void
                await golden.ask(started.launch.address, started.launch.model, starter.proof_timeout_s)
            courtesy.restore(started.process.pid)
            started.bytes = await asyncio.to_thread(memory_bytes, started.process.pid)
            self._put(name, started, started.launch.address.removeprefix("unix:"))
            log.info("spare_started", spare=name)
        except LoadFailed as e:
            await starter.fail(name, started, e.stage, e.reason)
        except asyncio.CancelledError:
            await started.process.end(0, starter.clock)
            starter.folder.forget(name)
            raise
        finally:
            self._ahead = None

    async def give_up(self, name: str) -> None:
        """End one, where there is one of that name."""
        if self._planned is not None and self._planned.name == name and self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        running = self._kept.pop(name, None)
        if running is None:
            return
        if running.process is not None:
            await running.process.end(running.launch.grace_s, self._starter.clock)
        self._starter.folder.forget(name)
        self._keeper.changed()
        log.info("spare_ended", spare=name)

    async def end(self) -> None:
        """End all of them, and keep none any more."""
        self._most = 0
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        for name in tuple(self._kept):
            await self.give_up(name)

    def release(self) -> None:
        """Let go of them; they run on, to be found again. One that is being started ends."""
        if self._starting is not None:
            self._starting.cancel()
        if self._ahead is not None and self._ahead.process is not None:
            self._ahead.process.signal(9)
            self._starter.folder.forget(self._ahead.process.record.instance)
        for running in self._kept.values():
            if running.process is not None:
                running.process.release()
        self._kept.clear()


class Spare:
    """Fills a spare."""

    name = "spare"

    def __init__(self, starter: Starter, running: dict[str, Running], spares: Spares) -> None:
        """``running``: the worker's engines by instance."""
        self._starter = starter
        self._running = running
        self._spares = spares

    def unfit(self, planned: Planned) -> str:
        """There must be one of the same shape."""
        if planned.spec.adapter:
            return "it is an adapter"
        return "" if self._spares.find(planned.shape) else "no spare engine of its shape runs"

    def source(self, planned: Planned) -> str:
        """The version that the spare holds."""
        found = self._spares.find(planned.shape)
        return found[1].source if found else ""

    async def load(self, planned: Planned, progress: Callable[[str, str], None]) -> Loaded | Failure:
        """See the protocol."""
        found = self._spares.find(planned.shape)
        if found is None:
            return Failure("loading", "the spare engine is gone")
        starter, order = self._starter, planned.order
        began = starter.clock.monotonic()
        running = self._spares.take(found[0])
        running.was = ""
        process = running.process
        assert process is not None  # noqa: S101  what runs elsewhere is never a spare
        before = running.launch
        progress("loading", f"into a running engine that held {running.source or 'nothing'}")
        self._move(running, planned)
        self._running[order.instance] = running
        record = msgspec.structs.replace(
            process.record,
            instance=order.instance,
            sequence=order.sequence,
            launch=running.launch,
            role="filling",
            tier=self.name,
            proven=False,
        )
        process.hand_over(record, starter.folder)
        try:
            filling = asyncio.ensure_future(self._fill(planned, before))
            await starter.unless_exit(running, filling)
            if running.exited:
                raise LoadFailed("loading", "the engine ended while it was filled")
            load_s = starter.clock.monotonic() - began
            progress("proving", "")
            verdict = await starter.prove(running, order)
        except (LoadFailed, control.ControlFailed) as e:
            self._running.pop(order.instance, None)
            stage = e.stage if isinstance(e, LoadFailed) else "loading"
            return await starter.fail(order.instance, running, stage, str(e))
        running.source = f"{order.model} {order.version}"
        # New weights of the same shapes take the memory of the old ones; a look takes 0.2 s, and comes soon enough.
        probe_s = starter.clock.monotonic() - began - load_s
        proven = await starter.proven(running, verdict, load_s, probe_s, size=running.bytes)
        return msgspec.structs.replace(proven, tier=self.name)

    def _move(self, running: Running, planned: Planned) -> None:
        """Give its socket the name of the instance, so that no route of before leads here."""
        os.rename(running.launch.address.removeprefix("unix:"), planned.launch.address.removeprefix("unix:"))
        running.launch = msgspec.structs.replace(planned.launch, argv=running.launch.argv, env=running.launch.env)
        running.quiet = False
        running.trouble, running.probes, running.row = "", 0, 0

    async def _fill(self, planned: Planned, before: Launch) -> None:
        """Put the weights in and compare. ``before``: what it was, perhaps without any weights."""
        address, weights, patience = planned.launch.address, planned.launch.weights, self._starter.proof_timeout_s
        try:
            if planned.spec.path:
                shape.prefetch(planned.spec.path)
                read_weights(Path(planned.spec.path))
            if not before.empty:  # else nobody has asked it anything yet
                await golden.cached(address, before.model, patience)
        except (OSError, Unusable, client.Unreachable) as e:
            raise LoadFailed("loading", str(e)) from e
        await control.pause(address, patience)
        if before.empty:
            await control.expect_files(address, patience)
        await control.fill(address, weights, patience)
        await control.compare(address, weights, patience)
        names = (planned.order.model, f"{planned.order.model}@{planned.order.version}")
        await control.rename(address, names, planned.order.version, patience)
        await control.resume(address, patience)
        if not before.empty and (count := await golden.cached(address, planned.order.model, patience)):
            why = f"it takes {count} tokens of a prompt from what it has cached with the weights before"
            raise LoadFailed("loading", why)


def _untold(stage: str, detail: str) -> None:
    """Nobody waits for a start ahead."""


def _free_bytes() -> int:
    """Memory that could be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
