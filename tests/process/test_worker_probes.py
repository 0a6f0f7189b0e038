"""Golden questions that a worker asks a running engine: each is told, with what was wrong."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from turnout.events.model import EngineSpec
from turnout.workers.clock import SystemClock
from turnout.workers.inference.engines.fake import FakeEngine
from turnout.workers.inference.host import HostRunner
from turnout.workers.inference.runner import Loaded, Order
from turnout.workers.inference.settings import WorkerSettings

pytestmark = pytest.mark.process

Until = Callable[[Callable[[], object]], Awaitable[None]]


def untold(stage: str, detail: str) -> None:
    """Progress that the test does not look at."""


def probed(runner: asyncio.Runner, until: Until, *args: str, count: int) -> list[tuple[int, int, str]]:
    """Number, failures in a row and reason of the first ``count`` probes of an engine with these flags."""
    told: list[tuple[int, int, str]] = []

    async def report(instance: str, number: int, row: int, seconds: float, reason: str) -> None:
        assert instance == "i-1"
        assert seconds > 0
        told.append((number, row, reason))

    async def case() -> None:
        with tempfile.TemporaryDirectory(prefix="tw-") as folder:
            base = {"id": "w1", "run_folder": folder, "probe_timeout_s": 0.2, "hang_after_s": 60.0}
            host = HostRunner(msgspec.convert(base, WorkerSettings), {"fake": FakeEngine()}, SystemClock(), 0.05)
            host.on_probed(report)
            loaded = await host.load(Order("i-1", "chat", "v1", EngineSpec("fake", args=args), 7), untold)
            assert isinstance(loaded, Loaded), loaded
            watching = asyncio.create_task(host.watch("i-1"))
            await until(lambda: len(told) >= count)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await host.stop("i-1")

    runner.run(case())
    return told[:count]


def test_good_answers_are_told_with_nothing_wrong(runner: asyncio.Runner, until: Until) -> None:
    assert probed(runner, until, count=3) == [(1, 0, ""), (2, 0, ""), (3, 0, "")]


def test_a_version_that_answers_nothing_after_its_proof_fails_in_a_row(runner: asyncio.Runner, until: Until) -> None:
    told = probed(runner, until, "--empty", "--sound-first", "3", count=4)
    assert [row for _, row, _ in told][-2:] in ([1, 2], [2, 3])
    assert told[-1][2] == "the answer is empty"


def test_a_hung_engine_fails_its_probes_though_its_port_is_open(runner: asyncio.Runner, until: Until) -> None:
    told = probed(runner, until, "--hang-after", "1", count=3)
    assert [(number, row) for number, row, _ in told] == [(1, 1), (2, 2), (3, 3)]
    assert all(reason for _, _, reason in told)
