"""The event store when its server dies, fills up or is replaced."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from turnout.events import jsapi, subjects
from turnout.events.chain import verify_chain
from turnout.events.codec import Context
from turnout.events.envelope import START, Recorded
from turnout.events.gateway import GatewayJoined, RouteApplied
from turnout.events.jetstream import JetStreamStore
from turnout.events.store import Append, Conflict, Damaged, LogReplaced, StoreFull, Unavailable
from turnout.workers.nats import connect, ensure_streams

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from turnout.workers.clock import SystemClock
    from turnout.workers.embedded import EmbeddedServer
    from turnout.workers.nats import Connection

    Until = Callable[[Callable[[], object]], Awaitable[None]]
    MakeServer = Callable[..., EmbeddedServer]

pytestmark = [pytest.mark.nats, pytest.mark.process]

TIME = datetime(2026, 1, 2, tzinfo=UTC)


def fail(error: Exception) -> None:
    raise error


class Writer:
    """Appends to one subject as fast as it can, by the rule: on any doubt reload, and look for the command id."""

    def __init__(self, store: JetStreamStore, name: str) -> None:
        self.store = store
        self.subject = subjects.event("gateway", name)
        self.acked: list[str] = []
        self.doubts = 0

    async def run(self, stop: asyncio.Event) -> None:
        position, n = START, 0
        while not stop.is_set():
            n += 1
            command = f"{self.subject}-{n}"
            # every third append is an atomic batch of two
            events = (
                (RouteApplied("g", "chat", n),) if n % 3 else (RouteApplied("g", "chat", n), GatewayJoined("g", ""))
            )
            while True:
                try:
                    context = Context(command, "test", "", "", TIME)
                    position = (await self.store.append([Append(self.subject, position, events)], context))[-1].position
                    break
                except (Conflict, Unavailable):
                    self.doubts += 1
                    history = await self._reload()
                    position = history[-1].position if history else START
                    if history and history[-1].envelope.command == command:
                        break
            self.acked.append(command)

    async def _reload(self) -> tuple[Recorded, ...]:
        while True:
            try:
                return await self.store.read(self.subject)
            except Unavailable:
                await asyncio.sleep(0.05)


def test_kill_9_of_the_server_under_writers_loses_and_doubles_nothing(
    nats_server: EmbeddedServer, connection: Connection, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        # given: three writers and a tail
        store = JetStreamStore(connection.nc)
        heard: list[Recorded] = []
        tail = await store.tail(0, heard.append, fail)
        stop = asyncio.Event()
        writers = [Writer(store, name) for name in ("a", "b", "c")]
        tasks = [asyncio.create_task(writer.run(stop)) for writer in writers]

        # when: the server is killed three times under them
        for _ in range(3):
            seen = len(heard)
            await until(lambda seen=seen: len(heard) > seen + 50)  # type: ignore[misc]
            nats_server.kill()
            await nats_server.start()
        seen = len(heard)
        await until(lambda: len(heard) > seen + 50)
        stop.set()
        await asyncio.gather(*tasks)
        last = await store.last_sequence()
        await until(lambda: heard[-1].sequence >= last)
        await tail.close()

        # then: the tail is the log without gap or repetition, and every command is in it once
        assert [r.sequence for r in heard] == list(range(1, last + 1))
        for writer in writers:
            mine = [r for r in heard if r.subject == writer.subject]
            commands = [r.envelope.command for r in mine if r.type == "RouteApplied"]
            assert commands == writer.acked
            assert len(mine) == len(commands) + len(commands) // 3
            assert tuple(mine) == await store.read(writer.subject)
        assert verify_chain(heard) == []
        assert sum(writer.doubts for writer in writers) >= 3

    runner.run(case())


def test_a_tail_goes_on_when_its_consumer_is_deleted_under_it(
    connection: Connection, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        store = JetStreamStore(connection.nc)
        heard: list[Recorded] = []
        tail = await store.tail(0, heard.append, fail)
        subject = subjects.event("gateway", "a")
        first = Append(subject, START, (RouteApplied("g", "m", 1),))
        (stored,) = await store.append([first], Context("c", "", "", "", TIME))
        await until(lambda: heard)

        for name in (await jsapi.api(connection.nc, "CONSUMER.NAMES.EVENTS", {}, 5))["consumers"]:
            await jsapi.api(connection.nc, f"CONSUMER.DELETE.EVENTS.{name}", None, 5)
        second = Append(subject, stored.position, (RouteApplied("g", "m", 2),))
        await store.append([second], Context("d", "", "", "", TIME))

        await until(lambda: len(heard) == 2)
        await tail.close()
        async with asyncio.timeout(20):  # a closed tail leaves no consumer behind
            while (await jsapi.api(connection.nc, "CONSUMER.NAMES.EVENTS", {}, 5))["consumers"]:
                pass

    runner.run(case())


def test_a_full_stream_refuses_and_keeps_what_it_has(connection: Connection, runner: asyncio.Runner) -> None:
    async def case() -> None:
        info = await jsapi.api(connection.nc, "STREAM.INFO.EVENTS", None, 5)
        await jsapi.api(connection.nc, "STREAM.UPDATE.EVENTS", {**info["config"], "max_bytes": 20_000}, 5)
        await _fill_and_check(JetStreamStore(connection.nc))

    runner.run(case())


def test_a_full_disk_refuses_and_keeps_what_it_has(
    make_nats_server: MakeServer, clock: SystemClock, runner: asyncio.Runner
) -> None:
    """The account's storage limit, which is how the server learns of a disk that it shares."""
    server = make_nats_server("small", max_store_bytes=200_000)

    async def case() -> None:
        connection = await connect(server.url, "test", clock)
        await ensure_streams(connection.nc)
        await _fill_and_check(JetStreamStore(connection.nc))
        await connection.close()

    runner.run(case())


