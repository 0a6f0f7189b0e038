"""The simulated fleet: engines on hosts, workers that reconcile them, gateways that send clients' requests to them.

Gateways route with the real TransitionManager and RequestTracker.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from turnout.core.decider import Accepted, Failed, Rejected
from turnout.core.gateway import JoinGateway, LeaveGateway, ReportApplied, ReportDrained
from turnout.core.instance import ReportFailed, ReportLoading, ReportReady, ReportStopped
from turnout.core.worker import JoinWorker
from turnout.events import subjects
from turnout.events.store import Unavailable
from turnout.projections.fleet import GatewayView, InstanceView, WorkerView
from turnout.projections.routing import RouteView
from turnout.workers.gateway.transition import Choice, NoRoute, RequestTracker, Slot, TransitionManager
from turnout.workers.ports import Request, ViewEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.sim.network import Network, Process
    from turnout.core.decider import Answer
    from turnout.events.model import EngineSpec
    from turnout.workers.gateway.transition import Drained
    from turnout.workers.ports import Beats, Bus, ViewReader

BEAT_S = 1.0
#: An engine must have been without a connection for this long before its worker stops it.
QUIET_S = 0.3
#: How long a gateway waits for a first byte, and a worker for a sign of life of an engine.
FIRST_BYTE_S = 1.5
HANG_S = 3.0


async def tell(process: Process, bus: Bus, role: str, verb: str, body: object, id: str) -> Answer:
    """Send one command until it is answered, always with the same id."""
    request = Request(id, process.name, msgspec.Raw(msgspec.json.encode(body)))
    while True:
        try:
            answer = await bus.ask(role, verb, request, 2.0)
        except Unavailable:
            answer = None
        if answer is not None and not isinstance(answer, Failed):
            return answer
        await asyncio.sleep(0.1 + 0.2 * process.jitter())


# --- engines -----------------------------------------------------------------------------------------------------


class SimEngine:
    """One engine process. ``state``: loading, up, hung, dead (it crashed or was killed) or stopped (as asked)."""

    def __init__(self, host: Host, view: InstanceView) -> None:
        self.host = host
        self.instance = view.instance
        self.model = view.model
        self.version = view.version
        self.spec = view.engine
        self.address = f"unix:/run/{view.instance}"
        self.state = "loading"
        self.up_at = host.net.loop.time() + setting(view.engine, "load-s", 0.2)
        self.proven = False
        #: Fault injection has crashed or hung it.
        self.faulted = False
        self.flights: set[Flight] = set()

    def die(self, state: str = "dead") -> None:
        """Its process is gone."""
        if self.state in ("dead", "stopped"):
            return
        self.host.net.trace("engine", state, self.instance, self.model, self.version)
        self.state = state
        for flight in sorted(self.flights, key=lambda f: f.number):
            flight.broken()


def setting(engine: EngineSpec, name: str, default: float) -> float:
    """A number among the engine's flags."""
    for word in engine.args:
        key, _, value = word.partition("=")
        if key == f"--{name}":
            return float(value)
    return default


class Host:
    """One machine with devices. Engines outlive the worker process."""

    def __init__(self, net: Network, name: str, fleet: Fleet) -> None:
        self.net = net
        self.name = name
        self.fleet = fleet
        self.engines: dict[str, SimEngine] = {}


class Fleet:
    """Everything that serves, and the hooks of whoever checks it."""

    def __init__(self, net: Network, *, holds: bool = True) -> None:
        self.net = net
        #: Gateways keep a connection open to each engine that their route names.
        self.holds = holds
        self.engines: dict[str, SimEngine] = {}
        self.gateways: list[SimGateway] = []
        self.counts = {"requests": 0, "answered": 0, "excused": 0, "rerouted": 0, "ended": 0}
        self.on_stop: Callable[[SimEngine], None] = lambda _: None
        self.on_sent: Callable[[SimGateway, Choice], None] = lambda *_: None
        self.on_failed: Callable[[SimGateway, Flight, str], None] = lambda *_: None
        self.on_applied: Callable[[SimGateway, RouteView, int], None] = lambda *_: None

    def quiet(self, engine: SimEngine) -> bool:
        """What the kernel of the engine's host would say: no open connection."""
        return not engine.flights and not any(
            engine.address in g.connected for g in self.gateways if g.process.alive
        )


# --- workers -----------------------------------------------------------------------------------------------------


