"""A gateway's data plane alone, in front of bench/upstream.py: what two variants of it are compared with.

python bench/plane.py --port 9000 --upstream unix:/run/engine.sock [--compared] [--uncollected]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal

import uvloop

from turnout.events.route import Endpoint, Split
from turnout.projections.routing import RouteView
from turnout.workers.clock import SystemClock
from turnout.workers.gateway.plane import DataPlane
from turnout.workers.gateway.settings import GatewaySettings


async def serve(port: int, upstream: str, *, compared: bool, uncollected: bool) -> None:
    """Route ``chat`` to two versions, both the upstream, until SIGTERM."""
    plane = DataPlane(GatewaySettings(port=port), SystemClock())
    plane.gateway = "bench"
    plane.bind()
    endpoints = (Endpoint("engine", upstream),)
    weights = (50.0, 50.0) if compared else (0.0, 100.0)
    splits = tuple(Split(version, weight, endpoints) for version, weight in zip(("v1", "v2"), weights, strict=True))
    plane.apply(RouteView("chat", 1, splits, "bench", 30.0, candidate="v2" if compared else ""))
    if uncollected:
        for numbers in plane.context.metrics.versions.values():
            numbers.tally = None
    gc.collect()
    gc.freeze()
    await plane.listen()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True, help="unix:PATH or http://HOST:PORT")
    parser.add_argument("--compared", action="store_true", help="share the traffic, as in a switch")
    parser.add_argument("--uncollected", action="store_true", help="count nothing for health samples")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.port, options.upstream, compared=options.compared, uncollected=options.uncollected))


if __name__ == "__main__":
    main()
