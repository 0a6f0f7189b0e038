"""Histories that earlier versions wrote: decoded, checked and folded by this one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from turnout.core.world import World
from turnout.events.chain import verify_chain
from turnout.events.codec import decode
from turnout.events.envelope import Recorded, Unknown
from turnout.events.instance import InstanceReady
from turnout.projections.views import Views

FILES = sorted(Path(__file__).parent.glob("*.jsonl"))


class Line(msgspec.Struct, forbid_unknown_fields=True):
    subject: str
    sequence: int
    type: str
    envelope: str
    body: str
    digest: str


def lines(file: Path) -> list[Line]:
    return [msgspec.json.decode(line, type=Line) for line in file.read_bytes().splitlines()]


def history(file: Path) -> list[Recorded]:
    return [decode(e.subject, e.sequence, e.type, e.envelope.encode(), e.body.encode()) for e in lines(file)]


@pytest.fixture(params=FILES, ids=[file.stem for file in FILES])
def file(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_every_event_is_known_and_has_the_digest_it_had(file: Path) -> None:
    recorded = history(file)

    assert recorded
    assert [r.digest for r in recorded] == [line.digest for line in lines(file)]
    assert verify_chain(recorded) == []
    assert not [r for r in recorded if isinstance(r.event, Unknown)]


def test_it_folds_and_the_views_can_be_dropped_and_rebuilt(file: Path) -> None:
    recorded = history(file)
    world, views, again = World(), Views(), Views()
    for one in recorded:
        assert world.apply(one)
        views.apply(one)
    for one in recorded:
        again.apply(one)

    assert world.sequence == recorded[-1].sequence
    assert views.everything() == again.everything()
    assert views.everything()


def test_version_1_of_instance_ready_is_read_as_version_2() -> None:
    ready = [r for r in history(FILES[0]) if isinstance(r.event, InstanceReady)]

    assert [(r.envelope.version, r.event.load_s, r.event.probe_s) for r in ready] == [  # type: ignore[attr-defined]
        (1, 1.75, 0.0),
        (2, 1.5, 0.25),
    ]
    assert b'"seconds":1.75' in ready[0].body, "what is stored stays as it is"


def test_a_switch_of_that_time_has_the_same_outcome_today() -> None:
    world, views = World(), Views()
    for one in history(FILES[0]):
        world.apply(one)
        views.apply(one)

    model = views.registry.view("org/chat.v1")
    assert model is not None
    assert (model.active, model.known_good, model.switch) == ("v2", ("v1", "v2"), "")
    route = views.routing.view("org/chat.v1")
    assert route is not None
    assert (route.revision, [(s.version, s.weight) for s in route.splits]) == (3, [("v2", 100.0)])
    assert world.running == set()
    assert world.live_gateways == set()


def test_an_older_good_version_that_took_over_is_the_active_one_today() -> None:
    world, views = World(), Views()
    for one in history(next(file for file in FILES if "older-good-version-takes-over" in file.name)):
        world.apply(one)
        views.apply(one)

    (switch,) = (view for view in views.switches.switches.values() if view.target == "v2")
    assert (switch.phase, switch.source, switch.back_to) == ("rolled_back", "v1", "v0")
    model = views.registry.view("chat")
    assert model is not None
    assert (model.active, model.last_outcome) == ("v0", "rolled_back")
    assert not world.running
