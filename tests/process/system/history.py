"""The judge: what was recorded while a system ran, and what must be true of it whatever was killed meanwhile.

Record first, judge afterwards. All times are this process's own: when the test had read an event, not when it was
written, so that no two clocks are compared. An event that has been read has happened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from turnout.core.sagas import routes
from turnout.core.switch import ENDED
from turnout.core.world import World
from turnout.events.chain import verify_chain
from turnout.events.envelope import Recorded
from turnout.events.gateway import GatewayJoined, RouteApplied
from turnout.events.instance import InstanceDraining, InstanceEvent, InstanceFailed, InstanceStopped
from turnout.events.model import SwitchAdmitted, SwitchClosed
from turnout.events.route import RouteChanged, Split
from turnout.events.switch import StepApplied
from turnout.projections.views import Views

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tests.process.system.traffic import Reply


class Seen(msgspec.Struct, frozen=True):
    """An event, and when this test had read it (monotonic seconds)."""

    at: float
    recorded: Recorded

    def __str__(self) -> str:
        r = self.recorded
        body = r.body.decode(errors="replace")
        return f"{r.sequence} {r.envelope.time:%H:%M:%S.%f} e{r.envelope.epoch} {r.type} {body[:300]}"


class History:
    """Everything that was recorded. ``lost``: errors of the test's own tail."""

    def __init__(self, seen: Sequence[Seen], replies: Sequence[Reply], lost: Sequence[Exception]) -> None:
        self.seen = list(seen)
        self.replies = list(replies)
        self._lost = list(lost)
        #: (model, revision) → its event and when it was read.
        self.routes: dict[tuple[str, int], Seen] = {}
        for one in self.seen:
            event = one.recorded.event
            if isinstance(event, RouteChanged):
                self.routes[event.model, event.revision] = one

    # --- what happened to requests -------------------------------------------------------------------------------

    def failed(self) -> list[Reply]:
        """No answer, an error answer, or an answer that broke off without a word."""
        return [r for r in self.replies if r.outcome in ("failed", "refused")]

    def cut(self) -> list[Reply]:
        """Streams that were ended by an error event."""
        return [r for r in self.replies if r.outcome == "cut"]

    def stale(self, live: Iterable[str] = ()) -> list[Reply]:
        """Sent after every gateway had acknowledged a revision, and routed by an older one.

        Args:
            live: gateways to be judged, by URL; all where none is named.
        """
        steps = [
            (one.at, event.revision, self._model(event.switch))
            for one in self.seen
            if isinstance(event := one.recorded.event, StepApplied)
        ]
        judged = set(live)
        return [
            reply
            for reply in self.replies
            if reply.revision
            and (not judged or reply.gateway in judged)
            and any(at < reply.sent and reply.revision < n and model == reply.model for at, n, model in steps)
        ]

    def clean(self) -> None:
        """Nothing failed, nothing was cut, nothing was stale, and every rule held."""
        assert self.replies, "there was no traffic"
        assert not self.failed(), (len(self.failed()), self.failed()[:5])
        assert not self.cut(), (len(self.cut()), self.cut()[:5])
        assert not self.stale(), (len(self.stale()), self.stale()[:5])
        self.sound()

    # --- the rules -----------------------------------------------------------------------------------------------

    def sound(self) -> None:
        """Every rule that holds whatever was killed."""
        problems = self.problems()
        assert not problems, "\n".join(problems[:20])

    def problems(self, but: str = "\0") -> list[str]:
        """What breaks a rule, but for what names ``but``."""
        checks = (self._chain(), self._once(), self._switches(), self._world(), self._answers())
        return [problem for check in checks for problem in check if but not in problem]

    def views(self, upto: int) -> dict[str, Any]:
        """Every view, folded from nothing."""
        views = Views()
        for one in self.seen:
            if one.recorded.sequence <= upto:
                views.apply(one.recorded)
        return {key: msgspec.json.decode(value) for key, value in views.everything().items()}

    def events(self, *types: type) -> list[Any]:
        """All events of these types."""
        return [one.recorded.event for one in self.seen if isinstance(one.recorded.event, types)]

    def engine_events(self, after: int) -> list[InstanceEvent]:
        """Events of instances, later than the first ``after`` events."""
        return [o.recorded.event for o in self.seen[after:] if o.recorded.subject.startswith("turnout.evt.instance.")]  # type: ignore[misc]

    def _chain(self) -> Iterator[str]:
        """Nothing is missing, changed or out of order."""
        for error in self._lost:
            yield f"the tail was lost: {error}"
        for problem in verify_chain([one.recorded for one in self.seen]):
            yield f"chain: {problem.subject} {problem.sequence} {problem.what}"
        for n, one in enumerate(self.seen, 1):
            if one.recorded.sequence != n:
                yield f"event {one.recorded.sequence} stands at place {n}"
                return

    def _once(self) -> Iterator[str]:
        """A command takes effect once (invariant 6), and no leader writes after the next one has (invariant 7)."""
        ids: set[str] = set()
        first: dict[str, int] = {}
        epoch, batch = 0, ""
        for one in self.seen:
            envelope = one.recorded.envelope
            if envelope.id in ids:
                yield f"event id {envelope.id} is there twice"
            ids.add(envelope.id)
            if envelope.command in first and envelope.command != batch:
                yield f"command {envelope.command} took effect at {first[envelope.command]} and {one.recorded.sequence}"
            first.setdefault(envelope.command, one.recorded.sequence)
            batch = envelope.command
            if envelope.epoch:
                if envelope.epoch < epoch:
                    yield f"event {one.recorded.sequence} has epoch {envelope.epoch} after {epoch}"
                epoch = max(epoch, envelope.epoch)

    def _switches(self) -> Iterator[str]:
        """One running switch for each model (invariant 3), and an outcome that is what happened (invariant 9)."""
        running: dict[str, str] = {}
        world = self._end()
        for one in self.seen:
            match one.recorded.event:
                case SwitchAdmitted(model, switch):
                    if running.get(model):
                        yield f"{switch} was admitted while {running[model]} ran"
                    running[model] = switch
                case SwitchClosed(model, switch, outcome):
                    if running.get(model) != switch:
                        yield f"{switch} was closed while {running.get(model)} ran"
                    running[model] = ""
                    phase = world.switches[switch].phase
                    if phase != outcome or phase not in ENDED:
                        yield f"{switch} was closed as {outcome}, but is {phase}"
                case _:
                    pass

    def _world(self) -> Iterator[str]:
        """Routes name proven instances only (1, 9); revisions grow by one (3); only the unused is stopped (2)."""
        world = World()
        dead: dict[str, set[str]] = {}  # model → instances that its newest revision names though they had failed
        for one in self.seen:
            event = one.recorded.event
            match event:
                case RouteChanged(model, revision, splits):
                    if revision != world.state("route", model).revision + 1:
                        yield f"revision {revision} of {model} follows {world.state('route', model).revision}"
                    yield from self._proven(world, event, splits, dead.get(model, set()))
                    dead[model] = self._failed(world, splits)
                case InstanceDraining(instance, _, forced_by) if not forced_by:
                    state = world.instances[instance]
                    if state.phase == "ready" and world.state("route", state.model).names(instance):
                        yield f"{instance} was asked to stop while the route named it ({one.recorded.sequence})"
                    elif state.phase == "ready" and not routes.drained(world, state.model, state.version):
                        yield f"{instance} was asked to stop while a gateway could use it ({one.recorded.sequence})"
                case InstanceStopped(instance):
                    if world.instances[instance].phase != "draining":
                        yield f"{instance} was stopped although nobody asked for it ({one.recorded.sequence})"
                case RouteApplied(gateway, model, revision):
                    if gateway in world.gateways and revision <= world.gateways[gateway].applied.get(model, 0):
                        yield f"{gateway} went back to revision {revision} of {model}"
                case _:
                    pass
            world.apply(one.recorded)

    @staticmethod
    def _proven(world: World, event: RouteChanged, splits: tuple[Split, ...], known: set[str]) -> Iterator[str]:
        """An engine may die while the route is being written. The revision after that one knows (``known``)."""
        for split in splits:
            for endpoint in split.endpoints:
                state = world.state("instance", endpoint.instance)
                if state.phase == "failed" and endpoint.instance not in known:
                    continue
                if state.phase != "ready" or state.address != endpoint.address:
                    where = f"revision {event.revision} of {event.model}"
                    yield f"{where} names {endpoint.instance}, which is {state.phase}"

    @staticmethod
    def _failed(world: World, splits: tuple[Split, ...]) -> set[str]:
        named = (endpoint.instance for split in splits for endpoint in split.endpoints)
        return {instance for instance in named if world.state("instance", instance).phase == "failed"}

    def _answers(self) -> Iterator[str]:
        """Each answer is by a version that its revision names, by an instance that was not asked to stop (1)."""
        stopping: dict[str, float] = {}
        applied: dict[str, list[tuple[float, str, int]]] = {}
        urls: dict[str, str] = {}
        for one in self.seen:
            match one.recorded.event:
                case InstanceDraining(instance) | InstanceFailed(instance):
                    stopping.setdefault(instance, one.at)
                case GatewayJoined(gateway, address):
                    urls[gateway] = address
                case RouteApplied(gateway, model, revision):
                    applied.setdefault(urls.get(gateway, ""), []).append((one.at, model, revision))
                case _:
                    pass
        for reply in self.replies:
            if reply.status != 200:
                continue
            route = self.routes.get((reply.model, reply.revision))
            if route is None:
                yield f"answer by revision {reply.revision}, which the log does not know: {reply}"
                continue
            event = route.recorded.event
            assert isinstance(event, RouteChanged)
            endpoints = [e for s in event.splits if s.version == reply.version for e in s.endpoints]
            if not endpoints:
                yield f"answer by {reply.version}, which revision {reply.revision} does not name: {reply}"
            elif all(stopping.get(e.instance, reply.sent) < reply.sent for e in endpoints):
                yield f"answer by {reply.version}, of which every instance had been asked to stop: {reply}"
            if reply.text and not reply.text.startswith(reply.version):
                yield f"the answer says {reply.text!r}, its header {reply.version}"
            newest = max(
                (n for at, model, n in applied.get(reply.gateway, ()) if at < reply.sent and model == reply.model),
                default=0,
            )
            if reply.revision < newest:
                yield f"answer by revision {reply.revision} after its gateway had acknowledged {newest}: {reply}"

    def _end(self) -> World:
        world = World()
        for one in self.seen:
            world.apply(one.recorded)
        return world

    def _model(self, switch: str) -> str:
        for one in self.seen:
            event = one.recorded.event
            if isinstance(event, SwitchAdmitted) and event.switch == switch:
                return event.model
        return ""
