"""What clients may send, and the answers that the gateway gives itself."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest
from tests.process.gateway.stage import BODY, OK, Answer, Client, Peer, Stage, on_stage

from turnout.events.route import Split

pytestmark = pytest.mark.process

POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\n"


def code(answer: Answer) -> object:
    """The error's code; the body must have OpenAI's shape."""
    body = msgspec.json.decode(answer.body, type=dict[str, dict[str, object]])
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["code"]


async def serving(s: Stage) -> Client:
    s.route(s.split("v1", await s.engine("a")))
    return await s.client()


# --- smuggling


SMUGGLED = {
    "length and chunks": POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"content-length: 2\r\ncontent-length: 5\r\n\r\n{}abc",
    "two equal lengths": POST + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}",
    "list of lengths": POST + b"content-length: 2, 2\r\n\r\n{}",
    "bare line feeds": POST.replace(b"\r\n", b"\n") + b"content-length: 2\n\n{}",
    "one bare line feed": POST + b"a: b\ncontent-length: 2\r\n\r\n{}",
    "folded header": POST + b"a: b\r\n c: d\r\ncontent-length: 2\r\n\r\n{}",
    "blank before the colon": POST + b"content-length : 2\r\n\r\n{}",
    "unknown coding": POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "second coding": POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "bad chunk size": POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    "chunk without its end": POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}xx0\r\n\r\n",
    "bare line feed in chunks": POST + b"transfer-encoding: chunked\r\n\r\n2\n{}\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("kind", SMUGGLED)
@pytest.mark.parametrize("cut", [1, 10_000])
def test_ambiguous_framing_is_refused_and_the_connection_closed(kind: str, cut: int) -> None:
    raw = SMUGGLED[kind] + POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY

    @on_stage()
    async def run(s: Stage) -> None:
        client = await serving(s)
        for n in range(0, len(raw), cut):
            await client.send(raw[n : n + cut])
        answer = await client.answer()
        assert (answer.status, code(answer), answer.headers["connection"]) == (400, "request_invalid", "close")
        assert await client.closed()
        assert s.engines["a"].asked == [], "nothing behind it may be taken for a request"

    run()


@on_stage()
async def test_what_stands_behind_a_chunked_request_is_not_taken_for_a_request(s: Stage) -> None:
    client = await serving(s)
    await client.send(
        POST + b"transfer-encoding: chunked\r\n\r\n10\r\n" + b'{"model":"chat"}' + b"\r\n0\r\n\r\n" + POST
    )
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await client.closed()
    assert len(s.engines["a"].asked) == 1


# --- limits


@on_stage(max_body_bytes=1000)
async def test_a_body_over_the_limit_is_refused_before_it_is_read(s: Stage) -> None:
    client = await serving(s)
    await client.send(POST + b"content-length: 1001\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, code(answer), answer.headers["connection"]) == (413, "body_too_large", "close")
    assert await client.closed()


@on_stage(max_body_bytes=1000)
async def test_a_client_that_goes_on_sending_can_still_read_why_it_was_refused(s: Stage) -> None:
    client = await serving(s)
    await client.send(POST + b"content-length: 3000000\r\n\r\n" + b"x" * 100_000)
    for _ in range(20):
        await client.send(b"x" * 100_000)
    assert (await client.answer()).status == 413


@on_stage(max_body_bytes=1000)
async def test_a_chunked_body_over_the_limit_is_refused(s: Stage) -> None:
    client = await serving(s)
    await client.send(POST + b"transfer-encoding: chunked\r\n\r\n" + b"64\r\n" + b"x" * 100 + b"\r\n")
    for _ in range(10):
        await client.send(b"64\r\n" + b"x" * 100 + b"\r\n")
    assert (await client.answer()).status == 413


@on_stage(max_body_bytes=1000)
async def test_a_chunked_body_of_nothing_but_chunk_extensions_is_refused(s: Stage) -> None:
    client = await serving(s)
    await client.send(POST + b"transfer-encoding: chunked\r\n\r\n")
    for _ in range(10):
        await client.send(b"1;" + b"a" * 9990 + b"\r\nx\r\n")
    assert (await client.answer()).status == 413


@on_stage(max_body_bytes=1000)
async def test_a_body_at_the_limit_passes(s: Stage) -> None:
    client = await serving(s)
    assert (await client.ask(b'{"model":"chat"}'.ljust(1000))).body == OK


@pytest.mark.parametrize("ended", [b"", b"\r\n\r\n"])
def test_a_head_over_the_limit_is_refused(ended: bytes) -> None:
    @on_stage(max_header_bytes=1000)
    async def run(s: Stage) -> None:
        client = await serving(s)
        await client.send(POST + b"a: " + b"x" * 1000 + ended)
        answer = await client.answer()
        assert (answer.status, code(answer)) == (431, "header_too_large")
        assert await client.closed()

    run()


@on_stage(header_s=0.3, body_s=0.3, keep_alive_s=0.3)
async def test_slow_clients_time_out(s: Stage) -> None:
    idle = await serving(s)
    assert await idle.closed()
    for raw, status in ((POST, 408), (POST + b"content-length: 5\r\n\r\n{", 408)):
        client = await s.client()
        await client.send(raw)
        answer = await client.answer()
        assert (answer.status, code(answer)) == (status, "request_timeout")
        assert await client.closed()
    client = await s.client()
    assert (await client.ask()).status == 200
    assert await client.closed(), "kept alive for keep_alive_s"


@on_stage(header_s=0.5)
async def test_a_client_that_trickles_its_head_times_out_as_well(s: Stage) -> None:
    client = await serving(s)

    async def trickle() -> None:
        for byte in POST * 100:
            await client.send(bytes((byte,)))
            await asyncio.sleep(0.02)

    task = asyncio.create_task(trickle())
    assert (await client.answer()).status == 408
    task.cancel()
    await asyncio.wait((task,))


@on_stage(max_connections=2)
async def test_connections_over_the_limit_are_refused_with_a_reason(s: Stage) -> None:
    first, second = await serving(s), await s.client()
    assert (await first.ask()).status == (await second.ask()).status == 200
    third = await s.client()
    answer = await third.answer()
    assert (answer.status, code(answer), answer.headers["retry-after"]) == (503, "too_many_connections", "1")
    assert (await first.ask()).status == 200


@on_stage()
async def test_a_client_that_sends_ahead_is_not_read_without_end(s: Stage) -> None:
    release = asyncio.Event()

    async def slow(peer: Peer) -> None:
        while True:
            await peer.ask()
            await release.wait()
            await peer.answer()

    s.route(s.split("v1", await s.engine("a", slow)))
    client = await s.client()
    one = POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
    count = 40_000_000 // len(one)
    sending = asyncio.create_task(client.send(one * count))
    connection = next(iter(s.plane.connections))
    await s.wait(lambda: not connection.transport.is_reading())
    assert not sending.done()
    release.set()
    for _ in range(50):
        assert (await client.answer()).status == 200
    sending.cancel()
    await asyncio.wait((sending,))


# --- errors in OpenAI's shape


@on_stage()
async def test_an_unknown_model_is_404_and_names_what_is_served(s: Stage) -> None:
    client = await serving(s)
    answer = await client.ask(b'{"model":"gpt-9"}')
    assert (answer.status, code(answer)) == (404, "model_not_found")
    assert b"'gpt-9'" in answer.body
    assert b"served are: chat" in answer.body


@pytest.mark.parametrize("splits", [(), (Split("v1", 100.0, ()),)])
def test_no_ready_instance_is_503_with_retry_after(splits: tuple[Split, ...]) -> None:
    @on_stage()
    async def run(s: Stage) -> None:
        s.route(*splits)
        client = await s.client()
        answer = await client.ask()
        assert (answer.status, code(answer), answer.headers["retry-after"]) == (503, "no_ready_instance", "1")
        assert (await client.get("/v1/models")).status == 200, "the connection stands"

    run()


@pytest.mark.parametrize(
    ("body", "head", "status", "expected"),
    [
        (b"{", b"", 400, "json_invalid"),
        (b"{}", b"", 400, "model_missing"),
        (b"", b"", 400, "model_missing"),
        (b'{"model":7}', b"", 400, "model_invalid"),
        (b"[" * 100_000, b"", 400, "json_invalid"),
        (BODY, b"content-encoding: gzip\r\n", 415, "encoding_unsupported"),
        (b"--b--\r\n", b"content-type: multipart/form-data; boundary=b\r\n", 400, "model_missing"),
    ],
)
def test_bad_bodies_are_refused_and_the_connection_stands(body: bytes, head: bytes, status: int, expected: str) -> None:
    @on_stage()
    async def run(s: Stage) -> None:
        client = await serving(s)
        answer = await client.ask(body, head=head)
        assert (answer.status, code(answer)) == (status, expected)
        assert (await client.ask()).body == OK
        assert len(s.engines["a"].asked) == 1

    run()


ENGINE_PATHS = (
    *("/collective_rpc", "/sleep", "/wake_up", "/pause", "/health", "/load", "/v1/x"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/../sleep", "/v1/%2e%2e/sleep", "//sleep"),
    "/v1/chat/completions/../../../sleep",
)


@pytest.mark.parametrize("path", ENGINE_PATHS)
def test_paths_that_manage_an_engine_are_out_of_reach(path: str) -> None:
    @on_stage()
    async def run(s: Stage) -> None:
        client = await serving(s)
        for answer in (await client.ask(path=path), await client.get(path)):
            assert (answer.status, code(answer)) == (404, "path_not_found")
        absolute = await client.get(f"http://gateway{path}")
        assert absolute.status == 404
        assert s.engines["a"].asked == []

    run()


@pytest.mark.parametrize("method", ["PUT", "PATCH", "HEAD", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(method: str) -> None:
    @on_stage()
    async def run(s: Stage) -> None:
        client = await serving(s)
        await client.send(f"{method} /v1/chat/completions HTTP/1.1\r\nhost: g\r\n\r\n".encode())
        status, headers = await client.head()
        assert (status, headers["allow"]) == (405, "GET, POST, DELETE")
        assert s.engines["a"].asked == []

    run()


@on_stage()
async def test_a_request_to_upgrade_is_answered_in_http_1_1(s: Stage) -> None:
    client = await serving(s)
    answer = await client.ask(head=b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n")
    assert (answer.status, answer.body) == (200, OK)
    assert {"upgrade", "http2-settings", "connection"}.isdisjoint(s.engines["a"].asked[0].names)


# --- what needs no engine


@on_stage()
async def test_models_are_listed_whatever_their_engines_do(s: Stage) -> None:
    s.route(s.split("v1", await s.engine("a")), model="chat")
    s.route(model="meta-llama/Llama-3")
    client = await s.client()
    answer = await client.get("/v1/models")
    listed = msgspec.json.decode(answer.body, type=dict[str, object])
    assert listed["object"] == "list"
    assert listed["data"] == [
        {"id": name, "object": "model", "created": 0, "owned_by": "turnout"} for name in ("chat", "meta-llama/Llama-3")
    ]
    for path in ("/v1/models/meta-llama/Llama-3", "/v1/models/meta-llama%2FLlama-3"):
        assert msgspec.json.decode((await client.get(path)).body)["id"] == "meta-llama/Llama-3"
    answer = await client.get("/v1/models/none")
    assert (answer.status, code(answer)) == (404, "model_not_found")
    assert (await client.ask(path="/v1/models")).status == 405
    assert s.engines["a"].asked == []


@on_stage()
async def test_paths_that_name_no_model_go_to_the_only_one_or_to_the_one_in_the_query(s: Stage) -> None:
    client = await serving(s)
    assert (await client.get("/v1/responses/resp_1")).body == OK
    assert (await client.ask(b"", "/v1/responses/resp_1/cancel")).body == OK
    other = await s.engine("b")
    s.route(s.split("v1", other), model="other")
    answer = await client.get("/v1/responses/resp_1")
    assert (answer.status, code(answer)) == (400, "model_missing")
    assert (await client.get("/v1/responses/resp_1?model=other")).body == OK
    assert other.asked[0].line == "GET /v1/responses/resp_1?model=other HTTP/1.1"


@on_stage()
async def test_the_gateway_tells_how_it_is(s: Stage) -> None:
    client = await serving(s)
    s.plane.gateway, s.plane.control_plane = "g1", lambda: "disconnected since 2026-11-23T00:00:00Z"
    await client.ask()
    health = msgspec.json.decode((await client.get("/healthz")).body)
    assert health == {
        "gateway": "g1",
        "control_plane": "disconnected since 2026-11-23T00:00:00Z",
        "revisions": {"chat": 1},
        "in_flight": 0,
        "stopping": False,
    }
    assert (await client.get("/readyz")).status == 200
    text = (await client.get("/metrics")).body.decode()
    assert 'turnout_gateway_answers_total{model="chat",status="2xx",version="v1"} 1.0' in text
    assert "turnout_gateway_control_plane_connected 0.0" in text


@on_stage()
async def test_running_requests_are_listed(s: Stage) -> None:
    async def silent(peer: Peer) -> None:
        await peer.ask()
        await peer.gone()

    s.route(s.split("v1", await s.engine("a", silent)))
    client, other = await s.client(), await s.client()
    await client.post(head=b"x-request-id: r1\r\nauthorization: Bearer secret\r\n")
    await s.wait(lambda: s.engines["a"].asked)
    answer = await other.get("/requests")
    (listed,) = msgspec.json.decode(answer.body, type=dict[str, list[dict[str, object]]])["requests"]
    assert {k: v for k, v in listed.items() if k != "age_s"} == {
        "id": "r1",
        "model": "chat",
        "version": "v1",
        "revision": 1,
        "instance": "a",
        "path": "/v1/chat/completions",
        "phase": "waiting",
    }
    assert b"secret" not in answer.body


@on_stage(metrics=False, track_requests=False)
async def test_what_is_switched_off_is_not_answered(s: Stage) -> None:
    client = await serving(s)
    for path in ("/metrics", "/requests"):
        assert (await client.get(path)).status == 404
    assert (await client.get("/healthz")).status == 200


# --- stickiness


@on_stage(sticky_header="X-User")
async def test_a_user_stays_on_one_version(s: Stage) -> None:
    a, b = await s.engine("a"), await s.engine("b")
    s.route(s.split("v1", a, weight=50.0), s.split("v2", b, weight=50.0))
    client = await s.client()

    async def versions(body: bytes, head: bytes) -> set[str]:
        return {(await client.ask(body, head=head)).headers["x-turnout-version"] for _ in range(12)}

    plain = b'{"model":"chat"}'
    assert len(await versions(plain, b"")) == 2
    seen: set[str] = set()
    for n in range(8):
        for body, head in (
            (b'{"model":"chat","user":"u%d"}' % n, b""),
            (b'{"model":"chat","prompt_cache_key":"u%d"}' % n, b""),
            (b'{"model":"chat","safety_identifier":"u%d"}' % n, b""),
            (plain, b"authorization: Bearer k%d\r\n" % n),
            (b'{"model":"chat","user":"other"}', b"x-user: u%d\r\n" % n),
        ):
            got = await versions(body, head)
            assert len(got) == 1, (body, head)
            seen |= got
    assert seen == {"v1", "v2"}


@on_stage()
async def test_a_port_that_is_taken_is_an_error_at_the_start(s: Stage) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        from turnout.workers.clock import SystemClock
        from turnout.workers.gateway.plane import DataPlane
        from turnout.workers.gateway.settings import GatewaySettings

        plane = DataPlane(GatewaySettings(port=taken.getsockname()[1]), SystemClock())
        with pytest.raises(OSError, match="in use"):
            plane.bind()
