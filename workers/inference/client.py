"""One HTTP request to an engine, over a Unix socket or TCP, on a connection of its own. Knows no engine.

A new connection each time: the worker's own must be gone when it counts those of others (quiet.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import urlsplit

import httptools
import msgspec

#: A probe's answer is small; what is larger is no answer to a probe.
LIMIT_BYTES = 16 << 20
_READ_BYTES = 1 << 16


class Unreachable(Exception):
    """No answer: refused, broken off, too late, or not HTTP. ``refused``: nobody listens there (yet)."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class Reply(msgspec.Struct, frozen=True):
    """A whole answer. Header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Target(msgspec.Struct, frozen=True):
    """An address, taken apart: a socket path, or host and port; ``base`` goes before every path."""

    socket: str = ""
    host: str = ""
    port: int = 0
    base: str = ""


def target(address: str) -> Target:
    """Read ``unix:/path`` or ``http://host:port/base``.

    Raises:
        ValueError: it is neither.
    """
    if address.startswith("unix:"):
        return Target(socket=address[5:])
    parts = urlsplit(address)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{address!r} is neither unix:/path nor http://host:port")
    return Target(host=parts.hostname, port=parts.port or 80, base=parts.path.rstrip("/"))


class _Answer:
    """Callbacks of the parser."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.size = 0
        self.done = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)
        self.size += len(body)

    def on_message_complete(self) -> None:
        self.done = True


async def ask(
    address: str, path: str, *, method: str = "GET", body: bytes = b"", timeout_s: float, kind: str = "application/json"
) -> Reply:
    """Send one request and read its whole answer.

    Raises:
        Unreachable: there was none within ``timeout_s``.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _ask(target(address), path, method, body, kind)
    except TimeoutError:
        raise Unreachable(f"no answer from {path} within {timeout_s:g} s") from None
    except (ConnectionRefusedError, FileNotFoundError) as e:
        raise Unreachable(f"nobody listens at {address}", refused=True) from e
    except (OSError, httptools.HttpParserError) as e:
        raise Unreachable(f"{path} broke off: {str(e) or type(e).__name__}") from e


async def _ask(to: Target, path: str, method: str, body: bytes, kind: str) -> Reply:
    if to.socket:
        reader, writer = await asyncio.open_unix_connection(to.socket)
    else:
        reader, writer = await asyncio.open_connection(to.host, to.port)
    try:
        host = f"{to.host}:{to.port}" if to.host else "localhost"
        head = f"{method} {to.base}{path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\naccept: */*\r\n"
        if body:
            head += f"content-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        while not answer.done:
            data = await reader.read(_READ_BYTES)
            if not data:
                if "content-length" in answer.headers or "chunked" in answer.headers.get("transfer-encoding", ""):
                    raise ConnectionResetError("the connection was closed in the middle of the answer")
                if not answer.headers:
                    raise ConnectionResetError("the connection was closed without an answer")
                break  # an answer without a length ends with the connection
            parser.feed_data(data)
            if answer.size > LIMIT_BYTES:
                raise ConnectionResetError(f"the answer is larger than {LIMIT_BYTES} bytes")
        return Reply(parser.get_status_code(), answer.headers, b"".join(answer.parts))
    finally:
        writer.transport.abort()
