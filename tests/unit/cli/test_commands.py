"""What each command prints, what it exits with, and what its JSON holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click import Command, Group

from turnout.core.strategies import STRATEGIES
from turnout.projections.switches import SwitchView
from turnout.workers.cli import cli
from turnout.workers.cli.words import exit_code

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from turnout.events.memory import MemoryStore

    Turnout = Callable[..., Result]
    Tell = Callable[..., dict[str, Any]]

ESCAPE = "\x1b"


def one_json(result: Result) -> dict[str, Any]:
    """The one object that stdout holds, and nothing else."""
    lines = result.stdout.splitlines()
    assert len(lines) == 1, result.stdout
    made: dict[str, Any] = json.loads(lines[0])
    return made


@pytest.fixture
def worker(tell: Tell) -> None:
    tell("worker", "worker.join", {"worker": "w1", "host": "h", "engines": ["fake"], "devices": [], "capacity": 4})


def test_register_says_what_to_do_next_and_twice_is_no_error(turnout: Turnout) -> None:
    first = turnout("register", "chat", "v1", "--engine", "fake", "--note", "the first")
    assert first.exit_code == 0
    assert first.stdout.splitlines() == ["registered chat v1 (fake)", "next: turnout switch chat v1 --wait"]
    again = turnout("register", "chat", "v1", "--engine", "fake", "--note", "the first")
    assert again.exit_code == 0
    assert again.stdout.startswith("chat v1 is registered already with these settings")


def test_register_as_json_holds_the_version(turnout: Turnout) -> None:
    said = one_json(turnout("register", "chat", "v1", "--engine", "fake", "--arg=--tokens=3", "--json"))
    assert (said["status"], said["model"], said["version"], said["new"]) == ("accepted", "chat", "v1", True)
    assert said["engine"] == {"kind": "fake", "args": ["--tokens=3"], "probe": {}}
    assert said["registered_by"] == "ops:alice"


def test_a_version_is_registered_with_everything_that_was_said(turnout: Turnout) -> None:
    said = one_json(
        turnout(
            *("register", "chat", "v1", "--engine", "openai", "--command", "serve --name 'a b' --port {port}"),
            *("--probe-path", "/v1/completions", "--probe-body", '{"prompt": "2+2="}', "--expect", "4", "--json"),
        )
    )
    assert said["engine"] == {
        "kind": "openai",
        "command": ["serve", "--name", "a b", "--port", "{port}"],
        "probe": {"path": "/v1/completions", "body": {"prompt": "2+2="}, "expect": "4"},
    }


def test_a_refusal_goes_to_stderr_with_its_hint_and_exits_1(turnout: Turnout) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    result = turnout("register", "chat", "v1", "--engine", "fake", "--arg=--tokens=3")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "rejected: chat v1 is registered with other settings, and a version never changes",
        "     try: register the new settings under another version name",
    ]


def test_a_refusal_as_json_is_on_stdout(turnout: Turnout) -> None:
    result = turnout("switch", "chat", "v1", "--json")
    assert result.exit_code == 1
    said = one_json(result)
    assert (said["status"], said["code"]) == ("rejected", "model_unknown")
    assert set(said) == {"status", "code", "reason", "hint"}
    assert result.stderr == ""


@pytest.mark.parametrize(
    "args",
    [
        ("register", "chat"),
        ("register", "chat", "v1", "--engine", "steam"),
        ("register", "chat", "v1", "--engine", "fake", "--probe-body", "[1]"),
        ("register", "chat", "v1", "--engine", "openai", "--command", "serve 'open"),
        ("switch", "chat", "v1", "--bake", "soon"),
        ("switch", "chat", "v1", "--timeout", "5s"),
        ("switch", "chat", "v1", "--strategy", "canari"),
        ("swich", "chat", "v1"),
        ("completion", "tcsh"),
        ("gateway", "--port", "70000"),
    ],
)
def test_wrong_usage_exits_2_and_leaves_stdout_alone(args: tuple[str, ...], turnout: Turnout) -> None:
    result = turnout(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error:" in result.stderr


def test_an_unknown_command_names_the_nearest(turnout: Turnout) -> None:
    assert "did you mean 'switch'?" in turnout("swich").stderr


def test_models_lists_what_serves(turnout: Turnout) -> None:
    empty = turnout("models")
    assert empty.stdout.splitlines() == [
        "no models are registered",
        "next: turnout register MODEL VERSION --engine fake",
    ]
    turnout("register", "chat", "v1", "--engine", "fake")
    turnout("register", "chat", "v2", "--engine", "fake")
    listed = turnout("models").stdout.splitlines()
    assert listed[0].split() == ["MODEL", "SERVES", "VERSIONS", "KNOWN", "GOOD", "SWITCH"]
    assert listed[1].split() == ["chat", "-", "v1,", "v2", "-", "-"]
    assert [m["model"] for m in one_json(turnout("models", "--json"))["models"]] == ["chat"]


def test_a_switch_is_asked_for_shown_and_aborted(turnout: Turnout, worker: None) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    asked = turnout("switch", "chat", "v1", "--bake", "1m", "--reason", "try it", "--json")
    assert asked.exit_code == 0
    view = one_json(asked)
    assert (view["status"], view["model"], view["target"], view["reason"]) == ("accepted", "chat", "v1", "try it")
    id = view["switch"]

    assert "requested" in turnout("models").stdout
    tree = turnout("get", "chat").stdout
    assert "serves nothing yet" in tree
    assert "waits for an instance of v1" in tree
    assert one_json(turnout("get", "chat", "--json"))["switch"]["switch"] == id

    shown = turnout("status", id)
    assert shown.exit_code == 0
    assert "try it" in shown.stdout
    assert one_json(turnout("status", id, "--json"))["phase"] == "requested"

    stopped = turnout("abort", id, "--reason", "no")
    assert (stopped.exit_code, stopped.stdout) == (0, f"{id} is aborted\n")
    assert one_json(turnout("status", id, "--json"))["phase"] == "aborted"
    assert turnout("abort", id).exit_code == 1


def test_waiting_for_an_ended_switch_tells_its_end(turnout: Turnout, worker: None) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    id = one_json(turnout("switch", "chat", "v1", "--json"))["switch"]
    result = turnout("switch", "chat", "v1", "--wait", "--timeout", "100ms")
    assert result.exit_code == 1  # one switch at a time
    assert f"turnout abort {id}" in result.stderr


def test_a_wait_that_takes_too_long_exits_5_and_the_switch_goes_on(turnout: Turnout, worker: None) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    result = turnout("switch", "chat", "v1", "--wait", "--timeout", "50ms")
    assert result.exit_code == 5
    assert "still requested after 50 ms: it goes on" in result.stderr
    assert "next: turnout status sw-" in result.stdout


def test_a_wait_that_takes_too_long_says_so_as_json(turnout: Turnout, worker: None) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    result = turnout("switch", "chat", "v1", "--wait", "--timeout", "50ms", "--json")
    assert result.exit_code == 5
    assert one_json(result)["status"] == "timeout"


def test_a_dry_run_shows_the_plan_and_changes_nothing(turnout: Turnout, worker: None, store: MemoryStore) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    before = len(store.log)
    plan = turnout("switch", "chat", "v1", "--dry-run")
    assert plan.exit_code == 0
    assert plan.stdout.splitlines()[0] == "plan  chat → v1 (immediate), target cold"
    assert one_json(turnout("switch", "chat", "v1", "--dry-run", "--json"))["tier"] == "cold"
    assert len(store.log) == before


def test_an_undo_with_nothing_to_go_back_to_is_refused(turnout: Turnout) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    result = turnout("undo", "chat")
    assert result.exit_code == 1
    assert "turnout switch chat VERSION" in result.stderr


def test_deregister_takes_a_version_away(turnout: Turnout) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    assert turnout("deregister", "chat", "v1").stdout == "deregistered chat v1\n"
    assert turnout("deregister", "chat", "v1").stdout == "chat has no version v1: nothing to do\n"
    assert one_json(turnout("deregister", "chat", "v1", "--json"))["new"] is False


def test_the_log_is_told_in_sentences_and_by_model(turnout: Turnout, worker: None) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    turnout("register", "code", "v1", "--engine", "fake")
    id = one_json(turnout("switch", "chat", "v1", "--reason", "new weights", "--json"))["switch"]
    told = turnout("log").stdout
    assert "alice registered code v1 (fake)" in told
    of_chat = turnout("log", "chat").stdout
    assert "alice asked for chat v1 (immediate): new weights" in of_chat
    assert "code" not in of_chat
    of_switch = [json.loads(line) for line in turnout("log", id, "--json").stdout.splitlines()]
    assert [e["type"] for e in of_switch] == ["SwitchAdmitted", "SwitchRequested"]
    assert of_switch[1]["event"]["target"] == "v1"
    assert of_switch[1]["actor"] == "ops:alice"


def test_the_log_of_something_unknown_is_refused(turnout: Turnout) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    result = turnout("log", "chit")
    assert result.exit_code == 1
    assert "the log knows no model and no switch 'chit'" in result.stderr


def test_verify_finds_a_whole_log_whole(turnout: Turnout) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    result = turnout("verify")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "the chain of 2 events on 1 subjects is whole",
        "the 2 views are what the log says, up to event 2",
    ]


def test_verify_finds_a_changed_event(turnout: Turnout, store: MemoryStore) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    turnout("register", "chat", "v2", "--engine", "fake")
    import msgspec

    first = store.log[1]
    forged = first.body.replace(b"fake", b"vllm")
    store.log[1] = type(first)(
        first.subject, first.sequence, first.type, first.event, first.envelope, first.raw_envelope, forged
    )
    result = turnout("verify", "--json")
    assert result.exit_code == 1
    said = one_json(result)
    assert said["status"] == "broken"
    assert [p["sequence"] for p in said["problems"]] == [3]
    assert msgspec.json.encode(said)


@pytest.mark.parametrize(
    "args",
    [
        ("models",),
        ("get", "chat"),
        ("log",),
        ("verify",),
        ("switch", "chat", "v1", "--dry-run"),
        ("switch", "chat", "v1", "--wait", "--timeout", "20ms"),
        ("undo", "chat"),
        ("doctor",),
    ],
)
def test_what_is_piped_has_no_escape_codes_and_no_blanks_at_line_ends(
    args: tuple[str, ...], turnout: Turnout, worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    turnout("register", "chat", "v1", "--engine", "fake")
    result = turnout(*args)
    assert result.output
    assert ESCAPE not in result.output
    assert [line for line in result.output.splitlines() if line != line.rstrip()] == []


def test_every_command_takes_json(turnout: Turnout) -> None:
    from click import Context

    context = Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        found: dict[tuple[str, ...], Command] = {(name,): command}
        if isinstance(command, Group):
            found = {(name, inner): one for inner, one in command.commands.items()}
        for path, one in found.items():
            assert any("--json" in p.opts for p in one.params), path
            assert turnout(*path, "--help").exit_code == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, turnout: Turnout) -> None:
    result = turnout("completion", shell)
    assert result.exit_code == 0
    assert "_TURNOUT_COMPLETE" in result.stdout


@pytest.mark.parametrize(
    ("phase", "undo", "back_was_asked", "code"),
    [
        ("completed", False, False, 0),
        ("failed", False, False, 1),
        ("rolled_back", False, False, 3),
        ("aborted", False, False, 3),
        ("concluded", False, False, 0),
        ("paused", False, False, 4),
        ("completed", True, True, 0),
        ("rolled_back", True, True, 3),
        ("rolled_back", False, True, 0),
        ("failed", False, True, 1),
    ],
)
def test_an_exit_code_tells_how_a_switch_ended(phase: str, undo: bool, back_was_asked: bool, code: int) -> None:
    assert exit_code(SwitchView("sw-1", phase=phase, undo=undo), back_was_asked=back_was_asked) == code


def test_the_strategies_in_the_help_are_those_that_exist(turnout: Turnout) -> None:
    told = turnout("switch", "--help").stdout
    assert all(name in told for name in STRATEGIES)


def test_settings_that_are_wrong_keep_a_process_from_starting(
    turnout: Turnout, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "turnout.toml").write_text("[gatway]\n[switch]\nbake = 1\n")
    for command in ("up", "controller", "worker", "gateway"):
        result = turnout(command)
        assert result.exit_code == 1
        assert "the settings have 2 problems:" in result.stderr
        said = one_json(turnout(command, "--json"))
        assert said["code"] == "settings_invalid"
        assert said["problems"][1] == {
            "where": "turnout.toml, line 3",
            "what": "[switch] has no key 'bake'; did you mean 'bake_s'?",
        }
