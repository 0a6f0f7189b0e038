"""``turnout rules``: what is set, what is refused and why, and what becomes of one request."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    Turnout = Callable[..., Result]

RULES = """
[[rules]]
name = "pictures"
when = "'image' in modality"
version = "v2"

[[rules]]
name = "beta"
when = "headers['x-team'] == 'beta' && tokens < 500"
candidate = true
"""
TEXT = {"messages": [{"role": "user", "content": "hello"}]}
IMAGE = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str, object], str]:
    def write(name: str, content: object) -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def register(turnout: Turnout) -> None:
    for version in ("v1", "v2"):
        turnout("register", "chat", version, "--engine", "fake")


def said(result: Result) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(result.stdout)
    return made


def test_rules_are_set_shown_as_they_are_set_and_taken_away(
    turnout: Turnout, files: Callable[[str, object], str]
) -> None:
    register(turnout)

    first = turnout("rules", "set", "chat", files("r.toml", RULES))
    again = turnout("rules", "set", "chat", files("r.toml", RULES))
    shown = turnout("rules", "show", "chat")

    assert first.stdout.splitlines()[0] == "chat has 2 rules from now on"
    assert again.stdout.splitlines()[0] == "chat has these rules already"
    assert turnout("rules", "set", "chat", files("shown.toml", shown.stdout)).stdout.startswith("chat has these rules")
    assert said(turnout("rules", "set", "chat", files("none.json", {"rules": []}), "--json"))["new"]
    assert turnout("rules", "show", "chat").stdout.startswith("chat has no rules")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"rule": []}, "the file has no list of rules"),
        ({"rules": [{"name": "a", "when": "true", "percentage": 5}]}, "rules[0].percentage is unknown: did you mean"),
        ({"rules": [{"name": "a", "version": "v1"}]}, "rules[0]: Object missing required field `when`"),
        ({"rules": [{"name": "a", "when": "tokenz > 1", "version": "v1"}]}, "rule 'a': when: there is no 'tokenz'"),
        ({"rules": [{"name": "a", "when": "true", "version": "v9"}]}, "rule 'a': chat has no version 'v9'"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused_with_rule_and_field(
    turnout: Turnout, files: Callable[[str, object], str], content: object, reason: str
) -> None:
    register(turnout)

    result = turnout("rules", "set", "chat", files("r.json", content), "--json")

    assert result.exit_code == 1
    assert reason in said(result)["reason"]
    assert said(turnout("rules", "show", "chat", "--json"))["rules"] == []


def test_a_request_is_explained_before_the_rules_are_set(turnout: Turnout, files: Callable[[str, object], str]) -> None:
    image = turnout("rules", "test", "chat", "--request", files("i.json", IMAGE), "--rules", files("r.toml", RULES))
    beta = turnout(
        *("rules", "test", "chat", "--request", files("t.json", TEXT), "--rules", files("r.toml", RULES)),
        *("--header", "X-Team=beta", "--json"),
    )

    assert image.stdout.splitlines()[0] == "rule 'pictures' decides: it goes to version v2"
    assert [line.split()[0] for line in image.stdout.splitlines()[3:]] == ["pictures", "beta"]
    assert said(beta)["rule"] == "beta"
    assert [rule["outcome"] for rule in said(beta)["rules"]] == ["passes", "decides"]
    assert said(beta)["facts"]["tokens"] == 1


def test_a_request_is_explained_by_the_rules_that_are_set_and_what_is_ready(
    turnout: Turnout, files: Callable[[str, object], str]
) -> None:
    register(turnout)
    turnout("rules", "set", "chat", files("r.toml", RULES))

    result = said(turnout("rules", "test", "chat", "--request", files("i.json", IMAGE), "--json"))

    assert [rule["outcome"] for rule in result["rules"]] == ["not_ready", "passes"]
    assert (result["rule"], result["goes_to"]) == (None, "the model's split")
