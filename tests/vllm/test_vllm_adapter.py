"""Real vLLM: two LoRA versions share their base's engine, and each answers under its own name. One engine start."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.events.model import EngineSpec
from turnout.workers.clock import SystemClock
from turnout.workers.inference import client
from turnout.workers.inference.engines.vllm import VllmEngine, find_vllm
from turnout.workers.inference.host import HostRunner
from turnout.workers.inference.policy import WorkerPolicy
from turnout.workers.inference.process import RunFolder
from turnout.workers.inference.runner import Loaded, Order
from turnout.workers.inference.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
MODELS = ROOT / ".models"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ARGS = ("--max-model-len", "512", "--kv-cache-memory-bytes", "256M")


class Seen(msgspec.Struct):
    """What was seen. ``alone``: what the second said once the first had gone; ``gone``: the first's status then."""

    loaded: list[Loaded]
    texts: list[str]
    engines: int
    alone: str = ""
    gone: int = 0
    left: int = -1


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """Play the story."""
    missing = [str(p) for p in (PYTHON, MODELS / "smollm2-lora-ahoy", MODELS / "smollm2-lora-land") if not p.exists()]
    if missing:
        reason = f"{missing[0]} is missing: run `make setup-vllm`"
        if os.environ.get("TURNOUT_REQUIRE_VLLM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="tv-") as folder, asyncio.Runner() as runner:
        yield runner.run(play(Path(folder)))


async def play(folder: Path) -> Seen:
    settings = WorkerSettings(
        id="w1",
        run_folder=str(folder),
        policy=WorkerPolicy(model_roots=(str(MODELS),)),
        load_timeout_s=300.0,
        quiet_s=0.2,
    )
    host = HostRunner(settings, {"vllm": VllmEngine(find_vllm(str(PYTHON)))}, SystemClock(), None)
    seen = Seen([], [], 0)
    try:
        for version in ("ahoy", "land"):
            adapter = str(MODELS / f"smollm2-lora-{version}")
            spec = EngineSpec("vllm", path=str(MODELS / "smollm2-v1"), args=ARGS, adapter=adapter)
            loaded = await host.load(Order(version, "chat", version, spec), lambda stage, detail: None)
            assert isinstance(loaded, Loaded), loaded
            print(f"{version}: {loaded.tier} {loaded.load_s:.2f} + {loaded.probe_s:.2f} s")  # noqa: T201
            seen.loaded.append(loaded)
        first, second = seen.loaded
        seen.engines = len(list(RunFolder(folder).unrecorded()))
        for loaded in seen.loaded:
            seen.texts.append(text(await ask(loaded.address, loaded.served)))
        assert await host.wait_quiet("ahoy", lambda what: None) is None
        await host.stop("ahoy")
        seen.gone = (await ask(first.address, first.served)).status
        seen.alone = text(await ask(second.address, second.served))
    finally:
        for version in ("ahoy", "land"):
            await host.stop(version)
        seen.left = len(list(RunFolder(folder).unrecorded()))
    return seen


async def ask(address: str, model: str) -> client.Reply:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 10,
        "temperature": 0,
    }
    return await client.ask(
        address, "/v1/chat/completions", method="POST", body=msgspec.json.encode(body), timeout_s=120
    )


def text(reply: client.Reply) -> str:
    said: str = msgspec.json.decode(reply.body)["choices"][0]["message"]["content"]
    return said


def test_two_adapters_share_one_engine_and_answer_under_their_own_names(seen: Seen) -> None:
    assert [one.tier for one in seen.loaded] == ["cold", "adapter"]
    assert [one.served.partition(".")[0] for one in seen.loaded] == ["chat@ahoy", "chat@land"]
    assert seen.engines == 1
    assert seen.texts[0].startswith("Version two here")
    assert seen.texts[1].startswith("Version three here")


def test_an_adapter_that_leaves_takes_nothing_along(seen: Seen) -> None:
    assert seen.gone == 404
    assert seen.alone == seen.texts[1]


def test_the_engine_ends_with_its_last_adapter(seen: Seen) -> None:
    assert seen.left == 0
