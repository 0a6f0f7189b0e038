"""Engines that refuse, break, hang or die, and clients that leave or are slow."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.process.gateway.stage import BODY, OK, Answer, Peer, Stage, on_stage, polite

from turnout.workers.gateway.settings import TimeLimits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.process

QUICK = TimeLimits(first_byte_s=0.3, between_s=0.3, total_s=20.0)


def error(answer: Answer) -> dict[str, object]:
    """The error object, which must have OpenAI's shape."""
    body = msgspec.json.decode(answer.body, type=dict[str, dict[str, object]])
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert answer.headers["content-type"] == "application/json"
    return body["error"]


def error_event(answer: Answer) -> dict[str, object]:
    """The error event that ends a stream."""
    assert answer.complete, "the stream must end in order"
    events = [event for event in answer.body.split(b"\n\n") if event]
    assert events[-1].startswith(b'data: {"error":'), events[-1]
    return msgspec.json.decode(events[-1][6:], type=dict[str, dict[str, object]])["error"]


# --- before the first byte


async def reset(peer: Peer) -> None:
    await peer.ask()
    peer.reset()


async def close_unanswered(peer: Peer) -> None:
    await peer.ask()


async def half_a_head(peer: Peer) -> None:
    await peer.ask()
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-")
    peer.reset()


async def no_http(peer: Peer) -> None:
    await peer.ask()
    await peer.send(b"what?\r\n\r\n")
    await peer.gone()


