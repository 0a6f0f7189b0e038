"""The adapters of workers/ports.py on a real nats-server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.core.decider import Accepted, Failed, Rejected
from turnout.events import jsapi, subjects
from turnout.events.store import Conflict, Unavailable
from turnout.workers.nats import (
    Incompatible,
    NatsBeats,
    NatsBus,
    NatsLease,
    NatsRouteNews,
    NatsViewReader,
    NatsViewWriter,
    connect,
    ensure_streams,
)
from turnout.workers.ports import Checkpoint, Request, ViewEntry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from turnout.workers.clock import SystemClock
    from turnout.workers.embedded import EmbeddedServer
    from turnout.workers.nats import Connection

    Until = Callable[[Callable[[], object]], Awaitable[None]]
    MakeServer = Callable[..., EmbeddedServer]

pytestmark = pytest.mark.nats


def at(sequence: int, log: str = "log-1") -> Checkpoint:
    return Checkpoint(sequence, log, 1)


# --- commands ----------------------------------------------------------------------------------------------------


def test_a_command_is_answered_by_one_of_the_controllers(connection: Connection, runner: asyncio.Runner) -> None:
    async def case() -> None:
        bus = NatsBus(connection)
        asked: list[tuple[str, str, Request]] = []

        async def handler(role: str, verb: str, request: Request) -> bytes:
            asked.append((role, verb, request))
            return msgspec.json.encode(Accepted("turnout.evt.model.chat", 5, ("sw-1",)))

        served = [await bus.serve(handler), await bus.serve(handler)]
        request = Request("c1", "ops:alice", msgspec.Raw(b'{"model":"chat"}'))
        answer = await bus.ask("ops", "switch.start", request)
        for one in served:
            await one.close()

        assert answer == Accepted("turnout.evt.model.chat", 5, ("sw-1",))
        assert [(role, verb, bytes(r.body)) for role, verb, r in asked] == [
            ("ops", "switch.start", b'{"model":"chat"}')
        ]
        assert asked[0][2].id == "c1"

    runner.run(case())


def test_a_slow_command_does_not_hold_up_the_next(connection: Connection, runner: asyncio.Runner) -> None:
    async def case() -> None:
        bus = NatsBus(connection)
        release = asyncio.Event()

        async def handler(role: str, verb: str, request: Request) -> bytes:
            if verb == "slow":
                await release.wait()
            release.set()
            return msgspec.json.encode(Accepted(verb, 1))

        served = await bus.serve(handler)
        slow = asyncio.create_task(bus.ask("ops", "slow", Request("1", "a")))
        assert isinstance(await bus.ask("ops", "quick", Request("2", "a")), Accepted)
        assert isinstance(await slow, Accepted)
        await served.close()

    runner.run(case())


def test_no_controller_is_unavailable_with_a_hint(connection: Connection, runner: asyncio.Runner) -> None:
    with pytest.raises(Unavailable, match="check that one runs"):
        runner.run(NatsBus(connection).ask("ops", "switch.start", Request("c1", "ops:alice")))


def test_nonsense_is_rejected_and_a_bug_is_reported(connection: Connection, runner: asyncio.Runner) -> None:
    async def case() -> None:
        bus = NatsBus(connection)

        async def handler(role: str, verb: str, request: Request) -> bytes:
            raise RuntimeError("bug")

        served = await bus.serve(handler)
        nonsense = await jsapi.request(connection.nc, subjects.command("ops", "x"), b"{", 5)
        bug = await bus.ask("ops", "x", Request("c1", "a"))
        await served.close()

        assert msgspec.json.decode(nonsense)["code"] == "request_invalid"
        assert isinstance(bug, Failed)
        assert bug.code == "bug"

    runner.run(case())


def test_an_answer_carries_no_header_of_its_asker(connection: Connection, runner: asyncio.Runner) -> None:
    """A reply subject inside a stream would otherwise store what the asker's Nats-* headers say."""

    async def case() -> None:
        async def handler(role: str, verb: str, request: Request) -> bytes:
            return msgspec.json.encode(Rejected("no", "", ""))

        served = await NatsBus(connection).serve(handler)
        answer = await connection.nc.request(
            subjects.command("ops", "x"), b'{"id":"1","actor":"a"}', timeout=5, headers={"Nats-Rollup": "all"}
        )
        await served.close()

        assert not answer.headers

    runner.run(case())


