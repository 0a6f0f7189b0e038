"""What is read of a request, and every ambiguous form of one that is refused."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.workers.gateway.errors import Refusal
from turnout.workers.gateway.request import (
    PREFIX_BYTES,
    BadRequest,
    ChunkedBody,
    Repeat,
    Routing,
    from_form,
    from_json,
    from_query,
    prompt_start,
    read_head,
    served,
)
from turnout.workers.gateway.upstream import Target

POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
ENGINE = Target("http://engine:8000/base/v1")


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"POST /v1/x HTTP/1.1\nHost: a\r\n\r\n", id="bare LF after the request line"),
        pytest.param(POST + b"A: b\nContent-Length: 2\r\n\r\n", id="bare LF after a header"),
        pytest.param(POST + b"A: b\rContent-Length: 2\r\n\r\n", id="bare CR"),
        pytest.param(POST + b"A: b\r\n c\r\n\r\n", id="obs-fold"),
        pytest.param(b"POST /v1/x HTTP/1.1\r\n Host: a\r\n\r\n", id="fold before the first header"),
        pytest.param(POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", id="length and coding"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n", id="coding and length"),
        pytest.param(POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n", id="length twice, equal"),
        pytest.param(POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n", id="length twice, different"),
        pytest.param(POST + b"Content-Length: 2, 2\r\n\r\n", id="list of lengths"),
        pytest.param(POST + b"Content-Length: +2\r\n\r\n", id="signed length"),
        pytest.param(POST + b"Content-Length: -2\r\n\r\n", id="negative length"),
        pytest.param(POST + b"Content-Length: 0x2\r\n\r\n", id="hexadecimal length"),
        pytest.param(POST + b"Content-Length: \r\n\r\n", id="empty length"),
        pytest.param(POST + b"Content-Length: 99999999999999999999999\r\n\r\n", id="length beyond 64 bits"),
        pytest.param(POST + b"Content-Length : 2\r\n\r\n", id="blank before the colon"),
        pytest.param(POST + b"Transfer-Encoding: xchunked\r\n\r\n", id="unknown coding"),
        pytest.param(POST + b"Transfer-Encoding: identity\r\n\r\n", id="identity coding"),
        pytest.param(POST + b"Transfer-Encoding: chunked, identity\r\n\r\n", id="chunked is not last"),
        pytest.param(POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", id="a second coding"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", id="chunked twice"),
        pytest.param(POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n", id="vertical tab"),
        pytest.param(b"POST /v1/x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", id="chunks under HTTP/1.0"),
        pytest.param(POST + b"A: b\x00c\r\n\r\n", id="zero byte"),
        pytest.param(POST + b"Host: b\r\n\r\n", id="two hosts"),
        pytest.param(b"POST /v1/x HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(b"\nPOST /v1/x HTTP/1.1\r\nHost: a\r\n\r\n", id="LF before the request line"),
        pytest.param(b"\r\n\r\n", id="nothing"),
        pytest.param(b"POST /v1/a b HTTP/1.1\r\nHost: a\r\n\r\n", id="blank in the target"),
        pytest.param(b"POST\t/v1/x HTTP/1.1\r\nHost: a\r\n\r\n", id="tab in the request line"),
        pytest.param(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", id="CONNECT"),
        pytest.param(b"FOO /v1/x HTTP/1.1\r\nHost: a\r\n\r\n", id="unknown method"),
        pytest.param(b"POST /v1/x HTTP/2.0\r\nHost: a\r\n\r\n", id="HTTP/2.0"),
        pytest.param(b"POST /v1/x\r\n\r\n", id="HTTP/0.9"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\n", id="HTTP/2 preface"),
        pytest.param(POST + b"Expect: 200-ok\r\n\r\n", id="unknown expectation"),
    ],
)
def test_ambiguous_or_malformed_heads_are_refused(head: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        read_head(head)
    assert 400 <= caught.value.refusal.status < 600
    assert caught.value.refusal.message


def test_a_head_goes_on_without_what_is_meant_for_this_connection_only() -> None:
    head = (
        b"POST /v1/completions?a=b HTTP/1.1\r\nHost: gateway\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n"
        b"Keep-Alive: 5\r\nTE: trailers\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\nProxy-Authorization: x\r\n"
        b"x-turnout-version: v9\r\nX-Turnout-Anything: y\r\nAuthorization: Bearer k\r\nX-Kept: 1\r\nx-kept: 2\r\n"
        b"Content-Type: application/json\r\nx-request-id: r1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    )
    request = read_head(head)
    assert request.for_engine(ENGINE, request.id, b"{}") == (
        b"POST /base/v1/completions?a=b HTTP/1.1\r\nhost: engine:8000\r\nx-request-id: r1\r\n"
        b"Authorization: Bearer k\r\nX-Kept: 1\r\nx-kept: 2\r\nContent-Type: application/json\r\n"
        b"content-length: 2\r\n\r\n{}"
    )
    assert request.for_engine(ENGINE, request.id, b"{}", alone=True).endswith(b"\r\n\r\n")
    assert (request.pin, request.expects, request.length, request.keep_alive) == (b"v9", True, 2, True)


def test_a_chunked_body_goes_on_with_its_length() -> None:
    request = read_head(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    assert request.length == -1
    assert request.for_engine(ENGINE, b"r1", b"abc").endswith(b"content-length: 3\r\n\r\nabc")
    assert b"ransfer-" not in request.for_engine(ENGINE, b"r1", b"abc")


@pytest.mark.parametrize(
    ("head", "keep"),
    [
        (POST + b"\r\n", True),
        (POST + b"Connection: close\r\n\r\n", False),
        (POST + b"Connection: Close, x\r\n\r\n", False),
        (b"POST /v1/x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", False),
    ],
)
def test_the_client_decides_about_its_connection(head: bytes, keep: bool) -> None:
    assert read_head(head).keep_alive is keep


def test_the_absolute_form_is_read_as_its_path() -> None:
    request = read_head(b"GET http://gateway:80/v1/models?a=1 HTTP/1.1\r\nHost: gateway\r\n\r\n")
    assert (request.target, request.path) == (b"/v1/models?a=1", b"/v1/models")


def test_the_sticky_header_is_read_and_passed_on() -> None:
    request = read_head(POST + b"X-User: alice\r\n\r\n", b"x-user")
    assert request.sticky == b"alice"
    assert b"X-User: alice\r\n" in request.for_engine(ENGINE, b"r1", b"")


@pytest.mark.parametrize(
    ("body", "start"),
    [
        (
            b'{"model":"m","messages":[{"role":"system","content":"You are"}]}',
            b'[{"role":"system","content":"You are"}]}',
        ),
        (b'{"prompt" : "Once upon", "model":"m"}', b'"Once upon", "model":"m"}'),
        (b'{"model":"m","input":["a"]}', b'["a"]}'),
        (b'{"model":"m"}', b""),
    ],
)
def test_it_is_known_how_a_prompt_begins(body: bytes, start: bytes) -> None:
    assert prompt_start(body) == start
    assert len(prompt_start(b'{"prompt":"' + b"x" * 5000)) == PREFIX_BYTES


@pytest.mark.parametrize("id", [b"", b"a b", b"x" * 129, b"\xc3\xa4"])
def test_an_odd_request_id_is_not_taken_over(id: bytes) -> None:
    assert read_head(POST + b"x-request-id: " + id + b"\r\n\r\n").id == b""


# chunked bodies


def fed(*parts: bytes) -> ChunkedBody:
    body = ChunkedBody()
    for part in parts:
        body.feed(part)
    return body


CHUNKED = b"4;x=y\r\nabcd\r\n3\r\nefg\r\n0\r\nTrailer: x\r\n\r\n"


@given(st.lists(st.integers(0, len(CHUNKED)), max_size=8))
def test_a_chunked_body_is_read_however_it_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(CHUNKED)]
    body = fed(*(CHUNKED[a:b] for a, b in itertools.pairwise(edges) if a < b))
    assert (body.complete, body.extra, body.body()) == (True, False, b"abcdefg")


def test_a_chunked_body_is_read_byte_by_byte() -> None:
    body = fed(*(bytes((byte,)) for byte in CHUNKED))
    assert (body.complete, body.body()) == (True, b"abcdefg")


@pytest.mark.parametrize("more", [b"x", b"GET / HTTP/1.1\r\n", b"\x00"])
def test_what_comes_behind_a_chunked_body_is_noticed(more: bytes) -> None:
    for body in (fed(CHUNKED + more), fed(CHUNKED, more)):
        assert (body.complete, body.extra, body.body()) == (True, True, b"abcdefg")


@pytest.mark.parametrize(
    "raw",
    [
        b"zz\r\n",
        b"0x2\r\nab",
        b"2 \r\nab",
        b"-2\r\nab",
        b"2\nab",
        b"2\r\nab\n",
        b"2\r\nabx",
        b"f" * 17 + b"\r\n",
        b";\r\n",
    ],
)
def test_malformed_chunks_are_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        fed(raw)


# paths


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/chat/completions",
        b"/v1/chat/completions/batch",
        b"/v1/completions",
        b"/v1/embeddings",
        b"/v1/responses",
        b"/v1/responses/resp_1",
        b"/v1/responses/resp_1/cancel",
        b"/v1/messages",
        b"/v1/messages/count_tokens",
        b"/v1/audio/speech",
        b"/v1/audio/transcriptions",
        b"/v1/images/generations",
        b"/v1/videos",
        b"/v1/rerank",
        b"/v1/score",
        b"/v1/moderations",
    ],
)
def test_data_paths_are_served(path: bytes) -> None:
    assert served(path)


@pytest.mark.parametrize(
    "path",
    [
        b"/",
        b"/health",
        b"/metrics",
        b"/collective_rpc",
        b"/sleep",
        b"/wake_up",
        b"/pause",
        b"/tokenize",
        b"/invocations",
        b"/v1/load_lora_adapter",
        b"/v1/unload_lora_adapter",
        b"/v1/omni/sleep",
        b"/v1/../sleep",
        b"/v1/audio/../../sleep",
        b"/v1/responses/../load_lora_adapter",
        b"/v1/responses/%2e%2e/load_lora_adapter",
        b"/v1//completions",
        b"//v1/completions",
        b"/v1/completions/",
        b"/v1/completions;x",
        b"/v1/completions%00",
        b"/v1/completions\n",
        b"/V1/completions",
        b"/v1/audio/unload",
    ],
)
def test_everything_else_is_out_of_reach(path: bytes) -> None:
    assert not served(path)


# routing fields


def test_the_model_and_the_key_are_read_from_json() -> None:
    assert from_json(b'{"model":"chat","messages":[{"role":"user"}],"user":"alice"}') == Routing("chat", b'"alice"')
    assert from_json(b'{"model":"chat","user":null,"safety_identifier":"s"}') == Routing("chat", b'"s"')
    assert from_json(b'{"model":"chat","prompt_cache_key":"p","user":""}') == Routing("chat", b'"p"')
    assert from_json(b'{"model":"a","model":"b"}') == Routing("b")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "json_invalid"),
        (b"[]", "json_invalid"),
        (b'"chat"', "json_invalid"),
        (b'{"model":"x"} x', "json_invalid"),
        (b"\xff", "json_invalid"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "json_invalid"),
        (b"{}", "model_missing"),
        (b'{"model":null}', "model_missing"),
        (b'{"model":""}', "model_missing"),
        (b'{"model":1}', "model_invalid"),
        (b'{"model":["chat"]}', "model_invalid"),
    ],
)
def test_bad_json_bodies_are_refused_in_openai_shape(body: bytes, code: str) -> None:
    refusal = from_json(body)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code, refusal.type) == (400, code, "invalid_request_error")
    assert set(msgspec.json.decode(refusal.body())["error"]) == {"message", "type", "param", "code"}


@given(st.binary(max_size=200))
def test_no_body_makes_reading_raise(body: bytes) -> None:
    assert isinstance(from_json(body), Routing | Refusal)
    assert isinstance(from_form(b"multipart/form-data; boundary=b", body), Routing | Refusal)


def form(*parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(b"--b\r\n%b\r\n\r\n%b\r\n" % part for part in parts) + b"--b--\r\n"


FILE = (b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav', bytes(range(256)))
KIND = b"multipart/form-data; boundary=b"


def test_the_model_is_read_from_a_form_wherever_it_stands() -> None:
    model = (b'Content-Disposition: form-data; name="model"', b"chat")
    user = (b"content-disposition: form-data; name=user", b"alice")
    assert from_form(KIND, form(FILE, model)) == Routing("chat")
    assert from_form(KIND, form(model, FILE, user)) == Routing("chat", b"alice")
    assert from_form(b'multipart/form-data; boundary="b"', b"preamble\r\n" + form(model)) == Routing("chat")


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        (KIND, form(FILE), "model_missing"),
        (KIND, form((b'Content-Disposition: form-data; name="model"', b"")), "model_missing"),
        (KIND, form(*[(b'Content-Disposition: form-data; name="model"', b"chat")] * 2), "model_invalid"),
        (KIND, form((b'Content-Disposition: form-data; name="model"', b"\xff")), "model_invalid"),
        (KIND, b"--b\r\nno end", "form_invalid"),
        (KIND, b"other", "form_invalid"),
        (b"multipart/form-data", form(FILE), "form_invalid"),
        (KIND, form((b'Content-Disposition: form-data; name="file"; filename="; name=model"', b"x")), "model_missing"),
    ],
)
def test_bad_forms_are_refused(kind: bytes, body: bytes, code: str) -> None:
    refusal = from_form(kind, body)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code) == (400, code)


def test_a_query_can_name_the_model() -> None:
    assert from_query(b"a=1&model=meta%2Fllama") == "meta/llama"
    assert from_query(b"") == ""


@pytest.mark.parametrize("address", ["https://x", "ftp://x", "x", "http://", ""])
def test_an_odd_engine_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="no engine address"):
        Target(address)


# heads that are known again


REPEATED = POST + b"Content-Type: application/json\r\nContent-Length: 2\r\nX-A: b\r\n\r\n"


def repeat(raw: bytes = REPEATED, most_bytes: int = 1000) -> Repeat | None:
    return Repeat.of(raw, read_head(raw), most_bytes)


def test_a_head_is_known_again_whatever_the_length_of_its_body() -> None:
    known = repeat()
    assert known is not None
    assert known.body(REPEATED + b"{}") == b"{}"
    longer = REPEATED.replace(b"Length: 2", b"Length: 0012")
    assert known.body(longer + b"x" * 12) == b"x" * 12


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(REPEATED + b"{", id="a part of the body"),
        pytest.param(REPEATED + b"{}G", id="more than the body"),
        pytest.param(REPEATED[:-2], id="a part of the head"),
        pytest.param(REPEATED.replace(b"X-A: b", b"X-A: c") + b"{}", id="another header"),
        pytest.param(REPEATED.replace(b"Length: 2", b"Length: 2\r\nTransfer-Encoding: chunked") + b"{}", id="a coding"),
        pytest.param(REPEATED.replace(b"Length: 2", b"Length: 2\r\nContent-Length: 3") + b"{}", id="a second length"),
        pytest.param(REPEATED.replace(b"Length: 2", b"Length: +2") + b"{}", id="a signed length"),
        pytest.param(REPEATED.replace(b"Length: 2", b"Length: ") + b"", id="no length"),
        pytest.param(REPEATED.replace(b"Length: 2", b"Length: 2\nA: b") + b"{}", id="a bare line feed"),
        pytest.param(REPEATED.replace(b"Length: 2", b"Length: 1001") + b"x" * 1001, id="a body over the limit"),
        pytest.param(REPEATED.replace(b"completions", b"embeddings") + b"{}", id="another path"),
    ],
)
def test_what_is_not_the_same_head_with_one_whole_body_is_read_the_longer_way(data: bytes) -> None:
    known = repeat()
    assert known is not None
    assert known.body(data) is None


@given(st.integers(0, len(REPEATED) - 1), st.binary(max_size=3))
def test_a_head_that_is_known_again_reads_like_a_new_one(at: int, put: bytes) -> None:
    known = repeat()
    assert known is not None
    changed = REPEATED[:at] + put + REPEATED[at + len(put) :]
    for length in range(4):
        data = changed + b"x" * length
        body = known.body(data)
        if body is not None:
            raw, end, rest = data.partition(b"\r\n\r\n")
            head = read_head(raw + end)
            assert body == rest
            assert head.length == len(body)
            assert head.for_engine(ENGINE, b"r", b"x") == known.head.for_engine(ENGINE, b"r", b"x")


@pytest.mark.parametrize(
    "raw",
    [
        REPEATED.replace(b"X-A", b"x-request-id"),
        REPEATED.replace(b"X-A: b", b"Expect: 100-continue"),
        REPEATED.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked"),
        POST + b"\r\n",
        b"POST /v1/completions HTTP/1.0\r\nContent-Length: 2\r\n\r\n",
    ],
)
def test_a_head_that_says_something_of_this_time_only_is_not_kept(raw: bytes) -> None:
    assert repeat(raw) is None
