"""Revisions under running streams: nothing is cut, what drains is said, nothing ends in silence."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest
from tests.process.gateway.stage import BODY, OK, Client, Peer, Stage, on_stage, polite

from turnout.workers.gateway.transition import Drained

if TYPE_CHECKING:
    from tests.process.gateway.stage import Answer, Engine

pytestmark = pytest.mark.process


class Held:
    """Streams that begin at once and end when they are told."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def __call__(self, peer: Peer) -> None:
        while True:
            await peer.ask()
            await peer.begin_stream()
            await peer.event(b'{"n":1}')
            await peer.until(self.release)
            await peer.event(b'{"n":2}')
            await peer.end_stream()


async def begun(s: Stage, count: int, body: bytes = BODY) -> list[Client]:
    """So many clients, each with a stream under way."""
    clients = [await s.client() for _ in range(count)]
    for client in clients:
        await client.post(body)
        await client.head()
        await client.until(b'{"n":1}\n\n\r\n')
    return clients


@on_stage()
async def test_a_switch_under_fifty_streams_cuts_nothing_and_drains(s: Stage) -> None:
    old, new = Held(), Held()
    new.release.set()
    one, two = await s.engine("one", old), await s.engine("two", new)
    s.route(s.split("v1", one))
    clients = await begun(s, 50)
    transition = s.route(s.split("v2", two))
    assert (transition.drained, transition.draining) == ((), ("v1",))
    late = await s.client()
    assert (await late.ask()).headers["x-turnout-version"] == "v2"
    assert s.drained == []
    old.release.set()
    for client in clients:
        rest = await client.until(b"0\r\n\r\n")
        assert rest.endswith(b'data: {"n":2}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n')
    await s.wait(lambda: s.drained)
    assert s.drained == [Drained("chat", "v1", 2, ended=0)]
    await s.wait(lambda: not one.open)
    assert len(one.asked) == 50, "no connection to the engine is left, and no request came after the switch"
    for client in clients:
        assert (await client.ask()).headers["x-turnout-version"] == "v2"
    assert s.failures("v1") == s.failures("v2") == {}


@on_stage()
async def test_past_the_deadline_fifty_streams_end_with_an_error_event_none_in_silence(s: Stage) -> None:
    one, two = await s.engine("one", Held()), await s.engine("two")
    s.route(s.split("v1", one))
    clients = await begun(s, 50)
    s.route(s.split("v2", two), drain_s=0.3)
    for client in clients:
        rest = await client.until(b"0\r\n\r\n")
        assert b'data: {"error":{' in rest
        assert b'"code":"version_drained"' in rest
        assert await client.closed()
    await s.wait(lambda: s.drained)
    assert s.drained == [Drained("chat", "v1", 2, ended=50)]
    await s.wait(lambda: not one.open)
    assert s.failures("v1") == {"drain_ended": 50}


@on_stage()
async def test_past_the_deadline_a_request_without_an_answer_yet_gets_an_error(s: Stage) -> None:
    async def silent(peer: Peer) -> None:
        await peer.ask()
        await peer.gone()

    one, two = await s.engine("one", silent), await s.engine("two")
    s.route(s.split("v1", one))
    client = await s.client()
    await client.post()
    await s.wait(lambda: one.asked)
    s.route(s.split("v2", two), drain_s=0.1)
    answer = await client.answer()
    assert (answer.status, b"version_drained" in answer.body) == (503, True)
    assert (await client.ask()).headers["x-turnout-version"] == "v2"
    assert s.drained == [Drained("chat", "v1", 2, ended=1)]


@on_stage()
async def test_going_back_while_it_drains_keeps_every_stream(s: Stage) -> None:
    held = Held()
    one, two = await s.engine("one", held), await s.engine("two")
    s.route(s.split("v1", one))
    s.route(s.split("v1", await s.engine("three", Held())), model="other")
    clients = await begun(s, 10)
    (late,) = await begun(s, 1, BODY.replace(b"chat", b"other"))
    s.route(s.split("v2", two), drain_s=0.2)
    s.route(s.split("v1", one))
    s.route(s.split("v2", two), model="other", drain_s=0.2)
    assert b"version_drained" in await late.until(b"0\r\n\r\n"), "its deadline was later"
    held.release.set()
    for client in clients:
        assert b"[DONE]" in await client.until(b"0\r\n\r\n")
    assert s.drained == [Drained("chat", "v2", 4), Drained("other", "v1", 5, ended=1)]
    assert s.failures("v1") == {}


@on_stage()
async def test_unused_connections_to_an_engine_that_left_are_closed_at_once(s: Stage) -> None:
    one, two = await s.engine("one"), await s.engine("two")
    s.route(s.split("v1", one), s.split("v2", two, weight=0))
    client = await s.client()
    await client.ask()
    assert one.open == 1
    s.route(s.split("v2", two))
    await s.wait(lambda: not one.open)
    assert s.drained == [Drained("chat", "v1", 2)]


