"""A persistent map is, in each of its versions, what a dict would be that is copied at every change."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from turnout.core.persistent import PersistentMap

KEYS = st.sampled_from("abcd")
#: Which earlier version is changed (modulo how many there are), the key, and its new value; None takes it away.
CHANGES = st.lists(st.tuples(st.integers(0, 30), KEYS, st.none() | st.integers(0, 3)), max_size=30)


@given(CHANGES)
def test_every_version_stays_what_it_was_whichever_is_changed(changes: list[tuple[int, str, int | None]]) -> None:
    maps, models = [PersistentMap[str, int]()], [dict[str, int]()]
    for at, key, value in changes:
        before, model = maps[at % len(maps)], dict(models[at % len(models)])
        if value is None:
            model.pop(key, None)
            maps.append(before.minus(key))
        else:
            model[key] = value
            maps.append(before.plus(key, value))
        models.append(model)
    for made, model in zip(maps, models, strict=True):
        assert made == model
        assert [made.get(key) for key in "abcd"] == [model.get(key) for key in "abcd"]
        assert {key for key in "abcd" if key in made} == set(made) == set(model)
        assert len(made) == len(model)


def test_maps_are_equal_by_what_they_hold() -> None:
    one = PersistentMap[str, int]().plus("a", 1).plus("b", 2)
    other = PersistentMap[str, int]().plus("b", 1).plus("a", 1).plus("b", 2)
    assert one == other
    assert one != other.plus("b", 3)
    assert other == {"b": 2, "a": 1}, "and an older version as well"


def test_what_all_states_begin_with_keeps_none_of_them_in_memory() -> None:
    empty = PersistentMap[int, bytes]()
    tracemalloc.start()
    try:
        for n in range(100):
            empty.plus(0, bytes(10_000)).plus(n, bytes(10_000))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 100_000
