"""The control side of one gateway process: routes in, acknowledgements out, over the ports alone.

It opens the gateway for requests only when the views are as new as its own joining: from then on no switch can be
decided without waiting for this gateway. Without the control plane the data plane serves on by its last route; what
must be acknowledged is kept and sent, with the same command ids, when somebody answers again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Protocol

import msgspec
import structlog

from turnout.core.decider import Accepted, Answer, Failed, Rejected
from turnout.core.gateway import JoinGateway, LeaveGateway, ReportApplied, ReportDrained
from turnout.core.handling import WakeModel
from turnout.events import subjects
from turnout.events.store import Unavailable
from turnout.projections.fleet import GatewayView
from turnout.projections.routing import RouteView
from turnout.workers.ports import GatewayBeat, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from turnout.events.health import HealthEvent
    from turnout.workers.clock import Clock
    from turnout.workers.gateway.transition import Drained, Transition
    from turnout.workers.ports import Beats, Bus, Closeable, HealthWriter, ModelUse, RouteNews, ViewEntry, ViewReader

log = structlog.get_logger(__name__)

#: Between two signs of life, seconds; the controller waits for several before it counts a gateway as lost.
BEAT_S = 1.0
#: Health samples that wait to be published; where they come faster than they go, the oldest are dropped.
SAMPLES_MOST = 512
#: How long a stopping gateway tries to say what is left to say; the controller notices anyway when the beats stop.
FAREWELL_S = 5.0
_ROLE = "gw"
_ANSWER_S = 5.0
_RETRY_FIRST_S = 0.05
_RETRY_MOST_S = 1.0

_route = msgspec.json.Decoder(RouteView)
_own = msgspec.json.Decoder(GatewayView)


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

    async def reach(self, model: str) -> None:
        """Returns once its engines take connections, or it has waited long enough."""
        ...

    def in_flight(self) -> dict[str, dict[str, int]]:
        """Model → version → requests in flight."""
        ...

    def on_drained(self, report: Callable[[Drained], None]) -> None:
        """Whom to tell that a version's last request has ended."""
        ...

    def on_waiting(self, ask: Callable[[str, int], None]) -> None:
        """Whom to ask for a model that is loaded on demand and has a request that waits."""
        ...

    def refuse_waiting(self, model: str, reason: str) -> None:
        """Nobody will load the model."""
        ...

    def uses(self) -> dict[str, ModelUse]:
        """What this gateway does with the models that are loaded on demand."""
        ...

    def on_sampled(self, report: Callable[[HealthEvent], None]) -> None:
        """Whom to give the health samples."""
        ...

    async def stop(self) -> int:
        """Let the last requests end; returns how many had to be ended early."""
        ...


class _Outbox:
    """What is still to be said of one model, in order: the newest revision, then what has drained."""

    __slots__ = ("applied", "drained", "model", "sending")

    def __init__(self, model: str) -> None:
        self.model = model
        self.applied = 0
        self.drained: deque[Drained] = deque()
        self.sending: asyncio.Task[None] | None = None


