"""OpenAI-like clients made of bare sockets, so that they cost less than what they measure. Linux only (epoll).

Closed loops: a connection sends its next request when the last answer has come to its end. Every answer is checked:
a status other than 200, or an end before the last byte, is counted as failed.
"""

from __future__ import annotations

import re
import select
import socket
import time

import msgspec

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_STAMP = re.compile(rb'"t=(\d+)"')
#: The last chunk, with the line break before it: a head may end in a value that ends in 0.
_LAST = b"\r\n0\r\n\r\n"
_PROMPT = "Explain in plain words how a railway turnout works, and why its blades may never stand half way. " * 6


class Flow(msgspec.Struct):
    """What a closed loop has seen: latencies in seconds of all answers that came, and how long it ran."""

    latencies_s: list[float]
    seconds: float
    failed: int

    @property
    def per_s(self) -> float:
        """Answers in a second."""
        return len(self.latencies_s) / self.seconds


class Stream(msgspec.Struct):
    """What streaming clients have seen: from the engine's write to the client's read, for each chunk, in seconds."""

    delays_s: list[float]
    streams: int
    failed: int


#: Headers of the official Python client.
HEADERS = {
    "Accept": "application/json",
    "Content-Type": "application/json",
    "User-Agent": "OpenAI/Python 3.54.0",
    "X-Stainless-Lang": "python",
    "X-Stainless-Async": "false",
    "X-Stainless-Retry-Count": "0",
    "Authorization": "Bearer sk-0123456789abcdef0123456789abcdef",
}


def body(model: str = "chat", *, chunks: int = 0, pause_us: int = 0, max_tokens: int = 64) -> bytes:
    """A chat request of about 1 kB; where ``chunks`` is given it asks for a stream of so many."""
    asked: dict[str, object] = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You teach railway engineering. Answer in three sentences."},
            {"role": "user", "content": _PROMPT},
        ],
        "max_tokens": chunks or max_tokens,
        "temperature": 0.7,
        "stream": bool(chunks),
    }
    if chunks:
        asked["seed"] = pause_us
    return msgspec.json.encode(asked)


def request(content: bytes) -> bytes:
    """The whole message around a body."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def connect(port: int) -> socket.socket:
    """A connection to 127.0.0.1, without Nagle's delay."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def answered(data: bytes) -> bool:
    """Whether these bytes of a connection hold the whole answer.

    Raises:
        ValueError: the status is not 200.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return False
    if not data.startswith(b"HTTP/1.1 200"):
        raise ValueError(data[:end].decode(errors="replace"))
    length = _LENGTH.search(data, 0, end)
    if length is None:
        return data.endswith(_LAST)
    return len(data) >= end + 4 + int(length[1])


class OneByOne:
    """One kept-alive connection that sends one request after the other."""

    def __init__(self, port: int, message: bytes) -> None:
        self._connection = connect(port)
        self._message = message

    def measure(self, requests: int) -> Flow:
        """Send so many requests."""
        clock = time.perf_counter
        send, receive = self._connection.sendall, self._connection.recv
        message, latencies = self._message, []
        begin = clock()
        for _ in range(requests):
            start = clock()
            send(message)
            data = receive(65536)
            while not answered(data):
                more = receive(65536)
                if not more:
                    raise ConnectionError("the connection was closed in the middle of an answer")
                data += more
            latencies.append(clock() - start)
        return Flow(latencies, clock() - begin, 0)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def many(port: int, message: bytes, connections: int, seconds: float) -> Flow:
    """Closed loops on so many connections for so long; the first tenth of the time is not counted."""
    clock = time.perf_counter
    epoll = select.epoll()
    sockets: dict[int, socket.socket] = {}
    parts: dict[int, bytes] = {}
    since: dict[int, float] = {}
    latencies: list[float] = []
    failed = 0
    for _ in range(connections):
        one = connect(port)
        one.setblocking(False)
        fd = one.fileno()
        sockets[fd], parts[fd] = one, b""
        epoll.register(fd, select.EPOLLIN)
    begin = clock()
    counted_from, stop = begin + seconds / 10, begin + seconds
    for fd, one in sockets.items():
        since[fd] = clock()
        one.send(message)
    now = begin
    while now < stop and sockets:
        for fd, _ in epoll.poll(1):
            one = sockets[fd]
            got = one.recv(65536)
            data = parts[fd] + got if parts[fd] else got
            try:
                whole = answered(data)
            except ValueError:
                got = b""
            if not got:
                failed += 1
                epoll.unregister(fd)
                sockets.pop(fd).close()
                continue
            if not whole:
                parts[fd] = data
                continue
            now = clock()
            if since[fd] >= counted_from:
                latencies.append(now - since[fd])
            parts[fd] = b""
            since[fd] = now
            one.send(message)
        now = clock()
    for one in sockets.values():
        one.close()
    epoll.close()
    return Flow(latencies, now - counted_from, failed)


def streams(port: int, message: bytes, connections: int, seconds: float) -> Stream:
    """Clients that read one stream after the other; their starts are spread, so that they do not beat in step."""
    clock = time.monotonic
    epoll = select.epoll()
    sockets: dict[int, socket.socket] = {}
    tails: dict[int, bytes] = {}
    delays: list[float] = []
    failed = finished = 0
    begin = clock()
    waiting = [(begin + n * 0.0137, connect(port)) for n in range(connections)]
    while clock() < begin + seconds and (sockets or waiting):
        while waiting and waiting[0][0] <= clock():
            one = waiting.pop(0)[1]
            one.setblocking(False)
            sockets[one.fileno()], tails[one.fileno()] = one, b""
            epoll.register(one.fileno(), select.EPOLLIN)
            one.send(message)
        for fd, _ in epoll.poll(0.005 if waiting else 1):
            one = sockets[fd]
            data = one.recv(65536)
            now_ns = time.monotonic_ns()
            if not data or not (tails[fd] or data.startswith(b"HTTP/1.1 200")):
                failed += 1
                epoll.unregister(fd)
                sockets.pop(fd).close()
                continue
            tails[fd] = (tails[fd] + data)[-len(_LAST) :]
            delays += [(now_ns - int(stamp)) / 1e9 for stamp in _STAMP.findall(data)]
            if tails[fd] == _LAST:
                finished += 1
                tails[fd] = b""
                one.send(message)
    for one in sockets.values():
        one.close()
    epoll.close()
    return Stream(delays, finished, failed)
