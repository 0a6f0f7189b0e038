"""The connection that a gateway holds to each engine that it routes to, used or not.

By it the engine's worker sees a gateway that is cut off from the control plane and has never sent a request.
"""

from __future__ import annotations

import pytest
from tests.process.gateway.stage import OK, Stage, on_stage

pytestmark = pytest.mark.process


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_routed_engine_sees_one_connection_without_any_request(tcp: bool) -> None:
    @on_stage()
    async def run(s: Stage) -> None:
        one, two = await s.engine("one", tcp=tcp), await s.engine("two", tcp=tcp)
        s.route(s.split("v1", one))
        await s.wait(lambda: one.held == 1)
        # when further revisions name it again
        s.route(s.split("v1", one), s.split("v2", two, weight=0))
        s.route(s.split("v1", one, weight=0), s.split("v2", two))
        await s.wait(lambda: two.held == 1)
        # then it is still the same one, and requests go beside it
        assert (one.taken, one.open) == (1, 0)
        client = await s.client()
        assert (await client.ask()).body == OK
        assert (two.held, two.open) == (1, 1)

    run()


@on_stage()
async def test_it_is_closed_when_the_route_drops_the_address(s: Stage) -> None:
    one, two = await s.engine("one"), await s.engine("two")
    s.route(s.split("v1", one))
    await s.wait(lambda: one.held == 1)
    s.route(s.split("v2", two))
    await s.wait(lambda: not one.held)
    await s.wait(lambda: two.held == 1)
    assert one.taken == 1


@on_stage()
async def test_one_that_is_still_being_opened_when_the_route_drops_the_address_does_not_stay(s: Stage) -> None:
    one, two = await s.engine("one"), await s.engine("two")
    s.route(s.split("v1", one))
    s.route(s.split("v2", two))
    await s.wait(lambda: two.held == 1)
    await s.wait(lambda: one.taken == 1 and not one.held)


@on_stage()
async def test_it_is_opened_again_after_the_engine_has_closed_it(s: Stage) -> None:
    engine = await s.engine("a")
    s.route(s.split("v1", engine))
    await s.wait(lambda: engine.held == 1)
    engine.let_go()
    await s.wait(lambda: (engine.taken, engine.held) == (2, 1))
    assert s.failures() == {}


@on_stage()
async def test_it_is_opened_as_soon_as_an_engine_that_was_not_there_listens(s: Stage) -> None:
    engine = await s.engine("a")
    await engine.stop()
    s.route(s.split("v1", engine))
    await engine.start()
    await s.wait(lambda: engine.held == 1)
