"""All signals of one step: takes counted windows, pairs the arms, and says what evidence there is. Decides nothing."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from turnout.core.judging.kernels import OTHER_TILTS, Evidence, log_sum_exp
from turnout.core.judging.signals import TAIL, Ceiling, Events, RecordedTails, Scores, Split, Tails, median, p95
from turnout.core.judging.tally import Arm, Counted
from turnout.core.judging.users import Users
from turnout.events.health import HealthSampled, Histogram, ShadowSampled, bin_of

if TYPE_CHECKING:
    from turnout.core.judging.judgement import JudgeSettings

#: The first requests of a target that was just loaded: their errors count, their latency does not.
WARM_UP = 20
#: The split is not what the route says, with a chance of error of one in a thousand.
SPLIT_NEEDED = 1000.0
#: Copies of a shadow may show a sign in this share, whatever the source's share is.
SIGN_CEILING = 0.05
#: Figure → its sign.
SIGNS = {"empty": "empty", "repetition": "repetition", "length_stop": "length"}

#: How a target is judged: beside its source, by copies that reach nobody, or alone with all the traffic.
Mode = Literal["compared", "shadow", "alone"]

_NEVER = datetime(1, 1, 1, tzinfo=UTC)
#: An arm that had nothing in a period.
_NOTHING = HealthSampled(
    gateway="", model="", version="", window=0, revision=0, share=0.0, started=_NEVER, ended=_NEVER
)


class Comparison:
    """What is known of target and source in one step.

    Args:
        settings: margins and ceilings.
        target: name of the version that is judged.
        beside: a source runs beside it, so windows of both are compared.
        warm: the target has had its warm-up.
    """

    def __init__(self, settings: JudgeSettings, target: str, *, beside: bool, warm: bool) -> None:
        self._users = Users(target)
        self.target = Arm(self._users)
        self.source = Arm(self._users)
        self.share = 0.0
        self.split_broken = False
        self.split = Split()
        self.shadow_errors = Events()
        self._name = target
        self._beside = beside
        self._warm = WARM_UP if warm else 0
        self._shadow = False
        self._waiting: dict[str, Counted] = {}  # gateway → a window whose other arm may still come
        self._split_by: tuple[str, int] | None = None
        self._units = 0
        self._requests = 0
        self._errors = Events(settings.error_margin)
        self._signs = {name: Events() for name in SIGNS}
        self._sign_ceilings = {name: Ceiling(SIGN_CEILING) for name in ("empty", "repetition")}
        self._first_byte = Scores(tolerance=settings.latency_tolerance, margin=settings.latency_margin)
        self._first_byte_p95 = Tails(settings.latency_tolerance)
        self._recorded_p95 = RecordedTails(settings.latency_margin)
        self._token_time = Scores(tolerance=settings.latency_tolerance)
        self._tokens = Scores(OTHER_TILTS)
        self._errors_most = _ceiling(settings.error_ceiling)
        self._slow_most = Ceiling(TAIL) if settings.latency_ceiling_ms else None
        self._slow_ms = settings.latency_ceiling_ms or 0.0

    @property
    def mode(self) -> Mode:
        """How the target is judged."""
        return "shadow" if self._shadow else "compared" if self._beside else "alone"

    @property
    def sticky(self) -> bool:
        """Whether users are, so that they are what is counted."""
        return bool(self.target.users or self.source.users)

    @property
    def target_users(self) -> int:
        """Distinct sticky users of the target, at least."""
        return max(self.target.users, self._users.of_target)

    @property
    def error_ceiling(self) -> float:
        """Share of requests that may fail now; 0 where there is no ceiling."""
        return 0.0 if self._errors_most is None else self._errors_most.effective

    # Windows

    def take(self, sample: HealthSampled) -> None:
        """One window of target or source under the step's route."""
        if sample.version == self._name:
            counted = self.target.take(sample)
            self._hold_to_ceilings(counted)
            if not self._beside:
                self._recorded_p95.add(sample.first_ms, self._warm >= WARM_UP)
                self._warm += counted.requests
        else:
            counted = self.source.take(sample)
            self._learn(counted)
        if self._beside:
            self._pair(counted)

    def take_record(self, sample: HealthSampled) -> None:
        """One window of the source from before the target had all the traffic."""
        self._learn(self.source.take(sample))
        self._recorded_p95.learn(sample.first_ms)
        self._recorded_p95.learn(self._users.first_answers(sample))

    def take_copies(self, sample: ShadowSampled) -> None:
        """One window of copies."""
        self._shadow = True
        failed = self.target.take_copies(sample)
        self.shadow_errors.add(0.5, sample.only_copy_failed, sample.only_primary_failed)
        if self._errors_most is not None:
            self._errors_most.add(failed, max(0, sample.copies - failed))
        if self._slow_most is not None:
            self._slow_most.add(*_beyond(sample.copy_ms, self._slow_ms))
        for name, ceiling in self._sign_ceilings.items():
            bad = sample.signs.get(SIGNS[name], 0)
            ceiling.add(bad, max(0, sample.copies - bad))

    def _hold_to_ceilings(self, counted: Counted) -> None:
        sample = counted.sample
        if self._errors_most is not None:
            forgiven = counted.forgiven if self._beside else 0
            self._errors_most.add(counted.errors - forgiven, max(0, counted.requests - counted.errors), forgiven)
        if self._slow_most is not None and self._warm >= WARM_UP:
            slow, fast = _beyond(sample.total_ms, self._slow_ms)
            weight = self._independent if self._beside else 1.0
            self._slow_most.add(slow * weight, fast * weight)

    def _learn(self, counted: Counted) -> None:
        """What the source does itself."""
        sample, requests = counted.sample, counted.requests
        if self._errors_most is not None:
            self._errors_most.learn(counted.errors, max(0, requests - counted.errors))
        if self._slow_most is not None:
            self._slow_most.learn(*_beyond(sample.total_ms, self._slow_ms))
        for name, ceiling in self._sign_ceilings.items():
            bad = sample.signs.get(SIGNS[name], 0)
            ceiling.learn(bad, max(0, requests - bad))

    def _pair(self, counted: Counted) -> None:
        """Compare a window once its other arm is in: between the two, the first alone would lean to one side.

        A gateway sends both arms of one period together, and leaves out one that had nothing.
        """
        sample = counted.sample
        first = self._waiting.pop(sample.gateway, None)
        if first is None:
            self._waiting[sample.gateway] = counted
            return
        same = (first.sample.ended, first.sample.revision) == (sample.ended, sample.revision)
        if same and first.sample.version != sample.version:
            self._compare(first, counted)
        else:
            self._compare(first)
            self._waiting[sample.gateway] = counted

    def _compare(self, *windows: Counted) -> None:
        """Both arms of one period, or the only one that had something."""
        target = next((one for one in windows if one.sample.version == self._name), None)
        source = next((one for one in windows if one is not target), None)
        share = target.sample.share if target is not None else 1.0 - windows[0].sample.share
        if not 0.0 < share < 1.0:
            return  # one of them gets nothing from the split: there is nothing to compare
        self.share = share
        mine = _NOTHING if target is None else target.sample
        other = _NOTHING if source is None else source.sample
        failed = (0 if target is None else target.unit_errors, 0 if source is None else source.unit_errors)
        self._errors.add(share, *failed)
        for name, events in self._signs.items():
            sign = SIGNS[name]
            counts = [0 if counted is None else counted.unit_signs.get(sign, 0) for counted in (target, source)]
            events.add(share, *counts)
        scored = self._warm >= WARM_UP
        self._first_byte.add(share, mine.first_ms, other.first_ms, scored)
        self._first_byte_p95.add(share, mine.first_ms, other.first_ms, scored)
        my_firsts, other_firsts = (self._users.first_answers(sample) for sample in (mine, other))
        self._first_byte.add_users(share, my_firsts, other_firsts, scored)
        self._first_byte_p95.add(share, my_firsts, other_firsts, scored)
        newest = windows[0].sample
        self._first_byte.add_means(share, self._users.after_a_while(newest.gateway, newest.ended))
        self._token_time.add(share, _one(mine.token_ms), _one(other.token_ms), scored)
        self._tokens.add(share, _one(mine.tokens), _one(other.tokens), scored=True)
        self.split.add(share, self._split_units(mine), self._split_units(other))
        self.split_broken = self.split_broken or self.split.harm.log_e >= math.log(SPLIT_NEEDED)
        self._warm += 0 if target is None else target.requests
        self._units += mine.assigned + other.assigned
        self._requests += sum([one.requests for one in windows])

    @property
    def _independent(self) -> float:
        """How much a request counts where users are sticky: those of one user are not independent of each other."""
        if not self.sticky or self._requests <= self._units:
            return 1.0
        return self._units / self._requests

    def _split_units(self, sample: HealthSampled) -> int:
        """Units for the check of the split: users by one gateway under one revision only, others see them again."""
        if not sample.users:
            return sample.assigned
        here = (sample.gateway, sample.revision)
        if self._split_by is None:
            self._split_by = here
        return sample.assigned if here == self._split_by else sample.assigned - sample.users

    # Evidence

    def harm(self) -> dict[str, Evidence]:
        """Figure → evidence of harm, of all that can decide in this mode."""
        found: dict[str, Evidence] = {}
        match self.mode:
            case "compared":
                found["errors"] = self._errors.harm
                found["first_byte"] = self._first_byte.harm
                found["first_byte_p95"] = self._first_byte_p95.harm
                if not self.sticky:
                    found["token_time"] = self._token_time.harm
                found |= {name: events.harm for name, events in self._signs.items()}
            case "shadow":
                found["shadow_errors"] = self.shadow_errors.harm
                found |= {name: ceiling.harm for name, ceiling in self._sign_ceilings.items()}
            case "alone":
                found["first_byte_p95"] = self._recorded_p95.harm
        if self._errors_most is not None:
            found["error_ceiling"] = self._errors_most.harm
        if self._slow_most is not None:
            found["latency_ceiling"] = self._slow_most.harm
        return found

    def shown(self) -> dict[str, Evidence]:
        """Figure → evidence of a difference that is shown and rolls nothing back."""
        if self.mode != "compared":
            return {}
        found = {"tokens": self._tokens.harm, "sample_ratio": self.split.harm}
        # Times of a token are of all answers: those of one busy user look like many that agree.
        return {"token_time": self._token_time.harm, **found} if self.sticky else found

    def log_good(self, name: str) -> float:
        """Logarithm of the evidence of no harm, of ``errors``, ``error_ceiling`` and ``first_byte``."""
        ceiling = None if self._errors_most is None else self._errors_most.good
        good = {"errors": self._errors.good, "error_ceiling": ceiling, "first_byte": self._first_byte.good}[name]
        log_e = 0.0 if good is None else good.log_e
        if name == "errors" and ceiling is not None:
            # Where nothing fails there is no ratio: "below the ceiling" is the other way to be not worse.
            return log_sum_exp((log_e, ceiling.log_e)) - math.log(2.0)
        return log_e

    # Figures

    def values(self, name: str) -> tuple[float | None, float | None]:
        """What a figure shows of source and target."""
        source, target = self.source, self.target
        match name:
            case "errors" | "error_ceiling":
                return _share(source.errors, source.requests), _share(target.errors, target.requests)
            case "shadow_errors":
                failed, copies = self.shadow_errors, target.requests
                return _share(failed.source, copies), _share(failed.target, copies)
            case "first_byte":
                return median(self._first_byte.source), median(self._first_byte.target)
            case "first_byte_p95":
                tails = self._first_byte_p95 if self._beside else self._recorded_p95
                return p95(tails.source), p95(tails.target)
            case "token_time":
                return median(self._token_time.source), median(self._token_time.target)
            case "tokens":
                return median(self._tokens.source), median(self._tokens.target)
            case "latency_ceiling":
                return p95(source.total_ms), p95(target.total_ms)
            case "sample_ratio":
                units = self.split.target + self.split.source
                return (self.share, self.split.target / units) if units else (None, None)
            case _:
                sign = SIGNS[name]
                return (
                    _share(source.signs.get(sign, 0), source.requests),
                    _share(target.signs.get(sign, 0), target.requests),
                )

    def limits(self, name: str) -> tuple[float | None, float | None]:
        """Confidence limits of target / source; None where they make no sense yet."""
        if self.mode != "compared" or not self.share:
            return None, None
        match name:
            case "errors":
                return self._errors.limits(self.share)
            case "first_byte":
                return self._first_byte.limits()
            case "token_time":
                return self._token_time.limits()
            case "empty" | "repetition" | "length_stop":
                return self._signs[name].limits(self.share)
            case _:
                return None, None


def _ceiling(share: float | None) -> Ceiling | None:
    return Ceiling(share) if share is not None and 0.0 < share < 1.0 else None


def _share(count: int, whole: int) -> float | None:
    return count / whole if whole else None


def _one(histogram: Histogram) -> dict[str, Histogram]:
    """A single stratum."""
    return {"": histogram} if histogram else {}


def _beyond(histogram: Histogram, limit_ms: float) -> tuple[int, int]:
    """Values in bins above the one of the limit, and all others."""
    top = bin_of(limit_ms)
    slow = sum([count for bin, count in histogram.items() if bin > top])
    return slow, sum(histogram.values()) - slow
