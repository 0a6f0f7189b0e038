"""The demonstration's scenarios of memory as a user runs them: real processes, real ballast.

What is asserted is what clients saw and what was charged, never how fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from turnout.workers.cli.demo import MEMORY_NAMES
from turnout.workers.memory_scenarios import SCENARIOS, MemoryReport

if TYPE_CHECKING:
    from tests.process.conftest import Up

pytestmark = pytest.mark.process


def test_the_least_recently_used_makes_room_and_what_is_too_large_is_refused(up: Up) -> None:
    report = up.play(MemoryReport, "evict")
    assert report.as_planned, report
    assert (report.failed, report.cut, report.made_room, report.final_version) == (0, 0, 1, "v4"), report
    assert report.refused.startswith("no_memory: chat huge can't be loaded: w1: needs 922 MiB"), report
    assert report.peak_bytes <= report.memory_bytes


def test_replicas_are_spread_and_a_killed_workers_replica_is_placed_again(up: Up) -> None:
    report = up.play(MemoryReport, "two-workers")
    assert report.as_planned, report
    assert sorted(report.workers.values()) == ["w1", "w1", "w2"], report


def test_many_versions_are_switched_among_in_memory_for_three(up: Up) -> None:
    report = up.play(MemoryReport, "many-versions", "--seconds", "10s")
    assert report.as_planned, report
    assert report.versions == 100
    assert report.switches > 1
    assert report.peak_bytes <= report.memory_bytes


def test_every_scenario_can_be_asked_for() -> None:
    assert tuple(SCENARIOS) == MEMORY_NAMES
