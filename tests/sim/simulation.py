"""One run: controllers, gateways, workers, clients and operators on a simulated network, all from one seed.

Scripted scenarios use :class:`Simulation` directly; :func:`run_seed` draws a random one.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251  seeded: a run is named by its seed
from typing import TYPE_CHECKING, Any

import msgspec
from tests.sim.fleet import Fleet, Host, SimGateway, SimRunner, tell
from tests.sim.invariants import Broken, Checker
from tests.sim.loop import VirtualLoop
from tests.sim.network import (
    Faults,
    Network,
    Process,
    SimBeats,
    SimBus,
    SimHealth,
    SimLease,
    SimNews,
    SimStore,
    SimViews,
)
from tests.sim.ruling import draw_facts, draw_rules

from turnout.core.config import CACHE, WARM, CacheConfig, ModelSwitchingConfig, Scheduled
from turnout.core.decider import Accepted, Answer, Rejected
from turnout.core.handling import (
    AdvanceSwitch,
    ContinueSwitch,
    Defaults,
    EvictVersion,
    HoldSwitch,
    PreloadVersion,
    RetrySwitch,
    StartSwitch,
    StopSwitch,
    UndoModel,
)
from turnout.core.judging.judgement import Decision
from turnout.core.model import DeregisterVersion, RegisterVersion, SetRules
from turnout.core.residence import PinVersion, SetReplicas, UnpinVersion
from turnout.events.model import EngineSpec
from turnout.workers.controller.controller import Controller
from turnout.workers.inference.settings import WorkerSettings
from turnout.workers.inference.worker import InferenceWorker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

#: Once the faults have stopped, everything must have come to rest after this long (the longest back-off is 60 s).
REST_S = 180.0


class Summary(msgspec.Struct):
    """What a run saw."""

    seed: int
    broken: list[str]
    seconds: float
    events: int
    digest: str
    outcomes: dict[str, int]
    counts: dict[str, int]


#: How long a person waits for placement to restore a source before deciding without it, seconds.
PATIENCE_S = 120.0


class Simulation:
    """Everything of one run. Start processes, do things, then ``rest``."""

    def __init__(
        self,
        seed: int = 0,
        *,
        controllers: int = 1,
        gateways: int = 2,
        workers: int = 2,
        capacity: int = 4,
        config: ModelSwitchingConfig | None = None,
        cache: CacheConfig = CACHE,
        memory_mib: int = 0,
        spares: int = 0,
        skew_s: float = 0.0,
        holds: bool = True,
        fresh: bool = True,
        trace: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.loop = VirtualLoop()
        self.net = Network(self.loop, self.rng, skew_s)
        if trace:
            self.net.traces = []
        self.fleet = Fleet(self.net, holds=holds, fresh=fresh)
        self.checker = Checker(self.net, self.fleet)
        self.world = self.checker.world
        self.config = config or ModelSwitchingConfig()
        self.cache = cache
        self.capacity = capacity
        self.controllers: dict[str, Controller] = {}
        self.processes: dict[str, Process] = {}
        self.workers: dict[str, InferenceWorker] = {}
        self.gateways: dict[str, SimGateway] = {}
        self.hosts = {f"w{n + 1}": Host(self.net, f"h{n + 1}", self.fleet) for n in range(workers)}
        for host in self.hosts.values():
            host.memory_bytes = memory_mib << 20
            host.spares_most = spares
        self.ops = Process(self.net, "ops", "ops")
        self._sizes = (controllers, gateways)
        self._generations: dict[str, int] = {}
        self._clients: list[asyncio.Task[Any]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self._sent = 0

    # processes

    def start(self) -> None:
        """Start every process."""
        controllers, gateways = self._sizes
        for n in range(controllers):
            self.start_controller(f"c{n + 1}")
        for name in self.hosts:
            self.start_worker(name)
        for n in range(gateways):
            self.start_gateway(f"g{n + 1}")

    async def ready(self) -> None:
        """Start every process and wait until all have joined."""
        self.start()
        await self.until(
            lambda: len(self.world.live_gateways) == len(self.gateways) and len(self.world.workers) == len(self.workers)
        )

    def start_controller(self, name: str) -> Process:
        """A new controller process."""
        process = self._process(name, "controller")
        views = SimViews(process)
        controller = Controller(
            process.name,
            store=SimStore(process),
            bus=SimBus(process),
            beats=SimBeats(process),
            reader=views,
            writer=views,
            news=SimNews(process),
            lease=SimLease(process),
            samples=SimHealth(process),
            clock=process,
            config=self.config,
            cache=self.cache,
            defaults=Defaults(bake_s=1.0, drain_s=8.0),
            poll_s=0.4,
        )
        self.controllers[name] = controller
        process.spawn(controller.run())
        return process

    def start_worker(self, name: str) -> Process:
        """A new worker process on its host, whose engines may still run."""
        process = self._process(name, "worker")
        runner = SimRunner(process, self.hosts[name])
        runner.keeper = worker = InferenceWorker(
            WorkerSettings(id=name, capacity=self.capacity),
            bus=SimBus(process),
            beats=SimBeats(process),
            views=SimViews(process),
            clock=process,
            runner=runner,
        )
        self.workers[name] = worker
        process.spawn(worker.run())
        return process

    def start_gateway(self, name: str) -> Process:
        """A new gateway process, with an id of its own."""
        process = self._process(name, "gateway")
        gateway = SimGateway(process, self.fleet, SimBus(process), SimBeats(process), SimViews(process))
        self.gateways[name] = gateway
        process.spawn(gateway.run())
        return process

    def restart(self, name: str) -> None:
        """Start a process again that has died."""
        if self.processes[name].alive:
            return
        kind = self.processes[name].kind
        {"controller": self.start_controller, "worker": self.start_worker, "gateway": self.start_gateway}[kind](name)

    def _process(self, name: str, kind: str) -> Process:
        generation = self._generations[name] = self._generations.get(name, 0) + 1
        process = self.processes[name] = Process(self.net, f"{name}.{generation}", kind)
        return process

    # commands

    async def command(self, verb: str, body: object, id: str = "") -> Answer:
        """Send a command as an operator until it is answered."""
        self._sent += 1
        return await tell(self.ops, SimBus(self.ops), "ops", verb, body, id or f"ops-{self._sent}")

    async def register(self, model: str, version: str, **flags: float) -> Answer:
        """Register a version of the fake engine: ``load_s`` seconds to load, ``fails`` 1 (loading) or 2 (proof)."""
        args = tuple(f"--{name.replace('_', '-')}={value}" for name, value in sorted(flags.items()))
        return await self.command("version.register", RegisterVersion(model, version, EngineSpec("fake", args=args)))

    async def switch(self, model: str, version: str, **fields: Any) -> Answer:
        """Ask for a switch."""
        return await self.command("switch.start", StartSwitch(model, version, **fields))

    async def serve(self, model: str, *versions: str, **fields: Any) -> None:
        """Register versions, switch to the first and wait until it serves."""
        for version in versions:
            await self.register(model, version)
        answer = await self.switch(model, versions[0], **fields)
        assert isinstance(answer, Accepted), answer
        await self.until(lambda: self.world.state("model", model).active == versions[0])

    async def until(self, condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        """Wait for a condition; look often enough to see each step."""
        end = self.loop.time() + timeout_s
        while not condition():
            if self.loop.time() > end:
                raise Broken(f"waited {timeout_s:g} s in vain")
            moved = self.loop.create_future()
            self.checker.watchers.append(moved)
            timer = self.loop.call_later(0.05, _wake, moved)
            await moved
            timer.cancel()

    async def pause(self, seconds: float) -> None:
        """Let simulated time pass."""
        await asyncio.sleep(seconds)

    async def together(self, *commands: Coroutine[Any, Any, Answer]) -> list[Answer]:
        """Send commands at the same time."""
        return await asyncio.gather(*commands)

    def clients(self, model: str, every_s: float = 0.2, longest_s: float = 2.0) -> None:
        """Keep a client busy on random gateways."""
        self._clients.append(self.loop.create_task(self._client(model, every_s, longest_s)))

    async def _client(self, model: str, every_s: float, longest_s: float) -> None:
        rng = self.rng
        while True:
            await asyncio.sleep(every_s * (0.5 + rng.random()))
            serving = [
                g.plane for g in self.gateways.values() if g.plane.serving and g.plane.manager.applied().get(model)
            ]
            if serving and self.world.state("model", model).active:
                key = b"" if rng.random() < 0.7 else b"user-%d" % rng.randrange(10)
                duration_s = rng.random() ** 2 * longest_s
                rng.choice(serving).request(model, duration_s, key, draw_facts(rng))

    # faults

    def wound(self, model: str, version: str) -> None:
        """From now on the version may have lost an engine to a fault."""
        self.checker.wounded.add((model, version))

    def crash_engine(self, instance: str, *, hang: bool = False) -> None:
        """An engine dies or hangs."""
        for host in self.hosts.values():
            engine = host.engines.get(instance)
            if engine is not None and engine.state in ("loading", "up", "turning", "asleep"):
                engine.faulted = True
                self.wound(engine.model, engine.version)
                if hang and engine.state in ("loading", "up"):
                    self.net.trace("engine hangs", instance)
                    engine.state = "hung"
                    host.moved()
                else:
                    engine.die()

    def crash_host(self, name: str) -> None:
        """A machine dies, with its worker and its engines."""
        self.processes[name].crash()
        host = self.hosts[name]
        host.moved = lambda: None
        for instance in sorted(host.engines):
            self.crash_engine(instance)
        host.engines.clear()
        host.spares.clear()

    # the end

    def heal(self) -> None:
        """The faults stop: everybody runs and hears everybody."""
        self.net.faults = Faults()
        self.net.down = self.net.full = self.net.stalled = False
        for name, process in sorted(self.processes.items()):
            process.cut = False
            self.restart(name)

    async def rest(self, timeout_s: float = REST_S) -> None:
        """Stop the faults, wait until nothing runs, and look at what is left."""
        self.heal()
        manager = self.loop.create_task(self._keep_alive())
        end = self.loop.time() + timeout_s
        since = self.loop.time()
        while self.loop.time() < end and self.loop.time() < since + 3.5:  # a duplicate may still be on its way
            await asyncio.sleep(0.2)
            await self._decide_what_is_held(patient=self.loop.time() < end - timeout_s + PATIENCE_S)
            if not self._at_rest():
                since = self.loop.time()
        for client in self._clients:
            client.cancel()
        await self._wait_a_while(lambda: not self.checker.unserved(), REST_S)
        self.checker.invariant_8_everything_serves_again()
        await self._wait_a_while(self._projected, 20.0)
        self.checker.invariant_7_every_switch_ends()
        self.checker.invariant_5_views_are_a_fold()
        manager.cancel()

    async def _keep_alive(self) -> None:
        """Start again what could not start: its store was away when it began."""
        while True:
            await asyncio.sleep(0.2)
            for name in sorted(self.processes):
                self.restart(name)

    async def _decide_what_is_held(self, *, patient: bool) -> None:
        """A switch that waits for a person gets one; where it can't go back yet, the person comes again.

        One whose bad target has the source's only room stands still with a critical alert: who is not ``patient`` any
        more ends the target.
        """
        for id in sorted(self.world.running):
            state = self.world.switches[id]
            if state.verdict == Decision.FAIL and not patient:
                for one in self.world.ready(state.model, state.target):
                    self.crash_engine(one.instance)
            if state.paused:
                answer = await self.command("switch.abort", StopSwitch(id, "nobody decided"))
                if isinstance(answer, Rejected) and answer.code == "source_not_ready":
                    await self.command("switch.promote", AdvanceSwitch(id, full=True, reason="nothing to go back to"))

    def _at_rest(self) -> bool:
        return not self.world.running and all(t.done() for t in self.tasks)

    def _projected(self) -> bool:
        """The leader has stored all views of the log's newest events."""
        leader = next((c for c in self.controllers.values() if c.leading.is_set()), None)
        if leader is None or leader.log.sequence != len(self.net.log.records):
            return False
        return self.net.bucket.values() == leader.log.views.everything()

    async def _wait_a_while(self, condition: Callable[[], object], timeout_s: float) -> None:
        """Wait for a condition, or not: what has not come by then is for a check to find."""
        try:
            await self.until(condition, timeout_s)
        except Broken:
            self.net.trace("waited in vain")

    def run(self, scenario: Coroutine[Any, Any, None]) -> None:
        """Run a scenario to its end.

        Raises:
            Broken: an invariant did not hold.
        """
        asyncio.set_event_loop(None)
        try:
            self.loop.run_until_complete(scenario)
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(_settle(self.loop))
            self.loop.close()
        if self.net.bugs:
            raise self.net.bugs[0]
        if self.checker.broken:
            raise Broken("\n".join(self.checker.broken))

    def summary(self, seed: int) -> Summary:
        """What the run saw."""
        outcomes: dict[str, int] = {}
        for switch in self.world.switches.values():
            outcomes[switch.phase] = outcomes.get(switch.phase, 0) + 1
        records = self.net.log.records
        return Summary(
            seed=seed,
            broken=self.checker.broken,
            seconds=round(self.loop.time(), 3),
            events=len(records),
            digest=records[-1].digest if records else "",
            outcomes=outcomes,
            counts=self.fleet.counts,
        )


