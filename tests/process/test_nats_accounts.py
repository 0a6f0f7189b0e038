"""The accounts of deploy/nats on a running server: what each role can do, and what it can't."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.core.decider import Accepted
from turnout.events import jsapi, subjects
from turnout.events.codec import Context
from turnout.events.envelope import START
from turnout.events.gateway import RouteApplied
from turnout.events.jetstream import JetStreamStore
from turnout.events.store import Append, Unavailable
from turnout.workers.nats import (
    NatsBeats,
    NatsBus,
    NatsLease,
    NatsRouteNews,
    NatsViewReader,
    NatsViewWriter,
    connect,
    ensure_streams,
)
from turnout.workers.ports import Checkpoint, Request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from turnout.events.envelope import Recorded
    from turnout.workers.clock import SystemClock
    from turnout.workers.nats import Connection
    from turnout.workers.ports import Closeable, ViewEntry

    Until = Callable[[Callable[[], object]], Awaitable[None]]

pytestmark = [pytest.mark.nats, pytest.mark.process]

NATS = Path(__file__).parents[2] / "deploy" / "nats"
PASSWORDS = {
    f"TURNOUT_{role}_PASSWORD": "pw" for role in ("SYS", "ADMIN", "CONTROLLER", "GATEWAY", "WORKER", "OPS", "AUDIT")
}
TIME = datetime(2026, 1, 2, tzinfo=UTC)


def start(binary: Path, conf: str, folder: Path, environ: Mapping[str, str], *flags: str) -> subprocess.Popen[bytes]:
    folder.mkdir()
    with (folder / "log").open("wb") as out:
        return subprocess.Popen(
            [binary, "-c", NATS / conf, *flags, "--ports_file_dir", folder],
            env={**os.environ, **PASSWORDS, "TURNOUT_STORE_DIR": str(folder / "store"), **environ},
            stdout=out,
            stderr=out,
            process_group=0,
        )


async def client_port(process: subprocess.Popen[bytes], folder: Path, until: Until) -> int:
    file = folder / f"nats-server_{process.pid}.ports"
    await until(lambda: process.poll() is not None or (file.exists() and file.read_text().endswith("}")))
    assert process.poll() is None, (folder / "log").read_text()
    return int(json.loads(file.read_text())["nats"][0].rpartition(":")[2])


@pytest.fixture
def port(nats_binary: Path, tmp_path: Path, runner: asyncio.Runner, until: Until) -> Iterator[int]:
    """Port of a server with deploy/nats/server.conf."""
    process = start(nats_binary, "server.conf", tmp_path / "n", {}, "--port", "-1")
    try:
        yield runner.run(client_port(process, tmp_path / "n", until))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("conf", ["server.conf", "cluster.conf"])
def test_the_configuration_is_valid(nats_binary: Path, tmp_path: Path, conf: str) -> None:
    environ = {
        "TURNOUT_STORE_DIR": str(tmp_path),
        "TURNOUT_SERVER_NAME": "n1",
        "TURNOUT_HOST": "127.0.0.1",
        "TURNOUT_ROUTES_HOST": "127.0.0.1",
        "TURNOUT_ROUTES_PASSWORD": "pw",
        **{f"TURNOUT_ROUTE_{n}": f'"nats://routes:pw@127.0.0.{n}:6222"' for n in (1, 2, 3)},
        **PASSWORDS,
    }
    checked = subprocess.run(
        [nats_binary, "-c", NATS / conf, "-t"], env=environ, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


class Roles:
    """A connection for each role."""

    def __init__(self, port: int, clock: SystemClock) -> None:
        self._port = port
        self._clock = clock
        self._open: list[Connection] = []

    async def connect(self, role: str) -> Connection:
        connection = await connect(f"nats://{role}:pw@127.0.0.1:{self._port}", role, self._clock)
        self._open.append(connection)
        return connection

    async def close(self) -> None:
        for connection in self._open:
            await connection.close()


async def accept(role: str, verb: str, request: Request) -> bytes:
    return msgspec.json.encode(Accepted(f"{role} {verb}", 1))


async def one_event(store: JetStreamStore) -> None:
    context = Context("c", "test", "", "", TIME)
    await store.append([Append(subjects.event("gateway", "g"), START, (RouteApplied("g", "m", 1),))], context)


def test_every_role_can_do_its_work(port: int, clock: SystemClock, runner: asyncio.Runner, until: Until) -> None:
    async def case() -> None:
        roles = Roles(port, clock)
        controller, gateway = await roles.connect("controller"), await roles.connect("gateway")
        worker, ops, audit = await roles.connect("worker"), await roles.connect("ops"), await roles.connect("audit")

        # the controller makes the streams, writes, tails, projects and leads
        await ensure_streams(controller.nc)
        store = JetStreamStore(controller.nc)
        events: list[Recorded] = []
        tail = await store.tail(0, events.append, events.append)  # type: ignore[arg-type]
        await one_event(store)
        await until(lambda: events)
        assert [e.sequence for e in events] == [1]
        lease = NatsLease(controller, "controller", clock)
        assert await lease.acquire("one") is not None
        writer = NatsViewWriter(controller)
        at = await writer.commit({"route.a": b"1"}, Checkpoint(1, "log", 1), 0)

        # each asks its own commands, says that it lives, and follows the views
        served = await NatsBus(controller).serve(accept)
        beats: list[tuple[str, str, bytes]] = []
        listening = await NatsBeats(controller).listen(lambda kind, id, body: beats.append((kind, id, body)))
        copies: dict[str, int] = {}
        watches: list[Closeable] = []
        for role, connection in {"gw": gateway, "worker": worker, "ops": ops}.items():
            assert await NatsBus(connection).ask(role, "x.y", Request("1", "a")) == Accepted(f"{role} x.y", 1)

            def changed(_: Mapping[str, ViewEntry], sequence: int, role: str = role) -> None:
                copies[role] = sequence

            watches.append(await NatsViewReader(connection, clock).watch(("route.*",), changed))
        assert copies == {"gw": 1, "worker": 1, "ops": 1}
        await writer.commit({"route.a": b"2", "route.b": b"1"}, Checkpoint(2, "log", 1), at)
        await until(lambda: copies == {"gw": 2, "worker": 2, "ops": 2})
        await NatsBeats(gateway).publish("gateway", "g1", b"")
        await NatsBeats(worker).publish("worker", "w1", b"")
        await until(lambda: len(beats) == 2)

        # gateways hear of routes before they are stored
        news: list[bytes] = []
        hearing = await NatsRouteNews(gateway).listen(news.append)
        await gateway.nc.flush()
        await NatsRouteNews(controller).tell("chat", b"{}")
        await until(lambda: news == [b"{}"])
        await hearing.close()

        # operators and auditors read the log
        for reader in (ops, audit):
            log = JetStreamStore(reader.nc)
            assert await log.page(0) == (await log.read(subjects.event("gateway", "g")), 0)

        for running in (*watches, served, listening, tail):
            await running.close()
        await roles.close()

    runner.run(case())


def test_a_role_can_do_nothing_else(port: int, clock: SystemClock, runner: asyncio.Runner, until: Until) -> None:
    async def case() -> None:
        roles = Roles(port, clock)
        controller = await roles.connect("controller")
        await ensure_streams(controller.nc)
        store = JetStreamStore(controller.nc, timeout_s=5)
        served = await NatsBus(controller).serve(accept)
        beats: list[object] = []
        listening = await NatsBeats(controller).listen(lambda kind, id, body: beats.append((kind, id, body)))
        event = subjects.event("route", "chat")

        for name, own in (("gateway", "gw"), ("worker", "worker"), ("ops", "ops"), ("audit", "")):
            connection = await roles.connect(name)
            other = "ops" if own != "ops" else "gw"
            forbidden = [
                event,
                subjects.view("route.chat"),
                subjects.live_view("route.chat"),
                subjects.route_news("chat"),
                subjects.lease("controller"),
                subjects.command(other, "switch.start"),
                subjects.beat("worker" if own != "worker" else "gateway", "x"),
                "$JS.API.STREAM.DELETE.EVENTS",
                "$JS.API.STREAM.PURGE.EVENTS",
                "$JS.API.STREAM.UPDATE.EVENTS",
                "$JS.API.STREAM.CREATE.EVENTS",
                "$JS.API.CONSUMER.CREATE.EVENTS.x",
            ]
            for subject in forbidden:
                await connection.nc.publish(subject, b"{}", reply=connection.nc.new_inbox())
            # forgery: the reply subject of something that it may ask is an event's, or a view's
            for target in (event, subjects.view("route.chat")):
                if own:
                    command = b'{"id":"1","actor":"a"}'
                    await connection.nc.publish(subjects.command(own, "x"), command, reply=target)
                    await connection.nc.publish(
                        "$JS.API.DIRECT.GET.KV_VIEWS", b'{"last_by_subj":"$KV.VIEWS._ckpt"}', reply=target
                    )
                await connection.nc.publish("$JS.API.DIRECT.GET.EVENTS", b'{"seq":1}', reply=target)
            await connection.nc.flush()

        # the controller itself may not shorten or remove the log, nor change a stream by making it again
        for what in ("DELETE", "PURGE", "UPDATE"):
            with pytest.raises(Unavailable):
                await jsapi.api(controller.nc, f"STREAM.{what}.EVENTS", {"name": "EVENTS", "max_msgs": 1}, 0.5)
        with pytest.raises(jsapi.Refused):
            await jsapi.api(controller.nc, "STREAM.CREATE.EVENTS", {"name": "EVENTS", "max_msgs": 1}, 5)

        await one_event(store)  # everything before it has been handled
        assert await store.last_sequence() == 1
        assert await store.read(event) == ()
        assert await NatsViewWriter(controller).checkpoint() == (None, 0)
        views = await jsapi.api(controller.nc, "STREAM.INFO.KV_VIEWS", None, 5)
        assert views["state"]["last_seq"] == 0
        assert beats == []

        # the forgery itself works: inside the controller's account the same message becomes an event
        await controller.nc.publish("$JS.API.DIRECT.GET.EVENTS", b'{"seq":1}', reply=event)
        info: dict[str, int] = {}
        async with asyncio.timeout(5):
            while info.get("last_seq", 0) < 2:
                info = (await jsapi.api(controller.nc, "STREAM.INFO.EVENTS", None, 5))["state"]
        await served.close()
        await listening.close()
        await roles.close()

    runner.run(case())


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_a_cluster_of_three_loses_nothing_when_its_leader_is_killed(
    nats_binary: Path, tmp_path: Path, clock: SystemClock, runner: asyncio.Runner, until: Until
) -> None:
    routes = free_ports(3)
    environ = {
        "TURNOUT_HOST": "127.0.0.1",
        "TURNOUT_ROUTES_HOST": "127.0.0.1",
        "TURNOUT_ROUTES_PASSWORD": "pw",
        **{f"TURNOUT_ROUTE_{n}": f'"nats://routes:pw@127.0.0.1:{port}"' for n, port in enumerate(routes, 1)},
    }
    servers = {
        f"n{n}": start(
            nats_binary,
            "cluster.conf",
            tmp_path / f"n{n}",
            {**environ, "TURNOUT_SERVER_NAME": f"n{n}"},
            *("--port", "-1", "--cluster", f"nats://127.0.0.1:{port}"),
        )
        for n, port in enumerate(routes, 1)
    }

    async def ready(connection: Connection) -> int:
        async with asyncio.timeout(30):
            while True:
                try:
                    return await ensure_streams(connection.nc, 3, 2)
                except Unavailable:
                    await asyncio.sleep(0.1)

    async def again(store: JetStreamStore, n: int) -> tuple[Recorded, ...]:
        """Append until it is stored: on any doubt look whether it is."""
        subject = subjects.event("gateway", "g")
        async with asyncio.timeout(40):
            while True:
                try:
                    history = await store.read(subject)
                    if history and history[-1].envelope.command == f"c{n}":
                        return history
                    position = history[-1].position if history else START
                    events = (RouteApplied("g", "m", n), RouteApplied("g", "m", n))
                    context = Context(f"c{n}", "test", "", "", TIME)
                    return history + await store.append([Append(subject, position, events)], context)
                except Unavailable:
                    await asyncio.sleep(0.1)

    async def case() -> None:
        ports = {name: await client_port(process, tmp_path / name, until) for name, process in servers.items()}
        url = ",".join(f"nats://controller:pw@127.0.0.1:{port}" for port in ports.values())
        connection = await connect(url, "test", clock)
        assert await ready(connection) == 3
        store = JetStreamStore(connection.nc, replicas=3)
        heard: list[Recorded] = []
        lost: list[Exception] = []
        tail = await store.tail(0, heard.append, lost.append)
        history: tuple[Recorded, ...] = ()
        for n in range(20):
            history = await again(store, n)

        leader = (await jsapi.api(connection.nc, "STREAM.INFO.EVENTS", None, 5))["cluster"]["leader"]
        os.killpg(servers[leader].pid, signal.SIGKILL)
        for n in range(20, 40):
            history = await again(store, n)
        await until(lambda: len(heard) == 80)
        await tail.close()
        await connection.close()

        assert tuple(heard) == history
        assert [r.event.revision for r in history] == [n for n in range(40) for _ in (0, 1)]  # type: ignore[attr-defined]
        assert lost == []

    try:
        runner.run(case())
    finally:
        for process in servers.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
