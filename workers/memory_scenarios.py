"""The demonstration's scenarios of memory: what makes room, what is refused, where replicas go, and many versions.

Real processes, the fake engine with ballast, clients that ask meanwhile. Measures from outside (what clients saw) and
from the log (what was charged when). Prints nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random  # noqa: TID251  seeded: the order of the switches is named by its seed
import signal
import sys
from typing import IO, TYPE_CHECKING, Any

import msgspec

from turnout.core.residence import SetReplicas
from turnout.core.world import World
from turnout.events.instance import InstanceDraining, InstanceMeasured, InstanceReady, InstanceRequested
from turnout.events.model import EngineSpec, VersionRegistered
from turnout.events.switch import SwitchCompleted, TargetReady
from turnout.events.worker import WorkerLost
from turnout.workers.answers import CommandRejected
from turnout.workers.client import Client, DynamicModelRegistry, ModelSwitcher, connect
from turnout.workers.demo import MODEL, DemoError, Progress, turnout_up, worker_joins
from turnout.workers.load import Clients
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from turnout.events.envelope import Recorded

#: Room for three engines with 100 MiB of ballast.
_SETTINGS = """
[worker]
id = "w1"
memory = "400MiB"
domain = "left"
quiet_s = 0.1
measure_s = 1.0
"""
_SECOND = """
[worker]
id = "w2"
memory = "400MiB"
domain = "right"
run_folder = "{folder}"
quiet_s = 0.1
"""
_PACE = ("--tokens=20", "--first-token-ms=20", "--token-ms=5", "--load-seconds=0.3")
_SWITCH_S = 60.0
#: Load before the first switch and after the last one.
_BEFORE_S, _AFTER_S = 1.0, 1.0
#: Versions that are registered in ``many``, and those that are switched among.
_REGISTERED, _SWITCHED = 100, 20


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a scenario of memory showed.

    Attributes:
        outcome: of the last switch that was asked for.
        tier: how its target was made ready: warm where it was there already.
        ready_s: seconds until it was.
        failed, cut: requests without an answer, and streams that broke.
        bytes_estimated: what the newest loaded instance was admitted with, and ``bytes_measured`` what it then held.
        memory_bytes: of the worker, for its engines; ``peak_bytes``: the most that was charged at once on one worker.
        versions, switches: registered; switches that were completed.
        refused: the refusal with its numbers, where one was provoked.
        made_room: how many instances were asked to stop.
        workers: instance → worker, of the version that serves at the end.
        as_planned: all of it, no request failed, and the bound was never exceeded.
    """

    scenario: str
    outcome: str
    tier: str
    ready_s: float
    failed: int
    cut: int
    requests: int
    bytes_estimated: int
    bytes_measured: int
    memory_bytes: int
    peak_bytes: int
    versions: int
    switches: int
    refused: str
    made_room: int
    workers: dict[str, str]
    final_version: str
    as_planned: bool
    reasons: tuple[str, ...]


class _Stage:
    """One running turnout, its clients, and what was seen on the way."""

    def __init__(self, client: Client, nats: str, load: Clients, folder: Path, progress: Progress) -> None:
        self.client, self.nats, self.load, self.folder, self.progress = client, nats, load, folder, progress
        self.refused = ""
        self.outcome = ""

    async def register(self, mib: dict[str, int]) -> None:
        """Versions that hold so many MiB each."""
        self.progress(f"registering {len(mib)} versions")
        registry = DynamicModelRegistry(BaseRegistry(), self.client)
        for seed, (version, size) in enumerate(mib.items()):
            spec = EngineSpec("fake", args=(*_PACE, f"--memory={size}", f"--seed={seed}"))
            await registry.register_model(MODEL, version, spec, note=f"{size} MiB")

    async def switch(self, version: str) -> None:
        """Switch and wait for the end, or keep the refusal."""
        self.progress(f"switching to {version}")
        try:
            operation = await ModelSwitcher(self.client).switch_model(MODEL, version, bake_s=0.0, drain_s=20.0)
        except CommandRejected as e:
            self.refused = f"{e.answer.code}: {e.answer.reason}"
            self.progress(f"refused: {self.refused}")
            return
        view = await operation.wait(_SWITCH_S)
        self.outcome = view.phase
        if view.phase != "completed":
            raise DemoError(f"the switch to {version} ended {view.phase}: {view.reason}")

    async def log(self) -> list[Recorded]:
        """All events."""
        return [recorded async for recorded in self.client.log()]

    @contextlib.asynccontextmanager
    async def serving(self, version: str) -> AsyncGenerator[None]:
        """Serve the version, and keep clients busy while the block runs."""
        await self.switch(version)
        self.load.start()
        try:
            await asyncio.sleep(_BEFORE_S)
            yield
            await asyncio.sleep(_AFTER_S)
        finally:
            self.progress("waiting for the last answers")
            await self.load.stop()


