"""An engine that costs almost nothing, on a TCP port and on a Unix socket, so that a bench measures the proxy.

It answers as an OpenAI server does, as fast as uvloop can write. ``max_tokens`` of a streaming request is the number of
chunks and ``seed`` the microseconds between two of them; each chunk carries the time at which it was written
(CLOCK_MONOTONIC, nanoseconds, the same clock in every process of the machine).

    python bench/upstream.py --port 9000 --socket engine.sock
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import time

import uvloop

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"transfer-encoding: *chunked", re.IGNORECASE)
_STREAM = re.compile(rb'"stream" *: *true')
_MAX_TOKENS = re.compile(rb'"max_tokens" *: *(\d+)')
_SEED = re.compile(rb'"seed" *: *(\d+)')
_HEAD_END = b"\r\n\r\n"
_TEXT = (
    "A turnout lets a train pass from one track to another while it is moving; "
    "the blades lie against one rail or the other, never between them. "
)
_MORE = (
    "A motor or a hand lever throws both blades together through a rod, and a lock then holds the closed one until "
    "the last wheel has passed. Signals show what was set: no driver may trust a road that has not been proven, so a "
    "detector reports the gap on each side before any light turns green."
)


def _answer(body: str, status: str = "200 OK") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nserver: bench\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


_USAGE = '"usage":{"prompt_tokens":200,"completion_tokens":60,"total_tokens":260}'
CHAT = _answer(
    '{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1893456000,"model":"chat","choices":'
    '[{"index":0,"message":{"role":"assistant","content":"' + _TEXT + _MORE + '"},"logprobs":null,'
    '"finish_reason":"stop"}],' + _USAGE + "}"
)
_COMPLETION = _answer(
    '{"id":"cmpl-0123456789abcdef","object":"text_completion","created":1893456000,"model":"chat","choices":'
    '[{"index":0,"text":"' + _TEXT + '","logprobs":null,"finish_reason":"stop"}],' + _USAGE + "}"
)
_MODELS = _answer(
    '{"object":"list","data":[{"id":"chat","object":"model","created":1893456000,"owned_by":"bench",'
    '"max_model_len":4096}]}'
)
_OK = _answer("{}")
_MISSING = _answer('{"error":{"message":"no such path","type":"invalid_request_error"}}', "404 Not Found")
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: bench\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_CHUNK = (
    'data: {{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1893456000,"model":"chat",'
    '"choices":[{{"index":0,"delta":{{"content":"t={}"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def chunk() -> bytes:
    """One chunk of a stream, with the time in it."""
    text = _CHUNK.format(time.monotonic_ns())
    return f"{len(text):x}\r\n{text}\r\n".encode()


class _Connection(asyncio.Protocol):
    """One client. Requests on it come one after the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer = buffer = self._buffer + data if self._buffer else data
        end = buffer.find(_HEAD_END)
        if end < 0:
            return
        if (length := _LENGTH.search(buffer, 0, end)) is not None:
            if len(buffer) < end + 4 + int(length[1]):
                return
        elif _CHUNKED.search(buffer, 0, end) and not buffer.endswith(b"\r\n0\r\n\r\n"):
            return
        self._buffer = b""
        self._respond(buffer, end)

    def _respond(self, request: bytes, end: int) -> None:
        if request.startswith(b"POST /v1/chat/completions"):
            if _STREAM.search(request, end):
                chunks, pause_us = _MAX_TOKENS.search(request, end), _SEED.search(request, end)
                self._transport.write(STREAM_HEAD)
                self._chunk(int(chunks[1]) if chunks else 16, (int(pause_us[1]) if pause_us else 0) / 1e6)
            else:
                self._transport.write(CHAT)
        elif request.startswith(b"POST /v1/completions"):
            self._transport.write(_COMPLETION)
        elif request.startswith(b"GET /v1/models"):
            self._transport.write(_MODELS)
        elif request.startswith((b"GET /health", b"GET /metrics", b"GET /version", b"GET /ping")):
            self._transport.write(_OK)
        else:
            self._transport.write(_MISSING)

    def _chunk(self, left: int, pause_s: float) -> None:
        if left <= 0:
            self._transport.write(DONE)
            return
        self._transport.write(chunk())
        self._timer = self._loop.call_later(pause_s, self._chunk, left - 1, pause_s)


async def serve(port: int, socket: str) -> None:
    """Answer until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if port:
        await loop.create_server(lambda: _Connection(loop), "127.0.0.1", port, backlog=4096)
    if socket:
        await loop.create_unix_server(lambda: _Connection(loop), socket, backlog=4096)
    await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1")
    parser.add_argument("--socket", default="", help="path of a Unix socket")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.port, options.socket))


if __name__ == "__main__":
    main()
