"""Policies: each mistake is one sentence with its field; what is documented or an example is valid."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.core import policy
from turnout.core.policy import Policy
from turnout.core.strategies import STRATEGIES
from turnout.core.strategies.parameters import WORDS, duration_s, spoken

ROOT = Path(__file__).resolve().parents[3]
Table = dict[str, Any]


def valid(raw: Table) -> Policy:
    parsed = policy.parse(raw)
    assert isinstance(parsed, Policy), parsed
    return parsed


def refused(raw: Table) -> tuple[str, ...]:
    parsed = policy.parse(raw)
    assert isinstance(parsed, tuple), parsed
    return parsed


def canary(*steps: Table, **more: object) -> Table:
    return {"strategy": "canary", **({"steps": list(steps)} if steps else {}), **more}


@pytest.mark.parametrize("file", sorted((ROOT / "examples/policies").glob("*.toml")), ids=lambda file: file.stem)
def test_an_example_is_a_policy_in_toml_and_in_json(file: Path) -> None:
    raw = tomllib.loads(file.read_text())

    assert valid(raw).strategy == raw["strategy"]
    assert policy.parse(msgspec.json.decode(msgspec.json.encode(raw))) == policy.parse(raw)


def test_the_page_of_strategies_has_a_policy_that_is_valid_and_names_every_word() -> None:
    page = (ROOT / "docs/strategies.md").read_text()

    for block in re.findall(r"^```toml\n(.+?)^```", page, re.MULTILINE | re.DOTALL):
        valid(tomllib.loads(block))
    judge = refused(canary(judge={"zzz": 1}))[0].rpartition("known: ")[2].split(", ")
    for word in {*(word for words in WORDS.values() for word in words), *(f"judge.{word}" for word in judge)} - {
        "judge",
        "shadow",
        "until",
    }:
        assert f"`{word}`" in page, word


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_is_a_policy_without_any_parameter(strategy: str) -> None:
    assert valid({"strategy": strategy}) == Policy(strategy, {}, None, None, None, *policy.waits_s(strategy, {}))


def test_a_policy_has_its_strategys_words_and_its_times() -> None:
    raw = canary({"setWeight": 5}, {"pause": {"duration": "10m"}}, bake="15m", drain=0, maxTransitionTime="3h")

    assert valid(raw) == Policy("canary", {"steps": raw["steps"]}, 900.0, 0.0, 10800.0, 600.0, 2400.0)


def test_a_policy_that_waits_for_a_person_has_no_longest_time() -> None:
    assert valid(canary({"setWeight": 5}, {"pause": {}})).longest_s is None


STEP = {"setWeight": 5}
MISTAKES: list[tuple[Table, str]] = [
    ({}, "strategy is missing: choose one of immediate, gradual, canary, ab"),
    ({"strategy": "canray"}, "strategy is 'canray', and there is no such strategy; did you mean 'canary'?"),
    ({"strategy": 3}, "strategy is 3, and there is no such strategy; choose one of immediate, gradual, canary, ab"),
    (canary(stesp=[]), "stesp is no word of a policy; did you mean 'steps'?"),
    (canary(Bake=1), "Bake is no word of a policy; did you mean 'bake'?"),
    ({"strategy": "immediate", "steps": []}, "steps is no parameter of immediate: it belongs to gradual and canary"),
    (canary(steps=[]), "steps is empty: give at least one setWeight, or leave steps out for the default"),
    (canary(steps=5), "steps is 5: give a list like [{setWeight = 5}, {analysis = {}}]"),
    (canary(steps=[STEP] * 101), "steps has 101 entries: give at most 100"),
    (canary(steps=[STEP, 7]), "steps[1] is 7: give a table, {} for an empty one"),
    (canary(STEP, {"setWeight": 120}), "steps[1].setWeight is 120: give a percentage above 0, up to 100"),
    (canary({"setWeight": 0}), "steps[0].setWeight is 0: give a percentage above 0, up to 100"),
    (canary({"setWeight": True}), "steps[0].setWeight is true: give a percentage above 0, up to 100"),
    (canary({"setWeight": float("nan")}), "steps[0].setWeight is nan: give a percentage above 0, up to 100"),
    (
        canary({"setWeight": 25}, {"setWeight": 10}),
        "steps[1].setWeight is 10, after 25: a rollout never takes weight back in steps, "
        "give more than the step before",
    ),
    (canary({"pause": {}}, STEP), "steps[0] is pause, before any traffic: begin with setWeight"),
    (
        canary(STEP, {"setWeight": 100}, {"pause": {}}),
        "steps[2] is pause, after setWeight 100: watch the target at full traffic with bake",
    ),
    (canary({"setWeight": 100}), "steps has no level below 100: a canary needs one, or use the strategy immediate"),
    (canary({"setweight": 5}), "steps[0] has no key 'setweight'; did you mean 'setWeight'?"),
    (
        canary({"setWeight": 5, "pause": {}}),
        "steps[0] has setWeight and pause: give each step exactly one of setWeight, pause and analysis",
    ),
    (canary(STEP, {"analysis": {"templates": []}}), "steps[1].analysis has no key 'templates'; it takes none"),
    (canary(STEP, {"pause": {"duration": "-5m"}}), "steps[1].pause.duration is '-5m': give a time above 0"),
    (canary(STEP, {"pause": {"duration": 0}}), "steps[1].pause.duration is 0: give a time above 0"),
    (canary(STEP, {"pause": {"duration": "721h"}}), "steps[1].pause.duration is '721h': give at most 30 days (720h)"),
    (
        canary(STEP, {"pause": {"duration": "soon"}}),
        'steps[1].pause.duration is \'soon\': give a time like "90s", "10m" or "1h30m", or a number of seconds',
    ),
    (canary(onInconclusive="wait"), "onInconclusive is 'wait': choose one of hold, abort, promote"),
    (canary(bake=-1), "bake is -1: give a time of 0 or more"),
    (canary(maxTransitionTime=0), "maxTransitionTime is 0: give a time above 0"),
    (canary(judge={"errorCeiling": float("nan")}), "judge.errorCeiling is nan: give a share above 0, up to 1"),
    (canary(judge={"minRequests": 0}), "judge.minRequests is 0: give a whole number, 1 or more"),
    (canary(judge={"mode": "off"}), "judge.mode is 'off': choose one of on, observe, none"),
    (canary(judge={"compare": ["error"]}), "judge.compare has 'error'; did you mean 'errors'?"),
    (
        canary(judge={"minSeconds": "1h"}),
        "stepDeadline is 30 min, and judge.minSeconds is 1 h: no step could ever pass, "
        "give it more time or ask for less",
    ),
    (canary(shadow={"percent": 101}), "shadow.percent is 101: give a percentage above 0, up to 100"),
    (
        canary(shadow={"minCopies": 5}, judge={"mode": "none"}),
        'shadow.minCopies needs a judge that counts them: set judge.mode to "observe" or "on"',
    ),
    ({"strategy": "ab", "split": 100}, "split is 100: give a percentage above 0 and below 100"),
    (
        {"strategy": "ab", "until": {}},
        "until names no end, and the experiment would never stop: give samples, duration or decision",
    ),
    (
        {"strategy": "ab", "until": {"decision": True}, "judge": {"mode": "observe"}},
        "until.decision is true, and judge.mode is 'observe': nobody decides, set it to \"on\"",
    ),
    (
        {"strategy": "ab", "pick": "winner", "judge": {"mode": "none"}},
        'pick is "winner", and judge.mode is \'none\': only a judge can tell, set it to "on"',
    ),
    (
        {"strategy": "immediate", "stepDeadline": "1h"},
        "stepDeadline has no meaning here: immediate waits for evidence only in a shadow step, and there is none",
    ),
    (
        {"strategy": "gradual", "steps": [STEP, {"pause": {"duration": "70m"}}], "maxTransitionTime": 300},
        "maxTransitionTime is 5 min, and the steps take at least 1 h 10 min: give more time, or shorter steps",
    ),
]


@pytest.mark.parametrize(("raw", "sentence"), MISTAKES, ids=[sentence[:50] for _, sentence in MISTAKES])
def test_a_mistake_is_one_sentence_with_its_field(raw: Table, sentence: str) -> None:
    assert refused(raw) == (sentence,)


def test_all_mistakes_are_told_at_once() -> None:
    assert len(refused(canary({"setWeight": 0}, {"pasue": {}}, judge={"mod": 1}, bake="x", colour=1))) == 5


PLANS: list[tuple[str, Table, tuple[str, ...]]] = [
    ("immediate", {"judge": {"mode": "none"}}, ("100 % at once", "nobody judges it (judge.mode is none)")),
    (
        "gradual",
        {"steps": [STEP, {"pause": {"duration": "10m"}}, {"setWeight": 20}, {"pause": {}}]},
        (
            "5 % for 10 min",
            "20 % until an operator promotes it",
            "100 %",
            "evidence of harm rolls it back at any time (a good version in 1 % of switches at most)",
        ),
    ),
    (
        "canary",
        {"shadow": {}, "steps": [STEP, {"pause": {"duration": "1h"}}], "onInconclusive": "abort"},
        (
            "copies of 10 % of the requests for 10 min, until 50 are answered; the answers reach nobody",
            "5 % for 1 h, then until the evidence passes",
            "100 %",
            "without enough evidence 30 min after a level's pause, it goes back to the source",
            "evidence of harm rolls it back at any time (a good version in 1 % of switches at most)",
        ),
    ),
    (
        "ab",
        {"until": {"duration": "2h"}, "judge": {"mode": "observe"}},
        (
            "50 % until 2 h are over; then the source has everything back",
            "evidence is shown and decides nothing (judge.mode is observe)",
        ),
    ),
]


@pytest.mark.parametrize(("strategy", "parameters", "lines"), PLANS, ids=[plan[0] for plan in PLANS])
def test_a_plan_reads_as_it_goes(strategy: str, parameters: Table, lines: tuple[str, ...]) -> None:
    assert policy.describe(strategy, parameters) == lines


@given(st.integers(1, 30 * 86400))
def test_a_time_is_read_back_as_it_is_spoken(seconds: int) -> None:
    assert duration_s(spoken(seconds).replace(" ", "")) == seconds
