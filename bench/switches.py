"""Switches under load: how fast all gateways follow a command, and what the clients notice of it.

``turnout up`` with two fake-engine versions that stay warm, switched back and forth without a bake. *Cutover* is taken
twice: from the log (the switch was accepted → the last gateway's acknowledgement was recorded) and from outside (just
before the command is sent → the last request is sent that the old version answered).

What clients notice is taken in pairs: a window in which switches follow each other without a rest, beside one of the
same length without any, in turns which of them comes first. The figure is the median of the pairs' ratios of p95, so
that a machine whose speed drifts, or that others use too, slows down both sides.

    python bench/switches.py [--quick] [--switches 1000]
"""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import busy
import msgspec
import report
import system

from turnout.events.gateway import RouteApplied
from turnout.events.switch import StepApplied, StepStarted, SwitchCompleted, SwitchRequested, TargetReady
from turnout.workers.client import ModelSwitcher, connect

if TYPE_CHECKING:
    from busy import Asked

    from turnout.events.envelope import Recorded
    from turnout.workers.client import Client

STREAMING = 12
TOKENS = 20
_ARGS = '["--first-token-ms=10", "--token-ms=5", "--tokens=20"]'
_CONFIGURATION = f"""
[models.chat]
active = "v1"
[models.chat.versions.v1]
engine = "fake"
args = {_ARGS}
[models.chat.versions.v2]
engine = "fake"
args = {_ARGS}
"""
GOAL_MS = 50.0
GOAL_SLOWER = 0.05
#: Switches in one window.
_EACH = 10
#: Between two windows: the requests of the one before end.
_REST_S = 0.3


class Switch(msgspec.Struct):
    """One switch: what the log says of it, in the clients' clock (CLOCK_MONOTONIC, nanoseconds)."""

    target: str
    asked_ns: int = 0
    answered_ns: int = 0
    requested_ns: int = 0
    ready_ns: int = 0
    step_ns: int = 0
    revision: int = 0
    applied_ns: int = 0
    recorded_ns: int = 0
    completed_ns: int = 0


class _Pair(msgspec.Struct):
    """Two windows of about the same length, side by side. Monotonic nanoseconds, from and to."""

    calm: tuple[int, int]
    busy: tuple[int, int]