class SimWorker:
    """Makes its host agree with its view, by the contract of the real worker."""

    def __init__(self, process: Process, id: str, host: Host, bus: Bus, beats: Beats, reader: ViewReader, capacity: int) -> None:
        self.process = process
        self.id = id
        self._host = host
        self._bus = bus
        self._beats = beats
        self._reader = reader
        self._capacity = capacity
        self._view: WorkerView | None = None
        self._sequence = 0
        self._moved = asyncio.Event()
        self._busy: dict[str, str] = {}
        self._over: set[str] = set()

    async def run(self) -> None:
        self.process.spawn(self._beat())
        joined = await self._join()
        await self._reader.watch((subjects.view_key("worker", self.id),), self._changed)
        while self._sequence < joined:
            await self._wait()
        while True:
            self._reconcile()
            await self._wait()
            if self._view is not None and self._view.state == "lost":
                joined = await self._join()
                while self._sequence < joined:
                    await self._wait()

    async def _join(self) -> int:
        join = JoinWorker(self.id, self._host.name, ("fake",), (), self._capacity)
        answer = await tell(self.process, self._bus, "worker", "worker.join", join, self.process.id("join-"))
        assert isinstance(answer, Accepted), answer
        return answer.sequence

    async def _beat(self) -> None:
        while True:
            await self._beats.publish("worker", self.id, b"{}")
            await asyncio.sleep(BEAT_S)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(0.5):
                await self._moved.wait()
        except TimeoutError:
            pass
        self._moved.clear()

    def _changed(self, entries: Mapping[str, ViewEntry], sequence: int) -> None:
        self._sequence = max(self._sequence, sequence)
        for entry in entries.values():
            self._view = msgspec.json.decode(entry.value, type=WorkerView) if entry.value else None
        self._moved.set()

    def _reconcile(self) -> None:
        wanted = {} if self._view is None else self._view.instances
        for id, view in wanted.items():
            engine = self._host.engines.get(id)
            if id in self._over:
                continue
            if view.phase == "draining":
                self._begin(id, "drain", self._drain(id, forced=bool(view.forced_by)))
            elif engine is None and view.phase == "requested":
                self._start(view)
            elif engine is None:
                self._begin(id, "report", self._failed(id, view.stage or "serving", "its process is gone"))
            elif engine.state == "dead":
                self._begin(id, "report", self._failed(id, "serving" if engine.proven else "loading", "it exited"))
            elif engine.state == "hung":
                self._begin(id, "hang", self._hang(engine))
            elif not engine.proven or view.phase != "ready":
                self._begin(id, "load", self._load(engine))
        for id in sorted(self._host.engines.keys() - wanted.keys()):
            self._stop(self._host.engines[id])  # it has ended in the log: whatever is left of it goes

    def _start(self, view: InstanceView) -> None:
        engine = SimEngine(self._host, view)
        self._host.engines[view.instance] = engine
        self._host.fleet.engines[engine.address] = engine
        self._begin(view.instance, "load", self._load(engine))

    def _begin(self, id: str, what: str, work: Any) -> None:
        if self._busy.get(id) in (what, "drain", "report"):
            work.close()
            return
        self._busy[id] = what
        self.process.spawn(self._do(id, what, work))

    async def _do(self, id: str, what: str, work: Any) -> None:
        await work
        if self._busy.get(id) == what:
            del self._busy[id]
        self._moved.set()

    async def _load(self, engine: SimEngine) -> None:
        began = self.process.monotonic()
        await self._say("instance.loading", ReportLoading(engine.instance, "starting", 0.0))
        fails = setting(engine.spec, "fails", 0)
        loop = self._host.net.loop
        if engine.up_at > loop.time():
            await asyncio.sleep(engine.up_at - loop.time())
        if engine.state != "loading" and not (engine.state == "up"):
            return
        if fails == 1:
            engine.die()
            await self._failed(engine.instance, "loading", "the weights are damaged")
            return
        engine.state = "up"
        await self._say("instance.loading", ReportLoading(engine.instance, "proving", 0.1))
        await asyncio.sleep(0.02)
        if engine.state != "up" or engine.instance in self._over:
            return
        if fails == 2:
            engine.die()
            await self._failed(engine.instance, "proving", "its answers are garbage")
            return
        engine.proven = True
        load_s = round(self.process.monotonic() - began, 3)
        answer = await self._say("instance.ready", ReportReady(engine.instance, engine.address, load_s, 0.02))
        if isinstance(answer, Rejected) and answer.code == "instance_unknown":
            self._stop(engine)

    async def _hang(self, engine: SimEngine) -> None:
        await asyncio.sleep(HANG_S)
        engine.die()
        await self._failed(engine.instance, "serving", "no answer to the golden question")

    async def _failed(self, id: str, stage: str, reason: str) -> None:
        self._over.add(id)
        await self._say("instance.failed", ReportFailed(id, stage, reason))
        self._host.engines.pop(id, None)

    async def _drain(self, id: str, *, forced: bool) -> None:
        engine = self._host.engines.get(id)
        quiet_s = 0.0
        while engine is not None and engine.state == "up" and not forced and quiet_s < QUIET_S:
            await asyncio.sleep(0.1)
            quiet_s = quiet_s + 0.1 if self._host.fleet.quiet(engine) else 0.0
        if engine is not None:
            self._stop(engine)
        self._over.add(id)
        await self._say("instance.stopped", ReportStopped(id, 0.1))

    def _stop(self, engine: SimEngine) -> None:
        if engine.state not in ("dead", "stopped"):
            self._host.fleet.on_stop(engine)
            engine.die("stopped")
        self._host.engines.pop(engine.instance, None)

    async def _say(self, verb: str, body: object) -> Answer:
        return await tell(self.process, self._bus, "worker", verb, body, self.process.id(f"{verb}-"))


