"""One gateway process, put together. Names no adapter: whoever starts it gives the ports.

Runs on any event loop; for the speed in docs/benchmarks.md it needs uvloop.
"""

from __future__ import annotations

import gc
import resource
from typing import TYPE_CHECKING

import structlog

from turnout.workers.gateway.agent import GatewayAgent
from turnout.workers.gateway.plane import DataPlane
from turnout.workers.gateway.settings import GatewaySettings, TimeLimits

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.workers.clock import Clock
    from turnout.workers.ports import Beats, Bus, HealthWriter, RouteNews, ViewReader

__all__ = ["Gateway", "GatewaySettings", "TimeLimits"]

log = structlog.get_logger(__name__)


class Gateway:
    """Data plane and control side of one process. Make it on the running event loop.

    Args:
        settings: what the operator decided.
        id: of this process start; several processes on one port each have their own.
        bus: commands.
        beats: signs of life.
        views: routes.
        news: routes that are not stored as views yet.
        clock: time and ids.
        connected: whether there is a connection to the control plane now; for /healthz and the metrics alone.
        health: where health samples go; None keeps them to this process's own metrics.
        metrics_interval_s: between two health samples of a model while no switch runs on it.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        id: str,
        bus: Bus,
        beats: Beats,
        views: ViewReader,
        news: RouteNews,
        clock: Clock,
        connected: Callable[[], bool],
        health: HealthWriter | None = None,
        metrics_interval_s: float = 60.0,
    ) -> None:
        self.id = id
        self.plane = DataPlane(settings, clock, metrics_interval_s)
        self._agent = GatewayAgent(id, self.plane, bus, beats, views, news, clock, connected, health)
        self.plane.context.metrics.samples_dropped = lambda: self._agent.samples_dropped

    async def run(self, ready: Callable[[str], None]) -> None:
        """Serve until ``stop``; ``ready`` gets the URL once requests are taken.

        Raises:
            OSError: the address or port can't be used.
        """
        _raise_file_limit()

        def started(url: str) -> None:
            # What is there now stays: the collector need not look at it again and again while requests wait.
            gc.collect()
            gc.freeze()
            ready(url)

        await self._agent.run(started)

    def stop(self) -> None:
        """Make ``run`` end in order: no new request, the running ones to their end, then leave."""
        self._agent.stop()


def _raise_file_limit() -> None:
    """Each connection is an open file, and the usual limit of 1024 is soon reached: take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as e:
            log.warning("file_limit_kept", limit=soft, reason=str(e))
