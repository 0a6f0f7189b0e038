"""The broker dies, stays away, fills up; under streaming load."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import Cluster, Stage, alone, on_stage

from turnout.core.handling import StartSwitch
from turnout.events.instance import InstanceLoading
from turnout.events.store import Unavailable
from turnout.events.switch import BakeStarted, DrainStarted, StepStarted

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, check=False)
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
        # when the store's disk is full
        ballast = small_disk / "ballast"
        with ballast.open("wb") as f, contextlib.suppress(OSError):
            while True:
                f.write(b"x" * 65536)
                f.flush()
        await c.until(lambda: _full(c), "commands are answered with store_full")
        # then service goes on
        await c.answered(load, 30)
        # and when there is room again, so does change
        ballast.unlink()
        await c.until(lambda: _switchable(c, "v2"), "commands are accepted again")
        await c.until(lambda: c.world.models["chat"].active == "v2", "the switch has completed")
        await c.answered(load)
        history = await c.history()
        assert not history.failed(), history.failed()[:5]
        history.sound()

    alone(lambda: Cluster(nats_folder=small_disk / "nats"), story)


async def _full(c: Cluster) -> bool:
    code, out, _ = await c.command("register", "chat", f"x{len(c.seen)}", "--engine", "fake", "--json")
    return code == 1 and '"store_full"' in out


async def _switchable(c: Cluster, version: str) -> bool:
    code, _, _ = await c.command("switch", "chat", version, "--json")
    return code == 0