async def evict(stage: _Stage) -> bool:
    """Four versions in memory for three: the least recently used makes room; a fifth is refused with the numbers."""
    await stage.register({f"v{n}": 100 for n in range(1, 5)} | {"huge": 900})
    async with stage.serving("v1"):
        for version in ("v2", "v3", "v4", "huge"):
            await stage.switch(version)
    went = [r.event.reason for r in await stage.log() if isinstance(r.event, InstanceDraining)]
    return stage.refused.startswith("no_memory") and went == [f"makes room for {MODEL} v4"]


async def two_workers(stage: _Stage) -> bool:
    """Two replicas on two failure domains; one worker is killed, and its replica is placed again on the other."""
    async with _second_worker(stage) as second:
        await stage.register({"v1": 100})
        await stage.client.send("version.replicas", SetReplicas(MODEL, "v1", 2))
        async with stage.serving("v1"):
            spread = sorted(_homes(await stage.log(), "v1").values())
            stage.progress(f"v1 serves on {' and '.join(spread)}; killing the worker w2")
            second.kill()
            async with asyncio.timeout(_SWITCH_S), stage.client.follow("worker.w1") as following:
                while _ready_on(following.views, "w1") < 2:
                    await following.moved()
        return spread == ["w1", "w2"] and any(isinstance(r.event, WorkerLost) for r in await stage.log())


async def many(stage: _Stage, seconds: float) -> bool:
    """A hundred versions, twenty of them switched among in random order under load, in memory for three."""
    await stage.register({f"v{n}": 100 for n in range(1, _REGISTERED + 1)})
    order, clock = random.Random(1), stage.client.clock  # noqa: S311  an order, no secret
    async with stage.serving("v1"):
        end, serves = clock.monotonic() + seconds, "v1"
        while clock.monotonic() < end:
            serves = order.choice([f"v{n}" for n in range(1, _SWITCHED + 1) if f"v{n}" != serves])
            await stage.switch(serves)
    return True


#: Name → what is shown.
SCENARIOS = {
    "evict": "in memory for three versions a fourth makes the least recently used one leave; one too large is refused",
    "two-workers": "two replicas on two failure domains; a killed worker's replica is placed again on the other",
    "many-versions": "100 versions registered, 20 switched among in random order under load, in memory for three",
}


async def play(name: str, folder: Path, progress: Progress, rate: float, seconds: float) -> MemoryReport:
    """Start everything in ``folder`` (made anew), play the scenario, stop everything.

    Args:
        name: one of SCENARIOS.
        folder: of the demonstration.
        progress: gets what happens, in words.
        rate: requests a second.
        seconds: of ``many-versions``.

    Raises:
        DemoError: something could not be started, or a switch did not complete.
    """
    async with turnout_up(folder, progress, _SETTINGS) as (nats, gateway), connect(nats, actor="demo") as client:
        await worker_joins(client)
        load = Clients(gateway, MODEL, rate, client.clock, max_tokens=20)
        stage = _Stage(client, nats, load, folder, progress)
        match name:
            case "evict":
                good = await evict(stage)
            case "two-workers":
                good = await two_workers(stage)
            case _:
                good = await many(stage, seconds)
        return _report(name, stage, await stage.log(), (await client.model(MODEL)).active, good=good)


