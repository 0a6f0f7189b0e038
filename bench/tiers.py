"""The tiers side by side: how long each takes until a version is proven, what a switch then takes, and what memory.

``turnout up`` with the fake engine, and with real vLLM where `make setup-vllm` has been run, while v1 serves clients at
a fixed rate. *Ready* is from the request for the instance to the event that it is proven, both as the log has them;
*load* and *proof* are the worker's parts of it. A cold load's cost to v1 is its clients' whole answers in the seconds
before each load and during it, in pairs.

    python bench/tiers.py [--quick] [--rounds 3] [--only fake|vllm]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import report
import system

from turnout.core.handling import EvictVersion, PreloadVersion
from turnout.events.gateway import RouteApplied
from turnout.events.instance import (
    InstanceFailed,
    InstanceLoading,
    InstanceReady,
    InstanceRequested,
    InstanceStopped,
    TierFailed,
)
from turnout.events.model import EngineSpec
from turnout.events.switch import StepStarted, SwitchRequested
from turnout.workers.client import DynamicModelRegistry, ModelSwitcher, connect
from turnout.workers.inference.process import RunFolder
from turnout.workers.load import Clients
from turnout.workers.registry import BaseRegistry
from turnout.workers.tier_scenarios import adapted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from turnout.events.envelope import Recorded
    from turnout.workers.client import Client

PYTHON = report.ROOT / ".venv-vllm" / "bin" / "python"
MODELS = (report.ROOT / ".models").resolve()
CHAT, TUNED = "chat", "tuned"
SPARE_S, ADAPTER_S, CUTOVER_MS, ESTIMATE, COST = 2.0, 1.0, 50.0, 0.1, 0.05
#: Ends a bench that hangs: a real engine on a small and busy machine takes minutes to start.
_LIMIT_S = 600.0
_CONFIGURATION = """
[worker]
quiet_s = 0.2
spares = 1
capacity = 5
vllm_python = "{python}"
[worker.policy]
model_roots = [".", "{models}"]
"""
_FAKE = ("--first-token-ms=20", "--token-ms=5", "--tokens=20", "--load-seconds=3")
_VLLM = ("--max-model-len=512", "--kv-cache-memory-bytes=256M")


class Kind(msgspec.Struct, frozen=True):
    """One engine. ``calm_s``: seconds of load before a load that is measured; ``switches``: with a warm target."""

    name: str
    rate: float
    tokens: int
    calm_s: float
    switches: int

    def versions(self, folder: Path) -> dict[str, EngineSpec]:
        """Three versions that may follow each other in one engine."""
        if self.name == "fake":
            return {version: EngineSpec("fake", args=_FAKE) for version in ("v1", "v2", "v3")}
        return {v: EngineSpec("vllm", path=str(MODELS / f"smollm2-{v}"), args=_VLLM) for v in ("v1", "v2", "v3")}

    def adapters(self, folder: Path) -> dict[str, EngineSpec]:
        """Two adapters of one base."""
        if self.name == "fake":
            return {version: adapted(EngineSpec("fake", args=_FAKE), folder, version) for version in ("a1", "a2")}
        base = str(MODELS / "smollm2-v1")
        return {
            version: EngineSpec("vllm", path=base, args=_VLLM, adapter=str(MODELS / f"smollm2-lora-{name}"))
            for version, name in (("a1", "ahoy"), ("a2", "land"))
        }


KINDS = (Kind("fake", 20.0, 20, 5.0, 50), Kind("vllm", 1.0, 8, 20.0, 20))


class Load(msgspec.Struct):
    """One load.

    Attributes:
        tier: as in the tables.
        estimated: bytes that it was admitted with.
        first: of its model there: the estimate is of its files, and not of what was measured.
        since, until: asked for, and proven (UTC).
        struck: faster tiers that have failed.
    """

    tier: str
    ready_s: float
    load_s: float
    probe_s: float
    bytes: int
    estimated: int
    first: bool
    since: datetime
    until: datetime
    struck: int = 0


class Cost(msgspec.Struct):
    """v1's whole answers before a cold load and during it, ms; ``requests`` during it."""

    before_p50: float
    before_p95: float
    during_p50: float
    during_p95: float
    requests: int


class Found(msgspec.Struct):
    """What one engine kind has shown."""

    loads: list[Load]
    costs: list[Cost]
    cutovers_ms: dict[str, list[float]]
    failed: int
    cut: int
    requests: int


