"""kill -9 and freezes of controllers, at every stage of a switch, under streaming load."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import Cluster, Stage, on_stage

from turnout.events.gateway import GatewayLost
from turnout.events.instance import InstanceLoading
from turnout.events.model import SwitchAdmitted
from turnout.events.switch import (
    BakeStarted,
    DrainStarted,
    StepApplied,
    StepStarted,
    SwitchCompleted,
    SwitchRequested,
    TargetReady,
)
from turnout.events.worker import WorkerLost
from turnout.workers.client import CommandRejected

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turnout.workers.client import SwitchOperation

pytestmark = [pytest.mark.process, pytest.mark.nats]

ARGS = ("--token-ms=10", "--tokens=400")
#: What may stand once in a switch's history, whoever wrote it.
ONCE = (SwitchRequested, TargetReady, StepStarted, StepApplied, BakeStarted, DrainStarted, SwitchCompleted)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(controllers=2, gateways=2))
    one.run(one.cluster.serving("v1", "v2", args=ARGS))
    yield one
    one.close()


@pytest.mark.parametrize("successor", ["standby", "restart"])
@pytest.mark.parametrize("at", ["requested", "loading", "stepping", "baking", "draining"])
def test_invariant_7_a_switch_goes_on_after_kill_9_of_the_leader(stage: Stage, at: str, successor: str) -> None:
    stage.run(_killed_at(stage.cluster, at, successor == "standby"))


async def _killed_at(c: Cluster, at: str, standby: bool) -> None:
    # given two warm versions under load, and one or two controllers
    active = c.world.models["chat"].active
    target = "v2" if active == "v1" else "v1"
    await c.until(c.leader, "somebody leads")
    leader = c.leader()
    other = "c2" if leader == "c1" else "c1"
    if not standby:
        c.kill(other)
    load = c.load(15, gateways=("g1",))
    await c.answered(load)
    before = len(c.seen)
    # when the leader is killed while the switch is there
    match at:
        case "requested":
            if standby:
                c.freeze(leader)  # what the other one admits, nobody carries on
            operation = await c.switch(target)
            await c.event(SwitchRequested, before)
        case "loading":
            target = f"cold-{leader}-{standby}"
            await c.register(target, "--load-seconds=1", *ARGS)
            operation = await c.switch(target)
            await c.event(InstanceLoading, before)
        case "stepping":
            c.freeze("g2")  # the step waits for it
            operation = await c.switch(target)
            await c.event(StepStarted, before)
        case "baking":
            operation = await c.switch(target, bake_s=3.0)
            await c.event(BakeStarted, before)
        case _:
            load.send_now(2, tokens=300)
            operation = await c.switch(target)
            await c.event(DrainStarted, before)
    c.kill(leader)
    if not standby:
        await c.restart(leader)
    if at == "stepping":
        await c.until(c.leader, "somebody leads again")
        c.thaw("g2")
    # then it is completed, each step taken once, and no client has noticed
    await _completed(c, operation, before)
    await c.answered(load)
    history = await c.history()
    history.clean()
    if at == "baking":
        bake, drain = history.events(BakeStarted)[-1], history.events(DrainStarted)[-1]
        assert drain.at >= bake.until, "the bake was cut short"
    await c.restart(other if not standby else leader)


async def _completed(c: Cluster, operation: SwitchOperation, before: int) -> None:
    view = await c.ended(operation)
    assert view.phase == "completed", view
    for type_ in ONCE:
        found = [s for s in c.seen[before:] if isinstance(s.recorded.event, type_)]
        assert len(found) <= 1, found


@on_stage
async def test_a_frozen_leader_that_comes_back_writes_nothing_any_more(c: Cluster) -> None:
    load = c.load(15)
    await c.answered(load)
    for _ in range(2):
        target = "v2" if c.world.models["chat"].active == "v1" else "v1"
        before = len(c.seen)
        await c.until(c.leader, "somebody leads")
        leader = c.leader()
        # given a leader that stands still in the middle of a switch
        operation = await c.switch(target, bake_s=0.5)
        await c.event(StepStarted, before)
        c.freeze(leader)
        # when another has taken over and the switch has gone on
        other = "c2" if leader == "c1" else "c1"
        await c.until(lambda other=other: c.leader() == other, f"{other} leads")  # type: ignore[misc]
        c.thaw(leader)
        # then the old one notices, and no step is taken twice
        await _completed(c, operation, before)
        await c.logged(leader, "leading_ended")
    await c.answered(load)
    (await c.history()).clean()
    await c.views_are_the_fold()


@on_stage
async def test_a_leader_that_stood_still_counts_nobody_as_lost(c: Cluster) -> None:
    load = c.load(15)
    await c.answered(load)
    await c.until(c.leader, "somebody leads")
    leader = c.leader()
    before = len(c.seen)
    # when the leader hears nothing for longer than a gateway's lease, because it stands still
    c.freeze(leader)
    await c.answered(load, 110)
    c.thaw(leader)
    # then it looks again before it judges: those who beat all the time are still awaited
    await c.logged(leader, "leading_ended")
    assert (await c.switched("v2" if c.world.models["chat"].active == "v1" else "v1")).phase == "completed"
    assert not [s for s in c.seen[before:] if isinstance(s.recorded.event, GatewayLost | WorkerLost)]
    (await c.history()).clean()


@on_stage
async def test_invariant_3_of_many_switches_asked_at_once_one_runs(c: Cluster) -> None:
    c.load(15)
    target = "v2" if c.world.models["chat"].active == "v1" else "v1"
    before = len(c.seen)

    async def attempt() -> str:
        try:
            return (await c.switch(target, bake_s=1.0)).id
        except CommandRejected as e:
            return e.answer.code

    # when twenty clients ask two controllers for the same switch
    answers = await asyncio.gather(*(attempt() for _ in range(20)))
    # then one of them has it, and the others hear why they have not
    switches = [a for a in answers if a.startswith("sw-")]
    assert len(switches) == 1, answers
    assert set(answers) - set(switches) <= {"switch_running", "already_active"}
    await c.event(SwitchCompleted, before, switch=switches[0])
    assert len([s for s in c.seen[before:] if isinstance(s.recorded.event, SwitchAdmitted)]) == 1
    (await c.history()).clean()


@on_stage
async def test_invariant_6_a_command_takes_effect_once_however_often_it_is_sent(c: Cluster) -> None:
    load = c.load(15)
    await c.answered(load)
    target = "v2" if c.world.models["chat"].active == "v1" else "v1"
    before = len(c.seen)
    await c.until(c.leader, "somebody leads")
    leader = c.leader()

    async def ask() -> str:
        return (await c.switch(target, id="the-same-command", bake_s=1.0)).id

    # when one command is sent by ten clients at once, while the leader dies, and again afterwards
    asked = [asyncio.create_task(ask()) for _ in range(10)]
    await c.event(SwitchRequested, before)
    c.kill(leader)
    answers = set(await asyncio.gather(*asked))
    await c.restart(leader)
    await c.event(SwitchCompleted, before)
    answers.add(await ask())
    # then all have heard of the same switch, and there was one
    assert len(answers) == 1, answers
    assert len([s for s in c.seen[before:] if isinstance(s.recorded.event, SwitchAdmitted)]) == 1
    (await c.history()).clean()


@on_stage
async def test_invariant_8_service_goes_on_without_any_controller(c: Cluster) -> None:
    # given load, and a switch that has just begun to bake
    load = c.load(15)
    await c.answered(load)
    before = len(c.seen)
    target = "v2" if c.world.models["chat"].active == "v1" else "v1"
    operation = await c.switch(target, bake_s=1.0)
    await c.event(BakeStarted, before)
    # when every controller is gone for longer than every lease
    c.kill("c1")
    c.kill("c2")
    await c.answered(load, 110)
    assert not [s for s in c.seen[before:] if isinstance(s.recorded.event, DrainStarted)]
    # then nothing fails, and the switch goes on as soon as one is back
    await c.restart("c1")
    await _completed(c, operation, before)
    await c.restart("c2")
    await c.answered(load)
    (await c.history()).clean()


@on_stage
async def test_invariant_5_views_are_rebuilt_from_the_log_when_all_are_dropped(c: Cluster) -> None:
    await c.views_are_the_fold()
    before, _ = await c.client.raw_views(">")
    # when every view and the checkpoint are thrown away while nobody leads
    c.kill("c1")
    c.kill("c2")
    await c.drop_views()
    await c.restart("c1")
    await c.until(c.leader, "somebody leads")
    # then they come back as they were
    await c.views_are_the_fold()
    after, _ = await c.client.raw_views(">")
    assert {k: v for k, v in after.items() if k != "_ckpt"} == {k: v for k, v in before.items() if k != "_ckpt"}
    await c.restart("c2")
