"""Clients that never rest, in a process of their own: streams, and one prober that asks for single tokens all the time.

Every request is written down with its times (CLOCK_MONOTONIC, nanoseconds), the version that answered it and how it
ended: *ok*, *failed* (no answer or not 200) or *cut* (a stream that began and did not end as the protocol says). The
prober's requests are short, so they show to about a millisecond when a change reaches the clients.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import select
import time
from typing import TYPE_CHECKING

import load
import msgspec

if TYPE_CHECKING:
    import socket
    from multiprocessing.synchronize import Event
    from pathlib import Path
    from typing import Self

_VERSION = re.compile(rb"x-turnout-version: *(\S+)", re.IGNORECASE)


class Asked(msgspec.Struct, gc=False):
    """One request. ``probe``: it was the prober's."""

    sent_ns: int
    first_ns: int
    ended_ns: int
    version: str
    outcome: str
    reason: str
    probe: bool


class _Client:
    """One connection and the request that runs on it."""

    def __init__(self, port: int, message: bytes, *, probe: bool) -> None:
        self._port = port
        self._message = message
        self._probe = probe
        self._data = b""
        self._sent_ns = self._first_ns = 0
        self.socket: socket.socket | None = None

    def send(self) -> None:
        """Send the next request, over a new connection where there is none."""
        if self.socket is None:
            self.socket = load.connect(self._port)
            self.socket.setblocking(False)
        self._data, self._first_ns = b"", 0
        self._sent_ns = time.monotonic_ns()
        with contextlib.suppress(OSError):  # the read says what happened
            self.socket.send(self._message)

    def read(self) -> Asked | None:
        """Take what has come; the request's record where it has ended."""
        assert self.socket is not None
        try:
            got = self.socket.recv(65536)
        except OSError:
            got = b""
        if got and not self._first_ns:
            self._first_ns = time.monotonic_ns()
        self._data += got
        try:
            if got and not load.answered(self._data):
                return None
        except ValueError as e:
            return self._ended("failed", str(e))
        if not got:
            where = "in the middle of the answer" if self._data else "before the answer"
            return self._ended("cut" if self._data else "failed", f"the connection was closed {where}")
        if self._probe:
            return self._ended("ok", "")
        if b'data: {"error"' in self._data:
            return self._ended("cut", "the stream ended with an error event")
        whole = b"data: [DONE]" in self._data and b'"finish_reason":"' in self._data
        return self._ended("ok", "") if whole else self._ended("cut", "the stream had no finish reason or no [DONE]")

    def _ended(self, outcome: str, reason: str) -> Asked:
        if outcome != "ok":
            self.close()
        found = _VERSION.search(self._data)
        version = found[1].decode() if found else ""
        now_ns = time.monotonic_ns()
        return Asked(self._sent_ns, self._first_ns or now_ns, now_ns, version, outcome, reason, self._probe)

    def close(self) -> None:
        """Close the connection."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def _run(port: int, streaming: int, tokens: int, stop: Event, path: str) -> None:
    stream = load.request(load.body(chunks=tokens))
    probe = load.request(load.body(max_tokens=1))
    epoll = select.epoll()
    seen: list[Asked] = []
    clients: dict[int, _Client] = {}

    def start(client: _Client) -> None:
        client.send()
        assert client.socket is not None
        fd = client.socket.fileno()
        if fd not in clients:
            epoll.register(fd, select.EPOLLIN)
        clients[fd] = client

    for _ in range(streaming):
        start(_Client(port, stream, probe=False))
        time.sleep(0.005)  # so that they don't run in step
    start(_Client(port, probe, probe=True))
    while clients:
        for fd, _ in epoll.poll(1):
            client = clients[fd]
            asked = client.read()
            if asked is None:
                continue
            seen.append(asked)
            if client.socket is None or stop.is_set():  # a closed socket has left the epoll by itself
                del clients[fd]
                if client.socket is not None:
                    epoll.unregister(fd)
                    client.close()
            if not stop.is_set():
                start(client)
    with open(path, "wb") as out:
        out.write(msgspec.msgpack.encode(seen))


class Busy:
    """The running clients. Use it as a context manager; ``stop`` returns what they saw."""

    def __init__(self, port: int, streaming: int, tokens: int, path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._path = path
        self._process = context.Process(target=_run, args=(port, streaming, tokens, self._stop, str(path)), daemon=True)
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def stop(self) -> list[Asked]:
        """Let every request end, then return them all."""
        self._stop.set()
        self._process.join(120)
        if self._process.exitcode != 0:
            raise RuntimeError(f"the clients ended with {self._process.exitcode}")
        return msgspec.msgpack.decode(self._path.read_bytes(), type=list[Asked])