async def _fill_and_check(store: JetStreamStore) -> None:
    subject = subjects.event("gateway", "a")
    stored: list[Recorded] = []

    async def fill(events: int) -> None:
        for n in range(5000):
            group = tuple(RouteApplied("g" * 500, "m", n) for _ in range(events))
            position = stored[-1].position if stored else START
            stored.extend(await store.append([Append(subject, position, group)], Context("c", "", "", "", TIME)))

    with pytest.raises(StoreFull) as single:
        await fill(1)
    with pytest.raises(StoreFull):
        await fill(2)

    assert single.value.code == "store_full"
    assert "free disk space" in str(single.value)
    assert "restart a nats-server" in str(single.value)
    assert await store.read(subject) == tuple(stored)
    assert verify_chain(stored) == []


def test_a_log_made_anew_is_noticed_by_a_running_tail(
    nats_server: EmbeddedServer, connection: Connection, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        store = JetStreamStore(connection.nc)
        subject = subjects.event("gateway", "a")
        heard: list[Recorded] = []
        lost: list[Exception] = []
        tail = await store.tail(0, heard.append, lost.append)
        await store.append([Append(subject, START, (RouteApplied("g", "m", 1),))], Context("c", "", "", "", TIME))
        await until(lambda: heard)

        await jsapi.api(connection.nc, "STREAM.DELETE.EVENTS", None, 5)
        await ensure_streams(connection.nc)
        for n in range(5):  # more events than were read: a consumer would go on with the third, silently
            await store.append(
                [Append(subjects.event("gateway", f"n{n}"), START, (RouteApplied("g", "m", n),))],
                Context(f"n{n}", "", "", "", TIME),
            )
        await until(lambda: lost)
        await tail.close()

        assert [type(e) for e in lost] == [LogReplaced]
        assert len(heard) == 1

    runner.run(case())


def test_a_log_that_lost_its_tail_is_noticed(
    make_nats_server: MakeServer, clock: SystemClock, runner: asyncio.Runner, until: Until
) -> None:
    """The server comes back at the same address with an empty store."""
    server = make_nats_server("first")
    port = int(server.url.rpartition(":")[2])

    async def case() -> None:
        connection = await connect(server.url, "test", clock)
        await ensure_streams(connection.nc)
        store = JetStreamStore(connection.nc)
        lost: list[Exception] = []
        heard: list[Recorded] = []
        tail = await store.tail(0, heard.append, lost.append)
        subject = subjects.event("gateway", "a")
        await store.append([Append(subject, START, (RouteApplied("g", "m", 1),))], Context("c", "", "", "", TIME))
        await until(lambda: heard)

        server.stop()
        other = type(server)(server.folder.parent / "other", clock, port)
        await other.start()
        try:
            await until(lambda: connection.connected)
            await ensure_streams(connection.nc)
            await until(lambda: lost)
            await tail.close()
            await connection.close()
        finally:
            other.kill()

        assert [type(e) for e in lost] == [LogReplaced]

    runner.run(case())


@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_a_damaged_block_is_told_instead_of_a_gap(
    nats_server: EmbeddedServer, clock: SystemClock, runner: asyncio.Runner, until: Until, damage: str
) -> None:
    async def write() -> None:
        connection = await connect(nats_server.url, "test", clock)
        await ensure_streams(connection.nc)
        store, position = JetStreamStore(connection.nc), START
        for n in range(20):
            one = Append(subjects.event("gateway", "a"), position, (RouteApplied("g", "m", n),))
            position = (await store.append([one], Context("c", "", "", "", TIME)))[-1].position
        await connection.close()

    async def read() -> tuple[list[Recorded], list[Exception]]:
        connection = await connect(nats_server.url, "test", clock)
        heard: list[Recorded] = []
        lost: list[Exception] = []
        tail = await JetStreamStore(connection.nc).tail(0, heard.append, lost.append)
        await until(lambda: lost)
        await tail.close()
        await connection.close()
        return heard, lost

    runner.run(write())
    nats_server.stop()
    (block,) = nats_server.folder.glob("store/jetstream/$G/streams/EVENTS/msgs/1.blk")
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "flipped":
        block.write_bytes(content)
    elif damage == "truncated":
        block.write_bytes(content[:-700])
    else:
        block.unlink()
    runner.run(nats_server.start())

    heard, lost = runner.run(read())

    assert [type(e) for e in lost] == [Damaged]
    assert "restore the store folder" in str(lost[0])
    assert [r.sequence for r in heard] == list(range(1, len(heard) + 1))
    assert len(heard) < 20


def test_without_a_server_the_store_says_unavailable_and_recovers(
    nats_server: EmbeddedServer, connection: Connection, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        store = JetStreamStore(connection.nc)
        subject = subjects.event("gateway", "a")
        one = [Append(subject, START, (RouteApplied("g", "m", 1),))]
        two = [Append(subject, START, (RouteApplied("g", "m", 1), RouteApplied("g", "m", 2)))]
        context = Context("c", "", "", "", TIME)

        nats_server.stop()
        await until(lambda: not connection.connected)
        for attempt in (store.append(one, context), store.append(two, context), store.read(subject)):
            with pytest.raises(Unavailable):
                await attempt
        await nats_server.start()
        await until(lambda: connection.connected)

        assert await store.read(subject) == (), "nothing was kept back and written after the reconnect"
        assert len(await store.append(two, context)) == 2

    runner.run(case())