@contextlib.asynccontextmanager
async def _second_worker(stage: _Stage) -> AsyncGenerator[asyncio.subprocess.Process]:
    """A second worker process with a failure domain of its own, until the block ends; its engines end with it."""
    folder = stage.folder / "w2"
    folder.mkdir()
    config = folder / "turnout.toml"
    config.write_text(_SECOND.format(folder=folder / "engines") + f'\n[nats]\nurl = "{stage.nats}"\n')
    words = (sys.executable, "-m", "turnout.workers.cli", "worker", "--config", str(config))

    async def start(out: IO[bytes]) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )

    with (folder / "worker.log").open("wb") as out:
        process = await start(out)
        try:
            async with asyncio.timeout(_SWITCH_S), stage.client.follow("worker.w2") as following:
                while not following.views:
                    await following.moved()
            yield process
        finally:
            if process.returncode is not None:  # it was killed: one more takes its engines over, and ends them
                process = await start(out)
                async with asyncio.timeout(_SWITCH_S), stage.client.follow("worker.w2") as following:
                    while not any(view.state == "live" for view in following.views.values()):
                        await following.moved()
            process.send_signal(signal.SIGINT)
            await process.wait()


def _ready_on(views: dict[str, Any], worker: str) -> int:
    view = views.get(f"worker.{worker}")
    return 0 if view is None else sum(one.phase == "ready" for one in view.instances.values())


def _homes(log: list[Recorded], version: str) -> dict[str, str]:
    """Instances of a version that became ready → their worker."""
    asked = {r.event.instance: r.event for r in log if isinstance(r.event, InstanceRequested)}
    ready = [r.event.instance for r in log if isinstance(r.event, InstanceReady)]
    return {id: asked[id].worker for id in ready if asked[id].version == version}


def _report(name: str, stage: _Stage, log: list[Recorded], serves: str, *, good: bool) -> MemoryReport:
    answers = stage.load.answers
    bad = [a for a in answers if a.outcome != "ok"]
    failed, cut = (sum(a.outcome == outcome for a in bad) for outcome in ("failed", "cut"))
    peak, bound = _peak(log)
    ready = [r.event for r in log if isinstance(r.event, InstanceReady)]
    asked = {r.event.instance: r.event for r in log if isinstance(r.event, InstanceRequested)}
    targets = [r.event for r in log if isinstance(r.event, TargetReady)]
    completed = sum(isinstance(r.event, SwitchCompleted) for r in log)
    return MemoryReport(
        scenario=name,
        outcome=stage.outcome,
        tier="warm" if targets[-1].warm else ready[-1].tier,
        ready_s=targets[-1].seconds,
        failed=failed,
        cut=cut,
        requests=len(answers),
        bytes_estimated=asked[ready[-1].instance].bytes,
        bytes_measured=ready[-1].bytes,
        memory_bytes=bound,
        peak_bytes=peak,
        versions=sum(isinstance(r.event, VersionRegistered) for r in log),
        switches=completed,
        refused=stage.refused,
        made_room=sum(isinstance(r.event, InstanceDraining) for r in log),
        workers=_homes(log, serves),
        final_version=serves,
        as_planned=good and not bad and peak <= bound,
        reasons=tuple(dict.fromkeys(a.reason for a in bad))[:5],
    )


def _peak(log: list[Recorded]) -> tuple[int, int]:
    """The most that was charged at once on one worker, and the least that a worker with engines may use. Bytes."""
    world, peak = World(), 0
    for recorded in log:
        world.apply(recorded)
        if isinstance(recorded.event, InstanceRequested | InstanceReady | InstanceMeasured):
            held: dict[str, int] = {}
            for id in world.alive:
                one = world.instances[id]
                held[one.worker] = held.get(one.worker, 0) + one.bytes
            peak = max(peak, *held.values())
    return peak, min(worker.memory_bytes for worker in world.workers.values())
