"""The demonstration: everything on this machine, real streaming clients, switches under load, and the figures.

Measures only from outside (what clients saw) and from the log (what was decided when). Knows the client library and how
to start ``turnout up``; prints nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from turnout.core.switch import ENDED
from turnout.events.envelope import Recorded
from turnout.events.model import EngineSpec
from turnout.events.switch import DrainStarted, StepApplied, StepStarted, SwitchRequested, TargetReady
from turnout.workers import running
from turnout.workers.client import Client, DynamicModelRegistry, ModelSwitcher, SwitchOperation, connect
from turnout.workers.load import Answer, Clients, Window, quantile, stale
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable
    from pathlib import Path

    from turnout.projections.switches import SwitchView

MODEL = "chat"
#: How long ``turnout up`` may take until its gateway answers, seconds.
_UP_S = 60.0


class DemoError(Exception):
    """The demonstration could not go on; the message says why and what to do."""


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown.

    Attributes:
        versions: the two versions, by name, in the order in which they serve.
        rate: requests each second, in an open loop.
        seconds: of load before the first switch, between two switches, and after the last one, together.
        switches: how many, back and forth, the last one by ``undo``.
        bake_s: bake of each switch.
        patience_s: until a target must carry all traffic; a real engine on a small machine takes minutes to load.
        prompt: what the clients ask.
        max_tokens: of each answer.
    """

    versions: dict[str, EngineSpec]
    rate: float
    seconds: float
    switches: int
    bake_s: float
    patience_s: float
    prompt: str
    max_tokens: int


class Latency(msgspec.Struct, frozen=True):
    """Of whole answers, ms; None where there was none. ``first``: until the first token."""

    requests: int
    p50_ms: float | None
    p95_ms: float | None
    first_p50_ms: float | None
    first_p95_ms: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What happened.

    Attributes:
        requests: answered or not, all of them.
        failed: no answer, or an error.
        cut: a stream that began and did not end as it should.
        stale: answered by the old version though sent after every gateway had acknowledged the new one.
        switches: how many were completed.
        ready_s: seconds to a proven target, of the first switch under load (the only one that loads).
        cutover_ms_p50: from the accepted command (or, where the target had to be loaded, from its proof) to the last
            gateway's acknowledgement; ``p99`` likewise.
        drain_s: the longest drain.
        p95_before_ms, p95_during_ms: latency of whole answers, before the first switch and while one ran.
        reasons: of what was not ok, at most five.
    """

    engine: str
    requests: int
    failed: int
    cut: int
    stale: int
    switches: int
    ready_s: float | None
    cutover_ms_p50: float | None
    cutover_ms_p99: float | None
    drain_s: float | None
    p50_before_ms: float | None
    p50_during_ms: float | None
    p50_after_ms: float | None
    p95_before_ms: float | None
    p95_during_ms: float | None
    p95_after_ms: float | None
    versions: dict[str, int]
    samples: dict[str, str]
    reasons: tuple[str, ...] = ()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The report, the three windows' latency, and the log that it was read from."""

    report: Report
    latency: dict[str, Latency]
    log: list[Recorded]


Progress = Callable[[str], None]


async def run(script: Script, folder: Path, progress: Progress) -> Outcome:
    """Start everything in ``folder`` (made anew), run the script, stop everything.

    Raises:
        DemoError: something could not be started, or a switch did not complete.
    """
    async with turnout_up(folder, progress) as (nats, gateway), connect(nats, actor="demo") as client:
        await worker_joins(client)
        registry = DynamicModelRegistry(BaseRegistry(), client)
        for version, engine in script.versions.items():
            progress(f"registering {MODEL} {version}")
            await registry.register_model(MODEL, version, engine, note=f"demo, {engine.kind} engine")
        return await _show(script, client, gateway, progress)


