"""The simulated fleet: engines for the real InferenceWorker, and gateways that send clients' requests to them.

A gateway is the real agent, TransitionManager and RequestTracker; only its connections are simulated.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import msgspec
from tests.sim.network import SimHealth, SimNews

from turnout.core.decider import Failed
from turnout.core.fit import fit
from turnout.core.memory import FAKE_BYTES
from turnout.core.rules import Facts
from turnout.events.health import ERRORS, OUTCOMES, HealthSampled
from turnout.events.store import Unavailable
from turnout.events.worker import KeptEngine
from turnout.workers.gateway.agent import GatewayAgent
from turnout.workers.gateway.holding import Holding
from turnout.workers.gateway.transition import Choice, NoRoute, RequestTracker, Slot, TransitionManager
from turnout.workers.inference.runner import Failure, Found, HostMemory, Loaded, Order, Slept, Usage
from turnout.workers.ports import ModelUse, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.sim.network import Network, Process

    from turnout.core.decider import Answer
    from turnout.events.health import HealthEvent
    from turnout.events.model import EngineSpec
    from turnout.projections.routing import RouteView
    from turnout.workers.gateway.errors import Refusal
    from turnout.workers.gateway.plane import DataPlane
    from turnout.workers.gateway.transition import Drained, Transition
    from turnout.workers.inference.runner import Keeper
    from turnout.workers.ports import Beats, Bus, ViewReader

#: A request of which rules can't tell anything.
NOTHING_SAID = Facts()

#: An engine must have been without a connection for this long before its worker stops it.
QUIET_S = 0.3
#: How long a gateway waits for a first byte, and a worker for a sign of life from an engine.
FIRST_BYTE_S = 1.5
HANG_S = 3.0
#: To put weights into a spare, and to end one; and the share of spares that turn out not to fit after all.
FILL_S, END_S = 0.3, 0.1
UNFIT = 0.2
#: What falling asleep and waking take.
SLEEP_S = 0.3
WAKE_S = 0.2


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
    """One engine process.

    ``state``: loading, up, turning (it falls asleep or wakes), asleep, hung, dead (it crashed or was killed) or stopped
    (as asked).
    """

    def __init__(self, host: Host, order: Order) -> None:
        self.host = host
        self.instance = order.instance
        self.model = order.model
        self.version = order.version
        self.spec = order.engine
        self.sequence = order.sequence
        self.address = f"unix:/run/{order.instance}" + (f"-{len(host.fleet.engines)}" if host.fleet.fresh else "")
        self.state = "loading"
        self.started_at = host.net.loop.time()
        self.up_at = self.started_at + setting(order.engine, "load-s", 0.2)
        self.load_s = 0.0
        self.sleeps = setting(order.engine, "sleeps", 0) > 0
        self.wake_fails = setting(order.engine, "wake-fails", 0) > 0
        #: Level of its sleep, which of its sleeps it is, and how often somebody tried to wake it from that one.
        self.level = self.slept = self.wakes = 0
        #: Share of its answers that are errors, though its probe is fine.
        self.errors = setting(order.engine, "errors", 0.0)
        self.proven = False
        #: Its worker lets nobody connect any more.
        self.shut = False
        #: Fault injection has crashed or hung it.
        self.faulted = False
        self.flights: set[Flight] = set()

    @property
    def bytes(self) -> int:
        """Host memory that it holds: awake, all; asleep, a half at level 1, next to nothing at level 2."""
        weights = int(setting(self.spec, "memory", 0)) << 20
        return FAKE_BYTES + (weights if self.state != "asleep" else weights // 2 if self.level == 1 else 0)

    @property
    def lives(self) -> bool:
        """Its process is there."""
        return self.state not in ("dead", "stopped")

    def move(self) -> None:
        """It is reached at an address that nobody has heard yet."""
        fleet = self.host.fleet
        del fleet.engines[self.address]
        self.address = f"unix:/run/{self.instance}-sleep-{self.slept}-{len(fleet.engines)}"
        fleet.engines[self.address] = self

    def die(self, state: str = "dead") -> None:
        """Its process is gone."""
        if not self.lives:
            return
        self.host.net.trace("engine", state, self.instance, self.model, self.version)
        self.state = state
        self.host.moved()
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
        #: What engines may hold together; 0 for no bound.
        self.memory_bytes = 0
        #: Engines without a version, by name, with the instance that each was of; and how many may be kept.
        self.spares: dict[str, tuple[SimEngine, str]] = {}
        self.spares_most = 0
        #: Called when an engine changes by itself.
        self.moved: Callable[[], None] = lambda: None


class Fleet:
    """Everything that serves, and the hooks of whoever checks it."""

    def __init__(self, net: Network, *, holds: bool = True, fresh: bool = True) -> None:
        self.net = net
        #: An engine that is started again gets another address: what was said of the one before is not said of it.
        self.fresh = fresh
        #: Gateways keep a connection open to each engine that their route names.
        self.holds = holds
        self.engines: dict[str, SimEngine] = {}
        self.gateways: list[SimPlane] = []
        self.counts = {
            "requests": 0,
            "ruled": 0,
            "answered": 0,
            "excused": 0,
            "rerouted": 0,
            "ended": 0,
            "errors": 0,
            "held": 0,
            "slept": 0,
            "woken": 0,
            "not_woken": 0,
            "kept": 0,
            "filled": 0,
            "given_up": 0,
        }
        self.on_stop: Callable[[SimEngine], None] = lambda _: None
        #: Before it is put to sleep, before it is woken, and when it takes memory: it starts, or begins to wake.
        self.on_sleep: Callable[[SimEngine], None] = lambda _: None
        self.on_wake: Callable[[SimEngine], None] = lambda _: None
        self.on_grown: Callable[[SimEngine], None] = lambda _: None
        self.on_sent: Callable[[SimPlane, Choice], None] = lambda gateway, choice: None
        self.on_failed: Callable[[SimPlane, Flight, str], None] = lambda gateway, flight, code: None
        #: After a choice: gateway, model that the client named, its facts, the choice.
        self.on_chosen: Callable[[SimPlane, str, Facts, Choice | NoRoute], None] = (
            lambda gateway, model, facts, choice: None
        )
        self.on_applied: Callable[[SimPlane, RouteView, int], None] = lambda gateway, view, before: None

    def quiet(self, engine: SimEngine) -> bool:
        """What the kernel of the engine's host would say: no open connection."""
        return not engine.flights and not any(engine.address in g.connected for g in self.gateways if g.process.alive)


