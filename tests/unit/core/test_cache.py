"""What makes room: enough, nothing in vain, by the policy, and never what must stay."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from turnout.core.cache import Idle, Policy, Room, evict, leaves_first, make_room

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)


@st.composite
def idles(draw: st.DrawFn) -> tuple[Idle, ...]:
    size = st.integers(0, 50)
    return tuple(
        Idle(
            f"i{n}",
            "w1",
            NOW - timedelta(seconds=draw(st.integers(0, 9))),
            draw(st.booleans()),
            draw(st.sampled_from(("", "cuda:0", "cuda:1"))),
            draw(size),
            draw(size),
            draw(st.integers(-1, 1)),
            draw(st.floats(0, 100)),
            draw(st.integers(0, 5)),
            draw(st.booleans()),
        )
        for n in range(draw(st.integers(0, 8)))
    )


rooms = st.builds(Room, st.integers(-2, 4), st.integers(-10, 150), st.integers(-10, 100))
policies: st.SearchStrategy[Policy] = st.sampled_from(("lru", "cost"))


def freed(chosen: tuple[Idle, ...], device: str) -> Room:
    total = Room()
    for one in chosen:
        total += Room(1, one.bytes, one.device_bytes if one.device == device else 0)
    return total


@given(idles(), rooms, policies)
def test_what_makes_room_is_enough_nothing_of_it_is_in_vain_and_nothing_of_it_is_pinned(
    idle: tuple[Idle, ...], short: Room, policy: Policy
) -> None:
    chosen = make_room(idle, short, "cuda:0", policy)
    if chosen is None:
        free = tuple(one for one in idle if not one.pinned)
        assert not (freed(free, "cuda:0") - short).enough, "not even all of them would do"
        return
    assert (freed(chosen, "cuda:0") - short).enough
    assert not any(one.pinned for one in chosen)
    for one in chosen:
        rest = tuple(other for other in chosen if other is not one)
        assert not (freed(rest, "cuda:0") - short).enough, f"{one.instance} leaves in vain"


@given(idles(), policies)
def test_where_all_are_alike_the_first_by_the_policy_makes_room(idle: tuple[Idle, ...], policy: Policy) -> None:
    free = [one for one in idle if not one.pinned]
    chosen = make_room(idle, Room(1), "", policy)
    assert chosen == (() if not free else (min(free, key=leaves_first(policy)),)) or (chosen is None and not free)


def idle(name: str, ago_s: float = 1.0, **more: object) -> Idle:
    return Idle(name, "w1", NOW - timedelta(seconds=ago_s), False, **more)  # type: ignore[arg-type]


def test_enough_room_needs_nobody_to_leave() -> None:
    assert make_room((idle("i1"),), Room(0, -5, -5), "", "lru") == ()


def test_exactly_as_much_leaves_as_is_needed() -> None:
    kept = (idle("old-small", 9, bytes=10), idle("newer-large", 5, bytes=100), idle("newest", 1, bytes=100))
    chosen = make_room(kept, Room(0, 100), "", "lru")
    assert chosen is not None
    assert [one.instance for one in chosen] == ["newer-large"], "the small one alone frees too little, and then nothing"


def test_by_cost_what_is_cheap_to_load_again_for_its_size_leaves_first() -> None:
    slow = idle("slow", 9, bytes=1 << 30, seconds=60.0, uses=3)
    quick = idle("quick", 1, bytes=1 << 30, seconds=1.0, uses=3)
    assert make_room((slow, quick), Room(1), "", "cost") == (quick,)
    assert make_room((slow, quick), Room(1), "", "lru") == (slow,)


def test_a_lower_priority_leaves_before_an_older_one() -> None:
    chosen = make_room((idle("old", 9), idle("warmed", 1, priority=-1)), Room(1), "", "lru")
    assert chosen is not None
    assert chosen[0].instance == "warmed"


def test_pinned_instances_stay_beyond_the_limit_and_count_against_it() -> None:
    pinned = (idle("p1", 7200, pinned=True), idle("p2", 7200, pinned=True))
    assert evict((*pinned, idle("i1")), NOW, 1, 3600.0) == {
        "i1": "least recently used of more than 1 (max_cached_models)"
    }
