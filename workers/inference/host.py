"""Runs engines as processes of this host: policy, plan, start, readiness, proof, watch, quiet, stop.

Implements the port of runner.py. Knows no command, no event and no view.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from turnout.workers.inference import probe, quiet
from turnout.workers.inference import process as host_process
from turnout.workers.inference.cache import differs
from turnout.workers.inference.engines.base import Refusal
from turnout.workers.inference.engines.fake import FakeEngine
from turnout.workers.inference.engines.openai import OpenAIEngine
from turnout.workers.inference.engines.vllm import VllmEngine, find_vllm
from turnout.workers.inference.memory import MemoryManager
from turnout.workers.inference.process import SHUT, EngineProcess, Record, RunFolder
from turnout.workers.inference.runner import Failure, Found, HostMemory, Loaded, Order, Slept, Struck, Usage
from turnout.workers.inference.starting import Planned, Running, Starter
from turnout.workers.inference.tiers.adapter import Adapter, AdapterCold, Bases
from turnout.workers.inference.tiers.cold import Cold
from turnout.workers.inference.tiers.spare import Spare, Spares
from turnout.workers.inference.tiers.wake import Sleepers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from turnout.events.worker import KeptEngine
    from turnout.workers.clock import Clock
    from turnout.workers.inference.engines.base import Engine, Launch
    from turnout.workers.inference.inspector import Inspector
    from turnout.workers.inference.runner import Keeper
    from turnout.workers.inference.settings import WorkerSettings
    from turnout.workers.inference.tiers.base import Tier

log = structlog.get_logger()

_HEALTH_TIMEOUT_S = 5.0
_QUIET_TICK_S = 0.05
#: Between two looks at the memory of an engine that loads.
_MEMORY_S = 0.25
#: Below this share of one processor a silent engine is taken to do nothing.
_BUSY_SHARE = 0.01
_BUSY_PATIENCE = 3.0
#: How often a probe is sent at least, as a share of the patience with a silent engine.
_PROBES_PER_PATIENCE = 3
#: A probe that failed is sent again so much sooner: one failure says little, three in a row say that it is no chance.
_SOONER = 5


def engines(settings: WorkerSettings) -> dict[str, Engine]:
    """Engine kinds that the policy allows and this host can run."""
    found: list[Engine] = [OpenAIEngine(), FakeEngine()]
    if "vllm" in settings.policy.engines:
        install = find_vllm(settings.vllm_python)
        if install is not None:
            found.append(VllmEngine(install))
            log.info("vllm_found", version=install.version, python=install.python, cpu=install.cpu)
    return {engine.kind: engine for engine in found if engine.kind in settings.policy.engines}


if TYPE_CHECKING:
    #: Gets instance, number of the probe, failures in a row (0 where it went well), seconds, and what was wrong.
    Probed = Callable[[str, int, int, float, str], Awaitable[None]]


class _Relay:
    """Passes on what there is to say of the engines that are no instance's, once there is somebody to hear it."""

    keeper: Keeper | None = None

    def changed(self) -> None:
        """See the port."""
        if self.keeper is not None:
            self.keeper.changed()

    async def told(self) -> None:
        """See the port."""
        if self.keeper is not None:
            await self.keeper.told()

    async def may_start(self, engine: KeptEngine) -> str:
        """See the port."""
        return "" if self.keeper is None else await self.keeper.may_start(engine)


