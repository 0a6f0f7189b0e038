"""The scenarios of waiting as a user runs them, on real processes: requests wait for a load, and none of them fails.

What is asserted is what clients saw and what was charged, never how fast.
"""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.workers.cli.demo import WAITING_NAMES
from turnout.workers.waiting_scenarios import SCENARIOS, WaitingReport

if TYPE_CHECKING:
    from tests.process.conftest import Up

pytestmark = pytest.mark.process

#: Only ends a test that fails: a scenario takes a quarter of a minute.
LIMIT_S = 180.0


def play(up: Up, name: str) -> WaitingReport:
    """Run ``turnout demo --scenario NAME``; its one JSON object."""
    demo = up.open("demo", "--scenario", name, "--json")
    try:
        out, err = demo.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        demo.send_signal(signal.SIGINT)  # it stops what it has started
        out, err = demo.communicate(timeout=LIMIT_S)
    assert out.count("\n") == 1, (out, err)
    report = msgspec.json.decode(out, type=WaitingReport)
    assert (demo.returncode == 0) == report.as_planned, report
    return report


def test_requests_wait_for_a_model_on_demand_each_time_it_was_unloaded(up: Up) -> None:
    report = play(up, "on-demand")
    assert report.as_planned, report
    assert (report.outcome, report.failed, report.cut, report.loads) == ("served", 0, 0, 2), report
    assert report.held > 0


def test_requests_wait_through_a_switch_in_memory_for_one_version(up: Up) -> None:
    report = play(up, "hold")
    assert report.as_planned, report
    assert (report.outcome, report.failed, report.cut, report.loads) == ("completed", 0, 0, 4), report
    assert report.held > 0
    assert report.pause_s is not None
    assert report.pause_s.foretold is not None
    assert report.bytes_estimated + report.bytes_measured > report.memory_bytes, "both have no place"


def test_every_scenario_can_be_asked_for() -> None:
    assert tuple(SCENARIOS) == WAITING_NAMES
