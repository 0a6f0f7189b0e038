"""Kernels against their test vectors, an independent implementation, and what an e-value promises."""

from __future__ import annotations

import math
import random  # noqa: TID251  seeded

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.core.judging.kernels import (
    EVENT_TILTS,
    ONE_TILT,
    SPLIT_TILTS,
    WORSE_TILTS,
    Evidence,
    above,
    event_good_tilts,
    log_sum_exp,
    no_evidence,
    not_slower,
    ratio_limits,
    which_arm,
)

Event = tuple[int, float]  # arm (1 is the target), score
GOOD_TILTS = event_good_tilts(2.0)


def fold(tilts: tuple[float, ...], share: float, events: list[Event], margin: float = 1.0) -> list[Evidence]:
    evidence, seen = no_evidence(len(tilts)), list[Evidence]()
    for arm, score in events:
        target, source = ([(score, 1)], []) if arm else ([], [(score, 1)])
        evidence = evidence.after(which_arm(tilts, share, target, source, margin))
        seen.append(evidence)
    return seen


@pytest.mark.parametrize(
    ("tilts", "share", "margin", "events", "expected"),
    [
        (EVENT_TILTS, 0.1, 1.0, [(1, 1), (1, 1), (0, 1), (1, 1)], [1.406938, 3.203150, 1.984313, 3.688426]),
        ((0.25, 0.5, 1.0, 2.0), 0.25, 1.0, [(1, 0.5), (0, -0.2), (1, 0.9)], [0.339264, 0.388072, 1.030803]),
        (SPLIT_TILTS, 0.5, 1.0, [(1, 1), (0, 1), (1, 1)], [-0.000627, -0.221706, -0.222483]),
        (GOOD_TILTS, 0.5, 2.0, [(0, 1), (0, 1), (1, 1)], [0.559616, 1.139434, 0.611802]),
    ],
)
def test_which_arm_gives_the_figures_of_the_reference_program(
    tilts: tuple[float, ...], share: float, margin: float, events: list[Event], expected: list[float]
) -> None:
    assert [one.log_e for one in fold(tilts, share, events, margin)] == pytest.approx(expected, abs=1e-6)


def test_above_gives_the_figures_of_the_reference_program() -> None:
    failures = no_evidence(8)
    seen = [(failures := failures.after(above(0.05, 1, 0))).log_e for _ in range(3)]

    assert seen == pytest.approx([1.837872, 4.341881, 7.113685], abs=1e-6)
    assert no_evidence(8).after(above(0.05, 0, 100)).log_e == pytest.approx(-3.044246, abs=1e-6)


def test_a_death_after_two_thousand_good_requests_is_hidden_from_the_plain_form_only() -> None:
    evidence = no_evidence(8).after(above(0.05, 20, 1980))
    plain = restarted = 0
    for n in range(1, 200):
        evidence = evidence.after(above(0.05, 1, 0))
        plain = plain or n * (evidence.log_e >= math.log(100))
        restarted = restarted or n * (evidence.log_change >= math.log(1e4))

    assert restarted == 4
    assert plain > 100


@pytest.mark.parametrize(
    ("share", "target", "source", "savvi"),
    [(0.5, 1568, 1432, 1.2657340441737688), (0.1, 352, 2648, 2.8303477384849884), (0.25, 60, 240, 0.9159355830760206)],
)
def test_which_arm_mixed_over_a_beta_prior_is_the_multinomial_test_of_savvi(
    share: float, target: int, source: int, savvi: float
) -> None:
    """savvi 0.3.1, Multinomial(theta_0=[w, 1 - w], k=100).odds: the same bet, with another mixture over the tilts."""
    grid = [(n + 0.5) / 4000 for n in range(4000)]
    tilts = tuple(math.log(q / (1 - q) * (1 - share) / share) for q in grid)
    a, b = 100 * share, 100 * (1 - share)
    prior = [(a - 1) * math.log(q) + (b - 1) * math.log1p(-q) for q in grid]

    bets = which_arm(tilts, share, [(1.0, target)], [(1.0, source)])

    log_odds = log_sum_exp([p + bet for p, bet in zip(prior, bets, strict=True)]) - log_sum_exp(prior)
    assert log_odds == pytest.approx(savvi, abs=1e-6)


@pytest.mark.parametrize(
    ("target", "source", "savvi"),
    [
        (7, 5, (0.19141595404905107, 0.9086424777575466)),
        (31, 160, (0.0854166346795187, 0.26620768396844596)),
        (400, 9000, (0.03483356268424568, 0.05128362643972547)),
    ],
)
def test_the_limits_of_a_ratio_are_those_of_savvi(target: int, source: int, savvi: tuple[float, float]) -> None:
    """savvi 0.3.1, Multinomial(0.05, theta_0=[.5, .5], k=1).calculate_conf_int(), to its solver's precision."""
    low, high = ratio_limits(0.5, target, source, 0.05)

    assert (low / (1 + low), high / (1 + high)) == pytest.approx(savvi, abs=1e-7)


