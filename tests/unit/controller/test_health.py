"""HealthMonitor: whom it judges by what, and that it forgets what is over."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from tests.unit.core.story import Story, serving

from turnout.core.config import ModelSwitchingConfig
from turnout.core.judging.judgement import Decision
from turnout.events.health import HealthSampled
from turnout.events.switch import SwitchAborted, SwitchRequested
from turnout.workers.controller.health import EvidenceReport, HealthMonitor, HealthReport

if TYPE_CHECKING:
    from datetime import datetime


class Clock:
    """The story's time."""

    def __init__(self, story: Story) -> None:
        self._story = story

    def now(self) -> datetime:
        return self._story.now

    def monotonic(self) -> float:
        return self._story.now.timestamp()

    def id(self, prefix: str = "") -> str:
        return prefix

    def jitter(self) -> float:
        return 0.0


def at_first_step() -> tuple[Story, HealthMonitor, list[bool]]:
    """A canary at its first step, revision 2, watched."""
    story = serving().instance("i2", "v2").asked("v2", strategy="canary")
    story.carry()
    story.applied().carry()
    moved: list[bool] = []
    monitor = HealthMonitor(
        story.world, Clock(story), ModelSwitchingConfig(), lambda: moved.append(True), lambda _: {"v1": 4}
    )
    return story, monitor, moved


def sample(
    story: Story, version: str, window: int, *, revision: int = 2, ok: int = 0, failed: int = 0
) -> HealthSampled:
    return HealthSampled(
        gateway="g1",
        model="chat",
        version=version,
        window=window,
        revision=revision,
        share=0.05 if version == "v2" else 0.95,
        started=story.now - timedelta(seconds=0.25),
        ended=story.now,
        requests=ok + failed,
        outcomes={"ok": ok, "http_error": failed},
        assigned=ok + failed,
        unit_errors=failed,
    )


def test_a_step_without_a_sample_is_judged_as_lacking_everything() -> None:
    _, monitor, _ = at_first_step()
    judgement = monitor.judgement("sw-1")
    assert judgement is not None
    assert judgement.decision is Decision.HOLD
    assert "0 of 50 requests" in judgement.missing


def test_new_evidence_wakes_the_sagas_and_changes_the_judgement() -> None:
    story, monitor, moved = at_first_step()
    monitor.heard(sample(story, "v1", 1, ok=95))
    monitor.heard(sample(story, "v2", 1, failed=5))
    assert moved == [True, True]
    judgement = monitor.judgement("sw-1")
    assert judgement is not None
    assert judgement.decision is Decision.FAIL
    assert (judgement.step, judgement.target_errors) == (1, 5)


def test_what_came_before_the_step_is_no_evidence_on_the_target() -> None:
    story, monitor, _ = at_first_step()
    monitor.heard(sample(story, "v2", 1, revision=1, failed=9))
    judgement = monitor.judgement("sw-1")
    assert judgement is not None
    assert judgement.decision is Decision.HOLD
    assert judgement.target_requests == 0


def test_a_switch_that_has_ended_is_judged_no_more() -> None:
    story, monitor, _ = at_first_step()
    monitor.heard(sample(story, "v2", 1, ok=3))
    assert monitor.judgement("sw-1") is not None
    story.happens(SwitchAborted("sw-1", "no"))
    monitor.heard(sample(story, "v2", 2, failed=3))
    assert monitor.judgement("sw-1") is None


def test_what_came_after_a_switch_is_told_apart_from_what_came_while_it_ran() -> None:
    story, monitor, _ = at_first_step()
    monitor.heard(sample(story, "v1", 1, ok=95))
    story.later(5.0).happens(SwitchAborted("sw-1", "no"))
    story.later(5.0)
    monitor.heard(sample(story, "v1", 2, ok=7))
    impact = monitor.monitor_switch_impact("sw-1")
    assert impact is not None
    assert (impact.during.requests, impact.after.requests) == (95, 7)
    story.happens(SwitchRequested("sw-2", "chat", "v2", "v1", "immediate", {}, False, "", story.now, 1, 1, story.now))
    story.happens(SwitchAborted("sw-2", "no"))
    assert monitor.monitor_switch_impact("sw-2") is not None
    assert monitor.monitor_switch_impact("sw-1") == impact, "a newer switch does not take it away"
    late = story.later(7200.0).now
    story.happens(SwitchRequested("sw-3", "chat", "v2", "v1", "immediate", {}, False, "", late, 1, 1, late))
    story.happens(SwitchAborted("sw-3", "no"))
    assert monitor.monitor_switch_impact("sw-3") is None, "no sample is of that time"


def test_questions_are_answered_or_refused_with_a_hint() -> None:
    story, monitor, _ = at_first_step()
    monitor.heard(sample(story, "v1", 1, ok=95))
    health = monitor.answer("health.get", b'{"model": "chat"}')
    assert isinstance(health, HealthReport)
    assert {one.version: one.numbers.requests for one in health.versions} == {"v1": 95, "v2": 0}
    assert {one.version: one.in_flight for one in health.versions} == {"v1": 4, "v2": 0}
    evidence = monitor.answer("switch.evidence", b'{"switch": "sw-1"}')
    assert isinstance(evidence, EvidenceReport)
    assert evidence.judgement is not None
    refused = [
        monitor.answer("health.get", b'{"model": "x"}'),
        monitor.answer("switch.evidence", b'{"switch": "sw-9"}'),
        monitor.answer("health.get", b'{"modell": "chat"}'),
    ]
    assert [getattr(one, "code", "") for one in refused] == ["model_unknown", "switch_unknown", "request_invalid"]