# --- workers -----------------------------------------------------------------------------------------------------


class SimRunner:
    """The engines of one host, as the real worker's :class:`~turnout.workers.inference.runner.EngineRunner`."""

    kinds = ("fake",)

    def __init__(self, process: Process, host: Host) -> None:
        self._process = process
        self._host = host
        self._changed = asyncio.Event()
        self._asked = ""  # the spare that it would like to start
        #: Who is told of the spares.
        self.keeper: Keeper | None = None

    @property
    def memory(self) -> HostMemory:
        """What all engines together may use of the host."""
        return HostMemory(self._host.memory_bytes)

    async def usage(self, instance: str) -> Usage | None:
        """What a running engine holds now."""
        engine = self._host.engines.get(instance)
        return None if engine is None else Usage(engine.bytes)

    async def found(self) -> dict[str, Found]:
        """Take over what runs, also what sleeps; end what was falling asleep or waking."""
        self._host.moved = self._changed.set
        found: dict[str, Found] = {}
        for id, engine in sorted(self._host.engines.items()):
            if engine.state == "turning":
                engine.die()
                del self._host.engines[id]
                continue
            slept = None
            if engine.state == "asleep":
                slept = Slept(engine.level, 0.0, engine.bytes, number=engine.slept)
            found[id] = Found(engine.sequence, self._loaded(engine), slept)
        return found

    async def load(self, order: Order, progress: Callable[[str, str], None]) -> Loaded | Failure:
        """Start or go on, then prove."""
        engine, tier = self._host.engines.get(order.instance), "cold"
        if engine is None:
            filled = await self._take_spare(order)
            engine = self._host.engines[order.instance] = SimEngine(self._host, order)
            if filled:
                engine.up_at, tier = engine.started_at + FILL_S, "spare"
            self._host.fleet.engines[engine.address] = engine
            self._host.fleet.on_grown(engine)
        progress("starting", "")
        loop = self._host.net.loop
        await self._until(lambda: engine.state != "loading" or loop.time() >= engine.up_at, engine.up_at - loop.time())
        fails = setting(engine.spec, "fails", 0)
        if engine.state == "loading":
            engine.state = "up"
        progress("proving", "")
        await asyncio.sleep(0.02)
        if fails or engine.state != "up":
            engine.die()
            self._host.engines.pop(engine.instance, None)
            return Failure("loading" if fails == 1 else "proving", "the weights are damaged", ("engine's last words",))
        engine.proven = True
        engine.load_s = round(loop.time() - engine.started_at, 3)
        loaded = self._loaded(engine)
        if loaded is None:
            return Failure("proving", "not proven")
        self._process.spawn(self._start_ahead(order))
        return msgspec.structs.replace(loaded, tier=tier)

    async def _take_spare(self, order: Order) -> bool:
        """Whether a spare's process becomes the instance's; one that it was admitted into ends, where it does not."""
        spares, fleet = self._host.spares, self._host.fleet
        wanted = fit(order.engine, None)
        fitting = [name for name, (one, _) in sorted(spares.items()) if fit(one.spec, None) == wanted]
        name = order.into if order.into in fitting else next(iter(fitting), "")
        filled = bool(name) and self._process.jitter() > UNFIT
        if not filled and order.into in spares:
            await asyncio.sleep(END_S)
        gone = name if filled else order.into
        if spares.pop(gone, None) is not None:
            fleet.counts["filled" if filled else "given_up"] += 1
            self._tell()
        return filled

    async def _start_ahead(self, order: Order) -> None:
        """Start another one like it, where somebody who knows of all memory allows it."""
        host, name = self._host, f"spare-{order.instance}-ahead"
        if len(host.spares) >= host.spares_most or self._asked or self.keeper is None:
            return
        one = SimEngine(host, msgspec.structs.replace(order, instance=name))
        one.state = "up"
        self._asked = name
        try:
            refused = await self.keeper.may_start(self._kept(name, one, ""))
            if not refused and self._asked and len(host.spares) < host.spares_most:
                self._keep(name, one, "")
        finally:
            self._asked = ""
            self._tell()

    def _keep(self, name: str, one: SimEngine, was: str) -> None:
        self._host.spares[name] = (one, was)
        self._host.fleet.counts["kept"] += 1
        self._host.fleet.on_grown(one)

    @staticmethod
    def _kept(name: str, one: SimEngine, was: str) -> KeptEngine:
        return KeptEngine(name, "spare", fit(one.spec, None), f"{one.model} {one.version}", one.bytes, instance=was)

    def _tell(self) -> None:
        if self.keeper is not None:
            self.keeper.changed()

    async def watch(self, instance: str) -> Failure:
        """Until it has died or hangs."""
        engine = self._host.engines.get(instance)
        while engine is not None and engine.state == "up":
            await self._until(lambda: engine.state != "up", None)
        if engine is not None:
            if engine.state == "hung":
                await asyncio.sleep(HANG_S)
            engine.die()
        self._host.engines.pop(instance, None)
        return Failure("serving", "it exited")

    async def wait_quiet(self, instance: str, busy: Callable[[str], None]) -> Failure | None:
        """Until it had no connection for a while; then its door is shut."""
        engine = self._host.engines.get(instance)
        quiet_s = 0.0
        while engine is not None and quiet_s < QUIET_S:
            if engine.state in ("hung", "dead"):
                engine.die()
                self._host.engines.pop(instance, None)
                return Failure("serving", "it died while it drained")
            if self._host.fleet.quiet(engine):
                quiet_s += 0.1
            else:
                quiet_s = 0.0
                busy("a connection")
            if quiet_s < QUIET_S:
                await asyncio.sleep(0.1)
        if engine is not None:
            engine.shut = True
        return None

    async def stop(self, instance: str) -> None:
        """End it."""
        if not self._process.alive:
            return
        engine = self._host.engines.pop(instance, None)
        if engine is None or not engine.lives:
            return
        self._host.fleet.on_stop(engine)
        quiet = engine.state == "up" and engine.shut and engine.proven
        engine.die("stopped")
        if quiet and len(self._host.spares) < self._host.spares_most:
            spare = SimEngine(self._host, Order(instance, engine.model, engine.version, engine.spec))
            spare.state = "up"
            self._keep(f"spare-{instance}", spare, instance)
            if self.keeper is not None:
                await self.keeper.told()

    async def prove(self, instance: str) -> str:
        """Ask a running engine once more."""
        await asyncio.sleep(0.02)
        engine = self._host.engines.get(instance)
        return "" if engine is not None and engine.state == "up" else "no answer"

    async def sleep(self, order: Order, level: int) -> Slept | Failure:
        """It frees what it can, at an address that no gateway knows."""
        engine = self._host.engines.get(order.instance)
        if engine is None or engine.state != "up" or not engine.shut or not engine.sleeps:
            return self._lost(order.instance, "sleeping", "it can't be put to sleep")
        self._host.fleet.on_sleep(engine)
        engine.state, engine.proven, engine.slept, engine.wakes = "turning", False, order.slept, 0
        engine.move()
        await self._until(lambda: engine.state != "turning", SLEEP_S)
        if engine.state != "turning":
            return self._lost(order.instance, "sleeping", "it died as it fell asleep")
        engine.state, engine.level = "asleep", level
        self._host.fleet.counts["slept"] += 1
        return Slept(level, SLEEP_S, engine.bytes, number=engine.slept)

    async def slumber(self, instance: str) -> Failure:
        """Until it has died."""
        engine = self._host.engines.get(instance)
        await self._until(lambda: engine is None or engine.state != "asleep", None)
        return self._lost(instance, "sleeping", "it died while it slept")

    async def wake(self, order: Order) -> Loaded | Failure:
        """It takes back what it needs, or dies."""
        engine = self._host.engines.get(order.instance)
        if engine is None or engine.state != "asleep":
            return self._lost(order.instance, "waking", "it died while it slept")
        fleet = self._host.fleet
        engine.wakes += 1
        fleet.on_wake(engine)
        engine.state = "turning"
        fleet.on_grown(engine)
        await self._until(lambda: engine.state != "turning", WAKE_S)
        if engine.wake_fails or engine.state != "turning":
            fleet.counts["not_woken"] += 1
            return self._lost(order.instance, "waking", "it is not what it was")
        engine.state, engine.proven, engine.shut = "up", True, False
        fleet.counts["woken"] += 1
        return Loaded(engine.address, WAKE_S, 0.02, engine.bytes, tier="wake", sleeps=True, slept=engine.slept)

    def _lost(self, instance: str, stage: str, why: str) -> Failure:
        """What is left of it is gone then."""
        engine = self._host.engines.pop(instance, None)
        if engine is not None:
            engine.die()
        return Failure(stage, why)

    def remains(self, instance: str) -> Failure:
        """What is known of one that is not there."""
        return Failure("serving", "its process is gone")

    def trouble(self, instance: str) -> str:
        """Nothing is known."""
        return ""

    @property
    def kept(self) -> tuple[KeptEngine, ...]:
        """The spares."""
        found = (self._kept(name, one, was) for name, (one, was) in self._host.spares.items())
        return tuple(sorted(found, key=lambda engine: engine.name))

    async def measure_kept(self) -> None:
        """They hold what they held."""

    async def release_spare(self, name: str) -> None:
        """It ends, and takes a moment for that."""
        await asyncio.sleep(END_S)
        if self._asked == name:
            self._asked = ""
        if self._host.spares.pop(name, None) is not None:
            self._host.fleet.counts["given_up"] += 1
        self._tell()

    async def end_spares(self) -> None:
        """No worker stops with its engines here."""

    def release(self) -> None:
        """They run on."""

    def _loaded(self, engine: SimEngine) -> Loaded | None:
        if not engine.proven:
            return None
        tier = "wake" if engine.slept else "cold"
        return Loaded(
            engine.address, engine.load_s, 0.02, engine.bytes, tier=tier, sleeps=engine.sleeps, slept=engine.slept
        )

    async def _until(self, condition: Callable[[], bool], timeout_s: float | None) -> None:
        """Wait for a change of the host's engines, or for the time."""
        try:
            async with asyncio.timeout(None if timeout_s is None else max(0.0, timeout_s)):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass


# --- gateways ----------------------------------------------------------------------------------------------------


class Collector:
    """What a simulated gateway measures, as the real one does: windows by version and revision, users as units."""

    def __init__(self, plane: SimPlane) -> None:
        self._plane = plane
        self._windows: dict[tuple[str, str, int], dict[str, int]] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        self._seen: set[tuple[str, int, bytes]] = set()
        self._bad: set[tuple[str, int, bytes]] = set()

    def began(self, flight: Flight) -> None:
        """The split has assigned it."""
        choice, key = flight.first, flight.key
        window = self._window(flight)
        if not flight.split:
            return
        if not key or (choice.model, choice.revision, key) not in self._seen:
            self._seen.add((choice.model, choice.revision, key))
            window["assigned"] = window.get("assigned", 0) + 1

    def ended(self, flight: Flight, outcome: str) -> None:
        """It is over; what went wrong is charged to the version that it was assigned to first."""
        choice, key = flight.first, flight.key
        window = self._window(flight)
        window[outcome] = window.get(outcome, 0) + 1
        window["run"] = window.get("run", 0) + 1 if outcome == "refused" else 0
        if outcome in ERRORS and flight.split and (not key or (choice.model, choice.revision, key) not in self._bad):
            self._bad.add((choice.model, choice.revision, key))
            window["unit_errors"] = window.get("unit_errors", 0) + 1

    async def run(self) -> None:
        """Report what has been counted, again and again."""
        while True:
            await asyncio.sleep(0.25)
            windows, self._windows = self._windows, {}
            now = self._plane.process.now()
            for (model, version, revision), counts in windows.items():
                number = self._numbers[model, version] = self._numbers.get((model, version), 0) + 1
                outcomes = {name: count for name, count in counts.items() if name in OUTCOMES}
                sample = HealthSampled(
                    gateway=self._plane.id,
                    model=model,
                    version=version,
                    window=number,
                    revision=revision,
                    share=self._plane.shares.get((model, version, revision), 1.0),
                    started=now - timedelta(seconds=0.25),
                    ended=now,
                    requests=sum(outcomes.values()),
                    outcomes=outcomes,
                    assigned=counts.get("assigned", 0),
                    unit_errors=counts.get("unit_errors", 0),
                    run=counts.get("run", 0),
                )
                self._plane.report_sample(sample)

    def _window(self, flight: Flight) -> dict[str, int]:
        choice = flight.first
        return self._windows.setdefault((choice.model, choice.version, choice.revision), {})