def _wake(moved: asyncio.Future[None]) -> None:
    if not moved.done():
        moved.set_result(None)


async def _settle(loop: asyncio.AbstractEventLoop) -> None:
    """Let cancelled tasks end."""
    me = asyncio.current_task()
    for _ in range(20):
        rest = [t for t in asyncio.all_tasks(loop) if t is not me]
        if not rest:
            return
        for task in rest:
            task.cancel()
        await asyncio.sleep(0)


# --- a random run ------------------------------------------------------------------------------------------------


#: Of every third run: what may be loaded ahead is, at once.
SCHEDULE = tuple(Scheduled(model="chat", version=version, cron="* * * * *") for version in ("v2", "v3"))


def run_seed(seed: int, *, trace: bool = False) -> Simulation:
    """Draw a scenario from the seed, run it, and return it. Raises what it finds."""
    rng = random.Random(f"scenario {seed}")
    config = ModelSwitchingConfig(
        max_cached_models=rng.choice((0, 0, 0, 1, 2, 5)),
        model_ttl_seconds=rng.choice((4.0, 20.0, 3600.0)),
        max_transition_time=rng.choice((8.0, 20.0, 60.0)),
    )
    simulation = Simulation(
        seed,
        controllers=rng.choice((1, 2, 2, 3)),
        gateways=rng.choice((1, 2, 3)),
        workers=rng.choice((1, 2, 2)),
        capacity=rng.choice((2, 3, 4)),
        memory_mib=rng.choice((0, 700, 1000)),
        spares=random.Random(f"spares {seed}").choice((0, 0, 1, 2)),
        config=config,
        cache=CacheConfig(warm=WARM, schedule=SCHEDULE) if seed % 3 == 0 else CACHE,
        skew_s=rng.choice((0.0, 0.05, 1.0)),
        trace=trace,
    )
    try:
        simulation.run(_random_scenario(simulation, rng))
    except Exception as e:
        e.add_note(f"seed {seed}: run it again with  make sim ARGS='--seed {seed} --trace'")
        e.simulation = simulation  # type: ignore[attr-defined]  # for whoever prints the trace
        raise
    return simulation


