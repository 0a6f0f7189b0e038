"""A decision in words for people, with the numbers that it was made from. Decides nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from turnout.core.judging.comparison import SIGNS, Comparison

if TYPE_CHECKING:
    from turnout.core.judging.judgement import JudgeSettings
    from turnout.core.judging.tally import Arm

_LOOK = {"empty": "empty", "repetition": "looping", "length_stop": "cut at the length limit"}


def harmed(name: str, source: str, target: str, settings: JudgeSettings, comparison: Comparison) -> str:
    """What is worse, by the figure that weighs most."""
    before, now = comparison.source, comparison.target
    usual, found = (_ms(value) for value in comparison.values(name))
    match name:
        case "errors":
            return f"{target} failed {_failed(now)} while {source} failed {_failed(before)}"
        case "error_ceiling":
            return f"{target} failed {_failed(now)}, and no more than {comparison.error_ceiling:.1%} may fail"
        case "first_byte":
            return f"the first byte of {target} takes {found} and that of {source} {usual} (medians)"
        case "first_byte_p95":
            return f"the first byte of {target} takes {found} and that of {source} {usual} (p95)"
        case "token_time":
            return f"a token of {target} takes {found} and one of {source} {usual} (medians)"
        case "latency_ceiling":
            ceiling = _ms(settings.latency_ceiling_ms)
            return f"the p95 of {target} to the last byte is {found}, the ceiling {ceiling}"
        case "shadow_errors":
            pairs = comparison.shadow_errors
            return (
                f"of {now.requests:,} copies {pairs.target:,} failed on {target} where {source} answered, and "
                f"{pairs.source:,} the other way round"
            )
        case _:
            said = f"{_of(now.signs.get(SIGNS[name], 0), now.requests)} answers of {target} were {_LOOK[name]}"
            if not before.requests:
                return said
            return f"{said}, and {_of(before.signs.get(SIGNS[name], 0), before.requests)} of {source}"


def passed(source: str, target: str, comparison: Comparison) -> str:
    """Why a target may go on."""
    said = f"{target} failed {_failed(comparison.target)}"
    if comparison.source.requests:
        said += f" and {source} {_failed(comparison.source)}"
    usual, found = comparison.values("first_byte")
    if usual is not None and found is not None:
        said += f"; its first byte took {_ms(found)} and that of {source} {_ms(usual)} (medians)"
    return said


def split_broken(target: str, comparison: Comparison) -> str:
    """Why the comparison can't be trusted."""
    split, what = comparison.split, "users" if comparison.sticky else "requests"
    units = split.target + split.source
    return (
        f"the split is not what the route says: {target} should get {comparison.share:.1%} of the {what} and got "
        f"{split.target / units:.1%} ({_of(split.target, units)}); nothing can be compared, only ceilings still count"
    )


def e_value(log_e: float) -> str:
    """An e-value with the digits that matter, from its logarithm."""
    if log_e >= math.log(1e6):
        return f"1e{log_e / math.log(10.0):.0f}"
    e = math.exp(log_e)
    return f"{e:,.0f}" if e >= 10.0 else f"{e:.2g}"


def _failed(arm: Arm) -> str:
    said = f"{_of(arm.errors, arm.requests)} requests"
    if not arm.failed_users:
        return said
    return f"{said} (of {arm.failed_users:,} users)" if arm.failed_users > 1 else f"{said} (of 1 user)"


def _of(count: int, whole: int) -> str:
    return f"{count:,} of {whole:,}"


def _ms(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f} ms" if value >= 10.0 else f"{value:.1f} ms"
