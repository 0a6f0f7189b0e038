"""Switches of a whole system under streaming load, with nothing going wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import Cluster, Stage, on_stage

from turnout.events.instance import InstanceDraining, InstanceRequested
from turnout.events.route import RouteChanged
from turnout.events.switch import BakeStarted, DrainStarted, RollbackStarted, StepStarted

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.process, pytest.mark.nats]

SWITCHES = 100
ARGS = ("--token-ms=10", "--first-token-ms=5", "--tokens=400")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(gateways=2))
    one.run(one.cluster.serving("v1", "v2", args=ARGS))
    yield one
    one.close()


@on_stage
async def test_a_hundred_switches_under_load_fail_cut_and_stale_nothing(c: Cluster) -> None:
    load = c.load(30)
    await c.answered(load)
    for n in range(SWITCHES):
        view = await c.switched("v2" if n % 2 == 0 else "v1")
        assert view.phase == "completed", view
    await c.answered(load)
    (await c.history()).clean()
    await c.views_are_the_fold()


@pytest.mark.parametrize("at", ["stepping", "baking", "draining"])
def test_invariant_4_until_a_switch_ends_the_source_can_have_everything_back_at_once(stage: Stage, at: str) -> None:
    stage.run(_back_from(stage.cluster, at))


async def _back_from(c: Cluster, at: str) -> None:
    source = c.world.models["chat"].active
    target = "v2" if source == "v1" else "v1"
    load = c.load(20, gateways=("g1",))
    await c.answered(load)
    before = len(c.seen)
    # given a switch that has come so far
    match at:
        case "stepping":
            c.freeze("g2")
            operation = await c.switch(target)
            await c.event(StepStarted, before)
        case "baking":
            operation = await c.switch(target, bake_s=30.0)
            await c.event(BakeStarted, before)
        case _:
            load.send_now(2, tokens=390)
            operation = await c.switch(target)
            await c.event(DrainStarted, before)
    # when it is aborted
    await operation.abort()
    back = await c.event(RollbackStarted, before)
    if at == "stepping":
        c.thaw("g2")
    view = await c.ended(operation)
    # then one revision gives the source everything, and nothing had to be loaded for it
    assert view.phase == "aborted", view
    assert c.world.models["chat"].active == source
    late = [s.recorded.event for s in c.seen[before:]]
    assert not [e for e in late if isinstance(e, InstanceRequested | InstanceDraining)]
    (route,) = [e for e in late if isinstance(e, RouteChanged) and e.revision >= back.revision]
    assert [(s.version, s.weight) for s in route.splits] == [(source, 100.0)]
    await c.answered(load)
    history = await c.history()
    history.clean()
    assert {r.version for r in history.replies if r.revision >= back.revision} == {source}