class HostRunner:
    """Engines of this host.

    ``health_check_s``: seconds between two golden questions, None for none. ``inspector``: tells whether files are
    still those that were registered.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        engines: Mapping[str, Engine],
        clock: Clock,
        health_check_s: float | None,
        inspector: Inspector | None = None,
    ) -> None:
        self._settings = settings
        self._engines = engines
        self._clock = clock
        self._health_check_s = health_check_s
        self._inspector = inspector
        self._folder = RunFolder(Path(settings.run_folder))
        self._running: dict[str, Running] = {}
        self._starter = Starter(settings, engines, clock, self._folder)
        self._keeping = _Relay()
        self._spares = Spares(self._starter, self._keeping)
        self._cold = Cold(self._starter, self._running)
        self._bases = Bases(self._starter, self._running, self._keeping)
        self._tiers: tuple[Tier, ...] = (
            Adapter(self._bases),
            Spare(self._starter, self._running, self._spares),
            AdapterCold(self._starter, self._bases),
            self._cold,
        )
        self._memory = MemoryManager(settings.memory, settings.devices, settings.device_memory)
        self._sleepers = Sleepers(self._starter, self._running, self._memory)
        self._probed: Probed | None = None

    def on_probed(self, report: Probed) -> None:
        """Whom to tell how each golden question went that a health check has asked."""
        self._probed = report

    def on_kept(self, keeper: Keeper) -> None:
        """Whom to tell of the engines that are no instance's, and to ask before one is started ahead."""
        self._keeping.keeper = keeper

    @property
    def kept(self) -> tuple[KeptEngine, ...]:
        """See the port."""
        return tuple(sorted((*self._spares.kept, *self._bases.kept), key=lambda engine: engine.name))

    @property
    def memory(self) -> HostMemory:
        """What all engines together may use of this host."""
        return self._memory.offer

    @property
    def kinds(self) -> tuple[str, ...]:
        """Engine kinds that can be run here."""
        return tuple(self._engines)

    async def found(self) -> Mapping[str, Found]:
        """Take over what an earlier worker with this run folder has left running."""
        answer: dict[str, Found] = {}
        kept: set[int] = set()
        for record in self._folder.records():
            taken = EngineProcess.adopt(record, self._folder) if record.role != "filling" else None
            if taken is None:
                await self._kill_leftovers(record)
                self._folder.forget(record.instance)
                continue
            kept.add(record.pid)
            log.info("engine_adopted", instance=record.instance, pid=record.pid, proven=record.proven)
            if record.role == "spare":
                self._spares.adopt(record, taken)
                continue
            if record.role == "base":
                self._bases.adopt(record, taken)
                continue
            self._running[record.instance] = Running.adopt(record, taken)
            if record.role == "asleep":
                answer[record.instance] = Found(record.sequence, slept=await self._sleepers.adopt(record))
                continue
            self._open_door(record.launch)
            loaded = None
            if record.proven:
                loaded = Loaded(
                    record.launch.address,
                    record.load_s,
                    record.probe_s,
                    record.bytes,
                    record.fingerprint,
                    record.tier,
                    served=record.launch.model if record.base else "",
                    sleeps=record.launch.sleeps,
                    slept=record.slept,
                    base=record.base,
                )
            answer[record.instance] = Found(record.sequence, loaded)
        self._bases.adopted()
        for instance, leader in self._folder.unrecorded():
            if leader.pid not in kept:
                log.warning("engine_unrecorded", instance=instance, pid=leader.pid)
                host_process.kill_session(leader.pid, leader.started)
                await host_process.wait_gone(leader.pid, self._clock)
        self._folder.sweep_logs({record.instance for record in self._folder.records()})
        return answer

    async def _kill_leftovers(self, record: Record) -> None:
        """The leader is gone; its children may not be (vLLM's outlive a killed API process).

        Nobody knows what an engine holds that was being filled, put to sleep or woken when its worker died: it ends,
        too.
        """
        alive = host_process.look(record.pid)
        half_filled = alive is not None and alive.started == record.started and record.role == "filling"
        if record.boot == host_process.boot_id() and (alive is None or half_filled):
            host_process.kill_session(record.pid, record.started if half_filled else None)
            await host_process.wait_gone(record.pid, self._clock)

    async def load(self, order: Order, progress: Callable[[str, str], None]) -> Loaded | Failure:
        """By the fastest tier that applies and has not failed for this pair before, by the order. See the port."""
        planned = self._starter.plan(order)
        running = self._running.get(order.instance)
        if running is not None:  # an earlier worker has begun it
            begun = Planned(order, order.engine, running.launch, running.shape)
            return await self._cold.go_on(begun, running, progress, self._clock.monotonic())
        if isinstance(planned, Failure):
            return planned
        if changed := await self._changed(planned, progress):
            return changed
        await self._spares.make_way(planned.shape)
        struck: list[Struck] = []
        result: Loaded | Failure = Failure("starting", "no tier applies")
        for tier in self._tiers:
            why = tier.unfit(planned)
            source = tier.source(planned)
            if why or (tier.name, source) in order.struck:
                log.debug("tier_skipped", instance=order.instance, tier=tier.name, why=why or "it has failed before")
                continue
            if tier.name == "cold":  # what it was admitted with is the room of that spare
                await self._spares.give_up(order.into)
            loading = tier.load(planned, progress)
            result = await (self._within_memory(order, loading) if tier.name == "cold" else loading)
            if isinstance(result, Loaded):
                break
            if tier.name != "cold":
                struck.append(Struck(tier.name, source, result.reason))
                log.warning("tier_failed", instance=order.instance, tier=tier.name, source=source, reason=result.reason)
        self._keeping.changed()
        if isinstance(result, Loaded) and result.base and result.tier == "cold":
            await self.measure_kept()
            await self._keeping.told()  # once the instance is ready, its base is charged by itself
        elif isinstance(result, Loaded) and order.device and (used := await self.usage(order.instance)) is not None:
            result = msgspec.structs.replace(result, device_bytes=used.device_bytes)
        if isinstance(result, Loaded):
            log.info("tier_took", instance=order.instance, tier=result.tier, seconds=round(result.load_s, 2))
            if not planned.spec.adapter:
                self._spares.start_ahead(planned, result.bytes, result.device_bytes)
        return msgspec.structs.replace(result, struck=tuple(struck))

    async def _within_memory(self, order: Order, work: Awaitable[Loaded | Failure]) -> Loaded | Failure:
        """The load's result, unless its engine takes more memory than it was admitted with and others need it."""
        working = asyncio.ensure_future(work)
        guarding = asyncio.ensure_future(self._guard_memory(order))
        try:
            await asyncio.wait((working, guarding), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                result = working.result()
                late = await self._objection(order) if isinstance(result, Loaded) else ""
                if not late:
                    return result
            else:
                late = guarding.result()
        finally:
            for task in (working, guarding):
                task.cancel()
            await asyncio.gather(working, guarding, return_exceptions=True)
        running = self._running.pop(order.instance, None)
        if running is None:
            return Failure("loading", late)
        return await self._starter.fail(order.instance, running, "loading", late)

    async def _guard_memory(self, order: Order) -> str:
        """Returns why the load must be stopped; never, where it stays within its bounds."""
        while not (objection := await self._objection(order)):  # noqa: ASYNC110  /proc tells no event
            await asyncio.sleep(_MEMORY_S)
        return objection

    async def _objection(self, order: Order) -> str:
        running = self._running.get(order.instance)
        if running is None or running.process is None or running.process.exited:
            return ""
        others = (one.process for one in self._running.values() if one is not running)
        beside = sum(one.record.bytes for one in others if one is not None) + sum(one.bytes for one in self.kept)
        return await asyncio.to_thread(self._memory.objection, running.process.pid, order.bytes, beside)

    async def usage(self, instance: str) -> Usage | None:
        """What a running engine holds now; an adapter shares its base's. See the port."""
        running = self._running.get(instance)
        if running is None or running.process is None or running.base:
            return None
        used = await asyncio.to_thread(self._memory.usage, running.process.pid)
        running.bytes, running.device_bytes = used.bytes, used.device_bytes
        return used

    async def measure_kept(self) -> None:
        """See the port."""
        for running in (*self._spares.running.values(), *self._bases.running.values()):
            if running.process is None or running.exited:
                continue
            used = await asyncio.to_thread(self._memory.usage, running.process.pid)
            if differs(running.bytes, used.bytes) or differs(running.device_bytes, used.device_bytes):
                running.bytes, running.device_bytes = used.bytes, used.device_bytes
        self._keeping.changed()

    async def release_spare(self, name: str) -> None:
        """See the port."""
        await self._spares.give_up(name)

    async def _changed(self, planned: Planned, progress: Callable[[str, str], None]) -> Failure | None:
        """A failure where the files are not those that were inspected when the version was registered."""
        order = planned.order
        if self._inspector is None or order.inspection is None:
            return None
        progress("checking", "")
        reason = await asyncio.to_thread(self._inspector.changed, planned.spec, order.inspection)
        if not reason:
            return None
        log.warning("files_changed", instance=order.instance, reason=reason)
        hint = "put the old files back, or register these as a new version"
        return Failure("checking", Refusal("files_changed", reason, hint).sentence)

    async def _failed(self, instance: str, running: Running, stage: str, reason: str) -> Failure:
        self._running.pop(instance, None)
        failure = await self._starter.fail(instance, running, stage, reason)
        if running.base:  # it is gone for all who share it
            await self._bases.end(running.base)
        return failure

    async def watch(self, instance: str) -> Failure:
        """Until the engine dies or hangs. See the port."""
        running = self._running[instance]
        reason = await self._starter.unless_exit(running, asyncio.ensure_future(self._watch_answers(instance, running)))
        reason = reason or "the engine ended and nobody asked it to"
        return await self._failed(instance, running, "serving", reason)

    async def _watch_answers(self, instance: str, running: Running) -> str:
        """Returns why the engine is taken to hang; never, where health checks are off."""
        if self._health_check_s is None:
            await asyncio.Event().wait()
        clock, patience = self._clock, self._settings.hang_after_s
        interval = min(self._health_check_s or math.inf, patience / _PROBES_PER_PATIENCE)
        timeout_s = min(self._settings.probe_timeout_s, patience)
        answered, used, done = clock.monotonic(), await self._cpu_s(running), await self._work_done(running)
        while True:
            await asyncio.sleep(interval / _SOONER if running.row else interval)
            if running.process is not None:
                running.process.log.limit()
            asked = clock.monotonic()
            verdict = await probe.prove(running.launch, timeout_s)
            seconds = clock.monotonic() - asked
            self._note(instance, running, verdict)
            work = done if verdict.answered else await self._work_done(running)
            await self._tell(instance, running, verdict, seconds, works=work > done)
            if verdict.answered or work > done:  # a full queue delays the answer of an engine that works
                answered, used, done = clock.monotonic(), await self._cpu_s(running), work
                continue
            silent = clock.monotonic() - answered
            busy = await self._cpu_s(running) - used > _BUSY_SHARE * silent
            if silent >= patience * (_BUSY_PATIENCE if busy else 1.0):
                doing = "though it uses the processor" if busy else "and uses no processor time"
                return f"hung: it has answered nothing for {silent:.0f} s {doing}"

    async def _tell(
        self, instance: str, running: Running, verdict: probe.Verdict, seconds: float, *, works: bool
    ) -> None:
        """Report a golden question. One that a busy engine has put off, or not got to, has not failed."""
        fine = verdict.ok or verdict.later or (works and not verdict.answered)
        running.probes += 1
        running.row = 0 if fine else running.row + 1
        if self._probed is not None:
            await self._probed(instance, running.probes, running.row, seconds, "" if fine else verdict.reason)

    async def _cpu_s(self, running: Running) -> float:
        if running.process is None:
            return 0.0
        return await asyncio.to_thread(host_process.cpu_s, running.process.pid)

    async def _work_done(self, running: Running) -> float:
        """Tokens that the engine says it has read and written; 0 where it does not say."""
        if not running.launch.counts:
            return 0.0
        return await quiet.tokens(running.launch.address, min(_HEALTH_TIMEOUT_S, self._settings.probe_timeout_s))

    def _note(self, instance: str, running: Running, verdict: probe.Verdict) -> None:
        """Keep what a health check has shown; say it when it changes."""
        trouble = "" if verdict.ok or verdict.later else verdict.reason
        if bool(trouble) != bool(running.trouble):
            if trouble:
                log.warning("engine_unsound", instance=instance, reason=trouble)
            else:
                log.info("engine_sound_again", instance=instance)
        running.trouble = trouble

    async def prove(self, instance: str) -> str:
        """See the port."""
        running = self._running.get(instance)
        if running is None:
            return "the engine is gone"
        verdict = await probe.prove(running.launch, self._settings.probe_timeout_s)
        self._note(instance, running, verdict)
        return "" if verdict.ok else verdict.reason or "no answer"

    async def wait_quiet(self, instance: str, busy: Callable[[str], None]) -> Failure | None:
        """Until nobody has been connected for ``quiet_s`` and the engine counts nothing. See the port."""
        running = self._running.get(instance)
        if running is None or running.process is None:
            return None
        process = running.process
        while True:
            what = await (self._wait_unused_adapter(running) if running.base else self._wait_unused(running))
            if process.exited:
                return await self._failed(instance, running, "serving", "the engine ended before it was stopped")
            if not what and (running.base or self._shut_door(running)):
                running.quiet = True
                log.info("engine_quiet", instance=instance, quiet_s=self._settings.quiet_s)
                return None
            busy(what or f"{quiet.connections(running.bound)} connections are open")
            await self._starter.pause(running, 0.25)

    async def _wait_unused(self, running: Running) -> str:
        """Watch for ``quiet_s``; empty where nothing was seen, else what."""
        if count := quiet.connections(running.bound):
            return f"{count} connections are open"
        if running.launch.counts:
            requests = await quiet.running(running.launch.address, 1.0)
            if requests:
                return f"the engine counts {requests:g} requests"
            await self._starter.pause(running, _QUIET_TICK_S)  # the connection of that question closes
        deadline = self._clock.monotonic() + self._settings.quiet_s
        while self._clock.monotonic() < deadline and not running.exited:
            if count := quiet.connections(running.bound):
                return f"{count} connections are open"
            await self._starter.pause(running, _QUIET_TICK_S)
        return ""

    async def _wait_unused_adapter(self, running: Running) -> str:
        """As above, for one name of an engine whose connections others share: only the engine can tell.

        A gateway that is cut off, still routes here and was silent for so long is not seen, as no connection tells
        names apart. Its next request finds the name gone (404), and it tries the version's other instances.
        """
        deadline = self._clock.monotonic() + self._settings.quiet_s
        while not running.exited:
            names = await quiet.adapters(running.launch.address, 1.0)
            if running.launch.model in names:
                return f"the engine runs requests on {running.launch.model}"
            if self._clock.monotonic() >= deadline:
                return ""
            await self._starter.pause(running, _QUIET_TICK_S)
        return ""

    def _shut_door(self, running: Running) -> bool:
        """Take the socket's name away, so that nobody can connect any more, then look once more.

        Closes the gap between the last look and the stop. A TCP port has no such name: there the gap stays, and a
        gateway that is refused tries another instance.
        """
        launch = running.launch
        if not launch.address.startswith("unix:"):
            return quiet.connections(running.bound) == 0
        path = launch.address[5:]
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, path + SHUT)
        if quiet.connections(running.bound) == 0:
            return True
        self._open_door(launch)
        return False

    @staticmethod
    def _open_door(launch: Launch) -> None:
        """Give the socket its name back: somebody came in, or a worker died before it stopped the engine."""
        if launch.address.startswith("unix:"):
            path = launch.address[5:]
            with contextlib.suppress(FileNotFoundError):
                os.rename(path + SHUT, path)

    async def sleep(self, order: Order, level: int) -> Slept | Failure:
        """See the port."""
        return await self._sleepers.sleep(order, level)

    async def slumber(self, instance: str) -> Failure:
        """See the port."""
        return await self._sleepers.slumber(instance)

    async def wake(self, order: Order) -> Loaded | Failure:
        """See the port."""
        return await self._sleepers.wake(order)

    async def stop(self, instance: str) -> None:
        """SIGTERM, a grace, SIGKILL to the group; or it becomes a spare. See the port."""
        running = self._running.pop(instance, None)
        if running is None or running.process is None:
            return
        if running.base:
            await self._bases.detach(instance, running)
            return
        if self._spares.keep(instance, running):
            await self._keeping.told()  # before the instance is said to have stopped: its engine holds the memory still
            return
        code = await running.process.end(running.launch.grace_s, self._clock)
        self._folder.forget(instance)
        left = host_process.members(running.process.pid)
        if left:
            log.error("engine_lingers", instance=instance, pids=[m.pid for m in left])
        log.info("engine_stopped", instance=instance, exit_code=code)

    def remains(self, instance: str) -> Failure:
        """The engine was gone when this worker came: its log may say why."""
        reason = "the engine was gone when its worker came back"
        return self._starter.with_tail(instance, Failure("serving", reason))

    def trouble(self, instance: str) -> str:
        """What the newest health check has shown."""
        running = self._running.get(instance)
        return "" if running is None else running.trouble

    async def end_spares(self) -> None:
        """See the port."""
        await self._spares.end()

    def release(self) -> None:
        """Let go of all engines; they run on."""
        self._spares.release()
        self._bases.release()
        for running in self._running.values():
            if running.process is not None:
                running.process.release()
        self._running.clear()
