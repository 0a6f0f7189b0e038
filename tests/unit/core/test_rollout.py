"""Steps, evidence, pauses and promotions of a switch: what the saga owes, and what operators may do meanwhile."""

from __future__ import annotations

from datetime import timedelta

import pytest
from tests.unit.core.story import Story, serving

from turnout.core import switch
from turnout.core.judging.judgement import Decision, Judgement
from turnout.core.sagas.owed import Agenda
from turnout.core.testing import START, given
from turnout.events.instance import InstanceFailed, InstanceProbed, InstanceProbeRequested
from turnout.events.route import RouteChanged
from turnout.events.switch import (
    BakeStarted,
    RollbackStarted,
    RolledBack,
    StepStarted,
    SwitchAborted,
    SwitchPaused,
    SwitchPromoted,
    SwitchResumed,
    TargetReady,
    VerdictReached,
)

STEPS: dict[str, object] = {"steps": [{"setWeight": 10}, {"pause": {}}, {"setWeight": 50}, {"pause": {"duration": 60}}]}


def judged(decision: Decision, step: int = 1, reason: str = "v2 failed 5 of 5 requests") -> Judgement:
    return Judgement(decision, "dead", reason, "errors", step, 90, 10, 0, 5)


def rollout(strategy: str = "gradual", **parameters: object) -> Story:
    """v1 serves, v2 is warm, and a switch was asked for."""
    story = serving().instance("i2", "v2")
    known = parameters or (STEPS if strategy == "gradual" else {})
    story.asked("v2", strategy=strategy, parameters=known, deadline_s=86_400.0)
    return story


def at_step(strategy: str = "gradual", **parameters: object) -> Story:
    """Its first step is applied by every gateway."""
    story = rollout(strategy, **parameters)
    story.carry()
    story.applied().carry()
    return story


def names(events: tuple[object, ...]) -> list[str]:
    return [type(event).__name__ for event in events]


# --- steps -------------------------------------------------------------------------------------------------------


def test_a_warm_target_is_ready_and_has_its_first_step_in_one_write() -> None:
    ready, step, route = rollout().carry()
    assert isinstance(ready, TargetReady)
    assert isinstance(step, StepStarted)
    assert (step.step, step.weight) == (1, 10.0)
    assert isinstance(route, RouteChanged)
    assert [(split.version, split.weight) for split in route.splits] == [("v1", 90.0), ("v2", 10.0)]
    assert route.candidate == "v2"


def test_a_pause_without_a_duration_holds_until_somebody_promotes() -> None:
    story = at_step()
    (paused,) = story.carry()
    assert isinstance(paused, SwitchPaused)
    assert (paused.cause, paused.until) == ("pause", None)
    assert story.later(86_400.0).owes() == Agenda()

    story.happens(SwitchPromoted("sw-1", 1, False, "looks good", story.now))

    step, _ = story.carry()
    assert isinstance(step, StepStarted)
    assert (step.step, step.weight) == (2, 50.0)


def test_the_first_version_of_a_model_takes_no_steps() -> None:
    story = serving()
    story.asked("v2", strategy="canary", source="")
    story.instance("i2", "v2")
    _, step, _ = story.carry()
    assert isinstance(step, StepStarted)
    assert (step.weight, step.reason) == (100.0, "nothing serves yet: no steps to take")


def test_a_shadow_gets_copies_and_no_traffic_of_its_own() -> None:
    story = rollout("canary", shadow={"percent": 20, "duration": "1m"})
    _, step, route = story.carry()
    assert isinstance(step, StepStarted)
    assert (step.weight, step.mirror) == (0.0, 20.0)
    assert isinstance(route, RouteChanged)
    assert [(split.version, split.weight) for split in route.splits] == [("v1", 100.0)]
    assert [(mirror.version, mirror.percent) for mirror in route.mirrors] == [("v2", 20.0)]
    assert route.mirrors[0].endpoints, "the copies have somewhere to go"


# --- evidence ----------------------------------------------------------------------------------------------------


def test_evidence_of_harm_rolls_back_in_one_write_with_its_receipt() -> None:
    story = at_step("canary")
    verdict, back, route = story.carry(judgement=judged(Decision.FAIL))
    assert isinstance(verdict, VerdictReached)
    assert (verdict.decision, verdict.target_errors, verdict.step) == ("fail", 5, 1)
    assert isinstance(back, RollbackStarted)
    assert (back.cause, back.reason) == ("verdict", "v2 failed 5 of 5 requests")
    assert isinstance(route, RouteChanged)
    assert [(split.version, split.weight) for split in route.splits] == [("v1", 100.0)]


