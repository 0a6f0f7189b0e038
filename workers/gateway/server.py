"""The client's side: HTTP/1.1 in, one request at a time, and the answers that the gateway gives itself.

A request is read whole before it is sent on, so that it can be sent again. Everything behind its last byte waits until
its answer is complete. Knows of engines only that a Relay speaks to them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import msgspec

from turnout.workers.gateway import request as requests
from turnout.workers.gateway.errors import Refusal, json_response, response
from turnout.workers.gateway.relay import Relay
from turnout.workers.gateway.request import BadRequest, ChunkedBody, Head, Repeat, Request, Routing
from turnout.workers.gateway.rules import facts_of
from turnout.workers.gateway.transition import Choice, NoRoute
from turnout.workers.gateway.waiting import Waiting

if TYPE_CHECKING:
    from turnout.workers.gateway.context import GatewayContext
    from turnout.workers.gateway.relay import Client

#: After an error that ends a connection the client may still be sending: its bytes are dropped for this long, because
#: closing at once would reset the connection and the client would never read why.
LINGER_S = 2.0
_NEVER = float("inf")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(asyncio.Protocol):
    """One client connection.

    Attributes:
        relay: the request that is being answered by an engine, or waits for one.
        paused: the client takes less than there is to send.
        deadline: seconds (coarse) when the connection is closed for want of progress; infinite while a relay runs.
    """

    __slots__ = (
        "_buffer",
        "_chunks",
        "_closing",
        "_ctx",
        "_deaf",
        "_head",
        "_need",
        "_parts",
        "_repeat",
        "_taking",
        "connections",
        "deadline",
        "paused",
        "relay",
        "transport",
        "write",
    )

    transport: asyncio.Transport

    def __init__(self, ctx: GatewayContext, connections: set[ClientConnection]) -> None:
        """``connections``: where it enters itself while it is open."""
        self._ctx = ctx
        self.connections = connections
        self.relay: Relay | Waiting | None = None
        self.paused = False
        self.deadline = ctx.now + ctx.settings.header_s
        self._buffer = b""
        self._head: Head | None = None  # of a request whose body is being read
        self._repeat: Repeat | None = None
        self._need = 0
        self._parts: list[bytes] = []
        self._chunks: ChunkedBody | None = None
        self._closing = False  # nothing that comes is looked at any more
        self._deaf = False  # reading is paused because enough waits already
        self._taking = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self.transport = cast("asyncio.Transport", transport)
        self.write = self.transport.write
        ctx = self._ctx
        self.connections.add(self)
        self.deadline = ctx.now + ctx.settings.header_s
        if len(self.connections) > ctx.settings.max_connections:
            self._refuse_and_close(
                Refusal(503, "too_many_connections", "the gateway has no connection left: try again", retry_after=1)
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone; so is its request."""
        self.connections.discard(self)
        self._closing = True
        relay, self.relay = self.relay, None
        if relay is not None:
            relay.client_gone()
        self._buffer = b""
        self._parts.clear()
        self._chunks = None

    def eof_received(self) -> None:
        """The client will send no more. As with nginx, that is a disconnect: close, and cancel what runs."""

    def pause_writing(self) -> None:
        """The client is slow."""
        self.paused = True
        if self.relay is not None:
            self.relay.client_paused()

    def resume_writing(self) -> None:
        """It has caught up."""
        self.paused = False
        if self.relay is not None:
            self.relay.client_resumed()
        elif not self._closing:
            self._wake()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self._closing:
            return
        if self.relay is not None or self.paused:
            self._buffer += data
            if len(self._buffer) > self._ctx.settings.max_header_bytes:
                self._deaf = True
                self.transport.pause_reading()
            return
        if self._repeat is not None and self._head is None and not self._buffer:
            body = self._repeat.body(data)
            if body is not None:
                self._dispatch(self._repeat.head, body)
                return
        self._take(data)

    # Relay's client

    def answer_ended(self, keep: bool) -> None:
        """The answer is complete."""
        self.relay = None
        if not keep or self._ctx.stopping:
            self._close()
            return
        if self.paused:
            # Whoever sends requests ahead and takes no answers gets no further one: they would pile up here.
            self.deadline = self._ctx.now + self._ctx.settings.stalled_s
        elif self._buffer or self._deaf:
            self._wake()
        else:
            self.deadline = self._ctx.now + self._ctx.settings.keep_alive_s

    def answer_broken(self) -> None:
        """The answer can't be completed."""
        self.relay = None
        self._closing = True
        self.transport.abort()

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error instead of an engine's answer."""
        if self.relay is not None:
            self._refuse(refusal, self.relay.request)

    # Sweep

    def check(self, now: float) -> None:
        """Close or answer a connection that makes no progress."""
        if now < self.deadline or self.relay is not None:
            return
        if self._closing:
            self.transport.abort()
        elif self._head is not None:
            self._refuse_and_close(
                Refusal(408, "request_timeout", f"the body was not complete within {self._ctx.settings.body_s:g} s")
            )
        elif self._buffer:
            self._refuse_and_close(
                Refusal(408, "request_timeout", f"the head was not complete within {self._ctx.settings.header_s:g} s")
            )
        else:
            self._close()

    def close_if_idle(self) -> None:
        """The gateway stops: close unless a request is being read or answered."""
        if self.relay is None and self._head is None and not self._buffer:
            self._close()

    def close_now(self) -> None:
        """The gateway stops and waits no longer."""
        self._close()

    # Reading

    def _wake(self) -> None:
        """Go on with what came meanwhile."""
        self.deadline = self._ctx.now + self._ctx.settings.keep_alive_s
        if self._deaf:
            self._deaf = False
            self.transport.resume_reading()
        if self._buffer and not self._taking:
            self._take(b"")

    def _take(self, data: bytes) -> None:
        """Read as many requests as can be answered now."""
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        self._taking = True
        try:
            while data and self.relay is None and not self.paused and not self._closing:
                data = self._take_body(data) if self._head is not None else self._take_head(data)
        except BadRequest as e:
            self._refuse_and_close(e.refusal)
            return
        finally:
            self._taking = False
        if data and not self._closing:
            self._buffer = data if not self._buffer else data + self._buffer

    def _take_head(self, data: bytes) -> bytes:
        """Read a head if it is complete; return what is left."""
        settings = self._ctx.settings
        end = data.find(b"\r\n\r\n")
        if end < 0 or end > settings.max_header_bytes:
            if len(data) > settings.max_header_bytes:
                raise BadRequest(431, "header_too_large", f"the head is larger than {settings.max_header_bytes} bytes")
            _refuse_bare_line_feeds(data)
            self.deadline = min(self.deadline, self._ctx.now + settings.header_s)
            self._buffer = data
            return b""
        raw, data = data[: end + 4], data[end + 4 :]
        head = requests.read_head(raw, settings.sticky_header.lower().encode())
        self._repeat = Repeat.of(raw, head, settings.max_body_bytes)
        length = head.length
        if length > settings.max_body_bytes:
            raise _too_large(settings.max_body_bytes)
        if 0 <= length <= len(data):
            self._dispatch(head, data[:length])
            return data[length:]
        self._head = head
        self.deadline = self._ctx.now + settings.body_s
        if length < 0:
            self._chunks = ChunkedBody()
        self._need = length
        if head.expects and not data:
            self.write(_CONTINUE)
        return data

    def _take_body(self, data: bytes) -> bytes:
        """Read on in a body; return what is left."""
        head, chunks, extra = self._head, self._chunks, False
        if head is None:
            return data
        if chunks is None:
            part = data[: self._need]
            self._parts.append(part)
            self._need -= len(part)
            if self._need:
                return b""
            body = b"".join(self._parts)
            self._parts.clear()
            data = data[len(part) :]
        else:
            most = self._ctx.settings.max_body_bytes
            chunks.feed(data)
            if chunks.size > most or chunks.raw_bytes > 2 * most + 65536:
                raise _too_large(most)
            if not chunks.complete:
                return b""
            body, extra = chunks.body(), chunks.extra
            self._chunks = None
            data = b""
        self._head = None
        # Where chunks have something behind them it is not known where the next request begins: answer this one,
        # close, and let the client send the next one again (RFC 9112, 9.3.2).
        self._dispatch(head, body, last=extra)
        return data

    # Answering

    def _dispatch(self, head: Head, body: bytes, last: bool = False) -> None:
        """Answer a request, or give it to a relay. ``last``: the connection must be closed after it."""
        ctx = self._ctx
        request = Request(head, head.id or ctx.request_id(), body)
        if last:
            request.keep_alive = False
        if head.plain:
            routing = requests.from_json(body) if body else self._routing(request)
        elif not requests.served(head.path):
            self._answer_local(request)
            return
        elif head.method not in requests.METHODS:
            self._refuse(Refusal(405, "method_not_allowed", "use GET, POST or DELETE"), request)
            return
        else:
            routing = self._routing(request)
            if head.pin and ctx.settings.allow_pin:
                request.pin, request.apart = head.pin.decode("latin-1"), True
        if not isinstance(routing, Routing):  # the usual class first: that is the cheap question
            self._refuse(routing, request)
            return
        key = request.key = head.sticky or routing.key or head.authorization
        manager, model = ctx.manager, routing.model
        if manager.ruled and model in manager.ruled and body and not request.pin:
            choice = self._by_rules(request, model)
        elif manager.affine and model in manager.affine:
            choice = manager.handle_request_routing(model, key, ctx.now, request.pin, requests.prompt_start(body))
        else:
            choice = manager.handle_request_routing(model, key, ctx.now, request.pin)
        if not isinstance(choice, Choice):
            self._hold(request, model, choice)
            return
        self.deadline = _NEVER
        relay = self.relay = Relay(ctx, self, request, choice)
        relay.send()

    def _hold(self, request: Request, model: str, why: NoRoute) -> None:
        """Let a request wait that finds no instance, if its model's route allows that; else refuse it."""
        holding, wanted = self._ctx.holding, why.model or model
        if not holding.waits(wanted):
            self._refuse(self._no_route(why, wanted, request.pin), request)
            return
        self.deadline = _NEVER
        monotonic = self._ctx.monotonic
        waiting = self.relay = Waiting(
            holding, self, request, model, wanted, monotonic=monotonic, count=self._ctx.metrics.refuse
        )
        refusal = holding.wait(wanted, waiting, monotonic())
        if refusal is not None:
            self.refuse(refusal)

    def resume(self, request: Request, model: str, client: Client) -> None:
        """Send a request that has waited. ``client``: who gets its answer, this connection or what speaks for it."""
        manager = self._ctx.manager
        if model in manager.ruled and request.body and not request.pin:
            choice = self._by_rules(request, model)
        else:
            choice = manager.handle_request_routing(model, request.key, self._ctx.now, request.pin)
        if isinstance(choice, NoRoute):
            client.refuse(self._no_route(choice, model, request.pin))
            return
        relay = self.relay = Relay(self._ctx, client, request, choice)
        relay.send()

    def _by_rules(self, request: Request, model: str) -> Choice | NoRoute:
        """Choose by what the request is; one that goes to another model names that one from here on."""
        manager, head = self._ctx.manager, request.head
        rules = manager.ruled[model]
        facts = facts_of(rules, head.path, head.values(rules.headers), head.content_type, request.body)
        prefix = requests.prompt_start(request.body) if manager.affine else b""
        choice, by_split = manager.handle_ruled_request(model, facts, request.key, self._ctx.now, prefix)
        request.apart = not by_split
        if isinstance(choice, Choice) and choice.model != model:
            request.body = requests.with_model(head.content_type, request.body, choice.model)
        return choice

    def _routing(self, request: Request) -> Routing | Refusal:
        """The model and the key."""
        head = request.head
        if request.body:
            if head.content_encoding and head.content_encoding != b"identity":
                return Refusal(415, "encoding_unsupported", "send the body without content-encoding")
            if requests.is_form(head.content_type):
                return requests.from_form(head.content_type, request.body)
            return requests.from_json(request.body)
        if head.query and (named := requests.from_query(head.query)):
            return Routing(named)
        if head.method == b"POST" and not head.path.endswith(b"/cancel"):
            return requests.NO_MODEL
        models = self._ctx.manager.models()
        if len(models) == 1:
            return Routing(models[0])
        return Refusal(
            400,
            "model_missing",
            f"this path names no model and {len(models)} are served: add ?model=NAME to the URL",
            param="model",
        )

    def _no_route(self, why: NoRoute, model: str, pin: str) -> Refusal:
        manager = self._ctx.manager
        if why.code == "model_not_found":
            names = ", ".join(manager.models()) or "none yet"
            return Refusal(404, why.code, f"there is no model {model!r}; served are: {names}", param="model")
        if why.code == "version_not_found":
            route = manager.route(model)
            names = ", ".join(split.version for split in route.splits) if route is not None else ""
            return Refusal(404, why.code, f"{model} does not route to a version {pin!r}; it has: {names or 'none'}")
        return Refusal(
            503, why.code, f"{model} has no ready instance: try again shortly, or look at: turnout get", retry_after=1
        )

    def _answer_local(self, request: Request) -> None:
        """Answers that need no engine."""
        ctx, path = self._ctx, request.head.path
        handler = ctx.local.get(path)
        if path.startswith(b"/v1/models"):
            known = self._models(path)
        elif handler is not None:
            known = None
        else:
            known = Refusal(404, "path_not_found", "turnout passes on the data paths under /v1 and nothing else")
        if isinstance(known, Refusal):
            self._refuse(known, request)
        elif request.head.method != b"GET":
            self._refuse(Refusal(405, "method_not_allowed", "use GET"), request)
        elif known is not None:
            self._answer(request, json_response(200, known, request.id, not request.keep_alive))
        elif handler is not None:
            local = handler(request)
            self._answer(
                request, json_response(local.status, local.body, request.id, not request.keep_alive, b"", local.kind)
            )

    def _models(self, path: bytes) -> bytes | Refusal:
        """``/v1/models`` and ``/v1/models/ID``: what is registered, whatever the engines' state."""
        manager = self._ctx.manager
        if path == b"/v1/models":
            listed = [_model(name) for name in manager.models()]
            return msgspec.json.encode({"object": "list", "data": listed})
        name = requests.model_in_path(path)
        if path.startswith(b"/v1/models/") and name in manager.models():
            return msgspec.json.encode(_model(name))
        return self._no_route(NoRoute("model_not_found"), name, "")

    def _answer(self, request: Request, answer: bytes) -> None:
        self.write(answer)
        self.answer_ended(keep=request.keep_alive)

    def _refuse(self, refusal: Refusal, request: Request) -> None:
        self._answer_error(refusal, request)
        self.answer_ended(keep=request.keep_alive)

    def _answer_error(self, refusal: Refusal, request: Request) -> None:
        self._ctx.metrics.refuse(refusal.status)
        close = not request.keep_alive or self._ctx.stopping
        self.write(response(refusal, request.id, close))

    def _refuse_and_close(self, refusal: Refusal) -> None:
        """Say why, take no more, and close when the client has had time to read it."""
        self._ctx.metrics.refuse(refusal.status)
        self._closing = True
        self._buffer = b""
        self._parts.clear()
        self._chunks = self._head = None
        self.write(response(refusal, self._ctx.request_id(), close=True))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.deadline = self._ctx.now + LINGER_S

    def _close(self) -> None:
        """Close when all is sent; a client that does not take it is not waited for without end."""
        self._closing = True
        self.deadline = self._ctx.now + self._ctx.settings.stalled_s
        self.transport.close()


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "turnout"}


def _too_large(most: int) -> BadRequest:
    return BadRequest(413, "body_too_large", f"the body is larger than {most} bytes")


def _refuse_bare_line_feeds(data: bytes) -> None:
    """A head whose lines end in bare LF would never seem complete: say so at once."""
    if data.count(b"\n") != data.count(b"\r\n"):
        raise BadRequest(400, "request_invalid", "lines of a request end in CR LF")
