"""The broker dies, stays away, fills up; under streaming load."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import Cluster, Stage, alone, on_stage

from turnout.core.handling import StartSwitch
from turnout.core.model import RegisterVersion
from turnout.events.instance import InstanceLoading
from turnout.events.model import EngineSpec
from turnout.events.store import Unavailable
from turnout.events.switch import BakeStarted, DrainStarted, StepStarted
from turnout.workers.client import CommandRejected
from turnout.workers.embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.process.system.traffic import Traffic

pytestmark = [pytest.mark.process, pytest.mark.nats]

ARGS = ("--token-ms=10", "--tokens=400")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(controllers=2, gateways=2))
    one.run(one.cluster.serving("v1", "v2", args=ARGS))
    yield one
    one.close()


@pytest.mark.parametrize("at", ["loading", "stepping", "baking", "draining"])
def test_invariant_8_service_and_switch_survive_kill_9_of_the_broker(stage: Stage, at: str) -> None:
    stage.run(_killed_at(stage.cluster, at))


async def _killed_at(c: Cluster, at: str) -> None:
    load = c.load(15)
    await c.answered(load)
    target = "v2" if c.world.models["chat"].active == "v1" else "v1"
    before = len(c.seen)
    match at:
        case "loading":
            target = "cold"
            await c.register(target, "--load-seconds=1", *ARGS)
            operation = await c.switch(target)
            await c.event(InstanceLoading, before)
        case "stepping":
            operation = await c.switch(target)
            await c.event(StepStarted, before)
        case "baking":
            operation = await c.switch(target, bake_s=2.0)
            await c.event(BakeStarted, before)
        case _:
            load.send_now(4, tokens=300)
            operation = await c.switch(target)
            await c.event(DrainStarted, before)
    # when the broker dies in the middle of a switch and comes back
    c.nats.kill()
    await c.answered(load, 15)
    await c.nats.start()
    # then the switch completes, no client has noticed, nothing is lost and nothing there twice
    view = await c.ended(operation)
    assert view.phase == "completed", view
    await c.answered(load)
    await c.until(c.all_live, "all are live")
    (await c.history()).clean()
    await c.views_are_the_fold()


@on_stage
async def test_requests_go_on_while_the_broker_is_away_and_gateways_say_so(c: Cluster) -> None:
    # complaint 9: no request waits for the broker
    load = c.load(20)
    await c.answered(load)
    assert await c.control_plane("g1") == "connected"
    before = len(c.seen)
    c.nats.kill()
    await c.answered(load, 100)
    for gateway in ("g1", "g2"):
        assert await c.control_plane(gateway) != "connected"
    with pytest.raises(Unavailable):
        await c.client.send("switch.start", _start("v2"), deadline_s=1.0)
    await c.nats.start()
    # and when it is back, all find each other, and a switch works
    for gateway in ("g1", "g2"):
        await c.until(lambda g=gateway: _connected(c, g), f"{gateway} is connected")  # type: ignore[misc]
    await c.until(c.all_live, "all are live")
    target = "v2" if c.world.models["chat"].active == "v1" else "v1"
    assert (await c.switched(target)).phase == "completed"
    await c.answered(load)
    (await c.history()).clean()
    assert len(c.seen) > before
    await c.views_are_the_fold()


def _start(version: str) -> StartSwitch:
    return StartSwitch("chat", version)


async def _connected(c: Cluster, gateway: str) -> bool:
    return await c.control_plane(gateway) == "connected"


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of a few MiB, where this user may make one."""
    folder = Path(tempfile.mkdtemp(prefix="to-disk-"))
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        folder.rmdir()
        pytest.skip("this user may not mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def test_a_full_disk_stops_change_and_not_service(small_disk: Path) -> None:
    async def story(c: Cluster) -> None:
        await c.serving("v1", "v2", args=ARGS)
        load = c.load(15)
        await c.answered(load)
        keeping = asyncio.create_task(c.nats.supervise())
        # when the store's disk is full
        ballast = small_disk / "ballast"
        with ballast.open("wb") as f, contextlib.suppress(OSError):
            while True:
                f.write(b"x" * 65536)
                f.flush()
        await c.until(lambda: _answered_with(c, "store_unavailable"), "a command hears of it")
        await c.until(lambda: c.nats.trouble, "the full disk is noticed")
        # then service goes on
        await c.answered(load, 30)
        # and when there is room again, so does change
        ballast.unlink()
        await _changes_again(c, load)
        keeping.cancel()

    alone(lambda: Cluster(nats_folder=small_disk / "nats"), story)


def test_a_store_at_its_limit_stops_change_and_not_service() -> None:
    async def story(c: Cluster) -> None:
        await c.serving("v1", "v2", args=ARGS)
        load = c.load(15)
        await c.answered(load)
        # when the store may not grow any more
        await _restarted_with(c, 1)
        await c.until(lambda: _answered_with(c, "store_full"), "commands are answered with store_full")
        # then service goes on
        await c.answered(load, 30)
        # and when it may, so does change
        await _restarted_with(c, 0)
        await _changes_again(c, load)

    alone(Cluster, story)


async def _restarted_with(c: Cluster, most_bytes: int) -> None:
    port = int(c.nats_url.rpartition(":")[2])
    c.nats.stop()
    c.nats = EmbeddedServer(c.nats.folder, c.clock, port, max_store_bytes=most_bytes)
    await c.nats.start()


async def _answered_with(c: Cluster, code: str) -> bool:
    # large enough for the pages that the store's files have already
    version = RegisterVersion("chat", f"x{len(c.seen)}", EngineSpec("fake"), note="n" * 4096)
    try:
        await c.client.send("version.register", version, deadline_s=2.0)
    except Unavailable as e:
        return e.code == code
    return False


async def _changes_again(c: Cluster, load: Traffic) -> None:
    async def accepted() -> bool:
        with contextlib.suppress(Unavailable, CommandRejected):
            await c.switch("v2")
        return bool(c.world.models["chat"].switch) or c.world.models["chat"].active == "v2"

    await c.until(accepted, "a switch is accepted again")
    await c.until(lambda: c.world.models["chat"].active == "v2", "it has completed")
    await c.answered(load)
    (await c.history()).clean()
    await c.views_are_the_fold()