async def _random_scenario(sim: Simulation, rng: random.Random) -> None:
    await sim.ready()
    models = ("chat",) if rng.random() < 0.6 else ("chat", "embed")
    for model in models:
        await _register_all(sim, model, rng)
        await sim.switch(model, "v1", bake_s=0.0)
    await sim.until(lambda: all(sim.world.state("model", m).active for m in models), 40.0)
    for model in models:
        sim.clients(model)
    sim.net.faults = _draw_faults(rng)
    sim.net.mortal = frozenset(("controller", "worker", "gateway"))
    length_s = rng.choice((5.0, 10.0, 16.0))
    actors: list[Awaitable[None]] = [_operator(sim, model, rng, length_s) for model in models]
    actors.extend(_fault(sim, rng, length_s) for _ in range(rng.choice((0, 1, 2, 4, 6))))
    sim.tasks = [sim.loop.create_task(a) for a in actors]  # type: ignore[arg-type]  # all are coroutines
    minder = sim.loop.create_task(_minder(sim, rng))
    await asyncio.sleep(length_s)
    minder.cancel()
    await sim.rest()


async def _register_all(sim: Simulation, model: str, rng: random.Random) -> None:
    sleepy = {"sleeps": 1} if rng.random() < 0.6 else {}
    bad = {**sleepy, "wake_fails": 1} if sleepy and rng.random() < 0.3 else sleepy
    await sim.register(model, "v1", load_s=0.5, memory=100, **sleepy)
    await sim.register(model, "v2", load_s=rng.choice((0.1, 1.0, 3.0)), memory=rng.choice((50, 200, 400)), **bad)
    await sim.register(model, "v3", load_s=rng.choice((0.1, 6.0)), fails=rng.choice((0, 0, 1, 2)), memory=100, **sleepy)
    await sim.register(model, "v4", load_s=rng.choice((0.5, 30.0)), memory=rng.choice((50, 300)), **bad)
    await sim.register(model, "v5", load_s=0.2, errors=rng.choice((0.3, 1.0)), memory=100)


