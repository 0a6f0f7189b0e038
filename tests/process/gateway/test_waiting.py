"""Requests that wait in a real gateway, and what their clients get: a plain answer, or a stream that says so."""

from __future__ import annotations

import json

import pytest
from tests.process.gateway.stage import BODY, OK, Peer, Stage, on_stage

from turnout.events.route import Hold, Rule
from turnout.projections.routing import RouteView

pytestmark = pytest.mark.process

PLAIN = b'{"model":"chat","messages":[{"role":"user","content":"hi"}]}'
HOLD = Hold(8, 20.0, wake=True)


def at_zero(s: Stage, hold: Hold | None = HOLD) -> None:
    s.route(hold=hold)


def held(s: Stage) -> int:
    return sum(count for _, count in s.plane.context.holding.counts())


async def streams(peer: Peer) -> None:
    await peer.ask()
    await peer.begin_stream()
    await peer.event(b'{"choices":[]}')
    await peer.end_stream()


@on_stage()
async def test_a_request_waits_and_is_answered_as_if_the_model_had_been_there(s: Stage) -> None:
    asked: list[tuple[str, int]] = []
    s.plane.on_waiting(lambda model, revision: asked.append((model, revision)))
    at_zero(s)
    engine, client = await s.engine("a"), await s.client()
    await client.post(PLAIN)
    await s.wait(lambda: held(s) == 1)
    assert asked[0] == ("chat", 1)
    s.route(s.split("v1", engine))
    answer = await client.answer()
    assert (answer.status, answer.body, answer.headers["x-turnout-version"]) == (200, OK, "v1")
    assert engine.asked[0].body == PLAIN
    assert held(s) == 0


@on_stage()
async def test_a_stream_that_waits_long_begins_with_comments_and_goes_on_with_the_engines_events(s: Stage) -> None:
    s.plane.context.holding.tell_s = 0.01
    at_zero(s)
    engine, client = await s.engine("a", streams), await s.client()
    await client.post(BODY)
    status, headers = await client.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    await client.until(b": loading chat, 0 s\n\n")
    s.route(s.split("v1", engine))
    rest = await client.until(b"0\r\n\r\n")
    assert b": version v1, revision 2\n\n" in rest
    assert rest.index(b'data: {"choices":[]}') < rest.index(b"data: [DONE]")
    # the connection goes on
    assert (await client.ask(PLAIN)).status == 200


@on_stage()
async def test_an_engines_error_is_an_event_of_a_stream_that_has_begun(s: Stage) -> None:
    async def refuses(peer: Peer) -> None:
        await peer.ask()
        await peer.answer(b'{"error":{"message":"too long","code":"x"}}', "400 Bad Request")

    s.plane.context.holding.tell_s = 0.01
    at_zero(s)
    engine, client = await s.engine("a", refuses), await s.client()
    await client.post(BODY)
    await client.until(b": loading chat")
    s.route(s.split("v1", engine))
    rest = await client.until(b"0\r\n\r\n")
    (event,) = [line for line in rest.split(b"\n") if line.startswith(b"data: {")]
    assert json.loads(event[6:])["error"]["message"] == "too long"
    assert b"data: [DONE]" in rest


@pytest.mark.parametrize("streaming", [False, True])
def test_a_load_that_fails_is_told_in_openais_shape(streaming: bool) -> None:
    @on_stage()
    async def run(s: Stage) -> None:
        s.plane.context.holding.tell_s = 0.01
        at_zero(s)
        client = await s.client()
        await client.post(BODY if streaming else PLAIN)
        await s.wait(lambda: held(s) == 1)
        if streaming:
            await client.until(b": loading chat")
        s.route(hold=Hold(8, 20.0, True, 1, "no memory"))
        if streaming:
            rest = await client.until(b"0\r\n\r\n")
            (event,) = [line for line in rest.split(b"\n") if line.startswith(b"data: {")]
            error = json.loads(event[6:])["error"]
            assert b"data: [DONE]" in rest
        else:
            answer = await client.answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
            error = json.loads(answer.body)["error"]
        assert (error["code"], error["type"]) == ("load_failed", "server_error")
        assert "no memory" in error["message"]

    run()


