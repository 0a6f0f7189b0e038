"""Requests through a gateway's own code, with no event loop, socket or kernel around it: for bench/instructions.py.

The engine's answers are those of bench/upstream.py; transports send nothing. A digest of what was counted follows every
so many requests as a busy gateway would have had by then.

    python bench/dry.py --requests 12800 [--compared] [--uncounted]
    python bench/dry.py --chunks 20000
"""

from __future__ import annotations

import argparse
import asyncio
from typing import cast

import load
import upstream

from turnout.events.route import Endpoint, Split
from turnout.projections.routing import RouteView
from turnout.workers.clock import SystemClock
from turnout.workers.gateway.plane import SWEEP_S, DataPlane
from turnout.workers.gateway.relay import Relay
from turnout.workers.gateway.server import ClientConnection
from turnout.workers.gateway.settings import GatewaySettings
from turnout.workers.gateway.upstream import UpstreamConnection

CONNECTIONS = 16
#: Requests between two digests: of 64,000 in a second.
DIGEST = 6_400
_ADDRESS = "unix:/engine.sock"


class _Transport:
    """Takes everything and sends nothing."""

    def write(self, data: bytes) -> None:
        """Drop it."""

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


class _Gateway:
    """A data plane with open connections on both sides."""

    def __init__(self, *, compared: bool, uncounted: bool) -> None:
        self._plane = DataPlane(GatewaySettings(port=1), SystemClock())
        context = self._plane.context
        target = context.pool.target(_ADDRESS)
        target.held = UpstreamConnection(context.pool, target)  # so that none is opened
        target.held.connection_made(_transport())
        endpoints = (Endpoint("engine", _ADDRESS),)
        weights = (50.0, 50.0) if compared else (0.0, 100.0)
        splits = tuple(Split(version, weight, endpoints) for version, weight in zip(("v1", "v2"), weights, strict=True))
        self._plane.apply(RouteView("chat", 1, splits, "bench", 30.0, candidate="v2" if compared else ""))
        if uncounted:
            for numbers in context.metrics.versions.values():
                numbers.tally = None
        self._now = context.monotonic()
        self._clients = [ClientConnection(context, self._plane.connections) for _ in range(CONNECTIONS)]
        for client in self._clients:
            client.connection_made(_transport())
            engine = UpstreamConnection(context.pool, target)
            engine.connection_made(_transport())
            engine.keep = True
            context.pool.give_back(engine, context.now)

    def requests(self, count: int) -> None:
        """Requests that get whole answers, one on each connection at a time."""
        message, answer = load.request(load.body()), upstream.CHAT
        for begun in range(0, count, CONNECTIONS):
            for client in self._clients:
                client.data_received(message)
            for client in self._clients:
                _engine(client).data_received(answer)
            if begun % DIGEST == 0:
                self._digest()
        self._digest()

    def stream(self, chunks: int) -> None:
        """One answer of so many chunks."""
        client = self._clients[0]
        client.data_received(load.request(load.body(chunks=chunks)))
        engine = _engine(client)
        engine.data_received(upstream.STREAM_HEAD)
        chunk = upstream.chunk()
        for _ in range(chunks):
            engine.data_received(chunk)
        engine.data_received(upstream.DONE)

    def _digest(self) -> None:
        """What a sweep does with what was counted."""
        context = self._plane.context
        self._now += SWEEP_S
        context.metrics.digest()
        context.health.take("bench", self._now, SystemClock().now())


def _transport() -> asyncio.Transport:
    return cast("asyncio.Transport", _Transport())


def _engine(client: ClientConnection) -> UpstreamConnection:
    """The connection that the client's request went out on."""
    relay = client.relay
    if not isinstance(relay, Relay) or relay._connection is None:
        raise RuntimeError("the request was not sent")
    return relay._connection


async def work(requests: int, chunks: int, *, compared: bool, uncounted: bool) -> None:
    """Do so much of it."""
    gateway = _Gateway(compared=compared, uncounted=uncounted)
    gateway.requests(requests)
    if chunks:
        gateway.stream(chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=0, help="of one stream")
    parser.add_argument("--compared", action="store_true", help="share the traffic, as in a switch")
    parser.add_argument("--uncounted", action="store_true", help="collect nothing for health samples")
    options = parser.parse_args()
    asyncio.run(work(options.requests, options.chunks, compared=options.compared, uncounted=options.uncounted))


if __name__ == "__main__":
    main()
