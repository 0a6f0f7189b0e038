"""Complaint 2 of notes/peers.md: what comes back wrong from its sleep serves nobody, and no request is lost by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import Cluster, Stage, on_stage

from turnout.events.instance import InstanceFailed, InstanceReady, InstanceSlept, InstanceWakeRequested
from turnout.workers.inference.engines.base import SLEEP_FLAG

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.process, pytest.mark.nats]

TWO_PLACES = """
[switch]
bake_s = 0.0

[worker]
quiet_s = 0.2
capacity = 2
"""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(base=TWO_PLACES))
    one.run(one.cluster.serving("v1", "v2", "v3", args=(SLEEP_FLAG, "--wake-fails", "--tokens=20", "--token-ms=5")))
    yield one
    one.close()


@on_stage
async def test_complaint_2_what_does_not_wake_is_killed_and_loaded_cold_in_the_same_switch(c: Cluster) -> None:
    load = c.load(20)
    # given v1 serves, and is put to sleep as v3 needs its place
    for version in ("v2", "v3"):
        assert (await c.switched(version)).phase == "completed"
    slept = await c.event(InstanceSlept)
    # when it is wanted again, and can't be woken
    before = len(c.seen)
    view = await c.switched("v1")
    # then the switch completes with a new engine, and nobody has noticed
    assert view.phase == "completed", view
    await c.event(InstanceWakeRequested, instance=slept.instance)
    failed = await c.event(InstanceFailed, instance=slept.instance)
    assert failed.stage == "waking"
    ready = await c.event(InstanceReady, after=before)
    assert (ready.tier, ready.instance != slept.instance) == ("cold", True)
    await c.answered(load)
    (await c.history()).clean()
    await c.views_are_the_fold()
