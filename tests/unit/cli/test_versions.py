"""``versions`` and ``compare``, and a registration that a worker looks at."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from turnout.core import model
from turnout.events.model import Contents, Inspection
from turnout.workers.cli.versions import ranges

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    Turnout = Callable[..., Result]
    Tell = Callable[..., dict[str, Any]]

LAYERS = {"model.embed_tokens": "e", **{f"model.layers.{n}": "a" for n in range(4)}}


def seen(digest: str, **facts: Any) -> Inspection:
    known = Inspection(
        digest * 8, 269 << 20, 272, dtype="bfloat16", shape_digest="s", tensors_digest="t", host_bytes=2 << 30
    )
    return msgspec.structs.replace(known, **facts)


@pytest.fixture
def models(turnout: Turnout, tell: Tell) -> Callable[..., None]:
    """Register versions with files, and say what a worker has found in them."""
    tell("worker", "worker.join", {"worker": "w1", "host": "h", "engines": ["vllm"], "devices": [], "capacity": 4})

    def register(version: str, inspection: Inspection | None, contents: Contents = Contents(), *words: str) -> None:  # noqa: B008
        path = f"/models/{version}"
        source = ("--engine", "vllm", "--source", path, "--no-wait")
        assert turnout("register", "chat", version, *source, *words).exit_code == 0
        told = json.loads(turnout("versions", "chat", "--json").stdout)["versions"]
        settings = next(one["digest"] for one in told if one["version"] == version)
        report = model.ReportInspected("chat", version, "w1", settings, inspection, contents=contents)
        if inspection is None:
            report = msgspec.structs.replace(report, code="weights_truncated", reason="it ends early", hint="copy it")
        assert tell("worker", "version.inspected", msgspec.to_builtins(report))["status"] == "accepted"

    return register


def pair(models: Callable[..., None]) -> None:
    config = {"rope_theta": "10000", "vocab_size": "100"}
    models(
        "v1", seen("c0ffee12"), Contents(LAYERS, config, {"temperature": "0.7"}, "tok", "tem"), "--metric", "acc=0.7"
    )
    other = {**LAYERS, "model.layers.1": "b", "model.layers.2": "b"}
    about = ("--metric", "acc=0.71", "--parent", "v1", "--tag", "tickets", "--note", "tuned")
    models("v2", seen("badcafe1"), Contents(other, {**config, "rope_theta": "20000"}, {}, "tok", "new"), *about)


def test_versions_lists_what_is_known_of_each(turnout: Turnout, models: Callable[..., None]) -> None:
    pair(models)
    models("v3", None)
    listed = turnout("versions", "chat").stdout.splitlines()
    assert listed[0].split()[:6] == ["VERSION", "STATE", "SIZE", "CONTENT", "PARENT", "TAGS"]
    assert listed[2].split()[:8] == ["v2", "validated", "269", "MiB", "badcafe1badc", "v1", "tickets", "alice"]
    assert listed[2].endswith("tuned")
    assert listed[3].split()[:2] == ["v3", "rejected"]
    assert listed[3].endswith("it ends early")
    told = json.loads(turnout("versions", "chat", "--json").stdout)["versions"]
    assert [(v["version"], v["state"], v["active"], v["instances"]) for v in told] == [
        ("v1", "validated", False, 0),
        ("v2", "validated", False, 0),
        ("v3", "rejected", False, 0),
    ]


def test_the_history_also_tells_of_versions_that_are_gone(turnout: Turnout, models: Callable[..., None]) -> None:
    pair(models)
    turnout("deregister", "chat", "v2")
    told = turnout("versions", "chat", "--history").stdout
    assert "alice registered chat v2 (vllm, /models/v2) from v1: tuned" in told
    assert told.splitlines()[-1].endswith("alice deregistered chat v2")
    assert turnout("versions", "nobody", "--history").exit_code == 1


def test_compare_sets_two_versions_side_by_side(turnout: Turnout, models: Callable[..., None]) -> None:
    pair(models)
    shown = turnout("compare", "chat", "v1", "v2")
    assert shown.exit_code == 0, shown.stderr
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    for line in (
        "chat v1 v2",
        "metric acc 0.7 0.71",
        "tokenizer the same the same",
        "chat template differs differs",
        "rope_theta 10000 20000",
        "temperature 0.7 -",
        "path /models/v1 /models/v2",
        "weights: 2 of 5 parts differ",
        "changed: model.layers.1-2",
        "the same: model.embed_tokens, model.layers.0, model.layers.3",
        "v1 → v2 by cold: yes, a new engine, beside the old one",
    ):
        assert line in lines, shown.stdout
    assert not any(line.startswith("vocab_size") for line in lines)


def test_compare_as_json_and_as_a_page(turnout: Turnout, models: Callable[..., None], tmp_path: Path) -> None:
    pair(models)
    made = json.loads(turnout("compare", "chat", "v1", "v2", "--json").stdout)
    assert made["layers"]["changed"] == ["model.layers.1", "model.layers.2"]
    assert made["first"]["metrics"] == {"acc": 0.7}
    page = tmp_path / "compare.html"
    assert turnout("compare", "chat", "v1", "v2", "--html", str(page)).exit_code == 0
    html = page.read_text()
    assert "<h1>chat: v1 and v2</h1>" in html
    assert "changed: model.layers.1-2" in html
    assert "<script" not in html


@pytest.mark.parametrize(
    ("second", "words", "spare", "adapter"),
    [
        (seen("badcafe1"), (), "settings, tokenizer", "neither is an adapter"),
        (seen("badcafe1", shape_digest="x"), (), "sampling defaults differ", "neither is an adapter"),
        (seen("badcafe1", tensors_digest="x"), (), "other names, types or shapes", "neither is an adapter"),
        (
            seen("badcafe1", base_digest="c0ffee12" * 8, adapter_rank=8),
            ("--adapter", "/models/lora"),
            "an adapter is no whole set",
            "one engine can serve both",
        ),
        (
            seen("badcafe1", base_digest="12345678" * 8, adapter_rank=8),
            ("--adapter", "/models/lora"),
            "an adapter is no whole set",
            "different base weights",
        ),
    ],
)
def test_the_ways_from_one_version_to_the_other_follow_from_what_they_share(
    second: Inspection, words: tuple[str, ...], spare: str, adapter: str, turnout: Turnout, models: Callable[..., None]
) -> None:
    models("v1", seen("c0ffee12"), Contents(LAYERS))
    models("v2", second, Contents(LAYERS), *words)
    ways = {w["tier"]: w for w in json.loads(turnout("compare", "chat", "v1", "v2", "--json").stdout)["ways"]}
    assert spare in ways["spare"]["why"]
    assert adapter in ways["adapter"]["why"]
    assert ways["spare"]["possible"] == spare.startswith("settings")
    assert ways["adapter"]["possible"] == adapter.startswith("one engine")


@pytest.mark.parametrize(("base", "says"), [("c0ffee12", "those of v1"), ("12345678", "others than those of v1")])
def test_an_adapter_is_set_beside_its_base_by_what_it_adds(
    base: str, says: str, turnout: Turnout, models: Callable[..., None]
) -> None:
    models("v1", seen("c0ffee12"), Contents(LAYERS))
    models("v2", seen("badcafe1", base_digest=base * 8, adapter_rank=8), Contents(LAYERS), "--adapter", "/models/lora")
    shown = turnout("compare", "chat", "v1", "v2").stdout.splitlines()
    assert f"weights: v2 adds an adapter of rank 8 to {says}" in shown
    assert not any("only in" in line for line in shown)


@pytest.mark.parametrize(
    ("names", "code"), [(("v1", "v9"), "version_unknown"), (("v1", "v1"), "versions_equal"), (("v9", "v1"), "version_")]
)
def test_what_can_not_be_compared_is_refused(
    names: tuple[str, str], code: str, turnout: Turnout, models: Callable[..., None]
) -> None:
    pair(models)
    result = turnout("compare", "chat", *names, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["code"].startswith(code)


def test_a_registration_tells_what_was_found_or_why_it_was_refused(
    turnout: Turnout, models: Callable[..., None]
) -> None:
    models("v1", seen("c0ffee12", architecture="LlamaForCausalLM", kv_bytes=1 << 30, warnings=("odd",)))
    models("v2", None)
    source = ("--engine", "vllm", "--source")
    told = turnout("register", "chat", "v1", *source, "/models/v1").stdout.splitlines()
    assert told[1:4] == [
        "validated by w1: LlamaForCausalLM, bfloat16, 272 tensors, 269 MiB, content c0ffee12c0ff",
        "an engine of it will take about 2.0 GiB of host memory, 1.0 GiB of it for the KV cache",
        "note: odd",
    ]
    made = turnout("register", "chat", "v3", *source, "/models/v3", "--no-wait").stdout
    assert "no worker has looked at its files yet" in made
    # nobody is left to look: it is said, and not waited for
    assert turnout("register", "chat", "v4", "--engine", "fake", "--source", "/models/v4").exit_code == 0


@pytest.mark.parametrize("words", [("--metric", "acc"), ("--metric", "acc=much")])
def test_a_metric_without_a_number_is_wrong_usage(words: tuple[str, ...], turnout: Turnout) -> None:
    assert turnout("register", "chat", "v1", "--engine", "fake", *words).exit_code == 2


def test_layers_that_follow_each_other_are_told_as_one() -> None:
    assert ranges(["a.layers.0", "a.layers.1", "a.layers.3", "norm"]) == ["norm", "a.layers.0-1", "a.layers.3"]
    assert ranges([f"x{n}.y" for n in range(14)])[-1] == "and 2 more"
    assert ranges([]) == []
