"""The scenarios ``on-demand`` and ``hold``: requests that wait for a load, in memory for one engine. Prints nothing.

Real processes, the fake engine with ballast, clients that ask meanwhile. Measures from outside (what clients saw) and
from the log (what was foretold, what it took).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from turnout.events.instance import InstanceReady, InstanceRequested, InstanceStopped
from turnout.events.model import EngineSpec, Serving
from turnout.events.switch import HoldReleased, HoldStarted, TargetReady
from turnout.workers.client import Client, DynamicModelRegistry, ModelSwitcher, connect
from turnout.workers.demo import MODEL, DemoError, Progress, turnout_up, worker_joins
from turnout.workers.load import Answer, Clients
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from turnout.events.envelope import Recorded

#: Room for one engine with 100 MiB of ballast.
_SETTINGS = """
[worker]
id = "w1"
memory = "200MiB"
quiet_s = 0.1
measure_s = 1.0
"""
_ENGINE = ("--memory=100", "--tokens=20", "--first-token-ms=20", "--token-ms=5", "--load-seconds=1")
_TOKENS = 20
_PATIENCE_S = 60.0
#: Load after each wait, seconds.
_SERVES_S = 1.0
_KEEP_ALIVE_S = 0.5
#: Versions that are switched to: the last switch goes where both were loaded and stopped before, so all is measured.
_VISITS = ("v1", "v2", "v1", "v2")

#: Name → what is shown.
SCENARIOS = {
    "on-demand": "a model is loaded when requests ask for it, unloaded when nobody does, and loaded again",
    "hold": "two versions take turns in memory for one; requests wait meanwhile, and the pause is foretold",
}


class Pause(msgspec.Struct, frozen=True):
    """For how long no version served, seconds; ``foretold`` None where that was never measured before."""

    foretold: float | None
    measured: float


class WaitingReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a scenario of waiting showed; all but the sums is of its last load.

    Attributes:
        outcome: of the last switch; ``served`` where requests caused the load.
        tier: how it became ready.
        ready_s: seconds from the command, or from the request for a load, until it was proven.
        failed, cut: requests without an answer, and streams that broke.
        held: requests that waited for it and were answered by it; ``longest_wait_s``: until the first token of one.
        pause_s: of a hold; None where there was no version to hold for.
        bytes_estimated: what it was admitted with, and ``bytes_measured`` what it then held.
        memory_bytes: of the worker, for its engines.
        loads: instances that became ready.
        as_planned: it ended well, requests waited, and none of them failed.
    """

    scenario: str
    outcome: str
    tier: str
    ready_s: float
    failed: int
    cut: int
    requests: int
    held: int
    longest_wait_s: float
    pause_s: Pause | None
    bytes_estimated: int
    bytes_measured: int
    memory_bytes: int
    loads: int
    final_version: str
    as_planned: bool
    reasons: tuple[str, ...]


async def play(name: str, folder: Path, progress: Progress, rate: float) -> WaitingReport:
    """Start everything in ``folder`` (made anew), play the scenario, stop everything.

    Args:
        name: one of SCENARIOS.
        folder: of the demonstration.
        progress: gets what happens, in words.
        rate: requests a second.

    Raises:
        DemoError: something could not be started, a switch did not complete, or a model stayed loaded.
    """
    async with turnout_up(folder, progress, _SETTINGS) as (nats, gateway), connect(nats, actor="demo") as client:
        await worker_joins(client)
        registry = DynamicModelRegistry(BaseRegistry(), client)
        for seed, version in enumerate(sorted(set(_VISITS)) if name == "hold" else ("v1",)):
            await registry.register_model(MODEL, version, EngineSpec("fake", args=(*_ENGINE, f"--seed={seed}")))
        if name == "hold":
            outcome, answers = await _hold(client, gateway, rate, progress)
        else:
            outcome, answers = await _on_demand(client, registry, gateway, rate, progress)
        log = [recorded async for recorded in client.log()]
        found = await client.views("worker.w1")
        return _report(name, outcome, answers, log, found["worker.w1"].memory_bytes)