def run(quick: bool, rounds: int, only: str) -> report.Outcome:
    """So many rounds; one where it is quick."""
    found: dict[str, Found] = {}
    for kind in (kind for kind in KINDS if only in ("", kind.name)):
        if kind.name == "vllm" and not (PYTHON.exists() and (MODELS / "smollm2-lora-land").exists()):
            print("real vLLM is left out: `make setup-vllm` installs it")
            continue
        found[kind.name] = Found([], [], {}, 0, 0, 0)
        try:
            asyncio.run(_measure(kind, 1 if quick else rounds, found[kind.name]))
        except KeyboardInterrupt:
            print("interrupted: what was measured until now is told")
    return _outcome(found)


async def _measure(kind: Kind, rounds: int, found: Found) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name) / "turnout"
        settings = _CONFIGURATION.format(python=PYTHON, models=MODELS)
        with system.Turnout(folder, settings) as turnout:
            async with connect(turnout.nats, actor="bench") as client:
                stage = Stage(kind, client, folder, f"http://127.0.0.1:{turnout.port}", found)
                await stage.register(CHAT, kind.versions(folder / "models"))
                await stage.register(TUNED, kind.adapters(folder / "models"))
                await stage.serve()
                try:
                    for n in range(rounds):
                        await stage.spare()
                        await _round(stage, last=n + 1 == rounds)
                finally:
                    await stage.end()


async def _round(stage: Stage, *, last: bool) -> None:
    """All tiers once: a spare has been started ahead, v1 serves, and nothing else is loaded."""
    await asyncio.sleep(stage.kind.calm_s)
    stage.costs(await stage.preload(TUNED, "a1"))  # its base is a new engine
    await stage.preload(TUNED, "a2")
    await stage.evict(TUNED, "a2")
    await stage.preload(TUNED, "a2")
    if last:
        await stage.switch(TUNED, "", ("a1",), 1)
        await stage.switch(TUNED, "adapter", ("a2", "a1"), 4)
    else:
        await stage.evict(TUNED, "a2")
        await stage.evict(TUNED, "a1")
    await stage.preload(CHAT, "v3")
    await stage.switch(CHAT, "spare, started ahead", ("v3", "v1"), 2)
    await stage.evict(CHAT, "v3")
    await stage.preload(CHAT, "v2")
    await stage.switch(CHAT, "spare, evicted", ("v2", "v1"), 2)
    if last:
        await stage.switch(CHAT, "warm, beside a start", ("v2", "v1"), stage.kind.switches)
    await stage.spare()
    if last:
        await stage.switch(CHAT, "warm", ("v2", "v1"), stage.kind.switches)
    else:
        await stage.evict(CHAT, "v2")  # its engine ends: a spare is there


