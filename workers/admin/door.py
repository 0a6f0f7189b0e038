"""What every request passes before the framework sees it: token, request id, time limit, names in paths, HEAD.

Plain ASGI around any app. Knows no resource and no client.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import msgspec
import structlog
from prometheus_client import Counter

from turnout.workers.admin import problems

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, MutableMapping

    from prometheus_client import CollectorRegistry

    from turnout.workers.admin.settings import AdminSettings
    from turnout.workers.clock import Clock

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Any, Any, Any], Awaitable[None]]

log = structlog.get_logger()

#: What is answered without a token: nothing of it says anything about models, or changes anything.
OPEN = frozenset(("/", "/healthz", "/metrics", "/openapi.json"))
#: Answers that have no end.
STREAMS = frozenset(("/v1/log/stream",))
_READS = frozenset(("GET", "HEAD", "OPTIONS"))
_CHANGES = frozenset(("POST", "PUT", "PATCH", "DELETE"))
#: What the framework is asked in place of a method. It has no route for TRACE, so its 405 names every method of a path,
#: where its own answer to OPTIONS names those of one handler (Litestar 2.25).
_ASKED_AS = {"HEAD": "GET", "OPTIONS": "TRACE"}
#: Counted for a client that left before its answer.
_GONE = 499
_REQUEST_ID_CHARACTERS_MOST = 128


class Door:
    """The app behind its door.

    Args:
        app: what is behind.
        token: that a request must carry.
        settings: limits.
        clock: makes request ids.
        registry: gets the counter of answers.
    """

    def __init__(
        self, app: App, token: str, settings: AdminSettings, clock: Clock, registry: CollectorRegistry
    ) -> None:
        self._app = app
        self._token = token.encode()
        self._settings = settings
        self._clock = clock
        self._running = 0
        self._answers = Counter(
            "turnout_admin_answers", "Answers of the management API.", ("method", "status"), registry=registry
        )

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One connection event of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[str, str] = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = _request_id(headers.get("x-request-id", "")) or self._clock.id("r-")
        exchange = _Exchange(scope["method"], request_id, receive, send)
        self._running += 1
        try:
            await self._pass(scope, headers, exchange)
        finally:
            self._running -= 1
            method, status = exchange.method, exchange.status or _GONE
            self._answers.labels(method if method in _READS or method in _CHANGES else "other", str(status)).inc()
            if method in _CHANGES:
                log.info("admin_answer", request=request_id, method=method, path=scope["path"], status=status)

    async def _pass(self, scope: MutableMapping[str, Any], headers: Mapping[str, str], exchange: _Exchange) -> None:
        path = _segments(scope)
        if path not in OPEN and not self._knows(headers.get("authorization", "")):
            reason = "the token is wrong" if "authorization" in headers else "the request has no token"
            hint = "send the header authorization: Bearer TOKEN; turnout up keeps it in .turnout/admin.token"
            await exchange.refuse(401, "token_invalid", reason, hint, {"www-authenticate": 'Bearer realm="turnout"'})
            return
        if self._running > self._settings.max_connections:
            reason = f"{self._running - 1} requests run already"
            await exchange.refuse(503, "admin_busy", reason, "send it again a little later", {"retry-after": "1"})
            return
        inner = {**scope, "path": path, "turnout_request": exchange.request_id}
        inner["method"] = _ASKED_AS.get(exchange.method, exchange.method)
        limit_s = None if path in STREAMS else self._settings.request_s
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                await self._app(inner, exchange.receive, exchange.send)
        except TimeoutError:
            if not limit.expired() or exchange.status:
                raise
            what = f"the request did not arrive whole, or had no answer, within {limit_s:g} s"
            await exchange.refuse(408, "request_timeout", what, "send it again with the same idempotency key")

    def _knows(self, authorization: str) -> bool:
        """Whether a header carries the token. Takes as long for every wrong one."""
        scheme, _, given = authorization.partition(" ")
        return hmac.compare_digest(given.strip().encode(), self._token) and scheme.lower() == "bearer"


class _Exchange:
    """One request and what was answered so far."""

    def __init__(self, method: str, request_id: str, receive: Receive, send: Send) -> None:
        self.method = method
        self.request_id = request_id
        self.status = 0
        self._receive = receive
        self._send = send
        self._head_done = False

    async def receive(self) -> Message:
        """The next part of the body; the answer to a HEAD is over with its head, also where it is a stream."""
        return {"type": "http.disconnect"} if self._head_done else await self._receive()

    async def send(self, message: Message) -> None:
        """A part of the answer; none of the body for HEAD."""
        if message["type"] == "http.response.start":
            allow = next((value for name, value in message.get("headers", ()) if name == b"allow"), b"")
            if self.method == "OPTIONS" and message["status"] == 405:
                message = {"type": "http.response.start", "status": 204}
            self.status = message["status"]
            given = [(n, v) for n, v in message.get("headers", ()) if n not in (b"cache-control", b"allow")]
            if allow:
                given.append((b"allow", b", ".join(sorted({*allow.split(b", "), b"OPTIONS", *_head(allow)}))))
            message["headers"] = [
                *given,
                (b"x-request-id", self.request_id.encode()),
                (b"cache-control", b"no-store"),
                (b"x-content-type-options", b"nosniff"),
            ]
        elif self.method == "HEAD" or self.status == 204:
            if self._head_done:
                return
            self._head_done = True
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def refuse(
        self, status: int, code: str, reason: str, hint: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with a problem."""
        body = msgspec.json.encode(problems.problem(status, code, reason, hint, self.request_id))
        said = {"content-type": problems.PROBLEM_JSON, "content-length": str(len(body)), **(headers or {})}
        raw = [(name.encode(), value.encode()) for name, value in said.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _head(allow: bytes) -> tuple[bytes, ...]:
    """What is served because GET is."""
    return (b"HEAD",) if b"GET" in allow.split(b", ") else ()


def _segments(scope: Mapping[str, Any]) -> str:
    """The path with its segments decoded one by one: a slash (and a percent sign) in a name stays written as %2F (%25).

    So ``/v1/models/meta-llama%2FLlama-3.1-8B`` is one name and not two segments; ``name`` reads it back.
    """
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    segments = raw.partition(b"?")[0].decode("latin-1").split("/")
    return "/".join(unquote(segment).replace("%", "%25").replace("/", "%2F") for segment in segments)


def name(segment: str) -> str:
    """A name out of a path segment."""
    return segment.replace("%2F", "/").replace("%25", "%")


def _request_id(given: str) -> str:
    """A client's own request id, where it may stand in a header and in a log."""
    fit = given.isascii() and given.isprintable() and len(given) <= _REQUEST_ID_CHARACTERS_MOST
    return given if fit else ""
