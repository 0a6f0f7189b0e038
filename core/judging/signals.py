"""What is compared: each signal turns counts of one window into evidence. Knows no gateway, no user and no decision.

Everything a window is scored with (means, quantiles, the source's own share) comes from earlier windows: that is what
makes the evidence hold at every look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from turnout.core.judging.kernels import (
    EVENT_TILTS,
    ONE_TILT,
    SPLIT_TILTS,
    WORSE_TILTS,
    Evidence,
    above,
    below,
    event_good_tilts,
    mean_half_width,
    no_evidence,
    not_slower,
    ratio_limits,
    score,
    which_arm,
    which_arm_had,
)
from turnout.events.health import BIN_RATIO, Histogram, quantile

if TYPE_CHECKING:
    from turnout.core.judging.users import Answered

#: (score, how many) of some values.
_Scored = list[tuple[float, float]]
#: Stratum → histogram.
Strata = Mapping[str, Histogram]

#: Share of the values that a p95 leaves above itself.
TAIL = 0.05
#: Chance that a shown interval is ever wrong.
SHOWN_ALPHA = 0.05

_LOG_BIN = math.log(BIN_RATIO)
_LEARN = 20  # values of a stratum before its scores say anything
_LEARN_TAIL = 100  # values of the source before its p95 does
_LEAST_SPREAD = 0.05  # of the logarithm: half a bin, where all values are equal
_SHOWN_FROM = 100  # target's values before an interval of a mean means anything
_HALF_LIFE = 50.0  # requests of the source after which one counts half: a shared outage is seen at once
_KNOWN_FROM = 20.0  # requests of the source before its share counts
_MEAN_LEAST = 0.33  # spread of the mean of a user's many values, of that of single ones
_SURE = 2.33  # standard errors: one side, 99 %


class Events:
    """Bad events that happen or not, given the arm's share. ``margin``: asked for promotion, too."""

    def __init__(self, margin: float | None = None) -> None:
        self.target = 0
        self.source = 0
        self.harm = no_evidence(len(EVENT_TILTS))
        self.good: Evidence | None = None
        self._margin = margin or 1.0
        self._good_tilts = event_good_tilts(self._margin)
        if margin is not None:
            self.good = no_evidence(len(self._good_tilts))

    def add(self, share: float, target: int, source: int) -> None:
        """Bad events of one window."""
        if not (target or source):
            return
        self.target += target
        self.source += source
        self.harm = self.harm.after(which_arm_had(EVENT_TILTS, share, target, source))
        if self.good is not None:
            self.good = self.good.after(which_arm_had(self._good_tilts, share, target, source, self._margin))

    def limits(self, share: float) -> tuple[float | None, float | None]:
        """Confidence limits of target's rate / source's rate; None where there are none yet."""
        if not (self.target and self.source):
            return None, None
        low, high = ratio_limits(share, self.target, self.source, SHOWN_ALPHA)
        return low, None if math.isinf(high) else high


class Split:
    """Units by arm: is the split what the route says?"""

    def __init__(self) -> None:
        self.target = 0
        self.source = 0
        self.harm = no_evidence(len(SPLIT_TILTS))

    def add(self, share: float, target: int, source: int) -> None:
        """Units that were assigned in one window."""
        if not (target or source):
            return
        self.target += target
        self.source += source
        self.harm = self.harm.after(which_arm_had(SPLIT_TILTS, share, target, source))