def test_limits_of_a_ratio_are_open_where_an_arm_has_no_event() -> None:
    assert ratio_limits(0.1, 0, 0, 0.05) == (0.0, math.inf)
    assert ratio_limits(0.1, 0, 50, 0.05)[0] == 0.0
    assert ratio_limits(0.1, 50, 0, 0.05)[1] == math.inf


arms_and_scores = st.lists(st.tuples(st.integers(0, 1), st.floats(-1, 1)), max_size=40)


@given(
    events=arms_and_scores, share=st.floats(0.01, 0.99), cut=st.integers(0, 40), seed=st.randoms(use_true_random=False)
)
def test_order_and_batches_change_nothing(events: list[Event], share: float, cut: int, seed: random.Random) -> None:
    one_by_one = fold(WORSE_TILTS, share, events)
    shuffled = list(events)
    seed.shuffle(shuffled)

    batched = no_evidence(len(WORSE_TILTS))
    for part in (shuffled[:cut], shuffled[cut:]):
        target = [(score, 1) for arm, score in part if arm]
        source = [(score, 1) for arm, score in part if not arm]
        batched = batched.after(which_arm(WORSE_TILTS, share, target, source))

    expected = one_by_one[-1].log_e if events else 0.0
    assert batched.log_e == pytest.approx(expected, abs=1e-9)


@given(
    share=st.floats(0.01, 0.99),
    margin=st.floats(0.1, 2.0),
    slower=st.floats(0.0, 2.0),
)
def test_a_target_slower_than_the_margin_gains_nothing_on_average(share: float, margin: float, slower: float) -> None:
    """Times are normal, in spreads; the target's lie ``slower`` above what the margin leaves of them."""
    mean_e = 0.0
    for z in (n / 10.0 for n in range(-50, 51)):
        chance = math.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi) / 10.0
        (of_target,) = which_arm(ONE_TILT, share, [(not_slower(z + slower, margin), 1)], [])
        (of_source,) = which_arm(ONE_TILT, share, [], [(not_slower(z, margin), 1)])
        mean_e += chance * (share * math.exp(of_target) + (1.0 - share) * math.exp(of_source))
    assert mean_e <= 1.0 + 1e-4
    assert slower > 0.01 or mean_e > 0.9


@given(share=st.floats(0.01, 0.99), rate=st.floats(0.01, 0.5))
def test_no_event_is_no_evidence(share: float, rate: float) -> None:
    assert no_evidence(8).after(which_arm(EVENT_TILTS, share, [], [])).log_e == 0.0
    assert no_evidence(8).after(above(rate, 0, 0)).log_e == 0.0


@given(share=st.floats(0.01, 0.99), score=st.floats(-1, 1), margin=st.floats(1, 5))
def test_the_mean_of_one_bet_is_one_under_the_null_hypothesis(share: float, score: float, margin: float) -> None:
    odds = margin * share / (1 - share)
    of_target = odds / (1 + odds)  # the chance of it where the target has exactly the tolerated odds
    for target, source in zip(
        which_arm(EVENT_TILTS, share, [(score, 1)], [], margin),
        which_arm(EVENT_TILTS, share, [], [(score, 1)], margin),
        strict=True,
    ):
        mean = of_target * math.exp(target) + (1 - of_target) * math.exp(source)
        assert mean == pytest.approx(1.0, abs=1e-9)


@given(ceiling=st.floats(0.001, 0.9), rate=st.floats(0, 1))
def test_the_mean_of_a_bet_against_a_ceiling_is_one_at_the_ceiling_and_less_below(ceiling: float, rate: float) -> None:
    rate *= ceiling
    for bad, good in zip(above(ceiling, 1, 0), above(ceiling, 0, 1), strict=True):
        assert ceiling * math.exp(bad) + (1 - ceiling) * math.exp(good) == pytest.approx(1.0, abs=1e-9)
        assert rate * math.exp(bad) + (1 - rate) * math.exp(good) <= 1.0 + 1e-9


@pytest.mark.parametrize(("target_rate", "expected"), [(0.1, 1.0), (0.05, 0.8)])
def test_the_mean_of_e_over_null_runs_is_one_and_less_where_the_target_is_better(
    target_rate: float, expected: float
) -> None:
    draw, share, runs = random.Random(7), 0.3, 20_000
    each: list[float] = []
    for _ in range(runs):
        failed = [0, 0]
        for _ in range(20):
            arm = draw.random() < share
            failed[arm] += draw.random() < (target_rate if arm else 0.1)
        bets = which_arm(EVENT_TILTS, share, [(1.0, failed[1])], [(1.0, failed[0])])
        each.append(math.exp(no_evidence(8).after(bets).log_e))
    mean = sum(each) / runs
    error = math.sqrt(sum((e - mean) ** 2 for e in each)) / runs

    if expected == 1.0:
        assert abs(mean - 1.0) < 3 * error
    else:
        assert mean < expected
