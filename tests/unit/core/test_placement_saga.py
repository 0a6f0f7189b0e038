"""The placement saga: what is restored, repaired, let go, and what is not."""

from __future__ import annotations

from datetime import timedelta

import pytest
from tests.unit.core.story import CONFIG, FAKE, Story, registered, serving

from turnout.core.config import ModelSwitchingConfig
from turnout.core.instance import RequestInstance
from turnout.core.model import digest
from turnout.core.sagas import placement
from turnout.events.gateway import GatewayJoined, GatewayLost, RouteApplied, VersionDrained
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
from turnout.events.model import (
    ActiveVersionChanged,
    EngineSpec,
    EvictionRequested,
    PreloadRequested,
    RulesChanged,
    VersionDeregistered,
    VersionRegistered,
    VersionRejected,
    VersionUnseen,
)
from turnout.events.route import Endpoint, RouteChanged, Rule, Split
from turnout.events.switch import InstancesRequested, RollbackStarted, SwitchAborted
from turnout.events.worker import WorkerJoined, WorkerLost

KEEP_NONE = ModelSwitchingConfig(max_cached_models=0)


def of(events: list[object], kind: type) -> list[object]:
    return [e for e in events if isinstance(e, kind)]


def test_a_model_at_rest_owes_nothing() -> None:
    assert serving().placement().owed == ()
    assert registered("v1").placement().owed == ()


# --- restore -----------------------------------------------------------------------------------------------------


def test_the_active_versions_lost_instance_is_replaced_and_the_route_repaired() -> None:
    story = serving()
    story.happens(InstanceFailed("i1", "serving", "crashed")).later(1.0)
    events = story.carry_placement()
    assert of(events, InstanceRequested) == [InstanceRequested("i2", "chat", "v1", "w1", FAKE, "restore", 2, 1000)]
    (route,) = of(events, RouteChanged)
    assert isinstance(route, RouteChanged)
    assert route.splits == (Split("v1", 100.0, ()),), "the served name stays, with nothing behind it"
    story.ready("i2")
    (route,) = of(story.carry_placement(), RouteChanged)
    assert isinstance(route, RouteChanged)
    assert (route.splits, route.cause) == ((Split("v1", 100.0, (Endpoint("i2", "unix:/run/i2"),)),), "repair")


def test_failed_loads_are_tried_again_after_1_2_4_seconds_and_at_most_a_minute() -> None:
    story = serving()
    story.happens(InstanceFailed("i1", "serving", "crashed"))
    waits: list[float] = []
    for _ in range(9):
        waited = 0.0
        while not any(o.id.startswith("restore") for o in story.placement().owed):
            wake = story.placement().wake
            assert wake is not None
            waited += (wake - story.now).total_seconds()
            story.now = wake
        (again,) = of(story.carry_placement(), InstanceRequested)
        assert isinstance(again, InstanceRequested)
        waits.append(waited)
        story.happens(InstanceFailed(again.instance, "loading", "no memory"), after_s=0.0)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_an_instance_that_served_for_a_minute_was_sound_and_the_back_off_begins_anew() -> None:
    story = serving()
    story.happens(InstanceFailed("i1", "serving", "x")).later(1.0).carry_placement()
    story.ready("i2").later(61.0)
    story.happens(InstanceFailed("i2", "serving", "x"))
    assert story.world.failures["chat", "v1"].count == 1
    story.later(1.0).carry_placement()
    story.ready("i3").later(5.0)
    story.happens(InstanceFailed("i3", "serving", "x"))
    assert story.world.failures["chat", "v1"].count == 2


def test_a_lost_workers_instance_is_replaced_elsewhere_but_stays_in_the_route() -> None:
    story = serving()
    story.happens(WorkerJoined("w2", "h2", ("fake",), (), 4)).happens(WorkerLost("w1", 11.0))
    events = story.carry_placement()
    (again,) = of(events, InstanceRequested)
    assert isinstance(again, InstanceRequested)
    assert again.worker == "w2"
    assert not of(events, RouteChanged), "its engine may serve on"
    assert not of(events, InstanceDraining)


