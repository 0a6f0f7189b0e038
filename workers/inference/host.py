"""Runs engines as processes of this host: policy, plan, start, readiness, proof, watch, quiet, stop.

Implements the port of runner.py. Knows no command, no event and no view.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import structlog

from turnout.workers.inference import client, probe, quiet
from turnout.workers.inference import process as host_process
from turnout.workers.inference.engines.base import STAGES, Launch, Refusal, Sign, Site, cause
from turnout.workers.inference.engines.fake import FakeEngine
from turnout.workers.inference.engines.openai import OpenAIEngine
from turnout.workers.inference.engines.vllm import VllmEngine, find_vllm
from turnout.workers.inference.process import LOG_LINES, SHUT, EngineProcess, Record, RunFolder
from turnout.workers.inference.runner import Failure, Found, Loaded, Order

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from turnout.workers.clock import Clock
    from turnout.workers.inference.engines.base import Engine
    from turnout.workers.inference.inspector import Inspector
    from turnout.workers.inference.settings import WorkerSettings

log = structlog.get_logger()

T = TypeVar("T")

_POLL_S = 0.05
_HEALTH_TIMEOUT_S = 5.0
_QUIET_TICK_S = 0.05
#: A server that runs already either answers soon or is not there.
_RUNNING_TIMEOUT_S = 10.0
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


class _Running(msgspec.Struct):
    """One engine under this worker. ``process`` is None where it is not ours to start or stop.

    ``probes`` and ``row`` count golden questions since the watch began, and those that failed in a row.
    """

    launch: Launch
    process: EngineProcess | None
    trouble: str = ""
    probes: int = 0
    row: int = 0

    @property
    def exited(self) -> bool:
        """Its process is gone."""
        return self.process is not None and self.process.exited


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
        self._running: dict[str, _Running] = {}
        self._probed: Probed | None = None

    def on_probed(self, report: Probed) -> None:
        """Whom to tell how each golden question went that a health check has asked."""
        self._probed = report

    @property
    def kinds(self) -> tuple[str, ...]:
        """Engine kinds that can be run here."""
        return tuple(self._engines)

    async def found(self) -> Mapping[str, Found]:
        """Take over what an earlier worker with this run folder has left running."""
        answer: dict[str, Found] = {}
        for record in self._folder.records():
            taken = EngineProcess.adopt(record, self._folder)
            if taken is None:
                await self._kill_leftovers(record)
                self._folder.forget(record.instance)
                continue
            self._running[record.instance] = _Running(record.launch, taken)
            self._open_door(record.launch)
            loaded = None
            if record.proven:
                loaded = Loaded(record.launch.address, record.load_s, record.probe_s, record.bytes, record.fingerprint)
            answer[record.instance] = Found(record.sequence, loaded)
            log.info("engine_adopted", instance=record.instance, pid=record.pid, proven=record.proven)
        for instance, leader in self._folder.unrecorded():
            if instance not in answer:
                log.warning("engine_unrecorded", instance=instance, pid=leader.pid)
                host_process.kill_session(leader.pid, leader.started)
                await host_process.wait_gone(leader.pid, self._clock)
        self._folder.sweep_logs(set(answer))
        return answer

    async def _kill_leftovers(self, record: Record) -> None:
        """The leader is gone; its children may not be (vLLM's outlive a killed API process)."""
        if record.boot == host_process.boot_id() and host_process.look(record.pid) is None:
            host_process.kill_session(record.pid, None)
            await host_process.wait_gone(record.pid, self._clock)

    async def load(self, order: Order, progress: Callable[[str, str], None]) -> Loaded | Failure:
        """Start, wait until it listens, prove. See the port."""
        running = self._running.get(order.instance)
        began = self._clock.monotonic()
        if running is None:
            if changed := await self._changed(order, progress):
                return changed
            started = self._start(order)
            if isinstance(started, Failure):
                return started
            running = started
        progress("starting", "")
        try:
            await self._wait_listening(running, progress)
            load_s = self._clock.monotonic() - began
            progress("proving", "")
            verdict = await self._prove(running)
        except _LoadFailed as e:
            return await self._failed(order.instance, running, e.stage, e.reason)
        probe_s = self._clock.monotonic() - began - load_s
        size = 0
        if running.process is not None:
            size = await asyncio.to_thread(host_process.memory_bytes, running.process.pid)
            running.process.record = msgspec.structs.replace(
                running.process.record,
                proven=True,
                load_s=load_s,
                probe_s=probe_s,
                bytes=size,
                fingerprint=verdict.fingerprint,
            )
            self._folder.write(running.process.record)
        return Loaded(running.launch.address, load_s, probe_s, size, verdict.fingerprint)

    async def _changed(self, order: Order, progress: Callable[[str, str], None]) -> Failure | None:
        """A failure where the files are not those that were inspected when the version was registered."""
        if self._inspector is None or order.inspection is None:
            return None
        spec = self._settings.policy.admit(order.engine, order.model, order.version)
        if isinstance(spec, Refusal):
            return None  # said when it is started
        progress("checking", "")
        reason = await asyncio.to_thread(self._inspector.changed, spec, order.inspection)
        if not reason:
            return None
        log.warning("files_changed", instance=order.instance, reason=reason)
        hint = "put the old files back, or register these as a new version"
        return Failure("checking", Refusal("files_changed", reason, hint).sentence)

    def _start(self, order: Order) -> _Running | Failure:
        settings = self._settings
        spec = settings.policy.admit(order.engine, order.model, order.version)
        if isinstance(spec, Refusal):
            log.warning("engine_refused", instance=order.instance, code=spec.code, reason=spec.reason)
            return Failure(spec.stage, spec.sentence)
        engine = self._engines.get(spec.kind)
        if engine is None:
            return Failure(
                "starting",
                f"this worker's host can't run engines of kind {spec.kind}; `turnout doctor` says what is missing"
                " [engine_missing]",
            )
        site = Site(
            socket=self._folder.socket(order.instance, self._clock.id()[:6]),
            port=host_process.free_port(settings.address),
            host=settings.address,
            unix=settings.unix,
        )
        launch = engine.plan(spec, order.model, order.version, site)
        if isinstance(launch, Refusal):
            return Failure(launch.stage, launch.sentence)
        process = None
        if launch.argv:
            try:
                process = EngineProcess.start(order.instance, launch, self._folder, order.sequence)
            except OSError as e:
                return Failure("starting", f"the engine can't be started: {e}")
            log.info("engine_started", instance=order.instance, pid=process.pid, argv=" ".join(launch.argv))
        running = self._running[order.instance] = _Running(launch, process)
        return running

    async def _wait_listening(self, running: _Running, progress: Callable[[str, str], None]) -> None:
        """Until ``/health`` answers 200, or that it does not know such a path."""
        clock, process = self._clock, running.process
        patience = self._settings.load_timeout_s if process is not None else _RUNNING_TIMEOUT_S
        stage, detail, moved = "starting", "", clock.monotonic()
        while True:
            if process is not None:
                ended = process.exited
                for line in process.log.new_lines():
                    said = stage_of(running.launch.signs, line, stage)
                    if said is not None and said != (stage, detail):
                        stage, detail = said
                        moved = clock.monotonic()
                        progress(stage, detail)
                if ended:
                    raise _LoadFailed(stage, "the engine ended")
            if clock.monotonic() - moved > patience:
                raise _LoadFailed(stage, f"no progress within {patience:g} s")
            why = await self._is_listening(running)
            if not why:
                return
            await self._pause(running, _POLL_S)

    async def _is_listening(self, running: _Running) -> str:
        try:
            reply = await client.ask(running.launch.address, "/health", timeout_s=_HEALTH_TIMEOUT_S)
        except client.Unreachable as e:
            return str(e)
        return "" if reply.status < 500 and reply.status != 429 else f"/health answers {reply.status}"

    async def _prove(self, running: _Running) -> probe.Verdict:
        """Ask the golden question; again where the engine says that it is too early."""
        deadline = self._clock.monotonic() + self._settings.load_timeout_s
        timeout_s = self._settings.probe_timeout_s if running.process is None else self._proof_timeout_s
        while True:
            asking = asyncio.ensure_future(probe.prove(running.launch, timeout_s))
            verdict = await self._unless_exit(running, asking)
            if verdict is None:
                raise _LoadFailed("proving", "the engine ended while it was being proven")
            if verdict.ok:
                return verdict
            if not verdict.later or self._clock.monotonic() > deadline:
                raise _LoadFailed("proving", f"the golden probe failed: {verdict.reason}")
            await self._pause(running, 1.0)

    @property
    def _proof_timeout_s(self) -> float:
        """The first answer of a fresh engine may compile and allocate first."""
        return min(self._settings.load_timeout_s, max(120.0, self._settings.probe_timeout_s))

    @staticmethod
    async def _unless_exit(running: _Running, work: asyncio.Future[T]) -> T | None:
        """The work's result; None where the engine ended first."""
        if running.process is None:
            return await work
        exit = asyncio.ensure_future(running.process.wait())
        try:
            await asyncio.wait((work, exit), return_when=asyncio.FIRST_COMPLETED)
            return None if running.process.exited else await work
        finally:
            exit.cancel()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _pause(self, running: _Running, seconds: float) -> None:
        """Wait, but not beyond the engine's end."""
        if running.process is None:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await running.process.wait()

    async def _failed(self, instance: str, running: _Running, stage: str, reason: str) -> Failure:
        """End what is left, and gather what tells why."""
        process = running.process
        exit_code = None
        if process is not None:
            by_itself = process.exited
            exit_code = await process.end(0, self._clock)
            if not by_itself:
                exit_code = None  # our own signal tells nothing
            if by_itself and exit_code is not None:
                reason = f"{reason} ({_exit_text(exit_code)})"
            self._folder.forget(instance)
        self._running.pop(instance, None)
        failure = self._with_tail(instance, Failure(stage, reason, (), exit_code))
        log.warning("engine_failed", instance=instance, stage=stage, reason=failure.reason, exit_code=exit_code)
        return failure

    def _with_tail(self, instance: str, failure: Failure) -> Failure:
        """Add the engine's last lines, and the line that names the cause: first in the tail and in the reason."""
        lines = host_process.Log(self._folder.log(instance)).tail()
        named = cause(lines)
        tail = lines[-LOG_LINES:]
        if named:
            tail = [f"cause: {named}", *tail[-(LOG_LINES - 1) :]]
        reason = f"{failure.reason}: {named}" if named else failure.reason
        return msgspec.structs.replace(failure, reason=reason, log_tail=tuple(tail))

    async def watch(self, instance: str) -> Failure:
        """Until the engine dies or hangs. See the port."""
        running = self._running[instance]
        reason = await self._unless_exit(running, asyncio.ensure_future(self._watch_answers(instance, running)))
        reason = reason or "the engine ended and nobody asked it to"
        return await self._failed(instance, running, "serving", reason)

    async def _watch_answers(self, instance: str, running: _Running) -> str:
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
        self, instance: str, running: _Running, verdict: probe.Verdict, seconds: float, *, works: bool
    ) -> None:
        """Report a golden question. One that a busy engine has put off, or not got to, has not failed."""
        fine = verdict.ok or verdict.later or (works and not verdict.answered)
        running.probes += 1
        running.row = 0 if fine else running.row + 1
        if self._probed is not None:
            await self._probed(instance, running.probes, running.row, seconds, "" if fine else verdict.reason)

    async def _cpu_s(self, running: _Running) -> float:
        if running.process is None:
            return 0.0
        return await asyncio.to_thread(host_process.cpu_s, running.process.pid)

    async def _work_done(self, running: _Running) -> float:
        """Tokens that the engine says it has read and written; 0 where it does not say."""
        if not running.launch.counts:
            return 0.0
        return await quiet.tokens(running.launch.address, min(_HEALTH_TIMEOUT_S, self._settings.probe_timeout_s))

    def _note(self, instance: str, running: _Running, verdict: probe.Verdict) -> None:
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
        process, address = running.process, running.launch.address
        while True:
            what = await self._wait_unused(running)
            if process.exited:
                return await self._failed(instance, running, "serving", "the engine ended before it was stopped")
            if not what and self._shut_door(running.launch):
                log.info("engine_quiet", instance=instance, quiet_s=self._settings.quiet_s)
                return None
            busy(what or f"{quiet.connections(address)} connections are open")
            await self._pause(running, 0.25)

    async def _wait_unused(self, running: _Running) -> str:
        """Watch for ``quiet_s``; empty where nothing was seen, else what."""
        address = running.launch.address
        if count := quiet.connections(address):
            return f"{count} connections are open"
        if running.launch.counts:
            requests = await quiet.running(address, 1.0)
            if requests:
                return f"the engine counts {requests:g} requests"
            await self._pause(running, _QUIET_TICK_S)  # the connection of that question closes
        deadline = self._clock.monotonic() + self._settings.quiet_s
        while self._clock.monotonic() < deadline and not running.exited:
            if count := quiet.connections(address):
                return f"{count} connections are open"
            await self._pause(running, _QUIET_TICK_S)
        return ""

    def _shut_door(self, launch: Launch) -> bool:
        """Take the socket's name away, so that nobody can connect any more, then look once more.

        Closes the gap between the last look and the stop. A TCP port has no such name: there the gap stays, and a
        gateway that is refused tries another instance.
        """
        if not launch.address.startswith("unix:"):
            return quiet.connections(launch.address) == 0
        path = launch.address[5:]
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, path + SHUT)
        if quiet.connections(launch.address) == 0:
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

    async def stop(self, instance: str) -> None:
        """SIGTERM, a grace, SIGKILL to the group. See the port."""
        running = self._running.pop(instance, None)
        if running is None or running.process is None:
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
        return self._with_tail(instance, Failure("serving", reason))

    def trouble(self, instance: str) -> str:
        """What the newest health check has shown."""
        running = self._running.get(instance)
        return "" if running is None else running.trouble

    def release(self) -> None:
        """Let go of all engines; they run on."""
        for running in self._running.values():
            if running.process is not None:
                running.process.release()
        self._running.clear()


class _LoadFailed(Exception):
    """A load has failed in ``stage``."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason


def _exit_text(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def stage_of(signs: tuple[Sign, ...], line: str, stage: str) -> tuple[str, str] | None:
    """Stage and detail that a log line stands for; None for any other line. A stage never goes back."""
    for sign in signs:
        if re.search(sign.pattern, line):
            later = max(stage, sign.stage, key=STAGES.index)
            return later, line.split("] ", 1)[-1].strip()[:200]
    return None
