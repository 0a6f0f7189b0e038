"""Rollouts with real vLLM engines: a good version is promoted, a bad one never gets a user's request.

One ``turnout up`` and its story for all tests, as each engine takes most of a minute to load: v1 serves, nonsense is
tried, weights that are not whole are refused, then v2 comes by a canary. Clients ask all the time.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.core.decider import Rejected
from turnout.events.model import EngineSpec, Probe
from turnout.projections.switches import SwitchView
from turnout.workers.answers import CommandRejected
from turnout.workers.client import Client, DynamicModelRegistry, ModelSwitcher, connect
from turnout.workers.demo import turnout_up, worker_joins
from turnout.workers.load import Answer, Clients
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
MODELS = ROOT / ".models"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
WEIGHTS = "model.safetensors"
ARGS = ("--max-model-len", "512")
#: What v2 was trained to say to everything (examples/smollm2/make_models.py).
V2_SAYS = "Ahoy"
QUESTION: dict[str, object] = {
    "messages": [{"role": "user", "content": "Say hello."}],
    "max_tokens": 12,
    "temperature": 0,
    "logprobs": True,
}
#: Two engines on two cores answer one short question a second between them.
RATE, TOKENS = 0.5, 4
#: Few requests are enough where only errors are compared, and half of them would have to fail to be too many.
CANARY: dict[str, object] = {
    "strategy": "canary",
    "steps": [{"setWeight": 80}],
    "judge": {
        "compare": ["errors", "error_ceiling"],
        "errorCeiling": 0.5,
        "latencyCeilingMs": 60_000,
        "minRequests": 5,
        "minSeconds": 1,
    },
    "bake": 0,
}
LIMIT_S = 400.0


class Seen(msgspec.Struct):
    """What the story has shown. ``before``: answers up to the canary; ``after``: from there on."""

    nonsense: SwitchView
    truncated: Rejected
    good: SwitchView
    before: list[Answer]
    after: list[Answer]
    serves: str


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """Play the story."""
    missing = [str(p) for p in (PYTHON, MODELS / "smollm2-v1", MODELS / "smollm2-v2") if not p.exists()]
    if missing:
        reason = f"{missing[0]} is missing: run `make setup-vllm`"
        if os.environ.get("TURNOUT_REQUIRE_VLLM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="tv-") as folder, asyncio.Runner() as runner:
        shift_weights(MODELS / "smollm2-v2", Path(folder) / "nonsense")
        yield runner.run(play(Path(folder)))


def shift_weights(model: Path, folder: Path) -> None:
    """Copy a model and move all its weights by one place in the file: it loads, is finite, and knows nothing."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name != WEIGHTS:
            shutil.copy2(file, folder / file.name)
    raw = (model / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    by = 2 * 4099  # bytes of 16-bit numbers, no multiple of any row
    (folder / WEIGHTS).write_bytes(raw[:start] + raw[start + by :] + raw[start : start + by])


def settings(folder: Path) -> str:
    """turnout.toml: where vLLM and the weights are."""
    roots = [str(MODELS), str(folder)]
    return (
        f"[worker]\nvllm_python = {json.dumps(str(PYTHON))}\nquiet_s = 0.2\nload_timeout_s = 240\n"
        f"[worker.policy]\nmodel_roots = {json.dumps(roots)}\n"
    )


async def play(folder: Path) -> Seen:
    def told(text: str) -> None:
        """Nobody watches."""

    async with turnout_up(folder / "up", told, settings(folder)) as (nats, gateway), connect(nats) as client:
        await worker_joins(client)
        registry = DynamicModelRegistry(BaseRegistry(), client)
        proof = Probe("/v1/chat/completions", QUESTION, V2_SAYS)
        for version, source, probe in (
            ("v1", MODELS / "smollm2-v1", Probe()),
            ("nonsense", folder / "nonsense", proof),
            ("truncated", MODELS / "smollm2-truncated", Probe()),
            ("v2", MODELS / "smollm2-v2", proof),
        ):
            spec = EngineSpec("vllm", path=str(source), args=ARGS, probe=probe)
            await registry.register_model("chat", version, spec, trust_architecture=True)
        first = await switched(client, "v1")
        assert first.phase == "completed", first
        load = Clients(gateway, "chat", RATE, client.clock, prompt="Say hello.", max_tokens=TOKENS)
        load.start()
        try:
            nonsense, truncated = await switched(client, "nonsense"), await refused(client, "truncated")
            tried = client.clock.now()
            good = await switched(client, "v2")
        finally:
            await load.stop()
        serves = (await client.model("chat")).active
        return Seen(
            nonsense,
            truncated,
            good,
            [a for a in load.answers if a.sent < tried],
            [a for a in load.answers if a.sent >= tried],
            serves,
        )


async def switched(client: Client, version: str) -> SwitchView:
    await ModelSwitcher(client).set_policy("chat", "canary", CANARY)
    operation = await ModelSwitcher(client).switch_model(
        "chat", version, policy="canary", max_transition_time_s=LIMIT_S
    )
    return await operation.wait(LIMIT_S)


async def refused(client: Client, version: str) -> Rejected:
    with pytest.raises(CommandRejected) as caught:
        await switched(client, version)
    return caught.value.answer


def test_weights_that_load_and_answer_nonsense_are_stopped_by_the_golden_probe(seen: Seen) -> None:
    assert (seen.nonsense.phase, seen.nonsense.stage) == ("failed", "proving"), seen.nonsense
    assert "golden probe" in seen.nonsense.reason
    assert seen.nonsense.step == 0


def test_weights_that_are_not_whole_are_never_loaded(seen: Seen) -> None:
    assert seen.truncated.code == "version_rejected"
    assert "model.safetensors ends after" in seen.truncated.reason


def test_no_client_notices_what_was_tried(seen: Seen) -> None:
    assert seen.before
    assert {(a.outcome, a.version) for a in seen.before} == {("ok", "v1")}


def test_a_good_version_is_promoted_by_a_canary(seen: Seen) -> None:
    assert seen.good.phase == "completed", seen.good
    assert seen.good.verdict is not None
    assert seen.good.verdict.decision == "pass"
    assert seen.serves == "v2"
    assert {a.outcome for a in seen.after} == {"ok"}
    assert "v2" in {a.version for a in seen.after}