def test_with_no_worker_left_nothing_is_asked_of_anybody() -> None:
    story = serving()
    story.happens(WorkerLost("w1", 11.0))
    assert story.placement().owed == ()


def test_the_emptiest_worker_that_fits_gets_the_instance() -> None:
    story = serving("v1", "v2")
    story.happens(WorkerJoined("w2", "h2", ("fake",), (), 4), WorkerJoined("w3", "h3", ("vllm",), (), 9))
    writes = placement.request(story.world, "chat", "v2", cause="x")
    assert writes is not None
    assert writes[0].command.worker == "w2"  # type: ignore[attr-defined]


def test_why_there_is_no_room_is_said_with_the_numbers() -> None:
    story = serving(capacity=1)
    full = placement.no_room(story.world, "chat", "v2")
    assert full is not None
    assert full.code == "no_capacity"
    assert full.reason == (
        "chat v2 can't be loaded: w1: 1 of 1 places taken; 0 MiB could be evicted; stays: chat v1 (i1) 1 KiB, active"
    )
    story.happens(VersionRegistered("chat", "v3", EngineSpec("vllm", path="/m"), ""))
    full = placement.no_room(story.world, "chat", "v3")
    assert full is not None
    assert full.reason == "chat v3 can't be loaded: none of the 1 live workers may start vllm engines"
    story.happens(WorkerLost("w1", 11.0))
    full = placement.no_room(story.world, "chat", "v2")
    assert full is not None
    assert full.reason == "chat v2 can't be loaded: no worker is live"


# --- let go ------------------------------------------------------------------------------------------------------


def idle(config: ModelSwitchingConfig = CONFIG) -> Story:
    """``i2`` of v2 was in a route, has left it, and every gateway has applied that."""
    story = serving().instance("i2", "v2")
    both = (Split("v1", 0.0, (Endpoint("i1", "unix:/run/i1"),)), Split("v2", 100.0, (Endpoint("i2", "unix:/run/i2"),)))
    story.happens(RouteChanged("chat", 2, both, "s", 600.0, "x")).applied()
    story.happens(RouteChanged("chat", 3, (Split("v1", 100.0, both[0].endpoints),), "s", 600.0, "x")).applied()
    return story


def test_an_idle_instance_is_kept_warm_until_its_time_is_up() -> None:
    story = idle().drained("v2")
    agenda = story.placement()
    assert agenda.owed == ()
    since = story.world.idle_since["i2"]
    assert agenda.wake == since + timedelta(seconds=3600)
    story.now = since + timedelta(seconds=3600)
    assert of(story.carry_placement(), InstanceDraining) == [
        InstanceDraining("i2", "idle for 3600 s (model_ttl_seconds)")
    ]


def test_nothing_is_asked_to_stop_before_every_live_gateway_has_drained_it() -> None:
    story = idle()
    assert not of(story.carry_placement(KEEP_NONE), InstanceDraining)
    story.drained("v2", "g1")
    assert not of(story.carry_placement(KEEP_NONE), InstanceDraining)
    story.drained("v2", "g2")
    assert of(story.carry_placement(KEEP_NONE), InstanceDraining)


def test_a_lost_gateway_is_not_awaited_and_a_rejoined_one_is() -> None:
    story = idle().drained("v2", "g1")
    story.happens(GatewayLost("g2", 7.0))
    rejoined = idle().drained("v2", "g1")
    rejoined.happens(GatewayLost("g2", 7.0)).happens(GatewayJoined("g2", "http://g2"))
    assert of(story.carry_placement(KEEP_NONE), InstanceDraining)
    assert not of(rejoined.carry_placement(KEEP_NONE), InstanceDraining)


def test_a_gateway_that_came_after_the_version_had_left_has_nothing_to_drain() -> None:
    story = idle().drained("v2")
    story.happens(GatewayJoined("g3", "http://g3"))
    assert not of(story.carry_placement(KEEP_NONE), InstanceDraining), "it has not said what it routes by"
    story.happens(RouteApplied("g3", "chat", 3))
    assert of(story.carry_placement(KEEP_NONE), InstanceDraining)


