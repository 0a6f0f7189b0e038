"""Gateways that die, and gateways that are cut off from the control plane while they serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import SETTINGS, Cluster, Stage, on_stage

from turnout.events.gateway import GatewayLost, VersionDrained
from turnout.events.instance import InstanceDraining, InstanceStopped
from turnout.events.switch import DrainStarted

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.process, pytest.mark.nats]

ARGS = ("--token-ms=10", "--tokens=400")
#: A version that has left is stopped at once.
NOTHING_WARM = SETTINGS.replace("max_cached_models = 4", "max_cached_models = 0")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(gateways=2, base=NOTHING_WARM, via=("g2",)))
    one.run(one.cluster.serving("v1", args=ARGS))
    yield one
    one.close()


@on_stage
async def test_invariant_1_requests_only_go_to_proven_instances_that_were_not_asked_to_stop(c: Cluster) -> None:
    load = c.load(20)
    await c.answered(load)
    before = len(c.seen)
    # when every switch loads a new engine and stops the old one, and some of them are never proven
    for n in range(4):
        await c.register(f"fresh{n}", *ARGS)
        await c.register(f"unsound{n}", "--loop", *ARGS)
        assert (await c.switched(f"unsound{n}")).phase == "failed"
        assert (await c.switched(f"fresh{n}")).phase == "completed"
    await c.until(lambda: not c.engine_pids("v1"), "the first engine is gone")
    # then every answer was by an instance that stood between its proof and its end
    await c.answered(load)
    history = await c.history()
    history.clean()
    assert {r.version for r in history.replies} == {"v1", "fresh0", "fresh1", "fresh2", "fresh3"}
    assert len([s for s in c.seen[before:] if isinstance(s.recorded.event, InstanceDraining)]) >= 4


@on_stage
async def test_a_switch_completes_when_a_gateway_is_killed_in_the_drain(c: Cluster) -> None:
    await c.register("v2", *ARGS)
    load = c.load(15, gateways=("g1",))
    doomed = c.load(10, gateways=("g2",))
    await c.answered(load)
    await c.answered(doomed)
    before = len(c.seen)
    # given streams of the old version that one gateway has to bring to their end
    doomed.send_now(2, tokens=400)
    operation = await c.switch("v2")
    await c.event(DrainStarted, before)
    # when it dies
    c.kill("g2")
    await doomed.stop()
    # then it is awaited for its lease only, and the other one's clients notice nothing
    view = await c.ended(operation)
    assert view.phase == "completed", view
    await c.event(GatewayLost, before)
    await c.answered(load)
    await c.restart("g2")
    again = c.load(10, gateways=("g2",))
    await c.answered(again)
    history = await c.history()
    history.sound()
    assert {r.gateway for r in (*history.failed(), *history.cut())} == {c.gateways["g2"]}
    assert {r.version for r in again.replies} == {"v2"}


@on_stage
async def test_invariant_2_an_engine_that_a_cut_off_gateway_uses_is_kept(c: Cluster) -> None:
    # given two gateways that serve the active version
    source = c.world.models["chat"].active
    target = "v3"
    await c.register(target, *ARGS)
    load = c.load(10, gateways=("g1",))
    cut_off = c.load(10, gateways=("g2",))
    await c.answered(load)
    await c.answered(cut_off)
    before = len(c.seen)
    engine = c.engine_pids(source)
    # when one of them is cut off from the control plane and the model is switched
    c.relays["g2"].cut()
    operation = await c.switch(target)
    view = await c.ended(operation)
    # then the switch does not wait for it longer than its lease, and it serves on by its last route
    assert view.phase == "completed", view
    await c.event(GatewayLost, before)
    await c.event(InstanceDraining, before)
    await c.answered(cut_off, 15)
    assert c.engine_pids(source) == engine, "the engine was stopped under a gateway that uses it"
    assert await c.control_plane("g2") != "connected"
    assert not [s for s in c.seen[before:] if isinstance(s.recorded.event, InstanceStopped)]
    assert {r.version for r in cut_off.replies} == {source}
    # and when it is back, it follows the newest route, and the old engine may go
    c.relays["g2"].mend()
    await c.until(lambda: cut_off.replies[-1].version == target, "the gateway follows the newest route")
    await c.event(InstanceStopped, before)
    await c.until(lambda: not c.engine_pids(source), "the old engine is gone")
    await c.until(c.all_live, "the gateway is awaited again")
    await c.answered(cut_off)
    history = await c.history()
    assert not history.failed(), history.failed()[:5]
    assert not history.cut(), history.cut()[:5]
    assert not history.stale(live=[c.gateways["g1"]])
    assert history.problems(but="of which every instance had been asked to stop") == []
    assert history.events(VersionDrained)


@on_stage
async def test_a_gateway_that_is_frozen_for_longer_than_its_lease_joins_again(c: Cluster) -> None:
    load = c.load(15, gateways=("g1",))
    await c.answered(load)
    before = len(c.seen)
    c.freeze("g2")
    await c.register("v4", *ARGS)
    view = await c.switched("v4")
    assert view.phase == "completed", view
    await c.event(GatewayLost, before)
    c.thaw("g2")
    await c.until(c.all_live, "the gateway is awaited again")
    late = c.load(10, gateways=("g2",))
    await c.answered(late)
    history = await c.history()
    history.sound()
    assert {r.version for r in late.replies} == {"v4"}
    assert not history.failed()


@on_stage
async def test_invariant_2_a_cut_off_gateway_without_a_request_keeps_its_engine(c: Cluster) -> None:
    # given a version that two gateways route to, and one of them has never sent it a request
    await c.register("unused", *ARGS)
    assert (await c.switched("unused")).phase == "completed"
    (source,) = c.world.ready("chat", "unused")
    engine = c.engine_pids("unused")
    before = len(c.seen)
    # when that one is cut off from the control plane, and the model is switched by the rest: twice, so that an engine
    # that is stopped as it should be is seen to be
    c.relays["g2"].cut()
    for version in ("next", "last"):
        await c.register(version, *ARGS)
        assert (await c.switched(version)).phase == "completed"
    await c.event(InstanceDraining, before, instance=source.instance)
    (passed,) = [i.instance for i in c.world.instances.values() if i.version == "next"]
    await c.event(InstanceStopped, before, instance=passed)
    # then its engine still runs, and the first request that it sends there is answered
    assert c.world.instances[source.instance].phase == "draining"
    assert c.engine_pids("unused") == engine, "the engine was stopped under a gateway that routes to it"
    late = c.load(10, gateways=("g2",))
    await c.answered(late)
    assert {r.version for r in late.replies} == {"unused"}
    # and it may go with that gateway
    await late.stop()
    c.kill("g2")
    await c.event(InstanceStopped, before, instance=source.instance)
    c.relays["g2"].mend()
    await c.restart("g2")
    await c.until(c.all_live, "the gateway is awaited again")
    history = await c.history()
    assert not history.failed(), history.failed()[:5]
    assert history.problems(but="of which every instance had been asked to stop") == []
