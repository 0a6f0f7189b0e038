"""The reconciler: makes the engines of this host agree with what the log says shall run here, and reports what happens.

It knows the control plane only by its ports and the engines only by the port of runner.py, so that it runs in the
simulation as it is. It decides nothing about traffic: an engine is stopped when the log says so and nobody uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import structlog

from turnout.core.decider import Accepted, Rejected
from turnout.core.handling import StartSpare
from turnout.core.instance import (
    ReportFailed,
    ReportLoading,
    ReportMeasured,
    ReportProbed,
    ReportReady,
    ReportSlept,
    ReportStopped,
    ReportTierFailed,
    ReportWoken,
)
from turnout.core.model import ReportInspected
from turnout.core.worker import JoinWorker, LeaveWorker, ReportKept
from turnout.events import subjects
from turnout.events.health import ProbeFailed, ProbePassed
from turnout.events.model import EngineSpec
from turnout.events.store import Unavailable
from turnout.projections.fleet import InstanceView, WorkerView
from turnout.workers.inference.cache import CachedModel, ModelCache
from turnout.workers.inference.runner import Failure, Found, Loaded, Order, Slept, Usage
from turnout.workers.ports import Request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from turnout.events.worker import KeptEngine
    from turnout.projections.fleet import CheckView
    from turnout.workers.clock import Clock
    from turnout.workers.inference.runner import EngineRunner, Look
    from turnout.workers.inference.settings import WorkerSettings
    from turnout.workers.ports import Beats, Bus, Closeable, HealthWriter, ViewEntry, ViewReader

log = structlog.get_logger()

T = TypeVar("T")

ROLE = "worker"
_RETRY_FIRST_S = 0.1
_RETRY_LAST_S = 5.0
#: How long an unquiet engine is waited for before it is said in the log, and said again.
_UNQUIET_FIRST_S = 10.0
_UNQUIET_AGAIN_S = 60.0
#: Of golden answers that are good like the one before, every so many is published: a sign that somebody asks.
_PROBES_TOLD = 10
#: Longest wait for quiet, and for answers to the last reports, when the worker itself stops with its engines.
_LAST_QUIET_S = 10.0
#: What a switch or a lost instance waits for loads before every preload.
_FOR_TRAFFIC = 1000
_LAST_REPORT_S = 3.0


class WorkerBeat(msgspec.Struct, frozen=True):
    """What a sign of life says.

    Attributes:
        worker: its id.
        instances: engines under it.
        unquiet: instance → who still uses it although it shall stop: an alert, as somebody routes by an old revision.
        unsound: instance → what is wrong with its newest golden answer.
    """

    worker: str
    instances: int
    unquiet: dict[str, str] = {}
    unsound: dict[str, str] = {}


class _Life:
    """One instance, from the moment that this worker hears of it until it has ended."""

    def __init__(self, view: InstanceView, sequence: int, found: Found | None) -> None:
        self.view = view
        self.sequence = sequence  # views older than this know nothing of the instance's end
        self.found = found
        self.drain = asyncio.Event()
        self.forced = asyncio.Event()
        self.asked = asyncio.Event()  # a golden probe may be wanted: see the view
        self.sleep = asyncio.Event()  # the view wants it to sleep
        self.wake = asyncio.Event()  # the view wants it to be woken
        self.known = asyncio.Event()  # the view says what it is: of a found engine only its id is known
        self.silent = False  # its end is known; nothing is to be reported
        self.unquiet = ""
        self.unsound = False  # the newest golden question that was published has failed
        self.task: asyncio.Task[None] | None = None
        if view.probe:
            self.asked.set()
        if found is None:
            self.known.set()


class InferenceWorker:
    """Runs the engines of one host for the control plane. Make one, ``run`` it, ``stop`` it."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        bus: Bus,
        beats: Beats,
        views: ViewReader,
        clock: Clock,
        runner: EngineRunner,
        health: HealthWriter | None = None,
        look: Look | None = None,
    ) -> None:
        """Make it; nothing runs yet.

        Args:
            settings: who it is, and how patient.
            bus: for reports.
            beats: for signs of life.
            views: what it shall do.
            clock: of this process.
            runner: runs the engines.
            health: where the answers to golden questions are published; None for nowhere.
            look: looks at the files of versions; None where this worker can't.
        """
        self.id = settings.id or socket.gethostname()
        self._settings = settings
        self._bus = bus
        self._beats = beats
        self._views = views
        self._clock = clock
        self._runner = runner
        self._health = health
        self._look = look
        self._checks: dict[str, tuple[str, asyncio.Task[None]]] = {}  # by name: digest of the settings, and who looks
        self._lives: dict[str, _Life] = {}
        self._ended: set[str] = set()  # ended here, and perhaps still in a view that lags behind
        self._key = subjects.view_key("worker", self.id)
        self._view = b""
        self._sequence = -1
        self._joined: int | None = None  # sequence that answered the newest join
        self._joining: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.cache = ModelCache()
        self._kept_news = asyncio.Event()
        self._kept_told: tuple[KeptEngine, ...] = ()
        self._telling = asyncio.Lock()  # a later word must not be overtaken by an earlier one
        self._releasing: dict[str, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._stop_engines = False

    @property
    def instances(self) -> tuple[str, ...]:
        """Instances that this worker runs, loads or stops now."""
        return tuple(sorted(self._lives))

    def stop(self, *, stop_engines: bool = False) -> None:
        """End ``run``. Engines go on running for the next worker with this run folder, unless told otherwise."""
        self._stop_engines = self._stop_engines or stop_engines
        self._stop.set()
        self._changed.set()

    async def probed(self, instance: str, number: int, row: int, seconds: float, reason: str) -> None:
        """Publish how a golden question went; see ``HostRunner.on_probed``."""
        life = self._lives.get(instance)
        if life is None or not life.view.model or self._health is None:
            return
        view, at = life.view, self._clock.now()
        if row:
            await self._health.publish(ProbeFailed(instance, view.model, view.version, number, row, reason, at))
        elif life.unsound or number % _PROBES_TOLD == 0:
            await self._health.publish(ProbePassed(instance, view.model, view.version, number, seconds, at))
        life.unsound = row > 0

    async def run(self) -> None:
        """Work until :meth:`stop`. Survives every outage of the control plane; engines serve on meanwhile."""
        structlog.contextvars.bind_contextvars(worker=self.id)
        found = await self._runner.found()
        for instance, one in found.items():
            self._begin(InstanceView(instance, "", "", _NO_ENGINE, phase="ready"), one.sequence, one)
        beating = asyncio.create_task(self._beat())
        measuring = asyncio.create_task(self._measure())
        measuring.add_done_callback(_loud)
        keeping = asyncio.create_task(self._tell_kept())
        keeping.add_done_callback(_loud)
        watching: Closeable | None = None
        try:
            self._start_joining()
            watching = await self._watch_views()
            while not self._stop.is_set():
                await self._changed.wait()
                self._changed.clear()
                if not self._stop.is_set():
                    self._reconcile()
            if self._stop_engines:
                await self._end_all()
        finally:
            if watching is not None:
                await watching.close()
            looking = (task for _, task in self._checks.values())
            lives = (life.task for life in self._lives.values())
            tasks = (beating, measuring, keeping, self._joining, *looking, *self._releasing.values(), *lives)
            await _cancelled(*(task for task in tasks if task is not None))
            self._runner.release()
            log.info("worker_stopped", engines_left=len(self._lives))

    async def _watch_views(self) -> Closeable | None:
        delay = _RETRY_FIRST_S
        while not self._stop.is_set():
            try:
                return await self._views.watch((self._key,), self._heard)
            except Unavailable as e:
                log.warning("views_unavailable", reason=str(e))
                await self._sleep(delay)
                delay = min(delay * 2, _RETRY_LAST_S)
        return None

    def _heard(self, entries: Mapping[str, ViewEntry], sequence: int) -> None:
        entry = entries.get(self._key)
        if entry is not None and entry.value:
            self._view = entry.value
        self._sequence = sequence
        self._changed.set()

    def _start_joining(self) -> None:
        if self._joining is None or self._joining.done():
            self._joining = asyncio.create_task(self._join())

    async def _join(self) -> None:
        memory, kept = self._runner.memory, self._runner.kept
        body = JoinWorker(
            self.id,
            self._settings.address,
            self._runner.kinds,
            self._settings.devices,
            self._settings.capacity,
            memory.memory_bytes,
            memory.device_bytes,
            self._settings.domain,
            kept,
        )
        async with self._telling:
            answer = await self._report("worker.join", body)
            self._kept_told = kept
        self.changed()
        if isinstance(answer, Accepted):
            self._joined = answer.sequence
            self._changed.set()
            log.info("worker_joined", engines=self._runner.kinds, capacity=self._settings.capacity)

    async def _beat(self) -> None:
        while True:
            beat = WorkerBeat(
                self.id,
                len(self._lives),
                {i: life.unquiet for i, life in self._lives.items() if life.unquiet},
                {i: trouble for i in self._lives if (trouble := self._runner.trouble(i))},
            )
            await self._beats.publish(ROLE, self.id, msgspec.json.encode(beat))
            await asyncio.sleep(self._settings.beat_s)

    async def _measure(self) -> None:
        """Look at what the proven engines hold, and say what has changed much."""
        while True:
            await asyncio.sleep(self._settings.measure_s)
            for one in self.cache.models:
                usage = await self._runner.usage(one.instance)
                if usage is not None and self.cache.news(one.instance, usage):
                    report = ReportMeasured(one.instance, usage.bytes, usage.device_bytes)
                    await self._report("instance.measured", report)
            await self._runner.measure_kept()

    def changed(self) -> None:
        """See ``Keeper``."""
        self._kept_news.set()

    async def told(self) -> None:
        """See ``Keeper``."""
        async with self._telling:
            kept = self._runner.kept
            if kept != self._kept_told:
                await self._report("worker.kept", ReportKept(self.id, kept))
                self._kept_told = kept

    async def may_start(self, engine: KeptEngine) -> str:
        """See ``Keeper``."""
        async with self._telling:
            before = self._kept_told
            # Before the answer: where nobody waits for it any more, it is told again what is really kept.
            self._kept_told = tuple(sorted((*self._runner.kept, engine), key=lambda one: one.name))
            answer = await self._report("worker.spare", StartSpare(self.id, engine))
            if isinstance(answer, Accepted):
                return ""
            self._kept_told = before
            return answer.reason if answer is not None else "the worker stops"

    async def _tell_kept(self) -> None:
        while True:
            await self._kept_news.wait()
            self._kept_news.clear()
            await self.told()

    def _release_spares(self, names: tuple[str, ...]) -> None:
        self._releasing = {name: task for name, task in self._releasing.items() if not task.done() or name in names}
        for name in names:
            if name not in self._releasing:
                self._releasing[name] = task = asyncio.create_task(self._runner.release_spare(name))
                task.add_done_callback(_loud)

    def _reconcile(self) -> None:
        """Compare the newest view with what runs. Never waits for anything."""
        if not self._view:
            return
        view, sequence = msgspec.json.decode(self._view, type=WorkerView), self._sequence
        if view.state != "live" and self._joined is not None and sequence >= self._joined:
            log.warning("worker_was_lost", state=view.state)
            self._joined = None
            self._start_joining()
        # An older view may call loading what the worker before has reported ready: loaded again under the same
        # address, it would get traffic before it is proven.
        fresh = self._joined is not None and sequence >= self._joined
        self._ended &= set(view.instances)
        for instance, wanted in view.instances.items():
            life = self._lives.get(instance)
            if life is not None:
                life.view = wanted
                life.known.set()
                if fresh and sequence >= life.sequence:  # what is older may ask for a sleep that is over
                    _turn(life.sleep, on=wanted.phase == "sleeping")
                    _turn(life.wake, on=wanted.phase == "waking")
                life.sequence = max(life.sequence, sequence)
                self._drain_if_asked(life)
                if wanted.probe:
                    life.asked.set()
            elif instance not in self._ended and fresh:
                self._begin(wanted, sequence, None)
        if not fresh:
            return
        self._check_files(view.inspect)
        self._release_spares(view.released)
        for instance, life in self._lives.items():
            # A view that is being built anew is older than the instance: it does not know it yet, and proves nothing.
            if instance not in view.instances and sequence >= life.sequence:
                if not life.drain.is_set():
                    log.info("instance_not_wanted", instance=instance)
                life.silent = True
                life.drain.set()

    def _check_files(self, wanted: Mapping[str, CheckView]) -> None:
        """Look at each version's files once; one that is shown again later is looked at again."""
        for name, (settings, task) in tuple(self._checks.items()):
            if name not in wanted or wanted[name].settings != settings:
                task.cancel()
                del self._checks[name]
        if self._look is None:
            return
        for name, check in wanted.items():
            if name not in self._checks:
                task = asyncio.create_task(self._check(check, self._look))
                task.add_done_callback(_loud)
                self._checks[name] = (check.settings, task)

    async def _check(self, check: CheckView, look: Look) -> None:
        report = ReportInspected(check.model, check.version, self.id, check.settings)
        begun = self._clock.monotonic()
        try:
            report = await look(check, report)
        except Exception as e:  # a fault in reading files that may be hostile must not take the worker down
            log.exception("inspection_failed", model=check.model, version=check.version)
            why = f"turnout failed to read its files: {type(e).__name__}: {e}"
            hint = "this is a fault of turnout: report it with the worker's log"
            report = msgspec.structs.replace(report, code="bug", reason=why, hint=hint)
        seconds = round(self._clock.monotonic() - begun, 2)
        log.info(
            "version_inspected",
            model=check.model,
            version=check.version,
            code=report.code,
            reason=report.reason,
            seconds=seconds,
        )
        await self._report("version.inspected", report)

    def _begin(self, view: InstanceView, sequence: int, found: Found | None) -> None:
        life = _Life(view, sequence, found)
        self._lives[view.instance] = life
        self._drain_if_asked(life)
        life.task = asyncio.create_task(self._guard(life))

    @staticmethod
    def _drain_if_asked(life: _Life) -> None:
        if life.view.phase == "draining":
            life.drain.set()
            if life.view.forced_by:
                life.forced.set()

    async def _guard(self, life: _Life) -> None:
        """Live one instance; a bug ends this one and is reported, the others live on."""
        instance = life.view.instance
        try:
            await self._live(life)
        except Exception as e:  # one instance's bug must not take the other engines' supervision down
            log.exception("instance_supervision_failed", instance=instance)
            await self._runner.stop(instance)
            await self._report_life(life, ReportFailed(instance, "serving", f"bug in turnout: {type(e).__name__}: {e}"))
        self._ended.add(instance)
        del self._lives[instance]
        self._changed.set()  # a view that came meanwhile may want something

    async def _live(self, life: _Life) -> None:
        instance = life.view.instance
        loaded = life.found.loaded if life.found else None
        if life.found is None and life.drain.is_set():
            await self._end(life)  # asked to stop before anything of it ran here
            return
        # Also one that a worker before has begun to load: its word that it is ready may still come, and must not be
        # taken for one that loads again at the same address.
        slumber = {"sleeping": "sleeping", "asleep": "sleeping", "waking": "waking"}.get(life.view.phase, "")
        if life.found is None and (slumber or life.view.phase in ("loading", "ready")):
            stage = slumber or life.view.stage or "serving"
            gone = msgspec.structs.replace(self._runner.remains(instance), stage=stage)
            await self._report_life(life, _failed(instance, gone))
            return
        slept = life.found.slept if life.found else None
        result: Loaded | Failure | None = loaded
        if slept is not None:
            result = await self._slumber(life, slept)
        elif loaded is None:
            result = await self._load(life)
            for failed in result.struck if result else ():
                await self._report(
                    "instance.tier", ReportTierFailed(instance, failed.tier, failed.source, failed.reason)
                )
        while isinstance(result, Loaded):
            result = await self._serve(life, result)
            if result is None and life.sleep.is_set() and not life.drain.is_set() and not life.silent:
                result = await self._sleep_until_woken(life)
        if isinstance(result, Failure):
            await self._report_life(life, _failed(instance, result))
        else:
            await self._end(life)

    async def _sleep_until_woken(self, life: _Life) -> Loaded | Failure | None:
        """Wait until nobody uses the engine, put it to sleep, and wake it when it is asked for; None: it shall end.

        Sleeping and waking take their turn among the loads of the device.
        """
        failure = await _unless(self._wait_quiet(life), life.drain.wait())
        if failure is not None or life.drain.is_set():
            return failure
        view, order = life.view, _order(life)
        slept = await self.cache.preload_model(
            lambda: self._runner.sleep(order, view.level), device=view.device, priority=_FOR_TRAFFIC
        )
        if isinstance(slept, Failure):
            return slept
        log.info("instance_slept", instance=view.instance, level=slept.level, seconds=round(slept.seconds, 2))
        return await self._slumber(life, slept)

    async def _slumber(self, life: _Life, slept: Slept) -> Loaded | Failure | None:
        """Say that it sleeps, and wake it when it is asked for; None: it shall end."""
        instance = life.view.instance
        report = ReportSlept(instance, slept.level, slept.seconds, slept.bytes, slept.device_bytes, number=slept.number)
        answer = await self._report("instance.slept", report)
        if isinstance(answer, Rejected):  # nobody has ever asked for it
            life.silent = answer.code == "instance_unknown"
            return None
        asked = _unless(life.wake.wait(), life.drain.wait())
        if (died := await _unless(self._runner.slumber(instance), asked)) is not None:
            return died
        if life.drain.is_set():
            return None
        return await self.cache.preload_model(
            lambda: self._runner.wake(_order(life)), device=life.view.device, priority=_FOR_TRAFFIC
        )

    async def _load(self, life: _Life) -> Loaded | Failure | None:
        """Load and prove, one at a time, as two engines that start together charge each other's memory.

        None where it was asked to stop first; what runs of it is then still to be ended. One that an earlier worker has
        begun goes on by itself, but what it must say is a matter of its version: the proof waits for the view.
        """
        if await _unless(life.known.wait(), life.drain.wait()) is None:
            return None
        view = life.view
        order = _order(life)
        begun = self._clock.monotonic()

        def progress(stage: str, detail: str) -> None:
            seconds = self._clock.monotonic() - begun
            log.info("instance_loading", instance=view.instance, stage=stage, seconds=round(seconds, 1), detail=detail)
            outbox.put(ReportLoading(view.instance, stage, seconds, detail))

        async def load() -> Loaded | Failure:
            if view.engine.url:  # a server that runs already takes nothing of this host
                return await self._runner.load(order, progress)
            priority = view.priority if view.cause == "preload" else _FOR_TRAFFIC
            return await self.cache.preload_model(
                lambda: self._runner.load(order, progress), device=view.device, priority=priority
            )

        async def report(stage: ReportLoading) -> None:
            answer = await self._report("instance.loading", stage)
            if isinstance(answer, Rejected):  # nobody has asked for it
                life.silent = answer.code == "instance_unknown"
                life.drain.set()

        outbox = _Progress(report)
        try:
            return await _unless(load(), life.drain.wait())
        finally:
            await outbox.close()

    async def _serve(self, life: _Life, loaded: Loaded) -> Failure | None:
        """Report it ready and watch it. Returns its failure, or None when it shall end."""
        instance = life.view.instance
        watching = asyncio.create_task(self._runner.watch(instance))
        proving = asyncio.create_task(self._answer_probes(life))
        proving.add_done_callback(_loud)
        try:
            woken = loaded.tier == "wake"
            report = (
                _woken(instance, loaded)
                if woken
                else ReportReady(
                    instance,
                    loaded.address,
                    loaded.load_s,
                    loaded.probe_s,
                    loaded.bytes,
                    loaded.fingerprint,
                    loaded.tier,
                    loaded.device_bytes,
                    loaded.served,
                    loaded.sleeps,
                    loaded.base,
                )
            )
            log.info(
                "instance_ready",
                instance=instance,
                address=loaded.address,
                load_s=round(loaded.load_s, 2),
                probe_s=round(loaded.probe_s, 2),
                fingerprint=loaded.fingerprint,
                tier=loaded.tier,
                adopted=life.found is not None,
            )
            answer = await _unless(
                self._report("instance.woken" if woken else "instance.ready", report), asyncio.wait((watching,))
            )
            if isinstance(answer, Rejected):
                log.warning("instance_refused", instance=instance, code=answer.code, reason=answer.reason)
                life.silent = answer.code == "instance_unknown"
                return None
            if isinstance(answer, Accepted):
                life.sequence = max(life.sequence, answer.sequence)
            told = Usage(loaded.bytes, loaded.device_bytes)
            self.cache.put_model(CachedModel(instance, life.view.model, life.view.version, told))
            leaves = _first(life.drain.wait(), life.sleep.wait())
            return await _unless(asyncio.shield(watching), leaves)
        finally:
            self.cache.evict_model(instance)
            await _cancelled(watching, proving)

    async def _answer_probes(self, life: _Life) -> None:
        """Ask the golden question whenever the view wants it once more, and say how it went."""
        instance, answered = life.view.instance, ""
        while True:
            await life.asked.wait()
            life.asked.clear()
            cause = life.view.probe
            if not cause or cause == answered:
                continue
            begun = self._clock.monotonic()
            trouble = await self._runner.prove(instance)
            seconds = self._clock.monotonic() - begun
            log.info("instance_probed", instance=instance, cause=cause, trouble=trouble, seconds=round(seconds, 2))
            await self._report("instance.probed", ReportProbed(instance, cause, not trouble, seconds, trouble))
            answered = cause

    async def _end(self, life: _Life) -> None:
        """Wait until nobody uses the engine, stop it, report it."""
        instance, begun = life.view.instance, self._clock.monotonic()
        reason = life.view.reason or ("not wanted any more" if life.silent else "")
        log.info("instance_draining", instance=instance, reason=reason, forced_by=life.view.forced_by)
        if not life.forced.is_set():
            failure = await self._wait_quiet(life)
            if failure is not None:
                await self._report_life(life, _failed(instance, failure))
                return
        await self._runner.stop(instance)
        seconds = self._clock.monotonic() - begun
        log.info("instance_stopped", instance=instance, seconds=round(seconds, 2))
        await self._report_life(life, ReportStopped(instance, seconds))

    async def _wait_quiet(self, life: _Life) -> Failure | None:
        """The proof of quiet, or an operator's word. Says so where it does not come."""
        instance, begun = life.view.instance, self._clock.monotonic()
        said = begun + _UNQUIET_FIRST_S - _UNQUIET_AGAIN_S

        def busy(what: str) -> None:
            nonlocal said
            now = self._clock.monotonic()
            if now - begun >= _UNQUIET_FIRST_S:
                life.unquiet = what
            if now - said >= _UNQUIET_AGAIN_S:
                said = now
                log.warning("instance_still_used", instance=instance, what=what, seconds=round(now - begun))

        try:
            return await _unless(self._runner.wait_quiet(instance, busy), life.forced.wait())
        finally:
            life.unquiet = ""

    async def _report_life(self, life: _Life, body: ReportStopped | ReportFailed) -> None:
        if not life.silent:
            verb = "instance.stopped" if isinstance(body, ReportStopped) else "instance.failed"
            await self._report(verb, body)

    async def _report(self, verb: str, body: msgspec.Struct) -> Accepted | Rejected | None:
        """Say it until it is answered; the command id stays the same, so it takes effect once.

        None where the worker stops before there was an answer.
        """
        request = Request(self._clock.id("cmd-"), f"worker:{self.id}", msgspec.Raw(msgspec.json.encode(body)))
        delay, tries = _RETRY_FIRST_S, 0
        deadline = None
        while True:
            try:
                answer = await self._bus.ask(ROLE, verb, request)
                why = "" if isinstance(answer, Accepted | Rejected) else f"{answer.code}: {answer.reason}"
                if isinstance(answer, Accepted | Rejected):
                    return answer
            except Unavailable as e:
                why = str(e)
            tries += 1
            if tries in (1, 10) or tries % 100 == 0:
                log.warning("report_unanswered", verb=verb, command=request.id, tries=tries, reason=why)
            if self._stop.is_set():
                deadline = deadline or self._clock.monotonic() + _LAST_REPORT_S
                if self._clock.monotonic() >= deadline:
                    return None
            await asyncio.sleep(delay * (0.5 + self._clock.jitter()))
            delay = min(delay * 2, _RETRY_LAST_S if deadline is None else 0.5)

    async def _end_all(self) -> None:
        """Stop all engines, the unquiet ones after a last wait, and leave."""
        await self._runner.end_spares()
        for life in self._lives.values():
            life.drain.set()
        tasks = [life.task for life in self._lives.values() if life.task]
        if tasks:
            _, unquiet = await asyncio.wait(tasks, timeout=_LAST_QUIET_S)
            for life in self._lives.values():
                life.forced.set()
            if unquiet:
                await asyncio.wait(unquiet)
        await self._report("worker.leave", LeaveWorker(self.id))

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not beyond the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


class _Progress:
    """The newest stage of a load that is not yet reported: an outage must not hold the load up."""

    def __init__(self, report: Callable[[ReportLoading], Awaitable[None]]) -> None:
        self._report = report
        self._stage = ""
        self._next: ReportLoading | None = None
        self._task: asyncio.Task[None] | None = None

    def put(self, report: ReportLoading) -> None:
        """Report this next, if it is a new stage; what has waited until now is out of date."""
        if report.stage == self._stage:
            return
        self._stage = report.stage
        self._next = report
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send())

    async def _send(self) -> None:
        while self._next is not None:
            report, self._next = self._next, None
            await self._report(report)

    async def close(self) -> None:
        """What is not answered by now is overtaken by the report that follows."""
        if self._task is not None:
            await _cancelled(self._task)