def test_what_a_gateway_said_of_an_earlier_leaving_does_not_count() -> None:
    story = idle().drained("v2")
    both = (
        Split("v1", 50.0, (Endpoint("i1", "unix:/run/i1"),)),
        Split("v2", 50.0, (Endpoint("i2", "unix:/run/i2"),)),
    )
    story.happens(RouteChanged("chat", 4, both, "s", 1.0, "x")).applied()
    story.happens(RouteChanged("chat", 5, (Split("v1", 100.0, both[0].endpoints),), "s", 1.0, "x")).applied()
    assert not of(story.carry_placement(KEEP_NONE), InstanceDraining)
    story.happens(VersionDrained("g1", "chat", "v2", 5), VersionDrained("g2", "chat", "v2", 5))
    assert of(story.carry_placement(KEEP_NONE), InstanceDraining)


def test_what_loads_for_a_switch_that_has_ended_is_asked_to_stop() -> None:
    story = serving().asked("v2")
    story.carry()
    story.happens(SwitchAborted("sw-1", "no"))
    assert of(story.carry_placement(), InstanceDraining) == [InstanceDraining("i2", "no switch waits for it any more")]


def test_an_instance_of_a_deregistered_version_is_let_go() -> None:
    story = idle().drained("v2")
    story.happens(VersionDeregistered("chat", "v2"))
    assert of(story.carry_placement(), InstanceDraining) == [InstanceDraining("i2", "v2 was deregistered")]


@pytest.mark.parametrize("config", [KEEP_NONE, ModelSwitchingConfig(model_ttl_seconds=0.001)])
def test_source_and_target_of_a_running_switch_are_never_let_go(config: ModelSwitchingConfig) -> None:
    story = idle().drained("v2").asked("v2").later(100.0)
    assert not of(story.carry_placement(config), InstanceDraining)
    while story.owes().owed and "bake" not in story.owes().owed[0].id:
        story.carry()
        story.applied()
        assert not of(story.later(100.0).carry_placement(config), InstanceDraining)


def test_a_switch_that_finds_every_place_taken_gets_the_least_recently_used_one() -> None:
    story = (
        registered("v1", "v2", "v3", "v4", capacity=3).instance("i1", "v1").instance("i2", "v2").instance("i3", "v3")
    )
    split = Split("v1", 100.0, (Endpoint("i1", "unix:/run/i1"),))
    story.happens(RouteChanged("chat", 1, (split,), "s", 1.0, "x")).applied()
    story.happens(ActiveVersionChanged("chat", "v1", "", "sw-0")).asked("v4")
    assert not story.owes().owed
    assert of(story.carry_placement(), InstanceDraining) == [InstanceDraining("i2", "makes room for chat v4")]
    assert not of(story.carry_placement(), InstanceDraining), "one at a time"
    story.happens(InstanceStopped("i2", 0.1))
    assert story.carry()[-1] == InstanceRequested("i4", "chat", "v4", "w1", FAKE, "sw-1", 1, 1000)


def test_an_instance_that_drains_on_a_lost_worker_does_not_keep_others_from_making_room() -> None:
    story = registered("v1", "v2", "v3", capacity=1).instance("i1", "v1")
    story.happens(WorkerJoined("w2", "h2", ("fake",), (), 1)).instance("i2", "v2", worker="w2")
    story.happens(WorkerJoined("w3", "h3", ("fake",), (), 1)).instance("i3", "v2", worker="w3")
    split = Split("v1", 100.0, (Endpoint("i1", "unix:/run/i1"),))
    story.happens(RouteChanged("chat", 1, (split,), "s", 1.0, "x")).applied()
    story.happens(ActiveVersionChanged("chat", "v1", "", "sw-0"))
    story.happens(InstanceDraining("i3", "idle")).happens(WorkerLost("w3", 11.0)).asked("v3")
    assert of(story.carry_placement(), InstanceDraining) == [InstanceDraining("i2", "makes room for chat v3")]


