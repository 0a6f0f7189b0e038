"""The control side of one gateway: follows the routes, acknowledges what was applied and drained, says that it lives.

Speaks to the ports only, and to the data plane through two calls: apply a route, and hear what has drained. When the
control plane is away nothing changes on the request path; what has to be acknowledged waits, and is sent when somebody
answers again, with the same command ids.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Protocol

import msgspec
import structlog

from turnout.core.decider import Accepted, Failed, Rejected
from turnout.core.gateway import JoinGateway, LeaveGateway, ReportApplied, ReportDrained
from turnout.events import subjects
from turnout.events.store import Unavailable
from turnout.projections.fleet import GatewayView
from turnout.projections.routing import RouteView
from turnout.workers.ports import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from datetime import datetime

    from turnout.workers.clock import Clock
    from turnout.workers.gateway.transition import Drained, Transition
    from turnout.workers.ports import Beats, Bus, Closeable, ViewEntry, ViewReader

log = structlog.get_logger(__name__)

#: Between two signs of life, seconds; the controller waits for several before it counts a gateway as lost.
BEAT_S = 1.0
_ANSWER_S = 5.0
_RETRY_FIRST_S = 0.05
_RETRY_MOST_S = 1.0

_routes = msgspec.json.Decoder(RouteView)
_gateways = msgspec.json.Decoder(GatewayView)


class Plane(Protocol):
    """The data plane, as the agent needs it: see ``DataPlane``."""

    gateway: str
    control_plane: Callable[[], str]

    def bind(self) -> str:
        """Take the port; returns the URL."""
        ...

    async def listen(self) -> None:
        """Take requests."""
        ...

    def apply(self, route: RouteView) -> Transition | None:
        """Route by a revision from the next request on; None where it is not newer."""
        ...

    def on_drained(self, report: Callable[[Drained], None]) -> None:
        """Whom to tell that a version's last request has ended."""
        ...

    async def stop(self) -> int:
        """Let the running requests end; returns how many were ended early."""
        ...


