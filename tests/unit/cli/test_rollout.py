"""Commands that lead a rollout, and what the operator sees of it: on logs written by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.cli.tale import STEPS, canary_at_step_1, canary_held, canary_rolled_back, serving

from turnout.events.model import RulesChanged
from turnout.events.route import Rule
from turnout.events.switch import StepStarted, SwitchAborted, SwitchPaused, SwitchPromoted, SwitchRequested
from turnout.workers.cli.policies import Setting, joined
from turnout.workers.cli.words import toml

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    from turnout.events.memory import MemoryStore

    Turnout = Callable[..., Result]

CAREFUL = 'strategy = "canary"\nsteps = [{setWeight = 5}, {pause = {}}, {setWeight = 50}]\nbake = "30m"\n'


def one_json(result: Result) -> dict[str, Any]:
    lines = result.stdout.splitlines()
    assert len(lines) == 1, result.output
    made: dict[str, Any] = json.loads(lines[0])
    return made


def events(store: MemoryStore, kind: type) -> list[Any]:
    return [recorded.event for recorded in store.log if isinstance(recorded.event, kind)]


@pytest.fixture
def careful(tmp_path: Path) -> str:
    file = tmp_path / "careful.toml"
    file.write_text(CAREFUL)
    return str(file)


def test_a_policy_is_set_shown_and_removed(turnout: Turnout, store: MemoryStore, careful: str) -> None:
    serving(store)
    first = turnout("policy", "set", "chat", "careful", careful)
    assert first.stdout.splitlines() == [
        "set policy careful of chat",
        "next: turnout switch chat VERSION --policy careful --dry-run",
    ]
    assert one_json(turnout("policy", "set", "chat", "careful", careful, "--json"))["new"] is False
    shown = turnout("policy", "show", "chat").stdout.splitlines()
    assert shown[:4] == ["careful", *(f"  {line}" for line in CAREFUL.splitlines())]
    assert "# 5 %" in shown[4]
    raw = one_json(turnout("policy", "show", "chat", "careful", "--json"))["policies"]["careful"]
    assert raw == {"strategy": "canary", **STEPS, "bake": "30m"}
    assert "careful" in turnout("get", "chat").stdout
    assert turnout("policy", "remove", "chat", "careful").stdout == "removed policy careful of chat\n"
    assert turnout("policy", "show", "chat", "careful").exit_code == 1
    assert turnout("policy", "remove", "chat", "careful").stdout == "chat has no policy 'careful': nothing to do\n"


def test_the_rules_of_a_model_are_named(turnout: Turnout, store: MemoryStore) -> None:
    tale = serving(store)
    rule = Rule("short", "tokens < 100", candidate=True)
    tale.by("ops:alice", "model", "chat", RulesChanged("chat", (rule,)))
    assert "rules  short" in turnout("get", "chat").stdout
    assert one_json(turnout("get", "chat", "--json"))["model"]["rules"] == [
        {"name": "short", "when": "tokens < 100", "candidate": True}
    ]
    tale.by("ops:alice", "model", "chat", RulesChanged("chat", ()))
    assert one_json(turnout("get", "chat", "--json"))["model"]["rules"] == []


def test_a_policy_that_can_not_be_meant_is_refused_with_the_field(
    turnout: Turnout, store: MemoryStore, tmp_path: Path
) -> None:
    serving(store)
    file = tmp_path / "p.json"
    file.write_text('{"strategy": "canary", "steps": [{"setWeight": 120}]}')
    for args in (("policy", "set", "chat", "p", str(file)), ("switch", "chat", "v2", "--policy-file", str(file))):
        refused = turnout(*args, "--json")
        assert refused.exit_code == 1
        assert "steps[0].setWeight is 120" in one_json(refused)["reason"]
    never = tmp_path / "n.toml"
    never.write_text('strategy = "canary"\njudge = {errorCeiling = nan}')
    refused = turnout("policy", "set", "chat", "p", str(never), "--json")
    assert "judge.errorCeiling is nan" in one_json(refused)["reason"]
    assert one_json(turnout("policy", "show", "chat", "--json"))["policies"] == {}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.yaml", "strategy: canary", "must end with .toml or .json"),
        ("p.toml", "strategy = canary", "is no TOML"),
        ("p.json", "[]", "holds no table"),
        ("none.toml", None, "can't be read"),
    ],
)
def test_a_file_that_is_no_policy_is_wrong_usage(
    name: str, text: str | None, said: str, turnout: Turnout, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    result = turnout("policy", "set", "chat", "p", str(tmp_path / name))
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("split=20", {"split": 20}),
        ("pick=winner", {"pick": "winner"}),
        ("stepDeadline=10m", {"stepDeadline": "10m"}),
        ("until.decision=true", {"until": {"decision": True}}),
        ("steps=[{setWeight = 5}]", {"steps": [{"setWeight": 5}]}),
    ],
)
def test_a_parameter_is_toml_and_a_plain_word_needs_no_quotes(text: str, table: dict[str, Any]) -> None:
    assert Setting().convert(text, None, None) == table


@pytest.mark.parametrize("param", ["split", "=5", "steps=[{setWeight = 5}", "a b=1"])
def test_a_parameter_that_is_none_is_wrong_usage(param: str, turnout: Turnout) -> None:
    assert turnout("switch", "chat", "v2", "--strategy", "ab", "--param", param).exit_code == 2


def test_parameters_come_together_and_the_later_one_wins() -> None:
    first, second = {"split": 20, "until": {"samples": 5}}, {"split": 30, "until": {"duration": "2h"}}
    assert joined((first, second)) == {"split": 30, "until": {"samples": 5, "duration": "2h"}}


def test_a_policy_is_written_as_it_can_be_read_again() -> None:
    import tomllib

    raw = {"strategy": "ab", "split": 12.5, "until": {"decision": True, "duration": "2h"}, "note": 'a "b" \\'}
    assert tomllib.loads(toml(raw)) == raw


def test_a_dry_run_names_each_level_and_what_it_could_find(turnout: Turnout, store: MemoryStore, careful: str) -> None:
    serving(store)
    turnout("policy", "set", "chat", "careful", careful)
    before = len(store.log)
    told = turnout("switch", "chat", "v2", "--policy", "careful", "--dry-run").stdout
    assert "plan  chat v1 → v2 (canary, policy careful), target warm" in told
    assert "give v2 5 %" in told
    assert "give v2 50 %" in told
    assert "no traffic yet" in told
    assert "AT 5 %" in told
    plan = one_json(turnout("switch", "chat", "v2", "--policy", "careful", "--dry-run", "--json"))
    assert [stage["weight"] for stage in plan["stages"]] == [5, 50, 100]
    assert [reach["weight"] for reach in plan["detectable"]] == [5, 50]
    assert "a pass takes about" in told
    assert 0 < plan["detectable"][0]["units_to_pass"] < plan["detectable"][1]["units_to_pass"]
    assert plan["parameters"] == STEPS
    assert len(store.log) == before


def test_a_dry_run_of_parameters_that_can_not_be_meant_is_refused(turnout: Turnout, store: MemoryStore) -> None:
    serving(store)
    refused = turnout("switch", "chat", "v2", "--strategy", "ab", "--param", "split=200", "--dry-run")
    assert refused.exit_code == 1
    assert "split is 200" in refused.stderr


def test_a_policy_and_parameters_beside_it_are_wrong_usage(turnout: Turnout, careful: str) -> None:
    for more in (("--strategy", "ab"), ("--param", "split=5"), ("--policy-file", careful)):
        assert turnout("switch", "chat", "v2", "--policy", "careful", *more).exit_code == 2


def test_two_promotions_of_the_same_step_are_one(turnout: Turnout, store: MemoryStore) -> None:
    canary_held(store)
    first = turnout("promote", "chat", "--step", "1", "--reason", "looks fine")
    assert first.stdout.splitlines()[0] == "sw-1 promoted past step 1"
    assert turnout("promote", "sw-1", "--step", "1").exit_code == 0
    assert turnout("promote", "chat").exit_code == 0
    (promoted,) = events(store, SwitchPromoted)
    assert (promoted.step, promoted.full, promoted.reason) == (1, False, "looks fine")


def test_a_promotion_that_names_no_step_is_not_taken_for_two(turnout: Turnout, store: MemoryStore) -> None:
    tale = canary_held(store)
    assert turnout("promote", "chat").stdout.splitlines()[0] == "sw-1 promoted past its step"
    tale.switch(StepStarted("sw-1", 2, 50.0, 3, "an operator promoted it past step 1", tale.now))
    twice = turnout("promote", "chat")
    assert twice.exit_code == 1
    assert "to let it past step 2, too: turnout promote sw-1 --step 2" in twice.stderr
    assert turnout("promote", "chat", "--step", "2").exit_code == 0
    assert [promoted.step for promoted in events(store, SwitchPromoted)] == [1, 2]


def test_a_full_promotion_needs_a_reason(turnout: Turnout, store: MemoryStore) -> None:
    canary_held(store)
    refused = turnout("promote", "chat", "--full", "--json")
    assert (refused.exit_code, one_json(refused)["code"]) == (1, "reason_missing")
    assert events(store, SwitchPromoted) == []
    assert turnout("promote", "chat", "--full", "--reason", "hotfix").exit_code == 0
    assert events(store, SwitchPromoted)[0].full


def test_an_operator_pauses_and_resumes_by_the_models_name(turnout: Turnout, store: MemoryStore) -> None:
    canary_at_step_1(store)
    assert turnout("pause", "chat", "--for", "10m").stdout.startswith("sw-1 paused for 10 min\n")
    assert one_json(turnout("status", "chat", "--json"))["paused_until"] is not None
    assert turnout("resume", "chat").stdout.startswith("sw-1 goes on\n")
    assert one_json(turnout("status", "chat", "--json"))["phase"] == "stepped"
    assert len(events(store, SwitchPaused)) == 1


def test_what_waits_for_a_decision_is_not_resumed(turnout: Turnout, store: MemoryStore) -> None:
    canary_held(store)
    refused = turnout("resume", "chat")
    assert refused.exit_code == 1
    assert "turnout promote sw-1" in refused.stderr


def test_a_model_without_a_switch_and_an_unknown_name_say_so(turnout: Turnout, store: MemoryStore) -> None:
    serving(store)
    none = turnout("promote", "chat", "--json")
    assert (none.exit_code, one_json(none)["code"]) == (1, "no_switch_runs")
    unknown = turnout("pause", "chit", "--json")
    assert one_json(unknown)["reason"] == "there is no switch and no model 'chit'"


def test_an_ended_switch_is_found_by_its_model_and_can_not_be_promoted(turnout: Turnout, store: MemoryStore) -> None:
    canary_rolled_back(store)
    assert one_json(turnout("status", "chat", "--json"))["phase"] == "rolled_back"
    refused = turnout("promote", "chat")
    assert refused.exit_code == 1
    assert "turnout retry sw-1" in refused.stderr


def test_a_switch_whose_view_is_not_kept_any_more_is_told_from_the_log(
    turnout: Turnout, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tale = canary_rolled_back(store)
    kept = one_json(turnout("status", "sw-1", "--json"))
    monkeypatch.setattr("turnout.projections.switches.ENDED_MOST", 1)
    newer = SwitchRequested("sw-2", "chat", "v2", "v1", "immediate", {}, False, "", tale.now, 0.0, 0.0, tale.now)
    tale.by("ops:alice", "switch", "sw-2", newer, SwitchAborted("sw-2", "no"))
    assert one_json(turnout("status", "sw-1", "--json")) == kept
    assert one_json(turnout("status", "chat", "--json")) == kept
    assert one_json(turnout("report", "sw-1", "--json"))["outcome"] == "rolled_back"
    assert one_json(turnout("status", "sw-9", "--json"))["code"] == "switch_unknown"


def test_a_retry_is_a_new_switch_with_the_same_parameters(turnout: Turnout, store: MemoryStore) -> None:
    canary_rolled_back(store)
    again = one_json(turnout("retry", "chat", "--json"))
    assert again["status"] == "accepted"
    assert again["switch"] != "sw-1"
    assert (again["target"], again["strategy"], again["parameters"]) == ("v2", "canary", STEPS)


def test_a_held_switch_says_what_it_waits_for_and_what_to_do(turnout: Turnout, store: MemoryStore) -> None:
    canary_held(store)
    told = turnout("status", "chat").stdout
    assert "until somebody decides" in told
    assert "step 1 of 3 (5 %)" in told
    assert "next: turnout promote sw-1 --step 1, or turnout abort sw-1" in told
    assert "stands still until an operator promotes or aborts it" in turnout("get", "chat").stdout


def test_health_tells_each_version_and_why(turnout: Turnout, store: MemoryStore) -> None:
    serving(store)
    told = turnout("health", "chat").stdout.splitlines()
    assert told[0].split()[:2] == ["VERSION", "STATUS"]
    assert told[1].split()[:2] == ["v1", "unknown"]
    assert any(line.startswith("v1 is unknown: no request in") for line in told)
    versions = one_json(turnout("health", "chat", "--json"))["versions"]
    assert [(one["version"], one["instances"]) for one in versions] == [("v1", 1), ("v2", 1)]
    assert turnout("health", "chit").exit_code == 1


def test_stop_needs_force_where_a_gateway_may_use_the_instance_and_force_needs_a_reason(
    turnout: Turnout, store: MemoryStore
) -> None:
    serving(store)
    refused = turnout("stop", "i-v1")
    assert refused.exit_code == 1
    assert "1 of 1 live gateways may send requests of chat v1 to i-v1" in refused.stderr
    assert "turnout stop i-v1 --force --reason TEXT" in refused.stderr
    assert turnout("stop", "i-v1", "--force").exit_code == 1
    assert turnout("stop", "i-v1", "--force", "--reason", "hangs").stdout == (
        "i-v1 is stopped now, with whatever runs on it\n"
    )
    assert turnout("stop", "i-v1", "--force", "--reason", "hangs").stdout.endswith("nothing to do\n")
    assert "forced by alice" in turnout("log").stdout
    assert turnout("stop", "i-v2").stdout == "i-v2 is stopped when nothing is connected to it any more\n"
    assert turnout("stop", "i-v9").exit_code == 1
