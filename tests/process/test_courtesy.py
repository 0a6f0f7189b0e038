"""A real process that loads stands behind the others, and gets its full share when it is proven."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.events.model import EngineSpec
from turnout.workers.clock import SystemClock
from turnout.workers.inference import courtesy
from turnout.workers.inference.engines.fake import FakeEngine
from turnout.workers.inference.host import HostRunner
from turnout.workers.inference.process import RunFolder
from turnout.workers.inference.runner import Loaded, Order
from turnout.workers.inference.settings import WorkerSettings

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="priorities can be raised again by root alone"),
]

#: Whether the kernel groups processes by session.
GROUPED = Path("/proc/self/autogroup").exists()


class Seen(msgspec.Struct, frozen=True):
    """``group``: nice value of its session where the kernel groups by sessions; None where it does not.

    A session that was started before the kernel grouped, as a container's first one may be, has none either: its
    file is empty.
    """

    nice: int
    group: int | None


def priority(pid: int) -> Seen:
    """Of a process."""
    file = Path("/proc") / str(pid) / "autogroup"
    line = file.read_text() if file.exists() else ""
    return Seen(os.getpriority(os.PRIO_PROCESS, pid), int(line.rpartition(" ")[2]) if line else None)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tw-") as path:
        yield Path(path)


def test_an_engine_that_loads_stands_behind_the_others_until_it_is_proven(runner: asyncio.Runner, folder: Path) -> None:
    async def test() -> None:
        host = HostRunner(WorkerSettings(id="w1", run_folder=str(folder)), {"fake": FakeEngine()}, SystemClock(), None)
        seen: list[Seen] = []

        def pid() -> int:
            ((_, leader),) = RunFolder(folder).unrecorded()
            return leader.pid

        def progress(stage: str, detail: str) -> None:
            if stage == "starting":
                seen.append(priority(pid()))

        try:
            loaded = await host.load(Order("i1", "chat", "v1", EngineSpec("fake"), 7), progress)
            assert isinstance(loaded, Loaded)
            seen.append(priority(pid()))
        finally:
            await host.stop("i1")
        # An engine leads a session of its own, whatever this test was started in.
        behind = Seen(courtesy.LOADING, courtesy.LOADING if GROUPED else None)
        usual = Seen(0, 0 if GROUPED else None)
        assert seen == [behind, usual]

    runner.run(test())
