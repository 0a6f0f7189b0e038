"""What a gateway costs: turnout beside nginx, vllm-router and no proxy at all, in one run with the same pinning.

The proxy that is measured has one core for itself; upstream, load and everything else share another one. All proxies
run from the start, each is measured in turn, and again, in many rounds; the figures are medians over the rounds. The
share of its core that a proxy used is shown: below about 95 % something else was the limit. A block during which the
hypervisor took processor time away is measured again; how often is shown too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import load
import msgspec
import processes
import report
import rivals
import system
import wrk

from turnout.core.switch import FORWARD
from turnout.workers.client import ModelSwitcher, connect

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECTIONS = 16
STREAMS = 8
CHUNKS = 50
PAUSE_US = 10_000

DIRECT = "no proxy"
NGINX_TCP = "nginx, TCP upstream"
NGINX_UNIX = "nginx, Unix-socket upstream"
ROUTER = f"vllm-router {rivals.VLLM_ROUTER}, TCP upstream"
TURNOUT_UNIX = "turnout, Unix-socket upstream"
TURNOUT_TCP = "turnout, TCP upstream"

#: A block with more stolen time than this share of one core is measured again, at most so often.
STOLEN_MOST = 0.02
RETRIES = 4

UPSTREAM = str(report.ROOT / "bench" / "upstream.py")
_CONFIGURATION = """
[worker.policy]
commands = [{allowed}]

[models.chat]
active = "v1"
[models.chat.versions.v1]
engine = "openai"
command = {command_1}
[models.chat.versions.v2]
engine = "openai"
command = {command_2}

[models.chat-tcp]
active = "v1"
[models.chat-tcp.versions.v1]
engine = "openai"
url = "http://127.0.0.1:{port_1}"
[models.chat-tcp.versions.v2]
engine = "openai"
url = "http://127.0.0.1:{port_2}"
"""


class Contestant(msgspec.Struct):
    """One way to the upstream. ``cpu_s``: processor time of the proxy so far; ``model``: the served name to ask for."""

    name: str
    port: int
    cpu_s: Callable[[], float]
    model: str = "chat"


class Block(msgspec.Struct):
    """One measurement of one contestant. Times in microseconds; ``busy``: the proxy's share of its core."""

    p50_us: float
    p99_us: float
    per_s: float
    busy: float
    cpu_us: float
    chunk_p50_us: float
    chunk_p99_us: float
    failed: int
    stolen: float


def run(quick: bool) -> report.Outcome:
    """Measure all that is installed."""
    rounds = 3 if quick else 15
    system.many_files()
    measured, load_core = processes.cores()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, _contestants(Path(name), measured, load_core) as found:
        system.pinned(load_core)
        meter = _Meter(Path(name), load_core)
        blocks: dict[str, list[Block]] = {one.name: [] for one in found}
        for one in found:
            meter.warm(one)
        for _ in range(rounds):
            for one in found:
                blocks[one.name].append(meter.block(one))
        again = meter.again
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    return _outcome(blocks, again, rounds)


@contextlib.contextmanager
def _contestants(folder: Path, core: int, load_core: int) -> Iterator[list[Contestant]]:
    """Start everything: turnout with the upstream as its engines, and the others in front of the same upstream."""
    ports = processes.free_port(), processes.free_port()
    command = [system.command(sys.executable, UPSTREAM, "--socket", "{socket}", "--port", str(p)) for p in ports]
    configuration = _CONFIGURATION.format(
        allowed=f'"{sys.executable} {UPSTREAM}"',
        command_1=command[0],
        command_2=command[1],
        port_1=ports[0],
        port_2=ports[1],
    )
    with contextlib.ExitStack() as stack:
        turnout = stack.enter_context(system.Turnout(folder / "turnout", configuration, core=load_core))
        # Two versions in the route, all traffic on v2: the choice by weight is made for every request.
        socket = asyncio.run(_two_versions(turnout.nats))
        gateway = turnout.gateway_pid()
        processes.pin(gateway, core)
        found = [Contestant(DIRECT, ports[1], lambda: 0.0)]
        if rivals.nginx_path():
            nginx = rivals.Nginx(folder / "nginx", core, ports[1], socket)
            stack.callback(nginx.process.stop)
            found.append(Contestant(NGINX_TCP, nginx.tcp_port, nginx.process.cpu_s))
            found.append(Contestant(NGINX_UNIX, nginx.unix_port, nginx.process.cpu_s))
        else:
            print(
                "nginx is not installed (Debian: apt-get install nginx-light): its rows are left out", file=sys.stderr
            )
        if rivals.install_vllm_router():
            router = rivals.VllmRouter(folder / "router", core, ports[1])
            stack.callback(router.process.stop)
            found.append(Contestant(ROUTER, router.port, router.process.cpu_s))
        found.append(Contestant(TURNOUT_TCP, turnout.port, lambda: processes.cpu_s(gateway), "chat-tcp"))
        found.append(Contestant(TURNOUT_UNIX, turnout.port, lambda: processes.cpu_s(gateway)))
        yield found