@contextlib.asynccontextmanager
async def turnout_up(folder: Path, progress: Progress, settings: str = "") -> AsyncGenerator[tuple[str, str]]:
    """``turnout up`` in a process group of its own and a folder that is made anew.

    Yields the addresses of NATS and of the gateway. ``settings``: text of its turnout.toml; empty for the one that is
    used here.

    Raises:
        DemoError: it did not start.
    """
    progress("starting turnout up")
    options = _prepare(folder, settings)
    log = folder / "up.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "turnout.workers.cli", "up", "--folder", str(folder), "--port", "0", *options),
            stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        found = await _started(process, folder, log)
        yield found.nats, found.gateway
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _prepare(folder: Path, settings: str) -> tuple[str, ...]:
    """Make the folder anew; how ``turnout up`` is told of the settings."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if not settings:
        return ()
    file = folder / "turnout.toml"
    file.write_text(settings)
    return ("--config", str(file))


async def _started(process: asyncio.subprocess.Process, folder: Path, log: Path) -> running.Running:
    """Wait until ``turnout up`` says where it listens."""
    try:
        async with asyncio.timeout(_UP_S):
            while (found := running.find(folder)) is None or not found.gateway:
                if process.returncode is not None:
                    break
                await asyncio.sleep(0.05)
            else:
                return found
    except TimeoutError:
        pass
    raise DemoError(f"turnout up did not start; it said:\n{_last_lines(log)}")


async def worker_joins(client: Client) -> None:
    """Wait until a worker may be asked to load something: it says so after ``turnout up`` is there.

    Raises:
        DemoError: none came.
    """
    try:
        async with asyncio.timeout(_UP_S), client.follow("worker.*") as following:
            while not any(view.state == "live" for view in following.views.values()):
                await following.moved()
    except TimeoutError:
        raise DemoError("no worker has joined; its log is worker.log in the folder of the demo") from None


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-12:])


async def _show(script: Script, client: Client, gateway: str, progress: Progress) -> Outcome:
    switcher = ModelSwitcher(client)
    names = list(script.versions)
    first = await switcher.switch_model(
        MODEL, names[0], reason="the first version", max_transition_time_s=script.patience_s
    )
    await _follow(first, progress)
    load = Clients(gateway, MODEL, script.rate, client.clock, prompt=script.prompt, max_tokens=script.max_tokens)
    pause_s = script.seconds / (script.switches + 1)
    begun = client.clock.now()
    load.start()
    done: list[SwitchView] = []
    try:
        progress(f"clients ask {script.rate:g} times a second")
        await asyncio.sleep(pause_s)
        for n in range(1, script.switches + 1):
            # The old version is warm through the bake: an undo then needs no load.
            if n == script.switches and n > 1:
                operation = await switcher.undo(MODEL, reason="show the way back")
            else:
                target = names[n % len(names)]
                operation = await switcher.switch_model(
                    MODEL,
                    target,
                    reason=f"switch {n} of {script.switches}",
                    bake_s=script.bake_s,
                    max_transition_time_s=script.patience_s,
                )
            done.append(await _follow(operation, progress))
            await asyncio.sleep(pause_s)
    finally:
        progress("waiting for the last answers")
        await load.stop()
    log = [recorded async for recorded in client.log()]
    return _judge(script, load.answers, done, log, begun)


async def _follow(operation: SwitchOperation, progress: Progress) -> SwitchView:
    said = ""
    async for view in operation.progress():
        text = f"{view.model} {view.source or 'nothing'} → {view.target}: {view.phase.replace('_', ' ')}"
        if text != said:
            progress(text)
            said = text
        if view.phase in ENDED:
            if view.phase != "completed":
                tail = "".join(f"\n    {line}" for line in view.log_tail[-12:])
                raise DemoError(f"the switch to {view.target} {view.phase.replace('_', ' ')}: {view.reason}{tail}")
            return view
    raise DemoError(f"switch {operation.id} was lost")


class _Times(msgspec.Struct):
    """When one switch did what (UTC)."""

    target: str
    requested: datetime
    ready: datetime | None = None
    warm: bool = False
    begun: datetime | None = None
    applied: datetime | None = None
    draining: datetime | None = None


def _times(log: list[Recorded]) -> list[_Times]:
    times: dict[str, _Times] = {}
    for recorded in log:
        at = recorded.envelope.time
        match recorded.event:
            case SwitchRequested(switch, _, target):
                times[switch] = _Times(target, at)
            case TargetReady(switch, _, _, warm):
                times[switch].ready, times[switch].warm = at, warm
            case StepStarted(switch):
                times[switch].begun = at
            case StepApplied(switch):
                times[switch].applied = at
            case DrainStarted(switch):
                times[switch].draining = at
            case _:
                pass
    return list(times.values())


def _judge(
    script: Script, answers: list[Answer], done: list[SwitchView], log: list[Recorded], begun: datetime
) -> Outcome:
    times = _times(log)
    ends = [t.begun for t in times[1:] if t.begun is not None]
    far = max((a.ended for a in answers), default=begun)
    windows = [
        Window(t.target, t.applied, min((e for e in ends if e > t.applied), default=far))
        for t in times
        if t.applied is not None
    ]
    under_load = times[1:]
    cutovers = [
        (t.applied - (t.requested if t.warm or t.ready is None else t.ready)).total_seconds() * 1000
        for t in under_load
        if t.applied is not None
    ]
    running_spans = [(v.requested_at, v.ended_at) for v in done if v.requested_at and v.ended_at]
    start = min((s for s, _ in running_spans), default=far)
    end = max((e for _, e in running_spans), default=far)
    latency = {
        "before": _latency(a for a in answers if a.ended < start),
        "during": _latency(a for a in answers if any(a.sent < e and a.ended > s for s, e in running_spans)),
        "after": _latency(a for a in answers if a.sent > end),
    }
    counts = {version: sum(1 for a in answers if a.version == version) for version in script.versions}
    samples = {a.version: a.text for a in answers if a.outcome == "ok"}
    report = Report(
        engine=next(iter(script.versions.values())).kind,
        requests=len(answers),
        failed=sum(1 for a in answers if a.outcome == "failed"),
        cut=sum(1 for a in answers if a.outcome == "cut"),
        stale=len(stale(answers, windows)),
        switches=len(done),
        ready_s=next((v.ready_s for v in done if not v.warm), None),
        cutover_ms_p50=_round(quantile(cutovers, 0.5)),
        cutover_ms_p99=_round(quantile(cutovers, 0.99)),
        drain_s=max((v.drain_s for v in done if v.drain_s is not None), default=None),
        p50_before_ms=latency["before"].p50_ms,
        p50_during_ms=latency["during"].p50_ms,
        p50_after_ms=latency["after"].p50_ms,
        p95_before_ms=latency["before"].p95_ms,
        p95_during_ms=latency["during"].p95_ms,
        p95_after_ms=latency["after"].p95_ms,
        versions=counts,
        samples=samples,
        reasons=tuple(dict.fromkeys(a.reason for a in answers if a.reason))[:5],
    )
    return Outcome(report=report, latency=latency, log=log)


def _latency(answers: Iterable[Answer]) -> Latency:
    ok = [a for a in answers if a.outcome == "ok"]
    total = [a.total_ms for a in ok]
    first = [a.first_ms for a in ok if a.first_ms is not None]
    return Latency(
        len(ok),
        _round(quantile(total, 0.5)),
        _round(quantile(total, 0.95)),
        _round(quantile(first, 0.5)),
        _round(quantile(first, 0.95)),
    )


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