def _draw_faults(rng: random.Random) -> Faults:
    bad = rng.choice((0.0, 0.0, 0.01, 0.05, 0.15))
    return Faults(
        lost_request=bad,
        lost_answer=bad,
        duplicate=rng.choice((0.0, 0.05, 0.3)),
        slow=rng.choice((0.0, 0.05, 0.3)),
        crash_at_op=rng.choice((0.0, 0.0, 0.002, 0.01)),
        lost_view=bad,
        lost_beat=rng.choice((0.0, 0.1)),
    )


async def _minder(sim: Simulation, rng: random.Random) -> None:
    """Start dead processes again, as a service manager does."""
    dead: dict[str, float] = {}
    while True:
        await asyncio.sleep(0.25)
        for name, process in sim.processes.items():
            if process.alive:
                dead.pop(name, None)
                continue
            due = dead.setdefault(name, sim.loop.time() + rng.choice((0.1, 1.0, 4.0, 12.0)))
            if sim.loop.time() >= due:
                sim.restart(name)


async def _operator(sim: Simulation, model: str, rng: random.Random, length_s: float) -> None:
    """Ask for things at random, some of them twice, some of them nonsense."""
    end = sim.loop.time() + length_s
    asked: list[asyncio.Task[Any]] = []
    while sim.loop.time() < end:
        await asyncio.sleep(rng.choice((0.05, 0.3, 1.0, 3.0)))
        verb, body = _draw_command(sim, model, rng)
        id = f"{model}-{len(asked)}"
        asked.append(sim.loop.create_task(sim.command(verb, body, id)))
        if rng.random() < 0.2:  # the same command again, at the same time, perhaps at another controller
            asked.append(sim.loop.create_task(sim.command(verb, body, id)))
    await asyncio.gather(*asked)


