"""A control plane and a host without processes: real deciders and the real view, simulated ports around them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from turnout.core import instance, model, worker
from turnout.core.decider import Accepted, Answer, Rejected
from turnout.events.envelope import Envelope, Recorded
from turnout.events.instance import InstanceDraining, InstanceRequested
from turnout.events.model import EngineSpec, Inspection, VersionRegistered
from turnout.events.store import Unavailable
from turnout.projections.fleet import Workers
from turnout.workers.inference.runner import Failure, Found, HostMemory, Loaded, Order, Slept, Usage
from turnout.workers.inference.settings import WorkerSettings
from turnout.workers.inference.worker import InferenceWorker, WorkerBeat
from turnout.workers.ports import Closeable, Request, ViewEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from turnout.events.worker import KeptEngine
    from turnout.projections.fleet import CheckView

COMMANDS: dict[str, tuple[ModuleType, type[msgspec.Struct]]] = {
    "worker.join": (worker, worker.JoinWorker),
    "worker.leave": (worker, worker.LeaveWorker),
    "worker.kept": (worker, worker.ReportKept),
    "version.inspected": (model, model.ReportInspected),
    "instance.loading": (instance, instance.ReportLoading),
    "instance.ready": (instance, instance.ReportReady),
    "instance.tier": (instance, instance.ReportTierFailed),
    "instance.slept": (instance, instance.ReportSlept),
    "instance.woken": (instance, instance.ReportWoken),
    "instance.probed": (instance, instance.ReportProbed),
    "instance.failed": (instance, instance.ReportFailed),
    "instance.stopped": (instance, instance.ReportStopped),
}
TIME = datetime(2026, 1, 1, tzinfo=UTC)
FAKE = EngineSpec("fake")


class Plane:
    """Bus, beats and views of one control plane, in memory."""

    def __init__(self) -> None:
        self.down = False
        self.stalled = False  # views lag behind
        self.asked: list[tuple[str, str, Request]] = []
        self.beats: list[WorkerBeat] = []
        self.log: list[object] = []
        self._workers = Workers()
        self._states: dict[tuple[ModuleType, str], Any] = {}
        self._done: dict[str, Answer] = {}
        self._watchers: list[tuple[str, Callable[[Mapping[str, ViewEntry], int], None]]] = []

    # Bus

    async def ask(self, role: str, verb: str, request: Request, timeout_s: float = 5.0) -> Answer:
        self.asked.append((role, verb, request))
        if self.down:
            raise Unavailable("the test took the control plane away")
        if request.id in self._done:
            return self._done[request.id]
        module, kind = COMMANDS[verb]
        command: Any = msgspec.json.decode(request.body, type=kind)
        id = {worker: "worker", model: "model"}.get(module, "instance")
        id = str(getattr(command, id))
        state = self._states.get((module, id), module.initial)
        decided = module.decide(state, command)
        if isinstance(decided, Rejected):
            return decided
        for event in decided:
            self.record(event)
        answer = self._done[request.id] = Accepted(verb, len(self.log))
        return answer

    async def serve(self, handler: object) -> Closeable:
        raise NotImplementedError

    # Beats

    async def publish(self, kind: str, id: str, body: bytes) -> None:
        self.beats.append(msgspec.json.decode(body, type=WorkerBeat))

    async def listen(self, heard: object) -> Closeable:
        raise NotImplementedError

    # ViewReader

    async def watch(self, keys: tuple[str, ...], changed: Callable[[Mapping[str, ViewEntry], int], None]) -> Plane:
        self._watchers.append((keys[0], changed))
        self.show()
        return self

    async def snapshot(self, keys: tuple[str, ...]) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        self._watchers.clear()

    # what a test does

    def record(self, event: Any) -> None:
        """Append an event and project it."""
        kind = type(event).__name__
        if kind.startswith(("Model", "Version")):
            module, id = model, event.model
        else:
            module, id = (worker, event.worker) if kind.startswith(("Worker", "Spare")) else (instance, event.instance)
        state = self._states.get((module, id), module.initial)
        self._states[module, id] = module.evolve(state, event)
        self.log.append(event)
        envelope = Envelope("", 1, "", "", "", "", TIME, 0, "", "")
        self._workers.apply(Recorded("", len(self.log), type(event).__name__, event, envelope, b"", b""))
        self.show()

    def show(self) -> None:
        """Give watchers the newest view."""
        if not self.stalled:
            self.show_view(msgspec.json.encode(self._workers.view("w1")), len(self.log))

    def show_view(self, value: bytes, sequence: int) -> None:
        for key, changed in self._watchers:
            changed({key: ViewEntry(key, value, sequence)} if value != b"null" else {}, sequence)

    def request(self, id: str = "i-1", engine: EngineSpec = FAKE) -> None:
        self.record(InstanceRequested(id, "chat", "v1", "w1", engine, "sw-1"))

    def register(self, version: str = "v1", path: str = "/models/v1") -> None:
        engine = EngineSpec("fake", path=path)
        self.record(VersionRegistered("chat", version, engine, model.digest(engine)))

    def versions(self) -> model.ModelState:
        state = self._states.get((model, "chat"), model.initial)
        assert isinstance(state, model.ModelState)
        return state

    def drain(self, id: str = "i-1", forced_by: str = "") -> None:
        self.record(InstanceDraining(id, "left the route", forced_by))

    def phase(self, id: str = "i-1") -> str:
        return str(self._states[instance, id].phase)

    def state(self, id: str = "i-1") -> instance.InstanceState:
        state = self._states[instance, id]
        assert isinstance(state, instance.InstanceState)
        return state

    def worker(self) -> worker.WorkerState:
        state = self._states.get((worker, "w1"), worker.initial)
        assert isinstance(state, worker.WorkerState)
        return state

    def verbs(self) -> list[str]:
        return [verb for _, verb, _ in self.asked]


class Host:
    """An EngineRunner without engines: each step of a life waits for the test."""

    kinds = ("fake", "openai")

    def __init__(self) -> None:
        self.earlier: dict[str, Found] = {}
        self.loading: list[str] = []
        self.orders: dict[str, Order] = {}
        self.watched: set[str] = set()
        self.stopped: list[str] = []
        self.released = False
        self.used: dict[str, str] = {}
        self.troubles: dict[str, str] = {}
        self.slept: list[tuple[str, int]] = []
        self.wakes: list[Loaded | Failure] = []
        self.bytes: dict[str, int] = {}
        self.keeps: tuple[KeptEngine, ...] = ()
        self.ended_spares: list[str] = []
        self.progress: dict[str, Callable[[str, str], None]] = {}
        self._outcome: dict[str, asyncio.Future[Loaded | Failure]] = {}
        self._end: dict[str, asyncio.Future[Failure]] = {}

    @property
    def memory(self) -> HostMemory:
        return HostMemory(8 << 30)

    async def usage(self, instance: str) -> Usage | None:
        return Usage(self.bytes[instance]) if instance in self.bytes else None

    async def found(self) -> Mapping[str, Found]:
        return self.earlier

    async def load(self, order: Order, progress: Callable[[str, str], None]) -> Loaded | Failure:
        self.loading.append(order.instance)
        self.orders[order.instance] = order
        self.progress[order.instance] = progress
        progress("starting", "")
        try:
            return await self._outcome.setdefault(order.instance, asyncio.Future())
        finally:
            self.loading.remove(order.instance)

    def loaded(self, id: str = "i-1", outcome: Loaded | Failure | None = None) -> None:
        future = self._outcome.setdefault(id, asyncio.Future())
        future.set_result(outcome or Loaded(f"unix:/run/{id}.sock", 1.5, 0.1, 7, "v1"))

    async def watch(self, instance: str) -> Failure:
        self.watched.add(instance)
        try:
            return await asyncio.shield(self._end.setdefault(instance, asyncio.Future()))
        finally:
            self.watched.discard(instance)

    def dies(self, id: str, failure: Failure) -> None:
        self._end.setdefault(id, asyncio.Future()).set_result(failure)

    async def prove(self, instance: str) -> str:
        return self.troubles.get(instance, "")

    async def wait_quiet(self, instance: str, busy: Callable[[str], None]) -> Failure | None:
        while instance in self.used:
            busy(self.used[instance])
            await asyncio.sleep(0.002)
        return None

    async def stop(self, instance: str) -> None:
        self.stopped.append(instance)

    async def sleep(self, order: Order, level: int) -> Slept | Failure:
        self.slept.append((order.instance, level))
        return Slept(level, 0.5, 3, number=order.slept)

    async def slumber(self, instance: str) -> Failure:
        return await asyncio.shield(self._end.setdefault(instance, asyncio.Future()))

    async def wake(self, order: Order) -> Loaded | Failure:
        return self.wakes.pop(0)

    def remains(self, instance: str) -> Failure:
        return Failure("serving", "gone", ("last line",))

    def trouble(self, instance: str) -> str:
        return self.troubles.get(instance, "")

    @property
    def kept(self) -> tuple[KeptEngine, ...]:
        return self.keeps

    async def measure_kept(self) -> None:
        """They hold what they held."""

    async def release_spare(self, name: str) -> None:
        self.ended_spares.append(name)

    async def end_spares(self) -> None:
        """There are none."""

    def release(self) -> None:
        self.released = True


class Clock:
    """Real time, made faster for waits that a test would have to sit out."""

    def __init__(self) -> None:
        self.ids = 0
        self.ahead = 0.0

    def now(self) -> datetime:
        return TIME

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead

    def id(self, prefix: str = "") -> str:
        self.ids += 1
        return f"{prefix}{self.ids}"

    def jitter(self) -> float:
        return 0.0


class Rig:
    """One worker between a simulated control plane and a simulated host."""

    def __init__(self) -> None:
        self.plane = Plane()
        self.host = Host()
        self.clock = Clock()
        settings = WorkerSettings(id="w1", beat_s=0.005, capacity=4)
        self.looked: list[CheckView] = []
        self.finds: dict[str, object] = {"inspection": Inspection("c0ffee")}  # what a look comes to
        self.worker = InferenceWorker(
            settings,
            bus=self.plane,
            beats=self.plane,
            views=self.plane,
            clock=self.clock,
            runner=self.host,
            look=self._look,
        )
        self._task: asyncio.Task[None] | None = None

    async def _look(self, check: CheckView, report: model.ReportInspected) -> model.ReportInspected:
        self.looked.append(check)
        return msgspec.structs.replace(report, **self.finds)

    async def __aenter__(self) -> Rig:
        self._task = asyncio.create_task(self.worker.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.worker.stop()
        await self.ended()

    async def ended(self) -> None:
        assert self._task is not None
        async with asyncio.timeout(20):
            await self._task


@pytest.fixture
def rig(runner: asyncio.Runner) -> Rig:
    async def make() -> Rig:
        return Rig()

    return runner.run(make())
