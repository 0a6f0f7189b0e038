"""The scenarios of the tiers as a user runs them, on real processes: the tier that they show, and no client notices."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.workers.cli.demo import TIER_SCENARIO_NAMES
from turnout.workers.tier_scenarios import TIER_SCENARIOS, TierReport

if TYPE_CHECKING:
    from tests.process.conftest import Up

pytestmark = pytest.mark.process

#: Only ends a test that fails: a scenario takes a quarter of a minute.
LIMIT_S = 180.0


@pytest.mark.parametrize("name", TIER_SCENARIO_NAMES)
def test_a_version_becomes_ready_by_the_tier_that_is_shown(up: Up, name: str) -> None:
    demo = up.open("demo", "--scenario", name, "--json")
    try:
        out, err = demo.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        demo.send_signal(signal.SIGINT)  # it stops what it has started
        out, err = demo.communicate(timeout=LIMIT_S)
    assert out.count("\n") == 1, (out, err)
    assert '"scenario"' in out, (out, err)
    report = msgspec.json.decode(out, type=TierReport)
    assert (report.outcome, report.tier) == ("completed", TIER_SCENARIOS[name].tier), report
    assert (report.failed, report.cut, report.struck) == (0, 0, ()), report
    assert report.bytes_estimated > 0, report
    assert report.bytes_measured > 0, report
    assert demo.returncode == 0


def test_every_scenario_can_be_asked_for() -> None:
    assert set(TIER_SCENARIO_NAMES) == set(TIER_SCENARIOS)