async def _hold(client: Client, gateway: str, rate: float, progress: Progress) -> tuple[str, list[Answer]]:
    """Switch to and fro under load."""
    switcher, load = ModelSwitcher(client), Clients(gateway, MODEL, rate, client.clock, max_tokens=_TOKENS)
    outcome = ""
    try:
        for number, version in enumerate(_VISITS):
            progress(f"switching to {version}")
            operation = await switcher.switch_model(MODEL, version, bake_s=0.0, hold=True)
            view = await operation.wait(_PATIENCE_S)
            outcome = view.phase
            if outcome != "completed":
                raise DemoError(f"the switch to {version} ended {outcome}: {view.reason}")
            if number == 0:
                load.start()
            await asyncio.sleep(_SERVES_S)
    finally:
        progress("waiting for the last answers")
        await load.stop()
    return outcome, load.answers


async def _on_demand(
    client: Client, registry: DynamicModelRegistry, gateway: str, rate: float, progress: Progress
) -> tuple[str, list[Answer]]:
    """Ask, be silent until the model has gone, and ask again."""
    await registry.set_serving(MODEL, Serving(on_demand=True, keep_alive_s=_KEEP_ALIVE_S), version="v1")
    answers: list[Answer] = []
    for number in range(2):
        progress("asking for what is not loaded")
        load = Clients(gateway, MODEL, rate, client.clock, max_tokens=_TOKENS)
        load.start()
        try:
            await _loaded(client, wanted=True)
            await asyncio.sleep(_SERVES_S)
        finally:
            await load.stop()
        answers += load.answers
        if number == 0:
            progress("asking for nothing until it is unloaded")
            await _loaded(client, wanted=False)
    return "served", answers


async def _loaded(client: Client, *, wanted: bool) -> None:
    """Wait until an engine is ready, or until there is none at all."""
    try:
        async with asyncio.timeout(_PATIENCE_S), client.follow("worker.w1") as following:
            while True:
                phases = [one.phase for view in following.views.values() for one in view.instances.values()]
                if "ready" in phases if wanted else not phases:
                    return
                await following.moved()
    except TimeoutError:
        state = "ready" if wanted else "unloaded"
        raise DemoError(f"{MODEL} was not {state} within {_PATIENCE_S:g} s: turnout log tells why") from None


def _report(name: str, outcome: str, answers: list[Answer], log: list[Recorded], memory: int) -> WaitingReport:
    bad = [a for a in answers if a.outcome != "ok"]
    failed, cut = (sum(a.outcome == word for a in bad) for word in ("failed", "cut"))
    readies = [(r.envelope.time, r.event) for r in log if isinstance(r.event, InstanceReady)]
    asked = {r.event.instance: (r.envelope.time, r.event) for r in log if isinstance(r.event, InstanceRequested)}
    ready_at, ready = readies[-1]
    asked_at, request = asked[ready.instance]
    pause: Pause | None = None
    if name == "hold":
        begun = [r.event for r in log if isinstance(r.event, HoldStarted)][-1]
        ended = [r.event for r in log if isinstance(r.event, HoldReleased)][-1]
        pause, since = Pause(begun.expected_s, round(ended.seconds, 3)), begun.at
        ready_s = [r.event.seconds for r in log if isinstance(r.event, TargetReady)][-1]
    else:
        since = [r.envelope.time for r in log if isinstance(r.event, InstanceStopped) and r.envelope.time < asked_at][
            -1
        ]
        ready_s = (ready_at - asked_at).total_seconds()
    waits = _waits(answers, request.version, since, ready_at)
    foretold = pause is None or pause.foretold is not None
    return WaitingReport(
        scenario=name,
        outcome=outcome,
        tier=ready.tier,
        ready_s=round(ready_s, 3),
        failed=failed,
        cut=cut,
        requests=len(answers),
        held=len(waits),
        longest_wait_s=round(max(waits, default=0.0), 3),
        pause_s=pause,
        bytes_estimated=request.bytes,
        bytes_measured=ready.bytes,
        memory_bytes=memory,
        loads=len(readies),
        final_version=request.version,
        as_planned=outcome in ("completed", "served") and bool(waits) and foretold and not bad,
        reasons=tuple(dict.fromkeys(a.reason for a in bad))[:5],
    )


def _waits(answers: list[Answer], version: str, since: datetime, until: datetime) -> list[float]:
    """Seconds to the first token of what a version answered although it was asked before it was there."""
    return [
        (a.total_ms if a.first_ms is None else a.first_ms) / 1000
        for a in answers
        if a.version == version and since <= a.sent < until
    ]
