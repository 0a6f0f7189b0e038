"""``turnout up``: everything on one machine, started, supervised and stopped as a user would."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
from functools import partial
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.process.conftest import Up

    Eventually = Callable[[Callable[[], object]], None]

pytestmark = pytest.mark.process

TWO_VERSIONS = """
[switch]
bake_s = 0.0

[worker]
quiet_s = 0.1

[models.chat.versions.v1]
engine = "fake"

[models.chat.versions.v2]
engine = "fake"
"""


def test_from_register_to_undo_and_nothing_is_left_after_ctrl_c(up: Up) -> None:
    # given
    said = up.start()
    assert said["status"] == "ready"
    assert up("models").stdout.splitlines()[0] == "no models are registered"

    # when a first version is registered and switched to
    assert up("register", "chat", "v1", "--engine", "fake").returncode == 0
    first = up("switch", "chat", "v1", "--wait")
    assert first.returncode == 0, first
    assert first.stdout.splitlines()[-1] == "chat serves v1"

    # then it answers
    assert up.version() == "v1"

    # when a second one takes over, and is undone
    assert up.json("register", "chat", "v2", "--engine", "fake")["new"] is True
    second = up.json("switch", "chat", "v2", "--wait", "--bake", "0", "--reason", "new weights")
    assert (second["status"], second["source"], second["target"]) == ("completed", "v1", "v2")
    assert up.version() == "v2"
    undone = up("undo", "chat", "--wait", "--reason", "wrong answers")
    assert undone.returncode == 0, undone
    assert "\x1b" not in undone.stdout
    assert up.version() == "v1"

    # then the log tells it, and is whole
    told = up("log", "chat").stdout
    assert "asked for chat v2 (immediate): new weights" in told
    assert "undid chat: from v2 back to v1: wrong answers" in told
    assert up.json("verify")["status"] == "whole"
    assert up.json("get", "chat")["model"]["active"] == "v1"

    # when Ctrl-C comes, then nothing is left
    assert up.stop() == 0
    assert up.pids() == {}
    assert not (up.folder / ".turnout" / "up.json").exists()


def test_declared_models_are_served_and_a_restart_goes_on_where_it_ended(up: Up, eventually: Eventually) -> None:
    # given models that are declared
    up.write(TWO_VERSIONS)
    up.start()
    eventually(lambda: up.version() == "v1")
    # when another version was switched to, and everything is started again
    assert up("switch", "chat", "v2", "--wait").returncode == 0
    assert up.stop() == 0
    assert up.pids() == {}
    up.start()
    # then the log has the say, not the file
    eventually(lambda: up.version() == "v2")
    model = up.json("models")["models"][0]
    assert (model["active"], model["switch"]) == ("v2", "")
    assert up.json("verify")["status"] == "whole"


def test_a_process_that_is_killed_is_started_again_and_switches_go_on(up: Up, eventually: Eventually) -> None:
    # given
    up.write(TWO_VERSIONS)
    up.start()
    eventually(lambda: up.version() == "v1")
    eventually(lambda: up.json("models")["models"][0]["switch"] == "")
    for name, target in (("controller", "v2"), ("worker", "v1"), ("gateway", "v2"), ("nats", "v1")):
        before = up.running()["processes"][name]
        # when
        os.kill(before, signal.SIGKILL)
        # then
        eventually(partial(_replaced, up, name, before))
        done = up("switch", "chat", target, "--wait")
        assert done.returncode == 0, (name, done)
        eventually(partial(_serves, up, target))


def _replaced(up: Up, name: str, before: int) -> bool:
    return up.running()["processes"][name] not in (0, before)


def _serves(up: Up, version: str) -> bool:
    return up.version() == version


def test_when_up_itself_is_killed_the_next_one_takes_over_its_engines(up: Up, eventually: Eventually) -> None:
    # given
    up.write(TWO_VERSIONS)
    up.start()
    eventually(lambda: up.version() == "v1")
    engine = [pid for pid, line in up.pids().items() if "fake_server" in line]
    assert len(engine) == 1
    # when
    up.stop(signal.SIGKILL)
    # then the processes end, the engine goes on
    eventually(lambda: list(up.pids()) == engine)
    # when
    up.start()
    # then
    eventually(lambda: up.version() == "v1")
    assert [pid for pid, line in up.pids().items() if "fake_server" in line] == engine
    assert up.stop() == 0
    assert up.pids() == {}


def test_several_gateways_share_the_port(up: Up, eventually: Eventually) -> None:
    # given
    up.write(TWO_VERSIONS)
    up.start("--port", "0", "--processes", "2")
    eventually(lambda: up.version() == "v1")
    processes = up.running()["processes"]
    assert {"gateway-1", "gateway-2"} <= set(processes)
    # when
    done = up("switch", "chat", "v2", "--wait")
    # then both have acknowledged
    assert done.returncode == 0, done
    applied = [json.loads(line) for line in up("log", "chat", "--json").stdout.splitlines()]
    steps = [entry["event"] for entry in applied if entry["type"] == "StepApplied"]
    assert len(steps[-1]["gateways"]) == 2
    assert {up.version() for _ in range(8)} == {"v2"}


def test_a_second_one_in_the_folder_says_that_one_runs(up: Up) -> None:
    up.start()
    second = up("up", "--port", "0")
    assert second.returncode == 1
    assert "turnout up runs here already" in second.stderr


def test_a_port_in_use_is_one_clear_message_and_nothing_is_left(up: Up) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        result = up("up", "--port", port)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"failed: port {port} on 127.0.0.1 can't be used: Address already in use",
        "   try: stop what listens there, or choose another: --port",
    ]
    assert up.pids() == {}


def test_a_store_that_is_in_use_is_one_clear_message(up: Up) -> None:
    up.start()
    (up.folder / ".turnout" / "up.json").unlink()  # as if it had not been written
    result = up("up", "--port", "0", "--json")
    assert result.returncode == 1
    assert "is in use by another turnout" in json.loads(result.stdout)["reason"]


def test_the_management_api_is_not_waited_for_and_answers_where_it_was_said(up: Up, eventually: Eventually) -> None:
    address = up.start()["admin"]
    eventually(lambda: up.running()["processes"].get("admin"))  # it has said so itself
    assert up.running()["admin"] == address
    with urllib.request.urlopen(f"{address}/healthz", timeout=10) as answer:
        assert json.load(answer)["connected"] is True


def test_a_management_api_that_can_not_start_ends_nothing_else(up: Up, eventually: Eventually) -> None:
    up.write('[admin]\ntoken_file = "missing"\n[models.chat.versions.v1]\nengine = "fake"\n')
    assert up.start()["status"] == "ready"
    eventually(lambda: up.running()["admin"] == "")
    eventually(lambda: up.version() == "v1")


def test_all_metrics_are_answered_where_they_are_asked_for(up: Up) -> None:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    up.write(f'[metrics]\ncontroller = "127.0.0.1:{ports[0]}"\nworker = "127.0.0.1:{ports[1]}"\n')
    up.start()

    def read(port: int) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    assert "turnout_controller_leading" in read(ports[0])
    assert "turnout_worker_connected 1.0" in read(ports[1])