async def _two_versions(nats: str) -> Path:
    """Switch both models to v2 with a long bake; returns the socket of v2's engine."""
    async with connect(nats, actor="bench") as client:
        switcher = ModelSwitcher(client)
        for model in ("chat", "chat-tcp"):
            while not (await client.model(model)).active:  # noqa: ASYNC110  a view, looked at now and then
                await asyncio.sleep(0.05)
            operation = await switcher.switch_model(model, "v2", bake_s=86_400.0, reason="bench")
            async for view in operation.progress():
                if view.phase == "baking":
                    break
                if view.phase not in ("requested", "loading", "ready", *FORWARD):
                    raise RuntimeError(f"the switch of {model} {view.phase}: {view.reason}")
        views = await client.views("route.chat")
        (route,) = views.values()
        address: str = next(s for s in route.splits if s.version == "v2").endpoints[0].address
        return Path(address.removeprefix("unix:"))


class _Meter:
    """Measures blocks, again where the hypervisor disturbed."""

    def __init__(self, folder: Path, core: int) -> None:
        self.again = 0
        self._folder = folder
        self._core = core

    def warm(self, one: Contestant) -> None:
        self._once(one)

    def block(self, one: Contestant) -> Block:
        tries = [self._once(one)]
        while tries[-1].stolen > STOLEN_MOST and len(tries) <= RETRIES:
            self.again += 1
            tries.append(self._once(one))
        return min(tries, key=lambda block: block.stolen)

    def _once(self, one: Contestant) -> Block:
        host = processes.Host()
        message = load.body(one.model)
        single = load.OneByOne(one.port, load.request(message))
        single.measure(50)
        flow = single.measure(800)
        single.close()
        begin, cpu = time.monotonic(), one.cpu_s()
        per_s, requests, failed = self._many(one.port, message)
        used, seconds = one.cpu_s() - cpu, time.monotonic() - begin
        asked = load.body(one.model, chunks=CHUNKS, pause_us=PAUSE_US)
        streams = load.streams(one.port, load.request(asked), STREAMS, 2.0)
        return Block(
            p50_us=report.median(flow.latencies_s) * 1e6,
            p99_us=report.percentile(flow.latencies_s, 99) * 1e6,
            per_s=per_s,
            busy=used / seconds,
            cpu_us=used / requests * 1e6,
            chunk_p50_us=report.median(streams.delays_s) * 1e6,
            chunk_p99_us=report.percentile(streams.delays_s, 99) * 1e6,
            failed=flow.failed + failed + streams.failed,
            stolen=host.stolen,
        )

    def _many(self, port: int, message: bytes) -> tuple[float, int, int]:
        if wrk.installed():
            script = self._folder / "wrk.lua"
            wrk.write_script(script, message)
            flow = wrk.run(port, script, CONNECTIONS, 2, self._core)
            return flow.requests / flow.seconds, flow.requests, flow.failed
        seen = load.many(port, load.request(message), CONNECTIONS, 2.0)
        return seen.per_s, round(seen.per_s * 2.0), seen.failed