class Flight:
    """One client's request, to its last byte."""

    __slots__ = (
        "began",
        "choice",
        "done",
        "duration_s",
        "engine",
        "facts",
        "first",
        "gateway",
        "hit",
        "key",
        "model",
        "number",
        "split",
        "streaming",
        "timer",
        "tried",
        "wanted",
    )

    def __init__(self, gateway: SimPlane, model: str, duration_s: float, number: int) -> None:
        self.gateway = gateway
        self.model = model
        #: The model whose instance it waits for: its own, or one that a rule has sent it to.
        self.wanted = model
        self.number = number
        self.duration_s = duration_s
        self.began = gateway.loop.time()
        self.choice: Choice = None  # type: ignore[assignment]  # set before anything reads it
        #: Where the split sent it, whoever answers in the end.
        self.first: Choice = None  # type: ignore[assignment]  # set before anything reads it
        #: Whether the split chose, and no rule; what a rule chose is counted, and compared with nothing.
        self.split = True
        self.key = b""
        self.facts: Facts = Facts()
        self.engine: SimEngine | None = None
        self.tried: list[Slot] = []
        #: The engine that it was last connected to.
        self.hit: SimEngine | None = None
        self.streaming = False
        self.done = False
        self.timer: asyncio.TimerHandle | None = None

    def begin(self, key: bytes, facts: Facts) -> None:
        """Choose and send, or wait."""
        gateway, self.key, self.facts = self.gateway, key, facts
        manager, now = gateway.manager, gateway.process.monotonic()
        if self.model in manager.ruled:
            chosen, self.split = manager.handle_ruled_request(self.model, facts, key, now)
        else:
            chosen = manager.handle_request_routing(self.model, key, now)
        gateway.fleet.on_chosen(gateway, self.model, facts, chosen)
        if isinstance(chosen, NoRoute):
            self.wanted = chosen.model or self.model
            if gateway.holding.waits(self.wanted):
                refusal = gateway.holding.wait(self.wanted, self, gateway.process.monotonic())
                gateway.fleet.counts["held"] += 1
                if refusal is not None:
                    self.give_up(refusal)
            else:
                self._fail(chosen.code)
        else:
            self.first, self.key, self.model = chosen, key, chosen.model
            gateway.collector.began(self)
            self._send(chosen)

    # Holding's waiter

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return 100

    def go_on(self) -> None:
        """Its model has an instance."""
        self.gateway.holding.leave(self.wanted, self, self.gateway.process.monotonic())
        self.begin(self.key, self.facts)

    def give_up(self, refusal: Refusal) -> None:
        """It has waited in vain."""
        self.gateway.holding.leave(self.wanted, self, self.gateway.process.monotonic())
        self._fail(refusal.code)

    def still_waits(self, seconds: float) -> None:
        """Nobody listens."""

    def broken(self) -> None:
        """The engine went away under it."""
        if self.done:
            return
        if self.streaming:
            self._end()
            self._fail("stream_broken", "cut")
        else:
            self._elsewhere("refused")

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
        if engine is None or engine.shut or engine.state not in ("up", "hung"):
            gateway.manager.connection_failed(self.choice, gateway.process.monotonic())
            self._elsewhere("refused")
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
            self._elsewhere("timeout")
            return
        self.streaming = True
        gateway.manager.connection_worked(self.choice)
        self.timer = gateway.loop.call_later(self.duration_s, self._last_byte)

    def _last_byte(self) -> None:
        if self.done or self.engine is None:
            return
        if self.engine.state == "hung":  # silence in the middle of a stream
            self._end()
            self._fail("stream_broken", "timeout")
            return
        self._end()
        if self.engine_errs():
            self.gateway.collector.ended(self, "http_error")
            self.gateway.fleet.counts["errors"] += 1
            return
        if self.choice.version == self.first.version:
            self.gateway.collector.ended(self, "ok")
        self.gateway.fleet.counts["answered"] += 1

    def engine_errs(self) -> bool:
        """Whether the engine that had it answers with an error this time."""
        return self.hit is not None and self.gateway.fleet.net.chance(self.hit.errors)

    def _elsewhere(self, outcome: str) -> None:
        """Nothing was sent to the client yet: another instance may take it."""
        gateway = self.gateway
        if not self.tried:
            gateway.collector.ended(self, outcome)
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
        self.gateway.used[self.model] = self.gateway.process.monotonic()
        drained = self.gateway.manager.request_ended(self, cut)
        if drained is not None:
            self.gateway.drained(drained)

    def _fail(self, code: str, outcome: str = "") -> None:
        self.done = True
        if outcome:
            self.gateway.collector.ended(self, outcome)
        self.gateway.fleet.on_failed(self.gateway, self, code)