@on_stage()
async def test_more_than_may_wait_are_refused_at_once(s: Stage) -> None:
    at_zero(s, Hold(1, 20.0))
    first, second = await s.client(), await s.client()
    await first.post(PLAIN)
    await s.wait(lambda: held(s) == 1)
    answer = await second.ask(PLAIN)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "queue_full")
    metrics = (await second.get("/metrics")).body
    assert b'turnout_gateway_held_refused_total{model="chat",reason="queue_full"} 1.0' in metrics
    assert b'turnout_gateway_held{model="chat"} 1.0' in metrics


@on_stage()
async def test_a_request_waits_no_longer_than_it_may(s: Stage) -> None:
    at_zero(s, Hold(1, 0.2))
    answer = await (await s.client()).ask(PLAIN)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "load_timeout")


@on_stage()
async def test_a_client_that_leaves_waits_no_longer(s: Stage) -> None:
    at_zero(s)
    client = await s.client()
    await client.post(PLAIN)
    await s.wait(lambda: held(s) == 1)
    client.close()
    await s.wait(lambda: held(s) == 0)


@on_stage()
async def test_what_a_request_asks_for_starts_nothing_where_the_model_is_not_on_demand(s: Stage) -> None:
    asked: list[tuple[str, int]] = []
    s.plane.on_waiting(lambda model, revision: asked.append((model, revision)))
    at_zero(s, None)
    for body in (b'{"model":"chat","keep_alive":-1}', b'{"model":"chat","options":{"num_ctx":4096}}', PLAIN):
        assert (await (await s.client()).ask(body)).status == 503
    assert asked == []


@on_stage()
async def test_what_a_gateway_says_of_a_model_on_demand_counts_from_the_last_byte(s: Stage) -> None:
    at_zero(s)
    assert s.plane.uses() == {}
    engine, client = await s.engine("a"), await s.client()
    s.route(s.split("v1", engine), hold=HOLD)
    await s.wait(lambda: s.plane.uses()["chat"].idle_s > 0.2)
    await client.ask(PLAIN)
    await s.wait(lambda: s.plane.uses()["chat"].idle_s < 0.2)
    use = s.plane.uses()["chat"]
    assert (use.in_flight, use.held, use.revision) == (0, 0, 2)


@on_stage()
async def test_a_request_that_a_rule_sends_to_a_model_at_zero_wakes_it_and_waits(s: Stage) -> None:
    # given chat serves, and its rule for tools goes to a model that is not loaded
    asked: list[tuple[str, int]] = []
    s.plane.on_waiting(lambda model, revision: asked.append((model, revision)))
    s.route(model="tools", hold=HOLD)
    rule = Rule("tools", "tools", model="tools")
    split = s.split("v1", await s.engine("a"))
    s.plane.apply(RouteView("chat", 7, (split,), "s", 30.0, rules=(rule,)))
    client, other = await s.client(), await s.client()
    wants_tools = PLAIN[:-1] + b',"tools":[{"type":"function","function":{"name":"f"}}]}'
    # when one request needs it and another does not
    await client.post(wants_tools)
    await s.wait(lambda: held(s) == 1)
    assert (await other.ask(PLAIN)).headers["x-turnout-version"] == "v1"
    # then the model is asked for, and the first goes to it by its name once it is there
    assert asked[0] == ("tools", 1)
    engine = await s.engine("b")
    s.route(s.split("w1", engine), model="tools")
    answer = await client.answer()
    assert (answer.status, answer.headers["x-turnout-version"], answer.headers["x-turnout-rule"]) == (
        200,
        "w1",
        "tools",
    )
    assert engine.asked[0].body == wants_tools.replace(b'"model":"chat"', b'"model":"tools"')
    assert held(s) == 0