def run(quick: bool, switches: int = 0) -> report.Outcome:
    """Switch about so many times (default: 40 where it is quick, else 400)."""
    wanted = switches or (40 if quick else 400)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        with system.Turnout(folder / "turnout", _CONFIGURATION) as turnout:
            return asyncio.run(_drive(turnout, folder / "seen", max(1, wanted // _EACH)))


async def _drive(turnout: system.Turnout, path: Path, wanted: int) -> report.Outcome:
    async with connect(turnout.nats, actor="bench") as client:
        await serve_both(client)
        with busy.Busy(turnout.port, STREAMING, TOKENS, path) as clients:
            await asyncio.sleep(1.0)
            done: list[tuple[str, Switch]] = []
            busy_s = 1.0
            pairs: list[_Pair] = []
            for n in range(wanted):
                first = await _calm(busy_s) if n % 2 else None
                switched = await _switched(client, done)
                busy_s = (switched[1] - switched[0]) / 1e9
                pairs.append(_Pair(first or await _calm(busy_s), switched))
            seen = await asyncio.to_thread(clients.stop)
        note_times(await whole_log(client), dict(done))
    return _outcome([one for _, one in done], seen, pairs)


async def _calm(seconds: float) -> tuple[int, int]:
    """Let the clients ask for so long while nothing is switched."""
    await asyncio.sleep(_REST_S)
    start = time.monotonic_ns()
    await asyncio.sleep(seconds)
    return start, time.monotonic_ns()


async def _switched(client: Client, done: list[tuple[str, Switch]]) -> tuple[int, int]:
    """Switch back and forth without a rest."""
    await asyncio.sleep(_REST_S)
    start = time.monotonic_ns()
    done += [await switch_to(client, "v2" if n % 2 == 0 else "v1") for n in range(_EACH)]
    return start, time.monotonic_ns()


async def serve_both(client: Client) -> None:
    """Load both versions once, so that every switch that is measured has a warm target."""
    while not (await client.model("chat")).active:  # noqa: ASYNC110  a view, looked at now and then
        await asyncio.sleep(0.05)
    for target in ("v2", "v1"):
        while (await client.model("chat")).switch:  # noqa: ASYNC110  likewise
            await asyncio.sleep(0.05)
        await switch_to(client, target)


async def switch_to(client: Client, target: str) -> tuple[str, Switch]:
    """One switch without a bake, to its end; its id and when it was asked for and answered."""
    asked_ns = time.monotonic_ns()
    operation = await ModelSwitcher(client).switch_model("chat", target, bake_s=0.0, reason="bench")
    answered_ns = time.monotonic_ns()
    view = await operation.wait(60.0)
    if view.phase != "completed":
        raise RuntimeError(f"the switch to {target} {view.phase}: {view.reason}")
    return operation.id, Switch(target, asked_ns, answered_ns)


async def whole_log(client: Client) -> list[Recorded]:
    """Every event so far."""
    last = await client.store.last_sequence()
    log: list[Recorded] = []
    whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def deliver(recorded: Recorded) -> None:
        log.append(recorded)
        if recorded.sequence >= last and not whole.done():
            whole.set_result(None)

    tail = await client.store.tail(0, deliver, whole.set_exception)
    try:
        await whole
    finally:
        await tail.close()
    return log


def note_times(log: list[Recorded], switches: dict[str, Switch]) -> None:
    """Note the log's times in the switches."""
    now_ns, now = time.monotonic_ns(), datetime.now(UTC)

    def at_ns(recorded: Recorded) -> int:
        return now_ns - round((now - recorded.envelope.time).total_seconds() * 1e9)

    by_revision: dict[int, Switch] = {}
    for recorded in log:
        match recorded.event:
            case SwitchRequested(id) if id in switches:
                switches[id].requested_ns = at_ns(recorded)
            case TargetReady(id) if id in switches:
                switches[id].ready_ns = at_ns(recorded)
            case StepStarted(id, _, _, revision) if id in switches:
                switches[id].revision, switches[id].step_ns = revision, at_ns(recorded)
                by_revision[revision] = switches[id]
            case RouteApplied(_, _, revision) if revision in by_revision:
                by_revision[revision].applied_ns = at_ns(recorded)
            case StepApplied(id) if id in switches:
                switches[id].recorded_ns = at_ns(recorded)
            case SwitchCompleted(id) if id in switches:
                switches[id].completed_ns = at_ns(recorded)
            case _:
                pass


def _outcome(done: list[Switch], seen: list[Asked], pairs: list[_Pair]) -> report.Outcome:
    seen.sort(key=lambda asked: asked.sent_ns)
    applied = _between(done, "requested_ns", "applied_ns")
    whole = _between(done, "requested_ns", "completed_ns")
    outside = [_outside_ms(one, seen) for one in done]
    answered = _between(done, "asked_ns", "answered_ns")
    failed = [a for a in seen if a.outcome == "failed"]
    cut = [a for a in seen if a.outcome == "cut"]
    stale = stale_answers(done, seen)
    streams = [a for a in seen if not a.probe and a.outcome == "ok"]
    sides = [(_within(streams, pair.calm), _within(streams, pair.busy)) for pair in pairs]
    before, during = ([a for side in sides for a in side[n]] for n in (0, 1))
    slower = sorted(_p95_ms(busy) / _p95_ms(calm) - 1 for calm, busy in sides)
    change = report.median(slower)
    share = _share_of_time(done, pairs)
    figures: dict[str, object] = {
        "switches": len(done),
        "requests": len(seen),
        "failed": len(failed),
        "cut": len(cut),
        "stale": len(stale),
        "cutover_ms_p50": report.percentile(applied, 50),
        "cutover_ms_p99": report.percentile(applied, 99),
        "cutover_ms_max": max(applied),
        "cutover_outside_ms_p50": report.percentile(outside, 50),
        "cutover_outside_ms_p99": report.percentile(outside, 99),
        "answer_ms_p50": report.percentile(answered, 50),
        "answer_ms_p99": report.percentile(answered, 99),
        "whole_switch_ms_p50": report.percentile(whole, 50),
        "whole_switch_ms_p99": report.percentile(whole, 99),
        "p95_before_ms": _p95_ms(before),
        "p95_during_ms": _p95_ms(during),
        "first_p95_before_ms": _first_p95_ms(before),
        "first_p95_during_ms": _first_p95_ms(during),
        "share_of_time_in_a_switch": share,
        "p95_slower_in_pairs": slower,
        "reasons": sorted({a.reason for a in (*failed, *cut)})[:5],
        "cutovers_ms": [round(ms, 3) for ms in applied],
    }
    p99 = report.percentile(applied, 99)
    low, high = _limits(slower)
    return report.Outcome(
        figures=figures,
        tables=[
            report.Table(
                f"{len(done)} switches with a warm target, {STREAMING} streaming clients and a prober",
                ["", "p50 (ms)", "p99", "max"],
                [
                    _row("accepted → last gateway's acknowledgement in the log", applied),
                    _row("… of it: accepted → target known to be ready", _between(done, "requested_ns", "ready_ns")),
                    _row("… of it: → step decided", _between(done, "ready_ns", "step_ns")),
                    _row("… of it: → last gateway's acknowledgement", _between(done, "step_ns", "applied_ns")),
                    _row("command sent → last request that the old version got", outside),
                    _row("command sent → answered", answered),
                    _row("accepted → old version drained, switch completed", whole),
                ],
                [
                    f"{len(seen):,} requests: {len(failed)} failed, {len(cut)} cut, {len(stale)} stale. "
                    f"Whole answers, p95, in {len(pairs)} pairs of windows without and with switches "
                    f"({100 * share:.0f} % of the time in the latter one was running): {100 * change:+.1f} %, "
                    f"95 % interval of the median {100 * low:+.1f} to {100 * high:+.1f} %; over all windows "
                    f"{_p95_ms(before):.1f} and {_p95_ms(during):.1f} ms. First byte, p95: "
                    f"{_first_p95_ms(before):.1f} and {_first_p95_ms(during):.1f} ms."
                ],
            )
        ],
        goals=[
            report.Goal("cutover p99, warm target", "< 50 ms", f"{p99:.1f} ms", p99 < GOAL_MS),
            report.Goal(
                "failed / cut / stale requests",
                "0 / 0 / 0",
                f"{len(failed)} / {len(cut)} / {len(stale)} of {len(seen):,}",
                not (failed or cut or stale),
            ),
            report.Goal(
                "latency p95 while it is switched, in pairs",
                "< 5 % above",
                f"{100 * change:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f} %)",
                change < GOAL_SLOWER,
            ),
        ],
    )


def _row(name: str, values: list[float]) -> list[str]:
    return [
        name,
        f"{report.percentile(values, 50):.1f}",
        f"{report.percentile(values, 99):.1f}",
        f"{max(values):.1f}",
    ]


def _between(done: list[Switch], start: str, end: str) -> list[float]:
    return [(getattr(one, end) - getattr(one, start)) / 1e6 for one in done]


def _outside_ms(one: Switch, seen: list[Asked]) -> float:
    """From just before the command to the sending of the last request that another version than the target answered."""
    late = [
        a.sent_ns for a in seen if one.asked_ns <= a.sent_ns < one.completed_ns and a.version not in ("", one.target)
    ]
    return (max(late) - one.asked_ns) / 1e6 if late else 0.0


def stale_answers(done: list[Switch], seen: list[Asked]) -> list[Asked]:
    """Answered by the old version though sent after every gateway had acknowledged, and before the next command."""
    found: list[Asked] = []
    ends = [one.asked_ns for one in done[1:]] + [seen[-1].ended_ns + 1]
    for one, end in zip(done, ends, strict=True):
        found += [a for a in seen if one.applied_ns < a.sent_ns < end and a.first_ns < end and a.version != one.target]
    return [a for a in found if a.version]


def _within(streams: list[Asked], window: tuple[int, int]) -> list[Asked]:
    """Requests that were sent and answered in the window: the same rule for both sides of a pair."""
    start, end = window
    return [a for a in streams if start <= a.sent_ns and a.ended_ns <= end]


def _limits(values: list[float]) -> tuple[float, float]:
    """95 % confidence limits of the median, by the order of the values (the sign test turned around)."""
    count, rank, tail = len(values), 0, 0.0
    while rank < count // 2 and (tail := tail + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    low = max(rank - 1, 0)
    return values[low], values[count - 1 - low]


def _share_of_time(done: list[Switch], pairs: list[_Pair]) -> float:
    inside = sum(one.completed_ns - one.requested_ns for one in done)
    return inside / sum(pair.busy[1] - pair.busy[0] for pair in pairs)


def _p95_ms(asked: list[Asked]) -> float:
    return report.percentile(((a.ended_ns - a.sent_ns) / 1e6 for a in asked), 95)


def _first_p95_ms(asked: list[Asked]) -> float:
    return report.percentile(((a.first_ns - a.sent_ns) / 1e6 for a in asked), 95)


if __name__ == "__main__":
    wanted = 0
    if "--switches" in sys.argv:
        at = sys.argv.index("--switches")
        wanted = int(sys.argv[at + 1])
        del sys.argv[at : at + 2]
    raise SystemExit(report.main("switches", lambda quick: run(quick, wanted)))
