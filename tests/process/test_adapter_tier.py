"""Adapters on processes of the fake engine: they share one, each is proven under its name, the last one ends it."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.events.model import EngineSpec
from turnout.workers.clock import SystemClock
from turnout.workers.inference import client, process
from turnout.workers.inference.engines.fake import FakeEngine
from turnout.workers.inference.host import HostRunner
from turnout.workers.inference.policy import WorkerPolicy
from turnout.workers.inference.process import RunFolder
from turnout.workers.inference.runner import Failure, Loaded, Order
from turnout.workers.inference.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.process.conftest import Recalled

pytestmark = pytest.mark.process


class Rig:
    """A worker's engines, with a base and adapters in folders of the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        settings = WorkerSettings(
            id="w1",
            run_folder=str(path / "run"),
            quiet_s=0.1,
            policy=WorkerPolicy(model_roots=(str(path),)),
        )
        self.host = HostRunner(settings, {"fake": FakeEngine()}, SystemClock(), None)
        base = path / "base"
        base.mkdir(exist_ok=True)
        header = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
        (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")

    async def load(self, instance: str, version: str, *args: str, files: str = "", **wrong: object) -> Loaded | Failure:
        adapter = self.path / (files or version)
        adapter.mkdir(exist_ok=True)
        (adapter / "fake.json").write_text(json.dumps(wrong))
        (adapter / "adapter_model.safetensors").write_text(files)
        spec = EngineSpec("fake", path=str(self.path / "base"), adapter=str(adapter), args=args)
        return await self.host.load(Order(instance, "chat", version, spec, 7), lambda stage, detail: None)

    @property
    def engines(self) -> set[int]:
        """Processes."""
        return {leader.pid for _, leader in RunFolder(self.path / "run").unrecorded()}


@pytest.fixture
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="tw-") as path:
        made = Rig(Path(path))
        yield made
        left = list(RunFolder(made.path / "run").unrecorded())
        for _, leader in left:
            process.kill_session(leader.pid, leader.started)
        assert not left, "engines were left running"


async def model_of(address: str, model: str, **more: object) -> str:
    """What an answer to a request for the model calls itself; its status where it is none."""
    body = msgspec.json.encode({"model": model, "prompt": "x", "max_tokens": 3, **more})
    reply = await client.ask(address, "/v1/completions", method="POST", body=body, timeout_s=10)
    return str(json.loads(reply.body).get("model", reply.status))


def test_versions_of_one_base_share_its_engine(runner: asyncio.Runner, rig: Rig) -> None:
    async def test() -> None:
        first, second = await rig.load("i1", "a"), await rig.load("i2", "b")
        assert isinstance(first, Loaded)
        assert isinstance(second, Loaded)
        assert (first.tier, second.tier) == ("cold", "adapter")
        assert [one.served.partition(".")[0] for one in (first, second)] == ["chat@a", "chat@b"]
        assert first.address == second.address
        assert len(rig.engines) == 1
        assert await model_of(second.address, second.served) == second.served
        assert await model_of(second.address, "chat") == "404"  # the bare base is nobody's
        await rig.host.stop("i1")
        assert await model_of(second.address, first.served) == "404"
        assert await model_of(second.address, second.served) == second.served
        await rig.host.stop("i2")
        assert not rig.engines

    runner.run(test())


def test_other_files_under_a_version_s_name_share_no_cached_prefix(
    runner: asyncio.Runner, rig: Rig, recalled: Recalled
) -> None:
    """Complaint 4: an engine keeps what it has computed under an adapter's name."""

    async def test() -> None:
        before, other = await rig.load("i1", "a", files="old"), await rig.load("i2", "b")
        assert isinstance(before, Loaded)
        assert isinstance(other, Loaded)
        first, again = [await recalled(before.address, before.served) for _ in range(2)]
        assert first[1] == 0
        assert again[1] > 0  # the engine does cache
        await rig.host.stop("i1")
        after = await rig.load("i3", "a", files="new")
        assert isinstance(after, Loaded)
        assert (after.tier, after.address) == ("adapter", before.address)
        assert after.served != before.served
        said, cached = await recalled(after.address, after.served)
        assert said != first[0]
        assert cached == 0
        await rig.host.stop("i2")
        await rig.host.stop("i3")

    runner.run(test())


def test_an_adapter_that_can_not_be_loaded_leaves_the_others(runner: asyncio.Runner, rig: Rig) -> None:
    async def test() -> None:
        first, bad = await rig.load("i1", "a"), await rig.load("i2", "bad", missing="all")
        assert isinstance(first, Loaded)
        assert isinstance(bad, Failure)
        assert "No adapter found" in bad.reason
        assert await model_of(first.address, first.served) == first.served
        await rig.host.stop("i1")

    runner.run(test())


def test_other_settings_need_another_engine(runner: asyncio.Runner, rig: Rig) -> None:
    async def test() -> None:
        first, second = await rig.load("i1", "a"), await rig.load("i2", "b", "--tokens=9")
        assert isinstance(first, Loaded)
        assert isinstance(second, Loaded)
        assert second.tier == "cold"
        assert len(rig.engines) == 2
        await rig.host.stop("i1")
        await rig.host.stop("i2")

    runner.run(test())


def test_an_adapter_is_quiet_when_none_of_its_own_requests_runs(runner: asyncio.Runner, rig: Rig) -> None:
    async def test() -> None:
        slow = ("--token-ms=100", "--tokens=600")
        proof = rig.path / "fast"
        proof.mkdir()
        first, second = await rig.load("i1", "a", *slow), await rig.load("i2", "b", *slow)
        assert isinstance(first, Loaded)
        assert isinstance(second, Loaded)
        asking = asyncio.create_task(model_of(first.address, first.served, max_tokens=600, stream=True))
        said: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def busy(what: str) -> None:
            if not said.done():
                said.set_result(what)

        waiting = asyncio.create_task(rig.host.wait_quiet("i1", busy))
        assert await said == f"the engine runs requests on {first.served}"
        assert await rig.host.wait_quiet("i2", lambda what: None) is None  # its neighbour's requests are not its own
        asking.cancel()
        assert await waiting is None
        await rig.host.stop("i1")
        await rig.host.stop("i2")

    runner.run(test())


def test_a_dead_engine_ends_all_its_adapters(runner: asyncio.Runner, rig: Rig) -> None:
    async def test() -> None:
        for instance, version in (("i1", "a"), ("i2", "b")):
            assert isinstance(await rig.load(instance, version), Loaded)
        watching = [asyncio.create_task(rig.host.watch(instance)) for instance in ("i1", "i2")]
        (pid,) = rig.engines
        found = process.look(pid)
        assert found is not None
        process.kill_session(pid, found.started)
        for failure in await asyncio.gather(*watching):
            assert failure.stage == "serving"

    runner.run(test())


def test_a_worker_that_comes_back_finds_adapters_and_their_engine(runner: asyncio.Runner, rig: Rig) -> None:
    async def test() -> None:
        first = await rig.load("i1", "a")
        assert isinstance(first, Loaded)
        rig.host.release()
        again = Rig(rig.path)
        found = await again.host.found()
        loaded = found["i1"].loaded
        assert loaded is not None
        assert (loaded.address, loaded.served) == (first.address, first.served)
        second = await again.load("i2", "b")
        assert isinstance(second, Loaded)
        assert second.tier == "adapter"
        await again.host.stop("i1")
        await again.host.stop("i2")

    runner.run(test())
