"""Real vLLM: a version never loaded before is put into a running engine and proven; a stale output head is found.

Two engine starts in all: v1 cold, and a spare that is started ahead without weights while v1 serves.
"""

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
from turnout.workers.inference import client, control, golden
from turnout.workers.inference.engines.vllm import VllmEngine, find_vllm
from turnout.workers.inference.host import HostRunner
from turnout.workers.inference.policy import WorkerPolicy
from turnout.workers.inference.runner import Loaded, Order
from turnout.workers.inference.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
MODELS = ROOT / ".models"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ARGS = ("--max-model-len", "512", "--kv-cache-memory-bytes", "256M")
PATIENCE_S = 300.0


class Seen(msgspec.Struct):
    """What the story has shown.

    Attributes:
        stale: what a fill without packing again was found to be.
        cached: tokens of a long prompt from v1's cache of prefixes, asked for the first time and the second.
    """

    loaded: dict[str, Loaded]
    texts: dict[str, str]
    served: int
    stale: str = ""
    repaired: bool = False
    cached: tuple[int, int] = (0, 0)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """Play the story."""
    missing = [str(p) for p in (PYTHON, MODELS / "smollm2-v1", MODELS / "smollm2-v3") if not p.exists()]
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
        load_timeout_s=PATIENCE_S,
        quiet_s=0.2,
        spares=1,
    )
    host = HostRunner(settings, {"vllm": VllmEngine(find_vllm(str(PYTHON)))}, SystemClock(), None)
    seen = Seen({}, {}, 0)

    async def load(version: str) -> str:
        spec = EngineSpec("vllm", path=str(MODELS / f"smollm2-{version}"), args=ARGS)
        loaded = await host.load(Order(version, "chat", version, spec), lambda stage, detail: None)
        assert isinstance(loaded, Loaded), loaded
        seen.loaded[version] = loaded
        seen.texts[version] = await ask(loaded.address)
        return loaded.address

    try:
        first = await load("v1")
        tokens = [await golden.cached(first, "chat", PATIENCE_S) for _ in range(2)]
        seen.cached = (tokens[0], tokens[1])
        asking = asyncio.create_task(keep_asking(first, seen))
        address = await load("v3")  # waits for the engine that is started ahead
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert await host.wait_quiet("v3", lambda what: None) is None
        await host.stop("v3")
        address = await load("v2")
        # with the packing switched off, as plain vLLM does it: the head keeps v2's matrix
        await control.pause(address, PATIENCE_S)
        await control.fill(address, str(MODELS / "smollm2-v3"), PATIENCE_S, repack=False)
        try:
            await control.compare(address, str(MODELS / "smollm2-v3"), PATIENCE_S)
        except control.ControlFailed as e:
            seen.stale = str(e)
        await control.fill(address, str(MODELS / "smollm2-v3"), PATIENCE_S)
        await control.compare(address, str(MODELS / "smollm2-v3"), PATIENCE_S)
        await control.resume(address, PATIENCE_S)
        seen.repaired = True
    finally:
        await host.end_spares()
        for version in ("v1", "v2", "v3"):
            await host.stop(version)
    return seen


async def keep_asking(address: str, seen: Seen) -> None:
    while True:
        await ask(address)
        seen.served += 1


async def ask(address: str) -> str:
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 12,
        "temperature": 0,
    }
    reply = await client.ask(
        address, "/v1/chat/completions", method="POST", body=msgspec.json.encode(body), timeout_s=120
    )
    said = msgspec.json.decode(reply.body)
    return f"{said['system_fingerprint']}: {said['choices'][0]['message']['content']}"


def test_a_version_never_loaded_before_is_put_into_an_engine_started_ahead(seen: Seen) -> None:
    assert (seen.loaded["v1"].tier, seen.loaded["v3"].tier) == ("cold", "spare")
    assert seen.texts["v3"].startswith("v3: ")
    assert seen.served > 0


def test_an_evicted_engine_takes_the_next_version(seen: Seen) -> None:
    assert seen.loaded["v2"].tier == "spare"
    assert seen.texts["v2"] == "v2: Version two here. Ahoy!"
    assert seen.texts["v1"] != seen.texts["v2"]


def test_an_engine_says_what_it_takes_from_its_cache_of_prefixes(seen: Seen) -> None:
    """Else a filled engine would not be seen to have kept the prefixes of the weights before."""
    first, again = seen.cached
    assert first == 0
    assert again > 0


def test_filling_is_much_faster_than_a_start(seen: Seen) -> None:
    cold, spare = seen.loaded["v1"], seen.loaded["v2"]
    print(f"cold {cold.load_s:.1f} + {cold.probe_s:.1f} s, spare {spare.load_s:.2f} + {spare.probe_s:.2f} s")  # noqa: T201
    assert spare.load_s < cold.load_s


def test_an_output_head_that_keeps_old_weights_is_found_and_repaired(seen: Seen) -> None:
    assert "stale" in seen.stale
    assert seen.repaired
