"""A log as a busy installation writes it: made by the real deciders, sagas and commands over the store in memory.

Only the outside is played: operators who register and switch, workers that load at once, gateways that apply and drain
at once, and a clock that stands still until it is moved. So the proportions between the event types are those of the
software, not of a guess.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from turnout.core import gateway, instance, worker
from turnout.core.config import ModelSwitchingConfig
from turnout.core.decider import Accepted
from turnout.core.handling import Defaults, StartSwitch
from turnout.core.model import DeregisterVersion, RegisterVersion, ReportInspected, digest
from turnout.core.sagas import placement, switch
from turnout.core.sagas.owed import merge
from turnout.events.memory import MemoryStore
from turnout.events.model import EngineSpec, Inspection
from turnout.workers.controller.commands import Commands
from turnout.workers.controller.log import Log
from turnout.workers.ports import Request

if TYPE_CHECKING:
    from turnout.core.sagas.owed import Owed
    from turnout.events.envelope import Recorded

GATEWAYS = tuple(f"g{n}" for n in range(1, 5))
WORKERS = tuple(f"w{n}" for n in range(1, 4))
MODELS = tuple(f"model-{n}" for n in range(1, 9))

#: Every so many switches of a model, a new version is registered and loaded; the others go between warm versions.
NEW_VERSION_EVERY = 8

#: Older versions of a model are deregistered.
KEPT_VERSIONS = 6


class _StillClock:
    """Moves only when it is told to."""

    def __init__(self) -> None:
        self._now = datetime(2030, 1, 1, tzinfo=UTC)
        self._ids = itertools.count(1)

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._now.timestamp()

    def id(self, prefix: str = "") -> str:
        return f"{prefix}{next(self._ids):012x}"

    def jitter(self) -> float:
        return 0.5

    def move(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)


class _Player:
    """Operators, workers and gateways around the real controller parts."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.clock = _StillClock()
        self.config = ModelSwitchingConfig()
        self.log = Log(self.store, self._lost)
        self.commands = Commands(self.log, self.clock, self.config, Defaults(bake_s=60.0, drain_s=600.0))
        self._versions = dict.fromkeys(MODELS, 0)
        self._serving: dict[tuple[str, str], set[str]] = {}

    async def play(self, events: int) -> None:
        await self.log.follow()
        for name in WORKERS:
            await self._ask(
                "worker", "worker.join", worker.JoinWorker(name, f"{name}.example", ("vllm",), ("gpu0",), 40)
            )
        for name in GATEWAYS:
            await self._ask("gw", "gateway.join", gateway.JoinGateway(name, f"http://{name}.example:8400"))
        for turn in itertools.count():
            for model in MODELS:
                await self._switch(model, turn)
                if len(self.store.log) >= events:
                    return

    async def _switch(self, model: str, turn: int) -> None:
        if turn < 2 or turn % NEW_VERSION_EVERY == 0:
            self._versions[model] += 1
            newest = f"v{self._versions[model]}"
            spec = EngineSpec("vllm", path=f"models/{model}/{newest}", args=("--max-model-len=4096",))
            await self._ask("ops", "version.register", RegisterVersion(model, newest, spec, "new weights"))
            seen = ReportInspected(model, newest, WORKERS[0], digest(spec), _inspection(f"{model}@{newest}"))
            await self._ask("worker", "version.inspected", seen)
            if self._versions[model] > KEPT_VERSIONS:
                oldest = f"v{self._versions[model] - KEPT_VERSIONS}"
                await self._ask("ops", "version.deregister", DeregisterVersion(model, oldest))
        number = self._versions[model]
        active = self.log.world.state("model", model).active
        target = f"v{number}" if active != f"v{number}" else f"v{number - 1}"
        await self._ask("ops", "switch.start", StartSwitch(model, target, reason="release"))
        await self._settle(model)

    async def _settle(self, model: str) -> None:
        """Let everybody do what is owed until the model's switch has ended and nothing is owed any more."""
        while True:
            await self._workers()
            await self._gateways(model)
            world, now = self.log.world, self.clock.now()
            agenda = merge(
                (
                    *(switch.agenda(world, id, now) for id in sorted(world.running)),
                    placement.agenda(world, self.config, now),
                )
            )
            if await self._carry_out(agenda.owed):
                self.clock.move(0.002)
            elif world.running and agenda.wake is not None:
                self.clock.move((agenda.wake - now).total_seconds())
            else:
                return

    async def _carry_out(self, owed: tuple[Owed, ...]) -> bool:
        touched: set[tuple[str, str]] = set()
        progress = False
        for one in owed:
            keys = {(write.aggregate, write.id) for write in one.writes}
            if not touched & keys:
                touched |= keys
                progress |= await self.commands.carry_out(one, epoch=1)
        return progress

    async def _workers(self) -> None:
        for id in sorted(self.log.world.alive):
            one = self.log.world.instances[id]
            if one.phase == "requested":
                for n, stage in enumerate(("starting", "loading", "warming", "proving")):
                    await self._ask("worker", "instance.loading", instance.ReportLoading(id, stage, n * 4.0))
                    self.clock.move(4.0)
                ready = instance.ReportReady(id, f"unix:run/{id}.sock", 14.0, 0.4, 2**33, "fp-1")
                await self._ask("worker", "instance.ready", ready)
            elif one.phase == "draining":
                await self._ask("worker", "instance.stopped", instance.ReportStopped(id, 0.8))

    async def _gateways(self, model: str) -> None:
        route = self.log.world.state("route", model)
        now = {split.version for split in route.splits}
        for name in GATEWAYS:
            if self.log.world.gateways[name].applied.get(model, 0) >= route.revision:
                continue
            await self._ask("gw", "gateway.applied", gateway.ReportApplied(name, model, route.revision))
            for version in sorted(self._serving.get((name, model), set()) - now):
                await self._ask("gw", "gateway.drained", gateway.ReportDrained(name, model, version, route.revision))
            self._serving[name, model] = now

    async def _ask(self, role: str, verb: str, body: object) -> None:
        request = Request(self.clock.id("c-"), "bench", msgspec.Raw(msgspec.json.encode(body)))
        answer = await self.commands.handle(role, verb, request)
        if not isinstance(answer, Accepted):
            raise RuntimeError(f"{verb} was not accepted: {answer}")

    def _lost(self, error: Exception) -> None:
        raise error


def _inspection(name: str) -> Inspection:
    """What a worker says of a version's files."""
    sha = hashlib.sha256(name.encode()).hexdigest()
    return Inspection(sha, 2**33, 291, "LlamaForCausalLM", "bfloat16", sha, sha)


def play(events: int) -> list[Recorded]:
    """A decoded log of at least ``events`` events, in the log's order."""
    player = _Player()
    asyncio.run(player.play(events))
    return player.store.log


def mix(log: list[Recorded]) -> dict[str, float]:
    """Type → share of the log, the most frequent first."""
    counts = Counter(recorded.type for recorded in log)
    return {name: count / len(log) for name, count in counts.most_common()}