class GatewayAgent:
    """Joins, follows the views, acknowledges, beats, leaves.

    Args:
        id: of this gateway; a new one for each process start, because it says which requests can be in flight.
        plane: the data plane.
        bus: commands.
        beats: signs of life.
        views: routes, and the view of this gateway.
        news: routes that are not stored as views yet.
        clock: of this process.
        connected: whether there is a connection to the control plane now; for what the plane says of itself.
        health: where samples go; None keeps them to this process's own metrics.
    """

    def __init__(
        self,
        id: str,
        plane: Plane,
        bus: Bus,
        beats: Beats,
        views: ViewReader,
        news: RouteNews,
        clock: Clock,
        connected: Callable[[], bool],
        health: HealthWriter | None = None,
    ) -> None:
        self.id = id
        self._plane = plane
        self._health = health
        self._samples: deque[HealthEvent] = deque()
        self._samples_dropped = 0
        self._sampled = asyncio.Event()
        self._bus, self._beats, self._views, self._news, self._clock = bus, beats, views, news, clock
        self._connected = connected
        self._away_since: datetime | None = None
        self._address = ""
        self._applied: dict[str, int] = {}
        self._outboxes: dict[str, _Outbox] = {}
        #: Models that somebody is being asked for.
        self._waking: dict[str, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._moved = asyncio.Event()
        self._sequence = 0
        self._state = "live"
        #: Place of the newest joining in the log, 0 before the first; joins are counted for their command ids.
        self._joined = 0
        self._joins = 0
        self._stop = asyncio.Event()

    @property
    def samples_dropped(self) -> int:
        """Health samples that were not published."""
        return self._samples_dropped + (self._health.dropped if self._health is not None else 0)

    def stop(self) -> None:
        """Make ``run`` end: take no more requests, let the running ones end, leave."""
        self._stop.set()

    async def run(self, ready: Callable[[str], None]) -> None:
        """Join, take requests until ``stop``, let the last ones end, leave. ``ready`` gets the URL.

        Raises:
            OSError: the address or port can't be used.
        """
        plane = self._plane
        plane.gateway, plane.control_plane = self.id, self._control_plane
        plane.on_drained(self._drained)
        plane.on_waiting(self._wake)
        self._address = plane.bind()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            publishing = None
            if self._health is not None:
                plane.on_sampled(self._take_sample)
                publishing = tasks.create_task(self._publish(self._health))
            beating = tasks.create_task(self._beat())
            serving = tasks.create_task(self._serve(ready))
            await self._stop.wait()
            # Routes are followed and acknowledged until the last request has ended: a switch must not wait for this.
            ended = await plane.stop()
            serving.cancel()
            await asyncio.wait((serving,))
            await self._leave()
            beating.cancel()
            if publishing is not None:
                publishing.cancel()
            for outbox in self._outboxes.values():
                if outbox.sending is not None:
                    outbox.sending.cancel()
            for waking in self._waking.values():
                waking.cancel()
            self._tasks = None
        log.info("gateway_stopped", gateway=self.id, ended_early=ended)

    async def _serve(self, ready: Callable[[str], None]) -> None:
        """Join, catch up, open, and join again whenever the log says that this gateway is lost."""
        watching, listening = await self._watch()
        try:
            await self._join()
            while self._sequence < self._joined:
                await self._next()
            await self._plane.listen()
            log.info("gateway_joined", gateway=self.id, address=self._address, routes=dict(self._applied))
            ready(self._address)
            while True:
                await self._next()
                # A view older than the joining still shows what was before it.
                if self._state == "lost" and self._sequence >= self._joined:
                    log.warning("gateway_counted_as_lost", gateway=self.id)
                    await self._join()
        finally:
            await listening.close()
            await watching.close()

    async def _watch(self) -> tuple[Closeable, Closeable]:
        keys = ("route.*", subjects.view_key("gateway", self.id))
        while True:
            try:
                listening = await self._news.listen(self._heard)
                try:
                    return await self._views.watch(keys, self._changed), listening
                except Unavailable:
                    await listening.close()
                    raise
            except Unavailable as e:
                log.warning("routes_wait", reason=str(e))
            await asyncio.sleep(_RETRY_MOST_S)

    async def _next(self) -> None:
        await self._moved.wait()
        self._moved.clear()

    # What comes

    def _changed(self, entries: Mapping[str, ViewEntry], sequence: int) -> None:
        """The views have moved: apply what concerns this gateway, between two requests."""
        for key, entry in entries.items():
            if not entry.value:
                if self._joined and key == subjects.view_key("gateway", self.id):
                    self._state = "lost"  # so long ago that its view was forgotten
                continue
            try:
                if subjects.parse_view_key(key)[0] == "route":
                    self._take_route(_route.decode(entry.value))
                else:
                    self._state = _own.decode(entry.value).state
            except msgspec.MsgspecError as e:  # the last route that could be read goes on
                log.error("view_unreadable", key=key, reason=str(e))
        self._sequence = max(self._sequence, sequence)
        self._moved.set()

    def _heard(self, view: bytes) -> None:
        """News of a route; its stored view follows."""
        try:
            self._take_route(_route.decode(view))
        except msgspec.MsgspecError as e:
            log.error("news_unreadable", reason=str(e))

    def _take_route(self, route: RouteView) -> None:
        transition = self._plane.apply(route)
        if transition is None or not transition.revision:
            return
        model = transition.model
        log.info("route_applied", model=model, revision=transition.revision, draining=list(transition.draining))
        self._applied[model] = transition.revision
        outbox = self._outboxes.setdefault(model, _Outbox(model))
        outbox.applied = transition.revision  # a newer revision acknowledges the older ones, too
        outbox.drained.extend(transition.drained)
        self._hurry(outbox)

    def _drained(self, drained: Drained) -> None:
        log.info("version_drained", model=drained.model, version=drained.version, ended=drained.ended)
        outbox = self._outboxes.setdefault(drained.model, _Outbox(drained.model))
        outbox.drained.append(drained)
        self._hurry(outbox)

    def _control_plane(self) -> str:
        """``connected``, or since when it is not (UTC)."""
        if self._connected():
            self._away_since = None
            return "connected"
        if self._away_since is None:
            self._away_since = self._clock.now()
        return f"disconnected since {self._away_since:%Y-%m-%dT%H:%M:%SZ}; requests go by the last route"

    # What goes

    def _hurry(self, outbox: _Outbox) -> None:
        """See that somebody sends what is in the outbox."""
        if self._joined and outbox.sending is None and self._tasks is not None:
            outbox.sending = self._tasks.create_task(self._send(outbox))

    async def _send(self, outbox: _Outbox) -> None:
        """Send until nothing is left: one model's reports in order, other models' beside them."""
        try:
            while outbox.applied or outbox.drained:
                if outbox.applied:
                    await self._plane.reach(outbox.model)
                    model, revision = outbox.model, outbox.applied
                    body = ReportApplied(self.id, model, revision)
                    await self._ask("gateway.applied", body, f"{self.id}.applied.{model}.{revision}")
                    if outbox.applied == revision:
                        outbox.applied = 0
                else:
                    d = outbox.drained[0]
                    report = ReportDrained(self.id, d.model, d.version, d.revision, d.ended)
                    await self._ask("gateway.drained", report, f"{self.id}.drained.{d.model}.{d.version}.{d.revision}")
                    outbox.drained.popleft()
        finally:
            outbox.sending = None

    def _wake(self, model: str, revision: int) -> None:
        """Ask for a model that a request waits for, unless that is being done."""
        if self._joined and self._tasks is not None and model not in self._waking:
            self._waking[model] = self._tasks.create_task(self._ask_for(model, revision))

    async def _ask_for(self, model: str, revision: int) -> None:
        """However many gateways ask: by this revision the model is asked for once."""
        try:
            answer = await self._ask("model.wake", WakeModel(model, self.id), f"wake.{model}.{revision}")
            if isinstance(answer, Rejected):
                self._plane.refuse_waiting(model, answer.reason)
        finally:
            del self._waking[model]

    async def _join(self) -> None:
        """Join, or join again, and say once more which revisions are applied."""
        self._joins += 1
        body = JoinGateway(self.id, self._address)
        answer = await self._ask("gateway.join", body, f"{self.id}.join.{self._joins}")
        if isinstance(answer, Accepted):
            self._joined = max(self._joined, answer.sequence, 1)
            self._state = "live"
        for model, revision in self._applied.items():
            outbox = self._outboxes[model]
            outbox.applied = max(outbox.applied, revision)
            self._hurry(outbox)

    async def _ask(self, verb: str, body: msgspec.Struct, id: str) -> Accepted | Rejected:
        """Send a command until it is decided."""
        request = Request(id, f"gateway:{self.id}", msgspec.Raw(msgspec.json.encode(body)))
        pause_s, waiting = _RETRY_FIRST_S, False
        while True:
            answer = await self._once(verb, request)
            if isinstance(answer, Accepted):
                return answer
            if isinstance(answer, Rejected) and answer.code != "gateway_unknown":
                log.error("report_rejected", verb=verb, code=answer.code, reason=answer.reason)
                return answer
            if isinstance(answer, Rejected):  # the log does not know this gateway: it may be another log
                await self._join()
            elif not waiting:
                waiting = True
                log.warning("report_waits", verb=verb, code=answer.code, reason=answer.reason)
            await asyncio.sleep(pause_s * (0.5 + self._clock.jitter()))
            pause_s = min(_RETRY_MOST_S, pause_s * 2)

    async def _once(self, verb: str, request: Request) -> Answer:
        try:
            return await self._bus.ask(_ROLE, verb, request, _ANSWER_S)
        except Unavailable as e:
            return Failed(e.code, str(e), "")

    async def _leave(self) -> None:
        """Say what is left and leave, if somebody answers in time."""
        if not self._joined:
            return
        try:
            async with asyncio.timeout(FAREWELL_S):
                if sending := [box.sending for box in self._outboxes.values() if box.sending is not None]:
                    await asyncio.wait(sending)
                await self._ask("gateway.leave", LeaveGateway(self.id), f"{self.id}.leave")
        except TimeoutError:
            log.warning("left_without_a_word", gateway=self.id)

    # Health samples: what can't be sent is dropped and counted, because nothing may ever wait for them

    def _take_sample(self, sample: HealthEvent) -> None:
        if len(self._samples) == SAMPLES_MOST:
            self._samples.popleft()
            self._samples_dropped += 1
        self._samples.append(sample)
        self._sampled.set()

    async def _publish(self, health: HealthWriter) -> None:
        while True:
            await self._sampled.wait()
            self._sampled.clear()
            while self._samples:
                await health.publish(self._samples.popleft())

    async def _beat(self) -> None:
        """Say that this process lives, and notice since when nobody can hear it."""
        while True:
            connected = self._control_plane() == "connected"
            beat = GatewayBeat(connected, self._plane.in_flight(), self._plane.uses())
            await self._beats.publish("gateway", self.id, msgspec.json.encode(beat))
            await asyncio.sleep(BEAT_S)
