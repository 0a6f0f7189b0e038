"""A real turnout on this machine: nats-server, controllers, workers and gateways, each a process of its own.

Every process is started by the ``turnout`` command in its own session, with settings from one turnout.toml in a short
temporary folder, and its output in a file there. ``kill``, ``freeze`` and ``thaw`` hit that one process only. At the
end every process is asked to stop, every engine is ended by the records of its worker, and what is alive after that is
an error. Reads the log by a tail of its own, so that a test can act in the moment in which something happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import msgspec
from tests.process.system.history import History, Seen
from tests.process.system.relay import Relay
from tests.process.system.traffic import Traffic, get

import turnout
from turnout.core.switch import ENDED
from turnout.core.world import World
from turnout.events import jsapi
from turnout.events.model import EngineSpec, Probe
from turnout.events.store import Unavailable
from turnout.workers import wiring
from turnout.workers.client import Client, DynamicModelRegistry, ModelSwitcher, SwitchOperation
from turnout.workers.clock import SystemClock
from turnout.workers.embedded import EmbeddedServer
from turnout.workers.inference import process as host_process
from turnout.workers.inference.process import Record
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded
    from turnout.events.store import Tail
    from turnout.projections.switches import SwitchView

P = ParamSpec("P")
T = TypeVar("T")

#: Longest wait for any condition. The conditions themselves are what is tested; this only ends a test that fails.
WAIT_S = 45.0
#: Longest whole story of one test.
STORY_S = 150.0
_STOP_S = 20.0
_POLL_S = 0.01
#: Stands in a process's log file where a new process of its name begins.
START = b"--- start ---\n"

SETTINGS = """
[switching]
health_check_interval = 5.0
max_cached_models = 4

[switch]
bake_s = 0.0
drain_s = 60.0

[worker]
quiet_s = 0.2

