"""The demonstration's scenarios as a user runs them: good and bad candidates under load, real processes.

What is asserted is how they end and what clients saw, never how fast: figures are for bench/.
"""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.core import policy
from turnout.workers.cli.demo import SCENARIO_NAMES
from turnout.workers.scenarios import SCENARIOS, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.process.conftest import Up

pytestmark = pytest.mark.process

#: Only ends a test that fails: a scenario takes half a minute.
LIMIT_S = 180.0


@pytest.fixture
def play(up: Up) -> Callable[[str], Report]:
    """Run ``turnout demo --scenario NAME``; its one JSON object, and no turnout process is left."""

    def played(name: str) -> Report:
        demo = up.open("demo", "--scenario", name, "--json")
        try:
            out, err = demo.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            demo.send_signal(signal.SIGINT)  # it stops what it has started
            out, err = demo.communicate(timeout=LIMIT_S)
        assert out.count("\n") == 1, (out, err)
        report = msgspec.json.decode(out, type=Report)
        assert (demo.returncode == 0) == report.as_planned, report
        return report

    return played


def test_a_good_candidate_is_promoted_on_evidence(play: Callable[[str], Report]) -> None:
    report = play("canary-good")
    assert (report.outcome, report.final_version) == ("completed", "v2"), report
    assert (report.failed, report.cut, report.errors) == (0, 0, 0), report
    assert report.verdict is not None
    assert report.verdict.decision == "pass"
    assert [p.weight for p in report.phases if p.name.startswith("step")] == [10, 50, 100]


def test_a_dead_candidate_is_rolled_back_and_no_client_notices(play: Callable[[str], Report]) -> None:
    report = play("canary-dead")
    assert (report.outcome, report.final_version) == ("rolled_back", "v1"), report
    assert (report.failed, report.cut, report.errors) == (0, 0, 0), report
    assert report.versions["v2"] == 0
    assert report.canary_requests_until_rollback is not None
    assert 1 <= report.canary_requests_until_rollback <= 20  # few; how few is measured in bench/


def test_a_candidate_that_talks_nonsense_with_status_200_is_rolled_back(play: Callable[[str], Report]) -> None:
    report = play("canary-garbage")
    assert (report.outcome, report.final_version) == ("rolled_back", "v1"), report
    assert (report.failed, report.cut, report.errors) == (0, 0, 0), report
    assert report.verdict is not None
    assert report.verdict.decision == "fail"
    assert "v2" in report.verdict.reason


def test_an_experiment_ends_with_figures_and_the_source_stays(play: Callable[[str], Report]) -> None:
    report = play("ab")
    assert (report.outcome, report.final_version) == ("concluded", "v1"), report
    assert (report.failed, report.cut, report.errors) == (0, 0, 0), report
    assert report.canary_requests_until_rollback is None
    assert report.verdict is not None
    assert report.verdict.decision != "fail"
    assert {"errors", "first_byte", "sample_ratio"} <= {figure.name for figure in report.verdict.figures}


def test_short_prompts_go_to_the_candidate_first_and_long_ones_stay(play: Callable[[str], Report]) -> None:
    report = play("rules")
    assert (report.outcome, report.final_version) == ("completed", "v2"), report
    assert (report.failed, report.cut, report.errors) == (0, 0, 0), report
    assert report.shares["long"] == 0.0
    assert report.shares["short"] is not None
    assert report.shares["short"] > 0.2


def test_every_scenario_can_be_asked_for_and_follows_a_policy_that_can_be_meant() -> None:
    assert tuple(SCENARIOS) == SCENARIO_NAMES
    for scenario in SCENARIOS.values():
        assert isinstance(policy.parse(scenario.policy), policy.Policy), scenario.name
