"""What a rollout can find, and after how many requests: rules of thumb for ``switch --dry-run``. Judges nothing."""

from __future__ import annotations

import math

import msgspec

from turnout.core.judging.comparison import WARM_UP
from turnout.core.judging.judge import WEIGHTS
from turnout.core.judging.judgement import JudgeSettings  # noqa: TC001  part of a public signature
from turnout.core.judging.kernels import (
    EVENT_TILTS,
    ONE_TILT,
    WORSE_TILTS,
    above,
    not_slower,
    score,
    which_arm,
)

#: What is assumed of a source that nobody has measured, or that never failed yet.
ERROR_RATE = 0.01
#: The least rate of errors that a multiple of is worth a line.
_RATE_LEAST = 0.001
_DEAD = 0.95
_GRID = 81


class Detectable(msgspec.Struct, frozen=True):
    """One fault and when it is found, in half of the cases.

    Attributes:
        what: the fault in words.
        requests: to the target, about.
        seconds: until then, about; None where the traffic is not known.
    """

    what: str
    requests: int
    seconds: float | None = None


def detectable(
    settings: JudgeSettings,
    weight: float,
    requests_per_s: float | None,
    error_rate: float | None,
    sigma: float = 0.7,
    steps: int = 1,
) -> tuple[Detectable, ...]:
    """What can be found at one level of a rollout.

    Args:
        settings: of the judge.
        weight: percent that the target has; nothing is compared at 0 and 100.
        requests_per_s: of the model, both versions together; None where it is not known.
        error_rate: the source's; None where it is not known.
        sigma: spread of the logarithm of the time to the first byte.
        steps: judged steps that share the error budget, the bake included.
    """
    share = weight / 100.0
    if not 0.0 < share < 1.0:
        return ()
    usual = max(error_rate or ERROR_RATE, _RATE_LEAST)
    needed = steps / settings.alpha_rollback
    found = [_Fault("every request fails", min(settings.dead_run, _errors(settings, share, usual, 1.0, needed)))]
    for times in (10, 5, 2):
        if usual * times <= _DEAD:
            what = f"errors {times} times as often ({100 * usual:.2g} to {100 * usual * times:.2g} %)"
            found.append(_Fault(what, _errors(settings, share, usual, usual * times, needed)))
    for slower in (2.0, 1.5):
        if slower > settings.latency_tolerance:
            shift = math.log(slower / settings.latency_tolerance) / sigma
            what = f"first byte {slower:g} times as late"
            found.append(_Fault(what, _latency(settings, share, shift, needed)))
    per_s = None if requests_per_s is None else requests_per_s * share
    return tuple(
        Detectable(fault.what, math.ceil(fault.requests), fault.requests / per_s if per_s else None)
        for fault in found
        if math.isfinite(fault.requests)
    )


def units_to_pass(settings: JudgeSettings, weight: float, sigma: float = 0.7) -> int | None:
    """Requests to the target, or users of it where requests are sticky, until its first byte is shown to be no later.

    In half of the cases, where both versions are equal; None where the first byte is not asked for.

    Args:
        settings: of the judge.
        weight: percent that the target has.
        sigma: spread of the logarithm of the time to the first byte.
    """
    share = weight / 100.0
    if not 0.0 < share < 1.0 or _part(settings, "first_byte") is None:
        return None
    margin = math.log(settings.latency_margin) / sigma
    target = [(not_slower(z - margin, margin), count) for z, count in _normal(1.0)]
    source = [(not_slower(z, margin), count) for z, count in _normal((1.0 - share) / share)]
    return math.ceil(_until(which_arm(ONE_TILT, share, target, source), 1.0 / settings.alpha_promote))


class _Fault(msgspec.Struct, frozen=True, gc=False):
    what: str
    requests: float


def _errors(settings: JudgeSettings, share: float, usual: float, rate: float, needed: float) -> float:
    """Requests to the target until the faster of ratio and ceiling has it."""
    found = [math.inf]
    if (part := _part(settings, "errors")) is not None:
        others = usual * (1.0 - share) / share  # failures of the source for each request of the target
        growth = which_arm(EVENT_TILTS, share, [(1.0, rate)], [(1.0, others)])
        found.append(_until(growth, needed / part))
    ceiling = settings.error_ceiling
    if ceiling is not None and 0.0 < ceiling < 1.0 and (part := _part(settings, "error_ceiling")) is not None:
        found.append(_until(above(ceiling, rate, 1.0 - rate), needed / part))
    return min(found)


def _latency(settings: JudgeSettings, share: float, shift: float, needed: float) -> float:
    """Requests to the target until its times are seen to be ``shift`` spreads above the source's."""
    part = _part(settings, "first_byte")
    if part is None:
        return math.inf
    pooled = share * shift
    target = _scores(shift - pooled, 1.0)
    source = _scores(-pooled, (1.0 - share) / share)
    return WARM_UP + _until(which_arm(WORSE_TILTS, share, target, source), needed / part)


def _until(growth: list[float], needed: float) -> float:
    """How often the best of the tilts must grow: all of them share the budget equally."""
    best = max(growth)
    return math.log(needed * len(growth)) / best if best > 0.0 else math.inf


def _part(settings: JudgeSettings, name: str) -> float | None:
    """A figure's part of the budget; None where it does not decide."""
    weights = {
        key: weight for key, weight in WEIGHTS["compared"].items() if not settings.compare or key in settings.compare
    }
    return weights[name] / sum(weights.values()) if name in weights else None


def _scores(shift: float, count: float) -> list[tuple[float, float]]:
    """Scores of a normal distribution that is ``shift`` off the pooled one, on a grid."""
    return [(score(z + shift), weight) for z, weight in _normal(count)]


def _normal(count: float) -> list[tuple[float, float]]:
    """A normal distribution of so many values, on a grid."""
    points = [6.0 * n / (_GRID - 1) - 3.0 for n in range(_GRID)]
    weights = [math.exp(-(z * z) / 2.0) for z in points]
    whole = sum(weights)
    return [(z, count * w / whole) for z, w in zip(points, weights, strict=True)]
