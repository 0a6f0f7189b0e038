"""The chain of digests tells whether the log is what was written."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.events import subjects
from turnout.events.chain import Problem, verify_chain
from turnout.events.codec import Context, decode
from turnout.events.envelope import START, Recorded, digest
from turnout.events.gateway import RouteApplied
from turnout.events.memory import MemoryStore
from turnout.events.store import Append

A, B = (subjects.event("gateway", name) for name in "ab")


def written(count: int = 6) -> list[Recorded]:
    """Events on two subjects in turn."""
    store = MemoryStore()

    async def write() -> None:
        heads = {A: START, B: START}
        for n in range(count):
            subject = (A, B)[n % 2]
            context = Context(f"c{n}", "ops:alice", "", "", datetime(2026, 1, 2, tzinfo=UTC))
            (stored,) = await store.append([Append(subject, heads[subject], (RouteApplied("g", "m", n),))], context)
            heads[subject] = stored.position

    asyncio.run(write())
    return store.log


def changed(record: Recorded, **changes: object) -> Recorded:
    """The record with other stored bytes, read as the store would."""
    other = msgspec.structs.replace(record, **changes)
    return decode(other.subject, other.sequence, other.type, other.raw_envelope, other.body)


def test_an_untouched_log_has_no_problem() -> None:
    assert verify_chain(written()) == []
    assert verify_chain([]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"body": b'{"gateway":"g","model":"m","revision":99}'},
        {"type": "VersionGone"},
        {"raw_envelope": written()[2].raw_envelope.replace(b"ops:alice", b"ops:mallet")},
    ],
    ids=["body", "type", "actor"],
)
def test_a_changed_event_shows_at_the_one_after_it(change: dict[str, object]) -> None:
    log = written()
    log[2] = changed(log[2], **change)

    (problem,) = verify_chain(log)

    assert (problem.subject, problem.sequence) == (A, 5)
    assert "event 3 was changed" in problem.what
    assert log[2].digest[:12] in problem.what


def test_a_removed_event_shows() -> None:
    log = written()
    del log[2]
    (problem,) = verify_chain(log)
    assert (problem.subject, problem.sequence) == (A, 5)


def test_a_removed_first_event_shows() -> None:
    log = written()
    del log[0]
    (problem,) = verify_chain(log)
    assert (problem.subject, problem.sequence) == (A, 3)
    assert "events before it are gone" in problem.what


def test_an_inserted_event_shows() -> None:
    log = written()
    forged = changed(log[0], sequence=4)
    log = [*log[:3], forged, *(msgspec.structs.replace(r, sequence=r.sequence + 1) for r in log[3:])]

    problems = verify_chain(log)

    assert [(p.subject, p.sequence) for p in problems] == [(A, 4), (A, 6)]
    assert "one was inserted" in problems[0].what


def test_events_out_of_order_show() -> None:
    log = written()
    log[0], log[1] = log[1], log[0]
    assert Problem(A, 1, "comes after event 2 but has a lower number") in verify_chain(log)


@given(st.data())
def test_any_change_before_the_newest_event_of_a_subject_shows(data: st.DataObject) -> None:
    log = written(8)
    n = data.draw(st.integers(0, 5))
    body = bytearray(log[n].body)
    body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    log[n] = msgspec.structs.replace(log[n], body=bytes(body))

    assert [p.sequence for p in verify_chain(log)] == [n + 3]


def test_the_parts_of_a_digest_cannot_be_shifted_into_each_other() -> None:
    assert digest("a", "bc", b"d", b"e") != digest("ab", "c", b"d", b"e")
    assert digest("a", "b", b"cd", b"e") != digest("a", "b", b"c", b"de")