class Scores:
    """A distribution (ms, tokens) against the pooled one of its stratum.

    Args:
        tilts: for "worse", or for "other" in both directions.
        tolerance: the target's values are divided by it before they are scored.
        margin: asked for promotion, too: "below so many times the source's".
    """

    def __init__(self, tilts: tuple[float, ...] = WORSE_TILTS, tolerance: float = 1.0, margin: float = 0.0) -> None:
        self.target: Histogram = {}
        self.source: Histogram = {}
        self.harm = no_evidence(len(tilts))
        self.good = no_evidence(len(ONE_TILT)) if margin else None
        self._tilts = tilts
        self._tolerated = math.log(tolerance)
        self._margin = math.log(margin) if margin else 0.0
        self._pooled: dict[str, _Moments] = {}
        self._within = _Within()

    def add(self, share: float, target: Strata, source: Strata, scored: bool) -> None:
        """Values of one window.

        Args:
            share: of the target.
            target: its values.
            source: the source's.
            scored: false in the warm-up, when values are only learned from.
        """
        if not (target or source):
            return
        if scored:
            worse, usual = self._scores(target, source)
            self.harm = self.harm.after(which_arm(self._tilts, share, worse, usual))
            if self.good is not None:
                self.good = self.good.after(which_arm(ONE_TILT, share, *self._bets(target, source)))
        self._learn(target, source)

    def add_users(self, share: float, target: Strata, source: Strata, scored: bool) -> None:
        """First values of sticky users: evidence of harm at once, and none of its absence; see ``add_means``."""
        if not (target or source):
            return
        if scored:
            worse, usual = self._scores(target, source)
            self.harm = self.harm.after(which_arm(self._tilts, share, worse, usual))
        self._learn(target, source)

    def add_means(self, share: float, users: Sequence[Answered]) -> None:
        """What sticky users were answered in a while: evidence of no harm.

        The mean of several values varies less than one, so it may weigh more: by how much is learned from the users
        themselves, whatever their version.
        """
        better: _Scored = []
        usual: _Scored = []
        for user in users:
            pooled = self._pooled.get(user.stratum)
            if pooled is not None and pooled.count >= _LEARN:
                above_mean = (user.total / user.count + 0.5) * _LOG_BIN - pooled.mean
                spread = self._within.spread_of_mean(pooled.spread, user.count)
                arm = better if user.is_target else usual
                arm.append((self._bet(above_mean, spread, user.is_target), 1.0))
        if self.good is not None and (better or usual):
            self.good = self.good.after(which_arm(ONE_TILT, share, better, usual))
        for user in users:
            self._within.learn(user)

    def _learn(self, target: Strata, source: Strata) -> None:
        for arm, strata in enumerate((target, source)):
            for stratum, histogram in strata.items():
                pooled = self._pooled.setdefault(stratum, _Moments())
                pooled.learn(histogram)
                _into(self.source if arm else self.target, histogram)

    def _scores(self, target: Strata, source: Strata) -> tuple[_Scored, _Scored]:
        """How bad values are: the target's against the tolerance, and the source's."""
        worse: _Scored = []
        usual: _Scored = []
        for stratum, pooled in self._pooled.items():
            if pooled.count < _LEARN:
                continue
            mean, spread = pooled.mean, pooled.spread
            for bin, count in source.get(stratum, {}).items():
                usual.append((score(((bin + 0.5) * _LOG_BIN - mean) / spread), count))
            for bin, count in target.get(stratum, {}).items():
                worse.append((score(((bin + 0.5) * _LOG_BIN - mean - self._tolerated) / spread), count))
        return worse, usual

    def _bets(self, target: Strata, source: Strata) -> tuple[_Scored, _Scored]:
        """What values say against "slower than the margin": the target's and the source's."""
        better: _Scored = []
        usual: _Scored = []
        for stratum, pooled in self._pooled.items():
            if pooled.count < _LEARN:
                continue
            mean, spread = pooled.mean, pooled.spread
            for bin, count in target.get(stratum, {}).items():
                better.append((self._bet((bin + 0.5) * _LOG_BIN - mean, spread, is_target=True), count))
            for bin, count in source.get(stratum, {}).items():
                usual.append((self._bet((bin + 0.5) * _LOG_BIN - mean, spread, is_target=False), count))
        return better, usual

    def _bet(self, above_mean: float, spread: float, is_target: bool) -> float:
        shifted = above_mean - self._margin if is_target else above_mean
        return not_slower(shifted / spread, self._margin / spread)

    def limits(self) -> tuple[float | None, float | None]:
        """Confidence limits of target / source (geometric means); None where there are none yet."""
        target, source = _Moments(), _Moments()
        target.learn(self.target)
        source.learn(self.source)
        if target.count < _SHOWN_FROM or source.count < _SHOWN_FROM:
            return None, None
        variance = target.spread**2 + source.spread**2 * target.count / source.count
        half = mean_half_width(target.count, variance, SHOWN_ALPHA, _SHOWN_FROM * 5.0)
        shift = target.mean - source.mean
        return math.exp(shift - half), math.exp(shift + half)


class Tails:
    """Values above the source's p95 of their stratum."""

    def __init__(self, tolerance: float) -> None:
        self.target: Histogram = {}
        self.source: Histogram = {}
        self.harm = no_evidence(len(EVENT_TILTS))
        self._tolerated = math.log(tolerance)
        self._known: dict[str, Histogram] = {}

    def add(self, share: float, target: Strata, source: Strata, scored: bool) -> None:
        """Values of one window; see ``Scores.add``."""
        if scored:
            bad_target = bad_source = 0
            for stratum in {**target, **source}:
                if (top := _top(self._known.get(stratum, {}))) is not None:
                    bad_target += _slower(target.get(stratum, {}), top + self._tolerated)
                    bad_source += _slower(source.get(stratum, {}), top)
            if bad_target or bad_source:
                self.harm = self.harm.after(which_arm_had(EVENT_TILTS, share, bad_target, bad_source))
        for histogram in target.values():
            _into(self.target, histogram)
        for stratum, histogram in source.items():
            _into(self.source, histogram)
            _into(self._known.setdefault(stratum, {}), histogram)


