"""Connections to engines: kept alive, taken and given back, and the one place that reads their bytes.

Knows no route and no client. Whoever sends a request is an :class:`Exchange`; every outcome is one call on it. Errors
of the libraries below end here: an exchange hears ``connect_failed`` or ``upstream_lost`` and nothing else.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import urlsplit

import httptools

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine

    from turnout.workers.gateway.settings import GatewaySettings


class Exchange(Protocol):
    """One request on its way through a connection."""

    def connected(self, connection: UpstreamConnection) -> None:
        """A fresh connection, asked for with ``connect``; the exchange owns it now."""
        ...

    def connect_failed(self, reason: str) -> None:
        """There is none to be had."""
        ...

    def upstream_data(self, data: bytes) -> None:
        """Bytes of the answer, already seen by the connection's parser."""
        ...

    def upstream_lost(self, reason: str) -> None:
        """The connection is gone, or what came is no HTTP; empty where the engine closed it in order."""
        ...


class Target:
    """Where an address leads: ``unix:/run/i.sock``, or ``http://host:port`` with an optional base path.

    ``live``: a route leads there. ``idle``: unused connections, the newest last. ``held``: a connection that never
    carries a request: by it the engine's worker sees that somebody routes there (see ``Pool.keep``).
    """

    __slots__ = ("base", "held", "holding", "host", "host_line", "idle", "live", "path", "port")

    def __init__(self, address: str) -> None:
        """Read an address.

        Raises:
            ValueError: it is neither of the two.
        """
        self.idle: dict[UpstreamConnection, None] = {}
        self.held: UpstreamConnection | None = None
        self.holding = False
        self.live = False
        self.path = ""
        self.host, self.port, self.base = "localhost", 0, b""
        if address.startswith("unix:"):
            self.path = address.removeprefix("unix:")
            self.host_line = b" HTTP/1.1\r\nhost: localhost\r\n"
            return
        url = urlsplit(address)
        if url.scheme != "http" or not url.hostname:
            raise ValueError(f"{address!r} is no engine address: give unix:/PATH or http://HOST:PORT")
        self.host, self.port = url.hostname, url.port or 80
        # Users are used to base URLs that end in /v1, and every path that is sent on begins with it.
        self.base = url.path.rstrip("/").removesuffix("/v1").encode()
        self.host_line = b" HTTP/1.1\r\nhost: %b\r\n" % url.netloc.rpartition("@")[2].encode()


class Shape:
    """The head of an answer, read: engines send the same one again and again but for date and length.

    Attributes:
        raw: as it came, without its empty line.
        clean: as it goes on: HTTP/1.1, without what is meant for the engine's connection only.
        status: of the answer.
        chunked: its body comes in chunks; ``sized``: it has a Content-Length. With neither it ends with the connection.
        stream: it is a stream of events.
    """

    __slots__ = ("chunked", "clean", "raw", "sized", "status", "stream")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.status = int(raw[9:12])
        clean = _HOP.sub(b"", raw)
        self.clean = b"HTTP/1.1" + clean[8:]
        lower = clean.lower()
        self.chunked = b"\r\ntransfer-encoding:" in lower
        self.sized = b"\r\ncontent-length:" in lower or self.status in (204, 304)
        self.stream = b"\r\ncontent-type: text/event-stream" in lower

    def without_chunks(self) -> bytes:
        """``clean`` for a client that knows no chunks."""
        return _TRANSFER_ENCODING.sub(b"", self.clean)


# Hop-by-hop headers of the engine's connection, and names that only the gateway may set.
_HOP = re.compile(
    rb"\r\n(?:connection|keep-alive|proxy-connection|proxy-authenticate|te|trailer|upgrade|x-request-id|x-turnout-[^:\r]*)"
    rb"[ \t]*:[^\r]*",
    re.IGNORECASE,
)
_TRANSFER_ENCODING = re.compile(rb"\r\ntransfer-encoding[ \t]*:[^\r]*", re.IGNORECASE)


class UpstreamConnection(asyncio.Protocol):
    """One connection to an engine. The parser finds the end of the answer; the bytes go on as they came.

    Attributes:
        complete: the answer has ended.
        keep: the engine lets the connection stand after the answer that has ended.
        in_chunk: between a chunk's size line and its end.
        uses: requests that it has carried, the current one included.
        shape: the newest answer's head, to know it again.
    """

    __slots__ = (
        "_extra",
        "_feed",
        "_parser",
        "_pool",
        "complete",
        "exchange",
        "idle_since",
        "in_chunk",
        "keep",
        "shape",
        "target",
        "transport",
        "uses",
    )

    transport: asyncio.Transport

    def __init__(self, pool: Pool, target: Target) -> None:
        self._pool = pool
        self.target = target
        self.exchange: Exchange | None = None
        self.shape: Shape | None = None
        self.uses = 0
        self.idle_since = 0.0
        self.complete = False
        self.keep = False
        self.in_chunk = False
        self._extra = False
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._feed: Callable[[bytes], object] = self._parser.feed_data

    def send(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        """Send a request; the exchange hears of the answer."""
        self.exchange = exchange
        self.uses += 1
        self.complete = False
        if len(body) < 65536:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)

    def discard(self) -> None:
        """Close at once; the exchange hears nothing more. For an engine this is the client's disconnect."""
        self.exchange = None
        self._pool.forget(self)
        self.transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer."""
        exchange = self.exchange
        if exchange is None:  # an engine that speaks unasked can't be trusted with the next request
            self.discard()
            return
        try:
            self._feed(data)
        except httptools.HttpParserError as e:
            self.discard()
            exchange.upstream_lost(f"the engine's answer is not HTTP: {e}")
            return
        if self._extra:
            # More than one answer to one request: what is behind the end must not reach the client.
            self.discard()
            exchange.upstream_lost("the engine sent more than its answer")
            return
        exchange.upstream_data(data)

    def eof_received(self) -> None:
        """The engine will send no more: close."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._pool.forget(self)
        exchange, self.exchange = self.exchange, None
        self._parser = None  # parser and connection refer to each other
        self._feed = _nothing
        if exchange is not None:
            exchange.upstream_lost("" if exc is None else f"{type(exc).__name__}: {exc}")

    # httptools

    def on_message_begin(self) -> None:
        """An answer begins; after the end of one there must be none."""
        if self.complete:
            self._extra = True

    def on_chunk_header(self) -> None:
        """A chunk begins."""
        self.in_chunk = True

    def on_chunk_complete(self) -> None:
        """A chunk has ended."""
        self.in_chunk = False

    def on_message_complete(self) -> None:
        """The answer has ended; an interim one (1xx) is followed by another."""
        parser = self._parser
        if parser is not None and parser.get_status_code() >= 200:
            self.keep = parser.should_keep_alive()
            self.complete = True