# --- repair ------------------------------------------------------------------------------------------------------


def test_a_second_instance_joins_the_route() -> None:
    story = serving().instance("i2", "v1")
    (route,) = of(story.carry_placement(), RouteChanged)
    assert isinstance(route, RouteChanged)
    assert [e.instance for e in route.splits[0].endpoints] == ["i1", "i2"]


def test_an_instance_that_is_ready_at_another_address_is_repaired_in_the_route() -> None:
    story = serving()
    story.happens(InstanceReady("i1", "unix:/run/new", 0.0, 0.0, 0, ""))
    (route,) = of(story.carry_placement(), RouteChanged)
    assert isinstance(route, RouteChanged)
    assert route.splits[0].endpoints == (Endpoint("i1", "unix:/run/new"),)


def test_a_repair_in_the_middle_of_a_switch_keeps_its_weights_and_its_salt() -> None:
    story = idle().asked("v2")
    story.carry()
    story.instance("i9", "v2")
    (route,) = of(story.carry_placement(), RouteChanged)
    assert isinstance(route, RouteChanged)
    assert [(s.version, s.weight) for s in route.splits] == [("v1", 0.0), ("v2", 100.0)]
    assert route.salt == "sw-1"


def test_another_models_events_owe_nothing_here() -> None:
    story = serving()
    story.happens(VersionRegistered("embed", "v1", EngineSpec("fake"), ""))
    assert story.placement().owed == ()


# --- sleep and wake ----------------------------------------------------------------------------------------------


def full_house() -> Story:
    """``i1`` of v1 serves, ``i2`` of v2 is idle and can sleep, v3 is wanted, and both places are taken."""
    story = registered("v1", "v2", "v3", capacity=2).instance("i1", "v1").instance("i2", "v2")
    story.happens(InstanceReady("i2", "unix:/run/i2.b", 1.0, 0.1, 1000, "", sleeps=True))
    split = Split("v1", 100.0, (Endpoint("i1", "unix:/run/i1"),))
    story.happens(RouteChanged("chat", 1, (split,), "s", 1.0, "x")).applied()
    return story.happens(ActiveVersionChanged("chat", "v1", "", "sw-0")).asked("v3")


def test_what_makes_room_sleeps_where_it_can_and_gives_its_place_up() -> None:
    story = full_house()
    assert not story.owes().owed
    assert story.carry_placement() == [InstanceSleepRequested("i2", 1, "makes room for chat v3")]
    assert story.carry_placement() == [], "once"
    story.happens(InstanceSlept("i2", 1, 0.1, 10))
    assert story.carry_placement() == []
    assert story.carry()[-1] == InstanceRequested("i3", "chat", "v3", "w1", FAKE, "sw-1", 1, 1000)


def asleep() -> Story:
    """``i1`` of v1 serves, ``i2`` of v2 sleeps, and there is a place for it."""
    story = serving(capacity=2)
    story.instance("i2", "v2").happens(InstanceReady("i2", "unix:/run/i2.b", 1.0, 0.1, 1000, "", sleeps=True))
    story.happens(InstanceSleepRequested("i2", 1, "x"), InstanceSlept("i2", 1, 0.1, 10))
    return story


def test_a_switch_wakes_what_sleeps_and_routes_to_its_new_address() -> None:
    story = asleep()
    assert not of(story.carry_placement(), RouteChanged)
    story.asked("v2")
    assert story.carry() == (InstancesRequested("sw-1", ("i2",)), InstanceWakeRequested("i2", "sw-1", 1000))
    assert story.owes().owed == ()
    story.happens(InstanceWoken("i2", 0.2, 0.1, 1000, 0, "unix:/run/i2.c"))
    (route,) = of(list(story.carry()), RouteChanged)
    assert isinstance(route, RouteChanged)
    assert [e.address for s in route.splits if s.version == "v2" for e in s.endpoints] == ["unix:/run/i2.c"]


