"""How an engine's answer is framed: where its head ends and where its last byte stands.

A head is read by httptools, strictly and once, and then known again byte by byte but for the digits of its
content-length. A body with a length is counted; one in chunks is followed by httptools, which costs less than following
it in Python. Pure, over bytes; knows no connection.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import httptools

if TYPE_CHECKING:
    from collections.abc import Callable

#: A head may be this long.
HEAD_MOST_BYTES = 64 * 1024

_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,19})(?=\r\n|$)", re.IGNORECASE)
# Hop-by-hop headers of the engine's connection, and names that only the gateway may set.
_HOP = re.compile(
    rb"\r\n(?:connection|keep-alive|proxy-connection|proxy-authenticate|te|trailer|upgrade|x-request-id|x-turnout-[^:\r]*)"
    rb"[ \t]*:[^\r]*",
    re.IGNORECASE,
)
_TRANSFER_ENCODING = re.compile(rb"\r\ntransfer-encoding[ \t]*:[^\r]*", re.IGNORECASE)


class BadAnswer(Exception):
    """The bytes are no answer that can be trusted; the connection must be closed. The message says why."""


class Shape:
    """The head of an answer, read. Engines send the same one again and again but for its length.

    Attributes:
        raw: as it came, without its empty line.
        status: of the answer.
        keep: the engine lets the connection stand after the answer.
        chunked: its body comes in chunks; ``sized``: its ``length`` in bytes is known. With neither it ends with the
            connection.
        stream: it is a stream of events.
        plain: nothing of it has to stay behind: it goes on as it came.
        ordinary: plain, with a length and a status of 2xx.
        before, after: the head around the digits of its content-length, the second one with the empty line; both are
            empty where it has none. ``start``: where the digits begin; ``after_bytes``: how long ``after`` is.
    """

    __slots__ = (
        "after",
        "after_bytes",
        "before",
        "chunked",
        "keep",
        "length",
        "ordinary",
        "plain",
        "raw",
        "sized",
        "start",
        "status",
        "stream",
    )

    def __init__(self, raw: bytes) -> None:
        """Read a head.

        Raises:
            BadAnswer: it is none, or an ambiguous one.
        """
        read = _Read()
        parser = read.parser = httptools.HttpResponseParser(read)
        try:
            parser.feed_data(raw + b"\r\n\r\n")
        except httptools.HttpParserUpgrade:
            raise BadAnswer("the engine wants to speak another protocol") from None
        except httptools.HttpParserError as e:
            raise BadAnswer(f"the engine's answer is not HTTP: {e}") from e
        finally:
            read.parser = None  # the two refer to each other
        if not read.whole:
            raise BadAnswer("the engine's answer is not HTTP: its head has no end")
        self.raw = raw
        self.status = parser.get_status_code()
        self.keep = read.keep
        bodiless = self.status < 200 or self.status in (204, 304)
        self.chunked = read.chunked and not bodiless
        self.length = 0 if bodiless else read.length
        self.sized = self.length >= 0
        self.stream = read.stream
        self.plain = raw.startswith(b"HTTP/1.1") and _HOP.search(raw) is None
        self.ordinary = self.plain and self.sized and not self.stream and 200 <= self.status < 300
        self.start, self.before, self.after = 0, b"", b""
        self.after_bytes = 0
        line = _LENGTH_LINE.search(raw)
        if line is not None and self.sized and not bodiless:
            self.start = line.start(1)
            self.before, self.after = raw[: self.start], raw[line.end(1) :] + b"\r\n\r\n"
            self.after_bytes = len(self.after)

    def passed_on(self, head: bytes) -> bytes:
        """A head of this shape as it goes on: in HTTP/1.1, without what is meant for the engine's connection only."""
        return head if self.plain else b"HTTP/1.1" + _HOP.sub(b"", head)[8:]

    def without_chunks(self, head: bytes) -> bytes:
        """The same for a client that knows no chunks."""
        return _TRANSFER_ENCODING.sub(b"", self.passed_on(head))


class _Read:
    """What httptools finds in a head; ``length`` is -1 where none is named."""

    def __init__(self) -> None:
        self.parser: httptools.HttpResponseParser | None = None
        self.whole = self.keep = self.chunked = self.stream = False
        self.length = -1

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. An ambiguous length does not come so far."""
        name = name.lower()
        if name == b"content-length":
            self.length = int(value)
        elif name == b"transfer-encoding":
            self.chunked = value.lower().rpartition(b",")[2].strip() == b"chunked"
        elif name == b"content-type":
            self.stream = value.lower().startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        """The empty line."""
        self.whole = True
        self.keep = self.parser is not None and self.parser.should_keep_alive()


class Chunks:
    """Follows answers in chunks to their end, one after the other.

    Attributes:
        feed: takes an answer's bytes, its head included. Raises ``httptools.HttpParserError`` where they are no HTTP.
        ended: the answer is complete.
        extra: something stands behind its end.
    """

    __slots__ = ("_parser", "ended", "extra", "feed")

    def __init__(self) -> None:
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self.feed: Callable[[bytes], object] = self._parser.feed_data
        self.ended = self.extra = False

    def close(self) -> None:
        """No more will come: parser and connection refer to each other."""
        self._parser, self.feed = None, _nothing

    def between(self) -> bool:
        """Whether the next chunk could begin here: whether the last one could. Nothing may be fed afterwards."""
        feed = self.feed
        self.close()
        try:
            feed(b"0\r\n\r\n")
        except httptools.HttpParserError:
            return False
        return self.ended

    # httptools; what it need not tell is not asked for, as each call costs as much as the rest of a chunk

    def on_message_begin(self) -> None:
        """An answer begins; behind the end of one there must be none."""
        self.extra = self.ended

    def on_message_complete(self) -> None:
        """The last chunk and its trailers are over."""
        self.ended = True


def _nothing(_: bytes) -> None:
    """What is left to do with bytes behind a close."""