class RecordedTails:
    """The target's values above the p95 that the source had before, where no source runs beside it.

    The recorded p95 is an estimate: its upper limit is taken, times the tolerance.
    """

    def __init__(self, tolerance: float) -> None:
        self.target: Histogram = {}
        self.source: Histogram = {}
        self.harm = no_evidence(len(EVENT_TILTS))
        self._tolerated = math.log(tolerance)
        self._known: dict[str, Histogram] = {}

    def learn(self, source: Strata) -> None:
        """Values of the source, from before."""
        for stratum, histogram in source.items():
            _into(self.source, histogram)
            _into(self._known.setdefault(stratum, {}), histogram)

    def add(self, target: Strata, scored: bool) -> None:
        """Values of one window of the target; see ``Scores.add``."""
        bad = good = 0
        for stratum, histogram in target.items():
            _into(self.target, histogram)
            if scored and (top := _top(self._known.get(stratum, {}), sure=True)) is not None:
                slow = _slower(histogram, top + self._tolerated)
                bad += slow
                good += sum(histogram.values()) - slow
        if bad or good:
            self.harm = self.harm.after(above(TAIL, bad, good))


class Ceiling:
    """A share of the target's requests that may be bad, whatever the source does.

    Where the source itself is above the ceiling now (a shared outage, a long-known fault), going back to it would not
    help: then the source's share is the ceiling.
    """

    def __init__(self, ceiling: float) -> None:
        self.ceiling = ceiling
        self.harm = no_evidence(len(EVENT_TILTS))
        self.good = no_evidence(4)
        self._source_bad = 0.0
        self._source_all = 0.0

    def learn(self, bad: int, good: int) -> None:
        """Requests of the source; the newest count most."""
        keep = 0.5 ** ((bad + good) / _HALF_LIFE)
        self._source_bad = self._source_bad * keep + bad
        self._source_all = self._source_all * keep + bad + good

    @property
    def effective(self) -> float:
        """What the target is held to now."""
        if self._source_all < _KNOWN_FROM:
            return self.ceiling
        share = self._source_bad / self._source_all
        if share <= self.ceiling:
            return self.ceiling
        return min(share + _SURE * math.sqrt(share * (1.0 - share) / self._source_all), 0.999)

    def add(self, bad: float, good: float, forgiven: float = 0.0) -> None:
        """Requests of the target; those that are ``forgiven`` are no evidence of harm, but none of its absence."""
        if bad or good:
            self.harm = self.harm.after(above(self.effective, bad, good))
        if bad or good or forgiven:
            self.good = self.good.after(below(self.ceiling, bad + forgiven, good))


class _Moments:
    """Count, mean and spread of the logarithms of values."""

    __slots__ = ("_squares", "_sum", "count")

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._squares = 0.0

    def learn(self, histogram: Histogram) -> None:
        whole, total, squares = 0, 0.0, 0.0
        for bin, count in histogram.items():
            middle = bin + 0.5
            whole += count
            total += count * middle
            squares += count * middle * middle
        self.count += whole
        self._sum += total * _LOG_BIN
        self._squares += squares * _LOG_BIN**2

    @property
    def mean(self) -> float:
        return self._sum / self.count

    @property
    def spread(self) -> float:
        return max(_LEAST_SPREAD, math.sqrt(max(0.0, self._squares / self.count - self.mean**2)))


class _Within:
    """How much the values of one user differ among themselves."""

    def __init__(self) -> None:
        self._squares = 0.0
        self._freedom = 0

    def learn(self, user: Answered) -> None:
        self._squares += (user.squares - user.total * user.total / user.count) * _LOG_BIN**2
        self._freedom += user.count - 1

    def spread_of_mean(self, spread: float, count: int) -> float:
        """Of the mean of so many values of one user, where a single value of any user has ``spread``."""
        if self._freedom < _LEARN:
            return spread
        whole = spread * spread
        within = min(self._squares / self._freedom, whole)
        return max(math.sqrt(whole - within + within / count), spread * _MEAN_LEAST)


def p95(histogram: Histogram) -> float | None:
    """For people."""
    return quantile(histogram, 1.0 - TAIL)


def median(histogram: Histogram) -> float | None:
    """For people."""
    return quantile(histogram, 0.5)


def _top(known: Histogram, sure: bool = False) -> float | None:
    """Logarithm of the p95's upper edge; ``sure``: of its upper 99 % limit. None where too little is known."""
    total = sum(known.values())
    if total < _LEARN_TAIL:
        return None
    rank = (1.0 - TAIL) * total
    if sure:  # 100 values suffice: the largest is above the p95 with 99.4 %
        rank = min(rank + _SURE * math.sqrt(total * TAIL * (1.0 - TAIL)) + 1.0, total)
    for bin in sorted(known):
        rank -= known[bin]
        if rank <= 1e-9:
            return (bin + 1) * _LOG_BIN
    return None


def _slower(histogram: Histogram, top: float) -> int:
    """Values above, by their bins' middles."""
    return sum([count for bin, count in histogram.items() if (bin + 0.5) * _LOG_BIN > top])


def _into(known: Histogram, more: Histogram) -> None:
    for bin, count in more.items():
        known[bin] = known.get(bin, 0) + count
