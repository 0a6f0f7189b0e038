"""The scenarios of waiting as a user runs them, on real processes: requests wait for a load, and none of them fails.

What is asserted is what clients saw and what was charged, never how fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from turnout.workers.cli.demo import WAITING_NAMES
from turnout.workers.waiting_scenarios import SCENARIOS, WaitingReport

if TYPE_CHECKING:
    from tests.process.conftest import Up

pytestmark = pytest.mark.process


def test_requests_wait_for_a_model_on_demand_each_time_it_was_unloaded(up: Up) -> None:
    report = up.play(WaitingReport, "on-demand")
    assert report.as_planned, report
    assert (report.outcome, report.failed, report.cut, report.loads) == ("served", 0, 0, 2), report
    assert report.held > 0


def test_requests_wait_through_a_switch_in_memory_for_one_version(up: Up) -> None:
    report = up.play(WaitingReport, "hold")
    assert report.as_planned, report
    assert (report.outcome, report.failed, report.cut, report.loads) == ("completed", 0, 0, 4), report
    assert report.held > 0
    assert report.pause_s is not None
    assert report.pause_s.foretold is not None
    assert report.bytes_estimated + report.bytes_measured > report.memory_bytes, "both have no place"


def test_every_scenario_can_be_asked_for() -> None:
    assert tuple(SCENARIOS) == WAITING_NAMES