async def endless_head(peer: Peer) -> None:
    await peer.ask()
    await peer.send(b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: %b\r\n" % (n, b"x" * 1000) for n in range(100)))
    await peer.gone()


async def dead_503(peer: Peer) -> None:
    await peer.ask()
    await peer.answer(b'{"error":"x"}', "503 Service Unavailable")
    await peer.gone()


async def dead_500(peer: Peer) -> None:
    await peer.ask()
    await peer.answer(b'{"error":{"message":"EngineCore encountered an issue. See stack trace"}}', "500 Internal")
    await peer.gone()


async def stopping_500(peer: Peer) -> None:
    await peer.ask()
    await peer.answer(b'{"error":{"message":"cannot schedule new futures after shutdown"}}', "500 Internal")
    await peer.gone()


async def broken_503(peer: Peer) -> None:
    await peer.ask()
    await peer.send(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 100\r\n\r\nabc")
    peer.reset()


FAILING = [reset, close_unanswered, half_a_head, no_http, endless_head, dead_503, dead_500, stopping_500, broken_503]


@pytest.mark.parametrize("script", FAILING, ids=lambda script: script.__name__)
def test_a_try_that_fails_before_the_first_byte_is_made_again_elsewhere(
    script: Callable[[Peer], Awaitable[None]],
) -> None:
    @on_stage()
    async def run(s: Stage) -> None:
        bad, good = await s.engine("bad", script), await s.engine("good")
        s.route(s.split("v2", bad), s.split("v1", good, weight=0))
        client = await s.client()
        answer = await client.ask()
        assert (answer.status, answer.body, answer.headers["x-turnout-version"]) == (200, OK, "v1")
        assert [ask.body for ask in (*bad.asked, *good.asked)] == [BODY, BODY]
        assert bad.asked[0].headers["x-request-id"] == good.asked[0].headers["x-request-id"]
        assert sum(s.failures("v2").values()) == 1
        assert s.failures("v1") == {}
        await s.wait(lambda: not bad.open)

    run()


@on_stage()
async def test_a_refused_connection_is_tried_elsewhere_the_same_version_first(s: Stage) -> None:
    gone, twin, other = await s.engine("gone"), await s.engine("twin"), await s.engine("other")
    await gone.stop()
    s.route(s.split("v1", gone, twin), s.split("v0", other, weight=0))
    client = await s.client()
    for _ in range(10):
        assert (await client.ask()).headers["x-turnout-version"] == "v1"
    assert (len(twin.asked), len(other.asked)) == (10, 0)
    assert s.failures()["connect"] == 3, "taken out after three failures in a row"


@on_stage()
async def test_when_nothing_is_left_to_try_the_answer_is_503_with_a_reason(s: Stage) -> None:
    gone = await s.engine("gone")
    await gone.stop()
    s.route(s.split("v1", gone))
    client = await s.client()
    for _ in range(5):
        answer = await client.ask()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert error(answer)["code"] == "no_ready_instance"


@on_stage()
async def test_a_kept_connection_that_the_engine_closed_costs_nothing(s: Stage) -> None:
    closed = asyncio.Event()

    async def once(peer: Peer) -> None:
        await peer.ask()
        await peer.answer()
        await closed.wait()  # the second request is on its way when the connection breaks
        await peer.ask()
        peer.reset()

    engine = await s.engine("a", once)
    s.route(s.split("v1", engine))
    client = await s.client()
    assert (await client.ask()).status == 200
    engine.script = polite
    closed.set()
    assert (await client.ask()).status == 200
    assert s.failures() == {}
    assert s.plane.context.metrics.version("chat", "v1").retries == 1


@on_stage()
async def test_an_error_that_says_nothing_of_the_engines_end_is_passed_on(s: Stage) -> None:
    async def failing(peer: Peer) -> None:
        while True:
            await peer.ask()
            await peer.answer(b'{"error":{"message":"bug"}}', "500 Internal Server Error")

    bad, good = await s.engine("bad", failing), await s.engine("good")
    s.route(s.split("v2", bad), s.split("v1", good, weight=0))
    answer = await (await s.client()).ask()
    assert (answer.status, answer.body) == (500, b'{"error":{"message":"bug"}}')
    assert good.asked == []


@on_stage()
async def test_the_last_engines_own_503_is_passed_on(s: Stage) -> None:
    s.route(s.split("v1", await s.engine("a", dead_503)))
    answer = await (await s.client()).ask()
    assert (answer.status, answer.body) == (503, b'{"error":"x"}')


@on_stage()
async def test_a_pinned_request_is_not_moved_to_another_version(s: Stage) -> None:
    bad, good = await s.engine("bad", reset), await s.engine("good")
    s.route(s.split("v2", bad), s.split("v1", good, weight=0))
    client = await s.client()
    await client.ask(head=b"x-turnout-version: v2\r\n")
    assert len(good.asked) == 1, "the header is dropped where pinning is not allowed"


@on_stage(allow_pin=True)
async def test_testers_may_pin_a_version(s: Stage) -> None:
    bad, good, hidden = await s.engine("bad", reset), await s.engine("good"), await s.engine("hidden")
    s.route(s.split("v2", bad), s.split("v1", good, weight=0), s.split("v3", hidden, weight=0))
    client = await s.client()
    assert (await client.ask(head=b"x-turnout-version: v3\r\n")).headers["x-turnout-version"] == "v3"
    assert "x-turnout-version" not in hidden.asked[0].headers
    assert (await client.ask(head=b"x-turnout-version: v2\r\n")).status == 503
    assert good.asked == []
    answer = await client.ask(head=b"x-turnout-version: v9\r\n")
    assert (answer.status, error(answer)["code"]) == (404, "version_not_found")


# --- after the first byte


@on_stage()
async def test_a_stream_that_breaks_ends_with_an_error_event(s: Stage) -> None:
    async def breaking(peer: Peer) -> None:
        await peer.ask()
        await peer.begin_stream()
        await peer.event(b'{"n":1}')
        await s.wait(lambda: s.in_flight)
        peer.reset()

    bad, good = await s.engine("bad", breaking), await s.engine("good")
    s.route(s.split("v2", bad), s.split("v1", good, weight=0))
    answer = await (await s.client()).ask()
    assert error_event(answer)["code"] == "upstream_broken"
    assert b"[DONE]" not in answer.body
    assert answer.body.startswith(b'data: {"n":1}\n\ndata: {"error"')
    assert good.asked == []
    assert s.failures("v2") == {"cut": 1}


@pytest.mark.parametrize(("path", "sign"), [("/v1/messages", b"event: error\n"), ("/v1/responses", b"event: error\n")])
def test_other_apis_get_the_error_event_of_their_own(path: str, sign: bytes) -> None:
    @on_stage()
    async def run(s: Stage) -> None:
        async def breaking(peer: Peer) -> None:
            await peer.ask()
            await peer.begin_stream()
            await peer.event(b"{}")
            peer.reset()

        s.route(s.split("v1", await s.engine("a", breaking)))
        answer = await (await s.client()).ask(path=path)
        assert answer.complete
        assert answer.body.split(b"\n\n")[1].startswith(sign + b'data: {"type":"error"')

    run()


PARTS = {
    "a length": b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc",
    "the middle of a chunk": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"ff\r\ndata: abc",
    "the middle of a chunk's size": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n1",
    "chunks that are no stream": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
}


@pytest.mark.parametrize("kind", PARTS)
def test_an_answer_that_cannot_be_ended_in_order_is_seen_to_be_incomplete(kind: str) -> None:
    @on_stage()
    async def run(s: Stage) -> None:
        async def breaking(peer: Peer) -> None:
            await peer.ask()
            await peer.send(PARTS[kind])
            await s.wait(lambda: s.plane.context.metrics.version("chat", "v1").statuses[2])
            peer.reset()

        s.route(s.split("v1", await s.engine("a", breaking)))
        answer = await (await s.client()).ask()
        assert (answer.status, answer.complete) == (200, False)
        assert s.failures() == {"cut": 1}

    run()


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (b'{"error":{"message":"EngineCore encountered an issue","code":500}}', "error_event"),
        (b'{"choices":[{"delta":{},"finish_reason":"abort"}]}', "aborted"),
    ],
)
def test_failures_inside_a_stream_of_status_200_are_counted(last: bytes, kind: str) -> None:
    @on_stage()
    async def run(s: Stage) -> None:
        async def script(peer: Peer) -> None:
            while True:
                await peer.ask()
                await peer.begin_stream()
                await peer.event(b'{"choices":[{"delta":{"content":"say \\"abort\\" error"}}]}')
                await peer.event(last)
                await peer.end_stream()

        s.route(s.split("v1", await s.engine("a", script)))
        assert (await (await s.client()).ask()).complete
        assert s.failures() == {kind: 1}

    run()


