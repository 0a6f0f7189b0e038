"""The control side of a gateway, against ports and a data plane that the test plays."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from structlog.testing import capture_logs

from turnout.core.decider import Accepted, Answer, Failed, Rejected
from turnout.events.route import Endpoint, Split
from turnout.events.store import Unavailable
from turnout.projections.fleet import GatewayView
from turnout.projections.routing import RouteView
from turnout.workers.clock import SystemClock
from turnout.workers.gateway.agent import GatewayAgent
from turnout.workers.gateway.transition import Drained, RequestTracker, TransitionManager
from turnout.workers.ports import GatewayBeat, Request, ViewEntry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import pytest

    from turnout.workers.gateway.transition import Transition
    from turnout.workers.ports import ModelUse

Changed = "Callable[[Mapping[str, ViewEntry], int], None]"
OWN = "gateway.g1"


class Closed:
    async def close(self) -> None:
        """Nothing runs."""


class Plane:
    """A data plane without sockets: what it was told, and whether it serves."""

    def __init__(self) -> None:
        self.gateway = ""
        self.control_plane: Callable[[], str] = str
        self.manager = TransitionManager(RequestTracker())
        self.said: list[str] = []
        self.report: Callable[[Drained], None] = lambda _: None
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.reached = asyncio.Event()
        self.reached.set()

    def bind(self) -> str:
        self.said.append("bind")
        return "http://127.0.0.1:1"

    async def listen(self) -> None:
        self.said.append("listen")

    def apply(self, route: RouteView) -> Transition | None:
        return self.manager.begin_transition(route, 0.0)

    async def reach(self, model: str) -> None:
        await self.reached.wait()

    def in_flight(self) -> dict[str, dict[str, int]]:
        return {"chat": {"v1": 3}}

    def on_waiting(self, ask: Callable[[str, int], None]) -> None:
        self.wake = ask

    def refuse_waiting(self, model: str, reason: str) -> None:
        self.said.append(f"refuse {model}: {reason}")

    def uses(self) -> dict[str, ModelUse]:
        return {}

    def on_drained(self, report: Callable[[Drained], None]) -> None:
        self.report = report

    async def stop(self) -> int:
        self.said.append("stop")
        await self.quiet.wait()
        return 0


class News:
    """Routes that are told before they are stored as views."""

    def __init__(self) -> None:
        self.heard: Callable[[bytes], None] = lambda view: None

    async def tell(self, model: str, view: bytes) -> None:
        self.heard(view)

    async def listen(self, heard: Callable[[bytes], None]) -> Closed:
        self.heard = heard
        return Closed()


class World:
    """The control plane: it accepts commands unless it is told otherwise, and shows the views that it is given."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, object]]] = []
        self.sequence = 100
        self.answer: Callable[[str, str], Answer | Exception | None] = lambda verb, id: None
        self.held = asyncio.Event()
        self.held.set()
        self.changed: Callable[[Mapping[str, ViewEntry], int], None] | None = None
        self.beats = 0
        self.beat = GatewayBeat()
        self.connected = True
        self.plane = Plane()
        self.news = News()
        me: Any = self
        plane: Any = self.plane
        self.agent = GatewayAgent("g1", plane, me, me, me, self.news, SystemClock(), lambda: self.connected)
        self.ready: list[str] = []

    # Bus

    async def ask(self, role: str, verb: str, request: Request, timeout_s: float = 5.0) -> Answer:
        assert role == "gw"
        assert request.actor == "gateway:g1"
        self.asked.append((verb, request.id, msgspec.json.decode(request.body, type=dict[str, object])))
        await self.held.wait()
        answer = self.answer(verb, request.id)
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            return answer
        self.sequence += 1
        return Accepted(f"turnout.evt.{verb}", self.sequence)

    # Beats

    async def publish(self, kind: str, id: str, body: bytes) -> None:
        assert (kind, id) == ("gateway", "g1")
        self.beats += 1
        self.beat = msgspec.json.decode(body, type=GatewayBeat)

    # ViewReader

    async def watch(self, keys: tuple[str, ...], changed: Callable[[Mapping[str, ViewEntry], int], None]) -> Closed:
        assert keys == ("route.*", OWN)
        self.changed = changed
        changed({}, 0)
        return Closed()

    # What the tests say

    def show(self, sequence: int, *views: RouteView | GatewayView) -> None:
        assert self.changed is not None
        entries: dict[str, ViewEntry] = {}
        for view in views:
            key = f"route.{view.model}" if isinstance(view, RouteView) else OWN
            entries[key] = ViewEntry(key, msgspec.json.encode(view), sequence)
        self.changed(entries, sequence)

    def forget(self, sequence: int) -> None:
        """The gateway's own view is removed."""
        assert self.changed is not None
        self.changed({OWN: ViewEntry(OWN, b"", sequence)}, sequence)

    def verbs(self) -> list[str]:
        return [verb for verb, _, _ in self.asked]

    def bodies(self, verb: str) -> list[dict[str, object]]:
        return [body for asked, _, body in self.asked if asked == verb]


