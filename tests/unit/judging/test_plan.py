"""What a rollout can find: orders of magnitude, and what makes it sooner or later."""

from __future__ import annotations

import msgspec
import pytest
from tests.unit.judging.traffic import SETTINGS

from turnout.core.judging.plan import detectable, units_to_pass


def requests(weight: float = 10.0, rate: float = 0.01, steps: int = 1) -> list[int]:
    return [one.requests for one in detectable(SETTINGS, weight, None, rate, steps=steps)]


def test_a_plan_says_what_the_simulation_shows() -> None:
    dead, ten, five, twice, late_2, late = requests()

    assert dead <= 5
    assert 50 < ten < 90
    assert 160 < five < 260
    assert 1_500 < twice < 3_000
    assert 30 < late_2 < late < 130


def test_more_steps_and_a_larger_share_need_more_requests() -> None:
    assert requests(steps=4) > requests()
    assert requests(weight=50.0) > requests()


def test_minutes_are_told_where_the_traffic_is_known() -> None:
    assert {one.seconds for one in detectable(SETTINGS, 10.0, None, 0.01)} == {None}
    ten = detectable(SETTINGS, 10.0, 20.0, 0.01)[1]
    assert ten.seconds == pytest.approx(ten.requests / 2.0, rel=0.05)


@pytest.mark.parametrize("rate", [0.0, None, 0.4, 1.0])
def test_an_unusual_error_rate_gives_a_plan_of_one_length_for_all_weights(rate: float | None) -> None:
    assert len({len(detectable(SETTINGS, weight, 1.0, rate)) for weight in (1.0, 10.0, 50.0, 99.0)}) == 1


def test_nothing_is_compared_without_a_split() -> None:
    assert detectable(SETTINGS, 100.0, 10.0, 0.01) == detectable(SETTINGS, 0.0, 10.0, 0.01) == ()


def test_what_does_not_decide_is_not_promised() -> None:
    only_latency = msgspec.structs.replace(SETTINGS, compare=("first_byte",))

    assert [one.what for one in detectable(only_latency, 10.0, None, 0.01)] == [
        "every request fails",
        "first byte 2 times as late",
        "first byte 1.5 times as late",
    ]


def test_a_wider_margin_and_a_smaller_share_need_fewer_units_for_a_pass() -> None:
    def units(weight: float, margin: float = 1.2) -> int:
        found = units_to_pass(msgspec.structs.replace(SETTINGS, latency_margin=margin), weight)
        assert found is not None
        return found

    assert 70 < units(10.0) < 130, "as docs/judging.md says"
    assert units(10.0, 1.5) < units(10.0, 1.3) < units(10.0) < units(50.0)


def test_nothing_is_said_of_a_pass_that_does_not_ask_for_the_first_byte() -> None:
    only_errors = msgspec.structs.replace(SETTINGS, compare=("errors",))

    assert units_to_pass(only_errors, 10.0) is None
    assert units_to_pass(SETTINGS, 100.0) is None
