"""Framing of answers: heads as they are read and known again, and where a body ends, however it is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from httptools import HttpParserError
from hypothesis import given
from hypothesis import strategies as st

from turnout.workers.gateway.answer import BadAnswer, Chunks, Shape


@pytest.mark.parametrize(
    ("raw", "chunked", "sized", "stream", "keep"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2", False, True, False, True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close", False, True, False, False),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream",
            True,
            False,
            True,
            True,
        ),
        (b"HTTP/1.0 200 OK\r\nserver: x", False, False, False, False),
        (b"HTTP/1.1 204 No Content", False, True, False, True),
    ],
)
def test_an_answers_head_is_read(raw: bytes, chunked: bool, sized: bool, stream: bool, keep: bool) -> None:
    shape = Shape(raw)
    assert (shape.chunked, shape.sized, shape.stream, shape.keep) == (chunked, sized, stream, keep)
    assert shape.passed_on(raw).startswith(b"HTTP/1.1 20")
    assert shape.status in (200, 204)


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\nx: y",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c",
    ],
)
def test_an_ambiguous_head_is_refused(raw: bytes) -> None:
    with pytest.raises(BadAnswer):
        Shape(raw)


def test_what_is_meant_for_the_engines_connection_stays_behind() -> None:
    raw = b"HTTP/1.0 200 OK\r\nKeep-Alive: 5\r\ncontent-length: 2\r\nx-turnout-version: v9\r\nserver: x"
    shape = Shape(raw)
    assert not shape.plain
    longer = raw.replace(b"length: 2", b"length: 37")
    assert shape.passed_on(longer) == b"HTTP/1.1 200 OK\r\ncontent-length: 37\r\nserver: x"


def test_a_head_says_where_its_length_stands() -> None:
    shape = Shape(b"HTTP/1.1 200 OK\r\nserver: x\r\nContent-Length: 12\r\ndate: y")
    assert shape.before == b"HTTP/1.1 200 OK\r\nserver: x\r\nContent-Length: "
    assert shape.after == b"\r\ndate: y\r\n\r\n"
    assert (shape.start, shape.length) == (len(shape.before), 12)
    assert Shape(b"HTTP/1.1 304 Not Modified\r\ncontent-length: 12").before == b"", "it has no body to count"


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = b"5\r\nhello\r\n1A;name=x\r\n" + b"w" * 26 + b"\r\n0\r\nx-sum: 1\r\n\r\n"


def following(*parts: bytes) -> Chunks:
    chunks = Chunks()
    for part in (HEAD, *parts):
        chunks.feed(part)
    return chunks


@given(st.lists(st.integers(0, len(WHOLE)), max_size=8))
def test_the_end_is_found_however_the_body_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(WHOLE)]
    parts = [WHOLE[a:b] for a, b in pairwise(places) if a < b]
    assert following(*parts).ended
    assert not following(*parts[:-1]).ended


def test_one_answer_after_the_other_is_followed_and_two_at_once_are_seen() -> None:
    chunks = following(WHOLE)
    chunks.ended = False
    chunks.feed(HEAD + WHOLE)
    assert (chunks.ended, chunks.extra) == (True, False)
    assert following(WHOLE + HEAD).extra


@pytest.mark.parametrize(
    ("body", "between"),
    [
        (b"", True),
        (b"5\r\nhello\r\n", True),
        (b"5\r\nhello\r", False),
        (b"5\r\nhello\r\n1", False),
        (b"5\r\n", False),
        (b"7\r\nhello\r\n", False),
        (b"5\r\nhello\r\n0\r\n", False),
    ],
)
def test_it_is_known_where_a_chunk_could_be_put_in(body: bytes, between: bool) -> None:
    chunks = following(body)
    assert chunks.between() is between
    chunks.feed(b"ignored")


@pytest.mark.parametrize("body", [b"5\r\nhelloXX", b"0x5\r\nhello\r\n", b"5g\r\n", b"0\r\nx : 1\r\n\r\n"])
def test_what_are_no_chunks_is_refused(body: bytes) -> None:
    with pytest.raises(HttpParserError):
        following(body)