class Pool:
    """Unused connections, by address; the newest is taken first, so that the rest can grow old and go."""

    def __init__(self, settings: GatewaySettings, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._loop = loop
        self._targets: dict[str, Target] = {}
        self._live: Collection[str] = frozenset[str]()
        self._connecting: set[asyncio.Task[None]] = set()

    def target(self, address: str) -> Target:
        """What the address means, read once."""
        target = self._targets.get(address)
        if target is None:
            target = self._targets[address] = Target(address)
            target.live = address in self._live
        return target

    def take(self, address: str) -> UpstreamConnection | None:
        """An unused connection, None where there is none."""
        target = self._targets.get(address)
        while target is not None and target.idle:
            connection = target.idle.popitem()[0]
            if not connection.transport.is_closing():
                return connection
        return None

    def connect(self, address: str, exchange: Exchange) -> None:
        """Open a connection; the exchange hears ``connected`` or ``connect_failed``."""
        self._start(self._connect(address, exchange))

    def give_back(self, connection: UpstreamConnection, now: float) -> None:
        """The exchange is over. Kept if the engine allows it and a route still leads there, else closed."""
        connection.exchange = None
        target, transport = connection.target, connection.transport
        if (
            connection.keep
            and target.live
            and len(target.idle) < self._settings.pool_most
            and not transport.is_closing()
            and not transport.get_write_buffer_size()  # else it answered before it had read the request
        ):
            connection.idle_since = now
            target.idle[connection] = None
        else:
            transport.close()

    def forget(self, connection: UpstreamConnection) -> None:
        """It is closing or closed."""
        connection.target.idle.pop(connection, None)

    def keep(self, addresses: Collection[str]) -> None:
        """Routes lead to these from now on.

        Unused connections to others are closed at once: an engine without any connection is known to be quiet. To each
        of these one connection is held, used or not: a gateway that is cut off from the control plane is still seen by
        the workers of the engines that it routes to (invariant 2).
        """
        self._live = addresses
        for address, target in tuple(self._targets.items()):
            target.live = address in addresses
            if not target.live:
                del self._targets[address]
                for connection in tuple(target.idle):
                    connection.transport.close()
                target.idle.clear()
                if target.held is not None:
                    target.held.transport.close()
        for address in addresses:
            self._hold(address)

    def sweep(self, now: float) -> None:
        """Close what has been unused for too long; hold again what the engine has let go."""
        for address in self._live:
            self._hold(address)
        oldest = now - self._settings.pool_idle_s
        for target in self._targets.values():
            stale: list[UpstreamConnection] = []
            for connection in target.idle:  # in the order of being given back
                if connection.idle_since > oldest:
                    break
                stale.append(connection)
            for connection in stale:
                del target.idle[connection]
                connection.transport.close()

    def idle(self) -> int:
        """Unused connections."""
        return sum(len(target.idle) for target in self._targets.values())

    async def close(self) -> None:
        """Close everything unused, and give up what is being opened."""
        self.keep(frozenset())
        for task in tuple(self._connecting):
            task.cancel()
        if self._connecting:
            await asyncio.wait(tuple(self._connecting))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def _hold(self, address: str) -> None:
        """See that one connection to the address is held; one that can't be had is tried again by the next sweep."""
        try:
            target = self.target(address)
        except ValueError:  # no address: the first request that is sent there says so
            return
        if not target.holding and (target.held is None or target.held.transport.is_closing()):
            target.holding = True
            self._start(self._open_held(target))

    async def _open_held(self, target: Target) -> None:
        try:
            connection = await self._open(target)
        except OSError:  # includes TimeoutError; the engine is not there now
            return
        finally:
            target.holding = False
        if target.live:
            target.held = connection
        else:
            connection.transport.close()

    async def _connect(self, address: str, exchange: Exchange) -> None:
        try:
            connection = await self._open(self.target(address))
        except TimeoutError:
            exchange.connect_failed(f"no connection within {self._settings.connect_s:g} s")
        except (OSError, ValueError) as e:
            exchange.connect_failed(f"{type(e).__name__}: {e}")
        else:
            exchange.connected(connection)

    async def _open(self, target: Target) -> UpstreamConnection:
        async with asyncio.timeout(self._settings.connect_s):
            if target.path:
                _, connection = await self._loop.create_unix_connection(
                    lambda: UpstreamConnection(self, target), target.path
                )
            else:
                _, connection = await self._loop.create_connection(
                    lambda: UpstreamConnection(self, target), target.host, target.port
                )
        return connection


def _nothing(_: bytes) -> None:
    """What a closed connection does with bytes."""
