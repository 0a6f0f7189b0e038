"""A switch where there is no place for both versions: requests wait while the source makes room for the target."""

from __future__ import annotations

from typing import Any

from tests.unit.core.story import Story, serving

from turnout.core.policy import parse
from turnout.core.sagas import placement
from turnout.core.sagas.switch import pause_s
from turnout.events.instance import (
    InstanceDraining,
    InstanceFailed,
    InstanceReady,
    InstanceRequested,
    InstanceSleepRequested,
    InstanceSlept,
    InstanceStopped,
    InstanceWakeRequested,
    InstanceWoken,
)
from turnout.events.model import ActiveVersionChanged
from turnout.events.route import Hold, RouteChanged
from turnout.events.switch import (
    HoldReleased,
    HoldStarted,
    RollbackStarted,
    RolledBack,
    StepStarted,
    SwitchCompleted,
)

HOLD = Hold(8, 60.0)


def asked(*, hold: bool = True) -> Story:
    """v1 serves on the only place; v2 was asked for."""
    return serving(capacity=1).asked("v2", hold=HOLD if hold else None)


def of(events: Any, kind: type) -> list[Any]:
    return [e for e in events if isinstance(e, kind)]


def held() -> Story:
    """Requests wait, and v1 has left."""
    story = asked()
    story.carry()
    story.applied().drained("v1")
    (draining,) = of(story.carry_placement(), InstanceDraining)
    assert draining.reason == "makes room for chat v2"
    return story.happens(InstanceStopped("i1", 0.3))


def test_without_leave_a_switch_waits_for_a_place_and_touches_nothing() -> None:
    assert asked(hold=False).owes().owed == ()


def test_with_leave_requests_wait_and_the_source_leaves_the_route() -> None:
    story = asked()
    started, route = story.carry()
    assert isinstance(started, HoldStarted)
    assert (started.version, started.expected_s) == ("v1", None)
    assert isinstance(route, RouteChanged)
    assert (route.splits, route.hold) == ((), HOLD)
    assert of(story.carry_placement(), InstanceDraining) == [], "it has requests to finish"


def test_the_target_is_loaded_in_its_place_and_gets_the_requests_that_waited() -> None:
    story = held()
    assert of(story.carry(), InstanceRequested)[0].version == "v2"
    events = story.ready("i2").carry()
    assert len(of(events, StepStarted)) == len(of(events, HoldReleased)) == 1
    (route,) = of(events, RouteChanged)
    assert ([s.version for s in route.splits], route.hold) == (["v2"], None)
    story.applied().carry()
    completed = story.carry()
    assert len(of(completed, SwitchCompleted)) == len(of(completed, ActiveVersionChanged)) == 1
    assert story.placement().owed == ()


def test_a_load_that_fails_brings_the_source_back_for_the_requests_that_wait() -> None:
    story = held()
    story.carry()
    story.happens(InstanceFailed("i2", "loading", "no memory"))
    events = story.carry()
    (back,) = of(events, RollbackStarted)
    assert (back.cause, "no memory" in back.reason) == ("failure", True)
    assert of(events, RouteChanged)[0].hold == HOLD, "they wait on"
    (again,) = of(story.carry_placement(), InstanceRequested)
    assert again.version == "v1"
    story.ready(again.instance).carry_placement()
    assert story.world.routes["chat"].names(again.instance)
    story.applied().carry()
    story.probed(again.instance)
    ended = story.carry()
    assert len(of(ended, RolledBack)) == len(of(ended, HoldReleased)) == 1


def test_a_source_that_does_not_finish_in_half_the_time_gets_its_requests_back() -> None:
    story = asked()
    story.carry()
    story.applied().later(25.0)
    assert story.owes().owed == ()
    story.later(10.0)
    (back,) = of(story.carry(), RollbackStarted)
    assert back.cause == "deadline"


def test_a_pause_is_foretold_from_what_was_measured() -> None:
    story = held()
    story.carry()
    story.ready("i2")
    drained_s = story.world.drains["chat"]
    assert drained_s > 0, "what ran when v1 left its route"
    assert pause_s(story.world, "chat", "v1", "v2") == drained_s + 0.3 + 1.0
    # and where v2 never left, as long as v1 took; where v1 sleeps, as long as its wake took
    assert pause_s(story.world, "chat", "v2", "v1") == drained_s + 0.3 + 1.0


def test_there_is_nothing_to_hold_where_both_have_a_place() -> None:
    assert not placement.must_swap(serving(capacity=2).world, "chat", "v1", "v2")
    assert placement.must_swap(serving(capacity=1).world, "chat", "v1", "v2")


def test_only_a_strategy_that_needs_one_version_at_a_time_may_hold() -> None:
    wrong = parse({"strategy": "canary", "hold": True})
    assert isinstance(wrong, tuple)
    assert "canary needs both versions" in wrong[0]
    allowed = parse({"strategy": "immediate", "hold": True})
    assert not isinstance(allowed, tuple)
    assert allowed.hold is True
    assert isinstance(parse({"strategy": "immediate", "hold": "yes"}), tuple)


def held_asleep() -> Story:
    """Requests wait, and v1, whose engine can sleep, has fallen asleep."""
    story = asked()
    story.happens(InstanceReady("i1", "unix:/run/i1", 1.0, 0.1, 1000, "", sleeps=True))
    story.carry()
    story.applied().drained("v1")
    assert story.carry_placement() == [InstanceSleepRequested("i1", 1, "makes room for chat v2")]
    return story.happens(InstanceSlept("i1", 1, 0.3, 10))


def test_a_source_that_can_sleep_sleeps_and_a_failed_load_wakes_it_for_the_requests_that_wait() -> None:
    story = held_asleep()
    assert of(story.carry(), InstanceRequested)[0].version == "v2"
    story.happens(InstanceFailed("i2", "loading", "no memory"))
    assert len(of(story.carry(), RollbackStarted)) == 1
    assert of(story.carry_placement(), InstanceWakeRequested) == [InstanceWakeRequested("i1", "restore", 1000)]
    story.happens(InstanceWoken("i1", 0.2, 0.1, 1000, 0, "unix:/run/i1.c")).carry_placement()
    assert story.world.routes["chat"].names("i1")


def test_a_pause_is_foretold_by_the_wake_where_the_target_sleeps() -> None:
    story = held_asleep()
    story.carry()
    story.ready("i2").carry()
    story.applied().carry()
    story.carry()
    story.happens(
        InstanceWakeRequested("i1", "x"), InstanceWoken("i1", 0.2, 0.1, 9), InstanceSleepRequested("i1", 1, "")
    )
    story.happens(InstanceSlept("i1", 1, 0.3, 10))
    world = story.world
    assert pause_s(world, "chat", "v2", "v1") == round(world.drains["chat"] + world.stops["chat", "v1"] + 0.2, 3)