def test_evidence_of_a_step_that_is_over_does_nothing() -> None:
    story = at_step("canary")
    assert not story.owes(judgement=judged(Decision.FAIL, step=0)).owed


def test_a_paused_switch_is_rolled_back_all_the_same() -> None:
    story = at_step("canary")
    story.happens(SwitchPaused("sw-1", "operator", "lunch", story.now))
    assert names(story.carry(judgement=judged(Decision.FAIL))) == ["VerdictReached", "RollbackStarted", "RouteChanged"]


def test_evidence_of_harm_in_the_bake_gives_the_source_everything_back() -> None:
    story = at_step("immediate", judge={})
    (bake,) = story.carry()
    assert isinstance(bake, BakeStarted)
    assert names(story.carry(judgement=judged(Decision.FAIL))) == ["VerdictReached", "RollbackStarted", "RouteChanged"]


def test_a_judge_that_only_observes_changes_nothing() -> None:
    story = at_step("gradual", judge={"mode": "observe"})
    assert not story.owes(judgement=judged(Decision.FAIL)).owed


def test_a_pass_starts_the_next_step_and_stands_in_the_log_with_it() -> None:
    story = at_step("canary", judge={"minRequests": 10}).later(600.0)
    verdict, step, _ = story.carry(judgement=judged(Decision.PASS, reason="not worse"))
    assert isinstance(verdict, VerdictReached)
    assert verdict.decision == "pass"
    assert isinstance(step, StepStarted)
    assert step.step == 2


def test_a_canary_without_traffic_is_held_at_its_deadline_and_says_what_was_missing() -> None:
    story = at_step("canary", stepDeadline="10m").later(600.0)
    nothing = Judgement(Decision.HOLD, step=1, missing="0 of 50 requests")
    verdict, paused = story.carry(judgement=nothing)
    assert isinstance(verdict, VerdictReached)
    assert verdict.decision == "inconclusive"
    assert "0 of 50 requests" in verdict.reason
    assert isinstance(paused, SwitchPaused)
    assert paused.cause == "inconclusive"
    story.happens(SwitchPromoted("sw-1", 1, False, "we know why", story.now))
    assert isinstance(story.carry(judgement=nothing)[0], StepStarted)


def test_harm_without_a_source_to_go_back_to_is_said_and_the_source_is_waited_for() -> None:
    story = at_step("canary")
    story.happens(InstanceFailed("i1", "serving", "died"))
    (verdict,) = story.carry(judgement=judged(Decision.FAIL))
    assert isinstance(verdict, VerdictReached)
    assert not story.owes(judgement=judged(Decision.FAIL)).owed, "it is said once"
    story.instance("i3", "v1")
    assert "RollbackStarted" in names(story.carry(judgement=judged(Decision.FAIL)))


def test_an_experiment_that_has_ended_keeps_the_source_and_is_no_failure() -> None:
    story = at_step("ab", until={"duration": "1m"}).later(61.0)
    back, *_ = [e for e in story.carry(judgement=judged(Decision.HOLD)) if isinstance(e, RollbackStarted)]
    assert back.cause == "concluded"
    story.applied().carry()
    story.probed("i1")
    assert "SwitchConcluded" in names(story.carry())
    assert story.world.switches["sw-1"].phase == "concluded"
    assert story.world.models["chat"].active == "v1"


# --- a rollback is done when it is proven -------------------------------------------------------------------------


def going_back() -> Story:
    story = at_step("canary")
    story.carry(judgement=judged(Decision.FAIL))
    return story


def test_a_rollback_ends_only_after_the_source_has_answered_its_probe() -> None:
    story = going_back().applied()
    (asked,) = story.carry()
    assert isinstance(asked, InstanceProbeRequested)
    assert asked.instance == "i1"
    assert not story.owes().owed, "it waits for the answer"
    *_, ended = story.probed("i1").carry()
    assert isinstance(ended, RolledBack)
    assert ended.proof == "i1"