# --- gateways ----------------------------------------------------------------------------------------------------


class Flight:
    """One client's request, to its last byte."""

    __slots__ = (
        "began",
        "choice",
        "done",
        "duration_s",
        "engine",
        "gateway",
        "hit",
        "model",
        "number",
        "streaming",
        "timer",
        "tried",
    )

    def __init__(self, gateway: SimGateway, model: str, duration_s: float, number: int) -> None:
        self.gateway = gateway
        self.model = model
        self.number = number
        self.duration_s = duration_s
        self.began = gateway.loop.time()
        self.choice: Choice = None  # type: ignore[assignment]  # set before anything reads it
        self.engine: SimEngine | None = None
        self.tried: list[Slot] = []
        #: The engine that it was last connected to.
        self.hit: SimEngine | None = None
        self.streaming = False
        self.done = False
        self.timer: asyncio.TimerHandle | None = None

    def begin(self, key: bytes) -> None:
        """Choose and send."""
        gateway = self.gateway
        chosen = gateway.manager.handle_request_routing(self.model, key, gateway.process.monotonic())
        if isinstance(chosen, NoRoute):
            self._fail(chosen.code)
        else:
            self._send(chosen)

    def broken(self) -> None:
        """The engine went away under it."""
        if self.done:
            return
        if self.streaming:
            self._end()
            self._fail("stream_broken")
        else:
            self._elsewhere()

    def cut(self) -> None:
        """Its version's time to drain is up."""
        self.gateway.fleet.counts["ended"] += 1
        self._end(cut=True)

    def drop(self) -> None:
        """The gateway died."""
        self.done = True
        self._leave_engine()

    def _send(self, choice: Choice) -> None:
        gateway = self.gateway
        self.choice = choice
        gateway.tracker.begin(self)
        gateway.fleet.on_sent(gateway, choice)
        self.timer = gateway.loop.call_later(0.001, self._connect)

    def _connect(self) -> None:
        gateway = self.gateway
        if self.done:
            return
        engine = gateway.fleet.engines.get(self.choice.address)
        if engine is None or engine.state in ("dead", "stopped", "loading"):
            gateway.manager.connection_failed(self.choice, gateway.process.monotonic())
            self._elsewhere()
            return
        self.engine = self.hit = engine
        engine.flights.add(self)
        self.timer = gateway.loop.call_later(FIRST_BYTE_S if engine.state == "hung" else 0.005, self._first_byte)

    def _first_byte(self) -> None:
        if self.done or self.engine is None:
            return
        gateway = self.gateway
        if self.engine.state == "hung":
            gateway.manager.connection_failed(self.choice, gateway.process.monotonic())
            self._elsewhere()
            return
        self.streaming = True
        gateway.manager.connection_worked(self.choice)
        self.timer = gateway.loop.call_later(self.duration_s, self._last_byte)

    def _last_byte(self) -> None:
        if self.done or self.engine is None:
            return
        if self.engine.state == "hung":  # silence in the middle of a stream
            self._end()
            self._fail("stream_broken")
            return
        self._end()
        self.gateway.fleet.counts["answered"] += 1

    def _elsewhere(self) -> None:
        """Nothing was sent to the client yet: another instance may take it."""
        gateway = self.gateway
        self.tried.append(self.choice.slot)
        other = gateway.manager.reroute(self.model, self.choice, self.tried, gateway.process.monotonic())
        self._end()
        if other is None:
            self._fail("no_instance_left")
            return
        gateway.fleet.counts["rerouted"] += 1
        self.done = False
        self._send(other)

    def _leave_engine(self) -> None:
        if self.engine is not None:
            self.engine.flights.discard(self)
            self.engine = None

    def _end(self, *, cut: bool = False) -> None:
        self.done, self.streaming = True, False
        self._leave_engine()
        if self.timer is not None:
            self.timer.cancel()
        drained = self.gateway.manager.request_ended(self, cut)
        if drained is not None:
            self.gateway.drained(drained)

    def _fail(self, code: str) -> None:
        self.done = True
        self.gateway.fleet.on_failed(self.gateway, self, code)