def _draw_residence(model: str, version: str, rng: random.Random) -> tuple[str, object]:
    """Pins, wishes, replicas, evictions: all at odds with each other."""
    match rng.randrange(5):
        case 0:
            return "version.pin", PinVersion(model, version)
        case 1:
            return "version.unpin", UnpinVersion(model, version)
        case 2:
            return "version.preload", PreloadVersion(model, version, rng.choice((-1, 0, 0, 5)))
        case 3:
            return "version.replicas", SetReplicas(model, version, rng.choice((1, 1, 2)))
        case _:
            return "version.evict", EvictVersion(model, version)


def _draw_command(sim: Simulation, model: str, rng: random.Random) -> tuple[str, object]:
    version = rng.choice(("v1", "v1", "v2", "v2", "v2", "v3", "v4", "v5", "v9"))
    draw = rng.random()
    if draw < 0.5:
        bake_s, drain_s = rng.choice((0.0, 0.0, 0.5, 2.0)), rng.choice((0.5, 5.0, 20.0))
        strategy, parameters = rng.choice(WAYS)
        return "switch.start", StartSwitch(model, version, strategy, parameters, bake_s=bake_s, drain_s=drain_s)
    running = sim.world.state("model", model).switch or "sw-nothing"
    if draw < 0.6:
        return "switch.abort", StopSwitch(running)
    if draw < 0.7:
        step = rng.choice((None, None, 0, 1, 2))
        return "switch.promote", AdvanceSwitch(running, step, full=rng.random() < 0.2, reason=rng.choice(("", "why")))
    if draw < 0.75:
        return "switch.pause", HoldSwitch(running, seconds=rng.choice((None, 0.5, 5.0)))
    if draw < 0.79:
        return "switch.resume", ContinueSwitch(running)
    if draw < 0.82:
        return "switch.retry", RetrySwitch(rng.choice(sorted(sim.world.switches) or ["sw-nothing"]))
    if draw < 0.88:
        return "model.undo", UndoModel(model)
    if draw < 0.91:
        names = sorted(sim.world.models)
        return "model.rules", SetRules(model, draw_rules(rng, names, ("v1", "v2", "v3", "v9")))
    if draw < 0.935:
        return _draw_residence(model, version, rng)
    if draw < 0.95:
        return "version.deregister", DeregisterVersion(model, version)
    return "version.register", RegisterVersion(model, version, EngineSpec("fake", args=("--load-s=0.5",)))


