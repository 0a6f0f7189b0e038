"""Requests that are held while there is no place for both versions, and a gateway that is cut off meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import Cluster, Stage, on_stage
from tests.process.system.traffic import get

from turnout.events.gateway import GatewayLost
from turnout.events.switch import HoldStarted

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.process, pytest.mark.nats]

ONE_PLACE = """
[switch]
bake_s = 0.0

[worker]
quiet_s = 0.2
capacity = 1
"""
HELD = 5


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(gateways=2, base=ONE_PLACE, via=("g2",)))
    one.run(one.cluster.serving("v1", args=("--tokens=5",)))
    yield one
    one.close()


async def held(c: Cluster, gateway: str) -> int:
    """Requests that wait in a gateway, as its metrics say."""
    text = (await get(c.gateways[gateway], "/metrics")).body.decode()
    found = [line for line in text.splitlines() if line.startswith("turnout_gateway_held{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in found)


@on_stage
async def test_requests_that_a_cut_off_gateway_holds_wait_on_and_are_answered_when_it_is_back(c: Cluster) -> None:
    # given a switch that holds, and requests that wait in both gateways while the new version is loaded
    await c.register("v2", "--tokens=5", "--load-seconds=15")
    before = len(c.seen)
    operation = await c.switch("v2", hold=True)
    begun = await c.event(HoldStarted, before)
    await c.until(
        lambda: all(c.world.gateways[g].applied.get("chat", 0) >= begun.revision for g in c.world.live_gateways),
        "every gateway lets new requests wait",
    )
    urls = {name: c.load(0.01, gateways=(name,)) for name in ("g1", "g2")}
    for traffic in urls.values():
        traffic.send_now(HELD, tokens=5)
    for name in urls:
        await c.until(lambda name=name: _all_held(c, name), f"{name} holds all its requests")  # type: ignore[misc]
    # when one of them is cut off from the control plane
    c.relays["g2"].cut()
    view = await c.ended(operation)
    # then the switch awaits it for its lease only, its requests wait on, and those of the other one are answered
    assert view.phase == "completed", view
    await c.event(GatewayLost, before)
    await c.until(lambda: not urls["g1"].running, "the requests of the gateway that heard of it are answered")
    assert await held(c, "g2") >= HELD
    # and when it is back they are answered by the new version, by the route that it missed
    c.relays["g2"].mend()
    await c.until(lambda: not urls["g2"].running, "the requests that waited are answered")
    history = await c.history()
    assert not history.failed(), history.failed()[:5]
    assert not history.cut(), history.cut()[:5]
    assert {reply.text.split()[0] for reply in urls["g2"].replies} == {"v2"}
    # The head of a stream that waits long goes out before its version and revision are known.
    assert history.problems(but="by revision 0, which the log does not know") == []


async def _all_held(c: Cluster, gateway: str) -> bool:
    return await held(c, gateway) >= HELD
