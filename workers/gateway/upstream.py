"""Connections to engines: kept alive, taken and given back, and the one place that reads their bytes.

Knows no route and no client. Whoever sends a request is an :class:`Exchange`; every outcome is one call on it. Errors
of the libraries below end here: an exchange hears ``connect_failed`` or ``upstream_lost`` and nothing else.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import urlsplit

import httptools

from turnout.workers.gateway.answer import HEAD_MOST_BYTES, BadAnswer, Chunks, Shape

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine

    from turnout.workers.gateway.settings import GatewaySettings

#: A larger body is written by itself and not copied behind its head.
_JOINED_MOST_BYTES = 65536


class RequestHead(Protocol):
    """A request's head, as a client has sent it."""

    def for_engine(self, target: Target, id: bytes, body: bytes, alone: bool = False) -> bytes:
        """The request as an engine gets it, or its head ``alone``."""
        ...


class Exchange(Protocol):
    """One request on its way through a connection."""

    def connected(self, connection: UpstreamConnection) -> None:
        """A fresh connection, asked for with ``connect``; the exchange owns it now."""
        ...

    def connect_failed(self, reason: str) -> None:
        """There is none to be had."""
        ...

    def upstream_answer(self, shape: Shape, data: bytes, at: int) -> None:
        """The head of the answer, as ``shape`` says; its body begins at ``data[at]``, as far as it has come."""
        ...

    def upstream_data(self, data: bytes, last: bool) -> None:
        """More of its body; ``last``: to its end."""
        ...

    def upstream_lost(self, reason: str) -> None:
        """The connection is gone, or what came is no HTTP; empty where the engine closed it in order."""
        ...


