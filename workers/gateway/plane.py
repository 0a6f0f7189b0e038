"""The data plane of one gateway process: its socket, its sweeps, its own paths, and how it stops.

Knows no control plane: somebody gives it routes (``apply``) and takes what must be acknowledged.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import msgspec
import structlog

from turnout.workers.gateway.context import GatewayContext, Local
from turnout.workers.gateway.metrics import Gauge
from turnout.workers.gateway.relay import CONNECTING, DONE, HOLDING, SENT, STREAMING, Relay
from turnout.workers.gateway.server import ClientConnection
from turnout.workers.ports import ModelUse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from turnout.events.health import HealthEvent
    from turnout.projections.routing import RouteView
    from turnout.workers.clock import Clock
    from turnout.workers.gateway.request import Request
    from turnout.workers.gateway.settings import GatewaySettings
    from turnout.workers.gateway.transition import Drained, Transition

log = structlog.get_logger(__name__)

#: Seconds between two looks at the running requests; what a time limit may be late.
SWEEP_S = 0.1
#: Seconds between two samples that could not wait: many errors at once are told together.
HURRY_S = 0.02
#: How long an acknowledgement waits for an engine to take a connection, seconds: a dead one is reported long before.
REACH_S = 1.0
#: Of every so many sweeps one also looks at all connections.
SLOW_SWEEP = 5
_PHASES = {CONNECTING: "connecting", SENT: "waiting", HOLDING: "waiting", STREAMING: "streaming", DONE: "done"}
_BACKLOG = 1024


class Health(msgspec.Struct):
    """What ``/healthz`` answers. ``control_plane``: ``connected``, or since when it is not (UTC)."""

    gateway: str
    control_plane: str
    revisions: dict[str, int]
    in_flight: int
    stopping: bool


class _Use:
    """Since when a model that is loaded on demand has nothing to do; what was counted at the last look."""

    __slots__ = ("ended", "in_flight", "since")

    def __init__(self, now: float) -> None:
        self.since = now
        self.in_flight = 0
        self.ended = 0


class DataPlane:
    """Everything between the listening socket and the engines."""

    def __init__(self, settings: GatewaySettings, clock: Clock, metrics_interval_s: float = 60.0) -> None:
        """Make it; nothing is opened. Needs a running event loop.

        Args:
            settings: what the operator decided.
            clock: of this process.
            metrics_interval_s: between two health samples of a model while no switch runs on it.
        """
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self._clock = clock
        self._monotonic = clock.monotonic
        self.context = GatewayContext(settings, clock, self._loop, metrics_interval_s)
        self.context.health.hurry = self._hurry
        self._report_sample: Callable[[HealthEvent], None] | None = None
        self._hurrying: asyncio.TimerHandle | None = None
        self._hurried_at = 0.0
        self.connections: set[ClientConnection] = set()
        #: Filled in by the control side: what /healthz says of the control plane.
        self.control_plane: Callable[[], str] = lambda: "unknown"
        self.gateway = ""
        self._server: asyncio.Server | None = None
        self._socket: socket.socket | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweeps = 0
        self._uses: dict[str, _Use] = {}
        self._quiet: asyncio.Event = asyncio.Event()
        self._own_paths()

    def bind(self) -> str:
        """Take the port, without listening yet; returns the URL.

        Raises:
            OSError: the address or port can't be used.
        """
        family = socket.AF_INET6 if ":" in self._settings.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._settings.reuse_port:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.setblocking(False)
            bound.bind((self._settings.host, self._settings.port))
        except OSError:
            bound.close()
            raise
        self._socket = bound
        host = f"[{self._settings.host}]" if family == socket.AF_INET6 else self._settings.host
        return f"http://{host}:{bound.getsockname()[1]}"

    async def listen(self) -> None:
        """Take requests. ``bind`` comes first; after ``stop`` it does nothing."""
        if self._socket is None:
            raise RuntimeError("bind() comes before listen()")
        if self.context.stopping:
            return
        self._server = await self._loop.create_server(
            lambda: ClientConnection(self.context, self.connections), sock=self._socket, backlog=_BACKLOG
        )
        self._sweep()

    def apply(self, route: RouteView) -> Transition | None:
        """Route by a revision from the next request on; close what leads to engines that no route names."""
        context, now = self.context, self._monotonic()
        transition = context.manager.begin_transition(route, now)
        if transition is not None:
            applied = context.health.apply(route, self.gateway, now, self._clock.now())
            for tally in applied.tallies:
                numbers = context.metrics.version(tally.model, tally.version)
                numbers.tally, tally.whole = tally, numbers.add_whole
            context.copies.apply(route, applied.shadows)
            context.pool.keep(context.manager.addresses())
            self._publish(applied.ended)
            self._uses.pop(route.model, None)
            context.holding.applied(route)
        return transition

    async def reach(self, model: str) -> None:
        """Wait until an instance of each version that has traffic takes connections; ``REACH_S`` at most.

        Until a revision is acknowledged, the version before stays in the route and takes what an engine refuses.
        Without this look, it could leave for an engine that has just died.
        """
        manager, pool = self.context.manager, self.context.pool
        revision = manager.applied().get(model)
        try:
            async with asyncio.timeout(REACH_S):
                while not self.context.stopping and manager.applied().get(model) == revision:
                    if all(any(map(pool.holds, addresses)) for addresses in manager.leads_to(model)):
                        return
                    await pool.moved()
        except TimeoutError:
            log.warning("engine_not_reached", model=model, revision=revision)

    def on_waiting(self, ask: Callable[[str, int], None]) -> None:
        """Whom to ask, by model and revision, for a model that is loaded on demand and has a request that waits."""
        self.context.holding.ask = ask

    def refuse_waiting(self, model: str, reason: str) -> None:
        """Nobody will load the model."""
        self.context.holding.refuse(model, reason)

    def uses(self) -> dict[str, ModelUse]:
        """What this gateway does with the models that are loaded on demand."""
        context, now = self.context, self._monotonic()
        held = dict(context.holding.counts())
        uses: dict[str, ModelUse] = {}
        for model in context.holding.on_demand():
            use = self._use(model, now)
            idle_s = 0.0 if use.in_flight else round(now - use.since, 3)
            revision = context.manager.applied().get(model, 0)
            uses[model] = ModelUse(use.in_flight, held.get(model, 0), idle_s, revision)
        return uses

    def on_drained(self, report: Callable[[Drained], None]) -> None:
        """Whom to tell that a version's last request has ended."""
        self.context.report_drained = report

    def on_sampled(self, report: Callable[[HealthEvent], None]) -> None:
        """Whom to give the health samples."""
        self._report_sample = report

    async def stop(self) -> int:
        """Take no more requests, let the running ones end, and close. Returns how many had to be ended early."""
        context = self.context
        context.stopping = True
        if self._server is not None:
            self._server.close()
        elif self._socket is not None:
            self._socket.close()
        for connection in tuple(self.connections):
            connection.close_if_idle()
        ended = 0
        try:
            async with asyncio.timeout(self._settings.shutdown_s):
                await self._wait_quiet()
        except TimeoutError:
            context.holding.close()
            for relay in tuple(context.tracker.running()):
                if isinstance(relay, Relay):
                    relay.end_early("gateway_stopping", "the gateway had to stop before this request ended", cut=False)
                    ended += 1
            for connection in tuple(self.connections):
                connection.close_now()
        for timer in (self._sweeper, self._hurrying):
            if timer is not None:
                timer.cancel()
        await context.copies.close()
        await context.pool.close()
        self._publish(context.health.take_all(self.gateway, self._monotonic(), self._clock.now()))
        return ended

    async def _wait_quiet(self) -> None:
        while self.context.tracker.in_flight() or self.connections:
            self._quiet.clear()
            await self._quiet.wait()

    # Sweeps

    def _sweep(self) -> None:
        """End what is over its time. One timer for all requests: none is started or stopped on their way."""
        context = self.context
        now = context.now = self._monotonic()
        limits, of_models = self._settings.limits, self._settings.model_limits
        for request in tuple(context.tracker.running()):
            if isinstance(request, Relay):
                request.check(now, of_models.get(request.choice.lane.model, limits) if of_models else limits)
        for request in context.manager.overdue(now):
            if isinstance(request, Relay):
                version = request.choice.version
                request.end_early("version_drained", f"version {version} had to stop before this request ended", True)
        self._sweeps += 1
        if self._sweeps % SLOW_SWEEP == 0:
            for connection in tuple(self.connections):
                connection.check(now)
            context.pool.sweep(now)
            context.copies.sweep(now)
        context.metrics.digest()
        for model in context.holding.on_demand():
            self._use(model, now)
        context.holding.sweep(now)
        self._sample(now)
        self._quiet.set()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def _use(self, model: str, now: float) -> _Use:
        """Look whether the model is in use: requests in flight, or some that have ended since the last look."""
        context = self.context
        in_flight = context.tracker.in_flight(model)
        ended = sum(
            sum(numbers.statuses) + sum(numbers.failures.values())
            for (name, _), numbers in context.metrics.versions.items()
            if name == model
        )
        use = self._uses.get(model)
        if use is None:
            use = self._uses[model] = _Use(now)
        if in_flight or use.in_flight or ended != use.ended:
            use.since = now
        use.in_flight, use.ended = in_flight, ended
        return use

    # Health samples

    def _sample(self, now: float) -> None:
        self._publish(self.context.health.take(self.gateway, now, self._clock.now()))

    def _hurry(self) -> None:
        """A sample can't wait for the next sweep: take it in the next turn of the loop, but not too often."""
        if self._hurrying is None:
            wait_s = max(0.0, self._hurried_at + HURRY_S - self._monotonic())
            self._hurrying = self._loop.call_later(wait_s, self._sample_now)

    def _sample_now(self) -> None:
        self._hurrying, self._hurried_at = None, self._monotonic()
        self._sample(self._hurried_at)

    def _publish(self, events: Iterable[HealthEvent]) -> None:
        if self._report_sample is not None:
            for event in events:
                self._report_sample(event)

    def in_flight(self) -> dict[str, dict[str, int]]:
        """Model → version → requests in flight."""
        return self.context.tracker.by_version()

    # The gateway's own paths

    def _own_paths(self) -> None:
        context = self.context
        context.local[b"/healthz"] = self._healthz
        context.local[b"/readyz"] = self._readyz
        if self._settings.track_requests:
            context.local[b"/requests"] = self._requests
        metrics = context.metrics
        holding = context.holding
        metrics.held, metrics.waited, metrics.held_refused = holding.counts, holding.waited, holding.refused
        metrics.revisions = context.manager.applied
        metrics.rules = context.manager.rule_counts
        metrics.in_flight = lambda: [
            (lane.model, lane.version, len(lane.requests)) for lane in context.tracker.lanes.values()
        ]
        metrics.outcomes, metrics.signs, metrics.pairs = (
            context.health.outcomes,
            context.health.signs,
            context.health.pairs,
        )
        metrics.gather = context.health.digest
        metrics.gauges += [
            Gauge("turnout_gateway_connections", "Client connections.", lambda: len(self.connections)),
            Gauge("turnout_gateway_idle_upstreams", "Unused connections to engines.", context.pool.idle),
            Gauge(
                "turnout_gateway_control_plane_connected",
                "1 while the control plane answers; routing goes on by the last route without it.",
                lambda: float(self.control_plane() == "connected"),
            ),
        ]
        if self._settings.metrics:
            context.local[b"/metrics"] = lambda _: Local(200, metrics.render(), b"text/plain; version=0.0.4")

    def _healthz(self, _: Request) -> Local:
        manager = self.context.manager
        health = Health(
            self.gateway,
            self.control_plane(),
            manager.applied(),
            self.context.tracker.in_flight(),
            self.context.stopping,
        )
        return Local(200, msgspec.json.encode(health))

    def _readyz(self, _: Request) -> Local:
        """Whether a load balancer should send requests here: not while it stops."""
        ready = not self.context.stopping
        return Local(200 if ready else 503, msgspec.json.encode({"ready": ready}))

    def _requests(self, _: Request) -> Local:
        """What is running now. No prompt, no answer, no key."""
        now = self._monotonic()
        listed = [
            {
                "id": relay.request.id.decode("latin-1"),
                "model": relay.choice.model,
                "version": relay.choice.version,
                "revision": relay.choice.revision,
                "instance": relay.choice.instance,
                "path": relay.request.head.path.decode("latin-1"),
                "phase": _PHASES[relay.phase],
                "age_s": round(now - relay.started, 3),
            }
            for relay in self.context.tracker.running()
            if isinstance(relay, Relay)
        ]
        return Local(200, msgspec.json.encode({"requests": listed}))
