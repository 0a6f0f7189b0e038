"""Versions that nobody uses are taken away where the operator wants that, and never one that may be needed."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from tests.unit.core.story import CONFIG, Story, serving

from turnout.core.config import CacheConfig, ModelSwitchingConfig, Scheduled
from turnout.core.sagas import retention
from turnout.core.sagas.owed import Agenda
from turnout.events.instance import InstanceDraining, InstanceStopped
from turnout.events.model import (
    EvictionRequested,
    KnownGoodMarked,
    PreloadRequested,
    RulesChanged,
    SwitchAdmitted,
    VersionDeregistered,
    VersionPinned,
)
from turnout.events.route import Rule

if TYPE_CHECKING:
    from collections.abc import Callable

DAY = 86_400.0
OLD = CacheConfig(version_ttl_seconds=DAY)


def owed(story: Story, cache: CacheConfig = OLD, config: ModelSwitchingConfig = CONFIG) -> Agenda:
    return retention.agenda(story.world, config, story.now, cache)


def gone(story: Story) -> list[object]:
    return [event for one in owed(story).owed for event in story.carry_out(one)]


def test_by_default_no_version_is_ever_taken_away() -> None:
    story = serving("v1", "v2").later(999 * DAY)
    assert owed(story, CacheConfig()) == Agenda(())


def test_a_version_that_nobody_has_used_for_so_long_is_taken_away_with_the_reason() -> None:
    story = serving("v1", "v2")
    due = owed(story).wake
    assert due is not None
    assert owed(story).owed == ()
    story.now = due
    assert gone(story) == [VersionDeregistered("chat", "v2", "nobody has used it for 86400 s (version_ttl_seconds)")]
    assert owed(story) == Agenda(()), "the one that is left serves"


def test_use_counts_from_the_end_of_the_last_instance() -> None:
    story = serving("v1", "v2").later(2 * DAY).instance("i2", "v2")
    assert owed(story).owed == (), "it is loaded"
    story.happens(InstanceDraining("i2", "x"), InstanceStopped("i2", 0.1))
    assert owed(story).wake == story.world.last_used("chat", "v2") + timedelta(days=1)  # type: ignore[operator]
    assert [type(event) for event in gone(story.later(DAY))] == [VersionDeregistered]


#: What keeps v2, as it happens in a story.
NEEDED: tuple[Callable[[Story], object], ...] = (
    lambda story: VersionPinned("chat", "v2"),
    lambda story: PreloadRequested("chat", "v2", 0, story.now),
    lambda story: RulesChanged("chat", (Rule("short", "tokens < 9", "v2"),)),
    lambda story: KnownGoodMarked("chat", "v2", "sw-0"),
    lambda story: SwitchAdmitted("chat", "sw-9", "v2"),
)


@pytest.mark.parametrize("event", NEEDED)
def test_what_may_be_needed_stays(event: Callable[[Story], object]) -> None:
    story = serving("v1", "v2")
    story.happens(event(story)).later(999 * DAY)
    assert owed(story) == Agenda(())


def test_what_is_scheduled_stays_and_so_does_everything_of_a_frozen_registry() -> None:
    story = serving("v1", "v2").later(999 * DAY)
    morning = Scheduled(model="chat", version="v2", cron="45 8 * * *")
    scheduled = CacheConfig(version_ttl_seconds=DAY, schedule=(morning,))
    assert owed(story, scheduled) == Agenda(())
    assert owed(story, OLD, ModelSwitchingConfig(enable_dynamic_registry=False)) == Agenda(())
    assert len(owed(story.happens(EvictionRequested("chat", "v2", story.now))).owed) == 1, "an eviction is no use"


def test_a_time_that_can_not_be_meant_is_told() -> None:
    assert "version_ttl_seconds is -1" in CacheConfig(version_ttl_seconds=-1).problems()[0]