@pytest.mark.parametrize("stage", ["waking", "sleeping"])
def test_a_wake_that_fails_is_not_tried_again_and_the_same_switch_loads_cold(stage: str) -> None:
    story = asleep().asked("v2")
    story.carry()
    story.happens(InstanceFailed("i2", stage, "golden answers differ"))
    events = story.carry()
    assert events == (
        InstancesRequested("sw-1", ("i3",)),
        InstanceRequested("i3", "chat", "v2", "w1", FAKE, "sw-1", 1, 1000),
    )
    story.ready("i3")
    assert of(list(story.carry()), RouteChanged)


def test_a_lost_active_version_that_sleeps_elsewhere_is_woken() -> None:
    story = serving(capacity=2)
    story.instance("i2", "v1").happens(InstanceReady("i2", "unix:/run/i2.b", 1.0, 0.1, 1000, "", sleeps=True))
    story.happens(InstanceSleepRequested("i2", 2, "x"), InstanceSlept("i2", 2, 0.1, 10))
    story.happens(InstanceFailed("i1", "serving", "crashed")).later(1.0)
    assert of(story.carry_placement(), InstanceWakeRequested) == [InstanceWakeRequested("i2", "restore", 1000)]


def test_what_sleeps_leaves_when_its_time_is_up_or_its_memory_is_needed() -> None:
    story = asleep()
    story.now = story.world.idle_since["i2"] + timedelta(seconds=3600)
    assert story.placement().wake == story.world.idle_since["i2"] + timedelta(seconds=7200)
    story.later(3600)
    assert of(story.carry_placement(), InstanceDraining) == [
        InstanceDraining("i2", "idle for 7200 s (twice model_ttl_seconds)")
    ]
    short = asleep()
    short.happens(WorkerJoined("w1", "h1", ("fake",), (), 2, 1005))
    assert of(short.carry_placement(), InstanceDraining) == [InstanceDraining("i2", "w1 holds more than its memory")]


def idle_sleeper(capacity: int = 4) -> Story:
    """``i1`` of v1 serves, ``i2`` of v2 is idle and can sleep."""
    story = serving("v1", "v2", "v3", capacity=capacity).instance("i2", "v2")
    return story.happens(InstanceReady("i2", "unix:/run/i2.b", 1.0, 0.1, 1000, "", sleeps=True))


def test_what_is_idle_for_too_long_or_one_too_many_sleeps_where_it_can() -> None:
    old = idle_sleeper()
    old.now = old.world.idle_since["i2"] + timedelta(seconds=3600)
    assert old.carry_placement() == [InstanceSleepRequested("i2", 1, "idle for 3600 s (model_ttl_seconds)")]
    many = idle_sleeper().instance("i3", "v3")
    assert many.carry_placement(ModelSwitchingConfig(max_cached_models=1)) == [
        InstanceSleepRequested("i2", 1, "least recently used of more than 1 (max_cached_models)")
    ]


def test_what_is_deregistered_let_go_or_not_to_be_kept_at_all_stops_though_it_could_sleep() -> None:
    assert of(idle_sleeper().carry_placement(ModelSwitchingConfig(max_cached_models=0)), InstanceDraining)
    gone = idle_sleeper().happens(VersionDeregistered("chat", "v2"))
    assert of(gone.carry_placement(), InstanceDraining)
    let_go = idle_sleeper().later(1.0)
    let_go.happens(EvictionRequested("chat", "v2", let_go.now, "an operator said so"))
    assert of(let_go.carry_placement(), InstanceDraining)


def test_what_makes_room_for_a_preload_sleeps() -> None:
    story = idle_sleeper(capacity=2).later(1.0)
    story.happens(PreloadRequested("chat", "v3", 5, story.now))
    assert story.carry_placement() == [InstanceSleepRequested("i2", 1, "makes room to preload chat v3")]


def test_it_stops_where_the_hosts_memory_is_short_as_sleep_frees_none_of_it() -> None:
    story = full_house()
    story.happens(WorkerJoined("w1", "h1", ("fake",), (), 4, 2500))
    assert of(story.carry_placement(), InstanceDraining) == [InstanceDraining("i2", "makes room for chat v3")]