class SimGateway:
    """A gateway process: the real routing, and an agent by the contract of the real one."""

    def __init__(self, process: Process, fleet: Fleet, bus: Bus, beats: Beats, reader: ViewReader) -> None:
        self.process = process
        self.id = process.name
        self.fleet = fleet
        self.loop = process.net.loop
        self.tracker = RequestTracker()
        self.manager = TransitionManager(self.tracker, process.jitter())
        self.serving = False
        self.connected: frozenset[str] = frozenset()
        self._bus = bus
        self._beats = beats
        self._reader = reader
        self._sequence = 0
        self._lost = False
        self._moved = asyncio.Event()
        self._reports: asyncio.Queue[tuple[str, object]] = asyncio.Queue()
        self._early: dict[str, RouteView] = {}
        process.ended = self._died
        fleet.gateways.append(self)

    # agent

    async def run(self) -> None:
        joined = await self._join()
        await self._reader.watch(("route.*", subjects.view_key("gateway", self.id)), self._changed)
        self.process.spawn(self._beat())
        self.process.spawn(self._report())
        while self._sequence < joined:
            await self._wait()
        self.serving = True
        for view in self._early.values():
            self._apply(view)
        while True:
            await self._wait()
            if self._lost:
                self._lost = False
                await self._join()

    async def leave(self) -> None:
        """Stop in order: no new request, the running ones to their end, then say so."""
        self.serving = False
        while self.tracker.in_flight():
            await asyncio.sleep(0.1)
        await self._tell("gateway.leave", LeaveGateway(self.id))
        self.process.crash()

    async def _join(self) -> int:
        answer = await self._tell("gateway.join", JoinGateway(self.id, f"http://{self.id}"))
        assert isinstance(answer, Accepted), answer
        return answer.sequence

    async def _beat(self) -> None:
        while True:
            await self._beats.publish("gateway", self.id, b"{}")
            await asyncio.sleep(BEAT_S)

    async def _report(self) -> None:
        while True:
            verb, body = await self._reports.get()
            await self._tell(verb, body)

    async def _tell(self, verb: str, body: object) -> Answer:
        return await tell(self.process, self._bus, "gw", verb, body, self.process.id(f"{verb}-"))

    async def _wait(self) -> None:
        await self._moved.wait()
        self._moved.clear()

    def _changed(self, entries: Mapping[str, ViewEntry], sequence: int) -> None:
        self._sequence = max(self._sequence, sequence)
        for key, entry in entries.items():
            kind, _ = subjects.parse_view_key(key)
            if not entry.value:
                continue
            if kind == "gateway":
                self._lost = msgspec.json.decode(entry.value, type=GatewayView).state == "lost"
            else:
                view = msgspec.json.decode(entry.value, type=RouteView)
                if self.serving:
                    self._apply(view)
                else:
                    self._early[view.model] = view
        self._moved.set()

    # data plane

    def _apply(self, view: RouteView) -> None:
        before = self.manager.applied().get(view.model, 0)
        transition = self.manager.begin_transition(view, self.process.monotonic())
        if transition is None:
            return
        self.fleet.net.trace("applied", self.id, view.model, view.revision)
        if self.fleet.holds:
            self.connected = self.manager.addresses()
        self.fleet.on_applied(self, view, before)
        if view.revision:
            self._reports.put_nowait(("gateway.applied", ReportApplied(self.id, view.model, view.revision)))
        for drained in transition.drained:
            self.drained(drained)
        if transition.draining:
            self.loop.call_later(view.drain_s + 0.001, self._sweep)

    def drained(self, drained: Drained) -> None:
        """To be acknowledged."""
        report = ReportDrained(self.id, drained.model, drained.version, drained.revision, drained.ended)
        self._reports.put_nowait(("gateway.drained", report))

    def request(self, model: str, duration_s: float, key: bytes = b"") -> None:
        """A client's request."""
        self.fleet.counts["requests"] += 1
        Flight(self, model, duration_s, self.fleet.counts["requests"]).begin(key)

    def _sweep(self) -> None:
        if self.process.alive:
            for flight in sorted(self.manager.overdue(self.process.monotonic()), key=lambda f: f.number):  # type: ignore[attr-defined]  # all are Flights
                flight.cut()  # type: ignore[attr-defined]  # all are Flights

    def _died(self) -> None:
        self.serving = False
        for flight in tuple(self.tracker.running()):
            flight.drop()  # type: ignore[attr-defined]  # all are Flights
