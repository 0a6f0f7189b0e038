"""``cache``, ``workers``, ``preload``, ``pin``, ``unpin``, ``evict``, ``replicas``, ``place``: words and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from click.testing import Result

Turnout = Callable[..., "Result"]
Tell = Callable[..., dict[str, Any]]

MIB = 1 << 20


@pytest.fixture
def chat(turnout: Turnout, tell: Tell) -> None:
    """A worker with 400 MiB, v1 of 100 MiB loaded on it, and a version that would never fit."""
    body = {"worker": "w1", "host": "h", "engines": ["fake"], "devices": ["cpu"], "capacity": 4}
    tell("worker", "worker.join", body | {"memory_bytes": 400 * MIB, "domain": "left"})
    for version, size in (("v1", 100), ("huge", 900)):
        turnout("register", "chat", version, "--engine", "fake", f"--arg=--memory={size}")


def said(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, (result.stdout, result.stderr)
    made: dict[str, Any] = json.loads(result.stdout)
    return made


@pytest.mark.usefixtures("chat")
def test_workers_are_listed_with_their_memory_and_domain(turnout: Turnout) -> None:
    (worker,) = said(turnout("workers", "--json"))["workers"]
    assert (worker["domain"], worker["memory_bytes"], worker["free_bytes"]) == ("left", 400 * MIB, 400 * MIB)
    assert "left" in turnout("workers").stdout


@pytest.mark.usefixtures("chat")
def test_replicas_may_be_said_with_the_registration(turnout: Turnout) -> None:
    assert turnout("register", "chat", "v2", "--engine", "fake", "--replicas", "3").exit_code == 0
    assert said(turnout("place", "chat", "v2", "--dry-run", "--json"))["replicas"] == 3
    assert turnout("register", "chat", "v3", "--engine", "fake", "--replicas", "0").exit_code == 2


@pytest.mark.usefixtures("chat")
def test_spares_and_bases_are_shown_and_counted(turnout: Turnout, tell: Tell) -> None:
    spare = {"name": "spare-1", "role": "spare", "holds": "chat v0", "bytes": 100 * MIB}
    tell("worker", "worker.kept", {"worker": "w1", "kept": [spare]})
    (worker,) = said(turnout("workers", "--json"))["workers"]
    assert (worker["spares"], worker["places"], worker["free_bytes"]) == (1, 1, 300 * MIB)
    (held,) = said(turnout("cache", "--json"))["workers"]
    assert (held["bytes"], held["engines"][0]["leaves"]) == (100 * MIB, 1)
    assert "holds chat v0; number 1 to make room (spares first)" in " ".join(turnout("cache").stdout.split())
    assert "free 300 MiB of 400 MiB, 1 of 4 places taken" in turnout("place", "chat", "v1", "--dry-run").stdout


@pytest.mark.usefixtures("chat")
def test_a_worker_that_holds_more_than_its_memory_is_named_with_what_to_do(turnout: Turnout, tell: Tell) -> None:
    assert "holds more" not in turnout("cache").stdout
    tell("worker", "worker.kept", {"worker": "w1", "kept": [{"name": "b", "role": "spare", "bytes": 500 * MIB}]})
    assert "w1 holds more than its memory" in turnout("cache").stdout
    assert "Unpin something" in " ".join(turnout("cache").stdout.split())


@pytest.mark.usefixtures("chat")
def test_a_place_is_explained_with_the_numbers(turnout: Turnout) -> None:
    placing = said(turnout("place", "chat", "v1", "--dry-run", "--json"))
    assert (placing["missing"], placing["chosen"]) == (1, ["w1"])
    assert placing["offers"][0]["why"] == "needs 122 MiB (its --memory), free 400 MiB of 400 MiB, 0 of 4 places taken"
    assert "full" in turnout("place", "chat", "huge", "--dry-run").stdout
    assert said(turnout("cache", "--json"))["waiting"] == [], "a dry run wishes for nothing"


@pytest.mark.usefixtures("chat")
def test_what_does_not_fit_is_refused_with_the_numbers(turnout: Turnout) -> None:
    refused = turnout("switch", "chat", "huge")
    assert refused.exit_code == 1
    assert "needs 922 MiB (its --memory), free 400 MiB of 400 MiB" in refused.stderr
    assert turnout("preload", "chat", "huge").exit_code == 1


@pytest.mark.usefixtures("chat")
def test_wishes_pins_and_replicas_are_said_once_and_shown(turnout: Turnout) -> None:
    assert said(turnout("pin", "chat", "v1", "--reason", "demo", "--json"))["new"]
    assert not said(turnout("pin", "chat", "v1", "--json"))["new"]
    assert turnout("unpin", "chat", "v1").stdout.startswith("unpinned chat v1")
    assert said(turnout("replicas", "chat", "v1", "2", "--json"))["replicas"] == 2
    assert said(turnout("preload", "chat", "v1", "--priority", "7", "--json"))["new"]
    (waiting,) = said(turnout("cache", "--json"))["waiting"]
    assert (waiting["version"], waiting["priority"]) == ("v1", 7)
    assert "to be preloaded: chat v1 (priority 7), waits for w1:" in turnout("cache").stdout
    assert said(turnout("evict", "chat", "v1", "--json"))["new"], "the wish is forgotten"
    assert said(turnout("cache", "--json"))["waiting"] == []


@pytest.mark.usefixtures("chat")
@pytest.mark.parametrize("command", ["pin", "unpin", "evict", "preload", "place"])
def test_an_unknown_version_is_refused(turnout: Turnout, command: str) -> None:
    refused = turnout(command, "chat", "v9")
    assert refused.exit_code == 1
    assert "chat has no version 'v9'" in refused.stderr
