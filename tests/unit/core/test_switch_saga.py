"""The switch saga: in each situation, what is owed and when to look again."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from tests.unit.core.story import CONFIG, FAKE, Story, registered, serving

from turnout.core import model
from turnout.core.config import ModelSwitchingConfig
from turnout.core.judging.judgement import Decision, Judgement
from turnout.core.sagas import placement, routes
from turnout.core.sagas import switch as saga
from turnout.core.switch import ENDED
from turnout.core.world import DECIDERS, World
from turnout.events.gateway import GatewayJoined, GatewayLost, RouteApplied, VersionDrained
from turnout.events.instance import (
    InstanceDraining,
    InstanceFailed,
    InstanceLoading,
    InstanceReady,
    InstanceRequested,
    InstanceStopped,
)
from turnout.events.model import (
    ActiveVersionChanged,
    EngineSpec,
    Inspection,
    KnownGoodMarked,
    KnownGoodRevoked,
    RulesChanged,
    SwitchClosed,
    VersionRegistered,
    VersionRejected,
    VersionValidated,
)
from turnout.events.route import Endpoint, RouteChanged, Rule, Split
from turnout.events.switch import (
    BakeStarted,
    DrainStarted,
    InstancesRequested,
    RollbackStarted,
    RolledBack,
    StepApplied,
    StepStarted,
    SwitchAborted,
    SwitchFailed,
    SwitchPaused,
    TargetReady,
)

if TYPE_CHECKING:
    from collections.abc import Callable

I1, I2 = Endpoint("i1", "unix:/run/i1"), Endpoint("i2", "unix:/run/i2")


def names(events: tuple[object, ...]) -> list[str]:
    return [type(e).__name__ for e in events]


def loading() -> Story:
    """``sw-1`` has asked for ``i2``."""
    story = serving().asked("v2")
    story.carry()
    return story


def stepping() -> Story:
    """The target is ready and has got everything; no gateway has said so."""
    story = loading().ready("i2")
    story.carry()
    return story


def baking() -> Story:
    story = stepping().applied()
    story.carry()
    story.carry()
    return story


def draining() -> Story:
    story = baking().later(60.0)
    story.carry()
    return story


def test_a_switch_told_as_a_story() -> None:
    story = serving().asked("v2", bake_s=60.0)
    requested = story.carry()
    assert requested == (
        InstancesRequested("sw-1", ("i2",)),
        InstanceRequested("i2", "chat", "v2", "w1", FAKE, "sw-1", 1, 1000),
    )
    assert not story.owes().owed, "it waits for the worker"
    story.happens(InstanceLoading("i2", "starting", 0.0)).ready("i2")
    ready, step, route = story.carry()
    assert isinstance(ready, TargetReady)
    assert (ready.instances, ready.warm) == (("i2",), False)
    assert isinstance(step, StepStarted)
    assert (step.step, step.weight, step.revision) == (1, 100.0, 2)
    assert isinstance(route, RouteChanged)
    assert (route.revision, route.salt, route.drain_s) == (2, "sw-1", 600.0)
    assert route.splits == (Split("v1", 0.0, (I1,)), Split("v2", 100.0, (I2,)))
    assert not story.applied("g1").owes().owed, "one gateway is missing"
    (applied,) = story.applied("g2").carry()
    assert isinstance(applied, StepApplied)
    assert applied.gateways == ("g1", "g2")
    assert story.carry() == (BakeStarted("sw-1", story.now + timedelta(seconds=60)),)
    assert story.owes().wake == story.now + timedelta(seconds=60)
    assert not story.later(59.0).owes().owed
    drain, route = story.later(1.0).carry()
    assert isinstance(drain, DrainStarted)
    assert (drain.version, drain.revision) == ("v1", 3)
    assert isinstance(route, RouteChanged)
    assert route.splits == (Split("v2", 100.0, (I2,)),)
    assert not story.applied().drained("v1", "g1").owes().owed
    assert names(story.drained("v1", "g2").carry()) == [
        "ActiveVersionChanged",
        "KnownGoodMarked",
        "SwitchClosed",
        "SwitchCompleted",
    ]
    assert story.world.models["chat"].active == "v2"
    assert not story.world.running


def test_the_first_version_of_a_model_has_nothing_to_bake_beside_and_nothing_to_drain() -> None:
    story = registered("v1").asked("v1", source="")
    assert names(story.carry()) == ["InstancesRequested", "InstanceRequested"]
    _, _, route = story.ready("i1").carry()
    assert isinstance(route, RouteChanged)
    assert route.splits == (Split("v1", 100.0, (I1,)),)
    story.applied().carry()
    assert names(story.carry())[-1] == "SwitchCompleted"
    assert story.world.models["chat"].known_good == ("v1",)


def test_a_warm_target_is_ready_at_once() -> None:
    story = serving().instance("i2", "v2").asked("v2")
    ready, *_ = story.carry()
    assert isinstance(ready, TargetReady)
    assert ready.warm


def test_what_loads_already_is_not_loaded_twice() -> None:
    story = serving()
    story.happens(InstanceRequested("i7", "chat", "v2", "w1", FAKE, "sw-before")).asked("v2")
    assert story.carry() == (InstancesRequested("sw-1", ("i7",)),)


def test_without_a_place_it_waits_for_one_until_the_deadline() -> None:
    story = serving(capacity=1).asked("v2", deadline_s=10.0)
    assert not story.owes().owed
    assert story.owes().wake == story.now + timedelta(seconds=10)
    closed, failed = story.later(10.0).carry()
    assert closed == SwitchClosed("chat", "sw-1", "failed")
    assert isinstance(failed, SwitchFailed)
    assert failed.stage == "placement"
    assert "1 of 1 places taken" in failed.reason


@pytest.mark.parametrize("strategy", ["immediate", "canary"])
def test_a_target_takes_a_lost_sources_room_only_where_it_gets_everything_at_once(strategy: str) -> None:
    story = serving(capacity=1).happens(InstanceFailed("i1", "serving", "it crashed"))
    story.asked("v2", strategy=strategy, deadline_s=10.0)
    if strategy == "immediate":
        assert names(story.carry()) == ["InstancesRequested", "InstanceRequested"], (
            "the way out of a source that is gone"
        )
        return
    assert not story.owes().owed, "it shares the traffic with the source, which must have room to come back"
    failed = story.later(10.0).carry()[-1]
    assert isinstance(failed, SwitchFailed)
    assert "its room is left for v1, which has no ready instance" in failed.reason


def test_a_load_that_fails_fails_the_switch_with_the_engines_own_words_and_no_revision() -> None:
    story = loading()
    story.happens(InstanceFailed("i2", "loading", "exit code 1", ("out of memory",), 1))
    assert story.carry() == (
        SwitchClosed("chat", "sw-1", "failed"),
        SwitchFailed("sw-1", "loading", "exit code 1", ("out of memory",)),
    )
    assert story.world.routes["chat"].revision == 1


def test_a_load_that_takes_too_long_fails_with_the_stage_in_which_it_hangs() -> None:
    story = loading()
    story.happens(InstanceLoading("i2", "warming", 3.0)).later(300.0)
    failed = story.carry()[-1]
    assert isinstance(failed, SwitchFailed)
    assert failed.stage == "warming"
    assert "300 s (max_transition_time)" in failed.reason


def test_a_load_that_was_stopped_with_its_worker_fails_the_switch_at_once() -> None:
    story = loading()
    story.happens(InstanceLoading("i2", "warming", 3.0), InstanceStopped("i2", 0.1))
    failed = story.carry()[-1]
    assert isinstance(failed, SwitchFailed)
    assert (failed.stage, failed.reason) == ("warming", "i2 was stopped while it loaded")


def test_a_target_that_was_stopped_before_it_got_traffic_fails_the_switch() -> None:
    story = loading().ready("i2")
    story.happens(SwitchPaused("sw-1", "operator", "", story.now))
    story.carry()
    story.happens(InstanceStopped("i2", 0.1))
    failed = story.carry()[-1]
    assert isinstance(failed, SwitchFailed)
    assert failed.stage == "serving"


def test_a_step_that_not_every_gateway_applies_in_time_is_rolled_back() -> None:
    story = stepping().applied("g1")
    assert story.owes().wake is not None
    back, route = story.later(300.0).carry()
    assert isinstance(back, RollbackStarted)
    assert (back.cause, back.revision) == ("deadline", 3)
    assert isinstance(route, RouteChanged)
    assert route.splits == (Split("v1", 100.0, (I1,)),)


def test_a_gateway_that_is_lost_is_not_awaited() -> None:
    story = stepping().applied("g1")
    assert not story.owes().owed
    story.happens(GatewayLost("g2", 7.0))
    (applied,) = story.carry()
    assert isinstance(applied, StepApplied)
    assert applied.gateways == ("g1",)


def test_a_gateway_that_joins_is_awaited() -> None:
    story = stepping().applied()
    story.happens(GatewayJoined("g3", "http://g3"))
    assert not story.owes().owed
    story.happens(RouteApplied("g3", "chat", 2))
    assert story.owes().owed


@pytest.mark.parametrize("at", [stepping, baking, draining])
def test_a_target_that_dies_is_rolled_back_wherever_the_switch_stands(at: Callable[[], Story]) -> None:
    story = at()
    story.happens(InstanceFailed("i2", "serving", "it crashed"))
    back, route = story.carry()
    assert isinstance(back, RollbackStarted)
    assert back.cause == "failure"
    assert "it crashed" in back.reason
    assert isinstance(route, RouteChanged)
    assert [s.version for s in route.splits] == ["v1"]
    assert not story.owes().owed, "no gateway has applied it"
    story.applied().carry()
    closed, ended = story.probed("i1").carry()
    assert closed == SwitchClosed("chat", "sw-1", "rolled_back")
    assert isinstance(ended, RolledBack)
    assert story.world.models["chat"].active == "v1"


@pytest.mark.parametrize("at", [stepping, baking, draining])
def test_with_both_versions_dead_it_waits_until_placement_has_restored_one(at: Callable[[], Story]) -> None:
    story = at()
    story.happens(InstanceFailed("i2", "serving", "x"), InstanceFailed("i1", "serving", "x"))
    assert not any("RollbackStarted" in names(story.carry_out(o)) for o in story.owes().owed)
    story.later(5.0)
    restored = [e for e in story.carry_placement() if isinstance(e, InstanceRequested)]
    assert [(r.version, r.cause) for r in restored] == [("v1", "restore")]
    story.ready(restored[0].instance)
    assert isinstance(story.carry()[0], RollbackStarted)


def test_a_rollback_ends_only_when_every_gateway_has_applied_it_and_the_source_is_ready() -> None:
    story = baking()
    story.happens(InstanceFailed("i2", "serving", "x"))
    story.carry()
    story.happens(InstanceFailed("i1", "serving", "x"))
    assert not story.applied().owes().owed, "nothing would serve"
    story.later(5.0)
    again = next(e for e in story.carry_placement() if isinstance(e, InstanceRequested))
    story.ready(again.instance)
    story.carry_placement()
    story.applied().carry()
    assert isinstance(story.probed(again.instance).carry()[-1], RolledBack)


def test_a_source_that_a_rule_names_does_not_leave_and_is_not_waited_for() -> None:
    story = baking()
    story.happens(RulesChanged("chat", (Rule("short", "tokens < 100", version="v1"),)))
    _, route = story.later(60.0).carry()
    assert isinstance(route, RouteChanged)
    assert [(split.version, split.weight) for split in route.splits] == [("v2", 100.0), ("v1", 0.0)]
    assert not story.owes().owed, "no gateway has applied it"
    assert names(story.applied().carry())[-1] == "SwitchCompleted"


def with_an_older_version() -> Story:
    """v2 serves on ``i1``; v1, known to be good, is warm on ``i3``; ``sw-1`` has given v3 (``i4``) everything."""
    story = serving("v2", "v1", "v3").instance("i3", "v1").instance("i4", "v3")
    story.happens(KnownGoodMarked("chat", "v1", "sw-a"), KnownGoodMarked("chat", "v2", "sw-0"))
    story.asked("v3")
    story.carry()
    story.applied().carry()
    return story


def harm() -> Judgement:
    return Judgement(Decision.FAIL, step=1, rule="dead", reason="v3: 5 refused in a row", metric="dead")


@pytest.mark.parametrize("dead", [True, False])
def test_where_the_source_is_dead_too_an_older_version_that_is_good_and_warm_takes_over(dead: bool) -> None:
    story = with_an_older_version()
    story.happens(InstanceFailed("i1", "serving", "x"))
    if dead:
        story.happens(InstanceFailed("i4", "serving", "y"))
    events = story.carry(judgement=None if dead else harm())
    back, route = events[-2:]
    assert isinstance(back, RollbackStarted)
    assert (back.cause, back.to) == ("failure" if dead else "verdict", "v1")
    assert isinstance(route, RouteChanged)
    assert route.splits == (Split("v1", 100.0, (Endpoint("i3", "unix:/run/i3"),)),)
    hasty = ModelSwitchingConfig(max_cached_models=0, model_ttl_seconds=1.0)
    placed = story.later(5.0).carry_placement(hasty)
    assert "i3" not in {e.instance for e in placed if isinstance(e, InstanceDraining)}, "it is needed now"
    assert story.world.routes["chat"].splits == route.splits, "nothing repairs the route to another one"
    story.applied().carry()
    assert story.probed("i3").carry() == (
        ActiveVersionChanged("chat", "v1", "v2", "sw-1"),
        SwitchClosed("chat", "sw-1", "rolled_back"),
        RolledBack("sw-1", ("g1", "g2"), (story.now - back.at).total_seconds(), "i3"),
    )
    assert story.world.models["chat"].undo_target == "v2"


def test_the_source_is_taken_where_it_is_ready_and_the_newest_of_the_good_ones_where_it_is_not() -> None:
    story = with_an_older_version()
    assert routes.way_back(story.world, story.world.switches["sw-1"]) == "v2"
    story.happens(InstanceFailed("i1", "serving", "x"))
    story.happens(VersionRegistered("chat", "v0", FAKE, "")).instance("i9", "v0")
    story.happens(KnownGoodMarked("chat", "v0", "sw-b"))
    assert routes.way_back(story.world, story.world.switches["sw-1"]) == "v0"
    story.happens(KnownGoodMarked("chat", "v3", "sw-c"))
    assert routes.way_back(story.world, story.world.switches["sw-1"]) == "v0", "never to the target"


def test_a_rollback_whose_source_dies_on_the_way_is_sent_on_to_an_older_version() -> None:
    story = with_an_older_version()
    story.carry(judgement=harm())
    story.applied()
    story.happens(InstanceFailed("i1", "serving", "x"))
    again, route = story.carry()
    assert isinstance(again, RollbackStarted)
    assert (again.cause, again.to) == ("verdict", "v1")
    assert isinstance(route, RouteChanged)
    assert [split.version for split in route.splits] == ["v1"]
    story.instance("i8", "v2")
    story.applied().carry()
    assert names(story.probed("i3").carry())[0] == "ActiveVersionChanged", "it stays with what it has chosen"


def test_a_passed_deadline_alone_does_not_take_an_older_version() -> None:
    story = with_an_older_version()
    story.happens(InstanceFailed("i1", "serving", "x")).later(300.0)
    assert "RollbackStarted" not in [name for owed in story.owes().owed for name in names(story.carry_out(owed))]


def test_a_rollback_in_the_bake_is_one_revision_and_no_load() -> None:
    story = baking()
    requested = story.world.requested_instances
    events = [
        event
        for write in saga.rollback(story.world, story.world.switches["sw-1"], "undo", "bad", story.now)
        for event in DECIDERS[write.aggregate].decide(story.world.state(write.aggregate, write.id), write.command)
    ]
    assert names(tuple(events)) == ["RollbackStarted", "RouteChanged"]
    story.happens(*events)
    assert story.world.requested_instances == requested
    story.applied().carry()
    assert isinstance(story.probed("i1").carry()[-1], RolledBack)


def test_an_aborted_switch_that_had_moved_traffic_ends_as_aborted() -> None:
    story = baking()
    for write in saga.rollback(story.world, story.world.switches["sw-1"], "abort", "stop", story.now):
        decided = DECIDERS[write.aggregate].decide(story.world.state(write.aggregate, write.id), write.command)
        story.happens(*decided)
    story.applied().carry()
    assert story.probed("i1").carry() == (SwitchClosed("chat", "sw-1", "aborted"), SwitchAborted("sw-1", "stop"))


def test_without_a_bake_the_source_drains_as_soon_as_the_step_is_applied() -> None:
    story = serving().instance("i2", "v2").asked("v2", bake_s=0.0)
    story.carry()
    story.applied().carry()
    assert isinstance(story.carry()[0], DrainStarted)


def test_a_late_bake_ends_once() -> None:
    story = baking().later(3600.0)
    assert isinstance(story.carry()[0], DrainStarted)
    assert not story.owes().owed


def test_a_completed_undo_revokes_the_mark_of_what_it_left() -> None:
    story = serving().instance("i2", "v2")
    story.happens(
        ActiveVersionChanged("chat", "v2", "v1", "sw-9"),
        KnownGoodMarked("chat", "v2", "sw-9"),
        RouteChanged("chat", 2, (Split("v2", 100.0, (I2,)),), "sw-9", 600.0, "sw-9"),
    )
    story.applied().asked("v1", undo=True, bake_s=0.0)
    story.carry()
    story.applied().carry()
    story.carry()
    events = story.applied().drained("v2").carry()
    assert KnownGoodRevoked("chat", "v2", "sw-1") in events
    assert story.world.models["chat"].undo_target == ""


def test_a_switch_that_has_ended_owes_nothing() -> None:
    story = serving()
    assert saga.agenda(story.world, "sw-nothing", story.now).owed == ()
    story.asked("v2")
    story.happens(SwitchAborted("sw-1", "no"))
    assert story.owes().owed == ()
    assert story.world.switches["sw-1"].phase in ENDED


def test_a_leader_that_has_folded_only_the_first_events_of_a_batch_owes_no_other_route() -> None:
    """A batch is stored at once, but it may arrive event by event: what is decided in between must be refused."""
    story = draining().applied().drained("v1")
    story.carry()
    log = story.log
    batches: dict[str, list[int]] = {}
    for n, one in enumerate(log):
        if one.envelope.command.startswith("sw-1."):
            batches.setdefault(one.envelope.command, []).append(n)
    assert len(batches) >= 6
    for numbers in batches.values():
        for cut in numbers[1:]:
            world = World()
            for one in log[:cut]:
                world.apply(one)
            rest = {log[n].subject for n in numbers if n >= cut}
            time = log[cut].envelope.time
            owed = [o for id in world.running for o in saga.agenda(world, id, time).owed]
            owed += placement.agenda(world, CONFIG, time).owed
            for one_owed in owed:
                kinds = {(w.aggregate, w.id) for w in one_owed.writes}
                routes = {f"turnout.evt.route.{id}" for kind, id in kinds if kind == "route"}
                refused = {f"turnout.evt.{kind}.{id}" for kind, id in kinds} & rest
                assert refused or not routes, f"{one_owed.id} after {log[cut - 1].type} of {numbers}"


def test_every_command_that_a_saga_owes_has_an_id_of_what_it_is_and_not_of_chance() -> None:
    one, two = stepping().applied(), stepping().applied()
    assert [o.id for o in one.owes().owed] == [o.id for o in two.owes().owed] == ["sw-1.applied.1"]


def test_drained_is_only_what_was_said_of_the_revision_that_the_version_left_with() -> None:
    story = draining().applied()
    story.happens(VersionDrained("g1", "chat", "v1", 2), VersionDrained("g2", "chat", "v1", 2))
    assert not story.owes().owed
    assert story.drained("v1").owes().owed


def test_a_ready_instance_at_another_address_is_in_the_next_route() -> None:
    story = serving().instance("i2", "v2").asked("v2")
    story.happens(InstanceReady("i2", "unix:/run/new", 0.0, 0.0, 0, ""))
    _, _, route = story.carry()
    assert isinstance(route, RouteChanged)
    assert route.splits[1].endpoints == (Endpoint("i2", "unix:/run/new"),)


# --- files ---------------------------------------------------------------------------------------------------------

FILES = EngineSpec("fake", path="/models/v3")
UNCHECKED = VersionRegistered("chat", "v3", FILES, model.digest(FILES))
SEEN = VersionValidated("chat", "v3", "w1", Inspection("c0ffee"))
REFUSED = VersionRejected("chat", "v3", "w1", "weights_truncated", "it ends too early", "copy it again")


def test_a_switch_waits_until_a_worker_has_looked_at_the_targets_files() -> None:
    story = serving().happens(UNCHECKED).asked("v3")
    assert story.owes().owed == ()
    assert story.owes().wake == story.world.switches["sw-1"].deadline
    story.happens(SEEN)
    assert [type(e).__name__ for e in story.carry()] == ["InstancesRequested", "InstanceRequested"]


def test_a_switch_to_files_that_can_not_be_served_fails_with_the_reason() -> None:
    story = serving().happens(UNCHECKED).asked("v3").happens(REFUSED)
    events = story.carry()
    assert SwitchFailed("sw-1", "checking", "v3 can't be served: it ends too early") in events


def test_a_switch_says_that_nobody_has_looked_at_the_files_in_time() -> None:
    story = serving().happens(UNCHECKED).asked("v3").later(301.0)
    (failed,) = (event for event in story.carry() if isinstance(event, SwitchFailed))
    assert failed.stage == "checking"
    assert "no worker has said yet what is in the files of v3" in failed.reason


def test_what_was_loaded_before_is_not_held_up_by_a_look_at_its_files() -> None:
    story = serving().happens(UNCHECKED).instance("i2", "v3").happens(InstanceStopped("i2", 1.0)).asked("v3")
    assert [type(e).__name__ for e in story.carry()] == ["InstancesRequested", "InstanceRequested"]
