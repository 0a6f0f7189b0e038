"""Answers that the gateway gives itself, in OpenAI's error shape. Never an empty body, never a silent end."""

from __future__ import annotations

from http import HTTPStatus

import msgspec


class Refusal(msgspec.Struct, frozen=True):
    """An error answer. ``message`` says what to do; ``code`` is stable; ``retry_after`` in seconds, 0 for none."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: int = 0

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> bytes:
        """``{"error": {"message", "type", "param", "code"}}``."""
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )


def response(refusal: Refusal, request_id: bytes, close: bool) -> bytes:
    """The whole answer."""
    extra = b"retry-after: %d\r\n" % refusal.retry_after if refusal.retry_after else b""
    if refusal.status == 405:
        extra += b"allow: GET, POST, DELETE\r\n"
    return json_response(refusal.status, refusal.body(), request_id, close, extra)


def json_response(
    status: int, body: bytes, request_id: bytes, close: bool, extra: bytes = b"", kind: bytes = b"application/json"
) -> bytes:
    """An answer with a body that is there in full."""
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b%b\r\n%b" % (
        status,
        HTTPStatus(status).phrase.encode(),
        kind,
        len(body),
        b"x-request-id: %b\r\n" % request_id if request_id else b"",
        extra,
        b"connection: close\r\n" if close else b"",
        body,
    )


def stream_error(path: bytes, code: str, message: str) -> bytes:
    """The event that ends a stream which can't go on, in the words of the API that the path belongs to."""
    if path.startswith(b"/v1/messages"):
        failure: object = {"type": "error", "error": {"type": "api_error", "message": message}}
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(failure)
    if path.startswith(b"/v1/responses"):
        failure = {"type": "error", "code": code, "message": message, "param": None}
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(failure)
    failure = {"error": {"message": message, "type": "server_error", "param": None, "code": code}}
    return b"data: %b\n\n" % msgspec.json.encode(failure)
