"""Real vLLM under the worker: proven, told apart, failing loudly, gone when stopped. One engine at a time."""

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
from turnout.workers.inference import client, process
from turnout.workers.inference.engines.vllm import VllmEngine, find_vllm
from turnout.workers.inference.host import HostRunner
from turnout.workers.inference.policy import WorkerPolicy
from turnout.workers.inference.process import RunFolder
from turnout.workers.inference.runner import Failure, Loaded, Order
from turnout.workers.inference.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
MODELS = ROOT / ".models"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ARGS = ("--max-model-len", "512")


class Seen(msgspec.Struct):
    """What one pass over the fixtures has shown."""

    stages: list[str]
    loaded: dict[str, Loaded]
    answers: dict[str, client.Reply]
    models: list[str]
    left: dict[str, int]
    truncated: Loaded | Failure
    files: list[str]


class _Choice(msgspec.Struct):
    message: dict[str, object]


class _Answer(msgspec.Struct):
    model: str
    system_fingerprint: str
    choices: list[_Choice]


def answer(seen: Seen, version: str) -> _Answer:
    return msgspec.json.decode(seen.answers[version].body, type=_Answer)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """Load v1, then v2, then truncated weights, and keep what was seen."""
    missing = [str(p) for p in (PYTHON, MODELS / "smollm2-v1", MODELS / "smollm2-v2") if not p.exists()]
    if missing:
        reason = f"{missing[0]} is missing: run `make setup-vllm`"
        if os.environ.get("TURNOUT_REQUIRE_VLLM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="tv-") as folder, asyncio.Runner() as runner:
        yield runner.run(look(Path(folder)))


async def look(folder: Path) -> Seen:
    settings = WorkerSettings(
        id="w1", run_folder=str(folder), policy=WorkerPolicy(model_roots=(str(MODELS),)), load_timeout_s=240.0
    )
    host = HostRunner(settings, {"vllm": VllmEngine(find_vllm(str(PYTHON)))}, SystemClock(), None)
    seen = Seen([], {}, {}, [], {}, Failure("", ""), [])

    def progress(stage: str, detail: str) -> None:
        if not seen.stages or seen.stages[-1] != stage:
            seen.stages.append(stage)

    for version in ("v1", "v2"):
        spec = EngineSpec("vllm", path=str(MODELS / f"smollm2-{version}"), args=ARGS)
        loaded = await host.load(Order(version, "chat", version, spec), progress)
        assert isinstance(loaded, Loaded), loaded
        pid = next(r.pid for r in RunFolder(folder).records())
        try:
            seen.loaded[version] = loaded
            seen.answers[version] = await ask(loaded.address)
            models = await client.ask(loaded.address, "/v1/models", timeout_s=30)
            seen.models += [m["id"] for m in msgspec.json.decode(models.body)["data"]]
            assert await host.wait_quiet(version, lambda _: None) is None
        finally:
            await host.stop(version)
        seen.left[version] = len(process.members(pid))
    spec = EngineSpec("vllm", path=str(MODELS / "smollm2-truncated"), args=ARGS)
    seen.truncated = await host.load(Order("v3", "chat", "v3", spec), progress)
    await host.stop("v3")
    seen.files = sorted(os.listdir(folder))
    return seen


async def ask(address: str) -> client.Reply:
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 12,
        "temperature": 0,
    }
    encoded = msgspec.json.encode(body)
    return await client.ask(address, "/v1/chat/completions", method="POST", body=encoded, timeout_s=120)


def test_a_real_engine_goes_through_all_stages(seen: Seen) -> None:
    assert seen.stages[:4] == ["starting", "loading", "warming", "proving"]


def test_a_real_engine_is_proven_by_an_answer_that_names_the_version(seen: Seen) -> None:
    for version in ("v1", "v2"):
        assert seen.loaded[version].fingerprint == version
        assert answer(seen, version).system_fingerprint == version
        assert answer(seen, version).model == "chat"
    assert seen.models == ["chat", "chat@v1", "chat", "chat@v2"]


def test_two_versions_answer_differently(seen: Seen) -> None:
    first, second = (answer(seen, v).choices[0].message["content"] for v in ("v1", "v2"))
    assert first
    assert second
    assert first != second


def test_the_memory_of_all_its_processes_is_counted(seen: Seen) -> None:
    assert seen.loaded["v1"].bytes > 500 << 20


def test_truncated_weights_fail_with_the_stage_and_the_engines_own_cause(seen: Seen) -> None:
    failure = seen.truncated
    assert isinstance(failure, Failure)
    assert failure.stage == "loading"
    assert "incomplete metadata, file not fully covered" in failure.reason
    assert "SafetensorError" in failure.log_tail[0]
    assert failure.exit_code == 1


def test_nothing_of_a_stopped_engine_is_left(seen: Seen) -> None:
    assert seen.left == {"v1": 0, "v2": 0}
    # logs, for whoever looks for a cause, and what each version said when it was proven first
    assert seen.files == ["golden", "v1.log", "v2.log", "v3.log"]
