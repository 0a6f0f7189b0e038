"""A gateway's data plane alone, in front of bench/upstream.py: SIGUSR1 stops health collection and starts it again.

One process does both, because two processes of the same program differ by more than what is to be measured.

    python bench/plane.py --port 9000 --upstream unix:/run/engine.sock [--compared]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
from typing import TYPE_CHECKING

import uvloop

from turnout.events.route import Endpoint, Split
from turnout.projections.routing import RouteView
from turnout.workers.clock import SystemClock
from turnout.workers.gateway.plane import DataPlane
from turnout.workers.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from turnout.workers.gateway.health import Tally


async def serve(port: int, upstream: str, *, compared: bool) -> None:
    """Route ``chat`` to two versions, both the upstream, until SIGTERM."""
    plane = DataPlane(GatewaySettings(port=port), SystemClock())
    plane.gateway = "bench"
    plane.bind()
    endpoints = (Endpoint("engine", upstream),)
    weights = (50.0, 50.0) if compared else (0.0, 100.0)
    splits = tuple(Split(version, weight, endpoints) for version, weight in zip(("v1", "v2"), weights, strict=True))
    plane.apply(RouteView("chat", 1, splits, "bench", 30.0, candidate="v2" if compared else ""))
    idle: list[Tally | None] = [None] * len(splits)

    def toggle() -> None:
        for n, numbers in enumerate(plane.context.metrics.versions.values()):
            idle[n], numbers.tally = numbers.tally, idle[n]

    gc.collect()
    gc.freeze()
    await plane.listen()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, toggle)
    await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True, help="unix:PATH or http://HOST:PORT")
    parser.add_argument("--compared", action="store_true", help="share the traffic, as in a switch")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.port, options.upstream, compared=options.compared))


if __name__ == "__main__":
    main()
