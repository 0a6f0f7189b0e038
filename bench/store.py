"""Replay rate and append latency of the event store on a nats-server of its own. Prints a table, or JSON with --json.

PYTHONPATH=src python bench/store.py [--events 150000] [--appends 500] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats.aio.client as plain
import structlog
import uvloop

from turnout.events import jsapi, subjects
from turnout.events.codec import Context, decode, record
from turnout.events.envelope import ENVELOPE_HEADER, START, TYPE_HEADER, Position
from turnout.events.gateway import RouteApplied
from turnout.events.jetstream import PULL_BATCH, JetStreamStore
from turnout.events.store import Append
from turnout.workers.clock import SystemClock
from turnout.workers.embedded import EmbeddedServer
from turnout.workers.nats import connect, ensure_streams

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from turnout.events.envelope import Recorded
    from turnout.events.store import EventStore
    from turnout.workers.nats import Connection

CLOCK = SystemClock()
GATEWAYS = 50
#: Plain publishes in flight while the log is filled.
WINDOW = 500


def context(command: str) -> Context:
    return Context(command, "gateway:g1", "sw-0123456789", "sw-0123456789", CLOCK.now())


async def fill(connection: Connection, events: int) -> int:
    """Store a chained log without waiting for each ack; returns the bytes of one event (headers and body)."""
    heads: dict[str, Position] = {}
    size = 0
    for start in range(0, events, WINDOW):
        waiting: list[Any] = []
        for n in range(start, min(start + WINDOW, events)):
            subject = subjects.event("gateway", f"g{n % GATEWAYS}")
            head = heads.get(subject, START)
            name, envelope, body = record(
                subject, RouteApplied(f"g{n % GATEWAYS}", "chat", n), context(f"cmd-{n}"), 0, head
            )
            headers = {
                jsapi.EXPECTED_HEADER: str(head.sequence),
                TYPE_HEADER: name,
                ENVELOPE_HEADER: envelope.decode(),
            }
            heads[subject] = decode(subject, n + 1, name, envelope, body).position
            size = len(envelope) + len(body)
            waiting.append(jsapi.publish(connection.nc, jsapi.Message(subject, body, headers), 30))
        await asyncio.gather(*waiting)
    return size


async def replay(store: EventStore, events: int) -> float:
    """Events/s from the first to the last, decoded."""
    done = asyncio.get_running_loop().create_future()
    seen = 0

    def deliver(recorded: Recorded) -> None:
        nonlocal seen
        seen += 1
        if recorded.sequence == events:
            done.set_result(None)

    start = time.perf_counter()
    tail = await store.tail(0, deliver, done.set_exception)
    await done
    seconds = time.perf_counter() - start
    await tail.close()
    assert seen == events
    return events / seconds


async def bare(connection: Connection, events: int) -> float:
    """Events/s that nats-py's own callback subscription counts, nothing decoded: what the client itself can do."""
    nc = plain.Client()
    await nc.connect(connection.nc.connected_url.geturl())  # type: ignore[union-attr]
    done = asyncio.get_running_loop().create_future()
    inbox = nc.new_inbox()
    name = jsapi.unique(connection.nc)
    seen = asked = 0

    async def take(message: Msg) -> None:
        nonlocal seen, asked
        if not message.reply.startswith("$JS.ACK."):
            return
        seen += 1
        if seen == events:
            done.set_result(None)
        elif asked - seen <= PULL_BATCH // 2:
            await ask()

    async def ask() -> None:
        nonlocal asked
        more = PULL_BATCH - (asked - seen)
        asked += more
        query = json.dumps({"batch": more, "expires": 30_000_000_000}).encode()
        await nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.EVENTS.{name}", query, reply=inbox)

    await nc.subscribe(inbox, cb=take, pending_msgs_limit=-1, pending_bytes_limit=-1)
    config = {"name": name, "deliver_policy": "all", "ack_policy": "none", "mem_storage": True}
    body = {"stream_name": "EVENTS", "action": "create", "config": config}
    await jsapi.api(connection.nc, f"CONSUMER.CREATE.EVENTS.{name}", body, 5)
    start = time.perf_counter()
    await ask()
    await done
    seconds = time.perf_counter() - start
    await nc.close()
    return events / seconds


async def append_ms(store: EventStore, count: int, appends: int) -> list[float]:
    """Serial appends of ``count`` events each, each to its own subject; milliseconds of each append."""
    times: list[float] = []
    heads = {subjects.event("gateway", f"a{count}-{n}"): START for n in range(count)}
    for n in range(appends):
        group = [Append(subject, head, (RouteApplied("g", "chat", n),)) for subject, head in heads.items()]
        start = time.perf_counter()
        stored = await store.append(group, context(f"c-{count}-{n}"))
        times.append((time.perf_counter() - start) * 1e3)
        heads = {r.subject: r.position for r in stored}
    return times


def percentile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * q))]


async def measure(events: int, appends: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder), CLOCK)
        await server.start()
        try:
            connection = await connect(server.url, "bench", CLOCK)
            await ensure_streams(connection.nc)
            store = JetStreamStore(connection.nc)
            result: dict[str, Any] = {"machine": f"{platform.machine()}, Python {platform.python_version()}"}
            result["event_bytes"] = await fill(connection, events)
            rates, bares, cpu = [], [], []
            for _ in range(5):  # in pairs: the machine's speed changes
                bares.append(await bare(connection, events))
                before = time.process_time()
                rates.append(await replay(store, events))
                cpu.append((time.process_time() - before) / events * 1e6)
            result["replay_events"] = events
            result["replay_events_per_s"] = {"median": statistics.median(rates), "all": rates}
            result["replay_cpu_us_per_event"] = statistics.median(cpu)
            result["bare_client_events_per_s"] = {"median": statistics.median(bares), "all": bares}
            result["replay_beside_bare"] = statistics.median(r / b for r, b in zip(rates, bares, strict=True))
            result["append_ms"] = {}
            for count in (1, 2, 3):
                times = await append_ms(store, count, appends)
                result["append_ms"][count] = {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99)}
            await connection.close()
        finally:
            server.stop()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=150_000)
    parser.add_argument("--appends", type=int, default=500)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(), wrapper_class=structlog.make_filtering_bound_logger(30)
    )
    result = uvloop.run(measure(args.events, args.appends))
    rates = result["replay_events_per_s"]
    print(f"replay of {result['replay_events']} events ({result['event_bytes']} B of envelope and body each), decoded:")
    print(f"  median {rates['median']:,.0f} events/s  (runs: {', '.join(f'{r:,.0f}' for r in rates['all'])})")
    print(f"  processor time of the reader: {result['replay_cpu_us_per_event']:.1f} us an event")
    print(
        f"  the client alone, counting, in the same run: {result['bare_client_events_per_s']['median']:,.0f} events/s"
    )
    print(f"  decoded beside counted: {result['replay_beside_bare']:.2f}")
    print("append, sync_interval always, serial:")
    for count, ms in result["append_ms"].items():
        print(f"  {count} event(s) on {count} subject(s): p50 {ms['p50']:.2f} ms, p99 {ms['p99']:.2f} ms")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
