"""A real gateway data plane on sockets, scripted engines behind it, and clients that speak raw HTTP.

Every scenario ends with nothing in flight, no connection and no task left: ``play`` sees to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop

from turnout.events.route import Endpoint, Hold, Split
from turnout.projections.routing import RouteView
from turnout.workers.clock import SystemClock
from turnout.workers.gateway.plane import DataPlane
from turnout.workers.gateway.settings import GatewaySettings, TimeLimits

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import SupportsIndex

    from turnout.workers.gateway.transition import Drained, Transition

BODY = b'{"model":"chat","messages":[{"role":"user","content":"hi"}],"stream":true}'
OK = b'{"object":"chat.completion"}'


class Ask:
    """One request as an engine got it."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.head = head
        self.body = body
        self.line, *lines = head.decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines if line]
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        self.names = [name.lower() for name, _, _ in pairs]


class Peer:
    """One connection that an engine has: what its script reads and writes."""

    def __init__(self, engine: Engine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.engine = engine
        self.reader = reader
        self.writer = writer

    async def ask(self) -> Ask:
        """The next request. Raises IncompleteReadError when the gateway has closed."""
        head = (await self.reader.readuntil(b"\r\n\r\n"))[:-4]
        length = Ask(head, b"").headers.get("content-length", "0")
        ask = Ask(head, await self.reader.readexactly(int(length)))
        self.engine.asked.append(ask)
        return ask

    async def send(self, *parts: bytes) -> None:
        """Send, each part in a write of its own."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def answer(self, body: bytes = OK, status: str = "200 OK", extra: bytes = b"") -> None:
        """A complete answer with Content-Length."""
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n".encode()
        await self.send(head + extra + b"\r\n" + body)

    async def begin_stream(self) -> None:
        """The head of a token stream."""
        await self.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    async def event(self, text: bytes) -> None:
        """One event in one chunk."""
        data = b"data: " + text + b"\n\n"
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end_stream(self) -> None:
        """``[DONE]`` and the last chunk."""
        await self.event(b"[DONE]")
        await self.send(b"0\r\n\r\n")

    async def gone(self) -> None:
        """Wait until the gateway has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    async def until(self, event: asyncio.Event) -> None:
        """Wait for the event. Raises ConnectionError when the gateway closes before."""
        waiting = asyncio.ensure_future(event.wait())
        leaving = asyncio.ensure_future(self.gone())
        try:
            await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not event.is_set():
                raise ConnectionError
        finally:
            for task in (waiting, leaving):
                task.cancel()
            await asyncio.wait((waiting, leaving))

    def reset(self) -> None:
        """Break the connection off."""
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


async def polite(peer: Peer) -> None:
    """Answer every request."""
    while True:
        await peer.ask()
        await peer.answer()


class _Reader(asyncio.StreamReader):
    """One that tells when the first byte, or the end, has come."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        super().feed_data(data)
        self.begun.set()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.begun.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.begun.set()


class Engine:
    """A scripted HTTP server on a Unix socket, or on TCP. ``script`` runs once for each connection that is used.

    Attributes:
        open: connections now that have carried a byte.
        connections: how many there ever were of those.
        held: connections now on which nothing has come yet, such as the one that a gateway holds.
        taken: connections that were ever opened.
    """

    def __init__(self, stage: Stage, name: str, script: Script, tcp: bool) -> None:
        self.name = name
        self.script = script
        self.asked: list[Ask] = []
        self.peers: list[Peer] = []
        self.open = self.connections = self.held = self.taken = 0
        self.address = f"unix:{stage.folder / name}.sock"
        self._tcp = tcp
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Engine:
        """Listen."""
        loop = asyncio.get_running_loop()
        if self._tcp:
            self._server = await loop.create_server(self._protocol, "127.0.0.1", 0)
            self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        else:
            self._server = await loop.create_unix_server(self._protocol, self.address.removeprefix("unix:"))
        return self

    def let_go(self) -> None:
        """Close every connection, as an engine does that has grown tired of them."""
        for peer in self.peers:
            peer.writer.close()

    async def stop(self) -> None:
        """Listen no more and break off what is open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for peer in self.peers:
            peer.writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        reader = _Reader()
        return asyncio.StreamReaderProtocol(reader, lambda _, writer: self._serve(reader, writer))

    async def _serve(self, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = Peer(self, reader, writer)
        self.peers.append(peer)
        self.taken += 1
        try:
            await self._held(reader)
            if reader.exception() is None and not reader.at_eof():
                await self._used(peer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the gateway closed, or the test is over
        finally:
            self.peers.remove(peer)
            self._tasks.discard(task)
            writer.transport.close()

    async def _held(self, reader: _Reader) -> None:
        self.held += 1
        try:
            await reader.begun.wait()
        finally:
            self.held -= 1

    async def _used(self, peer: Peer) -> None:
        self.open += 1
        self.connections += 1
        try:
            await self.script(peer)
        finally:
            self.open -= 1


class Answer:
    """What a client got. ``raw`` is the body as it came; ``complete`` is false where the connection broke before."""

    def __init__(self, status: int, headers: dict[str, str], raw: bytes, complete: bool) -> None:
        self.status = status
        self.headers = headers
        self.raw = raw
        self.complete = complete

    @property
    def body(self) -> bytes:
        """The content, without chunks."""
        if self.headers.get("transfer-encoding") != "chunked":
            return self.raw
        content, rest = b"", self.raw
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            content, rest = content + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return content


class Client:
    """One client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Raw bytes."""
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, body: bytes = BODY, path: str = "/v1/chat/completions", head: bytes = b"") -> None:
        """Send a request."""
        kind = b"" if b"ontent-" in head else b"content-type: application/json\r\n"
        start = f"POST {path} HTTP/1.1\r\nhost: gateway\r\ncontent-length: {len(body)}\r\n".encode()
        await self.send(start + kind + head + b"\r\n" + body)

    async def get(self, path: str) -> Answer:
        """Send a request without a body and read the answer."""
        await self.send(f"GET {path} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode())
        return await self.answer()

    async def ask(self, body: bytes = BODY, path: str = "/v1/chat/completions", head: bytes = b"") -> Answer:
        """Send a request and read the answer."""
        await self.post(body, path, head)
        return await self.answer()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read an answer's head."""
        raw = await self.reader.readuntil(b"\r\n\r\n")
        line, *lines = raw.decode("latin-1").split("\r\n")
        pairs = [one.partition(":") for one in lines if one]
        return int(line.split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def answer(self) -> Answer:
        """Read one answer."""
        status, headers = await self.head()
        raw = b""
        try:
            if "content-length" in headers:
                raw = await self.reader.readexactly(int(headers["content-length"]))
            elif headers.get("transfer-encoding") == "chunked":
                while not (raw == b"0\r\n\r\n" or raw.endswith(b"\r\n0\r\n\r\n")):
                    if not (part := await self.reader.read(65536)):
                        return Answer(status, headers, raw, False)
                    raw += part
            else:
                raw = await self.reader.read()
        except asyncio.IncompleteReadError as e:
            return Answer(status, headers, e.partial, False)
        except ConnectionError:
            return Answer(status, headers, raw, False)
        return Answer(status, headers, raw, True)

    async def closed(self) -> bool:
        """Wait for the gateway to close; true where nothing more came."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True

    async def until(self, sign: bytes) -> bytes:
        """Read up to a sign."""
        return await self.reader.readuntil(sign)

    def close(self) -> None:
        """Leave."""
        self.writer.transport.abort()


class Stage:
    """A gateway, its engines and its clients."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gw-"))
        self.plane = DataPlane(settings, SystemClock())
        self.engines: dict[str, Engine] = {}
        self.clients: list[Client] = []
        self.drained: list[Drained] = []
        self.port = 0
        self._revision = 0

    async def open(self) -> None:
        """Listen."""
        self.plane.on_drained(self.drained.append)
        self.port = int(self.plane.bind().rpartition(":")[2])
        await self.plane.listen()

    async def engine(self, name: str, script: Script = polite, *, tcp: bool = False) -> Engine:
        """A new engine that listens."""
        self.engines[name] = await Engine(self, name, script, tcp).start()
        return self.engines[name]

    def route(
        self, *splits: Split, model: str = "chat", drain_s: float = 30.0, salt: str = "s", hold: Hold | None = None
    ) -> Transition:
        """Apply the next revision."""
        self._revision += 1
        transition = self.plane.apply(RouteView(model, self._revision, splits, salt, drain_s, hold=hold))
        assert transition is not None
        self.drained.extend(transition.drained)
        return transition

    def split(self, version: str, *engines: Engine, weight: float = 100.0) -> Split:
        """A version's share, on engines."""
        return Split(version, weight, tuple(Endpoint(engine.name, engine.address) for engine in engines))

    async def client(self, limit: int = 2**20, rcvbuf: int = 0) -> Client:
        """A new connection to the gateway."""
        if rcvbuf:
            import socket

            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            client = Client(*await asyncio.open_connection(sock=sock, limit=limit))
        else:
            client = Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=limit))
        self.clients.append(client)
        return client

    def failures(self, version: str = "v1", model: str = "chat") -> dict[str, int]:
        """What went wrong with a version's requests, by kind."""
        return dict(self.plane.context.metrics.version(model, version).failures)

    @property
    def in_flight(self) -> int:
        """Requests in flight."""
        return self.plane.context.tracker.in_flight()

    async def wait(self, condition: Callable[[], object]) -> None:
        """Until it holds."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  any condition
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        """Close all, and see that nothing is left."""
        for client in self.clients:
            client.close()
        await self.wait(lambda: not self.in_flight)
        await self.wait(lambda: not self.plane.connections)
        await self.plane.stop()
        for engine in self.engines.values():
            await engine.stop()
        shutil.rmtree(self.folder)
        await self.wait(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    async def abandon(self) -> None:
        """Close all after a failure, so that the failure is what is reported."""
        for client in self.clients:
            client.close()
        for engine in self.engines.values():
            await engine.stop()
        await self.plane.stop()
        shutil.rmtree(self.folder)


#: Limits that a test does not want to meet.
FAR = TimeLimits(first_byte_s=30.0, between_s=30.0, total_s=60.0)


def on_stage(**settings: Any) -> Callable[[Callable[[Stage], Awaitable[None]]], Callable[[], None]]:
    """Run a test on a stage of its own, on the event loop that gateways run on."""
    made = msgspec.structs.replace(GatewaySettings(port=0, limits=FAR), **settings)

    def decorate(test: Callable[[Stage], Awaitable[None]]) -> Callable[[], None]:
        async def whole() -> None:
            stage = Stage(made)
            await stage.open()
            try:
                async with asyncio.timeout(40):
                    await test(stage)
            except BaseException:
                await stage.abandon()
                raise
            await stage.close()

        @functools.wraps(test)
        def run() -> None:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(whole())

        del run.__wrapped__  # pytest would look for a fixture named after the stage
        return run

    return decorate