@on_stage()
async def test_a_stream_without_its_done_is_counted_where_the_api_has_one(s: Stage) -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.ask()
            await peer.begin_stream()
            await peer.event(b"{}")
            await peer.send(b"0\r\n\r\n")

    s.route(s.split("v1", await s.engine("a", script)))
    client = await s.client()
    await client.ask(path="/v1/messages")
    assert s.failures() == {}
    await client.ask()
    assert s.failures() == {"no_done": 1}


# --- time


async def silent(peer: Peer) -> None:
    await peer.ask()
    await peer.gone()


@on_stage(limits=QUICK)
async def test_an_engine_that_never_answers_is_given_up(s: Stage) -> None:
    engine = await s.engine("a", silent)
    s.route(s.split("v1", engine))
    answer = await (await s.client()).ask()
    assert (answer.status, error(answer)["code"]) == (504, "upstream_timeout")
    await s.wait(lambda: not engine.open)
    assert len(engine.asked) == 1, "it may be working on it: not sent a second time"
    assert s.failures() == {"first_byte_timeout": 1}


@on_stage(limits=QUICK)
async def test_a_stream_that_falls_silent_ends_with_an_error_event(s: Stage) -> None:
    async def stuck(peer: Peer) -> None:
        await peer.ask()
        await peer.begin_stream()
        await peer.event(b"{}")
        await peer.gone()

    engine = await s.engine("a", stuck)
    s.route(s.split("v1", engine))
    answer = await (await s.client()).ask()
    assert error_event(answer)["code"] == "upstream_timeout"
    await s.wait(lambda: not engine.open)
    assert s.failures() == {"silent": 1}


@on_stage(limits=TimeLimits(first_byte_s=20, between_s=20, total_s=0.5))
async def test_a_stream_that_never_ends_is_ended(s: Stage) -> None:
    async def endless(peer: Peer) -> None:
        await peer.ask()
        await peer.begin_stream()
        while True:
            await peer.event(b"{}")
            await asyncio.sleep(0.02)

    s.route(s.split("v1", await s.engine("a", endless)))
    assert error_event(await (await s.client()).ask())["code"] == "upstream_timeout"
    assert s.failures() == {"total_timeout": 1}


@on_stage(limits=QUICK, model_limits={"slow": TimeLimits(first_byte_s=30.0)})
async def test_a_model_may_have_limits_of_its_own(s: Stage) -> None:
    release = asyncio.Event()

    async def slow(peer: Peer) -> None:
        while True:
            await peer.ask()
            await release.wait()
            await peer.answer()

    engine = await s.engine("a", slow)
    s.route(s.split("v1", engine), model="slow")
    s.route(s.split("v1", engine), model="chat")
    patient, other = await s.client(), await s.client()
    await patient.post(b'{"model":"slow"}')
    assert (await other.ask()).status == 504
    release.set()
    assert (await patient.answer()).status == 200


# --- clients


@on_stage()
async def test_a_client_that_leaves_cancels_its_request(s: Stage) -> None:
    left: list[str] = []

    async def script(peer: Peer) -> None:
        ask = await peer.ask()
        if b'"stream":true' in ask.body:
            await peer.begin_stream()
            await peer.event(b"{}")
        await peer.gone()
        left.append(ask.line)

    engine = await s.engine("a", script)
    s.route(s.split("v1", engine))
    for body in (BODY, b'{"model":"chat"}'):
        client = await s.client()
        await client.post(body)
        if body == BODY:
            await client.until(b"{}")
        await s.wait(lambda: engine.open == 1)
        client.close()
        await s.wait(lambda: not engine.open)
        await s.wait(lambda: not s.in_flight)
    assert len(left) == 2
    assert s.failures() == {"client_gone": 2}


