"""kill -9 of workers and engines, and engines that hang, under streaming load."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import SETTINGS, Cluster, Stage, alone, on_stage

from turnout.core.handling import StopInstance
from turnout.events.instance import InstanceDraining, InstanceFailed, InstanceLoading, InstanceReady, InstanceStopped
from turnout.events.switch import BakeStarted, RollbackStarted, RolledBack
from turnout.events.worker import WorkerLost
from turnout.workers.client import CommandRejected

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.process, pytest.mark.nats]

ARGS = ("--token-ms=10", "--tokens=400")
#: Engines that are silent are given up soon.
IMPATIENT = SETTINGS.replace("health_check_interval = 5.0", "health_check_interval = 0.5").replace(
    "quiet_s = 0.2", "quiet_s = 0.2\nhang_after_s = 2.0\nprobe_timeout_s = 1.0"
)
LIMITS = """
[gateway.limits]
first_byte_s = 3.0
between_s = 3.0
total_s = 30.0
"""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(LIMITS, base=IMPATIENT))
    one.run(one.cluster.serving("v1", "v2", args=ARGS))
    yield one
    one.close()


def _versions(c: Cluster) -> tuple[str, str]:
    active = c.world.models["chat"].active
    return active, "v2" if active == "v1" else "v1"


@on_stage
async def test_engines_serve_on_and_are_adopted_when_their_worker_is_killed(c: Cluster) -> None:
    load = c.load(15)
    await c.answered(load)
    _, target = _versions(c)
    engines = c.engine_pids("v1"), c.engine_pids("v2")
    before = len(c.seen)
    # when the worker is gone for a while
    c.kill("w1")
    await c.answered(load, 20)
    await c.restart("w1")
    await c.logged("w1", "engine_adopted")
    # then the same engines go on, and can be switched between
    assert (await c.switched(target)).phase == "completed"
    assert (c.engine_pids("v1"), c.engine_pids("v2")) == engines
    await c.answered(load)
    history = await c.history()
    history.clean()
    assert not [e for e in history.engine_events(before) if not isinstance(e, InstanceReady)]


@on_stage
async def test_with_source_and_target_dead_an_older_good_version_that_is_warm_takes_over(c: Cluster) -> None:
    before = len(c.seen)
    home, source = _versions(c)  # the first becomes the older version
    assert (await c.switched(source)).phase == "completed"
    await c.register("newest", *ARGS)
    operation = await c.switch("newest", bake_s=30.0)
    await c.event(BakeStarted, before)
    # when the engines of the new version and of the one before die together
    for pid in (*c.engine_pids("newest"), *c.engine_pids(source)):
        os.kill(pid, signal.SIGKILL)
    # then the version before those two serves, and is the active one
    view = await c.ended(operation)
    assert (view.phase, view.back_to) == ("rolled_back", home), view
    assert c.world.models["chat"].active == home
    await c.answered(c.load(5))


@on_stage
async def test_a_switch_completes_when_the_worker_is_killed_in_the_middle_of_the_load(c: Cluster) -> None:
    load = c.load(15)
    await c.answered(load)
    before = len(c.seen)
    await c.register("slow", "--load-seconds=2", *ARGS)
    operation = await c.switch("slow")
    await c.event(InstanceLoading, before)
    await c.until(lambda: c.engine_pids("slow"), "the engine runs")
    engine = c.engine_pids("slow")
    # when the worker dies while the engine loads
    c.kill("w1")
    await c.restart("w1")
    # then the restarted worker goes on with the same engine
    view = await c.ended(operation)
    assert view.phase == "completed", view
    assert c.engine_pids("slow") == engine
    assert (await c.switched("v1")).phase == "completed"
    (await c.history()).clean()


@on_stage
async def test_a_target_killed_in_its_bake_is_rolled_back_with_nothing_failed_but_its_own_streams(c: Cluster) -> None:
    load = c.load(15, plain_each=0)
    await c.answered(load)
    source, target = _versions(c)
    before = len(c.seen)
    operation = await c.switch(target, bake_s=30.0)
    await c.event(BakeStarted, before)
    load.send_now(4, tokens=200)
    await c.until(lambda: _running_on(c, "g1", target, 4), f"streams run on {target}")
    # when the target's engine dies
    for pid in c.engine_pids(target):
        os.kill(pid, signal.SIGKILL)
    # then the source has everything back
    view = await c.ended(operation)
    assert view.phase == "rolled_back", view
    assert c.world.models["chat"].active == source
    await c.event(RollbackStarted, before, cause="failure")
    await c.event(RolledBack, before)
    await c.answered(load)
    # and only streams on the dead engine were hurt, each with a word
    history = await c.history()
    history.sound()
    assert not history.failed(), history.failed()[:5]
    assert len(history.cut()) >= 4
    assert {r.version for r in history.cut()} == {target}
    assert not [r for r in history.replies[-5:] if r.version != source]


async def _running_on(c: Cluster, gateway: str, version: str, count: int) -> bool:
    running = await c.requests(gateway)
    return [r["version"] == version and r["phase"] == "streaming" for r in running].count(True) >= count


@on_stage
async def test_the_active_version_is_restored_when_its_engine_dies(c: Cluster) -> None:
    load = c.load(15, plain_each=0)
    await c.answered(load)
    active, _ = _versions(c)
    before = len(c.seen)
    # when the only engine of the active version dies
    for pid in c.engine_pids(active):
        os.kill(pid, signal.SIGKILL)
    failed = await c.event(InstanceFailed, before)
    assert failed.stage == "serving"
    await c.event(InstanceReady, before)
    await c.answered(load, 10)
    # then it is loaded again; meanwhile requests hear when to come back, and none hangs
    history = await c.history()
    history.sound()
    assert not [r for r in history.replies if r.outcome == "failed"], history.failed()[:5]
    refused = [r for r in history.replies if r.outcome == "refused"]
    assert all(r.status == 503 and r.retry_after for r in refused), refused[:5]
    assert all(r.version == active for r in history.cut())


@on_stage
async def test_a_frozen_engine_is_found_and_replaced_and_its_requests_end_with_an_error(c: Cluster) -> None:
    load = c.load(15, plain_each=0)
    await c.answered(load)
    active, _ = _versions(c)
    before = len(c.seen)
    engine = c.engine_pids(active)
    # when the active engine stands still
    for pid in engine:
        os.kill(pid, signal.SIGSTOP)
    failed = await c.event(InstanceFailed, before)
    assert "hung" in failed.reason, failed
    await c.event(InstanceReady, before)
    await c.answered(load, 10)
    # then another takes its place, and every request has had an end that says what happened
    assert not set(engine) & set(c.engine_pids(active))
    history = await c.history()
    history.sound()
    assert not [r for r in history.replies if r.outcome == "failed"], history.failed()[:5]
    assert {r.status for r in history.replies if r.outcome == "refused"} <= {503, 504}


@on_stage
async def test_an_operator_can_force_an_engine_to_stop_under_its_requests(c: Cluster) -> None:
    load = c.load(15, plain_each=0)
    await c.answered(load)
    active, _ = _versions(c)
    (instance,) = c.world.ready("chat", active)
    before, engine = len(c.seen), c.engine_pids(active)
    # given that it is refused without force, and force without a reason
    for halfway in (StopInstance(instance.instance), StopInstance(instance.instance, force=True)):
        with pytest.raises(CommandRejected):
            await c.client.send("instance.stop", halfway)
    # when an operator forces it
    forced = StopInstance(instance.instance, force=True, reason="hangs in a kernel")
    await c.client.send("instance.stop", forced)
    await c.event(InstanceStopped, before)
    await c.event(InstanceReady, before)
    await c.answered(load, 10)
    # then another takes its place, the log says who did it, and every request has had an end that says what happened
    assert not set(engine) & set(c.engine_pids(active))
    draining = await c.event(InstanceDraining, before)
    assert (draining.forced_by, draining.reason) == ("test", "hangs in a kernel")
    history = await c.history()
    history.sound()
    assert not [r for r in history.replies if r.outcome == "failed"], history.failed()[:5]


@on_stage
async def test_a_target_that_freezes_in_its_bake_is_rolled_back(c: Cluster) -> None:
    load = c.load(15, plain_each=0)
    await c.answered(load)
    source, target = _versions(c)
    before = len(c.seen)
    operation = await c.switch(target, bake_s=30.0)
    await c.event(BakeStarted, before)
    await c.until(lambda: any(r.version == target for r in load.replies), f"{target} serves")
    for pid in c.engine_pids(target):
        os.kill(pid, signal.SIGSTOP)
    view = await c.ended(operation)
    assert view.phase == "rolled_back", view
    await c.answered(load, 10)
    history = await c.history()
    history.sound()
    assert not [r for r in history.replies if r.outcome == "failed"], history.failed()[:5]
    assert not [r for r in history.replies[-5:] if r.version != source]


def test_the_models_of_a_host_that_dies_are_loaded_on_another() -> None:
    async def story(c: Cluster) -> None:
        # given two hosts, of which the first serves
        await c.serving("v1", args=ARGS)
        (home,) = {i.worker for i in c.world.instances.values()}
        load = c.load(15, plain_each=0)
        await c.answered(load)
        before = len(c.seen)
        # when it dies with all that runs on it
        engines = c.engine_pids("v1")
        c.kill(home)
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        # then the other one takes its place, and requests meanwhile hear when to come back
        await c.event(WorkerLost, before, worker=home)
        ready = await c.event(InstanceReady, before)
        assert c.world.instances[ready.instance].worker != home
        await c.answered(load, 30)
        # and when the host is back, it tells that its engine is gone
        await c.restart(home)
        gone = await c.event(InstanceFailed, before)
        assert gone.instance != ready.instance
        await c.answered(load, 30)
        history = await c.history()
        history.sound()
        assert not [r for r in history.replies if r.outcome == "failed"], history.failed()[:5]
        assert all(r.status == 503 and r.retry_after for r in history.replies if r.outcome == "refused")
        at = next(s.at for s in c.seen[before:] if s.recorded.event == gone)
        assert {r.outcome for r in history.replies if r.sent > at} == {"ok"}

    alone(lambda: Cluster(LIMITS, base=IMPATIENT, workers=2), story)