class SimPlane:
    """The data plane of one gateway, as its agent knows it: the real routing over simulated connections."""

    def __init__(self, process: Process, fleet: Fleet) -> None:
        self.process = process
        self.fleet = fleet
        self.loop = process.net.loop
        self.tracker = RequestTracker()
        self.manager = TransitionManager(self.tracker, process.jitter())
        self.context = self  # the agent reads manager and tracker from it
        self.connections: set[object] = set()
        self.gateway = self.id = process.name
        self.control_plane: Callable[[], str] = str
        self.serving = False
        #: It has closed its door and its connections; what its routes say does not matter any more.
        self.stopped = False
        #: Engines to which a connection stays open: no request is needed for the engine's worker to see it.
        self.connected: frozenset[str] = frozenset()
        self.drained: Callable[[Drained], None] = lambda _: None
        self.holding = Holding(2**20)
        #: Model → when its newest request ended here, or its newest route was applied.
        self.used: dict[str, float] = {}
        self.collector = Collector(self)
        self.report_sample: Callable[[HealthEvent], None] = lambda _: None
        #: (model, version, revision) → probability of being assigned to it.
        self.shares: dict[tuple[str, str, int], float] = {}
        process.ended = self._died
        process.spawn(self._sweep_held())
        fleet.gateways.append(self)

    def bind(self) -> str:
        """Take an address."""
        return f"http://{self.id}"

    async def listen(self) -> None:
        """Take requests."""
        self.serving = True

    async def stop(self) -> int:
        """Take no more requests and let the running ones end."""
        self.serving = False
        while self.tracker.in_flight() or any(count for _, count in self.holding.counts()):  # noqa: ASYNC110  simulated time costs nothing
            await asyncio.sleep(0.1)
        self.connected = frozenset()
        self.stopped = True
        return 0

    def in_flight(self) -> dict[str, dict[str, int]]:
        """Model → version → requests in flight."""
        return self.tracker.by_version()

    def on_drained(self, report: Callable[[Drained], None]) -> None:
        """Whom to tell that a version's last request has ended."""
        self.drained = report

    def on_waiting(self, ask: Callable[[str, int], None]) -> None:
        """Whom to ask for a model that is loaded on demand."""
        self.holding.ask = ask

    def refuse_waiting(self, model: str, reason: str) -> None:
        """Nobody will load the model."""
        self.holding.refuse(model, reason)

    def uses(self) -> dict[str, ModelUse]:
        """What this gateway does with the models that are loaded on demand."""
        now, held = self.process.monotonic(), dict(self.holding.counts())
        uses: dict[str, ModelUse] = {}
        for model in self.holding.on_demand():
            in_flight = self.tracker.in_flight(model)
            idle_s = 0.0 if in_flight else now - self.used.get(model, now)
            uses[model] = ModelUse(in_flight, held.get(model, 0), idle_s, self.manager.applied().get(model, 0))
        return uses

    def on_sampled(self, report: Callable[[HealthEvent], None]) -> None:
        """Whom to give the health samples."""
        self.report_sample = report

    def apply(self, route: RouteView) -> Transition | None:
        """Route by a revision from the next request on."""
        before = self.manager.applied().get(route.model, 0)
        transition = self.manager.begin_transition(route, self.process.monotonic())
        if transition is None:
            return None
        self.fleet.net.trace("applied", self.id, route.model, route.revision)
        for split in route.splits:
            self.shares[route.model, split.version, route.revision] = split.weight / 100
        if self.fleet.holds and not self.stopped:
            self.connected = self.manager.addresses()
        self.fleet.on_applied(self, route, before)
        self.used[route.model] = self.process.monotonic()
        self.holding.applied(route)
        if transition.draining:
            self.loop.call_later(route.drain_s + 0.001, self._sweep)
        return transition

    async def reach(self, model: str) -> None:
        """Returns once its engines take connections, or after a second."""
        revision, engines = self.manager.applied().get(model), self.fleet.engines
        for _ in range(20):
            reached = (
                any((engine := engines.get(address)) is not None and engine.state in ("up", "hung") for address in some)
                for some in self.manager.leads_to(model)
            )
            if self.manager.applied().get(model) != revision or all(reached):
                return
            await asyncio.sleep(0.05)

    def request(self, model: str, duration_s: float, key: bytes = b"", facts: Facts = NOTHING_SAID) -> None:
        """A client's request; ``facts``: what rules may ask of it."""
        self.fleet.counts["requests"] += 1
        Flight(self, model, duration_s, self.fleet.counts["requests"]).begin(key, facts)

    def flights(self) -> list[Flight]:
        """What is in flight, oldest first."""
        return sorted((f for f in self.tracker.running() if isinstance(f, Flight)), key=lambda f: f.number)

    def _sweep(self) -> None:
        if self.process.alive:
            overdue = self.manager.overdue(self.process.monotonic())
            for flight in [f for f in self.flights() if f in overdue]:
                flight.cut()

    async def _sweep_held(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self.holding.sweep(self.process.monotonic())

    def _died(self) -> None:
        self.serving = False
        self.holding = Holding(0)
        for flight in self.flights():
            flight.drop()


class SimGateway:
    """A gateway process: the real agent over a simulated data plane."""

    def __init__(self, process: Process, fleet: Fleet, bus: Bus, beats: Beats, reader: ViewReader) -> None:
        self.process = process
        self.plane = SimPlane(process, fleet)
        process.spawn(self.plane.collector.run())
        data_plane = cast("DataPlane", self.plane)
        self.agent = GatewayAgent(
            process.name,
            data_plane,
            bus,
            beats,
            reader,
            SimNews(process),
            process,
            lambda: process.connected,
            SimHealth(process),
        )

    async def run(self) -> None:
        """Serve until told to stop, then end the process."""
        await self.agent.run(lambda _: None)
        self.process.crash()
