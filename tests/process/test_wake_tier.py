"""The wake tier on processes of the fake engine: asleep, woken, proven; what lost its mind in the sleep is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.events.model import EngineSpec
from turnout.workers.clock import SystemClock
from turnout.workers.inference import client, process
from turnout.workers.inference.engines.base import SLEEP_FLAG
from turnout.workers.inference.engines.fake import FakeEngine
from turnout.workers.inference.host import HostRunner
from turnout.workers.inference.policy import WorkerPolicy
from turnout.workers.inference.process import RunFolder
from turnout.workers.inference.runner import Failure, Loaded, Order, Slept
from turnout.workers.inference.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.process


class Rig:
    """One engine that can sleep, with weights in a folder of the test; ``wrong`` with them: see fake_hand.py."""

    def __init__(self, path: Path, *args: str, spares: int = 0, wrong: dict[str, object] | None = None) -> None:
        self.folder = path / "run"
        weights = path / "models" / "v1"
        weights.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
        (weights / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
        (weights / "fake.json").write_text(json.dumps(wrong or {}))
        settings = WorkerSettings(
            id="w1",
            run_folder=str(self.folder),
            quiet_s=0.1,
            spares=spares,
            policy=WorkerPolicy(model_roots=(str(path / "models"),)),
        )
        self.host = HostRunner(settings, {"fake": FakeEngine()}, SystemClock(), None)
        self.order = Order("i1", "chat", "v1", EngineSpec("fake", path=str(weights), args=(SLEEP_FLAG, *args)), 7)

    async def load(self) -> Loaded:
        loaded = await self.host.load(self.order, lambda stage, detail: None)
        assert isinstance(loaded, Loaded), loaded
        return loaded

    async def sleep(self, level: int) -> Slept:
        assert await self.host.wait_quiet("i1", lambda _: None) is None
        slept = await self.host.sleep(msgspec.structs.replace(self.order, slept=1), level)
        assert isinstance(slept, Slept), slept
        return slept

    def pid(self) -> int:
        (pid,) = (r.pid for r in RunFolder(self.folder).records() if r.instance == "i1")
        return pid


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tw-") as path:
        yield Path(path)
        left = list(RunFolder(Path(path) / "run").unrecorded())
        for _, leader in left:
            process.kill_session(leader.pid, leader.started)
        assert not left, "engines were left running"


async def answer(address: str) -> str:
    body = msgspec.json.encode({"model": "chat", "prompt": "x", "max_tokens": 3})
    said = json.loads((await client.ask(address, "/v1/completions", method="POST", body=body, timeout_s=10)).body)
    return str(said["choices"][0]["text"])


@pytest.mark.parametrize("level", [1, 2])
def test_what_sleeps_is_woken_at_a_new_address_and_says_the_same(
    runner: asyncio.Runner, path: Path, level: int
) -> None:
    async def test() -> None:
        rig = Rig(path)
        loaded = await rig.load()
        pid = rig.pid()
        slept = await rig.sleep(level)
        with pytest.raises(client.Unreachable):  # who routes by an old revision finds nobody
            await answer(loaded.address)
        woken = await rig.host.wake(rig.order)
        assert isinstance(woken, Loaded), woken
        assert loaded.sleeps
        assert slept.bytes > 0
        assert (woken.tier, rig.pid()) == ("wake", pid)
        assert woken.address != loaded.address
        assert await answer(woken.address) == "v1 says:"
        await rig.host.stop("i1")
        await rig.host.end_spares()

    runner.run(test())


@pytest.mark.parametrize(
    ("wrong", "args", "says"),
    [
        ({"unread": True}, (), "repeats one piece"),
        ({"stale": True}, (), "does not say what it said before"),
        ({"missing": "o_proj.weight"}, (), "were not loaded"),
        ({}, ("--wake-fails",), "out of memory"),
    ],
)
def test_what_does_not_wake_as_it_was_is_killed_and_the_version_loads_cold(
    runner: asyncio.Runner, path: Path, wrong: dict[str, object], args: tuple[str, ...], says: str
) -> None:
    async def test() -> None:
        rig = Rig(path, *args, wrong=wrong)
        await rig.load()
        pid = rig.pid()
        await rig.sleep(2)
        failure = await rig.host.wake(rig.order)
        assert isinstance(failure, Failure)
        assert failure.stage == "waking"
        assert says in failure.reason
        assert not process.members(pid)
        again = await rig.load()
        assert again.tier == "cold"
        assert await answer(again.address) == "v1 says:"
        await rig.host.stop("i1")
        await rig.host.end_spares()

    runner.run(test())


def test_an_engine_that_sleeps_is_never_kept_as_a_spare_and_ends_when_asked(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=2)
        await rig.load()
        pid = rig.pid()
        await rig.sleep(1)
        assert await rig.host.wait_quiet("i1", lambda _: None) is None
        await rig.host.stop("i1")
        assert not process.members(pid)
        await rig.host.end_spares()

    runner.run(test())


@pytest.mark.parametrize("level", [1, 2])
def test_a_worker_that_comes_back_adopts_what_slept_and_wakes_it(
    runner: asyncio.Runner, path: Path, level: int
) -> None:
    async def test() -> None:
        rig = Rig(path)
        loaded = await rig.load()
        pid = rig.pid()
        await rig.sleep(level)
        rig.host.release()
        again = Rig(path)
        (found,) = (await again.host.found()).values()
        assert found.loaded is None, "it is not proven while it sleeps"
        assert found.slept is not None
        assert (found.slept.level, found.slept.number) == (level, 1)
        assert found.slept.bytes > 0
        woken = await again.host.wake(rig.order)
        assert isinstance(woken, Loaded), woken
        assert (woken.tier, woken.slept, again.pid()) == ("wake", 1, pid)
        assert woken.address != loaded.address
        assert await answer(woken.address) == "v1 says:"
        again.host.release()
        third = Rig(path)
        (awake,) = (await third.host.found()).values()
        assert awake.loaded is not None
        assert (awake.slept, awake.loaded.tier, awake.loaded.address) == (None, "wake", woken.address)
        await third.host.stop("i1")
        await third.host.end_spares()

    runner.run(test())


def test_an_engine_whose_worker_died_while_it_woke_is_killed_and_never_woken_again(
    runner: asyncio.Runner, path: Path
) -> None:
    async def test() -> None:
        rig = Rig(path)
        await rig.load()
        pid = rig.pid()
        await rig.sleep(1)
        os.kill(pid, signal.SIGSTOP)  # it answers nothing, so the wake is under way
        waking = asyncio.ensure_future(rig.host.wake(rig.order))
        folder = RunFolder(rig.folder)
        while [r.role for r in folder.records()] != ["filling"]:  # noqa: ASYNC110  a file tells no event
            await asyncio.sleep(0.01)
        waking.cancel()
        await asyncio.gather(waking, return_exceptions=True)
        rig.host.release()
        again = Rig(path)
        assert await again.host.found() == {}
        assert not process.members(pid)

    runner.run(test())
