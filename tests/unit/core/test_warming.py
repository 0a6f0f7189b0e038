"""What is loaded ahead: by a schedule, as it was used last, as the switches so far suggest; never at anybody's cost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.core.story import CONFIG, Story
from tests.unit.core.test_placement import joined, loaded, serving, story

from turnout.core.cache import leaves_first
from turnout.core.config import CacheConfig, ModelSwitchingConfig, Scheduled
from turnout.core.memory import FAKE_BYTES, estimate
from turnout.core.placement import Ledger
from turnout.core.sagas import placement, warming
from turnout.core.sagas.warming import PRIORITY
from turnout.core.warming import predicted
from turnout.core.world import Turn
from turnout.events.instance import (
    InstanceDraining,
    InstanceFailed,
    InstanceReady,
    InstanceRequested,
    InstanceStopped,
)
from turnout.events.model import (
    ActiveVersionChanged,
    EvictionRequested,
    KnownGoodMarked,
    PreloadEnded,
    PreloadRequested,
    ServingChanged,
)
from turnout.events.model import Serving as OnDemand

if TYPE_CHECKING:
    from collections.abc import Sequence

RECENT = CacheConfig(warm=("recent",))
PREDICTED = CacheConfig(warm=("predicted",))
FAKE_MIB = FAKE_BYTES >> 20
NOON = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)


def scheduled(version: str, cron: str) -> CacheConfig:
    return CacheConfig(schedule=(Scheduled(model="chat", version=version, cron=cron),))


def wishes(made: Story, cache: CacheConfig, config: ModelSwitchingConfig = CONFIG) -> list[PreloadRequested]:
    """What the saga wishes now; carried out."""
    owed = warming.agenda(made.world, config, made.now, cache).owed
    return [e for one in owed for e in made.carry_out(one) if isinstance(e, PreloadRequested)]


def used(*, memory: int = 1000, **mib: int) -> Story:
    """``b`` serves on i2; ``a`` has served before, on i1, and idles there. Sizes in MiB."""
    made = story(joined("w1", memory), **{"a": 100, "b": 100} | mib)
    loaded(made, "i1", "a", 100)
    serving(made, "a", "i1").happens(KnownGoodMarked("chat", "a", "sw-0"))
    loaded(made, "i2", "b", 100)
    return serving(made, "b", "i2").drained("a")


def gone(made: Story, instance: str = "i1", after_s: float = 60.0) -> Story:
    """It has stopped, a while ago."""
    return made.happens(InstanceDraining(instance, "makes room"), InstanceStopped(instance, 1.0)).later(after_s)


def test_without_a_strategy_nothing_is_wished() -> None:
    made = gone(used())
    assert wishes(made, CacheConfig()) == []


# --- recent


def test_what_was_used_last_is_wished_again_after_its_instance_went() -> None:
    made = gone(used())
    (wish,) = wishes(made, RECENT)
    assert (wish.version, wish.priority) == ("a", PRIORITY)
    assert wish.reason.startswith("recent: it served until 00:0")
    (requested,) = made.carry_placement()
    assert isinstance(requested, InstanceRequested)
    assert (requested.version, requested.cause, requested.priority) == ("a", "preload", PRIORITY)


def test_a_version_that_is_there_or_leaving_is_not_wished() -> None:
    made = used()
    assert wishes(made, RECENT) == []
    made.happens(InstanceDraining("i1", "makes room")).later(60.0)
    assert wishes(made, RECENT) == []


def test_a_version_that_has_just_gone_rests_and_the_agenda_says_until_when() -> None:
    made = gone(used(), after_s=0.0)
    assert wishes(made, RECENT) == []
    wake = warming.agenda(made.world, CONFIG, made.now, RECENT).wake
    assert wake is not None
    made.now = wake
    assert [wish.version for wish in wishes(made, RECENT)] == ["a"]


def test_where_there_is_no_room_nothing_is_wished() -> None:
    made = gone(loaded(used(memory=299), "i3", "b", 100))
    assert wishes(made, RECENT) == [], "200 MiB of 299 are taken, and it was measured with 100"


def test_the_limit_of_idle_instances_holds_for_wishes() -> None:
    made = gone(used(c=100))
    assert wishes(made, RECENT, ModelSwitchingConfig(max_cached_models=0)) == []
    loaded(made, "i3", "c", 100)
    assert wishes(made, RECENT, ModelSwitchingConfig(max_cached_models=1)) == []
    assert wishes(made, RECENT, ModelSwitchingConfig(max_cached_models=2))


def test_what_was_used_longer_ago_than_an_idle_instance_is_kept_is_not_wished() -> None:
    made = gone(used(), after_s=CONFIG.model_ttl_seconds)
    assert wishes(made, RECENT) == []


def test_what_somebody_evicted_since_is_not_wished() -> None:
    made = used()
    made.happens(EvictionRequested("chat", "a", made.now + timedelta(seconds=1)))
    assert wishes(gone(made), RECENT) == []


def test_a_failed_load_is_not_wished_again_and_an_engine_that_died_once_is() -> None:
    made = used().happens(InstanceFailed("i1", "serving", "its worker ended")).later(60.0)
    assert [wish.version for wish in wishes(made, RECENT)] == ["a"]
    made.carry_placement()
    (instance,) = (i for i in made.world.alive if i != "i2")
    made.happens(InstanceFailed(instance, "weights", "out of memory")).later(60.0)
    made.carry_placement()
    assert not made.world.models["chat"].residence.wishes, "the wish has failed"
    assert wishes(made, RECENT) == []


def test_while_something_needed_waits_nothing_is_wished() -> None:
    made = gone(used()).happens(InstanceFailed("i2", "serving", "died"))
    assert wishes(made, RECENT) == []


def test_one_wish_at_a_time_the_last_used_first() -> None:
    made = used(c=100)
    loaded(made, "i3", "c", 100)
    serving(made, "c", "i3").drained("b")
    gone(gone(made, "i1"), "i2")
    assert [wish.version for wish in wishes(made, RECENT)] == ["b"]
    assert wishes(made, RECENT) == [], "b is wished already"


def test_a_wish_that_finds_no_room_any_more_is_withdrawn_and_an_operators_is_not() -> None:
    made = gone(used())
    assert wishes(made, RECENT)
    loaded(made, "i3", "b", 850)
    (owed,) = warming.agenda(made.world, CONFIG, made.now, CacheConfig()).owed
    (ended,) = made.carry_out(owed)
    assert ended == PreloadEnded("chat", "a", "withdrawn", "there is no room for it now")
    assert wishes(made, RECENT) == []
    made.happens(PreloadRequested("chat", "a", PRIORITY, made.now))
    assert warming.agenda(made.world, CONFIG, made.now, RECENT).owed == ()


def test_a_model_that_is_served_on_demand_is_not_warmed() -> None:
    made = gone(used()).happens(ServingChanged("chat", OnDemand(on_demand=True)))
    assert wishes(made, RECENT) == []


def test_what_was_warmed_makes_room_before_what_has_served() -> None:
    made = used(c=100)
    assert wishes(made, scheduled("c", "* * * * *"))
    (requested,) = made.carry_placement()
    assert isinstance(requested, InstanceRequested)
    made.ready(requested.instance)
    first, second = sorted(placement.evictable(made.world), key=leaves_first("lru"))
    assert (first.instance, first.priority) == (requested.instance, PRIORITY)
    assert (second.instance, second.priority) == ("i1", 0)


def test_a_load_ahead_gives_way_to_what_is_needed_also_before_it_is_ready() -> None:
    made = used(memory=399 + FAKE_MIB, c=200)
    gone(made)
    assert wishes(made, scheduled("c", "* * * * *"))
    (requested,) = made.carry_placement()
    assert isinstance(requested, InstanceRequested)
    assert placement.no_room(made.world, "chat", "a") is None, "a switch to a is not refused for it"
    made.asked("a")
    (draining,) = made.carry_placement()
    assert draining == InstanceDraining(requested.instance, "makes room for chat a")
    made.happens(InstanceStopped(requested.instance, 1.0))
    assert "a" in [event.version for event in made.carry() if isinstance(event, InstanceRequested)]
    assert made.carry_placement() == []
    assert wishes(made, RECENT) == []
    assert not made.world.models["chat"].residence.wishes, "the wish was withdrawn"


# --- scheduled


def test_a_scheduled_version_is_wished_in_its_minute_and_a_while_after() -> None:
    made, cache = used(c=100), scheduled("c", "30 6 * * *")
    made.now = made.now.replace(hour=6, minute=29, second=59)
    assert wishes(made, cache) == []
    assert warming.agenda(made.world, CONFIG, made.now, cache).wake == made.now + timedelta(seconds=1)
    made.later(1.0)
    (wish,) = wishes(made, cache)
    assert (wish.version, wish.reason) == ("c", "scheduled: 30 6 * * * (06:30 UTC)")


def test_a_firing_is_wished_once() -> None:
    made, cache = used(c=100), scheduled("c", "30 6 * * *")
    made.now = made.now.replace(hour=6, minute=31)
    assert wishes(made, cache)
    made.happens(PreloadEnded("chat", "c", "withdrawn", "no room"))
    assert wishes(made, cache) == []
    made.later(24 * 3600.0)
    assert wishes(made, cache)


def test_a_schedule_of_what_is_not_registered_waits_for_its_registration() -> None:
    made = used()
    assert wishes(made, scheduled("z", "* * * * *")) == []
    assert wishes(made, CacheConfig(schedule=(Scheduled(model="other", version="a", cron="* * * * *"),))) == []


# --- predicted


def turns(*versions: str, last: datetime = NOON, every: timedelta = timedelta(hours=5)) -> tuple[Turn, ...]:
    first = last - every * (len(versions) - 1)
    return tuple(Turn(version, first + every * n) for n, version in enumerate(versions))


def guesses(history: Sequence[Turn], undo: str = "", now: datetime = NOON) -> list[tuple[str, str]]:
    return [(guess.version, guess.reason) for guess in predicted(tuple(history), undo, now)]


def test_an_undo_is_expected_to_go_to_its_target() -> None:
    assert guesses(turns("v1", "v2"), "v1") == [("v1", "predicted: an undo of v2 goes there")]
    assert guesses((), "v1") == []


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("ABAB", ["A"]),
        ("CABAB", ["A"]),
        ("ABA", []),
        ("ABCB", []),
        ("ABCA", []),
        ("ABABC", []),
    ],
)
def test_of_two_versions_that_alternate_the_other_one_is_expected(history: str, expected: list[str]) -> None:
    assert [version for version, _ in guesses(turns(*history))] == expected


def test_what_was_switched_to_in_the_same_hour_on_two_days_is_expected_a_little_before_it() -> None:
    day = timedelta(days=1)
    history = (Turn("v2", NOON - 2 * day), Turn("v1", NOON - 2 * day + timedelta(hours=6)), Turn("v2", NOON - day))
    told = [("v2", "predicted: on 2 of the last 7 days it was switched to from 12:00 to 12:59 UTC")]
    assert guesses(history, now=NOON - timedelta(minutes=15)) == told
    assert guesses(history, now=NOON + timedelta(minutes=44)) == told
    assert guesses(history, now=NOON - timedelta(minutes=16)) == []
    assert guesses(history, now=NOON + timedelta(minutes=45)) == []
    assert guesses(history, now=NOON + 6 * day) == [], "a week later only one day is left"


def test_the_undo_target_is_loaded_again_from_the_log_alone() -> None:
    made = gone(used())
    (wish,) = wishes(made, PREDICTED)
    assert (wish.version, wish.reason) == ("a", "predicted: an undo of b goes there")


def test_a_prediction_is_out_of_date_when_an_idle_instance_would_be() -> None:
    made = gone(used(), after_s=CONFIG.model_ttl_seconds + 1)
    assert wishes(made, PREDICTED) == []


def test_the_world_remembers_the_newest_switches_and_each_version_once_in_a_row() -> None:
    made = used()
    for _ in range(120):
        made.happens(ActiveVersionChanged("chat", "a", "b", "s"), ActiveVersionChanged("chat", "b", "a", "s"))
        made.happens(ActiveVersionChanged("chat", "b", "b", "s"))
    names = [turn.version for turn in made.world.turns["chat"]]
    assert names == ["a", "b"] * 50


# --- whatever happens


@given(
    memory=st.integers(0, 800),
    capacity=st.integers(1, 4),
    most=st.integers(0, 3),
    sizes=st.lists(st.integers(0, 400), min_size=3, max_size=5),
    steps=st.lists(st.sampled_from(("gone", "ready", "failed", "later", "switch")), max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_a_wish_never_makes_the_ledger_exceed_its_bound_and_unloads_nothing(
    memory: int, capacity: int, most: int, sizes: list[int], steps: list[str]
) -> None:
    named = {f"v{n}": size for n, size in enumerate(sizes)}
    made = story(joined("w1", memory + sizes[0] + FAKE_MIB, capacity), **named)
    loaded(made, "i1", "v0", sizes[0] + FAKE_MIB)
    serving(made, "v0", "i1").happens(KnownGoodMarked("chat", "v0", "sw-0"))
    config = ModelSwitchingConfig(max_cached_models=most)
    cache = CacheConfig(
        warm=("recent", "predicted"),
        schedule=tuple(Scheduled(model="chat", version=version, cron="* * * * *") for version in named),
    )
    for step in steps:
        made.later(40.0)
        apart = sorted(i for i in made.world.alive if not made.world.state("route", "chat").names(i))
        match step:
            case "later":
                made.later(600.0)
            case "switch" if ready := [i for i in apart if made.world.instances[i].phase == "ready"]:
                version = made.world.instances[ready[0]].version
                serving(made, version, ready[0])
                made.happens(KnownGoodMarked("chat", version, "sw-0"))
                for old in {one.version for one in made.world.instances.values()} - {version}:
                    made.drained(old)
            case "ready" if apart and made.world.instances[apart[0]].phase == "requested":
                one = made.world.instances[apart[0]]
                made.happens(InstanceReady(one.instance, "unix:/run/x", 1.0, 0.1, one.bytes, ""))
            case "failed" if apart:
                made.happens(InstanceFailed(apart[0], "weights", "no"))
            case "gone" if apart:
                made.happens(InstanceDraining(apart[0], "x"), InstanceStopped(apart[0], 1.0))
            case _:
                pass
        worker, held = made.world.workers["w1"], Ledger(made.world, ()).held("w1")
        for wish in wishes(made, cache, config):
            assert held.bytes + estimate(made.world, "chat", wish.version, "w1").bytes <= worker.memory_bytes
            assert held.places < worker.capacity
            assert len(placement.evictable(made.world)) < most
        for event in made.carry_placement(config):
            assert not isinstance(event, InstanceDraining) or "to preload" not in event.reason
        held = Ledger(made.world, ()).held("w1")
        assert held.bytes <= worker.memory_bytes
        assert held.places <= worker.capacity