#: Strategies with parameters that fit into a run of seconds.
_QUICK: dict[str, object] = {"minRequests": 5, "minUsers": 1, "minSeconds": 1}
WAYS: tuple[tuple[str, dict[str, object]], ...] = (
    ("", {}),
    ("", {}),
    ("gradual", {"steps": [{"setWeight": 20}, {"pause": {"duration": 0.5}}, {"setWeight": 60}]}),
    ("gradual", {"steps": [{"setWeight": 50}, {"pause": {}}]}),
    ("canary", {"steps": [{"setWeight": 30}], "judge": _QUICK, "stepDeadline": 4, "onInconclusive": "promote"}),
    ("canary", {"steps": [{"setWeight": 10}, {"setWeight": 50}], "judge": _QUICK, "stepDeadline": 3}),
    ("canary", {"shadow": {"percent": 50, "duration": 1}, "stepDeadline": 2, "onInconclusive": "abort"}),
    ("ab", {"split": 50, "until": {"duration": 3}}),
    ("ab", {"split": 30, "until": {"duration": 3}, "pick": "winner", "judge": _QUICK}),
)


async def _fault(sim: Simulation, rng: random.Random, length_s: float) -> None:
    """One thing goes wrong, and perhaps right again."""
    await asyncio.sleep(rng.random() * length_s * 0.8)
    names = sorted(sim.processes)
    long_s = rng.choice((0.3, 1.5, 4.0, 9.0, 14.0))
    kind = rng.choice(
        (
            "crash",
            "crash",
            "cut",
            "strand",
            "strand",
            "engine",
            "hang",
            "down",
            "full",
            "stalled",
            "host",
            "leave",
            "wave",
        )
    )
    sim.net.trace("fault", kind)
    match kind:
        case "crash":
            sim.processes[rng.choice(names)].crash()
        case "wave":
            for name in names:
                if sim.processes[name].kind == rng.choice(("controller", "gateway", "worker")):
                    sim.processes[name].crash()
        case "cut":
            process = sim.processes[rng.choice(sorted(sim.gateways) if rng.random() < 0.5 else names)]
            process.cut = True
            sim.net.trace("cut", process.name)
            await asyncio.sleep(long_s)
            process.cut = False
        case "strand":  # a gateway serves on by its last route while the others leave the version
            process = sim.processes[rng.choice(sorted(sim.gateways))]
            process.cut = True
            sim.net.trace("cut", process.name)
            await asyncio.sleep(6.5)
            for version in ("v2", "v1"):
                await sim.switch("chat", version, bake_s=0.0, drain_s=0.5)
                await asyncio.sleep(4.0)
            process.cut = False
        case "down" | "full" | "stalled":
            setattr(sim.net, kind, True)
            await asyncio.sleep(long_s)
            setattr(sim.net, kind, False)
        case "engine" | "hang":
            engines = sorted(i for h in sim.hosts.values() for i in h.engines)
            if engines:
                sim.crash_engine(rng.choice(engines), hang=kind == "hang")
        case "host":
            sim.crash_host(rng.choice(sorted(sim.hosts)))
        case _:
            gateway = sim.gateways[rng.choice(sorted(sim.gateways))]
            if gateway.plane.serving:
                gateway.agent.stop()
