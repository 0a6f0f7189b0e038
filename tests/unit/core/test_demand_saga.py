"""Models that are loaded on demand: when they are loaded, kept, and let go; the words by which that is said."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.unit.core.story import FAKE, Story, registered

from turnout.core import model
from turnout.core.sagas import demand
from turnout.core.sagas.demand import Use
from turnout.core.serving import parse
from turnout.core.testing import given
from turnout.events.instance import (
    InstanceDraining,
    InstanceFailed,
    InstanceReady,
    InstanceRequested,
    InstanceSleepRequested,
    InstanceSlept,
    InstanceStopped,
    InstanceWakeRequested,
)
from turnout.events.model import (
    ActiveVersionChanged,
    DemandEnded,
    DemandSeen,
    ModelRegistered,
    Serving,
    ServingChanged,
    SwitchAdmitted,
)
from turnout.events.model import VersionRegistered as Registered
from turnout.events.route import Endpoint, Hold, RouteChanged, Split

KEEP = Serving(on_demand=True, keep_alive_s=60.0, residency_s=5.0)
HOLD = Hold(64, 120.0, wake=True)


def of(events: list[object], kind: type) -> list[Any]:
    return [e for e in events if isinstance(e, kind)]


def at_zero(*models: str, serving: Serving = KEEP, capacity: int = 1) -> Story:
    """Models with one version each, all on demand, on a worker with few places; their first routes are applied."""
    story = registered("v1", capacity=capacity)
    for name in models:
        if name == "chat":
            continue
        story.happens(ModelRegistered(name), Registered(name, "v1", FAKE, ""))
    for name in models:
        story.happens(ServingChanged(name, serving), ActiveVersionChanged(name, "v1", "", ""))
    story.carry_placement()
    for name in models:
        story.applied(model=name)
    return story


def asked_for(story: Story, name: str) -> Story:
    """A request waits for the model."""
    return story.happens(DemandSeen(name, "v1", "g1", story.now))


def loaded(story: Story, name: str) -> Story:
    """Asked for, loaded, routed, applied."""
    asked_for(story, name)
    (requested,) = of(story.carry_placement(), InstanceRequested)
    story.ready(requested.instance).carry_placement()
    return story.applied(model=name)


def owed(story: Story, **uses: Use) -> list[object]:
    return [e for one in demand.agenda(story.world, uses, story.now).owed for e in story.carry_out(one)]


def test_a_model_on_demand_has_a_route_without_a_version_and_loads_nothing() -> None:
    story = at_zero("chat")
    route = story.world.routes["chat"]
    assert (route.revision, route.splits, route.hold) == (1, (), HOLD)
    assert story.placement().owed == ()
    assert owed(story) == []


def test_it_is_loaded_when_a_request_waits_and_routed_when_it_is_proven() -> None:
    story = asked_for(at_zero("chat"), "chat")
    (requested,) = of(story.carry_placement(), InstanceRequested)
    assert (requested.version, requested.cause) == ("v1", "restore")
    story.ready(requested.instance)
    (route,) = of(story.carry_placement(), RouteChanged)
    assert route.splits == (Split("v1", 100.0, (Endpoint("i1", "unix:/run/i1"),)),)


def test_it_goes_when_its_keep_alive_is_over_and_not_before() -> None:
    story = loaded(at_zero("chat"), "chat")
    wake = demand.agenda(story.world, {"chat": Use(0, 0, 59.0)}, story.now)
    assert (wake.owed, wake.wake) == ((), story.now + timedelta(seconds=1))
    ended, route = owed(story, chat=Use(0, 0, 60.0))
    assert isinstance(ended, DemandEnded)
    assert (ended.cause, ended.version) == ("idle", "v1")
    assert isinstance(route, RouteChanged)
    assert (route.splits, route.hold) == ((), HOLD)
    assert of(story.carry_placement(), InstanceDraining) == [], "a gateway may still be sending to it"
    story.applied().drained("v1")
    (draining,) = of(story.carry_placement(), InstanceDraining)
    assert draining.instance == "i1"


@pytest.mark.parametrize("use", [Use(1, 0, 0.0), Use(0, 1, 99.0), None])
def test_it_stays_while_requests_run_or_wait_and_while_a_gateway_is_silent(use: Use | None) -> None:
    story = loaded(at_zero("chat"), "chat").later(600.0)
    assert owed(story, **({} if use is None else {"chat": use})) == []


def test_one_that_is_kept_for_ever_stays() -> None:
    story = loaded(at_zero("chat", serving=Serving(on_demand=True, keep_alive_s=-1)), "chat")
    assert owed(story, chat=Use(0, 0, 1e6)) == []


def test_a_failed_load_ends_the_wait_and_the_next_request_tries_again_after_the_back_off() -> None:
    story = asked_for(at_zero("chat"), "chat")
    story.carry_placement()
    story.happens(InstanceFailed("i1", "loading", "no memory"))
    ended, route = owed(story)
    assert isinstance(ended, DemandEnded)
    assert (ended.cause, ended.reason) == ("failed", "no memory")
    assert isinstance(route, RouteChanged)
    assert route.hold == Hold(64, 120.0, True, 1, "no memory")
    assert of(story.later(5.0).carry_placement(), InstanceRequested) == []
    asked_for(story, "chat")
    assert len(of(story.carry_placement(), InstanceRequested)) == 1


def test_an_engine_that_dies_while_it_serves_is_replaced_and_who_waits_goes_on_waiting() -> None:
    story = loaded(at_zero("chat"), "chat").later(30.0)
    story.happens(InstanceFailed("i1", "serving", "crashed"))
    assert owed(story) == []
    events = story.later(1.0).carry_placement()
    assert len(of(events, InstanceRequested)) == 1
    assert of(events, RouteChanged)[0].hold == HOLD


def test_a_model_that_waits_for_a_place_gets_it_when_the_others_residency_is_over() -> None:
    story = loaded(at_zero("chat", "embed"), "chat").later(1.0)
    asked_for(story, "embed").carry_placement()
    ready = story.world.ready_at("i1")
    assert ready is not None
    waits = demand.agenda(story.world, {"chat": Use(3, 0, 0.0)}, story.now)
    assert (waits.owed, waits.wake) == ((), ready + timedelta(seconds=5))
    story.now = ready + timedelta(seconds=5)
    ended, _ = owed(story, chat=Use(3, 0, 0.0))
    assert isinstance(ended, DemandEnded)
    assert (ended.model, ended.cause) == ("chat", "room")
    assert owed(story) == [], "room is being made"
    story.applied().drained("v1").carry_placement()
    story.happens(InstanceStopped("i1", 0.1))
    (requested,) = of(story.carry_placement(), InstanceRequested)
    assert requested.model == "embed"


def test_one_in_two_idle_models_makes_room_the_idle_one_before_the_busy_one() -> None:
    story = at_zero("a", "b", "chat", capacity=2)
    for name in ("a", "b"):
        loaded(story, name)
    story.later(60.0)
    asked_for(story, "chat").carry_placement()
    ended, *_ = owed(story, a=Use(2, 0, 0.0), b=Use(0, 0, 50.0))
    assert isinstance(ended, DemandEnded)
    assert ended.model == "b"


def test_nothing_is_let_go_while_a_switch_runs() -> None:
    story = loaded(at_zero("chat", capacity=2), "chat")
    story.happens(Registered("chat", "v2", FAKE, ""), SwitchAdmitted("chat", "sw-1", "v2"))
    assert owed(story, chat=Use(0, 0, 1e6)) == []


# --- the decider ---------------------------------------------------------------------------------------------------


def test_many_gateways_ask_and_it_is_needed_once() -> None:
    story = at_zero("chat")
    known = story.world.models["chat"]
    see = model.SeeDemand("chat", "g1", story.now)
    given(model).when(see).then_rejected("model_unknown")
    assert model.decide(known, see) == (DemandSeen("chat", "v1", "g1", story.now),)
    asked_for(story, "chat")
    assert model.decide(story.world.models["chat"], see) == ()


def test_only_a_model_that_may_be_loaded_on_demand_can_be_asked_for() -> None:
    story = registered("v1")
    see = model.SeeDemand("chat", "g1", story.now)
    refused = model.decide(story.world.models["chat"], see)
    assert getattr(refused, "code", "") == "not_on_demand"
    story.happens(ServingChanged("chat", KEEP))
    refused = model.decide(story.world.models["chat"], see)
    assert getattr(refused, "code", "") == "nothing_active"


def test_serving_must_name_a_version_that_exists_and_bounds_that_can_be_met() -> None:
    known = registered("v1").world.models["chat"]
    refused = model.decide(known, model.SetServing("chat", KEEP, "v9"))
    assert getattr(refused, "code", "") == "version_unknown"
    refused = model.decide(known, model.SetServing("chat", Serving(on_demand=True, queue=0)))
    assert getattr(refused, "code", "") == "serving_invalid"


@pytest.mark.parametrize(
    ("words", "serving"),
    [
        ({}, Serving()),
        ({"on_demand": True}, Serving(on_demand=True)),
        ({"on_demand": True, "keep_alive": "10m"}, Serving(on_demand=True, keep_alive_s=600.0)),
        ({"on_demand": True, "keep_alive": 0}, Serving(on_demand=True, keep_alive_s=0.0)),
        ({"on_demand": True, "keep_alive": -1}, Serving(on_demand=True, keep_alive_s=-1.0)),
        ({"on_demand": True, "keep_alive": "-1"}, Serving(on_demand=True, keep_alive_s=-1.0)),
        (
            {"on_demand": True, "queue": 7, "max_wait": "1m", "residency": 2},
            Serving(on_demand=True, queue=7, max_wait_s=60.0, residency_s=2.0),
        ),
    ],
)
def test_the_words_of_a_file_say_how_a_model_is_served(words: dict[str, object], serving: Serving) -> None:
    assert parse(words) == serving


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"on_demand": "yes"}, "on_demand is"),
        ({"on_demand": True, "keep_alive": "soon"}, "keep_alive is"),
        ({"on_demand": True, "keep_alive": -2}, "keep_alive is -2 s"),
        ({"on_demand": True, "queue": 0}, "queue is 0"),
        ({"on_demand": True, "queue": "many"}, "queue is"),
        ({"on_demand": True, "max_wait": 0}, "max_wait is 0 s"),
        ({"on_demand": True, "max_wait": "5s", "residency": "5s"}, "residency is 5 s and max_wait 5 s"),
        ({"on_demand": True, "residency": -1.5}, "residency is -1.5 s"),
        ({"keep_alive": "5m"}, "keep_alive without on_demand"),
        ({"on_demand": True, "keepalive": "5m"}, "keepalive is no such word; did you mean 'keep_alive'?"),
    ],
)
def test_what_can_not_be_meant_names_the_word(words: dict[str, object], named: str) -> None:
    wrong = parse(words)
    assert isinstance(wrong, tuple)
    assert any(one.startswith(named) for one in wrong), wrong


def asleep_at_zero() -> Story:
    """It can sleep, was used, and nobody uses it any more."""
    story = loaded(at_zero("chat"), "chat")
    story.happens(InstanceReady("i1", "unix:/run/i1.b", 1.0, 0.1, 1000, "", sleeps=True))
    story.carry_placement()
    story.applied()
    owed(story, chat=Use(0, 0, 60.0))
    story.applied().drained("v1")
    reason = "nobody uses it: it is loaded again on demand"
    assert story.carry_placement() == [InstanceSleepRequested("i1", 1, reason)]
    return story.happens(InstanceSlept("i1", 1, 0.1, 10))


def test_at_zero_it_sleeps_where_it_can_and_the_next_request_wakes_it() -> None:
    story = asleep_at_zero()
    assert story.carry_placement() == []
    asked_for(story, "chat")
    assert of(story.carry_placement(), InstanceWakeRequested) == [InstanceWakeRequested("i1", "restore", 1000)]


def test_a_wake_that_fails_is_no_failed_load_and_who_waits_gets_a_cold_one() -> None:
    story = asked_for(asleep_at_zero(), "chat")
    story.carry_placement()
    story.happens(InstanceFailed("i1", "waking", "out of memory"))
    assert owed(story) == []
    (requested,) = of(story.carry_placement(), InstanceRequested)
    assert (requested.instance, requested.version) == ("i2", "v1")


def test_what_makes_room_for_another_model_sleeps_where_it_can() -> None:
    story = loaded(at_zero("chat", "embed"), "chat")
    story.happens(InstanceReady("i1", "unix:/run/i1.b", 1.0, 0.1, 1000, "", sleeps=True))
    story.carry_placement()
    story.applied()
    asked_for(story, "embed").later(6.0)
    (ended, *_) = owed(story, chat=Use(0, 0, 0.0))
    assert isinstance(ended, DemandEnded)
    story.applied().drained("v1")
    assert story.carry_placement() == [InstanceSleepRequested("i1", 1, "makes room for another model")]
    story.happens(InstanceSlept("i1", 1, 0.1, 10))
    assert [one.model for one in of(story.carry_placement(), InstanceRequested)] == ["embed"]
