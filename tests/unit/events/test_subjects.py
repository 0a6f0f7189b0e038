"""Names as subject tokens."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.events import subjects

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(names)
def test_a_token_is_read_back_as_its_name(name: str) -> None:
    assert subjects.name(subjects.token(name)) == name


@given(names)
def test_a_token_is_a_legal_part_of_subjects_and_bucket_keys(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", subjects.token(name))


@given(names, names)
def test_two_names_never_share_a_token(one: str, other: str) -> None:
    assert (subjects.token(one) == subjects.token(other)) == (one == other)


def test_an_empty_name_has_no_token() -> None:
    with pytest.raises(ValueError, match="empty"):
        subjects.token("")


@given(st.sampled_from(subjects.AGGREGATES), names)
def test_event_subjects_and_view_keys_are_read_back(aggregate: str, id: str) -> None:
    assert subjects.parse_event(subjects.event(aggregate, id)) == (aggregate, id)
    assert subjects.parse_view_key(subjects.view_key(aggregate, id)) == (aggregate, id)


def test_commands_and_beats_are_read_back() -> None:
    assert subjects.parse_command(subjects.command("ops", "switch.start")) == ("ops", "switch.start")
    assert subjects.parse_beat(subjects.beat("gateway", "g.1/ü")) == ("gateway", "g.1/ü")
