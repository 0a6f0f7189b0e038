"""What goes through: bytes as they came, both ways, whatever their framing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.process.gateway.stage import BODY, OK, Client, Peer, Stage, on_stage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.process

EVENTS = [b'{"choices":[{"delta":{"content":"%d"}}]}' % n for n in range(50)]


async def stream(peer: Peer) -> None:
    while True:
        await peer.ask()
        await peer.begin_stream()
        for event in EVENTS:
            await peer.event(event)
        await peer.end_stream()


def sent(*events: bytes) -> bytes:
    data = [b"data: " + event + b"\n\n" for event in (*events, b"[DONE]")]
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in data) + b"0\r\n\r\n"


@on_stage()
async def test_a_stream_passes_byte_for_byte(s: Stage) -> None:
    s.route(s.split("v1", await s.engine("a", stream)))
    client = await s.client()
    for _ in range(3):
        answer = await client.ask()
        assert answer.raw == sent(*EVENTS)
        assert answer.headers["x-turnout-version"] == "v1"
        assert answer.headers["x-turnout-revision"] == "1"
        assert answer.headers["content-type"] == "text/event-stream"
    assert s.engines["a"].connections == 1
    assert s.failures() == {}


@on_stage()
async def test_the_body_reaches_the_engine_as_it_came(s: Stage) -> None:
    engine = await s.engine("a")
    s.route(s.split("v1", engine))
    client = await s.client()
    odd = b' {"messages" : [], "model":\t"\\u0063hat" ,"x":1e2}\n'
    await client.ask(odd, head=b"Authorization: Bearer k\r\nX-Custom: 1\r\nconnection: keep-alive\r\n")
    ask = engine.asked[0]
    assert ask.body == odd
    assert ask.line == "POST /v1/chat/completions HTTP/1.1"
    assert (ask.headers["authorization"], ask.headers["x-custom"]) == ("Bearer k", "1")
    assert "connection" not in ask.headers
    assert len(ask.names) == len(set(ask.names))


@on_stage()
async def test_a_body_in_chunks_reaches_the_engine_whole(s: Stage) -> None:
    engine = await s.engine("a")
    s.route(s.split("v1", engine))
    client = await s.client()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n"
    for cut in (1, 7, 1000):
        raw = head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (BODY[:9], BODY[9:])) + b"0\r\n\r\n"
        for n in range(0, len(raw), cut):
            await client.send(raw[n : n + cut])
        assert (await client.answer()).body == OK
    assert [ask.body for ask in engine.asked] == [BODY] * 3


@on_stage()
async def test_a_request_that_comes_byte_by_byte_is_read(s: Stage) -> None:
    s.route(s.split("v1", await s.engine("a")))
    client = await s.client()
    raw = b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
    for n in range(len(raw)):
        await client.send(raw[n : n + 1])
    assert (await client.answer()).body == OK


@on_stage()
async def test_requests_sent_without_waiting_are_answered_one_at_a_time_in_order(s: Stage) -> None:
    async def echo(peer: Peer) -> None:
        while True:
            ask = await peer.ask()
            assert s.in_flight == 1
            await peer.answer(ask.body)

    s.route(s.split("v1", await s.engine("a", echo)))
    client = await s.client()
    bodies = [b'{"model":"chat","n":%d}' % n for n in range(20)]
    one = b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: %d\r\n\r\n%b"
    await client.send(b"".join(one % (len(body), body) for body in bodies))
    assert [(await client.answer()).body for _ in bodies] == bodies
    await client.send(b"GET /v1/models HTTP/1.1\r\nhost: g\r\n\r\n" * 500)
    for _ in range(500):
        assert (await client.answer()).status == 200


@on_stage()
async def test_binary_bodies_pass_both_ways(s: Stage) -> None:
    audio = bytes(range(256)) * 8000

    async def speak(peer: Peer) -> None:
        while True:
            await peer.ask()
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\ncontent-length: %d\r\n\r\n" % len(audio))
            await peer.send(audio)

    engine = await s.engine("a", speak)
    s.route(s.split("v1", engine))
    client = await s.client()
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        + audio
        + b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nchat\r\n--b--\r\n'
    )
    answer = await client.ask(form, "/v1/audio/transcriptions", b"content-type: multipart/form-data; boundary=b\r\n")
    assert answer.raw == audio
    assert engine.asked[0].body == form
    assert engine.asked[0].headers["content-type"] == "multipart/form-data; boundary=b"


@on_stage()
async def test_engines_behind_tcp_and_a_base_path_are_reached(s: Stage) -> None:
    engine = await s.engine("a", tcp=True)
    engine.address += "/proxy/v1"
    s.route(s.split("v1", engine))
    assert (await (await s.client()).ask()).body == OK
    assert engine.asked[0].line == "POST /proxy/v1/chat/completions HTTP/1.1"
    assert engine.asked[0].headers["host"] == engine.address.split("/")[2]


CLOSING: dict[str, bytes] = {
    "until the end of the connection": b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nabc",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nabc",
    "HTTP/1.0 with a length": b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nabc",
    "a length and close": b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 3\r\n\r\nabc",
    "chunks, close": b"HTTP/1.1 200 OK\r\nConnection:close\r\ntransfer-encoding:chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "chunks with a trailer": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx: y\r\n\r\n",
    "an interim answer": b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
    "100 Continue": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
}


@pytest.mark.parametrize("kind", CLOSING)
@pytest.mark.parametrize("cut", [1, 10_000])
def test_every_framing_of_an_answer_arrives(kind: str, cut: int) -> None:
    raw = CLOSING[kind]

    @on_stage()
    async def run(s: Stage) -> None:
        async def script(peer: Peer) -> None:
            await peer.ask()
            await peer.send(*(raw[n : n + cut] for n in range(0, len(raw), cut)))

        s.route(s.split("v1", await s.engine("a", script)))
        for _ in range(2):
            client = await s.client()
            await client.post()
            status, headers = await client.head()
            assert (status, headers["x-turnout-version"]) == (200, "v1")
            assert headers.get("connection") in (None, "close")
            if "content-length" in headers:
                assert await client.reader.readexactly(3) == b"abc"
            elif "transfer-encoding" in headers:
                assert (await client.until(b"abc\r\n0\r\n")).startswith(b"3\r\nabc")
            else:
                assert headers["connection"] == "close"
                assert await client.reader.read() == b"abc"
        assert s.failures() == {}

    run()


@on_stage()
async def test_an_http_1_0_client_gets_no_chunks(s: Stage) -> None:
    s.route(s.split("v1", await s.engine("a", stream)))
    client = await s.client()
    await client.send(b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY))
    answer = await client.answer()
    assert "transfer-encoding" not in answer.headers
    assert answer.raw == b"".join(b"data: " + event + b"\n\n" for event in (*EVENTS, b"[DONE]"))


@on_stage()
async def test_the_engines_own_hop_by_hop_and_turnout_headers_stay_behind(s: Stage) -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.ask()
            extra = (
                b"Keep-Alive: timeout=5\r\nconnection: keep-alive\r\nX-Turnout-Version: v9\r\nx-request-id: other\r\n"
            )
            await peer.answer(extra=extra + b"x-kept: 1\r\nte-st: 2\r\n")

    s.route(s.split("v1", await s.engine("a", script)))
    client = await s.client()
    await client.post(head=b"x-request-id: mine\r\n")
    raw = (await client.until(b"\r\n\r\n")).lower()
    for name in (b"keep-alive", b"\r\nconnection", b"v9", b"other"):
        assert name not in raw
    for line in (b"x-kept: 1", b"te-st: 2", b"x-turnout-version: v1", b"x-request-id: mine"):
        assert raw.count(line) == 1


@on_stage()
async def test_a_request_id_is_made_sent_on_and_returned(s: Stage) -> None:
    engine = await s.engine("a")
    s.route(s.split("v1", engine))
    client = await s.client()
    ids = [(await client.ask()).headers["x-request-id"] for _ in range(3)]
    assert len(set(ids)) == 3
    assert [ask.headers["x-request-id"] for ask in engine.asked] == ids


@on_stage()
async def test_the_client_may_wait_for_100_continue(s: Stage) -> None:
    s.route(s.split("v1", await s.engine("a")))
    client = await s.client()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    await client.send(head % len(BODY))
    assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await client.send(BODY)
    assert (await client.answer()).body == OK


@on_stage()
async def test_a_client_that_asks_to_close_is_closed_after_its_answer(s: Stage) -> None:
    s.route(s.split("v1", await s.engine("a")))
    client = await s.client()
    answer = await client.ask(head=b"connection: close\r\n")
    assert (answer.headers["connection"], answer.complete) == ("close", True)
    assert await client.closed()


@on_stage()
async def test_what_the_engine_sends_behind_its_answer_never_reaches_a_client(s: Stage) -> None:
    evil = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"
    tail = iter((b"", evil, evil))

    async def script(peer: Peer) -> None:
        while True:
            await peer.ask()
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok" + next(tail))

    engine = await s.engine("a", script)
    s.route(s.split("v1", engine))
    client = await s.client()
    assert (await client.ask()).body == b"ok"
    answer = await client.ask()
    assert b"evil" not in answer.body
    assert answer.status == 503

    async def unasked(peer: Peer) -> None:
        await peer.ask()
        await peer.answer()
        await s.wait(lambda: not s.in_flight)
        await peer.send(evil)
        await peer.gone()

    engine.script = unasked
    assert (await client.ask()).body == OK
    await s.wait(lambda: not engine.open)
    engine.script = polite_once
    assert (await client.ask()).body == OK


async def polite_once(peer: Peer) -> None:
    await peer.ask()
    await peer.answer()


async def many(clients: list[Client], each: Callable[[Client], Awaitable[None]]) -> None:
    await asyncio.gather(*(each(client) for client in clients))


@on_stage()
async def test_a_hundred_clients_share_what_is_kept_open(s: Stage) -> None:
    engine = await s.engine("a")
    s.route(s.split("v1", engine))

    async def ten(client: Client) -> None:
        for _ in range(10):
            assert (await client.ask()).body == OK

    await many([await s.client() for _ in range(100)], ten)
    assert len(engine.asked) == 1000
    assert engine.connections <= 100