class Stage:
    """One running turnout with its clients."""

    def __init__(self, kind: Kind, client: Client, folder: Path, gateway: str, found: Found) -> None:
        self.kind, self.folder = kind, folder
        self._client, self._found, self._known = client, found, set[str]()
        self._clients = Clients(gateway, CHAT, kind.rate, client.clock, prompt="Say hello.", max_tokens=kind.tokens)

    async def register(self, model: str, versions: dict[str, EngineSpec]) -> None:
        """Register them and wait until their files were looked at."""
        registry = DynamicModelRegistry(BaseRegistry(), self._client)
        for version, spec in versions.items():
            await registry.register_model(model, version, spec, note="bench")
        for version, spec in versions.items():
            if spec.path:
                await self._client.inspected(model, version, timeout_s=_LIMIT_S)

    async def serve(self) -> None:
        """Serve v1, and let clients ask it from now on."""
        await self._load(CHAT, "v1", lambda: self.switch(CHAT, "", ("v1",), 1))
        self._clients.start()

    async def preload(self, model: str, version: str) -> Load:
        """Load a version that is not there."""
        return await self._load(
            model, version, lambda: self._client.send("version.preload", PreloadVersion(model, version))
        )

    async def _load(self, model: str, version: str, ask: Callable[[], Awaitable[object]]) -> Load:
        after = await self._client.store.last_sequence()
        asking = asyncio.ensure_future(ask())
        log = [r async for r in self._until(after, lambda e: isinstance(e, InstanceReady | InstanceFailed))]
        await asking
        asked = next(r for r in log if isinstance(r.event, InstanceRequested) and r.event.version == version)
        ready = log[-1]
        if not isinstance(ready.event, InstanceReady) or not isinstance(asked.event, InstanceRequested):
            raise RuntimeError(f"{version} could not be loaded: {ready.event}")
        details = [r.event.detail for r in log if isinstance(r.event, InstanceLoading)]
        tier = ready.event.tier
        if tier == "spare":
            tier += ", started ahead" if any("held nothing" in detail for detail in details) else ", evicted"
        load = Load(
            tier=tier,
            ready_s=(ready.envelope.time - asked.envelope.time).total_seconds(),
            load_s=ready.event.load_s,
            probe_s=ready.event.probe_s,
            bytes=ready.event.bytes,
            estimated=asked.event.bytes,
            first=model not in self._known,
            since=asked.envelope.time,
            until=ready.envelope.time,
            struck=sum(isinstance(r.event, TierFailed) for r in log),
        )
        self._known.add(model)
        self._found.loads.append(load)
        parts = f"{load.ready_s:.2f} s ({load.load_s:.2f} + {load.probe_s:.2f})"
        print(f"{self.kind.name} {model} {version}: {tier}, {parts}", flush=True)
        return load

    async def evict(self, model: str, version: str) -> None:
        """Let it go, and wait until it has gone."""
        after = await self._client.store.last_sequence()
        await self._client.send("version.evict", EvictVersion(model, version, "bench"))
        async for _ in self._until(after, lambda e: isinstance(e, InstanceStopped | InstanceFailed)):
            pass

    async def switch(self, model: str, tier: str, targets: tuple[str, ...], times: int) -> None:
        """Switch to them in turn, so many times; ``tier`` names the row that gets the cutovers, empty for none."""
        switcher = ModelSwitcher(self._client)
        for n in range(times):
            after = await self._client.store.last_sequence()
            operation = await switcher.switch_model(
                model, targets[n % len(targets)], reason="bench", bake_s=0.0, max_transition_time_s=_LIMIT_S
            )
            view = await operation.wait(_LIMIT_S)
            if view.phase != "completed":
                raise RuntimeError(f"the switch to {view.target} {view.phase}: {view.reason}")
            if tier:
                log = [r async for r in self._client.log() if r.sequence > after]
                self._found.cutovers_ms.setdefault(tier, []).append(_cutover_ms(log, operation.id))

    async def spare(self) -> None:
        """Wait until an engine has been started ahead."""
        folder = RunFolder(self.folder / ".turnout" / "engines")
        while not any(record.role == "spare" for record in folder.records()):  # noqa: ASYNC110  files tell no event
            await asyncio.sleep(0.2)
        await asyncio.sleep(2.0)

    def costs(self, load: Load) -> None:
        """What the clients saw before the load and during it."""
        answers = [a for a in self._clients.answers if a.outcome == "ok"]
        calm_s = self.kind.calm_s - 1.0
        before = [a.total_ms for a in answers if 0 < (load.since - a.sent).total_seconds() < calm_s]
        during = [a.total_ms for a in answers if load.since <= a.sent and a.ended <= load.until]
        self._found.costs.append(
            Cost(
                report.percentile(before, 50),
                report.percentile(before, 95),
                report.percentile(during, 50),
                report.percentile(during, 95),
                len(during),
            )
        )

    async def end(self) -> None:
        """Stop the clients, and count what they saw."""
        await self._clients.stop()
        answers, found = self._clients.answers, self._found
        found.requests += len(answers)
        found.failed += sum(a.outcome == "failed" for a in answers)
        found.cut += sum(a.outcome == "cut" for a in answers)

    async def _until(self, after: int, last: Callable[[object], bool]) -> AsyncIterator[Recorded]:
        """Events after ``after``, up to the first that ``last`` knows."""
        async for recorded in self._client.log(follow=True):
            if recorded.sequence > after:
                yield recorded
                if last(recorded.event):
                    return


def _cutover_ms(log: list[Recorded], switch: str) -> float:
    """From the accepted switch, whose target is ready, to the last gateway's acknowledgement."""
    asked = next(r for r in log if isinstance(r.event, SwitchRequested) and r.event.switch == switch)
    revision = next(r.event.revision for r in log if isinstance(r.event, StepStarted) and r.event.switch == switch)
    applied = [r.envelope.time for r in log if isinstance(r.event, RouteApplied) and r.event.revision == revision]
    return (max(applied) - asked.envelope.time).total_seconds() * 1000


_ORDER = ("cold", "spare, started ahead", "spare, evicted", "adapter", "warm, beside a start", "warm")


