"""Event structs to stored bytes and back."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.events import codec, upcast
from turnout.events.codec import Context, Damaged, decode, record
from turnout.events.envelope import START, Position, Unknown
from turnout.events.gateway import RouteApplied
from turnout.events.instance import InstanceReady
from turnout.events.model import EngineSpec, Probe

SUBJECT = "turnout.evt.gateway.g1"
CONTEXT = Context("cmd", "ops:alice", "cause", "sw-1", datetime(2026, 1, 2, tzinfo=UTC), 3)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json_objects = st.dictionaries(text, st.none() | st.booleans() | text, max_size=2)
st.register_type_strategy(str, text)
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(int, st.integers(0, 2**53))
st.register_type_strategy(datetime, st.datetimes(timezones=st.just(UTC)))
probes = st.builds(Probe, path=text, body=json_objects, expect=text)
engines = st.builds(
    EngineSpec,
    kind=text,
    path=text,
    url=text,
    command=st.lists(text).map(tuple),
    args=st.lists(text).map(tuple),
    probe=probes,
)
BY_FIELD = {"engine": engines, "parameters": json_objects, "policy": json_objects, "probe": probes}


def events(type: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    fields = {f.name for f in msgspec.structs.fields(type) if f.type is not str}
    return st.builds(type, **{name: strategy for name, strategy in BY_FIELD.items() if name in fields})


@pytest.mark.parametrize("name", sorted(codec.TYPES))
@given(data=st.data())
def test_every_event_is_read_back_as_it_was(name: str, data: st.DataObject) -> None:
    event = data.draw(events(codec.TYPES[name]))

    stored, envelope, body = record(SUBJECT, event, CONTEXT, 2, Position(7, "abc"))
    read = decode(SUBJECT, 8, stored, envelope, body)

    assert read.event == event
    assert (read.type, read.sequence, read.envelope.id, read.envelope.previous) == (name, 8, "cmd:2", "abc")
    assert b"\n" not in envelope, "a header is one line"
    assert b"\r" not in envelope


def test_what_is_not_an_event_is_a_bug() -> None:
    with pytest.raises(TypeError, match="not a turnout event"):
        record(SUBJECT, CONTEXT, CONTEXT, 0, START)


def test_every_old_version_has_its_step() -> None:
    for name, current in upcast.CURRENT.items():
        assert name in codec.TYPES
        for version in range(1, current):
            assert (name, version) in upcast._STEPS  # pyright: ignore[reportPrivateUsage]


def stored_as(version: int, body: bytes, name: str = "InstanceReady") -> tuple[str, bytes, bytes]:
    _, envelope, _ = record(SUBJECT, RouteApplied("g", "m", 1), CONTEXT, 0, START)
    return name, msgspec.json.encode({**msgspec.json.decode(envelope), "version": version}), body


def test_an_old_body_is_upcast_and_kept_as_stored() -> None:
    old = b'{"instance":"i","address":"unix:a","seconds":1.5,"bytes":9,"fingerprint":""}'

    read = decode(SUBJECT, 1, *stored_as(1, old))

    assert read.event == InstanceReady("i", "unix:a", 1.5, 0.0, 9, "")
    assert read.body == old


def test_a_newer_version_is_kept_unread() -> None:
    assert decode(SUBJECT, 1, *stored_as(3, b"{}")).event == Unknown("InstanceReady", 3, b"{}")


@pytest.mark.parametrize(
    ("version", "body"),
    [(2, b"{}"), (2, b"{"), (2, b'{"instance":1}'), (1, b"{}"), (1, b"[]"), (1, b"nonsense"), (0, b"{}")],
)
def test_a_damaged_body_names_its_subject_and_sequence(version: int, body: bytes) -> None:
    with pytest.raises(Damaged, match=f"event 41 on {SUBJECT} .InstanceReady. cannot be read"):
        decode(SUBJECT, 41, *stored_as(version, body))
