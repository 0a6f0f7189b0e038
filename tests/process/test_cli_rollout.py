"""An operator leads a canary on real processes: what each command exits with, and which version serves in the end."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from turnout.core.switch import TWICE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import CompletedProcess

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
#: Two levels that only an operator ends: nobody judges, so nothing depends on traffic or time.
LED = """
strategy = "canary"
steps = [{setWeight = 20}, {pause = {}}, {setWeight = 60}, {pause = {}}]
judge = {mode = "none"}
"""


@pytest.fixture
def served(up: Up, eventually: Eventually) -> Up:
    """chat serves v1; v2 and the policy ``led`` are there."""
    up.write(SERVED)
    (up.folder / "led.toml").write_text(LED)
    up.start()
    eventually(lambda: up.version() == "v1")
    assert up("register", "chat", "v2", "--engine", "fake").returncode == 0
    assert up("policy", "set", "chat", "led", "led.toml").returncode == 0
    return up


def held(up: Up) -> tuple[CompletedProcess[str], dict[str, Any]]:
    """Ask for v2 by the policy, and stay to the first hold."""
    done = up("switch", "chat", "v2", "--policy", "led", "--wait", "--json")
    said: dict[str, Any] = json.loads(done.stdout)
    return done, said


def moment_at(moment: dict[str, Any]) -> datetime:
    """When it happened (UTC)."""
    return datetime.fromisoformat(moment["at"])


def active(up: Up) -> str:
    """The version that the log says chat serves."""
    return str(up.json("get", "chat")["model"]["active"])


def test_a_canary_is_promoted_step_by_step_and_its_outcome_is_what_serves(served: Up, eventually: Eventually) -> None:
    assert served.json("policy", "show", "chat", "led")["policies"]["led"]["strategy"] == "canary"
    # given a canary that waits for its operator
    done, said = held(served)
    assert done.returncode == 4, done
    assert (said["status"], said["step"], said["weight"], said["paused"]) == ("held", 1, 20.0, "pause")
    id = said["switch"]
    assert active(served) == "v1"
    # when the same click comes twice
    first = served("promote", id, "--step", "1", "--reason", "looks fine")
    second = served("promote", id, "--step", "1")
    assert (first.returncode, second.returncode) == (0, 0)
    # then it is one step further, and waits again
    eventually(lambda: served.json("status", id)["paused"] == "pause" and served.json("status", id)["step"] == 2)
    assert served.json("status", "chat")["weight"] == 60.0
    assert (served("promote", id, "--step", "1").returncode, served.json("status", id)["step"]) == (0, 2)
    # and everything at once needs a reason
    assert served("promote", "chat", "--full").returncode == 1
    assert served.json("status", id)["step"] == 2
    assert served("promote", "chat", "--full", "--reason", "a hotfix").returncode == 0
    eventually(lambda: served.json("status", id)["phase"] == "completed")
    assert active(served) == served.version() == "v2"
    # and the log tells who led it
    report = served.json("report", id)
    assert (report["outcome"], report["serves"]) == ("completed", "v2")
    assert [step["weight"] for step in report["steps"]] == [20.0, 60.0, 100.0]
    promoted = [m["sentence"] for m in report["moments"] if m["type"] == "SwitchPromoted"]
    assert len(promoted) == 2
    assert promoted[1].endswith("a hotfix")
    assert served("report", id, "--html", "report.html").returncode == 0
    assert "</html>" in (served.folder / "report.html").read_text()


def test_a_promotion_and_an_undo_that_are_typed_twice_count_once(served: Up, eventually: Eventually) -> None:
    _, said = held(served)
    id = said["switch"]
    # when nobody names the step, and the line is given again
    assert served("promote", "chat").returncode == 0
    twice = served("promote", "chat", "--json")
    # then it is taken for the same one, unless the two are far apart (on a machine that slow nobody has typed twice)
    eventually(lambda: served.json("status", id)["paused"] == "pause" or served.json("status", id)["step"] > 2)
    at = [moment_at(moment) for moment in served.json("report", id)["moments"] if moment["type"] == "SwitchPromoted"]
    assert len(at) == 1 or (at[1] - at[0]).total_seconds() >= TWICE_S
    if twice.returncode:
        assert json.loads(twice.stdout)["code"] == "step_unseen"
    # and an undo that is typed twice goes back to v1, and no further
    assert served("undo", "chat").returncode == 0
    eventually(lambda: served.json("status", id)["phase"] == "rolled_back")
    assert served("undo", "chat").returncode == 1
    assert active(served) == served.version() == "v1"


def test_an_abort_goes_back_and_says_so_and_a_retry_is_a_new_try(served: Up, eventually: Eventually) -> None:
    # given a held canary, and somebody who waits for its end
    _, said = held(served)
    id = said["switch"]
    assert served("pause", "chat", "--reason", "lunch").returncode == 0
    assert served("promote", "chat").returncode == 1  # an operator's pause comes first
    assert served("resume", "chat").returncode == 0
    eventually(lambda: served.json("status", id)["paused"] == "pause")  # it still waits for its promotion
    assert served("abort", "chat", "--reason", "not today").returncode == 0
    # then the outcome, the log and what serves agree
    waiting = served("undo", "chat", "--wait")
    assert waiting.returncode == 1, waiting  # nothing runs any more, and nothing else is known to be good
    status = served.json("status", id)
    assert (status["phase"], status["reason"]) == ("aborted", "not today")
    assert active(served) == served.version() == "v1"
    refused = served("promote", id, "--full", "--reason", "all the same")
    assert refused.returncode == 1
    assert f"turnout retry {id}" in refused.stderr
    # when it is tried again, it begins at its first step
    again = served("retry", id, "--wait", "--json")
    assert again.returncode == 4, again
    retried = json.loads(again.stdout)
    assert retried["switch"] != id
    assert (retried["target"], retried["step"], retried["weight"]) == ("v2", 1, 20.0)


def test_a_watched_rollout_tells_each_step_and_what_comes_next(served: Up) -> None:
    watching = served.open("get", "chat", "--watch", "--json")
    try:
        assert watching.stdout is not None
        held(served)
        seen: dict[str, Any] = {"outlook": None}
        while seen["outlook"] is None or seen["switch"]["phase"] != "paused":
            seen = json.loads(watching.stdout.readline())
        assert seen["outlook"]["what"] == "stands still until an operator promotes or aborts it"
        assert {split["version"]: split["weight"] for split in seen["route"]["splits"]} == {"v1": 80.0, "v2": 20.0}
    finally:
        watching.kill()
        watching.communicate()
