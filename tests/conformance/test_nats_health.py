"""Health samples on a real nats-server: nothing lost, nothing twice, nothing waited for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from turnout.events import jsapi, subjects
from turnout.events.health import HealthSampled, ProbeFailed, ProbePassed, ShadowSampled, encode
from turnout.workers.nats import NatsHealthReader, NatsHealthWriter, ensure_streams

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from turnout.events.health import HealthEvent
    from turnout.workers.embedded import EmbeddedServer
    from turnout.workers.nats import Connection

    Until = Callable[[Callable[[], object]], Awaitable[None]]

pytestmark = pytest.mark.nats

TIME = datetime(2026, 1, 2, tzinfo=UTC)
LONG_AGO = TIME - timedelta(days=1000)


def sample(window: int, version: str = "v2") -> HealthSampled:
    return HealthSampled(
        gateway="g-1",
        model="meta/chat",
        version=version,
        window=window,
        revision=7,
        share=0.1,
        started=TIME,
        ended=TIME,
        requests=3,
        outcomes={"ok": 2, "refused": 1},
        first_ms={"stream/1k": {12: 2}},
        total_ms={40: 2},
    )


EVERY_KIND: tuple[HealthEvent, ...] = (
    sample(1),
    ShadowSampled(gateway="g-1", model="meta/chat", version="v2", window=2, revision=7, started=TIME, ended=TIME),
    ProbePassed("i-1", "meta/chat", "v2", 10, 0.2, TIME),
    ProbeFailed("i-1", "meta/chat", "v2", 11, 1, "the answer is empty", TIME),
)


def test_samples_are_heard_in_order_those_of_the_past_and_those_to_come(
    connection: Connection, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        writer, heard = NatsHealthWriter(connection), list[object]()
        await writer.publish(EVERY_KIND[0])
        await writer.publish(EVERY_KIND[1])
        tail = await NatsHealthReader(connection).follow(LONG_AGO, heard.append)
        await until(lambda: len(heard) == 2)
        await writer.publish(EVERY_KIND[2])
        await writer.publish(EVERY_KIND[3])
        await until(lambda: len(heard) == 4)
        await tail.close()
        assert tuple(heard) == EVERY_KIND
        assert writer.dropped == 0

    runner.run(case())


def test_what_is_older_than_asked_for_is_not_heard(
    connection: Connection, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        heard = list[object]()
        await jsapi.request(connection.nc, subjects.health("meta/chat", "v2"), encode(sample(1)), 5)
        info = await jsapi.api(connection.nc, "STREAM.INFO.HEALTH", None, 5)
        since = datetime.fromisoformat(str(info["state"]["last_ts"])[:26]) + timedelta(microseconds=1)
        await NatsHealthWriter(connection).publish(sample(2))
        tail = await NatsHealthReader(connection).follow(since.replace(tzinfo=UTC), heard.append)
        await until(lambda: heard)
        await tail.close()
        assert heard == [sample(2)]

    runner.run(case())


def test_a_reader_loses_and_repeats_nothing_when_the_server_is_killed(
    connection: Connection, nats_server: EmbeddedServer, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        writer, heard = NatsHealthWriter(connection), list[object]()
        tail = await NatsHealthReader(connection).follow(LONG_AGO, heard.append)
        for window in range(1, 1201):  # more than one pull takes
            await writer.publish(sample(window))
        await until(lambda: len(heard) == 1200)
        nats_server.kill()
        await until(lambda: not connection.connected)
        await writer.publish(sample(1201))
        await nats_server.start()
        await until(lambda: connection.connected)
        for window in range(1202, 1210):
            await writer.publish(sample(window))
        await until(lambda: heard[-1] == sample(1209))
        await tail.close()
        assert heard == [sample(window) for window in range(1, 1210) if window != 1201]
        assert writer.dropped == 1, "nobody waits for a server that is away"

    runner.run(case())


def test_a_reader_goes_on_where_its_consumer_is_taken_away(
    connection: Connection, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        writer, heard = NatsHealthWriter(connection), list[object]()
        tail = await NatsHealthReader(connection).follow(LONG_AGO, heard.append)
        await writer.publish(sample(1))
        await until(lambda: heard)
        names = await jsapi.api(connection.nc, "CONSUMER.NAMES.HEALTH", None, 5)
        for name in names["consumers"]:
            await jsapi.api(connection.nc, f"CONSUMER.DELETE.HEALTH.{name}", None, 5)
        await writer.publish(sample(2))
        await until(lambda: len(heard) == 2)
        await tail.close()
        assert heard == [sample(1), sample(2)]

    runner.run(case())


def test_a_stream_that_was_made_anew_is_read_from_its_start(
    connection: Connection, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        writer, heard = NatsHealthWriter(connection), list[object]()
        tail = await NatsHealthReader(connection).follow(LONG_AGO, heard.append)
        await writer.publish(sample(1))
        await writer.publish(sample(2))
        await until(lambda: len(heard) == 2)
        await jsapi.api(connection.nc, "STREAM.DELETE.HEALTH", None, 5)
        await ensure_streams(connection.nc)
        await writer.publish(sample(3))
        await until(lambda: len(heard) == 3)
        await tail.close()
        assert heard[-1] == sample(3)

    runner.run(case())


def test_damaged_samples_and_bugs_of_the_hearer_are_passed_over(
    connection: Connection, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        heard = list[object]()

        def hear(event: HealthEvent) -> None:
            if event == sample(1):
                raise RuntimeError("bug")
            heard.append(event)

        subject = subjects.health("meta/chat", "v2")
        for body in (encode(sample(1)), b"{", b'{"type":"HealthSampled"}', b'{"type":"Later"}', b""):
            await jsapi.request(connection.nc, subject, body, 5)
        await NatsHealthWriter(connection).publish(sample(2))
        tail = await NatsHealthReader(connection).follow(LONG_AGO, hear)
        await until(lambda: heard)
        await tail.close()
        assert heard == [sample(2)]
        assert connection.connected

    runner.run(case())


def test_a_sample_that_is_sent_twice_is_stored_once(
    connection: Connection, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        writer, heard = NatsHealthWriter(connection), list[object]()
        for event in (sample(1), sample(1), sample(1, "v1"), sample(2)):
            await writer.publish(event)
        tail = await NatsHealthReader(connection).follow(LONG_AGO, heard.append)
        await until(lambda: sample(2) in heard)
        await tail.close()
        assert heard == [sample(1), sample(1, "v1"), sample(2)]

    runner.run(case())
