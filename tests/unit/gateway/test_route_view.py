"""What a route view says of versions that left, for gateways that missed revisions."""

from __future__ import annotations

from datetime import UTC, datetime

from turnout.events.envelope import Envelope, Recorded
from turnout.events.route import Endpoint, RouteChanged, Split
from turnout.projections.routing import LEFT_MOST, RouteView, Routing


def fold(*routes: tuple[str, ...]) -> RouteView:
    """The view after so many revisions, each naming these versions."""
    routing = Routing()
    envelope = Envelope("e", 1, "c", "a", "", "", datetime(2026, 1, 1, tzinfo=UTC), 0, "", "0")
    for n, versions in enumerate(routes, 1):
        splits = tuple(Split(v, 100 / len(versions), (Endpoint(v, f"unix:/{v}"),)) for v in versions)
        event = RouteChanged("chat", n, splits, "s", 30.0, "sw")
        routing.apply(Recorded("turnout.evt.route.chat", n, "RouteChanged", event, envelope, b"", b""))
    view = routing.view("chat")
    assert view is not None
    return view


def test_a_version_that_left_is_named_with_the_revision_that_it_left_with() -> None:
    assert fold(("v1",), ("v1", "v2"), ("v2",), ("v2", "v3"), ("v2",)).left == {"v1": 3, "v3": 5}


def test_a_version_that_came_back_has_not_left() -> None:
    assert fold(("v1",), ("v2",), ("v1",)).left == {"v2": 3}


def test_no_more_are_named_than_anybody_can_have_missed() -> None:
    view = fold(*((f"v{n}",) for n in range(LEFT_MOST + 10)))
    assert len(view.left) == LEFT_MOST
    assert view.left[f"v{LEFT_MOST + 8}"] == LEFT_MOST + 10
