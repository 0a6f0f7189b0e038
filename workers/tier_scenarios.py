"""The scenarios ``warm``, ``spare``, ``lora`` and ``sleep``: how a version becomes ready, under load. Prints nothing.

``warm``: the target is in the cache still. ``spare``: it was never loaded, and is put into an engine that runs already.
``lora``: it is an adapter, and joins another one in the engine of their base. ``sleep``: it was put to sleep to make
room for another one, and is woken.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING

import msgspec

from turnout.core.switch import ENDED
from turnout.events.envelope import Recorded
from turnout.events.instance import InstanceReady, InstanceRequested, InstanceWoken, TierFailed
from turnout.events.model import EngineSpec
from turnout.events.switch import TargetReady
from turnout.workers import wiring
from turnout.workers.client import Client, DynamicModelRegistry, ModelSwitcher
from turnout.workers.demo import MODEL, DemoError, Progress, turnout_up, worker_joins
from turnout.workers.inference.engines.base import SLEEP_FLAG
from turnout.workers.load import Clients
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from pathlib import Path


_LOAD_S = 3.0
_ARGS = (f"--load-seconds={_LOAD_S:g}", "--tokens=20", "--token-ms=5")
_SETTINGS = "[worker]\nquiet_s = 0.1\nspares = {spares}\ncapacity = {places}\n"
_SERVES_S = 60.0
_TOKENS = 20
#: What is adapted, and by which matrices: small files that are looked at like any others.
_MODULE, _WIDTH, _RANK = "model.layers.0.self_attn.q_proj", 512, 8
_BASE = {f"{_MODULE}.weight": (_WIDTH, _WIDTH)}
_ADAPTER = {
    f"base_model.model.{_MODULE}.lora_A.weight": (_RANK, _WIDTH),
    f"base_model.model.{_MODULE}.lora_B.weight": (_WIDTH, _RANK),
}


class TierScenario(msgspec.Struct, frozen=True):
    """One story. ``visits``: the versions that are switched to; the last one is what is looked at.

    ``args``: further settings of their engines; ``places``: engines that the worker may run awake; ``adapters``: the
    versions are adapters of one base.
    """

    name: str
    about: str
    visits: tuple[str, ...]
    spares: int
    tier: str
    args: tuple[str, ...] = ()
    places: int = 4
    adapters: bool = False


TIER_SCENARIOS = {
    one.name: one
    for one in (
        TierScenario(
            "warm", "a version that is in the cache still is back in the time of a route", ("v1", "v2", "v1"), 0, "warm"
        ),
        TierScenario(
            "spare", "a version never loaded before is put into an engine that runs already", ("v1", "v2"), 1, "spare"
        ),
        TierScenario(
            "lora",
            "an adapter that was never loaded joins another one in the engine of their base",
            ("v1", "v2"),
            0,
            "adapter",
            adapters=True,
        ),
        TierScenario(
            "sleep",
            "a version that sleeps, as others needed its place, is woken and proven",
            ("v1", "v2", "v3", "v1"),
            0,
            "wake",
            (SLEEP_FLAG,),
            2,
        ),
    )
}


class TierReport(msgspec.Struct, frozen=True):
    """What it gave; the last line of ``turnout demo --scenario … --json``.

    Attributes:
        scenario: its name.
        outcome: phase in which the last switch ended.
        tier: how its target became ready, and what was to be shown.
        ready_s: from its start to a proven target.
        cold_s: what a new engine takes here, for comparison.
        failed, cut: requests by turnout's doing.
        requests: in all.
        bytes_estimated: what the target was admitted with, before it was loaded.
        bytes_measured: of the target's engine; of an adapter, what it adds to the engine that it shares.
        struck: tiers that were tried and failed.
        as_planned: it ended so, by this tier, and no client noticed.
    """

    scenario: str
    outcome: str
    tier: str
    ready_s: float
    cold_s: float
    failed: int
    cut: int
    requests: int
    bytes_estimated: int
    bytes_measured: int
    struck: tuple[str, ...]
    as_planned: bool


class TierOutcome(msgspec.Struct, frozen=True):
    """The report, and the log that it was read from."""

    report: TierReport
    switch: str
    log: list[Recorded]


async def play(scenario: TierScenario, rate: float, folder: Path, progress: Progress) -> TierOutcome:
    """Start everything in ``folder`` (made anew), play the scenario, stop everything.

    Raises:
        DemoError: something could not be started.
    """
    settings = _SETTINGS.format(spares=scenario.spares, places=scenario.places)
    async with (
        turnout_up(folder, progress, settings) as (nats, gateway),
        wiring.control_plane(nats, "turnout demo") as plane,
    ):
        client = Client(plane, actor="demo")
        await worker_joins(client)
        registry, switcher = DynamicModelRegistry(BaseRegistry(), client), ModelSwitcher(client)
        for version in sorted(set(scenario.visits)):
            spec = EngineSpec("fake", args=(*_ARGS, *scenario.args))
            if scenario.adapters:
                spec = adapted(spec, folder / "models", version)
            await registry.register_model(MODEL, version, spec, note=scenario.name)
        load = Clients(gateway, MODEL, rate, client.clock, max_tokens=_TOKENS)
        id, outcome = "", ""
        try:
            for n, version in enumerate(scenario.visits):
                progress(f"switching to {version}")
                operation = await switcher.switch_model(MODEL, version, reason=scenario.name, bake_s=0.0)
                view = await operation.wait(_SERVES_S)
                id, outcome = operation.id, view.phase
                if view.phase not in ENDED or view.phase == "failed":
                    raise DemoError(f"{version} could not be served: {view.reason}")
                if n == 0:
                    load.start()
                    await asyncio.sleep(scenario.spares * 2 * _LOAD_S + 1.0)  # an engine is started ahead meanwhile
            await asyncio.sleep(1.0)
        finally:
            progress("waiting for the last answers")
            await load.stop()
        log = [recorded async for recorded in client.log()]
    answers = load.answers
    failed, cut = (sum(a.outcome == word for a in answers) for word in ("failed", "cut"))
    return TierOutcome(_report(scenario, id, outcome, log, failed, cut, len(answers)), id, log)


def _report(
    scenario: TierScenario, id: str, outcome: str, log: list[Recorded], failed: int, cut: int, requests: int
) -> TierReport:
    target = scenario.visits[-1]
    requested = [e for r in log if isinstance(e := r.event, InstanceRequested) and e.version == target]
    of_target = {e.instance for e in requested}
    readies = [r.event for r in log if isinstance(r.event, InstanceReady)]
    proofs = [e for r in log if isinstance(e := r.event, InstanceReady | InstanceWoken) and e.instance in of_target]
    newest = proofs[-1]
    proven = next(e for r in log if isinstance(e := r.event, TargetReady) and e.switch == id)
    tier = "warm" if proven.warm else "wake" if isinstance(newest, InstanceWoken) else newest.tier
    return TierReport(
        scenario=scenario.name,
        outcome=outcome,
        tier=tier,
        ready_s=round(proven.seconds, 3),
        cold_s=round(readies[0].load_s + readies[0].probe_s, 3),
        failed=failed,
        cut=cut,
        requests=requests,
        bytes_estimated=requested[-1].bytes,
        bytes_measured=newest.bytes,
        struck=tuple(e.reason for r in log if isinstance(e := r.event, TierFailed)),
        as_planned=outcome == "completed" and tier == scenario.tier and not failed and not cut,
    )


def adapted(spec: EngineSpec, folder: Path, version: str) -> EngineSpec:
    """A version of its own adapter, and of a base that all versions share."""
    base, adapter = folder / "base", folder / version
    for path in (base, adapter):
        path.mkdir(parents=True, exist_ok=True)
    if not (base / "config.json").exists():  # a worker reads it by then: what changes meanwhile can't be served
        _safetensors(base / "model.safetensors", _BASE)
        (base / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": _RANK}))
    _safetensors(adapter / "adapter_model.safetensors", _ADAPTER)
    return msgspec.structs.replace(spec, path=str(base), adapter=str(adapter))


def _safetensors(path: Path, tensors: dict[str, tuple[int, int]]) -> None:
    """A file of these tensors, all zero: the fake engine reads none."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