# --- signs of life -----------------------------------------------------------------------------------------------


def test_beats_are_heard_and_never_raise(
    connection: Connection, nats_server: EmbeddedServer, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        beats = NatsBeats(connection)
        heard: list[tuple[str, str, bytes]] = []
        listening = await beats.listen(lambda kind, id, body: heard.append((kind, id, body)))

        await beats.publish("gateway", "g.1", b"{}")
        await until(lambda: heard)
        nats_server.stop()
        await until(lambda: not connection.connected)
        await beats.publish("gateway", "g.1", b"{}")
        await listening.close()

        assert heard == [("gateway", "g.1", b"{}")]

    runner.run(case())


# --- views -------------------------------------------------------------------------------------------------------


class Copy:
    """What a reader holds, and every call that it got."""

    def __init__(self) -> None:
        self.views: dict[str, bytes] = {}
        self.sequence = -1
        self.calls: list[tuple[dict[str, bytes], int]] = []

    def changed(self, entries: Mapping[str, ViewEntry], sequence: int) -> None:
        self.calls.append(({k: e.value for k, e in entries.items()}, sequence))
        self.sequence = sequence
        self.views |= {k: e.value for k, e in entries.items()}
        self.views = {k: v for k, v in self.views.items() if v}


def test_news_of_a_route_is_heard_until_the_listener_closes_and_never_raises(
    connection: Connection, clock: SystemClock, runner: asyncio.Runner, until: Until, nats_server: EmbeddedServer
) -> None:
    async def case() -> None:
        teller = await connect(nats_server.url, "leader", clock)
        heard: list[bytes] = []
        listening = await NatsRouteNews(connection).listen(heard.append)
        await connection.nc.flush()
        await NatsRouteNews(teller).tell("a/b.c", b"1")
        await until(lambda: heard == [b"1"])
        await listening.close()
        await connection.nc.flush()
        await NatsRouteNews(teller).tell("a/b.c", b"2")
        await teller.close()
        await NatsRouteNews(teller).tell("a/b.c", b"3")
        await connection.nc.flush()
        assert heard == [b"1"]

    runner.run(case())


async def snapshot(reader: NatsViewReader, *keys: str) -> tuple[Mapping[str, ViewEntry], Checkpoint | None]:
    """A snapshot, from a server that on a busy machine may stand still for longer than one answer may take."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await reader.snapshot(keys)
            except Unavailable:
                await asyncio.sleep(0.05)


def test_a_reader_gets_a_snapshot_then_whole_commits(
    connection: Connection, clock: SystemClock, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        writer, reader = NatsViewWriter(connection), NatsViewReader(connection, clock)
        copy = Copy()
        head = await writer.commit({"route.a": b"1", "route.b": b"1", "worker.w": b"1"}, at(3), 0)

        watch = await reader.watch(("route.*",), copy.changed)
        head = await writer.commit({"route.a": b"2", "route.b": b"2", "worker.w": b"2"}, at(5), head)
        head = await writer.commit({"worker.w": b"3"}, at(6), head)
        head = await writer.commit({"route.b": None, "route.c": b"1"}, at(7), head)
        await writer.commit({}, at(8), head)
        await until(lambda: copy.sequence == 8)
        await watch.close()

        assert copy.calls == [
            ({"route.a": b"1", "route.b": b"1"}, 3),
            ({"route.a": b"2", "route.b": b"2"}, 5),
            ({}, 6),
            ({"route.b": b"", "route.c": b"1"}, 7),
            ({}, 8),
        ]
        found, checkpoint = await reader.snapshot(("route.*",))
        assert {k: e.value for k, e in found.items()} == {"route.a": b"2", "route.c": b"1"}
        assert checkpoint == at(8)

    runner.run(case())


def test_an_empty_bucket_is_an_empty_snapshot(
    connection: Connection, clock: SystemClock, runner: asyncio.Runner
) -> None:
    async def case() -> None:
        copy = Copy()
        watch = await NatsViewReader(connection, clock).watch(("route.*",), copy.changed)
        await watch.close()

        assert copy.calls == [({}, 0)]
        assert await NatsViewWriter(connection).checkpoint() == (None, 0)

    runner.run(case())


def test_a_second_projector_is_fenced_off(connection: Connection, runner: asyncio.Runner) -> None:
    async def case() -> None:
        one, two = NatsViewWriter(connection), NatsViewWriter(connection)
        head = await one.commit({"route.a": b"1"}, at(1), 0)
        newer = await two.commit({"route.a": b"2"}, at(2), head)

        for views in ({"route.a": b"old"}, {}):
            with pytest.raises(Conflict):
                await one.commit(views, at(2), head)

        assert await one.checkpoint() == (at(2), newer)

    runner.run(case())


@pytest.mark.parametrize("count", [999, 1000, 2500])
def test_more_views_than_one_batch_takes_arrive_together(
    connection: Connection, clock: SystemClock, runner: asyncio.Runner, until: Until, count: int
) -> None:
    async def case() -> None:
        writer, reader = NatsViewWriter(connection, 10), NatsViewReader(connection, clock)
        head = await writer.commit({"route.0": b"old"}, at(1), 0)
        copy = Copy()
        watch = await reader.watch(("route.>",), copy.changed)

        many = {f"route.{n}": b"%d" % (n + 1) for n in range(count)}
        new_head = await writer.commit(many, at(2), head)
        await until(lambda: copy.sequence == 2)
        await watch.close()

        assert copy.calls == [({"route.0": b"old"}, 1), (many, 2)]
        assert {k: e.value for k, e in (await snapshot(reader, "route.*"))[0].items()} == many
        assert await writer.checkpoint() == (at(2), new_head)
        with pytest.raises(Conflict):
            await writer.commit(many, at(3), head)

    runner.run(case())


def test_half_a_large_commit_is_not_shown(
    connection: Connection, clock: SystemClock, runner: asyncio.Runner, until: Until
) -> None:
    """The projector dies between two batches, and the readers reconnect; the next projector finishes the work."""

    async def case() -> None:
        writer = NatsViewWriter(connection, 10)
        head = await writer.commit({"route.a": b"1", "route.b": b"1"}, at(1), 0)
        copy = Copy()
        watch = await NatsViewReader(connection, clock).watch(("route.*",), copy.changed)
        head = await writer._write([("route.a", b"2")], at(1), head, more=True)  # pyright: ignore[reportPrivateUsage]

        await connection.nc.force_reconnect()
        await until(lambda: watch._disturbances[0] == 1 and connection.connected)  # pyright: ignore[reportPrivateUsage]
        await writer.commit({"route.b": b"2"}, at(2), head)
        await until(lambda: copy.sequence == 2)
        await watch.close()

        assert copy.calls == [({"route.a": b"1", "route.b": b"1"}, 1), ({"route.a": b"2", "route.b": b"2"}, 2)]

    runner.run(case())


def test_a_reader_catches_up_after_the_server_was_killed(
    connection: Connection,
    nats_server: EmbeddedServer,
    clock: SystemClock,
    runner: asyncio.Runner,
    until: Until,
) -> None:
    async def case() -> None:
        writer = NatsViewWriter(connection)
        copy = Copy()
        head = await writer.commit({"route.a": b"1", "route.b": b"1"}, at(1), 0)
        watch = await NatsViewReader(connection, clock).watch(("route.*",), copy.changed)

        nats_server.kill()
        await until(lambda: not connection.connected)
        await nats_server.start()
        other = await connect(nats_server.url, "other", clock)
        await NatsViewWriter(other).commit({"route.a": b"2", "route.b": None}, at(2), head)
        await until(lambda: copy.sequence == 2)
        await watch.close()
        await other.close()

        assert copy.views == {"route.a": b"2"}

    runner.run(case())


def test_a_lost_message_ends_in_a_new_snapshot(
    connection: Connection, clock: SystemClock, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        writer = NatsViewWriter(connection)
        copy = Copy()
        head = await writer.commit({"route.a": b"1", "route.b": b"1"}, at(1), 0)
        watch = await NatsViewReader(connection, clock).watch(("route.*",), copy.changed)
        live, lost = watch._take, [True]  # pyright: ignore[reportPrivateUsage]

        async def lossy(message: object) -> None:
            if lost:
                lost.clear()  # the first message of the next commit never arrives
                return
            await live(message)  # type: ignore[arg-type]

        watch._live.subscription._cb = lossy  # type: ignore[union-attr]  # pyright: ignore
        head = await writer.commit({"route.a": b"2", "route.b": b"2"}, at(2), head)
        await writer.commit({"route.b": b"3"}, at(3), head)
        await until(lambda: copy.sequence == 3 and copy.views == {"route.a": b"2", "route.b": b"3"})
        await watch.close()

    runner.run(case())


def test_views_of_another_log_replace_the_old_ones(
    connection: Connection, clock: SystemClock, runner: asyncio.Runner, until: Until
) -> None:
    """The store was emptied: lower sequences, another log."""

    async def case() -> None:
        writer = NatsViewWriter(connection)
        copy = Copy()
        head = await writer.commit({"route.a": b"1", "route.b": b"1"}, at(9), 0)
        await writer.commit({"route.a": b"2"}, at(10), head)
        watch = await NatsViewReader(connection, clock).watch(("route.*",), copy.changed)

        await jsapi.api(connection.nc, "STREAM.DELETE.KV_VIEWS", None, 5)
        await ensure_streams(connection.nc)
        await writer.commit({"route.c": b"1"}, at(1, "log-2"), 0)
        await connection.nc.force_reconnect()
        await until(lambda: copy.views == {"route.c": b"1"})
        await watch.close()

        assert copy.sequence == 1

    runner.run(case())


# --- lease -------------------------------------------------------------------------------------------------------


def test_one_of_two_holds_the_lease_until_it_lets_go(
    connection: Connection, clock: SystemClock, runner: asyncio.Runner
) -> None:
    async def case() -> None:
        one, two = (NatsLease(connection, "controller", clock, 10) for _ in range(2))

        first = await one.acquire("one")
        assert first is not None
        assert clock.monotonic() < first.until < clock.monotonic() + 10
        assert await two.acquire("two") is None
        renewed = await one.renew("one", first)
        assert renewed is not None
        assert (renewed.epoch, renewed.until > first.until) == (first.epoch, True)

        await one.release("one", renewed)
        second = await two.acquire("two")
        assert second is not None
        assert second.epoch > first.epoch
        assert await one.renew("one", renewed) is None
        assert await one.acquire("one") is None

    runner.run(case())


def test_the_lease_of_a_dead_holder_expires(connection: Connection, clock: SystemClock, runner: asyncio.Runner) -> None:
    async def case() -> None:
        one, two = (NatsLease(connection, "controller", clock, 1) for _ in range(2))
        first = await one.acquire("one")
        assert first is not None
        assert await one.renew("one", first) is not None, "a renewal keeps the time to live"

        async with asyncio.timeout(10):
            while (second := await two.acquire("two")) is None:  # noqa: ASYNC110  the server tells nobody
                await asyncio.sleep(0.02)

        assert clock.monotonic() > first.until, "the holder stops before the server lets go"
        assert second.epoch > first.epoch
        assert await one.renew("one", first) is None

    runner.run(case())


def test_a_grant_whose_answer_was_lost_is_still_ours(
    connection: Connection, clock: SystemClock, runner: asyncio.Runner
) -> None:
    async def case() -> None:
        # given: what is stored is ours, but the object does not know it (the answers were lost)
        lost = NatsLease(connection, "controller", clock, 10)
        first = await lost.acquire("one")
        assert first is not None

        again = NatsLease(connection, "controller", clock, 10)
        adopted = await again.acquire("one")
        assert adopted is not None
        assert adopted.epoch == first.epoch
        renewed = await lost.renew("one", first)  # its sequence is out of date now
        assert renewed is not None
        assert renewed.epoch == first.epoch

    runner.run(case())


# --- connection and streams --------------------------------------------------------------------------------------


def test_streams_are_made_once(connection: Connection, runner: asyncio.Runner) -> None:
    assert runner.run(ensure_streams(connection.nc)) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metadata": {}}, "was not made by turnout"),
        ({"metadata": {"turnout_layout": "0"}}, "has layout 0"),
        ({"discard": "old", "max_msgs": 1}, "turnout needs"),
        ({"allow_atomic": False}, "allow_atomic"),
    ],
)
def test_a_stream_that_is_not_ours_is_refused(
    connection: Connection, runner: asyncio.Runner, change: dict[str, object], says: str
) -> None:
    async def case() -> None:
        info = await jsapi.api(connection.nc, "STREAM.INFO.EVENTS", None, 5)
        await jsapi.api(connection.nc, "STREAM.UPDATE.EVENTS", {**info["config"], **change}, 5)

        with pytest.raises(Incompatible, match=says):
            await ensure_streams(connection.nc)

    runner.run(case())


def test_a_missing_log_beside_its_views_is_refused(connection: Connection, runner: asyncio.Runner) -> None:
    async def case() -> None:
        await NatsViewWriter(connection).commit({}, at(3), 0)
        await jsapi.api(connection.nc, "STREAM.DELETE.EVENTS", None, 5)

        with pytest.raises(Incompatible, match="restore the log from a backup"):
            await ensure_streams(connection.nc)

    runner.run(case())


def test_jetstream_off_is_a_clear_refusal(
    make_nats_server: MakeServer, clock: SystemClock, runner: asyncio.Runner
) -> None:
    plain = "PLAIN { users: [ { user: u, password: p } ] }"
    accounts = f"accounts {{ JS {{ jetstream: enabled, users: [ {{ user: js, password: p }} ] }}, {plain} }}"
    server = make_nats_server("plain", lines=(accounts, "no_auth_user: js"))

    async def case() -> None:
        plain = await connect(server.url.replace("://", "://u:p@"), "test", clock)
        try:
            with pytest.raises((Incompatible, Unavailable), match="JetStream is off"):
                await ensure_streams(plain.nc)
        finally:
            await plain.close()

    runner.run(case())


def test_no_server_is_unavailable_and_says_what_to_do(
    nats_server: EmbeddedServer, clock: SystemClock, runner: asyncio.Runner
) -> None:
    url = nats_server.url
    nats_server.stop()
    with pytest.raises(Unavailable, match="check the address"):
        runner.run(connect(url.replace("://", "://user:secret@"), "test", clock))


def test_a_wrong_password_is_told_without_showing_it(
    make_nats_server: MakeServer, clock: SystemClock, runner: asyncio.Runner
) -> None:
    accounts = "accounts { A { jetstream: enabled, users: [ { user: u, password: p } ] }, B { } }"
    server = make_nats_server("auth", lines=(accounts, "no_auth_user: u"))

    with pytest.raises(Unavailable, match="check the user and password") as failed:
        runner.run(connect(server.url.replace("://", "://u:secret@"), "test", clock))

    assert "secret" not in str(failed.value)


def test_a_long_outage_is_told_once(
    nats_server: EmbeddedServer, clock: SystemClock, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        told: list[str] = []
        connection = await connect(nats_server.url, "test", clock, away_s=0.2, away=told.append)
        for outage in (1, 2):
            nats_server.stop()
            await until(lambda outage=outage: len(told) == outage)  # type: ignore[misc]
            await nats_server.start()
            await until(lambda: connection.connected)
            await connection.nc.flush()  # only then the client has said that the outage is over
        await connection.close()

        assert len(told) == 2

    runner.run(case())
