"""Shares are exact, keys stick, a growing weight only takes, salts are independent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.core.split import BUCKETS, SplitTable, Spread, choose
from turnout.events.route import Split

KEYS = [f"user-{n}".encode() for n in range(10_000)]


def splits(**weights: float) -> tuple[Split, ...]:
    return tuple(Split(version, weight, ()) for version, weight in weights.items())


def chi_square(observed: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in observed)


def test_ten_thousand_keys_fill_the_buckets_evenly() -> None:
    table = SplitTable(splits(v1=50, v2=50), "sw-1")
    counts = [0] * 100
    for key in KEYS:
        counts[table.bucket(key) * 100 // BUCKETS] += 1
    # 99 degrees of freedom: 148.2 is exceeded once in a thousand samples.
    assert chi_square(counts, 100) < 148.2


def test_each_version_owns_exactly_its_share_of_the_buckets() -> None:
    table = SplitTable(splits(v1=94.99, v2=5, v3=0.01), "sw-1")
    owned = [table.version_at(bucket) for bucket in range(BUCKETS)]
    assert [owned.count(version) for version in ("v1", "v2", "v3")] == [9499, 500, 1]


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20), st.booleans())
def test_a_growing_weight_moves_keys_only_to_the_version_that_grows(weights: list[float], first: bool) -> None:
    grows, shrinks = ("a", "b") if first else ("b", "a")
    on: set[bytes] = set()
    for weight in sorted(weights):
        table = SplitTable(splits(**{shrinks: 100 - weight, grows: weight}), "sw-1")
        now = {key for key in KEYS[:500] if table.version(key) == grows}
        assert on <= now
        on = now


@given(st.permutations(splits(v1=20, v2=30, v3=50)), st.binary(min_size=1))
def test_the_order_of_the_splits_does_not_matter(order: list[Split], key: bytes) -> None:
    assert choose(order, "s", key) == choose(splits(v1=20, v2=30, v3=50), "s", key)


def test_salts_are_independent() -> None:
    first, second = SplitTable(splits(v1=50, v2=50), "sw-1"), SplitTable(splits(v1=50, v2=50), "sw-2")
    cells = {(a, b): 0 for a in ("v1", "v2") for b in ("v1", "v2")}
    for key in KEYS:
        cells[first.version(key), second.version(key)] += 1
    # 3 degrees of freedom: 16.3 is exceeded once in a thousand samples.
    assert chi_square(list(cells.values()), 2500) < 16.3


def test_salt_and_key_do_not_run_into_each_other() -> None:
    table = SplitTable(splits(v1=50, v2=50), "ab")
    other = SplitTable(splits(v1=50, v2=50), "a")
    assert any(table.bucket(b"c%d" % n) != other.bucket(b"bc%d" % n) for n in range(10))


@pytest.mark.parametrize("requests", [100, 1000, 10_000])
def test_requests_without_a_key_get_their_share_from_the_first_hundred_on(requests: int) -> None:
    table, spread = SplitTable(splits(v1=95, v2=5), "s"), Spread(0.3)
    got = sum(table.version_at(spread.bucket()) == "v2" for _ in range(requests))
    assert abs(got - requests * 0.05) <= 2


def test_a_version_without_weight_gets_nothing() -> None:
    table = SplitTable(splits(v1=100, v2=0), "s")
    assert {table.version(key) for key in KEYS[:100]} == {"v1"}


def test_a_split_without_any_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="no version has a weight"):
        SplitTable(splits(v1=0), "s")
