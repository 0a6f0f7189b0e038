"""What collecting evidence costs a gateway: its data plane with health collection beside the same without it.

One process does both in turn, in many rounds, on one core; upstream and load have another one. The figure is processor
time for each request, because that is what bounds the rate of a gateway that has a core for itself, and because other
work on the machine disturbs it least. Each round gives one ratio; what is shown is their median.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import load
import msgspec
import processes
import report
import system
import wrk

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECTIONS = 16
STREAMS = 8
CHUNKS = 50
PAUSE_US = 2_000
GOAL = 0.05

_BENCH = report.ROOT / "bench"
_ROUTES = {"one version serves": (), "two versions are compared": ("--compared",)}


class Plane(msgspec.Struct):
    """One running data plane."""

    port: int
    pid: int


class Round(msgspec.Struct):
    """Processor time in µs, with collection and without, and answers per second."""

    request_us: tuple[float, float]
    chunk_us: tuple[float, float]
    per_s: tuple[float, float]


def run(quick: bool) -> report.Outcome:
    """Measure both routes."""
    rounds = 3 if quick else 9
    core, load_core = processes.cores()
    found: dict[str, list[Round]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name, _planes(Path(name), core, load_core) as planes:
        system.pinned(load_core)
        script = Path(name) / "wrk.lua"
        if wrk.installed():
            wrk.write_script(script, load.body())
        for turn in range(rounds):
            for route, plane in planes.items():
                # Collection is on at the start of the even rounds and off at the start of the odd ones.
                first = _measured(plane, script, load_core)
                os.kill(plane.pid, signal.SIGUSR1)
                second = _measured(plane, script, load_core)
                (a, b, c), (d, e, f) = (second, first) if turn % 2 else (first, second)
                found.setdefault(route, []).append(Round((a, d), (b, e), (c, f)))
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    return _outcome(found, rounds)


@contextlib.contextmanager
def _planes(folder: Path, core: int, load_core: int) -> Iterator[dict[str, Plane]]:
    """A data plane for each route."""
    socket = folder / "engine.sock"
    with contextlib.ExitStack() as stack:
        argv = [sys.executable, str(_BENCH / "upstream.py"), "--socket", str(socket)]
        upstream = stack.enter_context(processes.Process(argv, folder / "upstream.log", core=load_core))
        upstream.wait_for(lambda: processes.accepts(str(socket)), "upstream")

        def plane(*flags: str) -> Plane:
            port = processes.free_port()
            argv = [sys.executable, str(_BENCH / "plane.py"), "--port", str(port), "--upstream", f"unix:{socket}"]
            log = folder / f"plane-{port}.log"
            made = stack.enter_context(
                processes.Process([*argv, *flags], log, core=core, env=report.environment(), cwd=folder)
            )
            made.wait_for(lambda: processes.accepts(port), "plane")
            return Plane(port, made.pid)

        yield {route: plane(*flags) for route, flags in _ROUTES.items()}


def _measured(plane: Plane, script: Path, core: int) -> tuple[float, float, float]:
    """µs for a request, µs for a chunk, requests per second."""
    before = processes.cpu_s(plane.pid)
    if wrk.installed():
        flow = wrk.run(plane.port, script, CONNECTIONS, 1, core)
        requests, per_s = flow.requests, flow.requests / flow.seconds
    else:
        many = load.many(plane.port, load.request(load.body()), CONNECTIONS, 1.0)
        requests, per_s = len(many.latencies_s), many.per_s
    request_us = (processes.cpu_s(plane.pid) - before) / max(1, requests) * 1e6
    before = processes.cpu_s(plane.pid)
    asked = load.request(load.body(chunks=CHUNKS, pause_us=PAUSE_US))
    streams = load.streams(plane.port, asked, STREAMS, 0.7)
    chunk_us = (processes.cpu_s(plane.pid) - before) / max(1, len(streams.delays_s)) * 1e6
    return request_us, chunk_us, per_s


def _outcome(found: dict[str, list[Round]], rounds: int) -> report.Outcome:
    rows: list[list[str]] = []
    costs: dict[str, dict[str, float]] = {}
    for route, own in found.items():
        ratios = [
            ("a request", [r.request_us for r in own]),
            (f"a chunk of a stream of {CHUNKS}", [r.chunk_us for r in own]),
        ]
        each = {what: [a / b - 1 for a, b in pairs] for what, pairs in ratios}
        costs[route] = {what: report.median(pairs) for what, pairs in each.items()}
        costs[route]["rate"] = 1 - report.median(r.per_s[0] / r.per_s[1] for r in own)
        rows += [
            [
                route,
                what,
                f"{report.median(a for a, _ in pairs):.1f}",
                f"{report.median(b for _, b in pairs):.1f}",
                f"{100 * costs[route][what]:+.1f} %",
                f"{100 * report.percentile(each[what], 25):+.1f} to {100 * report.percentile(each[what], 75):+.1f} %",
            ]
            for what, pairs in ratios
        ]
    worst = max(cost["a request"] for cost in costs.values())
    return report.Outcome(
        figures={
            "rounds": rounds,
            "cost": costs,
            "measured": {route: [msgspec.to_builtins(r) for r in own] for route, own in found.items()},
        },
        tables=[
            report.Table(
                "Health collection: processor time with and without it",
                ["route", "for", "with (µs)", "without (µs)", "cost", "middle half"],
                rows,
                [
                    f"Medians of {rounds} rounds of pairs, and between what the middle half of the pairs lies; "
                    f"{CONNECTIONS} connections, {STREAMS} streams with a chunk "
                    f"each {PAUSE_US / 1000:g} ms."
                ],
            )
        ],
        goals=[
            report.Goal(
                "health collection, of a gateway's maximum rate",
                f"< {100 * GOAL:g} %",
                f"{100 * worst:.1f} %",
                worst < GOAL,
            )
        ],
    )


if __name__ == "__main__":
    raise SystemExit(report.main("collection", run))