#: Of an instance that was found running: its settings stand in the log, and nothing is started by them.
_NO_ENGINE = EngineSpec("")


def _failed(instance: str, failure: Failure) -> ReportFailed:
    return ReportFailed(instance, failure.stage, failure.reason, failure.log_tail, failure.exit_code)


def _woken(instance: str, loaded: Loaded) -> ReportWoken:
    return ReportWoken(
        instance, loaded.load_s, loaded.probe_s, loaded.bytes, loaded.device_bytes, loaded.address, loaded.slept
    )


def _order(life: _Life) -> Order:
    view = life.view
    return Order(
        view.instance,
        view.model,
        view.version,
        view.engine,
        life.sequence,
        view.inspection,
        view.estimate,
        view.device,
        view.slept,
        view.into,
        view.struck,
    )


def _turn(event: asyncio.Event, *, on: bool) -> None:
    if on:
        event.set()
    else:
        event.clear()


async def _first(*events: Awaitable[object]) -> None:
    """Until one of them came."""
    waiting = [asyncio.ensure_future(event) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _cancelled(*waiting)


async def _unless(work: Awaitable[T], event: Awaitable[object]) -> T | None:
    """The work's result; None where the event came first, and the work is cancelled then."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event)
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _cancelled(working, waiting)


def _loud(task: asyncio.Task[None]) -> None:
    """A bug in a task that nobody waits for is not lost."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("bug_in_worker", exc_info=error)


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what is not done, and wait until it is."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