class GatewayAgent:
    """One gateway's word with the control plane.

    Args:
        id: of this gateway process, new at every start.
        plane: what takes the requests.
        bus: commands.
        beats: signs of life.
        views: routes.
        clock: of this process.
        connected: whether there is a connection to the control plane now; for what the plane says of itself.
    """

    def __init__(
        self,
        id: str,
        plane: Plane,
        bus: Bus,
        beats: Beats,
        views: ViewReader,
        clock: Clock,
        connected: Callable[[], bool],
    ) -> None:
        self.id = id
        self._plane = plane
        self._address = ""
        self._bus, self._beats, self._views, self._clock = bus, beats, views, clock
        self._connected = connected
        self._away_since: datetime | None = None
        self._stop = asyncio.Event()
        self._sequence = 0
        self._heard = 0
        self._moved = asyncio.Event()
        self._joined = False
        self._joins = 0
        self._applied: dict[str, int] = {}
        self._outbox: dict[str, deque[tuple[str, msgspec.Struct, str]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: Closeable | None = None

    async def run(self, ready: Callable[[str], None]) -> None:
        """Join, take requests until ``stop``, let the last ones end, leave. ``ready`` gets the URL.

        Raises:
            OSError: the address or port can't be used.
        """
        plane = self._plane
        self._address = plane.bind()
        plane.gateway = self.id
        plane.control_plane = self._control_plane
        plane.on_drained(self.drained)
        try:
            await self._start()
            await plane.listen()
            ready(self._address)
            await self._stop.wait()
            await plane.stop()
            await self._leave()
        finally:
            await self.close()

    def stop(self) -> None:
        """Make ``run`` end in order."""
        self._stop.set()

    async def _start(self) -> None:
        """Read the routes, join, and return when requests may be taken.

        They may be when the routes have come as far as the join's place in the log: what was changed before it is
        applied here, and whatever comes after it waits for this gateway's word.
        """
        self._watch = await self._retry_watch()
        self._spawn(self._beat())
        sequence = await self._join()
        while self._sequence < sequence:
            self._moved.clear()
            await self._moved.wait()
        log.info("gateway_joined", gateway=self.id, sequence=sequence, routes=dict(self._applied))

    def drained(self, report: Drained) -> None:
        """Acknowledge that a version's last request has ended."""
        body = ReportDrained(self.id, report.model, report.version, report.revision, report.ended)
        self._post(
            report.model,
            "gateway.drained",
            body,
            f"{self.id}.drained.{report.model}.{report.version}.{report.revision}",
        )

    async def _leave(self) -> None:
        """Say that nothing is in flight and nothing will be taken any more.

        Where nobody answers soon, the controller notices by the missing signs of life.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_S):
                while any(self._outbox.values()):
                    await asyncio.wait(tuple(self._tasks), timeout=_RETRY_FIRST_S)
                await self._ask("gateway.leave", LeaveGateway(self.id), f"{self.id}.leave")

    async def close(self) -> None:
        """Stop without a word."""
        if self._watch is not None:
            await self._watch.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What comes

    def _changed(self, entries: Mapping[str, ViewEntry], sequence: int) -> None:
        for key, entry in entries.items():
            kind, _ = subjects.parse_view_key(key)
            if not entry.value:
                continue
            if kind == "route":
                self._take_route(_routes.decode(entry.value))
            elif self._joined and _gateways.decode(entry.value).state == "lost":
                log.warning("gateway_counted_as_lost", gateway=self.id)
                self._joined = False
                self._spawn(self._rejoin())
        self._sequence = max(self._sequence, sequence)
        self._moved.set()

    def _take_route(self, route: RouteView) -> None:
        transition = self._plane.apply(route)
        if transition is None or not transition.revision:
            return
        self._applied[transition.model] = transition.revision
        log.info(
            "route_applied", model=transition.model, revision=transition.revision, draining=list(transition.draining)
        )
        self._acknowledge(transition.model)
        for report in transition.drained:
            self.drained(report)

    def _acknowledge(self, model: str) -> None:
        revision = self._applied[model]
        body = ReportApplied(self.id, model, revision)
        self._post(model, "gateway.applied", body, f"{self.id}.applied.{model}.{revision}")

    # What goes

    def _post(self, model: str, verb: str, body: msgspec.Struct, id: str) -> None:
        """Send a report after those of the same model that wait already."""
        queue = self._outbox.setdefault(model, deque())
        queue.append((verb, body, id))
        if len(queue) == 1:
            self._spawn(self._send(model, queue))

    async def _send(self, model: str, queue: deque[tuple[str, msgspec.Struct, str]]) -> None:
        while queue:
            verb, body, id = queue[0]
            if (refused := await self._ask(verb, body, id)) is not None:
                log.error("report_refused", verb=verb, model=model, code=refused.code, reason=refused.reason)
            queue.popleft()

    async def _ask(self, verb: str, body: msgspec.Struct, id: str) -> Rejected | None:
        """Send one command until somebody decides it; None where it was accepted."""
        request = Request(id, self.id, msgspec.Raw(msgspec.json.encode(body)))
        pause_s = _RETRY_FIRST_S
        while True:
            try:
                answer = await self._bus.ask("gw", verb, request, _ANSWER_S)
            except Unavailable as e:
                log.warning("report_waits", verb=verb, reason=str(e))
            else:
                if isinstance(answer, Accepted):
                    self._heard = answer.sequence
                    return None
                if isinstance(answer, Failed):
                    log.warning("report_waits", verb=verb, reason=answer.reason)
                elif answer.code == "gateway_unknown":
                    await self._join()
                else:
                    return answer
            await asyncio.sleep(pause_s * (0.5 + self._clock.jitter()))
            pause_s = min(_RETRY_MOST_S, pause_s * 2)

    async def _join(self) -> int:
        """Join; returns the join's place in the log."""
        self._joins += 1
        id = f"{self.id}.join.{self._joins}"
        self._heard = 0
        if (refused := await self._ask("gateway.join", JoinGateway(self.id, self._address), id)) is not None:
            log.error("join_refused", gateway=self.id, code=refused.code, reason=refused.reason)
        self._joined = True
        return self._heard

    async def _rejoin(self) -> None:
        await self._join()
        for model in self._applied:
            self._acknowledge(model)

    def _control_plane(self) -> str:
        """``connected``, or since when it is not (UTC)."""
        if self._connected():
            self._away_since = None
            return "connected"
        if self._away_since is None:
            self._away_since = self._clock.now()
        return f"disconnected since {self._away_since:%Y-%m-%dT%H:%M:%SZ}"

    async def _beat(self) -> None:
        while True:
            self._control_plane()  # notes the moment where the connection was lost
            await self._beats.publish("gateway", self.id, b"{}")
            await asyncio.sleep(BEAT_S)

    async def _retry_watch(self) -> Closeable:
        keys = ("route.*", subjects.view_key("gateway", self.id))
        while True:
            try:
                return await self._views.watch(keys, self._changed)
            except Unavailable as e:
                log.warning("routes_wait", reason=str(e))
                await asyncio.sleep(_RETRY_MOST_S)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
