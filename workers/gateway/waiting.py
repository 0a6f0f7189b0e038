"""One held request: what its client hears while it waits, and how its answer reaches a stream that has begun.

The head of an answer goes out early only where it is certain that the answer will be a stream: the request asks for one
on a path that has them, over HTTP/1.1. From then on an engine's error is an event of that stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import httptools
import msgspec

from turnout.workers.gateway.errors import stream_error
from turnout.workers.gateway.relay import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.workers.gateway.errors import Refusal
    from turnout.workers.gateway.holding import Holding
    from turnout.workers.gateway.request import Request

#: Paths whose answers are Server-Sent Events where the body says ``"stream": true``.
_STREAMS = (b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages")
#: Of these a client waits for a last event that is no JSON.
_WITH_DONE = _STREAMS[:2]
_DONE = b"data: [DONE]\n\n"
_LAST_CHUNK = b"0\r\n\r\n"
#: An answer that is no stream is told as an event up to this size.
_TOLD_MOST_BYTES = 64 * 1024


class _Fields(msgspec.Struct):
    stream: bool = False


_fields = msgspec.json.Decoder(_Fields)


def asks_stream(request: Request) -> bool:
    """Whether the answer will be a stream for certain, if it is no error."""
    head = request.head
    if head.method != b"POST" or head.path not in _STREAMS or head.http10:
        return False
    try:
        return _fields.decode(request.body).stream
    except msgspec.MsgspecError:
        return False


class Connection(Client, Protocol):
    """The client's connection."""

    def resume(self, request: Request, model: str, client: Client) -> None:
        """Send a request that has waited; its answer goes to ``client``."""
        ...


class Waiting:
    """A request that waits; and once its client has heard of it, the client that the answer goes to."""

    def __init__(
        self,
        holding: Holding,
        connection: Connection,
        request: Request,
        model: str,
        wanted: str,
        *,
        monotonic: Callable[[], float],
        count: Callable[[int], None],
    ) -> None:
        """Make it.

        Args:
            holding: where it waits.
            connection: its client's.
            request: what is to be sent.
            model: the one that the client named; its rules are asked again once the wait is over.
            wanted: whose instance it waits for: that model, or one that a rule has sent it to.
            monotonic: seconds.
            count: an error that the gateway gives itself, by its status.
        """
        self.request = request
        self.size = len(request.body)
        self._holding = holding
        self._monotonic, self._count = monotonic, count
        self._connection = connection
        self._model, self._wanted = model, wanted
        self._streams = asks_stream(request)
        self._begun = False
        self._engine: _Engine | None = None

    # Holding's waiter

    def go_on(self) -> None:
        """Send it, as if it had come now."""
        self._leave()
        self._connection.resume(self.request, self._model, self if self._begun else self._connection)

    def give_up(self, refusal: Refusal) -> None:
        """Tell the client why it has waited in vain."""
        self._leave()
        if self._begun:
            self.refuse(refusal)
        else:
            self._connection.refuse(refusal)

    def still_waits(self, seconds: float) -> None:
        """Tell the client of a stream, so that nothing between it and here takes the connection for dead."""
        connection = self._connection
        if not self._streams or connection.paused:
            return
        if not self._begun:
            self._begun = True
            connection.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
                b"transfer-encoding: chunked\r\nx-request-id: %b\r\n%b\r\n"
                % (self.request.id, b"" if self.request.keep_alive else b"connection: close\r\n")
            )
        self._event(b": loading %b, %.0f s\n\n" % (_comment(self._wanted), seconds))

    def client_gone(self) -> None:
        """The client left: so does its request."""
        self._leave()

    def client_paused(self) -> None:
        """Nothing is sent but comments, and those can wait."""

    def client_resumed(self) -> None:
        """The next comment will be sent."""

    # A relay's client, once the stream has begun

    @property
    def paused(self) -> bool:
        """The client is slow."""
        return self._connection.paused

    def write(self, data: bytes) -> None:
        """Bytes of the engine's answer, its head first: the client has a head already."""
        engine = self._engine
        if engine is None:
            head, _, data = data.partition(b"\r\n\r\n")
            engine = self._engine = _Engine(head)
            if engine.streams:
                self._event(b": %b\n\n" % engine.stamp)
        if engine.passes:
            if data:
                self._connection.write(data)
        elif engine.streams:
            if data:
                self._event(data)
        else:
            engine.take(data)

    def answer_ended(self, keep: bool) -> None:
        """The answer is complete: end the stream where the engine's own end did not."""
        engine = self._engine
        if engine is not None and not engine.passes:
            if not engine.streams:
                self._event(b"data: %b\n\n%b" % (engine.told(), self._done()))
            self._connection.write(_LAST_CHUNK)
        self._connection.answer_ended(keep)

    def answer_broken(self) -> None:
        """The answer can't be completed."""
        self._connection.answer_broken()

    def refuse(self, refusal: Refusal) -> None:
        """End the stream with an error event."""
        error = stream_error(self.request.head.path, refusal.code, refusal.message)
        self._event(error + self._done())
        self._connection.write(_LAST_CHUNK)
        self._count(refusal.status)
        self._connection.answer_ended(keep=self.request.keep_alive)

    def _event(self, event: bytes) -> None:
        self._connection.write(b"%x\r\n%b\r\n" % (len(event), event))

    def _done(self) -> bytes:
        return _DONE if self.request.head.path in _WITH_DONE else b""

    def _leave(self) -> None:
        self._holding.leave(self._wanted, self, self._monotonic())


class _Engine:
    """What an engine answers to a client that has a head already.

    ``streams``: events, to be passed on; ``passes``: they come in chunks already.
    """

    def __init__(self, head: bytes) -> None:
        lines = head.lower().split(b"\r\n")
        fields = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
        self.status = int(head[9:12])
        self._chunked = fields.get(b"transfer-encoding", b"") == b"chunked"
        self.streams = self.status == 200 and fields.get(b"content-type", b"").startswith(b"text/event-stream")
        self.passes = self.streams and self._chunked
        version, revision = fields.get(b"x-turnout-version", b"?"), fields.get(b"x-turnout-revision", b"?")
        self.stamp = b"version %b, revision %b" % (version, revision)
        self._parts: list[bytes] = []
        self._size = 0
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(head + b"\r\n\r\n")

    def take(self, data: bytes) -> None:
        """Bytes of an answer that is no stream."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Content."""
        if self._size <= _TOLD_MOST_BYTES:
            self._size += len(body)
            self._parts.append(body)

    def told(self) -> bytes:
        """The answer as one line of JSON; an error of the engine stays the object that it is."""
        raw = b"".join(self._parts)
        try:
            return msgspec.json.encode(msgspec.json.decode(raw))
        except msgspec.MsgspecError:
            message = f"the engine answered with status {self.status}"
            error = {"message": message, "type": "server_error", "param": None, "code": "upstream_error"}
            return msgspec.json.encode({"error": error})


def _comment(model: str) -> bytes:
    """A served name as a comment may hold it: one line."""
    return "".join(c if c.isprintable() else "?" for c in model).encode()
