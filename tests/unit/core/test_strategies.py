"""The four strategies as deciders: what is done at each level for each evidence, and that every way has an end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from turnout.core.judging.judgement import Decision, Judgement, JudgeSettings
from turnout.core.strategies import STRATEGIES, ABTestSwitch, CanarySwitch, GradualRollout, ImmediateSwitch
from turnout.core.strategies.base import (
    Action,
    Evidence,
    Finish,
    GoBack,
    Hold,
    Operation,
    SetWeight,
    Stage,
    SwitchingStrategy,
    Wait,
)

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime(2030, 1, 1, tzinfo=UTC)
Table = dict[str, object]

PASS = Judgement(Decision.PASS, reason="v2 is not worse", target_requests=9000, source_requests=9000)
FAIL = Judgement(Decision.FAIL, reason="v2 failed 7 of 9", target_requests=9, target_errors=7)
SHORT = Judgement(Decision.HOLD, missing="31 of 50 requests", target_requests=31)
INVALID = Judgement(Decision.INVALID, reason="the split is off")
ERROR = Judgement(Decision.ERROR, reason="4 samples in a row could not be read")


def asked(
    strategy: SwitchingStrategy,
    judgement: Judgement | None = None,
    parameters: Table | None = None,
    *,
    step: int = 1,
    weight: float = 5.0,
    after_s: float = 0.0,
    promoted: int = 0,
    full: bool = False,
    source: str = "v1",
) -> Action:
    since = NOW if step else None
    operation = Operation("sw", source, "v2", step, weight, since, parameters or {}, promoted, full)
    return strategy.execute_switch(operation, Evidence(NOW + timedelta(seconds=after_s), judgement))


def way(
    strategy: SwitchingStrategy,
    parameters: Table,
    judge: Callable[[int], Judgement | None],
    *,
    promotes: bool = False,
    seconds: list[float] | None = None,
) -> list[Action]:
    """Every action but the waits, from the first question to the end, in simulated time.

    ``promotes``: an operator lets it past each hold. ``seconds``: gets the time of each question.
    """
    step, weight, since, now, promoted = 0, 0.0, None, NOW, 0
    actions: list[Action] = []
    for _ in range(1000):
        if seconds is not None:
            seconds.append((now - NOW).total_seconds())
        operation = Operation("sw", "v1", "v2", step, weight, since, parameters, promoted)
        action = strategy.execute_switch(operation, Evidence(now, judge(step)))
        if not isinstance(action, Wait):
            actions.append(action)
        match action:
            case SetWeight():
                step, weight, since = step + 1, action.weight, now
            case Wait(_, until):
                assert until is not None
                assert until > now
                now = until
            case Hold() if promotes:
                promoted = step
            case _:
                return actions
    raise AssertionError(f"no end: {actions[-5:]}")


def weights(actions: list[Action]) -> list[float]:
    return [action.weight for action in actions if isinstance(action, SetWeight)]


# --- ways that have an end -------------------------------------------------------------------------------------------

_durations: st.SearchStrategy[object] = st.sampled_from(("1s", "10m", "1h30m", 0.5, 90))
_modes: st.SearchStrategy[object] = st.sampled_from(("on", "observe", "none"))
_exposures: st.SearchStrategy[object] = st.sampled_from((1, "30s"))
_percents: st.SearchStrategy[object] = st.integers(1, 100)
_judges = st.fixed_dictionaries({"mode": _modes}, optional={"minSeconds": _exposures})
_shadows = st.fixed_dictionaries({}, optional={"percent": _percents, "duration": _durations})
_pauses = st.fixed_dictionaries({}, optional={"duration": _durations})
_weights = st.lists(st.integers(1, 100), min_size=1, max_size=5, unique=True).map(lambda found: sorted(found))


@st.composite
def _steps(draw: st.DrawFn) -> list[Table]:
    steps: list[Table] = []
    for weight in draw(_weights):
        steps.append({"setWeight": weight})
        if weight < 100:
            steps.extend({"pause": pause} for pause in draw(st.lists(_pauses, max_size=2)))
            if draw(st.booleans()):
                steps.append({"analysis": {}})
    return steps


@st.composite
def plans(draw: st.DrawFn) -> tuple[SwitchingStrategy, Table]:
    strategy = draw(st.sampled_from(tuple(STRATEGIES.values())))
    judge = draw(_judges)
    parameters: Table = {"judge": judge}
    if draw(st.booleans()):
        parameters["shadow"] = draw(_shadows)
    if strategy.name in ("gradual", "canary") and draw(st.booleans()):
        parameters["steps"] = draw(_steps().filter(lambda steps: steps[0] != {"setWeight": 100}))
    if strategy.name in ("gradual", "canary") or "shadow" in parameters:
        parameters["onInconclusive"] = draw(st.sampled_from(("hold", "abort", "promote")))
    if strategy.name == "ab":
        parameters["split"] = draw(st.integers(1, 99))
        if judge["mode"] == "on":
            parameters["pick"] = draw(st.sampled_from(("none", "winner")))
    return strategy, parameters


@given(plans())
def test_what_the_tests_call_valid_is_valid(plan: tuple[SwitchingStrategy, Table]) -> None:
    strategy, parameters = plan
    assert strategy.problems(parameters) == ()


@given(plans())
def test_with_good_evidence_every_plan_ends_and_its_weights_only_grow(plan: tuple[SwitchingStrategy, Table]) -> None:
    strategy, parameters = plan

    actions = way(strategy, parameters, lambda _: PASS, promotes=True)

    taken = weights(actions)
    assert isinstance(actions[-1], Finish | GoBack)
    assert all(a < b for a, b in pairwise(taken))
    if isinstance(actions[-1], Finish):
        assert taken[-1] == 100
        assert taken == [stage.weight for stage in strategy.stages(parameters)]
    else:
        assert actions[-1].cause == "concluded"
        assert strategy.name == "ab"


@given(plans(), st.sampled_from((None, SHORT, ERROR, INVALID)))
def test_without_good_evidence_every_plan_ends_held_back_or_finished(
    plan: tuple[SwitchingStrategy, Table], judgement: Judgement | None
) -> None:
    strategy, parameters = plan

    actions = way(strategy, parameters, lambda _: judgement)

    assert isinstance(actions[-1], Finish | GoBack | Hold)
    assert all(action.reason for action in actions if not isinstance(action, Finish))


@given(plans(), st.integers(1, 8))
def test_harm_found_at_any_step_ends_every_plan_that_is_judged(
    plan: tuple[SwitchingStrategy, Table], bad_from: int
) -> None:
    strategy, parameters = plan

    actions = way(strategy, parameters, lambda step: FAIL if step >= bad_from else PASS, promotes=True)

    judged = strategy.judging(parameters).mode == "on"
    if judged and len(weights(actions)) >= bad_from:
        assert actions[-1] == GoBack("v2 failed 7 of 9", "verdict")
        assert len(weights(actions)) == bad_from
    else:
        assert not any(isinstance(action, GoBack) and action.cause == "verdict" for action in actions)


@given(plans())
def test_a_plan_is_described_stage_by_stage(plan: tuple[SwitchingStrategy, Table]) -> None:
    strategy, parameters = plan

    stages, lines = strategy.stages(parameters), strategy.describe(parameters)

    assert len(lines) > len(stages)
    for line, stage in zip(lines, stages, strict=False):
        assert f"{stage.weight or stage.mirror:g} %" in line


@given(plans())
def test_the_times_that_a_plan_tells_are_kept(plan: tuple[SwitchingStrategy, Table]) -> None:
    strategy, parameters = plan
    shortest, longest = strategy.waits_s(parameters)
    seconds: list[float] = []

    way(strategy, parameters, lambda _: SHORT, promotes=True, seconds=seconds)

    assert 0 <= shortest <= longest
    assert seconds[-1] <= longest + 1e-3


_leaves: st.SearchStrategy[object] = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_json: st.SearchStrategy[object] = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_words = st.sampled_from(
    ("steps", "judge", "shadow", "until", "split", "pick", "onInconclusive", "stepDeadline", "setWeight", "pause")
)
_tables = st.dictionaries(_words | st.text(max_size=8), _json, max_size=4)
_times = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001  bounds are naive
_operations = st.builds(
    Operation,
    switch=st.just("sw"),
    source=st.sampled_from(("", "v1")),
    target=st.just("v2"),
    step=st.integers(-2, 12),
    weight=st.floats(0, 100) | st.floats(),
    since=st.none() | _times,
    parameters=_tables | plans().map(lambda plan: plan[1]),
    promoted=st.integers(-2, 12),
    full=st.booleans(),
)
_judgements = st.none() | st.sampled_from((PASS, FAIL, SHORT, INVALID, ERROR, *map(Judgement, Decision)))


@given(st.sampled_from(tuple(STRATEGIES.values())), _operations, _times, _judgements)
def test_any_question_is_answered_and_always_the_same(
    strategy: SwitchingStrategy, operation: Operation, now: datetime, judgement: Judgement | None
) -> None:
    evidence = Evidence(now, judgement)

    action = strategy.execute_switch(operation, evidence)

    assert strategy.execute_switch(operation, evidence) == action
    assert action.reason
    if isinstance(action, SetWeight):
        assert action.weight == 100 or not action.weight <= operation.weight or operation.step <= 0
    if not operation.source:
        assert not isinstance(action, GoBack)


@given(st.sampled_from(tuple(STRATEGIES.values())), _tables)
@example(STRATEGIES["canary"], {"steps": [{"setWeight": 10**400}, {"pause": {"duration": "9" * 400 + "h"}}]})
@example(STRATEGIES["ab"], {"until": {"samples": 10**5000}})
def test_any_table_is_read_or_refused_in_sentences(strategy: SwitchingStrategy, parameters: Table) -> None:
    problems = strategy.problems(parameters)

    assert all(len(problem) > 10 for problem in problems)
    assert bool(strategy.stages(parameters)) == (not problems)
    assert isinstance(strategy.judging(parameters), JudgeSettings)
    assert strategy.describe(parameters)


# --- immediate -------------------------------------------------------------------------------------------------------


def test_immediate_without_a_model_to_compare_with_takes_everything_at_once() -> None:
    assert way(ImmediateSwitch(), {}, lambda _: None) == [
        SetWeight(100.0, "all at once"),
        Finish("all traffic is on the target"),
    ]


def test_a_model_that_serves_nothing_yet_goes_to_full_traffic_and_never_back() -> None:
    for strategy in STRATEGIES.values():
        assert isinstance(asked(strategy, step=0, weight=0.0, source=""), SetWeight)
        assert asked(strategy, FAIL, step=1, weight=100.0, source="") == Finish("all traffic is on the target")


# --- shadow ----------------------------------------------------------------------------------------------------------

SHADOW: Table = {"shadow": {"percent": 20, "duration": "5m", "minCopies": 40}}
COPIES = Judgement(Decision.HOLD, target_requests=40)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_shadow_comes_first_and_takes_no_traffic(strategy: SwitchingStrategy) -> None:
    assert asked(strategy, None, SHADOW, step=0, weight=0.0) == SetWeight(0.0, "the first step", 20.0)
    assert strategy.stages(SHADOW)[0] == Stage(0.0, 300.0, False, 20.0)


def test_a_shadow_is_left_when_its_time_and_its_copies_are_there() -> None:
    early = asked(CanarySwitch(), COPIES, SHADOW, weight=0.0, after_s=299)
    short = asked(CanarySwitch(), SHORT, SHADOW, weight=0.0, after_s=300)

    assert early == Wait("step 1 lasts 5 min at least", NOW + timedelta(seconds=300))
    assert short == Wait("31 of 40 copies answered by v2", NOW + timedelta(seconds=300 + 1800))
    assert asked(CanarySwitch(), COPIES, SHADOW, weight=0.0, after_s=300) == SetWeight(5.0, "the copies are answered")


def test_harm_in_a_shadow_ends_the_switch_before_any_user_is_touched() -> None:
    assert asked(ImmediateSwitch(), FAIL, SHADOW, weight=0.0) == GoBack("v2 failed 7 of 9", "verdict")


def test_a_shadow_without_copies_is_inconclusive() -> None:
    held = asked(ImmediateSwitch(), None, SHADOW, weight=0.0, after_s=2100)

    assert held == Hold("inconclusive after 35 min: 0 of 40 copies answered by v2", "inconclusive")


# --- gradual ---------------------------------------------------------------------------------------------------------


def test_gradual_goes_on_by_time_alone() -> None:
    assert weights(way(GradualRollout(), {}, lambda _: None)) == [10, 25, 50, 100]
    assert asked(GradualRollout(), SHORT, weight=10.0, after_s=59) == Wait(
        "step 1 lasts 60 s at least", NOW + timedelta(seconds=60)
    )
    assert asked(GradualRollout(), SHORT, weight=10.0, after_s=60) == SetWeight(25.0, "its 60 s are over")


def test_gradual_goes_back_at_once_on_harm_even_within_a_pause() -> None:
    assert asked(GradualRollout(), FAIL, weight=10.0, after_s=1) == GoBack("v2 failed 7 of 9", "verdict")


def test_gradual_holds_where_the_comparison_is_broken_or_unreadable() -> None:
    assert asked(GradualRollout(), INVALID, weight=10.0) == Hold("the split is off", "invalid")
    unreadable = asked(GradualRollout(), ERROR, {"onInconclusive": "promote"}, weight=10.0, after_s=60)
    assert isinstance(unreadable, Hold)
    assert unreadable.cause == "inconclusive"


def test_a_pause_without_a_duration_lasts_until_somebody_promotes() -> None:
    steps: Table = {"steps": [{"setWeight": 20}, {"pause": {}}]}

    assert asked(GradualRollout(), None, steps, weight=20.0, after_s=1e6) == Hold(
        "step 1 lasts until an operator promotes it", "pause"
    )
    assert asked(GradualRollout(), None, steps, weight=20.0, promoted=1) == SetWeight(
        100.0, "an operator promoted it past step 1"
    )


def test_several_pauses_of_a_level_add_up() -> None:
    steps: Table = {"steps": [{"setWeight": 20}, {"pause": {"duration": "1m"}}, {"pause": {"duration": 30}}]}

    assert GradualRollout().stages(steps)[0].pause_s == 90


# --- canary ----------------------------------------------------------------------------------------------------------


def test_canary_goes_on_only_on_a_pass() -> None:
    assert asked(CanarySwitch(), SHORT, after_s=1799) == Wait("31 of 50 requests", NOW + timedelta(seconds=1800))
    assert asked(CanarySwitch(), PASS) == SetWeight(25.0, "v2 is not worse")
    assert weights(way(CanarySwitch(), {}, lambda _: PASS)) == [5, 25, 50, 100]


def test_a_level_below_the_traffic_that_the_target_has_already_is_skipped() -> None:
    assert asked(CanarySwitch(), PASS, weight=30.0) == SetWeight(50.0, "v2 is not worse")


def test_a_canary_without_traffic_is_held_at_its_deadline_and_says_what_is_missing() -> None:
    assert way(CanarySwitch(), {}, lambda _: None) == [
        SetWeight(5.0, "the first step"),
        Hold("inconclusive after 30 min: no evidence yet: 0 of 50 requests to v2", "inconclusive"),
    ]


@pytest.mark.parametrize("judgement", [None, SHORT, ERROR], ids=["nothing", "too little", "unreadable"])
def test_a_held_canary_goes_on_when_an_operator_promotes_it(judgement: Judgement | None) -> None:
    assert asked(CanarySwitch(), judgement, after_s=1e5, promoted=1) == SetWeight(
        25.0, "an operator promoted it past step 1"
    )


@pytest.mark.parametrize("judgement", [None, SHORT, ERROR], ids=["nothing", "too little", "unreadable"])
def test_an_inconclusive_canary_is_aborted_where_the_policy_says_so(judgement: Judgement | None) -> None:
    action = asked(CanarySwitch(), judgement, {"onInconclusive": "abort"}, after_s=1800)

    assert isinstance(action, GoBack)
    assert action.cause == "inconclusive"


def test_an_inconclusive_canary_goes_on_where_the_policy_says_so_but_never_on_unreadable_evidence() -> None:
    on: Table = {"onInconclusive": "promote"}

    assert asked(CanarySwitch(), SHORT, on, after_s=1800) == SetWeight(
        25.0, "inconclusive, and onInconclusive is promote: 31 of 50 requests"
    )
    assert isinstance(asked(CanarySwitch(), ERROR, on, after_s=1800), Hold)


def test_the_deadline_of_a_step_begins_when_its_pause_is_over() -> None:
    steps: Table = {"steps": [{"setWeight": 5}, {"pause": {"duration": "1h"}}, {"analysis": {}}], "stepDeadline": "10m"}

    assert asked(CanarySwitch(), PASS, steps, after_s=3599) == Wait(
        "step 1 lasts 1 h at least", NOW + timedelta(hours=1)
    )
    assert asked(CanarySwitch(), SHORT, steps, after_s=3600) == Wait(
        "31 of 50 requests", NOW + timedelta(hours=1, minutes=10)
    )


def test_a_judged_level_with_an_open_pause_waits_for_the_evidence_and_then_for_a_person() -> None:
    steps: Table = {"steps": [{"setWeight": 5}, {"pause": {}}]}

    assert isinstance(asked(CanarySwitch(), SHORT, steps), Wait)
    assert asked(CanarySwitch(), PASS, steps) == Hold("step 1 lasts until an operator promotes it", "pause")


def test_a_promotion_in_full_skips_all_steps_but_not_harm() -> None:
    assert asked(CanarySwitch(), SHORT, full=True) == SetWeight(100.0, "an operator promoted it in full")
    assert asked(CanarySwitch(), FAIL, full=True) == GoBack("v2 failed 7 of 9", "verdict")
    assert asked(CanarySwitch(), FAIL, weight=100.0, step=2, full=True) == GoBack("v2 failed 7 of 9", "verdict")


@pytest.mark.parametrize("mode", ["observe", "none"])
def test_a_judge_that_may_not_decide_changes_nothing_and_its_levels_become_pauses(mode: str) -> None:
    unjudged: Table = {"judge": {"mode": mode}}

    assert isinstance(asked(CanarySwitch(), PASS, unjudged, after_s=59), Wait)
    for judgement in (None, FAIL, INVALID, ERROR):
        assert asked(CanarySwitch(), judgement, unjudged, after_s=60) == SetWeight(25.0, "its 60 s are over")


# --- a/b -------------------------------------------------------------------------------------------------------------


def trial(**more: object) -> Table:
    return {"split": 30, "until": {"samples": 1000, "duration": "1h", "decision": True}, **more}


ENOUGH = Judgement(Decision.HOLD, missing="12 of 20 users", source_requests=700, target_requests=300)


def test_an_experiment_keeps_its_split_until_something_ends_it() -> None:
    assert asked(ABTestSwitch(), None, trial(), step=0, weight=0.0) == SetWeight(30.0, "the first step")
    assert asked(ABTestSwitch(), SHORT, trial(), weight=30.0, after_s=3599) == Wait(
        "the experiment runs until the first of: 31 of 1,000 requests, 1 h from its start, a decision",
        NOW + timedelta(hours=1),
    )


@pytest.mark.parametrize(
    ("judgement", "after_s", "why"),
    [
        (ENOUGH, 1.0, "1,000 of 1,000 requests were answered"),
        (None, 3600.0, "1 h are over"),
        (PASS, 1.0, "the evidence decided: v2 is not worse"),
    ],
)
def test_an_experiment_that_ended_keeps_the_source(judgement: Judgement | None, after_s: float, why: str) -> None:
    action = asked(ABTestSwitch(), judgement, trial(), weight=30.0, after_s=after_s)

    assert action == GoBack(f"{why}; v1 stays, pick is none", "concluded")


def test_the_winner_is_taken_only_when_asked_for_and_shown() -> None:
    picks = trial(pick="winner")

    assert weights(way(ABTestSwitch(), picks, lambda _: PASS)) == [30, 100]
    unproven = asked(ABTestSwitch(), ENOUGH, picks, weight=30.0)
    assert isinstance(unproven, GoBack)
    assert unproven.cause == "concluded"
    assert unproven.reason.endswith("nothing shows that v2 is not worse (12 of 20 users)")


def test_an_experiment_with_a_broken_split_is_held_and_harm_ends_it() -> None:
    assert asked(ABTestSwitch(), INVALID, trial(), weight=30.0) == Hold("the split is off", "invalid")
    assert asked(ABTestSwitch(), FAIL, trial(), weight=30.0) == GoBack("v2 failed 7 of 9", "verdict")


def test_an_operator_may_end_an_experiment_for_the_target() -> None:
    assert asked(ABTestSwitch(), None, trial(), weight=30.0, promoted=1) == SetWeight(
        100.0, "an operator promoted it past step 1"
    )
