"""The spare tier on processes of the fake engine: filled, proven, renamed; and never asked again after an error."""

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
from turnout.workers.inference import client, control, process, quiet
from turnout.workers.inference.engines.fake import FakeEngine
from turnout.workers.inference.host import HostRunner
from turnout.workers.inference.policy import WorkerPolicy
from turnout.workers.inference.process import Record, RunFolder
from turnout.workers.inference.runner import Failure, Loaded, Order
from turnout.workers.inference.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.process.conftest import Recalled

    from turnout.events.worker import KeptEngine

pytestmark = pytest.mark.process


class Rig:
    """A worker's engines, with weights in a folder of the test."""

    def __init__(self, path: Path, spares: int) -> None:
        self.folder = path / "run"
        self.models = path / "models"
        settings = WorkerSettings(
            id="w1",
            run_folder=str(self.folder),
            quiet_s=0.1,
            spares=spares,
            policy=WorkerPolicy(model_roots=(str(self.models),)),
        )
        self.host = HostRunner(settings, {"fake": FakeEngine()}, SystemClock(), None)
        self.said: list[tuple[str, str]] = []

    def order(self, instance: str, version: str, *args: str, **wrong: object) -> Order:
        """An order for weights of their own."""
        weights = self.models / version
        weights.mkdir(parents=True, exist_ok=True)
        if not (weights / "model.safetensors").exists():
            header = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
            (weights / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
        (weights / "fake.json").write_text(json.dumps(wrong))
        return Order(instance, "chat", version, EngineSpec("fake", path=str(weights), args=args), 7)

    async def load(self, order: Order) -> Loaded:
        loaded = await self.host.load(order, lambda stage, detail: self.said.append((stage, detail)))
        assert isinstance(loaded, Loaded), loaded
        return loaded

    async def evict(self, instance: str) -> None:
        """As the log asks for it: quiet, then stopped."""
        assert await self.host.wait_quiet(instance, lambda _: None) is None
        await self.host.stop(instance)

    @property
    def records(self) -> list[Record]:
        return list(RunFolder(self.folder).records())


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tw-") as path:
        yield Path(path)
        left = list(RunFolder(Path(path) / "run").unrecorded())
        for _, leader in left:
            process.kill_session(leader.pid, leader.started)
        assert not left, "engines were left running"


@pytest.fixture
def evicted_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory is free for a start ahead: only an evicted engine can be the spare, however fast the machine is."""
    monkeypatch.setattr("turnout.workers.inference.tiers.spare._free_bytes", lambda: 0)


async def answer(address: str) -> tuple[str, str]:
    """What the engine says, and what it calls itself."""
    body = msgspec.json.encode({"model": "chat", "prompt": "x", "max_tokens": 3})
    said = json.loads((await client.ask(address, "/v1/completions", method="POST", body=body, timeout_s=10)).body)
    return said["choices"][0]["text"], said["system_fingerprint"]


@pytest.mark.usefixtures("evicted_only")
def test_an_evicted_engine_serves_the_next_version_of_its_shape(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=1)
        first = await rig.load(rig.order("i1", "v1"))
        (record,) = (r for r in rig.records if r.instance == "i1")
        await rig.evict("i1")
        second = await rig.load(rig.order("i2", "v2"))
        assert (first.tier, second.tier) == ("cold", "spare")
        assert await answer(second.address) == ("v2 says:", "v2")
        (filled,) = (r for r in rig.records if r.instance == "i2")
        assert (filled.pid, filled.source, filled.role, filled.proven) == (record.pid, "chat v2", "", True)
        with pytest.raises(client.Unreachable):  # no route of before leads to it
            await answer(first.address)
        await rig.host.stop("i2")
        await rig.host.end_spares()

    runner.run(test())


def test_one_is_started_ahead_without_weights_and_filled(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=1)
        await rig.load(rig.order("i1", "v1"))
        loaded = await rig.load(rig.order("i2", "v2"))  # waits for the start ahead
        assert loaded.tier == "spare"
        assert await answer(loaded.address) == ("v2 says:", "v2")
        for instance in ("i1", "i2"):
            await rig.host.stop(instance)
        await rig.host.end_spares()

    runner.run(test())


class Strict:
    """A keeper that allows no engine more, and looks at what is said to be kept while it is asked."""

    def __init__(self, host: HostRunner) -> None:
        self.host = host
        self.asked: list[str] = []
        self.kept_then: list[tuple[KeptEngine, ...]] = []
        self.done = asyncio.Event()

    def changed(self) -> None:
        """It is over: what was asked for is not started."""
        if self.asked:
            self.done.set()

    async def told(self) -> None:
        """Nobody else must know."""

    async def may_start(self, engine: KeptEngine) -> str:
        """No."""
        self.asked.append(engine.name)
        self.kept_then.append(self.host.kept)
        return "no room"


def test_a_spare_that_is_only_asked_for_is_not_among_those_that_are_kept(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=1)
        keeper = Strict(rig.host)
        rig.host.on_kept(keeper)
        await rig.load(rig.order("i1", "v1"))
        await keeper.done.wait()
        assert len(keeper.asked) == 1
        assert keeper.kept_then == [()], "who is told of it would count it without having allowed it"
        assert rig.host.kept == ()
        await rig.host.stop("i1")
        await rig.host.end_spares()

    runner.run(test())


@pytest.mark.usefixtures("evicted_only")
def test_other_settings_need_another_engine(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=1)
        await rig.load(rig.order("i1", "v1"))
        await rig.evict("i1")
        assert (await rig.load(rig.order("i2", "v2", "--tokens=9"))).tier == "cold"
        (rig.models / "v3").mkdir()
        (rig.models / "v3" / "tokenizer.json").write_text("{}")
        assert (await rig.load(rig.order("i3", "v3"))).tier == "cold"
        for instance in ("i2", "i3"):
            await rig.host.stop(instance)
        await rig.host.end_spares()

    runner.run(test())


@pytest.mark.usefixtures("evicted_only")
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"missing": "o_proj.weight"}, "were not loaded"),
        ({"broken": True}, "dimension size"),
        ({"nan": True}, "not finite"),
    ],
)
def test_a_spare_that_fails_is_killed_and_the_version_starts_cold(
    runner: asyncio.Runner, path: Path, wrong: dict[str, object], says: str
) -> None:
    async def test() -> None:
        rig = Rig(path, spares=1)
        await rig.load(rig.order("i1", "v1"))
        (pid,) = {r.pid for r in rig.records if r.instance == "i1"}
        await rig.evict("i1")
        loaded = await rig.load(rig.order("i2", "v2", **wrong))
        assert loaded.tier == "cold"
        (struck,) = loaded.struck
        assert (struck.tier, struck.source) == ("spare", "chat v1")
        assert says in struck.reason
        assert not process.members(pid)
        await rig.host.stop("i2")
        await rig.host.end_spares()

    runner.run(test())


@pytest.mark.usefixtures("evicted_only")
def test_a_filled_engine_answers_as_a_cold_one_and_takes_nothing_from_prefixes_of_before(
    runner: asyncio.Runner, path: Path, recalled: Recalled
) -> None:
    """Complaint 3: prefixes that were cached with the weights before."""

    async def test() -> None:
        rig = Rig(path, spares=1)
        cold = await rig.load(rig.order("i1", "v2"))
        meant, _ = await recalled(cold.address, "chat")
        await rig.host.stop("i1")
        await rig.host.end_spares()
        rig = Rig(path, spares=1)
        before = await rig.load(rig.order("i2", "v1"))
        first, again = [await recalled(before.address, "chat") for _ in range(2)]
        assert (first[1], first[0] != meant) == (0, True)
        assert again[1] > 0  # the engine does cache
        await rig.evict("i2")
        filled = await rig.load(rig.order("i3", "v2"))
        assert filled.tier == "spare"
        assert await recalled(filled.address, "chat") == (meant, 0)
        await rig.host.stop("i3")
        await rig.host.end_spares()

    runner.run(test())


@pytest.mark.usefixtures("evicted_only")
def test_an_engine_that_keeps_its_prefixes_is_killed_and_the_version_starts_cold(
    runner: asyncio.Runner, path: Path
) -> None:
    async def test() -> None:
        rig = Rig(path, spares=1)
        await rig.load(rig.order("i1", "v1", "--keeps-prefixes"))
        (pid,) = {r.pid for r in rig.records if r.instance == "i1"}
        await rig.evict("i1")
        loaded = await rig.load(rig.order("i2", "v2", "--keeps-prefixes"))
        assert loaded.tier == "cold"
        (struck,) = loaded.struck
        assert "cached with the weights before" in struck.reason
        assert not process.members(pid)
        await rig.host.stop("i2")
        await rig.host.end_spares()

    runner.run(test())


@pytest.mark.usefixtures("evicted_only")
def test_a_tier_that_failed_for_a_pair_is_not_tried_again_for_it(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=1)
        struck: tuple[tuple[str, str], ...] = ()
        for instance in ("i1", "i3"):
            await rig.load(rig.order(instance, "v1"))
            await rig.evict(instance)
            order = rig.order("i2", "v2", missing="o_proj.weight")
            loaded = await rig.load(msgspec.structs.replace(order, struck=struck))
            assert loaded.tier == "cold"
            assert len(loaded.struck) == (1 if instance == "i1" else 0)
            struck = struck or tuple((one.tier, one.source) for one in loaded.struck)  # the log tells it from now on
            await rig.host.stop("i2")
        await rig.host.end_spares()

    runner.run(test())


def test_a_stale_output_head_is_found(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=0)
        loaded = await rig.load(rig.order("i1", "v1"))
        new = rig.order("i2", "v2").engine.path
        await control.fill(loaded.address, new, 10, repack=False)
        with pytest.raises(control.ControlFailed, match="stale"):
            await control.compare(loaded.address, new, 10)
        await control.fill(loaded.address, new, 10)
        await control.compare(loaded.address, new, 10)
        await rig.host.stop("i1")

    runner.run(test())


def test_a_version_that_says_other_things_than_before_is_not_ready(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=0)
        await rig.load(rig.order("i1", "v1"))
        await rig.host.stop("i1")
        kept = RunFolder(rig.folder).golden("chat", "v1")
        golden = json.loads(kept.read_bytes())
        golden["answers"] = [{token: value - 0.5 for token, value in one.items()} for one in golden["answers"]]
        kept.write_text(json.dumps(golden))
        failure = await rig.host.load(rig.order("i2", "v1"), lambda stage, detail: None)
        assert isinstance(failure, Failure)
        assert failure.stage == "proving"
        assert "does not say what it said before" in failure.reason

    runner.run(test())


@pytest.mark.usefixtures("evicted_only")
def test_a_worker_that_comes_back_finds_its_spares(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=1)
        await rig.load(rig.order("i1", "v1"))
        await rig.evict("i1")
        rig.host.release()
        again = Rig(path, spares=1)
        assert await again.host.found() == {}
        loaded = await again.load(again.order("i2", "v2"))
        assert loaded.tier == "spare"
        assert quiet.connections(loaded.address) == 0
        await again.host.stop("i2")
        await again.host.end_spares()

    runner.run(test())


def test_an_engine_that_was_being_filled_when_its_worker_died_is_killed(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=0)
        await rig.load(rig.order("i1", "v1"))
        (record,) = rig.records
        RunFolder(rig.folder).write(msgspec.structs.replace(record, role="filling", proven=False))
        rig.host.release()
        again = Rig(path, spares=0)
        assert await again.host.found() == {}
        assert not process.members(record.pid)

    runner.run(test())


@pytest.mark.usefixtures("evicted_only")
def test_a_gateway_that_still_holds_a_connection_to_a_filled_engine_is_seen(runner: asyncio.Runner, path: Path) -> None:
    async def test() -> None:
        rig = Rig(path, spares=1)
        await rig.load(rig.order("i1", "v1"))
        await rig.evict("i1")
        loaded = await rig.load(rig.order("i2", "v2"))
        _, writer = await asyncio.open_unix_connection(loaded.address.removeprefix("unix:"))
        said: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def busy(what: str) -> None:
            if not said.done():
                said.set_result(what)

        waiting = asyncio.create_task(rig.host.wait_quiet("i2", busy))
        assert await said == "1 connections are open"
        writer.close()
        assert await waiting is None
        await rig.host.stop("i2")
        await rig.host.end_spares()

    runner.run(test())
