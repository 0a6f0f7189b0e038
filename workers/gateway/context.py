"""What all requests of one gateway process share. Knows no protocol."""

from __future__ import annotations

from itertools import chain, count
from operator import add
from typing import TYPE_CHECKING

from turnout.workers.gateway.health import HealthCollector
from turnout.workers.gateway.holding import Holding
from turnout.workers.gateway.metrics import MetricsCollector
from turnout.workers.gateway.mirror import Copies
from turnout.workers.gateway.transition import RequestTracker, TransitionManager
from turnout.workers.gateway.upstream import Pool

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from turnout.workers.clock import Clock
    from turnout.workers.gateway.metrics import VersionNumbers
    from turnout.workers.gateway.request import Request
    from turnout.workers.gateway.settings import GatewaySettings
    from turnout.workers.gateway.transition import Choice, Drained, Tracked


class Local:
    """An answer that the gateway has itself."""

    __slots__ = ("body", "kind", "status")

    def __init__(self, status: int, body: bytes, kind: bytes = b"application/json") -> None:
        self.status = status
        self.body = body
        self.kind = kind


class GatewayContext:
    """Routes, connections, copies, numbers and the coarse time.

    Attributes:
        now: seconds, as old as the last sweep: good enough for limits, and free to read.
        stopping: no connection is kept alive any more.
        request_id: makes a new id.
        local: the gateway's own paths, none of them under /v1.
        report_drained: called when the last request of a version that has left has ended.
    """

    def __init__(
        self, settings: GatewaySettings, clock: Clock, loop: asyncio.AbstractEventLoop, metrics_interval_s: float
    ) -> None:
        self.settings = settings
        self.monotonic = clock.monotonic
        self.now = clock.monotonic()
        self.stopping = False
        self.tracker = RequestTracker()
        self.manager = TransitionManager(self.tracker, clock.jitter(), settings.prefix_affinity)
        self.pool = Pool(settings, loop)
        self.holding = Holding(settings.held_bytes)
        self.copies = Copies(settings, loop, clock.monotonic, clock.jitter())
        self.health = HealthCollector(metrics_interval_s)
        self.metrics = MetricsCollector()
        self.local: dict[bytes, Callable[[Request], Local]] = {}
        self.report_drained: Callable[[Drained], None] = _nobody
        self.request_id: Callable[[], bytes] = _ids(clock.id("req-")).__next__

    def numbers(self, choice: Choice) -> VersionNumbers:
        """Where to count what a request's version does."""
        lane = choice.lane
        if lane.numbers is None:
            lane.numbers = self.metrics.version(lane.model, lane.version)
        return lane.numbers

    def ended(self, request: Tracked, cut: bool = False) -> None:
        """The request has nothing more to do with its choice."""
        drained = self.manager.request_ended(request, cut)
        if drained is not None:
            self.report_drained(drained)

    def left(self, choice: Choice) -> None:
        """The last request of a version that has left the route has ended."""
        drained = self.manager.complete_transition(choice.lane.model, choice.lane.version)
        if drained is not None:
            self.report_drained(drained)


def _ids(prefix: str) -> Iterator[bytes]:
    """Ids of requests: random once for each process, then counted, by blocks because that costs next to nothing."""
    ends = [b"%02x" % n for n in range(256)]
    return chain.from_iterable(map(add, [f"{prefix}-{block:x}".encode()] * 256, ends) for block in count())


def _nobody(_: Drained) -> None:
    """Nobody asked to hear it."""