def route(revision: int, version: str, model: str = "chat", left: dict[str, int] | None = None) -> RouteView:
    split = Split(version, 100.0, (Endpoint(f"{version}-a", f"unix:/run/{version}"),))
    return RouteView(model, revision, (split,), "s", 30.0, left or {})


async def wait(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  any condition
            await asyncio.sleep(0)


def play(scenario: Callable[[World], Awaitable[None]]) -> None:
    """Run an agent beside the scenario, stop it, and see that nothing of it is left."""

    async def whole() -> None:
        world = World()
        running = asyncio.create_task(world.agent.run(world.ready.append))
        await wait(lambda: world.changed)
        await scenario(world)
        if not running.done():
            world.held.set()
            world.plane.quiet.set()
            world.agent.stop()
        await running
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())


async def opened(world: World) -> None:
    await wait(lambda: world.asked)
    await wait(lambda: world.sequence > 100)
    world.show(world.sequence)
    await wait(lambda: world.ready)


def test_requests_are_taken_only_when_the_views_are_as_new_as_the_joining() -> None:
    async def scenario(w: World) -> None:
        await wait(lambda: w.sequence == 101)
        w.show(100, route(1, "v1"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert w.plane.said == ["bind"]
        w.show(101)
        await wait(lambda: w.ready)
        assert w.plane.said == ["bind", "listen"]
        assert w.ready == ["http://127.0.0.1:1"]

    play(scenario)


def test_an_applied_revision_is_acknowledged_and_then_what_it_drained() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        w.show(102, route(1, "v1"))
        await wait(lambda: "gateway.applied" in w.verbs())
        w.show(103, route(2, "v2"))
        await wait(lambda: "gateway.drained" in w.verbs())
        assert w.verbs() == ["gateway.join", "gateway.applied", "gateway.applied", "gateway.drained"]
        assert w.bodies("gateway.applied")[-1] == {"gateway": "g1", "model": "chat", "revision": 2}
        assert w.bodies("gateway.drained") == [
            {"gateway": "g1", "model": "chat", "version": "v1", "revision": 2, "ended": 0}
        ]

    play(scenario)


def test_a_route_is_applied_when_it_is_told_and_its_stored_view_changes_nothing_more() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        w.show(102, route(1, "v1"))
        await wait(lambda: "gateway.applied" in w.verbs())
        await w.news.tell("chat", msgspec.json.encode(route(2, "v2")))
        await wait(lambda: "gateway.drained" in w.verbs())
        w.show(103, route(2, "v2"))
        await w.news.tell("chat", msgspec.json.encode(route(1, "v1")))  # late news of an older revision
        await w.news.tell("chat", b"no route")
        for _ in range(20):
            await asyncio.sleep(0)
        assert w.plane.manager.applied() == {"chat": 2}
        assert w.verbs() == ["gateway.join", "gateway.applied", "gateway.applied", "gateway.drained"]

    play(scenario)


def test_a_report_is_sent_again_with_the_same_id_until_it_is_answered() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        answers: list[Answer | Exception] = [Unavailable("gone"), Failed("store_full", "full", "make room")]
        w.answer = lambda verb, id: answers.pop(0) if answers else None
        with capture_logs() as logs:
            w.show(102, route(1, "v1"))
            await wait(lambda: w.verbs().count("gateway.applied") == 3)
        assert len({id for verb, id, _ in w.asked if verb == "gateway.applied"}) == 1
        assert [entry["event"] for entry in logs if entry["event"] == "report_waits"] == ["report_waits"]

    play(scenario)


def test_while_one_model_waits_for_its_answer_another_is_acknowledged() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        w.held.clear()
        w.show(102, route(1, "v1"), route(1, "v1", "other"))
        await wait(lambda: w.verbs().count("gateway.applied") == 2)

    play(scenario)


def test_a_revision_is_acknowledged_only_when_its_engines_are_reached() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        w.show(102, route(1, "v1"))
        await wait(lambda: "gateway.applied" in w.verbs())
        w.plane.reached.clear()
        w.show(103, route(2, "v2"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert w.plane.manager.applied() == {"chat": 2}, "requests go by it at once"
        assert len(w.bodies("gateway.applied")) == 1
        w.show(104, route(3, "v1"))  # the engine was dead, and this is the way back
        w.plane.reached.set()
        await wait(lambda: len(w.bodies("gateway.applied")) == 2)
        assert w.bodies("gateway.applied")[-1]["revision"] == 3

    play(scenario)


def test_revisions_that_came_while_a_report_waited_are_acknowledged_by_the_newest() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        w.held.clear()
        w.show(102, route(1, "v1"))
        await wait(lambda: "gateway.applied" in w.verbs())
        for revision in range(2, 6):
            w.show(102 + revision, route(revision, "v1"))
        w.held.set()
        await wait(lambda: len(w.bodies("gateway.applied")) == 2)
        assert [body["revision"] for body in w.bodies("gateway.applied")] == [1, 5]

    play(scenario)


def test_a_gateway_that_was_counted_as_lost_joins_again_and_says_what_it_applied() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        w.show(102, route(3, "v1"))
        await wait(lambda: len(w.bodies("gateway.applied")) == 1)
        w.sequence += 1  # GatewayLost has a place of its own in the log
        w.show(w.sequence, GatewayView("g1", state="lost"))
        await wait(lambda: w.verbs().count("gateway.join") == 2)
        await wait(lambda: len(w.bodies("gateway.applied")) == 2)
        assert len({id for verb, id, _ in w.asked if verb == "gateway.join"}) == 2
        # A view from before the second joining says nothing new.
        w.show(101, GatewayView("g1", state="lost"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert w.verbs().count("gateway.join") == 2
        w.show(w.sequence, GatewayView("g1", state="live"))

    play(scenario)


def test_a_gateway_that_was_lost_so_long_ago_that_its_view_is_forgotten_joins_again() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        w.show(w.sequence, GatewayView("g1", state="live"))
        w.sequence += 1
        w.forget(w.sequence)
        await wait(lambda: w.verbs().count("gateway.join") == 2)

    play(scenario)


def test_a_log_that_does_not_know_the_gateway_is_joined_again() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        refused = [Rejected("gateway_unknown", "g1 has not joined", "join")]
        w.answer = lambda verb, id: refused.pop() if verb == "gateway.applied" and refused else None
        w.show(102, route(1, "v1"))
        await wait(lambda: len(w.bodies("gateway.applied")) == 2)
        assert w.verbs().count("gateway.join") == 2

    play(scenario)


def test_a_report_that_is_rejected_is_said_and_dropped() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        w.answer = lambda verb, id: Rejected("odd", "no", "ask") if verb == "gateway.applied" else None
        with capture_logs() as logs:
            w.show(102, route(1, "v1"))
            await wait(lambda: [e for e in logs if e["event"] == "report_rejected"])
        w.show(103, route(2, "v2"))
        await wait(lambda: "gateway.drained" in w.verbs())

    play(scenario)


def test_a_view_that_cannot_be_read_leaves_the_route_as_it_is() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        w.show(102, route(1, "v1"))
        assert w.changed is not None
        with capture_logs() as logs:
            w.changed({"route.chat": ViewEntry("route.chat", b'{"model":7}', 103)}, 103)
        assert [entry["event"] for entry in logs] == ["view_unreadable"]
        w.changed({"route.chat": ViewEntry("route.chat", b"", 104)}, 104)
        assert w.plane.manager.applied() == {"chat": 1}

    play(scenario)


def test_routes_are_followed_while_the_last_requests_end() -> None:
    async def scenario(w: World) -> None:
        await opened(w)
        w.plane.quiet.clear()
        w.agent.stop()
        await wait(lambda: "stop" in w.plane.said)
        w.show(102, route(1, "v1"))
        await wait(lambda: "gateway.applied" in w.verbs())
        assert "gateway.leave" not in w.verbs()
        w.plane.quiet.set()
        await wait(lambda: "gateway.leave" in w.verbs())

    play(scenario)


def test_a_stop_before_anybody_answered_ends_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(w: World) -> None:
        w.held.clear()
        w.agent.stop()
        await wait(lambda: "stop" in w.plane.said)

    play(scenario)


def test_leaving_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turnout.workers.gateway.agent.FAREWELL_S", 0.01)

    async def scenario(w: World) -> None:
        await opened(w)
        w.answer = lambda verb, id: Unavailable("gone")
        w.show(102, route(1, "v1"))

    play(scenario)


def test_it_says_since_when_the_control_plane_is_away() -> None:
    async def scenario(w: World) -> None:
        assert w.plane.control_plane() == "connected"
        w.connected = False
        first = w.plane.control_plane()
        assert first.startswith("disconnected since 2")
        assert w.plane.control_plane() == first
        w.connected = True
        assert w.plane.control_plane() == "connected"
        await wait(lambda: w.beats)
        assert w.beat.in_flight == {"chat": {"v1": 3}}

    play(scenario)
