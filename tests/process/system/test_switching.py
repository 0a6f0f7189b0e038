"""Switches of a whole system under streaming load, with nothing going wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import Cluster, Stage, on_stage

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.process, pytest.mark.nats]

SWITCHES = 100


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(gateways=2))
    yield one
    one.close()


@on_stage
async def test_a_hundred_switches_under_load_fail_cut_and_stale_nothing(c: Cluster) -> None:
    await c.serving("v1", "v2", args=("--token-ms=10", "--first-token-ms=5"))
    load = c.load(30)
    await c.answered(load)
    for n in range(SWITCHES):
        view = await c.switched("v2" if n % 2 == 0 else "v1")
        assert view.phase == "completed", view
    await c.answered(load)
    history = await c.history()
    history.clean()
    await c.views_are_the_fold()
