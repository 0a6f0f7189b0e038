"""What a gateway costs: turnout beside nginx, vllm-router and no proxy at all, in one run with the same pinning.

The proxy that is measured has one core for itself; upstream, load and everything else share another one. All proxies
run from the start, each is measured in turn, and again, in many rounds; the figures are medians over the rounds. The
share of its core that a proxy used is shown: below about 95 % something else was the limit. A measurement during which
the hypervisor took processor time away is repeated; how often is shown too.
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
from typing import TYPE_CHECKING, TypeVar

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
    from collections.abc import Iterable, Iterator

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

#: A measurement with more stolen time than this share of one core is repeated, at most so often in a row.
STOLEN_MOST = 0.03
RETRIES = 3

M = TypeVar("M")

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


class Single(msgspec.Struct):
    """One connection, one request after the other. Microseconds."""

    p50_us: float
    p99_us: float
    failed: int


class Many(msgspec.Struct):
    """Closed loops. ``busy``: the proxy's share of its core; ``cpu_us``: its processor time for each request."""

    per_s: float
    busy: float
    cpu_us: float
    failed: int


class Chunks(msgspec.Struct):
    """From the upstream's write to the client's read of each chunk. Microseconds."""

    p50_us: float
    p99_us: float
    failed: int


class Block(msgspec.Struct):
    """What one round has measured of one contestant; ``stolen``: share of a core, in the worst of the three."""

    single: Single
    many: Many
    chunks: Chunks
    stolen: float


def run(quick: bool) -> report.Outcome:
    """Measure all that is installed."""
    rounds = 3 if quick else 7
    system.many_files()
    measured, load_core = processes.cores()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, _contestants(Path(name), measured, load_core) as found:
        system.pinned(load_core)
        meter = _Meter(Path(name), load_core, most=3 * rounds * len(found))
        blocks: dict[str, list[Block]] = {one.name: [] for one in found}
        for _ in range(rounds):
            for one in found:
                blocks[one.name].append(meter.block(one))
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    return _outcome(blocks, meter.again, rounds)


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
    """Measures, and measures again where the hypervisor disturbed: at most once for each measurement on average."""

    def __init__(self, folder: Path, core: int, most: int) -> None:
        self.again = 0
        self._most = most
        self._folder = folder
        self._core = core

    def block(self, one: Contestant) -> Block:
        """The three measurements of one contestant."""
        single, stolen_1 = self._calm(lambda: self._single(one))
        many, stolen_2 = self._calm(lambda: self._many(one))
        chunks, stolen_3 = self._calm(lambda: self._chunks(one))
        return Block(single, many, chunks, max(stolen_1, stolen_2, stolen_3))

    def _calm(self, measure: Callable[[], M]) -> tuple[M, float]:
        """The least disturbed of several tries, and how much was stolen during it."""
        tries: list[tuple[M, float]] = []
        while True:
            host = processes.Host()
            found = measure()
            tries.append((found, host.stolen))
            if host.stolen <= STOLEN_MOST or len(tries) > RETRIES or self.again >= self._most:
                return min(tries, key=lambda t: t[1])
            self.again += 1

    def _single(self, one: Contestant) -> Single:
        client = load.OneByOne(one.port, load.request(load.body(one.model)))
        client.measure(50)
        flow = client.measure(1_000)
        client.close()
        latencies_us = [s * 1e6 for s in flow.latencies_s]
        return Single(report.median(latencies_us), report.percentile(latencies_us, 99), flow.failed)

    def _many(self, one: Contestant) -> Many:
        body = load.body(one.model)
        cpu, begin = one.cpu_s(), time.monotonic()
        if wrk.installed():
            script = self._folder / "wrk.lua"
            wrk.write_script(script, body)
            flow = wrk.run(one.port, script, CONNECTIONS, 1, self._core)
            per_s, requests, failed = flow.requests / flow.seconds, flow.requests, flow.failed
        else:
            seen = load.many(one.port, load.request(body), CONNECTIONS, 1.0)
            per_s, requests, failed = seen.per_s, round(seen.per_s), seen.failed
        used, seconds = one.cpu_s() - cpu, time.monotonic() - begin
        return Many(per_s, used / seconds, used / max(1, requests) * 1e6, failed)

    def _chunks(self, one: Contestant) -> Chunks:
        body = load.body(one.model, chunks=CHUNKS, pause_us=PAUSE_US)
        seen = load.streams(one.port, load.request(body), STREAMS, 1.6)
        delays_us = [s * 1e6 for s in seen.delays_s]
        return Chunks(report.median(delays_us), report.percentile(delays_us, 99), seen.failed)


