"""Two kernels of evidence in log space, and confidence sequences. Knows no sample, no version and no decision.

An e-value starts at 1; under the null hypothesis it reaches ``1/alpha`` with a chance of ``alpha`` at most, however
often one looks. Kernel A asks which arm an event landed on, kernel B whether a share is above (or below) a ceiling.
Each bets with several tilts at once and keeps the logarithm for each of them; the e-value is their mean. What is added
for one window does not depend on the order of the events in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence  # noqa: TC003  part of public signatures
from functools import lru_cache

#: Tilts of the odds for events that are bad or not there: errors, slow answers, empty answers.
EVENT_TILTS = tuple(math.log(odds) for odds in (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0))
#: Tilts for scores between -1 and 1: worse, better, other.
WORSE_TILTS = (0.4, 1.0, 2.0)
BETTER_TILTS = tuple(-tilt for tilt in WORSE_TILTS)
OTHER_TILTS = (*BETTER_TILTS, *WORSE_TILTS)
#: Tilts for "the split is not what it should be".
SPLIT_TILTS = tuple(math.log(odds) for odds in (0.1, 0.5, 0.8, 0.9, 1.1, 1.25, 2.0, 10.0))

#: Of bets that need no other.
ONE_TILT = (1.0,)

_FULL = 2.5  # spreads above the mean where a score is 1
_HOPED = 0.8  # part of a margin, in logarithms
_ABOVE_ODDS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 1000.0)
_BELOW_SHARES = (0.1, 0.25, 0.5, 0.75)
_STEPS = 50  # of a bisection, which halves an interval within [0, 1]


def event_good_tilts(margin: float) -> tuple[float, ...]:
    """Tilts for "bad events are less than ``margin`` times as frequent": equally frequent, or half as frequent."""
    return tuple(math.log(ratio / margin) for ratio in (0.5, 1.0))


def score(spreads: float) -> float:
    """How bad a value is that lies so many spreads above its mean: proportional, and cut off at both ends.

    The likelihood ratio of a shifted normal distribution grows in proportion, so this bets almost as well as can be
    where the logarithms of times are about normal; the cut keeps a few absurd values from deciding.
    """
    return max(-1.0, min(1.0, spreads / _FULL))


def not_slower(spreads: float, margin: float) -> float:
    """The bet against "slower than the margin": what a value adds to the log odds that it is the target's.

    It is the ratio of two normal likelihoods, the best bet where times are about lognormal: of a target that gains most
    of the margin, and of one that gains nothing. Most of it, because all of it would never tell of a target that is a
    little slower than the source.

    Args:
        spreads: how many spreads the value lies above its mean; the target's was divided by the margin before.
        margin: its logarithm in spreads.
    """
    hoped = _HOPED * margin
    return -hoped * (_FULL * score(spreads) + hoped / 2.0)


class Evidence:
    """One hypothesis: log weight of each tilt since the start, and of each tilt restarted where it was below its start.

    The restarted form (CUSUM, an e-detector) is what sees a change after a long good time: within ``n`` windows it
    reaches ``c`` with a chance of ``n/c`` at most.

    Attributes:
        log_e: logarithm of the e-value.
        log_change: logarithm of the restarted form's statistic.
    """

    __slots__ = ("_plain", "_restarted", "log_change", "log_e")

    def __init__(self, plain: Sequence[float], restarted: Sequence[float]) -> None:
        self._plain = plain
        self._restarted = restarted
        self.log_e = log_mean_exp(plain)
        self.log_change = log_mean_exp(restarted)

    def after(self, increments: Sequence[float]) -> Evidence:
        """With one more window."""
        return Evidence(
            [before + more for before, more in zip(self._plain, increments, strict=True)],
            [
                (before if before > 0.0 else 0.0) + more
                for before, more in zip(self._restarted, increments, strict=True)
            ],
        )


def no_evidence(tilts: int) -> Evidence:
    """Before the first event; ``tilts``: how many there are."""
    return Evidence((0.0,) * tilts, (0.0,) * tilts)


def which_arm(
    tilts: Sequence[float],
    share: float,
    target: Iterable[tuple[float, float]],
    source: Iterable[tuple[float, float]],
    margin: float = 1.0,
) -> list[float]:
    """Kernel A: what one window's events add to the log weight of each tilt.

    Args:
        tilts: of the odds that an event with score 1 is the target's; above 0 for "worse".
        share: probability that the target gets an event, in (0, 1).
        target: (score, count) of the target's events. Scores are in [-1, 1], larger is worse, and must come from the
            outcome and from earlier windows only.
        source: the source's.
        margin: tolerated odds ratio; 1 for "no worse".
    """
    share = margin * share / (1.0 - share + margin * share)
    added = [0.0] * len(tilts)
    for score, count in target:
        for k, tilt in enumerate(tilts):
            bet = tilt * score
            added[k] += count * (bet - math.log1p(share * math.expm1(bet)))
    for score, count in source:
        for k, tilt in enumerate(tilts):
            added[k] -= count * math.log1p(share * math.expm1(tilt * score))
    return added


def which_arm_had(
    tilts: tuple[float, ...], share: float, target: float, source: float, margin: float = 1.0
) -> list[float]:
    """Kernel A for events that happen or not: as ``which_arm`` with a score of 1 for each of so many events."""
    of_target, of_source = _had(tilts, share, margin)
    return [target * mine + source * other for mine, other in zip(of_target, of_source, strict=True)]


@lru_cache(maxsize=256)
def _had(tilts: tuple[float, ...], share: float, margin: float) -> tuple[list[float], list[float]]:
    """What one event of the target adds, and one of the source."""
    one, none = [(1.0, 1.0)], list[tuple[float, float]]()
    return which_arm(tilts, share, one, none, margin), which_arm(tilts, share, none, one, margin)


def above(ceiling: float, bad: float, good: float) -> list[float]:
    """Kernel B: what ``bad`` and ``good`` events add to "the share of bad ones is above ``ceiling``" (eight tilts)."""
    return [bad * when_bad + good * when_good for when_bad, when_good in _above(ceiling)]


def below(ceiling: float, bad: float, good: float) -> list[float]:
    """Kernel B the other way: "the share of bad ones is below ``ceiling``" (four tilts)."""
    return [bad * when_bad + good * when_good for when_bad, when_good in _below(ceiling)]


@lru_cache(maxsize=256)
def _above(ceiling: float) -> list[tuple[float, float]]:
    odds = ceiling / (1.0 - ceiling)
    return [_bernoulli(odds * times / (1.0 + odds * times), ceiling) for times in _ABOVE_ODDS]


@lru_cache(maxsize=256)
def _below(ceiling: float) -> list[tuple[float, float]]:
    return [_bernoulli(ceiling * times, ceiling) for times in _BELOW_SHARES]


def log_mean_exp(values: Sequence[float]) -> float:
    """Logarithm of the mean of the exponentials."""
    return log_sum_exp(values) - math.log(len(values))


def log_sum_exp(values: Sequence[float]) -> float:
    """Logarithm of the sum of the exponentials, which overflow by themselves after some hundred events."""
    most = max(values)
    return most + math.log(sum([math.exp(value - most) for value in values]))


def ratio_limits(share: float, target: int, source: int, alpha: float) -> tuple[float, float]:
    """Limits of target's rate / source's rate that hold at every look with a chance of ``1 - alpha``.

    Args:
        share: probability that a unit is the target's, the same for all of them.
        target: bad events of the target.
        source: of the source.
        alpha: chance that the ratio is ever outside.

    Returns:
        From 0 where the target has none, up to infinity where the source has none.
    """
    a, b = target + 0.5, source + 0.5
    mixed = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b) - 2.0 * math.lgamma(0.5)  # lgamma(1) is 0
    limit = -math.log(alpha)

    def against(q: float) -> float:
        return mixed - target * math.log(q) - source * math.log1p(-q)

    best = min(max(target / (target + source) if target + source else 0.5, 1e-12), 1.0 - 1e-12)
    low = _crossing(against, best, 0.0, limit) if target else 0.0
    high = _crossing(against, best, 1.0, limit) if source else 1.0
    if not target and not source:
        return 0.0, math.inf
    odds = (1.0 - share) / share
    return odds * low / (1.0 - low), math.inf if high >= 1.0 else odds * high / (1.0 - high)


def mean_half_width(count: float, variance: float, alpha: float, tuned_for: float) -> float:
    """Half the width of an asymptotic confidence sequence of a mean (Waudby-Smith et al.), for show only.

    ``tuned_for``: the count at which it is to be narrowest.
    """
    if variance <= 0.0:
        return 0.0
    rho2 = (-2.0 * math.log(alpha) + math.log1p(-2.0 * math.log(alpha))) / (tuned_for * variance)
    spread = count * variance * rho2 + 1.0
    return math.sqrt(spread / (count * count * rho2) * math.log(spread / (alpha * alpha)))


def _bernoulli(p: float, ceiling: float) -> tuple[float, float]:
    """What a bad event adds to "the share is ``p``, not ``ceiling``", and a good one."""
    return math.log(p / ceiling), math.log1p(-p) - math.log1p(-ceiling)


def _crossing(against: Callable[[float], float], inside: float, outside: float, limit: float) -> float:
    """Where a function that grows from ``inside`` to ``outside`` crosses the limit; neither end is asked at 0 or 1."""
    for _ in range(_STEPS):
        middle = (inside + outside) / 2.0
        if not 0.0 < middle < 1.0:
            break
        if against(middle) < limit:
            inside = middle
        else:
            outside = middle
    return (inside + outside) / 2.0
