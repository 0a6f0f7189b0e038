"""What makes room: enough, nothing in vain, by the policy, and never what must stay."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from turnout.core.cache import Idle, Leave, Policy, Room, evict, leaves_first, make_room, sleepers

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
        "i1": Leave("least recently used of more than 1 (max_cached_models)")
    }


# --- sleep before an end ------------------------------------------------------------------------------------------


def napper(name: str, ago_s: float = 1.0, **more: object) -> Idle:
    return idle(name, ago_s, sleeps=True, **more)


@given(idles(), rooms, policies, st.lists(st.booleans(), min_size=8, max_size=8), st.integers(0, 60))
def test_who_makes_room_sleeps_where_that_frees_what_is_missing_and_else_stops(
    idle: tuple[Idle, ...], short: Room, policy: Policy, sleeps: list[bool], rest: int
) -> None:
    idle = tuple(
        msgspec.structs.replace(one, sleeps=can, rest=Room(0, rest, rest // 2))
        for one, can in zip(idle, sleeps, strict=False)
    )
    chosen = make_room(idle, short, "cuda:0", policy) or ()
    asleep = sleepers(chosen, short, "cuda:0")

    def left(names: tuple[str, ...]) -> Room:
        total = Room()
        for one in chosen:
            room = one.room - one.rest if one.instance in names else one.room
            total += room if one.device == "cuda:0" else Room(room.places, room.bytes)
        return total

    if chosen:
        assert (left(asleep) - short).enough
    assert {one.instance for one in chosen if one.sleeps} >= set(asleep)
    everybody = tuple(one.instance for one in chosen if one.sleeps)
    if (left(everybody) - short).enough:
        assert asleep == everybody, "nobody stops where sleep is enough"


def test_sleep_frees_a_place_and_a_device_and_not_the_hosts_memory() -> None:
    one = napper("i1", bytes=100, device="cuda:0", device_bytes=80, rest=Room(0, 100, 5))
    assert sleepers((one,), Room(1, 0, 75), "cuda:0") == ("i1",)
    assert sleepers((one,), Room(0, 0, 76), "cuda:0") == ()
    assert sleepers((one,), Room(0, 1, 0), "cuda:0") == ()


def test_what_is_too_old_or_too_much_awake_sleeps_and_what_is_so_asleep_stops() -> None:
    assert evict((napper("i1", 61),), NOW, 2, 60.0) == {"i1": Leave("idle for 60 s (model_ttl_seconds)", sleeps=True)}
    assert evict((idle("i1", 61, asleep=True),), NOW, 2, 60.0) == {}
    assert evict((idle("i1", 120, asleep=True),), NOW, 2, 60.0) == {
        "i1": Leave("idle for 120 s (twice model_ttl_seconds)")
    }
    many = (napper("i1", 3), napper("i2", 2), idle("s1", 4, asleep=True))
    assert evict(many, NOW, 1, 60.0) == {
        "i1": Leave("least recently used of more than 1 (max_cached_models)", sleeps=True),
        "s1": Leave("least recently used of more than 1 that sleep (max_cached_models)"),
    }


def test_where_nothing_is_kept_nothing_sleeps() -> None:
    assert [how.sleeps for how in evict((napper("i1"),), NOW, 0, 60.0).values()] == [False]
