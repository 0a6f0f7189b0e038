"""Starts one engine and brings it to its proof: what all tiers have in common. Knows no tier and no control plane."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec
import structlog

from turnout.core.fit import fit
from turnout.events.model import EngineSpec
from turnout.events.worker import KeptEngine
from turnout.workers.inference import client, courtesy, golden, probe, shape
from turnout.workers.inference import process as host_process
from turnout.workers.inference.engines.base import STAGES, Launch, Refusal, Sign, Site, cause
from turnout.workers.inference.process import LOG_LINES, EngineProcess, Record, RunFolder
from turnout.workers.inference.runner import Failure, Loaded, Order
from turnout.workers.inference.weights import Unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from turnout.workers.clock import Clock
    from turnout.workers.inference.engines.base import Engine
    from turnout.workers.inference.settings import WorkerSettings

log = structlog.get_logger()

T = TypeVar("T")

_POLL_S = 0.05
_HEALTH_TIMEOUT_S = 5.0
#: A server that runs already either answers soon or is not there.
_RUNNING_TIMEOUT_S = 10.0


class LoadFailed(Exception):
    """A load has failed in ``stage``."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason


class Running(msgspec.Struct):
    """One engine under this worker.

    Attributes:
        launch: how it is reached and proven now.
        process: None where it is not ours to start or stop.
        bound: the address that its socket was bound to, by which the kernel knows its connections.
        shape: what it keeps when other weights are put into it; empty where none may be.
        source: model and version that it holds.
        base: of an adapter: name of the engine that it shares with others.
        quiet: nobody uses it, and nobody can reach it any more.
        asleep: the level at which it sleeps; 0 where it is awake.
        trouble: what its newest golden question has shown.
        probes: golden questions since the watch began, and ``row`` those that failed in a row.
        fit: see Record; ``device`` as well.
        was: of an engine that is no instance's: the instance that it was of, or is started for.
        bytes: host memory that it was found to hold last; ``device_bytes`` the same on its accelerator.
    """

    launch: Launch
    process: EngineProcess | None
    bound: str = ""
    shape: str = ""
    source: str = ""
    base: str = ""
    quiet: bool = False
    asleep: int = 0
    trouble: str = ""
    probes: int = 0
    row: int = 0
    fit: str = ""
    device: str = ""
    was: str = ""
    bytes: int = 0
    device_bytes: int = 0

    @classmethod
    def adopt(cls, record: Record, process: EngineProcess) -> Self:
        """One that an earlier worker has left running."""
        return cls(
            record.launch,
            process,
            record.bound or record.launch.address,
            record.shape,
            record.source,
            record.base,
            fit=record.fit,
            device=record.device,
            bytes=record.bytes,
        )

    def kept(self, name: str, role: str) -> KeptEngine:
        """What is told of it while it is no instance's."""
        return KeptEngine(name, role, self.fit, self.source, self.bytes, self.device, self.device_bytes, self.was)

    @property
    def exited(self) -> bool:
        """Its process is gone."""
        return self.process is not None and self.process.exited


class Planned(msgspec.Struct, frozen=True):
    """An order that this worker may carry out. ``shape``: as in Running; ``launch``: of a new engine."""

    order: Order
    spec: EngineSpec
    launch: Launch
    shape: str


