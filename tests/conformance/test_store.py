"""What every event store does: one suite, run against each adapter."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.events import codec, subjects
from turnout.events.chain import verify_chain
from turnout.events.codec import Context
from turnout.events.envelope import START, Position, Recorded, Unknown
from turnout.events.gateway import GatewayJoined, RouteApplied
from turnout.events.jetstream import JetStreamStore
from turnout.events.memory import MemoryStore
from turnout.events.store import Append, Conflict, Damaged, LogReplaced

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from turnout.events.store import EventStore

    Until = Callable[[Callable[[], object]], Awaitable[None]]

A = subjects.event("gateway", "a")
B = subjects.event("gateway", "b/1.x")
CONTEXT = Context("cmd-1", "ops:alice", "", "sw-1", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), epoch=7)


def applied(revision: int) -> RouteApplied:
    return RouteApplied("a", "chat", revision)


def fail(error: Exception) -> None:
    raise error


async def add(store: EventStore, subject: str, *events: object) -> tuple[Recorded, ...]:
    history = await store.read(subject)
    return await store.append([Append(subject, history[-1].position if history else START, events)], CONTEXT)


def test_reads_back_what_was_appended(store: EventStore, runner: asyncio.Runner) -> None:
    async def case() -> None:
        (stored,) = await store.append([Append(A, START, (GatewayJoined("å", "http://h:1"),))], CONTEXT)

        (read,) = await store.read(A)

        assert read == stored
        assert read.event == GatewayJoined("å", "http://h:1")
        assert (read.subject, read.sequence, read.type) == (A, 1, "GatewayJoined")
        assert (read.envelope.id, read.envelope.command, read.envelope.actor) == ("cmd-1:0", "cmd-1", "ops:alice")
        assert (read.envelope.correlation, read.envelope.epoch) == ("sw-1", 7)
        assert read.envelope.time == CONTEXT.time
        assert read.position == Position(1, read.digest)

    runner.run(case())


def test_an_unknown_subject_is_empty(store: EventStore, runner: asyncio.Runner) -> None:
    assert runner.run(store.read(A)) == ()
    assert runner.run(store.last_sequence()) == 0


def test_a_long_history_is_read_whole(store: EventStore, runner: asyncio.Runner) -> None:
    async def case() -> None:
        for start in range(0, 2400, 800):
            await add(store, A, *(applied(n) for n in range(start, start + 800)))
            await add(store, B, applied(start))

        assert [r.event.revision for r in await store.read(A)] == list(range(2400))  # type: ignore[attr-defined]

    runner.run(case())


@pytest.mark.parametrize("wrong", [START, Position(1, "")], ids=["as-new", "stale"])
def test_a_position_that_was_passed_is_a_conflict(store: EventStore, runner: asyncio.Runner, wrong: Position) -> None:
    async def case() -> None:
        await add(store, A, applied(1))
        await add(store, A, applied(2))

        with pytest.raises(Conflict):
            await store.append([Append(A, wrong, (applied(3),))], CONTEXT)

        assert await store.last_sequence() == 2

    runner.run(case())


def test_a_position_that_was_never_reached_is_a_conflict(store: EventStore, runner: asyncio.Runner) -> None:
    async def case() -> None:
        await add(store, A, applied(1))
        with pytest.raises(Conflict):
            await store.append([Append(B, Position(1, ""), (applied(1),))], CONTEXT)

    runner.run(case())


def test_several_subjects_are_stored_together_and_in_order(store: EventStore, runner: asyncio.Runner) -> None:
    async def case() -> None:
        first = await add(store, A, applied(1))

        stored = await store.append(
            [Append(B, START, (applied(2),)), Append(A, first[-1].position, (applied(3), applied(4)))], CONTEXT
        )

        assert [(r.subject, r.sequence) for r in stored] == [(B, 2), (A, 3), (A, 4)]
        assert [r.envelope.id for r in stored] == ["cmd-1:0", "cmd-1:1", "cmd-1:2"]
        assert (await store.read(A))[1:] == stored[1:]
        assert await store.read(B) == stored[:1]

    runner.run(case())


def test_several_subjects_are_stored_all_or_none(store: EventStore, runner: asyncio.Runner) -> None:
    async def case() -> None:
        await add(store, A, applied(1))

        with pytest.raises(Conflict):
            await store.append([Append(B, START, (applied(2), applied(3))), Append(A, START, (applied(3),))], CONTEXT)

        assert await store.read(B) == ()
        assert await store.last_sequence() == 1

    runner.run(case())


def test_each_event_carries_the_digest_of_the_one_before(store: EventStore, runner: asyncio.Runner) -> None:
    async def case() -> None:
        await add(store, A, applied(1), applied(2), applied(3))
        await add(store, B, applied(1))
        await add(store, A, applied(4))

        history = await store.read(A)

        assert [r.envelope.previous for r in history] == ["", *(r.digest for r in history[:-1])]
        assert verify_chain(history) == []

    runner.run(case())


@pytest.mark.parametrize(
    "appends",
    [[], [Append(A, START, ())], [Append(A, START, (applied(1),)), Append(A, START, (applied(2),))]],
    ids=["nothing", "no-events", "subject-twice"],
)
def test_what_cannot_be_atomic_is_a_bug(store: EventStore, runner: asyncio.Runner, appends: list[Append]) -> None:
    with pytest.raises(ValueError, match="names each subject once"):
        runner.run(store.append(appends, CONTEXT))


def test_concurrent_appends_to_one_subject_have_one_winner(store: EventStore, runner: asyncio.Runner) -> None:
    async def case() -> None:
        await add(store, A, applied(0))
        position = (await store.read(A))[-1].position

        results = await asyncio.gather(
            *(store.append([Append(A, position, (applied(n),))], CONTEXT) for n in range(1, 9)), return_exceptions=True
        )

        assert sum(isinstance(r, tuple) for r in results) == 1
        assert sum(isinstance(r, Conflict) for r in results) == 7
        assert await store.last_sequence() == 2

    runner.run(case())


def test_concurrent_appends_of_several_events_never_mix(store: EventStore, runner: asyncio.Runner) -> None:
    async def case() -> None:
        def both(n: int) -> list[Append]:
            return [Append(A, START, (applied(n),)), Append(B, START, (applied(n),))]

        results = await asyncio.gather(*(store.append(both(n), CONTEXT) for n in range(5)), return_exceptions=True)

        assert sum(isinstance(r, tuple) for r in results) == 1
        assert [r.event for r in await store.read(A)] == [r.event for r in await store.read(B)]

    runner.run(case())


def test_the_log_is_read_page_by_page(store: EventStore, runner: asyncio.Runner) -> None:
    async def case() -> None:
        assert await store.page(0) == ((), 0)
        for start in range(0, 2400, 800):
            await add(store, A, *(applied(n) for n in range(start, start + 800)))
            await add(store, B, applied(start))

        pages = [await store.page(after) for after in (0, 1000, 2000, 2403, 5000)]

        assert [(len(events), left) for events, left in pages] == [(1000, 1403), (1000, 403), (403, 0), (0, 0), (0, 0)]
        assert [r.sequence for events, _ in pages for r in events] == list(range(1, 2404))
        assert [r for r in pages[0][0] if r.subject == B] == list((await store.read(B))[:1])

    runner.run(case())


@pytest.mark.parametrize("after", [0, 3, 5])
def test_a_tail_delivers_what_is_there_and_what_comes(
    store: EventStore, runner: asyncio.Runner, until: Until, after: int
) -> None:
    async def case() -> None:
        heard: list[Recorded] = []
        await add(store, A, *(applied(n) for n in range(5)))

        tail = await store.tail(after, heard.append, fail)
        await add(store, B, applied(5), applied(6))
        await until(lambda: heard and heard[-1].sequence == 7)
        await add(store, A, applied(7))
        await until(lambda: heard[-1].sequence == 8)
        await tail.close()

        assert [r.sequence for r in heard] == list(range(after + 1, 9))
        assert heard[-3:] == [*(await store.read(B)), (await store.read(A))[-1]]

    runner.run(case())


def test_a_tail_over_a_long_log_delivers_every_event_whole(
    store: EventStore, runner: asyncio.Runner, until: Until
) -> None:
    """More than one pull and many reads of the socket, with events cut at their ends."""

    async def case() -> None:
        heard: list[Recorded] = []
        for start in range(0, 9000, 900):
            await add(store, A, *(RouteApplied("g" * (n % 700), "m", n) for n in range(start, start + 900)))

        tail = await store.tail(0, heard.append, fail)
        await until(lambda: len(heard) >= 9000)
        await tail.close()

        assert heard == list(await store.read(A))

    runner.run(case())


def test_a_closed_tail_delivers_nothing(store: EventStore, runner: asyncio.Runner, until: Until) -> None:
    async def case() -> None:
        closed: list[Recorded] = []
        other: list[Recorded] = []
        tail = await store.tail(0, closed.append, fail)
        witness = await store.tail(0, other.append, fail)
        await add(store, A, applied(1))
        await until(lambda: closed and other)

        await tail.close()
        await add(store, A, applied(2))
        await until(lambda: len(other) == 2)
        await witness.close()

        assert len(closed) == 1

    runner.run(case())


def test_a_tail_from_beyond_the_end_says_that_the_log_was_replaced(
    store: EventStore, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        heard: list[Recorded] = []
        lost: list[Exception] = []
        await add(store, A, applied(1))

        tail = await store.tail(5, heard.append, lost.append)
        await until(lambda: lost)
        await add(store, A, *(applied(n) for n in range(2, 9)))
        await tail.close()

        assert [type(e) for e in lost] == [LogReplaced]
        assert heard == []

    runner.run(case())


def test_a_reader_that_fails_ends_its_tail_and_hears_of_it(
    store: EventStore, runner: asyncio.Runner, until: Until
) -> None:
    async def case() -> None:
        heard: list[int] = []
        lost: list[Exception] = []

        def deliver(recorded: Recorded) -> None:
            heard.append(recorded.sequence)
            raise RuntimeError("the fold has a bug")

        tail = await store.tail(0, deliver, lost.append)
        await add(store, A, applied(1), applied(2))
        await until(lambda: lost)
        await tail.close()

        assert heard == [1]
        assert isinstance(lost[0], RuntimeError)

    runner.run(case())


async def plant(store: EventStore, subject: str, name: str, envelope: bytes, body: bytes) -> None:
    """Store something that today's codec would not write."""
    if isinstance(store, MemoryStore):
        raise pytest.skip.Exception("the memory store holds decoded events: nothing can be damaged there")
    assert isinstance(store, JetStreamStore)
    await store._nc.request(  # pyright: ignore[reportPrivateUsage]
        subject, body, headers={"Turnout-Type": name, "Turnout-Envelope": envelope.decode()}, timeout=5
    )