[gateway]
shutdown_s = 2.0
"""


class Process:
    """One process of the cluster, and its successors under the same name."""

    def __init__(self, name: str, argv: tuple[str, ...], env: dict[str, str], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._argv = argv
        self._env = env
        self._folder = folder
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id; of the last one, where it has ended."""
        assert self._child is not None
        return self._child.pid

    @property
    def alive(self) -> bool:
        """It runs (or is frozen)."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start it; it is not awaited."""
        assert not self.alive
        with self.log.open("ab") as out:
            out.write(START)
            out.flush()
            self._child = subprocess.Popen(
                self._argv, env=self._env, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def signal(self, number: int) -> None:
        """Send a signal to this process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, to this process alone."""
        self.signal(signal.SIGKILL)
        self.reap()

    def reap(self) -> int:
        """Wait for its end; the exit code."""
        assert self._child is not None
        return self._child.wait(_STOP_S)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._child.poll() if self._child is not None else 0


class Cluster:
    """The system under test.

    Args:
        settings: further lines of turnout.toml, after ``SETTINGS`` (a table may only stand in one of them).
        controllers, workers, gateways: how many of each; named ``c1``, ``w1``, ``g1`` and so on.
        base: the settings that ``settings`` is added to.
        store: settings of the nats-server.
        via: gateways that reach NATS by a relay of their own, see ``relays``.
    """

    def __init__(
        self,
        settings: str = "",
        *,
        controllers: int = 1,
        workers: int = 1,
        gateways: int = 1,
        base: str = SETTINGS,
        nats_folder: Path | None = None,
        store: dict[str, Any] | None = None,
        via: tuple[str, ...] = (),
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="to-"))
        self.clock = SystemClock()
        port = free_port()
        self.nats_url = f"nats://127.0.0.1:{port}"
        self.nats = EmbeddedServer(nats_folder or self.folder / "nats", self.clock, port, **(store or {}))
        self.seen: list[Seen] = []
        self.world = World()
        self.traffic: list[Traffic] = []
        self.processes: dict[str, Process] = {}
        self.gateways: dict[str, str] = {}
        self.lost: list[Exception] = []
        self._counts = {"controller": controllers, "worker": workers, "gateway": gateways}
        target = int(self.nats_url.rpartition(":")[2])
        self.relays = {name: Relay(free_port(), target) for name in via}
        self._moved = asyncio.Event()
        self._why: Exception | None = None
        self._stack = contextlib.AsyncExitStack()
        self._tail: Tail | None = None
        self._client: Client | None = None
        self._numbers: dict[str, int] = {}
        (self.folder / "turnout.toml").write_text(base + settings)

    # --- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Cluster:
        try:
            await self.nats.start()
            for relay in self.relays.values():
                await relay.start()
            for name in self._names("controller"):
                self.start(name)
            await self.connect()
            for name in (*self._names("worker"), *self._names("gateway")):
                self.start(name)
            await self.until(self.all_live, "all workers and gateways are live")
            for name, url in self.gateways.items():
                await self.until(lambda url=url: _listens(url), f"{name} listens")  # type: ignore[misc]
        except BaseException as e:
            self.explain(e)
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Connect this test's own client, and begin to read the log."""

        async def reachable() -> bool:
            try:
                plane = await self._stack.enter_async_context(wiring.control_plane(self.nats_url, "test"))
                self._client = Client(plane, "test")
                self._tail = await self.client.store.tail(0, self._deliver, self.lost.append)
            except Exception as e:  # noqa: BLE001  whatever it is, the deadline shows it
                self._why = e
                return False
            return True

        await self.until(reachable, "the control plane is up")

    async def close(self) -> None:
        """Stop everything; whatever has to be killed for that, or is left, is an error."""
        problems: list[str] = []
        for traffic in self.traffic:
            await traffic.stop()
        if self._tail is not None:
            await self._tail.close()
        running = [p for p in self.processes.values() if p.alive]
        for relay in self.relays.values():
            relay.mend()
        for process in running:
            process.signal(signal.SIGCONT)
        # controllers last: the others say goodbye to them
        for kinds in ("wg", "c"):
            problems += await self._stopped([p for p in running if p.name[0] in kinds])
        await self._stack.aclose()
        for relay in self.relays.values():
            await relay.close()
        for record in self.records():
            host_process.kill_session(record.pid, record.started)
        self.nats.kill()
        end = self.clock.monotonic() + 5
        while (left := _mentioning(str(self.folder))) and self.clock.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        for pid, line in left.items():
            problems.append(f"left alive: {pid} {line}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if problems:
            error = AssertionError("; ".join(problems))
            self.explain(error)
            raise error
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _stopped(self, processes: list[Process]) -> list[str]:
        """Ask processes to end, and wait for it; what went wrong with that."""
        problems: list[str] = []
        for process in processes:
            process.signal(signal.SIGTERM)
        end = self.clock.monotonic() + _STOP_S
        for process in processes:
            while process.alive and self.clock.monotonic() < end:  # noqa: ASYNC110  a child's end is no event
                await asyncio.sleep(_POLL_S)
            if process.alive:
                problems.append(f"{process.name} did not stop within {_STOP_S:g} s of SIGTERM")
                process.kill()
            elif code := process.poll():
                problems.append(f"{process.name} ended with code {code} on SIGTERM")
        return problems

    def explain(self, error: BaseException) -> None:
        """Add the processes' last lines and the end of the log of facts to an error."""
        for process in self.processes.values():
            text = process.log.read_text(errors="replace") if process.log.exists() else ""
            state = "alive" if process.alive else f"ended with {process.poll()}"
            error.add_note(f"--- {process.name} ({state})\n" + "\n".join(text.splitlines()[-40:]))
        for file in sorted(self.folder.glob("w*/*.log")):
            error.add_note(f"--- engine {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-5:]))
        error.add_note("--- the log's end\n" + "\n".join(str(seen) for seen in self.seen[-60:]))

    # --- processes -----------------------------------------------------------------------------------------------

    def start(self, name: str) -> Process:
        """Start a process of the cluster, or a new one under the name of one that has ended."""
        process = self.processes.get(name)
        if process is None:
            kind = {"c": "controller", "w": "worker", "g": "gateway"}[name[0]]
            process = self.processes[name] = Process(name, turnout_argv(kind), self._env(kind, name), self.folder)
        process.start()
        return process

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self.processes[name].kill()

    def freeze(self, name: str) -> None:
        """SIGSTOP."""
        self.processes[name].signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        self.processes[name].signal(signal.SIGCONT)

    async def restart(self, name: str) -> None:
        """Start it again and wait until it is part of the system."""
        since = len(self.seen)
        self.start(name)
        kind = name[0]
        if kind == "c":
            await self.logged(name, "controller_serving")
        elif kind == "w":
            await self.until(lambda: self.world.workers[name].live, f"{name} is live")
            await self.logged(name, "worker_joined")
        else:
            url = self.gateways[name]
            await self.until(lambda: any(_joined(s, url) for s in self.seen[since:]), f"{name} has joined")
            await self.until(lambda: _listens(url), f"{name} listens")

    async def logged(self, name: str, event: str, *, quoted: bool = True) -> None:
        """Wait until the newest process under a name has logged an event; ``quoted`` false: has written a text."""
        process, text = self.processes[name], f'"{event}"' if quoted else event
        await self.until(lambda: text in self._newest_log(process), f"{name} says {event}")

    def leader(self) -> str:
        """Name of the controller that leads, by what they log; empty where none does."""
        best: tuple[int, str] = (0, "")
        for name, process in self.processes.items():
            if name[0] != "c" or not process.alive:
                continue
            leading = 0
            for line in self._newest_log(process).splitlines():
                if '"leading"' in line:
                    leading = int(json.loads(line)["epoch"])
                elif '"leading_ended"' in line or '"leading_given_up"' in line:
                    leading = 0
            best = max(best, (leading, name)) if leading else best
        return best[1]

    def records(self) -> tuple[Record, ...]:
        """What the workers keep of their running engines."""
        found: list[Record] = []
        for file in self.folder.glob("w*/*.json"):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                found.append(msgspec.json.decode(file.read_bytes(), type=Record))
        return tuple(found)

    def engine_pids(self, version: str, model: str = "chat") -> tuple[int, ...]:
        """Processes of a version's engines that are alive."""
        ids = {i.instance for i in self.world.instances.values() if (i.model, i.version) == (model, version)}
        return tuple(r.pid for r in self.records() if r.instance in ids and host_process.members(r.pid))

    def _newest_log(self, process: Process) -> str:
        data = process.log.read_bytes() if process.log.exists() else b""
        return data[max(0, data.rfind(START)) :].decode(errors="replace")

    def _names(self, kind: str) -> tuple[str, ...]:
        return tuple(f"{kind[0]}{n + 1}" for n in range(self._counts[kind]))

    def _env(self, kind: str, name: str) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TURNOUT_")}
        url = f"nats://127.0.0.1:{self.relays[name].port}" if name in self.relays else self.nats_url
        env |= {
            "PYTHONPATH": str(Path(turnout.__file__).parent.parent),
            "TURNOUT_CONFIG": str(self.folder / "turnout.toml"),
            "TURNOUT_NATS_URL": url,
        }
        if kind == "worker":
            env |= {"TURNOUT_WORKER_ID": name, "TURNOUT_WORKER_RUN_FOLDER": str(self.folder / name)}
        elif kind == "gateway":
            port = free_port()
            self.gateways[name] = f"http://127.0.0.1:{port}"
            env |= {"TURNOUT_GATEWAY_PORT": str(port)}
        else:
            env |= {"TURNOUT_CONTROLLER_ID": name}
        return env

    # --- what happens --------------------------------------------------------------------------------------------

    def _deliver(self, recorded: Recorded) -> None:
        self.seen.append(Seen(self.clock.monotonic(), recorded))
        self.world.apply(recorded)
        self._moved.set()

    def all_live(self) -> bool:
        """Every worker and every gateway that was asked for is known and live; none has ended by itself."""
        ended = [name for name, process in self.processes.items() if process.poll() not in (None, -signal.SIGKILL)]
        assert not ended, f"{ended} ended"
        live_workers = {id for id, w in self.world.workers.items() if w.live}
        live_urls = {self.world.gateways[g].address for g in self.world.live_gateways}
        return live_workers >= set(self._names("worker")) and live_urls >= set(self.gateways.values())

    async def until(self, condition: Callable[[], object], what: str, wait_s: float = WAIT_S) -> None:
        """Wait for a condition, plain or awaitable; at most ``wait_s``."""
        end = self.clock.monotonic() + wait_s
        while True:
            holds: object = condition()
            if isinstance(holds, Awaitable):
                holds = await cast("Awaitable[object]", holds)
            if holds:
                return
            if self.clock.monotonic() > end:
                raise AssertionError(f"within {wait_s:g} s it did not come true that {what}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    self._moved.clear()
                    await self._moved.wait()

    async def event(self, type_: type[T], after: int = 0, wait_s: float = WAIT_S, **fields: object) -> T:
        """Wait for the first event of a type with these fields, later than the first ``after`` events."""
        found: list[T] = []

        def there() -> bool:
            for seen in self.seen[after:]:
                event = seen.recorded.event
                if isinstance(event, type_) and all(getattr(event, k) == v for k, v in fields.items()):
                    found.append(event)
                    return True
            return False

        await self.until(there, f"there is a {type_.__name__} with {fields}", wait_s)
        return found[0]

    async def caught_up(self) -> None:
        """Wait until this test has read all that is in the log now."""

        async def read() -> bool:
            try:
                last = await self.client.store.last_sequence()
            except Unavailable:
                return False
            return bool(self.seen) and self.seen[-1].recorded.sequence >= last

        await self.until(read, "the log is read")

    # --- what is asked -------------------------------------------------------------------------------------------

    @property
    def client(self) -> Client:
        """The Python client."""
        assert self._client is not None
        return self._client

    @property
    def switcher(self) -> ModelSwitcher:
        """Switches models."""
        return ModelSwitcher(self.client)

    async def register(self, version: str, *args: str, model: str = "chat", probe: Probe | None = None) -> None:
        """Register a version that the fake engine runs."""
        engine = EngineSpec("fake", args=args, probe=probe or Probe())
        await DynamicModelRegistry(BaseRegistry(), self.client).register_model(model, version, engine)

    async def switch(self, version: str, *, model: str = "chat", **settings: Any) -> SwitchOperation:
        """Ask for a switch."""
        return await self.switcher.switch_model(model, version, **settings)

    async def switched(self, version: str, *, model: str = "chat", **settings: Any) -> SwitchView:
        """Switch and wait for the end."""
        return await self.ended(await self.switch(version, model=model, **settings))

    async def ended(self, operation: SwitchOperation, wait_s: float = WAIT_S) -> SwitchView:
        """Wait for a switch's end in the log, and for the view that says so."""
        id = operation.id
        await self.until(lambda: self.world.state("switch", id).phase in ENDED, f"{id} has ended", wait_s)
        found: list[SwitchView] = []

        async def told() -> bool:
            with contextlib.suppress(Unavailable):
                found.append(await operation.status())
            return bool(found) and found[-1].phase in ENDED

        await self.until(told, f"the view of {id} says that it has ended")
        await self.caught_up()
        return found[-1]

    async def serving(self, *versions: str, model: str = "chat", args: tuple[str, ...] = ()) -> None:
        """Register versions and switch through all of them, so that each is warm and the first is active."""
        for version in versions:
            await self.register(version, *args, model=model)
        for version in (*versions[1:], versions[0]):
            view = await self.switched(version, model=model)
            assert view.phase == "completed", view

    def load(self, rate: float = 20.0, *, model: str = "chat", gateways: tuple[str, ...] = (), **how: Any) -> Traffic:
        """Begin to send requests to the gateways (default: all), in turn, until the traffic is stopped."""
        urls = [self.gateways[name] for name in gateways or self._names("gateway")]
        traffic = Traffic(urls, model, rate, self.clock, **how)
        self.traffic.append(traffic)
        traffic.start()
        return traffic

    async def answered(self, traffic: Traffic, more: int = 5) -> None:
        """Wait until so many more requests have been answered well."""
        aim = traffic.ok + more
        await self.until(lambda: traffic.ok >= aim, f"{more} more requests are answered well")

    async def history(self) -> History:
        """Stop all traffic; everything that was recorded, for the judge."""
        for traffic in self.traffic:
            await traffic.stop()
        await self.caught_up()
        return History(self.seen, [reply for traffic in self.traffic for reply in traffic.replies], self.lost)

    async def views_are_the_fold(self) -> None:
        """Wait until the stored views stand for the whole log, and compare them with a fold from nothing."""

        async def complete() -> bool:
            with contextlib.suppress(Unavailable):
                last = await self.client.store.last_sequence()
                _, checkpoint = await self.client.raw_views("_ckpt")
                return checkpoint is not None and checkpoint.sequence >= last
            return False

        await self.until(complete, "the views stand for the whole log")
        await self.caught_up()
        kinds = ("model.*", "route.*", "switch.*", "worker.*", "gateway.*", "alert.*")
        stored, checkpoint = await self.client.raw_views(*kinds)
        assert checkpoint is not None
        rebuilt = History(self.seen, [], []).views(checkpoint.sequence)
        assert {k: msgspec.json.decode(v) for k, v in stored.items()} == rebuilt

    async def command(self, *words: str) -> tuple[int, str, str]:
        """Run ``turnout …`` against this cluster: exit code, stdout, stderr."""
        process = await asyncio.create_subprocess_exec(
            *turnout_argv(*words, "--nats", self.nats_url),
            env=self._env("", "cli"), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    async def control_plane(self, gateway: str) -> str:
        """What a gateway's ``/healthz`` says of its connection."""
        return str(json.loads((await get(self.gateways[gateway], "/healthz")).body)["control_plane"])

    async def requests(self, gateway: str) -> list[dict[str, Any]]:
        """``/requests`` of a gateway: what runs now."""
        found: list[dict[str, Any]] = json.loads((await get(self.gateways[gateway], "/requests")).body)["requests"]
        return found

    async def drop_views(self) -> None:
        """Throw away the checkpoint and every view."""
        async with wiring.control_plane(self.nats_url, "test") as plane:
            await jsapi.api(plane.connection.nc, "STREAM.PURGE.KV_VIEWS", None, 2.0)


class Stage:
    """A cluster and the event loop that it lives in, for tests that share them."""

    def __init__(self, make: Callable[[], Cluster]) -> None:
        self._runner = asyncio.Runner()
        self.cluster = self._runner.run(self._made(make))

    @staticmethod
    async def _made(make: Callable[[], Cluster]) -> Cluster:
        return await make().__aenter__()

    def run(self, story: Coroutine[Any, Any, None]) -> None:
        """Run a test on the cluster; what fails is explained by the processes' logs."""
        self._runner.run(_told(self.cluster, story))

    def close(self) -> None:
        """Stop everything."""
        try:
            self._runner.run(self.cluster.close())
        finally:
            self._runner.close()


async def _told(cluster: Cluster, story: Coroutine[Any, Any, None]) -> None:
    try:
        async with asyncio.timeout(STORY_S):
            await story
    except BaseException as e:
        cluster.explain(e)
        raise
    finally:
        for traffic in cluster.traffic:
            await traffic.stop()
        cluster.traffic.clear()


def on_stage(test: Callable[[Cluster], Coroutine[Any, Any, None]]) -> Callable[[Stage], None]:
    """Write a test as a coroutine over the cluster of the fixture ``stage``."""

    @functools.wraps(test)
    def run(stage: Stage) -> None:
        stage.run(test(stage.cluster))

    del run.__wrapped__  # pytest would look at the coroutine's parameters
    return run


def alone(make: Callable[[], Cluster], story: Callable[[Cluster], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a cluster of its own."""
    stage = Stage(make)
    try:
        stage.run(story(stage.cluster))
    finally:
        stage.close()


def turnout_argv(*words: str) -> tuple[str, ...]:
    """``turnout …`` by this interpreter."""
    return (sys.executable, "-m", "turnout.workers.cli", *words)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _listens(url: str) -> bool:
    try:
        return (await get(url, "/readyz")).status == 200
    except OSError:
        return False


def _joined(seen: Seen, url: str) -> bool:
    return type(seen.recorded.event).__name__ == "GatewayJoined" and getattr(seen.recorded.event, "address", "") == url


def _mentioning(folder: str) -> dict[int, str]:
    """Living processes whose command line or environment names the folder."""
    found: dict[int, str] = {}
    needle = folder.encode()
    for member in host_process.processes():
        if member.state in "ZX" or member.pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{member.pid}/cmdline").read_bytes()
            if needle in line or needle in Path(f"/proc/{member.pid}/environ").read_bytes():
                found[member.pid] = line.replace(b"\0", b" ").decode(errors="replace")
    return found
