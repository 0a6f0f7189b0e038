"""The command line beside real processes: exit codes of a wait, followed logs, an unreachable server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.process.conftest import Up

    Eventually = Callable[[Callable[[], object]], None]

pytestmark = pytest.mark.process

SERVED = """
[switch]
bake_s = 0.0

[worker]
quiet_s = 0.1

[models.chat.versions.v1]
engine = "fake"
"""


@pytest.fixture
def served(up: Up, eventually: Eventually) -> Up:
    """chat serves v1."""
    up.write(SERVED)
    up.start()
    eventually(lambda: up.version() == "v1")
    return up


def test_a_version_that_can_not_be_loaded_exits_1_with_the_engines_last_lines(served: Up) -> None:
    served("register", "chat", "bad", "--engine", "fake", "--arg=--crash-at-load")
    result = served("switch", "chat", "bad", "--wait")
    assert result.returncode == 1, result
    assert "failed in stage" in result.stderr
    assert "\n  | " in result.stderr
    assert "chat serves v1" in result.stderr
    assert served.version() == "v1"


def test_a_switch_that_is_aborted_while_it_bakes_exits_3(served: Up) -> None:
    # given a switch that bakes
    served("register", "chat", "v2", "--engine", "fake")
    waiting = served.open("switch", "chat", "v2", "--wait", "--bake", "1h", "--json")
    try:
        id = _running(served, "baking")
        # when
        assert served("abort", id, "--reason", "not today").returncode == 0
        # then
        out, err = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
    assert waiting.returncode == 3, err
    said = json.loads(out)
    assert (said["status"], said["reason"]) == ("aborted", "not today")
    assert served.version() == "v1"


def test_an_undo_of_a_running_switch_is_done_when_it_is_rolled_back(served: Up) -> None:
    served("register", "chat", "v2", "--engine", "fake")
    waiting = served.open("switch", "chat", "v2", "--wait", "--bake", "1h")
    try:
        id = _running(served, "baking")
        undone = served("undo", "chat", "--wait", "--json")
        out, err = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
    assert undone.returncode == 0, undone
    assert json.loads(undone.stdout)["switch"] == id
    assert waiting.returncode == 3, err
    assert "chat serves v1" in out


def test_a_watched_model_and_a_followed_log_tell_as_it_happens(served: Up, eventually: Eventually) -> None:
    watching = served.open("get", "chat", "--watch", "--json")
    following = served.open("log", "chat", "--follow", "--json")
    try:
        assert watching.stdout is not None
        assert following.stdout is not None
        assert json.loads(watching.stdout.readline())["model"]["active"] == "v1"
        served("register", "chat", "v2", "--engine", "fake")
        served("switch", "chat", "v2", "--wait")
        seen: dict[str, Any] = {}
        while seen.get("model", {}).get("active") != "v2":
            seen = json.loads(watching.stdout.readline())
        told: dict[str, Any] = {}
        while told.get("type") != "SwitchCompleted" or "v2" not in told["sentence"]:
            told = json.loads(following.stdout.readline())
    finally:
        for one in (watching, following):
            one.kill()
            one.communicate()


def test_a_reader_that_goes_away_is_no_error(served: Up) -> None:
    telling = served.open("log", "--json", "--follow")
    assert telling.stdout is not None
    telling.stdout.readline()
    telling.stdout.close()
    served("register", "chat", "v2", "--engine", "fake")
    assert telling.wait(60) == 0
    assert telling.stderr is not None
    assert telling.stderr.read() == ""
    telling.stderr.close()


@pytest.mark.parametrize("command", [("models",), ("controller",), ("worker",), ("gateway", "--port", "0"), ("log",)])
def test_an_unreachable_server_is_one_clear_message(command: tuple[str, ...], up: Up) -> None:
    result = up(*command, "--nats", "nats://127.0.0.1:1", "--json")
    assert result.returncode == 1
    said = json.loads(result.stdout)
    assert said["code"] == "store_unavailable"
    assert said["reason"].startswith("cannot connect to NATS at 127.0.0.1:1")
    assert "turnout up" in said["hint"]
    text = up(*command, "--nats", "nats://127.0.0.1:1").stderr
    assert "failed: cannot connect to NATS" in text
    assert "Traceback" not in text


def test_a_server_without_turnout_says_what_to_start(up: Up, make_nats_server: Callable[..., Any]) -> None:
    url = make_nats_server().url
    result = up("register", "chat", "v1", "--engine", "fake", "--nats", url)
    assert result.returncode == 1
    assert "no controller answers" in result.stderr
    assert "try: start one: turnout up" in result.stderr


def test_the_doctor_finds_this_machine_fit(up: Up) -> None:
    checks = {c["name"]: c for c in json.loads(up("doctor", "--json").stdout)["checks"]}
    assert checks["nats-server"]["state"] == "ok"
    assert checks["/proc"]["state"] == "ok"
    assert set(checks) == {
        "settings",
        "nats-server",
        "vllm",
        "devices",
        "gateway port",
        "/proc",
        "store folder",
        "open files",
    }


def _running(up: Up, phase: str) -> str:
    """Wait until the model's switch is in the phase; its id."""
    watching = up.open("get", "chat", "--watch", "--json")
    try:
        assert watching.stdout is not None
        for line in watching.stdout:
            switch = json.loads(line)["switch"]
            if switch is not None and switch["phase"] == phase:
                return str(switch["switch"])
    finally:
        watching.kill()
        watching.communicate()
    raise AssertionError(f"no switch came to {phase}")