def _outcome(blocks: dict[str, list[Block]], again: int, rounds: int) -> report.Outcome:
    base = blocks[DIRECT]
    rows: list[list[str]] = []
    ratios: list[list[str]] = []
    figures: dict[str, object] = {"rounds": rounds, "measured_again": again}
    for name, own in blocks.items():
        figures[name] = {
            field: report.median(getattr(block, field) for block in own) for field in Block.__struct_fields__
        }
        rows.append(
            [
                name,
                _us(b.p50_us for b in own),
                _us(b.p99_us for b in own),
                _us(_less(own, base, "p50_us")) if own is not base else "",
                f"{report.median(b.per_s for b in own):,.0f}",
                f"{100 * report.median(b.busy for b in own):.0f} %" if own is not base else "",
                f"{report.median(b.cpu_us for b in own):.0f}" if own is not base else "",
                _us(b.chunk_p50_us for b in own),
                _us(_less(own, base, "chunk_p50_us")) if own is not base else "",
                _us(b.chunk_p99_us for b in own),
                str(sum(b.failed for b in own)),
            ]
        )
    goals: list[report.Goal] = []
    for other in (NGINX_TCP, NGINX_UNIX, ROUTER):
        if other not in blocks:
            continue
        for name in (TURNOUT_UNIX, TURNOUT_TCP):
            added, per_s, chunk = _ratios(blocks[name], blocks[other], base)
            ratios.append([f"{name} / {other}", f"{added:.2f}", f"{per_s:.2f}", f"{chunk:.2f}"])
            figures[f"{name} / {other}"] = {"added_p50": added, "per_s": per_s, "added_chunk_p50": chunk}
    ours = blocks[TURNOUT_UNIX]
    if NGINX_TCP in blocks:
        added, per_s, chunk = _ratios(ours, blocks[NGINX_TCP], base)
        goals += [
            report.Goal("added p50, one connection", "≤ 1.15 x nginx (TCP)", f"{added:.2f} x", added <= 1.15),
            report.Goal("requests/s, 16 connections", "≥ 0.9 x nginx (TCP)", f"{per_s:.2f} x", per_s >= 0.9),
            report.Goal("added per streamed chunk, p50", "≤ 1 x nginx (TCP)", f"{chunk:.2f} x", chunk <= 1.0),
        ]
    if ROUTER in blocks:
        _, per_s, _ = _ratios(ours, blocks[ROUTER], base)
        goals.append(report.Goal("requests/s, 16 connections", "≥ 3 x vllm-router", f"{per_s:.2f} x", per_s >= 3.0))
    figures["blocks"] = {name: [msgspec.to_builtins(b) for b in own] for name, own in blocks.items()}
    generator = "wrk" if wrk.installed() else "bench/load.py"
    return report.Outcome(
        figures=figures,
        tables=[
            report.Table(
                "One proxy on one core; upstream and load on another",
                [
                    "",
                    "p50, 1 conn (µs)",
                    "p99",
                    "added p50",
                    f"requests/s, {CONNECTIONS} conns",
                    "core used",
                    "CPU µs/request",
                    "chunk p50 (µs)",
                    "added",
                    "chunk p99",
                    "failed",
                ],
                rows,
                [
                    f"Medians of {rounds} rounds; {again} blocks were measured again because more than "
                    f"{100 * STOLEN_MOST:g} % of a core was stolen by the hypervisor. Load: {generator} with request "
                    f"bodies of {len(load.body())} bytes; chunk: {STREAMS} streams with a chunk each "
                    f"{PAUSE_US / 1000:g} ms, from the upstream's write to the client's read.",
                    "turnout: everything on (metrics, tracking, request id, choice between two versions), one process, "
                    f"nginx {rivals.nginx_version() or 'not installed'}: one worker, no log, kept-alive upstream.",
                ],
            ),
            report.Table(
                "Ratios (medians of the rounds' ratios)",
                ["", "added p50", "requests/s", "added per chunk"],
                ratios,
            ),
        ],
        goals=goals,
    )


def _ratios(ours: list[Block], theirs: list[Block], base: list[Block]) -> tuple[float, float, float]:
    """Added p50, requests/s and added time per chunk, each as ours / theirs."""
    added = _quotients(_less(ours, base, "p50_us"), _less(theirs, base, "p50_us"))
    chunk = _quotients(_less(ours, base, "chunk_p50_us"), _less(theirs, base, "chunk_p50_us"))
    per_s = _quotients([b.per_s for b in ours], [b.per_s for b in theirs])
    return report.median(added), report.median(per_s), report.median(chunk)


def _less(own: list[Block], base: list[Block], field: str) -> list[float]:
    return [getattr(a, field) - getattr(b, field) for a, b in zip(own, base, strict=True)]


def _quotients(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True) if b > 0]


def _us(values: Iterator[float] | list[float]) -> str:
    return f"{report.median(values):,.0f}"


if __name__ == "__main__":
    raise SystemExit(report.main("gateway", run))