def test_a_bad_answer_is_asked_for_again_and_at_last_the_rollback_ends_unproven() -> None:
    story = going_back().applied()
    story.carry()
    story.probed("i1", ok=False)
    assert not story.owes().owed
    (again,) = story.later(5.0).carry()
    assert isinstance(again, InstanceProbeRequested)
    assert again.cause == "sw-1.2"
    *_, ended = story.later(60.0).carry()
    assert isinstance(ended, RolledBack)
    assert ended.proof == ""


def test_an_answer_to_an_earlier_switchs_probe_proves_nothing() -> None:
    story = serving().instance("i2", "v2")
    story.happens(InstanceProbeRequested("i1", "sw-0.1", START), InstanceProbed("i1", "sw-0.1", True, 0.1))
    story.asked("v2", strategy="canary", parameters={})
    story.carry()
    story.applied().carry()
    story.carry(judgement=judged(Decision.FAIL))
    (asked,) = story.applied().carry()
    assert isinstance(asked, InstanceProbeRequested)


# --- operators ---------------------------------------------------------------------------------------------------


def test_time_that_a_switch_stands_still_is_not_counted() -> None:
    story = rollout()
    story.happens(SwitchPaused("sw-1", "operator", "", story.now))
    story.carry()
    deadline = story.world.switches["sw-1"].deadline
    assert deadline is not None
    story.later(3600.0)
    assert not story.owes().owed
    paused_at = story.world.switches["sw-1"].paused_at
    assert paused_at is not None

    story.happens(SwitchResumed("sw-1", "", story.now))

    assert story.world.switches["sw-1"].deadline == deadline + (story.now - timedelta(seconds=1) - paused_at)
    assert story.owes().owed


def test_a_pause_with_a_time_ends_by_itself() -> None:
    story = rollout()
    story.happens(SwitchPaused("sw-1", "operator", "", story.now, story.now + timedelta(seconds=30)))
    (ready,) = story.carry()
    assert isinstance(ready, TargetReady), "loading and proving go on"
    assert story.owes().wake is not None
    (resumed,) = story.later(31.0).carry()
    assert isinstance(resumed, SwitchResumed)


def promote(step: int = 1, *, full: bool = False, reason: str = "") -> switch.PromoteSwitch:
    return switch.PromoteSwitch("sw-1", step, full, reason, START)


def test_a_second_click_on_promote_does_nothing() -> None:
    state = given(switch, *_history(at_step()))
    state.when(promote(1)).then(SwitchPromoted("sw-1", 1, False, "", START)).when(promote(1)).then_nothing()


def test_promoting_a_step_that_is_over_does_nothing() -> None:
    story = at_step()
    story.happens(SwitchPromoted("sw-1", 1, False, "", story.now))
    story.carry()
    given(switch, *_history(story)).when(promote(1)).then_nothing()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (promote(7), "step_ahead"),
        (promote(full=True), "reason_missing"),
    ],
)
def test_a_promotion_that_can_not_be_meant_is_refused(command: switch.PromoteSwitch, code: str) -> None:
    given(switch, *_history(at_step())).when(command).then_rejected(code)


def test_an_aborted_switch_is_not_promoted_but_may_be_retried() -> None:
    story = rollout()
    story.happens(SwitchAborted("sw-1", "no"))
    refused = given(switch, *_history(story)).when(promote(full=True, reason="now")).then_rejected("switch_ended")
    assert "turnout retry sw-1" in refused.hint


def test_a_full_promotion_skips_every_further_step() -> None:
    story = at_step()
    story.happens(SwitchPromoted("sw-1", 1, True, "we are sure", story.now))
    step, _ = story.carry()
    assert isinstance(step, StepStarted)
    assert step.weight == 100.0


def test_only_an_operators_pause_is_resumed() -> None:
    story = at_step()
    story.carry()
    refused = (
        given(switch, *_history(story))
        .when(switch.ResumeSwitch("sw-1", "", START))
        .then_rejected("waits_for_a_decision")
    )
    assert "turnout promote sw-1" in refused.hint


def test_pausing_twice_pauses_once() -> None:
    pause = switch.PauseSwitch("sw-1", "operator", "", START)
    given(switch, *_history(at_step())).when(pause).then(SwitchPaused("sw-1", "operator", "", START)).when(
        pause
    ).then_nothing()


def _history(story: Story) -> tuple[object, ...]:
    return tuple(recorded.event for recorded in story.log if recorded.subject == "turnout.evt.switch.sw-1")