class Starter:
    """Starts engines of this host."""

    def __init__(
        self, settings: WorkerSettings, engines: Mapping[str, Engine], clock: Clock, folder: RunFolder
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.folder = folder
        self._engines = engines

    def plan(self, order: Order, *, weights: bool = True) -> Planned | Failure:
        """What it takes; ``weights`` false: an engine that gets them later."""
        settings = self.settings
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
            socket=self.folder.socket(order.instance, self.clock.id()[:6]),
            port=host_process.free_port(settings.address),
            host=settings.address,
            unix=settings.unix,
            weights=weights,
        )
        launch = engine.plan(spec, order.model, order.version, site)
        if isinstance(launch, Refusal):
            return Failure(launch.stage, launch.sentence)
        if order.device.startswith("cuda:"):
            # CUDA's own order of devices is the fastest first; the driver's, by which they are named, is the bus.
            visible = {"CUDA_VISIBLE_DEVICES": order.device.removeprefix("cuda:"), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            launch = msgspec.structs.replace(launch, env={**launch.env, **visible})
        return Planned(order, spec, launch, self._shape(spec, launch))

    @staticmethod
    def _shape(spec: EngineSpec, launch: Launch) -> str:
        if not launch.fills and not spec.adapter:
            return ""
        settings = (spec.kind, *spec.args, *((spec.path, *launch.adapters) if spec.adapter else ()))
        try:
            return shape.digest(settings, spec.path)
        except (OSError, Unusable) as e:
            log.info("engine_shape_unknown", path=spec.path, reason=str(e))
            return ""

    def start(self, name: str, planned: Planned, nice: int) -> Running | Failure:
        """Start its process under the name that its files get, with a lower priority until it is proven."""
        launch, process = planned.launch, None
        if launch.argv:
            if planned.spec.path:
                with contextlib.suppress(OSError):
                    shape.prefetch(planned.spec.path)
            try:
                process = EngineProcess.start(name, launch, self.folder, planned.order.sequence)
            except OSError as e:
                return Failure("starting", f"the engine can't be started: {e}")
            courtesy.lower(process.pid, nice)
            log.info("engine_started", instance=name, pid=process.pid, argv=" ".join(launch.argv))
        order = planned.order
        source = f"{order.model} {order.version}"
        fits = fit(order.engine, order.inspection) if planned.shape else ""
        started = Running(launch, process, launch.address, planned.shape, source, fit=fits, device=order.device)
        started.bytes = order.bytes
        return started

    async def wait_listening(self, running: Running, progress: Callable[[str, str], None]) -> None:
        """Until ``/health`` answers 200, or that it does not know such a path.

        Raises:
            LoadFailed: the engine ended, or got no further.
        """
        clock, process = self.clock, running.process
        patience = self.settings.load_timeout_s if process is not None else _RUNNING_TIMEOUT_S
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
                    raise LoadFailed(stage, "the engine ended")
            if clock.monotonic() - moved > patience:
                raise LoadFailed(stage, f"no progress within {patience:g} s")
            why = await self._is_listening(running)
            if not why:
                return
            await self.pause(running, _POLL_S)

    async def _is_listening(self, running: Running) -> str:
        try:
            reply = await client.ask(running.launch.address, "/health", timeout_s=_HEALTH_TIMEOUT_S)
        except client.Unreachable as e:
            return str(e)
        return "" if reply.status < 500 and reply.status != 429 else f"/health answers {reply.status}"

    async def prove(self, running: Running, order: Order) -> probe.Verdict:
        """Ask the golden question; again where the engine says that it is too early. Then compare golden answers.

        Raises:
            LoadFailed: it ended, or an answer is wrong.
        """
        deadline = self.clock.monotonic() + self.settings.load_timeout_s
        timeout_s = self.settings.probe_timeout_s if running.process is None else self.proof_timeout_s
        while True:
            asking = asyncio.ensure_future(probe.prove(running.launch, timeout_s))
            verdict = await self.unless_exit(running, asking)
            if verdict is None:
                raise LoadFailed("proving", "the engine ended while it was being proven")
            if verdict.ok:
                break
            if not verdict.later or self.clock.monotonic() > deadline:
                raise LoadFailed("proving", f"the golden probe failed: {verdict.reason}")
            await self.pause(running, 1.0)
        if running.launch.logprobs and running.process is not None:
            await self._compare_golden(running, order, timeout_s)
        return verdict

    async def _compare_golden(self, running: Running, order: Order, timeout_s: float) -> None:
        """The version must say what it said when it was proven first; the first time is kept."""
        spec = order.engine
        identity = msgspec.json.encode((spec, running.shape, shape.stamp(spec.path), shape.stamp(spec.adapter))).hex()
        path = self.folder.golden(order.model, order.version)
        try:
            answers = await golden.ask(running.launch.address, running.launch.model, timeout_s)
        except (client.Unreachable, ValueError) as e:
            raise LoadFailed("proving", f"the golden answers failed: {e}") from e
        if answers is None:
            return
        kept = golden.read(path, identity)
        if kept is None:
            golden.write(path, golden.Golden(identity, answers))
        elif differs := golden.difference(kept.answers, answers):
            raise LoadFailed("proving", f"the version does not say what it said before: {differs}")

    @property
    def proof_timeout_s(self) -> float:
        """The first answer of a fresh engine may compile and allocate first."""
        return min(self.settings.load_timeout_s, max(120.0, self.settings.probe_timeout_s))

    async def unless_exit(self, running: Running, work: asyncio.Future[T]) -> T | None:
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

    async def pause(self, running: Running, seconds: float) -> None:
        """Wait, but not beyond the engine's end."""
        if running.process is None:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await running.process.wait()

    async def proven(
        self, running: Running, verdict: probe.Verdict, load_s: float, probe_s: float, *, size: int = 0
    ) -> Loaded:
        """Give it its full priority, and keep that it has passed. ``size``: bytes that it holds, 0 to measure them."""
        if running.process is not None:
            courtesy.restore(running.process.pid)
            size = size or await asyncio.to_thread(host_process.memory_bytes, running.process.pid)
            running.bytes = size
            running.process.record = msgspec.structs.replace(
                running.process.record,
                launch=running.launch,
                bound=running.bound,
                shape=running.shape,
                source=running.source,
                fit=running.fit,
                device=running.device,
                role="",
                proven=True,
                load_s=load_s,
                probe_s=probe_s,
                bytes=size,
                fingerprint=verdict.fingerprint,
            )
            self.folder.write(running.process.record)
        sleeps = running.launch.sleeps
        return Loaded(running.launch.address, load_s, probe_s, size, verdict.fingerprint, sleeps=sleeps)

    async def fail(self, name: str, running: Running, stage: str, reason: str) -> Failure:
        """End what is left, and gather what tells why."""
        process = running.process
        exit_code = None
        if process is not None:
            by_itself = process.exited
            exit_code = await process.end(0, self.clock)
            if not by_itself:
                exit_code = None  # our own signal tells nothing
            if by_itself and exit_code is not None:
                reason = f"{reason} ({_exit_text(exit_code)})"
            self.folder.forget(name)
        failure = self.with_tail(name, Failure(stage, reason, (), exit_code))
        log.warning("engine_failed", instance=name, stage=stage, reason=failure.reason, exit_code=exit_code)
        return failure

    def with_tail(self, name: str, failure: Failure) -> Failure:
        """Add the engine's last lines, and the line that names the cause: first in the tail and in the reason."""
        lines = host_process.Log(self.folder.log(name)).tail()
        named = cause(lines)
        tail = lines[-LOG_LINES:]
        if named:
            tail = [f"cause: {named}", *tail[-(LOG_LINES - 1) :]]
        reason = f"{failure.reason}: {named}" if named else failure.reason
        return msgspec.structs.replace(failure, reason=reason, log_tail=tuple(tail))


def _exit_text(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def stage_of(signs: tuple[Sign, ...], line: str, stage: str) -> tuple[str, str] | None:
    """Stage and detail that a log line stands for; None for any other line. A stage never goes back."""
    for sign in signs:
        if re.search(sign.pattern, line):
            later = max(stage, sign.stage, key=STAGES.index)
            return later, line.split("] ", 1)[-1].strip()[:200]
    return None
