"""Connections to engines: kept alive, taken and given back, and the one place that reads their bytes.

Knows no route and no client. Whoever sends a request is an :class:`Exchange`; every outcome is one call on it. Errors
of the libraries below end here: an exchange hears ``connect_failed`` or ``upstream_lost`` and nothing else.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import urlsplit

import httptools

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

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
    """Where an address leads: ``unix:/run/i.sock``, or ``http://host:port`` with an optional base path."""

    __slots__ = ("base", "host", "host_line", "idle", "path", "port")

    def __init__(self, address: str) -> None:
        """Read an address.

        Raises:
            ValueError: it is neither of the two.
        """
        self.idle: dict[UpstreamConnection, None] = {}
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


class UpstreamConnection(asyncio.Protocol):
    """One connection to an engine. The parser finds the end of the answer; the bytes go on as they came.

    Attributes:
        complete: the answer has ended.
        status: of the answer, 0 until its head is there.
        in_chunk: between a chunk's size line and its end.
        uses: requests that it has carried, the current one included.
    """

    __slots__ = (
        "_feed",
        "_parser",
        "_pool",
        "_seen",
        "address",
        "complete",
        "exchange",
        "idle_since",
        "in_chunk",
        "keep",
        "status",
        "transport",
        "uses",
    )

    transport: asyncio.Transport

    def __init__(self, pool: Pool, address: str) -> None:
        self._pool = pool
        self.address = address
        self.exchange: Exchange | None = None
        self.uses = 0
        self.idle_since = 0.0
        self.complete = False
        self.keep = False
        self.status = 0
        self.in_chunk = False
        self._seen = 0
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._feed: Callable[[bytes], object] = self._parser.feed_data

    def send(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        """Send a request; the exchange hears of the answer."""
        self.exchange = exchange
        self.uses += 1
        self.complete = self.keep = self.in_chunk = False
        self.status = self._seen = 0
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
        if self._seen > 1 and self.complete:
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
        """An answer begins."""
        self._seen += 1

    def on_headers_complete(self) -> None:
        """The head is there."""
        if self._parser is not None:
            self.status = self._parser.get_status_code()

    def on_chunk_header(self) -> None:
        """A chunk begins."""
        self.in_chunk = True

    def on_chunk_complete(self) -> None:
        """A chunk has ended."""
        self.in_chunk = False

    def on_message_complete(self) -> None:
        """The answer has ended; an interim one (1xx) is followed by another."""
        if self._parser is None:
            return
        if self.status < 200:
            self._seen -= 1
            return
        self.keep = self._parser.should_keep_alive()
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
        task = self._loop.create_task(self._connect(address, exchange))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def give_back(self, connection: UpstreamConnection, now: float) -> None:
        """The exchange is over. Kept if the engine allows it and a route still leads there, else closed."""
        connection.exchange = None
        address = connection.address
        target = self._targets.get(address)
        if (
            not connection.keep
            or address not in self._live
            or target is None
            or len(target.idle) >= self._settings.pool_most
            or connection.transport.is_closing()
            or connection.transport.get_write_buffer_size()  # it answered before it had read the request
        ):
            connection.transport.close()
            return
        connection.idle_since = now
        target.idle[connection] = None

    def forget(self, connection: UpstreamConnection) -> None:
        """It is closing or closed."""
        target = self._targets.get(connection.address)
        if target is not None:
            target.idle.pop(connection, None)

    def keep(self, addresses: Collection[str]) -> None:
        """Routes lead to these from now on.

        Unused connections to others are closed at once: an engine without any connection is known to be quiet.
        """
        self._live = addresses
        for address in [address for address in self._targets if address not in addresses]:
            for connection in self._targets.pop(address).idle:
                connection.transport.close()

    def sweep(self, now: float) -> None:
        """Close what has been unused for too long."""
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

    async def _connect(self, address: str, exchange: Exchange) -> None:
        try:
            target = self.target(address)
            async with asyncio.timeout(self._settings.connect_s):
                if target.path:
                    _, connection = await self._loop.create_unix_connection(
                        lambda: UpstreamConnection(self, address), target.path
                    )
                else:
                    _, connection = await self._loop.create_connection(
                        lambda: UpstreamConnection(self, address), target.host, target.port
                    )
        except TimeoutError:
            exchange.connect_failed(f"no connection within {self._settings.connect_s:g} s")
        except (OSError, ValueError) as e:
            exchange.connect_failed(f"{type(e).__name__}: {e}")
        else:
            exchange.connected(connection)


def _nothing(_: bytes) -> None:
    """What a closed connection does with bytes."""