def test_unknown_types_and_newer_versions_are_kept(store: EventStore, runner: asyncio.Runner, until: Until) -> None:
    async def case() -> None:
        heard: list[Recorded] = []
        _, envelope, _ = codec.record(A, applied(1), CONTEXT, 0, START)
        newer = msgspec.json.encode({**msgspec.json.decode(envelope), "version": 99})
        await plant(store, A, "FromTheFuture", envelope, b'{"x":1}')
        await plant(store, A, "RouteApplied", newer, b'{"y":2}')

        tail = await store.tail(0, heard.append, fail)
        await until(lambda: len(heard) == 2)
        await tail.close()

        assert [r.event for r in heard] == [
            Unknown("FromTheFuture", 1, b'{"x":1}'),
            Unknown("RouteApplied", 99, b'{"y":2}'),
        ]
        assert tuple(heard) == await store.read(A)

    runner.run(case())


@pytest.mark.parametrize("what", ["body", "envelope", "no-envelope"])
def test_a_damaged_event_is_named(store: EventStore, runner: asyncio.Runner, until: Until, what: str) -> None:
    async def case() -> None:
        heard: list[Recorded] = []
        lost: list[Exception] = []
        _, envelope, body = codec.record(A, applied(1), CONTEXT, 0, START)
        await add(store, A, applied(0))
        if what == "body":
            await plant(store, A, "RouteApplied", envelope, body[:-3])
        else:
            await plant(store, A, "RouteApplied", envelope[:-3] if what == "envelope" else b"", body)

        with pytest.raises(Damaged, match=rf"event 2 on {A}"):
            await store.read(A)
        tail = await store.tail(0, heard.append, lost.append)
        await until(lambda: lost)
        await tail.close()

        assert [r.sequence for r in heard] == [1]
        assert isinstance(lost[0], Damaged)

    runner.run(case())