@on_stage()
async def test_a_retry_after_a_switch_goes_by_the_new_revision(s: Stage) -> None:
    release = asyncio.Event()

    async def breaks_late(peer: Peer) -> None:
        await peer.ask()
        await release.wait()
        peer.reset()

    one, two = await s.engine("one", breaks_late), await s.engine("two")
    s.route(s.split("v1", one))
    client = await s.client()
    await client.post()
    await s.wait(lambda: one.asked)
    s.route(s.split("v2", two))
    release.set()
    answer = await client.answer()
    assert (answer.headers["x-turnout-version"], answer.headers["x-turnout-revision"]) == ("v2", "2")
    assert s.drained == [Drained("chat", "v1", 2)]


@on_stage()
async def test_a_hundred_switches_under_load_fail_nothing_and_send_nothing_to_the_past(s: Stage) -> None:
    engines = {version: await s.engine(version) for version in ("v1", "v2")}
    s.route(s.split("v1", engines["v1"]))
    newest, stop = [1], asyncio.Event()
    answers: list[Answer] = []

    async def busy(client: Client) -> None:
        while not stop.is_set():
            before = newest[0]
            answer = await client.ask()
            assert (answer.status, answer.body) == (200, OK)
            assert int(answer.headers["x-turnout-revision"]) >= before
            answers.append(answer)

    load = [asyncio.create_task(busy(await s.client())) for _ in range(8)]
    for n in range(100):
        had = len(answers)
        await s.wait(lambda: len(answers) > had + 5)  # noqa: B023  waited for at once
        version = "v2" if n % 2 == 0 else "v1"
        s.route(s.split(version, engines[version]))
        newest[0] += 1
        # a version that came back before its last request ends would have nothing to report
        await s.wait(lambda: len(s.drained) > n)  # noqa: B023  waited for at once
    stop.set()
    await asyncio.gather(*load)
    assert all(report.ended == 0 for report in s.drained)
    assert [report.revision for report in s.drained] == list(range(2, 102))


@on_stage()
async def test_a_revision_counts_as_reached_once_an_engine_of_each_version_takes_a_connection(s: Stage) -> None:
    one, two = await s.engine("one"), await s.engine("two")
    s.route(s.split("v1", one))
    await s.plane.reach("chat")
    await two.stop()
    s.route(s.split("v1", one, weight=90.0), s.split("v2", two, weight=10.0))
    reach = asyncio.create_task(s.plane.reach("chat"))
    target = s.plane.context.pool.target(two.address)
    await s.wait(lambda: not target.holding)  # it was tried
    assert not reach.done(), "the candidate's engine is dead"
    s.route(s.split("v1", one))
    await reach


@on_stage(shutdown_s=20.0)
async def test_a_stop_lets_running_requests_end_and_takes_no_new_ones(s: Stage) -> None:
    held = Held()
    s.route(s.split("v1", await s.engine("a", held)))
    idle = await s.client()
    await idle.get("/v1/models")
    (client,) = await begun(s, 1)
    stopping = asyncio.create_task(s.plane.stop())
    assert await idle.closed()
    with pytest.raises(OSError, match=r"refused|Connect"):
        await s.client()
    held.release.set()
    assert b"[DONE]" in await client.until(b"0\r\n\r\n")
    assert await client.closed()
    assert await stopping == 0


@on_stage(shutdown_s=0.2)
async def test_a_stop_ends_what_takes_too_long_with_an_error_event(s: Stage) -> None:
    s.route(s.split("v1", await s.engine("a", Held())))
    (client,) = await begun(s, 1)
    assert await s.plane.stop() == 1
    assert b'"code":"gateway_stopping"' in await client.until(b"0\r\n\r\n")


@on_stage(pool_idle_s=0.2)
async def test_connections_that_idle_too_long_are_closed_by_the_gateway(s: Stage) -> None:
    engine = await s.engine("a")
    s.route(s.split("v1", engine))
    await (await s.client()).ask()
    await s.wait(lambda: not engine.open)


async def _requests(s: Stage, engine: Engine, count: int) -> None:
    client = await s.client()
    for n in range(count):
        if n % 10 == 9:  # a client that leaves, an error, a new connection: each is a way to leak
            client.close()
            client = await s.client()
            await client.ask(b'{"model":"none"}')
        await client.ask()
    client.close()
    await s.wait(lambda: not s.plane.connections)
    s.clients.clear()
    engine.asked.clear()


@on_stage()
async def test_three_thousand_requests_leave_no_object_behind(s: Stage) -> None:
    engine = await s.engine("a", polite)
    s.route(s.split("v1", engine))
    await _requests(s, engine, 200)
    gc.collect()
    before = len(gc.get_objects())
    await _requests(s, engine, 3000)
    gc.collect()
    assert len(gc.get_objects()) - before < 300