def _outcome(found: dict[str, Found]) -> report.Outcome:
    tables: list[report.Table] = []
    for name, one in found.items():
        kind = next(kind for kind in KINDS if kind.name == name)
        tables.append(
            report.Table(
                f"{name}: medians, while v1 serves {kind.rate:g} requests a second of {kind.tokens} tokens",
                [
                    "tier",
                    "loads",
                    "load (s)",
                    "proof (s)",
                    "ready (s)",
                    "slowest",
                    "switch to it, p50 (ms)",
                    "max",
                    "memory",
                ],
                [row for tier in _ORDER if (row := _row(tier, one))],
                [f"{one.requests} requests: {one.failed} failed, {one.cut} cut. {_memory_note(one)}"],
            )
        )
        if one.costs:
            tables.append(
                report.Table(
                    f"{name}: what a cold load costs v1: whole answers before it and during it (ms)",
                    ["load", "p50 before", "during", "p95 before", "during", "requests during"],
                    [
                        [
                            str(n),
                            *(f"{v:.0f}" for v in (c.before_p50, c.during_p50, c.before_p95, c.during_p95)),
                            str(c.requests),
                        ]
                        for n, c in enumerate(one.costs, 1)
                    ],
                )
            )
    return report.Outcome(
        figures={name: msgspec.to_builtins(one) for name, one in found.items()},
        tables=tables,
        goals=_goals(found.get("vllm")),
    )


def _row(tier: str, found: Found) -> list[str]:
    loads = [load for load in found.loads if load.tier == tier]
    cutovers = found.cutovers_ms.get(tier, [])
    if not loads and not cutovers:
        return []
    parts = (
        [f"{report.median(getattr(load, field) for load in loads):.2f}" for field in ("load_s", "probe_s", "ready_s")]
        if loads
        else ["", "", "0"]
    )
    return [
        tier,
        str(len(loads) or ""),
        *parts,
        f"{max(load.ready_s for load in loads):.2f}" if loads else "",
        f"{report.percentile(cutovers, 50):.1f}" if cutovers else "",
        f"{max(cutovers):.1f}" if cutovers else "",
        _size(max(load.bytes for load in loads)) if loads else "as loaded",
    ]


def _size(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _memory_note(found: Found) -> str:
    first = next(load for load in found.loads if load.first)
    worst = max((abs(_off(load)) for load in found.loads if load.tier.startswith("spare")), default=0.0)
    return (
        f"Memory of v1: {_size(first.estimated)} estimated from its files, {_size(first.bytes)} measured "
        f"({100 * _off(first):+.1f} %); estimates of spares, from what was measured: at most {100 * worst:.1f} % off. "
        "Switches run while another engine is started ahead, but the last row's."
    )


def _off(load: Load) -> float:
    """How far the estimate is from the measure, as a share of the measure."""
    return load.estimated / load.bytes - 1 if load.bytes else 0.0


def _goals(found: Found | None) -> list[report.Goal]:
    """Of the real engine."""
    what = (
        ("spare, version never loaded before → proven", f"< {SPARE_S:g} s"),
        ("adapter → proven", f"< {ADAPTER_S:g} s"),
        ("cutover p99, warm target", f"< {CUTOVER_MS:g} ms"),
        ("memory estimated from the files", "within 10 % of measured"),
        ("v1's p95 during a cold load", "< 5 % above before, with free cores"),
    )
    if found is None:
        return [report.Goal(name, goal, "no vLLM here") for name, goal in what]
    spares = [load.ready_s for load in found.loads if load.tier.startswith("spare")]
    adapters = [load.ready_s for load in found.loads if load.tier == "adapter"]
    cutover = report.percentile(found.cutovers_ms.get("warm", []), 99)
    off = _off(next(load for load in found.loads if load.first))
    more = report.median(c.during_p95 / c.before_p95 - 1 for c in found.costs)
    measured = (
        (f"{report.median(spares):.2f} s (slowest {max(spares):.2f} s)", report.median(spares) < SPARE_S),
        (f"{report.median(adapters):.2f} s (slowest {max(adapters):.2f} s)", report.median(adapters) < ADAPTER_S),
        (f"{cutover:.1f} ms", cutover < CUTOVER_MS),
        (f"{100 * off:+.1f} %", abs(off) < ESTIMATE),
        (f"{100 * more:+.0f} %, without free cores", more < COST),
    )
    return [report.Goal(*names, said, met) for names, (said, met) in zip(what, measured, strict=True)]


def _option(name: str, default: str) -> str:
    if name not in sys.argv:
        return default
    at = sys.argv.index(name)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


if __name__ == "__main__":
    chosen = int(_option("--rounds", "3")), _option("--only", "")
    raise SystemExit(report.main("tiers", lambda quick: run(quick, *chosen)))