@on_stage()
async def test_a_client_that_leaves_while_a_connection_is_opened_leaves_nothing(s: Stage) -> None:
    engine = await s.engine("a")
    s.route(s.split("v1", engine))
    for _ in range(20):
        client = await s.client()
        await client.post()
        client.close()
    await s.wait(lambda: not s.plane.connections)
    await s.wait(lambda: engine.open + engine.held == s.plane.context.pool.idle() + 1)
    assert s.in_flight == 0


@on_stage(stalled_s=30.0)
async def test_a_slow_reader_is_held_back_and_not_buffered(s: Stage) -> None:
    piece, pieces = b"x" * 65536, 512
    sent = [0]

    async def flood(peer: Peer) -> None:
        await peer.ask()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(piece) * pieces))
        for _ in range(pieces):
            await peer.send(piece)
            sent[0] += len(piece)

    s.route(s.split("v1", await s.engine("a", flood)))
    s.route(s.split("v1", await s.engine("b")), model="other")
    client, other = await s.client(limit=2**16, rcvbuf=65536), await s.client()
    await client.post()
    await client.head()
    await s.wait(lambda: any(connection.paused for connection in s.plane.connections))
    (connection,) = (one for one in s.plane.connections if one.paused)
    before = -1
    while before != sent[0]:  # until the engine can't send any more, while the gateway serves others
        before = sent[0]
        for _ in range(20):
            assert (await other.ask(b'{"model":"other"}')).body == OK
    assert connection.transport.get_write_buffer_size() < 1_000_000
    assert sent[0] < len(piece) * pieces / 2
    assert len(await client.reader.readexactly(len(piece) * pieces)) == len(piece) * pieces
    await s.wait(lambda: not s.in_flight)
    assert s.failures() == {}


@on_stage(stalled_s=0.3)
async def test_a_client_that_takes_nothing_is_let_go(s: Stage) -> None:
    async def flood(peer: Peer) -> None:
        await peer.ask()
        await peer.begin_stream()
        while True:
            await peer.event(b"x" * 65536)

    engine = await s.engine("a", flood)
    s.route(s.split("v1", engine))
    client = await s.client(limit=2**16, rcvbuf=65536)
    await client.post()
    await s.wait(lambda: s.failures() == {"client_stalled": 1})
    await s.wait(lambda: not engine.open)
    assert s.in_flight == 0


@on_stage()
async def test_a_slow_reader_of_one_answer_gets_the_next_one_too(s: Stage) -> None:
    async def big(peer: Peer) -> None:
        while True:
            await peer.ask()
            await peer.answer(b"y" * 3_000_000)

    s.route(s.split("v1", await s.engine("a", big)))
    client = await s.client(limit=2**16, rcvbuf=65536)
    await client.post()
    await client.post()
    for _ in range(2):
        assert len((await client.answer()).body) == 3_000_000


@on_stage()
async def test_a_client_that_sends_ahead_and_takes_nothing_gets_no_further_answer(s: Stage) -> None:
    async def big(peer: Peer) -> None:
        while True:
            await peer.ask()
            await peer.answer(b"y" * 100_000)

    engine = await s.engine("a", big)
    s.route(s.split("v1", engine))
    client = await s.client(limit=2**16, rcvbuf=65536)
    for _ in range(300):
        await client.post()
    connection = next(iter(s.plane.connections))
    await s.wait(lambda: connection.paused)
    await s.wait(lambda: not s.in_flight)
    asked = len(engine.asked)
    assert asked < 300
    assert connection.transport.get_write_buffer_size() < 1_000_000
    for _ in range(300):
        assert len((await client.answer()).body) == 100_000


@on_stage(stalled_s=0.3)
async def test_a_client_that_does_not_take_its_last_answer_is_let_go(s: Stage) -> None:
    async def big(peer: Peer) -> None:
        while True:
            await peer.ask()
            await peer.answer(b"y" * 200_000)

    s.route(s.split("v1", await s.engine("a", big)))
    client = await s.client(limit=2**16, rcvbuf=65536)
    for n in range(100):
        await client.post(head=b"connection: close\r\n" if n == 99 else b"")
    await s.wait(lambda: not s.plane.connections)