def test_it_keeps_its_weights_in_host_memory_only_where_that_has_room_beside_what_comes() -> None:
    story = full_house()
    story.happens(InstanceReady("i2", "unix:/run/i2.c", 1.0, 0.1, 1000, "", device_bytes=5000, sleeps=True))
    story.happens(WorkerJoined("w1", "h1", ("fake",), (), 2, 7500))
    assert story.carry_placement() == [InstanceSleepRequested("i2", 2, "makes room for chat v3")]


def test_what_serves_is_restored_before_what_only_a_rule_names() -> None:
    story = serving("v1", "v2", capacity=1)
    story.happens(RulesChanged("chat", (Rule("r", version="v2", when="stream"),)))
    story.happens(InstanceFailed("i1", "serving", "crashed")).later(0.5)
    assert not of(story.carry_placement(), InstanceRequested), "chat v1 waits for its turn, and its place is kept"
    story.happens(VersionRegistered("embed", "v1", FAKE, ""), ActiveVersionChanged("embed", "v1", "", "sw-0"))
    story.later(1.5)
    commands = [write.command for owed in story.placement().owed for write in owed.writes]
    asked = [(one.model, one.version) for one in commands if isinstance(one, RequestInstance)]
    assert asked == [("chat", "v1"), ("embed", "v1"), ("chat", "v2")]


def test_the_target_of_a_rollback_makes_room_for_the_version_that_takes_its_traffic() -> None:
    story = serving("v1", "v2", capacity=2).asked("v2").instance("i2", "v2")
    story.carry()
    story.applied().happens(RollbackStarted("sw-1", 3, "abort", "no", story.now))
    back = RouteChanged("chat", 3, (Split("v1", 100.0, (Endpoint("i1", "unix:/run/i1"),)),), "sw-1", 1.0, "sw-1")
    story.happens(back).applied().drained("v2")
    story.happens(VersionRegistered("embed", "v1", FAKE, "")).instance("i3", "v1", model="embed")
    story.happens(ActiveVersionChanged("embed", "v1", "", "sw-0"), InstanceFailed("i1", "serving", "crashed")).later(
        2.0
    )
    assert of(story.carry_placement(), InstanceDraining) == [InstanceDraining("i2", "makes room for chat v1")]


# --- files that nobody sees --------------------------------------------------------------------------------------


def test_a_version_is_rejected_when_the_last_worker_that_might_have_seen_its_files_is_lost() -> None:
    files = EngineSpec("fake", path="/models/v3")
    story = serving().happens(
        WorkerJoined("w2", "h2", ("fake",), (), 4),
        VersionRegistered("chat", "v3", files, digest(files)),
        VersionUnseen("chat", "v3", "w1", "path_missing", "nothing is there"),
    )
    assert story.placement().owed == (), "w2 may see them"
    story.happens(WorkerLost("w2", 11.0))
    (rejected,) = story.carry_placement()
    assert isinstance(rejected, VersionRejected)
    assert (rejected.worker, rejected.code, rejected.reason) == ("w1", "path_missing", "nothing is there")
    assert "a worker that joins looks again" in rejected.hint
    assert story.placement().owed == ()
    again = story.happens(VersionRegistered("chat", "v3", files, digest(files)))
    again.happens(VersionUnseen("chat", "v3", "w1", "path_missing", "nothing is there"))
    assert len(again.carry_placement()) == 1, "the same happens again"


def test_a_version_waits_while_no_worker_is_live_that_could_look_at_its_files() -> None:
    files = EngineSpec("fake", path="/models/v3")
    story = serving().happens(
        VersionRegistered("chat", "v3", files, digest(files)),
        VersionUnseen("chat", "v3", "w1", "path_missing", "nothing is there"),
        WorkerLost("w1", 11.0),
    )
    assert not [e for e in story.carry_placement() if isinstance(e, VersionRejected)]