class Target:
    """Where an address leads: ``unix:/run/i.sock``, or ``http://host:port`` with an optional base path.

    ``live``: a route leads there. ``idle``: unused connections, the newest last. ``held``: a connection that never
    carries a request: by it the engine's worker sees that somebody routes there (see ``Pool.keep``). ``sized`` and
    ``other``: the newest heads of answers with a length and without, to know them again.
    """

    __slots__ = ("base", "held", "holding", "host", "host_line", "idle", "live", "other", "path", "port", "sized")

    def __init__(self, address: str) -> None:
        """Read an address.

        Raises:
            ValueError: it is neither of the two.
        """
        self.idle: dict[UpstreamConnection, None] = {}
        self.held: UpstreamConnection | None = None
        self.holding = False
        self.live = False
        self.sized: Shape | None = None
        self.other: Shape | None = None
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
    """One connection to an engine. It finds the end of the answer; the bytes go on as they came.

    Attributes:
        complete: the answer has ended.
        keep: the engine lets the connection stand after the answer.
        uses: requests that it has carried, the current one included.
    """

    __slots__ = (
        "_chunks",
        "_following",
        "_left",
        "_part",
        "_pool",
        "_shape",
        "complete",
        "exchange",
        "idle_since",
        "keep",
        "target",
        "transport",
        "uses",
    )

    transport: asyncio.Transport

    def __init__(self, pool: Pool, target: Target) -> None:
        self._pool = pool
        self.target = target
        self.exchange: Exchange | None = None
        self.uses = 0
        self.idle_since = 0.0
        self.complete = False
        self.keep = False
        self._shape: Shape | None = None  # of the current answer, once its head is there
        self._part = b""  # of a head that is not
        self._left = 0  # bytes of a body with a length that have not come
        self._chunks: Chunks | None = None  # made for the first answer that comes in chunks
        self._following: Chunks | None = None  # the same, while the current answer comes in chunks

    @property
    def heard(self) -> bool:
        """Whether anything of the current answer has come."""
        return self._shape is not None or bool(self._part)

    def between_chunks(self) -> bool:
        """Whether the answer comes in chunks, and the next one could begin here; it must be given up then."""
        return self._following is not None and self._following.between()

    def send(self, exchange: Exchange, head: RequestHead, id: bytes, body: bytes) -> None:
        """Send a request; the exchange hears of the answer."""
        self.exchange = exchange
        self.uses += 1
        self.complete = False
        self._shape = self._following = None
        if len(body) < _JOINED_MOST_BYTES:
            self.transport.write(head.for_engine(self.target, id, body))
        else:
            self.transport.write(head.for_engine(self.target, id, body, alone=True))
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
            chunks = self._following
            if chunks is not None:
                chunks.feed(data)
                if chunks.ended:
                    self._end()
                exchange.upstream_data(data, chunks.ended)
                return
            if self._shape is not None:
                if self._shape.sized:
                    self._left -= len(data)
                    if self._left <= 0:
                        self._end()
                exchange.upstream_data(data, self.complete)
                return
            known = self.target.sized
            if known is not None and not self._part:
                start = known.start
                end = data.find(b"\r", start, start + 20)
                at = end + known.after_bytes
                # Slices, because they cost less than startswith().
                if data[:start] == known.before and data[end:at] == known.after:
                    digits = data[start:end]
                    if digits.isdigit():
                        self._shape = known
                        self.keep = known.keep
                        left = self._left = int(digits) + at - len(data)
                        if not left:
                            self.complete = True
                        elif left < 0:
                            self._end()
                        exchange.upstream_answer(known, data, at)
                        return
            self._read_head(exchange, self._part + data)
        except BadAnswer as e:
            self.discard()
            exchange.upstream_lost(str(e))
        except httptools.HttpParserError as e:
            self.discard()
            exchange.upstream_lost(f"the engine's answer is not HTTP: {e}")

    def eof_received(self) -> None:
        """The engine will send no more: close."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._pool.forget(self)
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.upstream_lost("" if exc is None else f"{type(exc).__name__}: {exc}")
        if self._chunks is not None:
            self._chunks.close()

    def _read_head(self, exchange: Exchange, data: bytes) -> None:
        """Read a head that is not known yet, or not whole; interim ones (1xx) are for this connection only."""
        while (end := data.find(b"\r\n\r\n")) >= 0:
            target, raw, at = self.target, data[:end], end + 4
            shape = target.other
            if shape is None or shape.raw != raw:
                shape = Shape(raw)
            if shape.status < 200:
                data = data[at:]
                continue
            self._part = b""
            if shape.before:
                target.sized = shape
            else:
                target.other = shape
            self._shape, self.keep = shape, shape.keep
            if shape.sized:
                self._left = shape.length + at - len(data)
                if self._left <= 0:
                    self._end()
            elif shape.chunked:
                if self._chunks is None:
                    self._chunks = Chunks()
                chunks = self._following = self._chunks
                chunks.ended = False
                chunks.feed(data)
                if chunks.ended:
                    self._end()
            exchange.upstream_answer(shape, data, at)
            return
        if len(data) > HEAD_MOST_BYTES:
            raise BadAnswer("the engine's answer has no end of its head")
        self._part = data

    def _end(self) -> None:
        """The last byte of the answer has come, and nothing behind it: that must not reach the client."""
        extra = self._left < 0 if self._following is None else self._following.extra
        if extra or self.complete:
            raise BadAnswer("the engine sent more than its answer")
        self.complete = True


class Pool:
    """Unused connections, by address; the newest is taken first, so that the rest can grow old and go."""

    def __init__(self, settings: GatewaySettings, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._most = settings.pool_most
        self._loop = loop
        self._targets: dict[str, Target] = {}
        self._live: Collection[str] = frozenset[str]()
        self._connecting: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()

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
        target = connection.target
        idle = target.idle
        if (
            connection.keep
            and target.live
            and len(idle) < self._most
            and not connection.transport.get_write_buffer_size()  # else it answered before it had read the request
        ):
            connection.idle_since = now
            idle[connection] = None
        else:
            connection.transport.close()

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
        self._moved.set()

    def holds(self, address: str) -> bool:
        """Whether the engine there has taken the connection that is held, and not let go of it."""
        target = self._targets.get(address)
        return target is not None and target.held is not None and not target.held.transport.is_closing()

    async def moved(self) -> None:
        """Returns once other addresses are live, or one more connection is held."""
        self._moved.clear()
        await self._moved.wait()

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
        if not target.holding and not self.holds(address):
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
            self._moved.set()
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