def _outcome(blocks: dict[str, list[Block]], again: int, rounds: int) -> report.Outcome:
    base = blocks[DIRECT]
    generator = "wrk" if wrk.installed() else "bench/load.py"
    requests = report.Table(
        "Requests through one proxy on one core",
        [
            "",
            "p50, 1 connection (µs)",
            "p99",
            "added p50",
            f"requests/s, {CONNECTIONS} conn.",
            "core used",
            "CPU (µs)",
            "failed",
        ],
        [
            [
                name,
                _us(b.single.p50_us for b in own),
                _us(b.single.p99_us for b in own),
                "" if own is base else _us(_added(own, base)),
                f"{report.median(b.many.per_s for b in own):,.0f}",
                "" if own is base else f"{100 * report.median(b.many.busy for b in own):.0f} %",
                "" if own is base else _us(b.many.cpu_us for b in own),
                str(sum(b.single.failed + b.many.failed for b in own)),
            ]
            for name, own in blocks.items()
        ],
        [
            f"Medians of {rounds} rounds; {again} measurements were repeated because more than {100 * STOLEN_MOST:g} % "
            f"of a core was stolen by the hypervisor. Load: "
            f"{generator}, bodies of {len(load.body())} bytes. CPU: the proxy's processor time for one request. "
            f"nginx {rivals.nginx_version() or 'is not installed'}: one worker, no log, kept-alive upstream."
        ],
    )
    streams = report.Table(
        f"Streams through it: {STREAMS} at a time, a chunk each {PAUSE_US / 1000:g} ms",
        ["", "write → read, p50 (µs)", "added p50", "p99", "failed"],
        [
            [
                name,
                _us(b.chunks.p50_us for b in own),
                "" if own is base else _us(_added_chunk(own, base)),
                _us(b.chunks.p99_us for b in own),
                str(sum(b.chunks.failed for b in own)),
            ]
            for name, own in blocks.items()
        ],
    )
    compared = {
        f"{ours} / {theirs}": _ratios(blocks[ours], blocks[theirs], base)
        for theirs in (NGINX_TCP, NGINX_UNIX, ROUTER)
        for ours in (TURNOUT_UNIX, TURNOUT_TCP)
        if theirs in blocks
    }
    ratios = report.Table(
        "Ratios (medians of the rounds' ratios)",
        ["", "added p50", "requests/s", "CPU for a request", "added for a chunk"],
        [[name, *(f"{getattr(r, f):.2f}" for f in Ratios.__struct_fields__)] for name, r in compared.items()],
    )
    return report.Outcome(
        figures={
            "rounds": rounds,
            "repeated": again,
            "ratios": {name: msgspec.to_builtins(r) for name, r in compared.items()},
            "blocks": {name: [msgspec.to_builtins(b) for b in own] for name, own in blocks.items()},
        },
        tables=[requests, streams, ratios],
        goals=_goals(compared),
    )


class Ratios(msgspec.Struct):
    """turnout / another proxy."""

    added_p50: float
    per_s: float
    cpu: float
    added_chunk: float


def _goals(compared: dict[str, Ratios]) -> list[report.Goal]:
    goals: list[report.Goal] = []
    if beside := compared.get(f"{TURNOUT_UNIX} / {NGINX_TCP}"):
        added, per_s, chunk = beside.added_p50, beside.per_s, beside.added_chunk
        goals += [
            report.Goal("added p50, one connection", "≤ 1.15 x nginx (TCP)", f"{added:.2f} x", added <= 1.15),
            report.Goal("requests/s, 16 connections", "≥ 0.9 x nginx (TCP)", f"{per_s:.2f} x", per_s >= 0.9),
            report.Goal("added for a streamed chunk", "≤ nginx (TCP)", f"{chunk:.2f} x", chunk <= 1.0),
        ]
    if beside := compared.get(f"{TURNOUT_UNIX} / {ROUTER}"):
        per_s = beside.per_s
        goals.append(report.Goal("requests/s, 16 connections", "≥ 3 x vllm-router", f"{per_s:.2f} x", per_s >= 3.0))
    return goals


def _ratios(ours: list[Block], theirs: list[Block], base: list[Block]) -> Ratios:
    return Ratios(
        added_p50=_quotient(_added(ours, base), _added(theirs, base)),
        per_s=_quotient([b.many.per_s for b in ours], [b.many.per_s for b in theirs]),
        cpu=_quotient([b.many.cpu_us for b in ours], [b.many.cpu_us for b in theirs]),
        added_chunk=_quotient(_added_chunk(ours, base), _added_chunk(theirs, base)),
    )


def _added(own: list[Block], base: list[Block]) -> list[float]:
    return [a.single.p50_us - b.single.p50_us for a, b in zip(own, base, strict=True)]


def _added_chunk(own: list[Block], base: list[Block]) -> list[float]:
    return [a.chunks.p50_us - b.chunks.p50_us for a, b in zip(own, base, strict=True)]


def _quotient(above: list[float], below: list[float]) -> float:
    return report.median(a / b for a, b in zip(above, below, strict=True) if b > 0)


def _us(values: Iterable[float]) -> str:
    return f"{report.median(values):,.0f}"


if __name__ == "__main__":
    raise SystemExit(report.main("gateway", run))
