"""How a version does, from samples and probes: status with reasons, and a switch's effect. Pure; decides nothing.

``alert_thresholds`` are absolute ceilings. A version is judged against its neighbour elsewhere (core/judging).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping  # noqa: TC003  part of public signatures
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TypeVar

import msgspec

from turnout.events.health import (
    HealthEvent,
    HealthSampled,
    Histogram,
    ProbeFailed,
    ProbePassed,
    quantile,
)

K = TypeVar("K", str, int)

#: Standard errors of a two-sided 95 % interval.
_Z = 1.959964
#: How far back a status looks.
WINDOW_S = 300.0
#: Below so many requests a quantile says nothing about a status; of a share, so many errors say enough.
ENOUGH = 20
ERRORS_ENOUGH = 3
#: Probes that failed in a row: one may be a hiccup, so many are not.
PROBES_DEGRADED = 1
PROBES_UNHEALTHY = 3


class HealthStatus(StrEnum):
    """One word for a version."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"


class Numbers(msgspec.Struct, frozen=True):
    """What one version did in a time.

    ``p95_ms`` to the last byte, ``first_p95_ms`` to the first; ``low`` and ``high``: 95 % limits of the error rate
    (Wilson's interval); ``…_limits_ms``: 95 % limits of the p95 (order statistics), as if the requests were
    independent of each other. None where nothing was measured, or too little for limits.
    """

    requests: int = 0
    errors: int = 0
    error_rate: float | None = None
    low: float | None = None
    high: float | None = None
    first_p50_ms: float | None = None
    first_p95_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    token_p50_ms: float | None = None
    first_p95_limits_ms: tuple[float, float] | None = None
    p95_limits_ms: tuple[float, float] | None = None
    outcomes: dict[str, int] = {}
    signs: dict[str, int] = {}


class VersionHealth(msgspec.Struct, frozen=True):
    """Status of one version now, why, the numbers of the newest window, and requests ``in_flight`` at all gateways."""

    version: str
    status: HealthStatus
    reasons: tuple[str, ...]
    numbers: Numbers
    instances: int
    probe: str
    in_flight: int = 0


class Finding(msgspec.Struct, frozen=True):
    """A version over a ceiling, for an alert. ``kind``: error_rate, latency_p95 or version_unhealthy."""

    model: str
    version: str
    kind: str
    summary: str


class SwitchImpact(msgspec.Struct, frozen=True):
    """What clients of a model noticed: before the switch, while it ran, and after it, all versions together."""

    switch: str
    before: Numbers
    during: Numbers
    after: Numbers


def numbers(samples: Iterable[HealthSampled]) -> Numbers:
    """All samples together."""
    requests = errors = 0
    outcomes: dict[str, int] = {}
    signs: dict[str, int] = {}
    first: Histogram = {}
    total: Histogram = {}
    token: Histogram = {}
    for sample in samples:
        requests += sample.requests
        errors += sample.errors
        _add(outcomes, sample.outcomes)
        _add(signs, sample.signs)
        for histogram in sample.first_ms.values():
            _add(first, histogram)
        for answers in sample.answers.values():
            for bins in answers.values():
                _add(first, Counter(bins))
        _add(total, sample.total_ms)
        _add(token, sample.token_ms)
    low, high = wilson(errors, requests)
    return Numbers(
        requests=requests,
        errors=errors,
        error_rate=errors / requests if requests else None,
        low=low,
        high=high,
        first_p50_ms=_rounded(quantile(first, 0.5)),
        first_p95_ms=_rounded(quantile(first, 0.95)),
        p50_ms=_rounded(quantile(total, 0.5)),
        p95_ms=_rounded(quantile(total, 0.95)),
        token_p50_ms=_rounded(quantile(token, 0.5)),
        first_p95_limits_ms=p95_limits(first),
        p95_limits_ms=p95_limits(total),
        outcomes=outcomes,
        signs=signs,
    )


def wilson(errors: int, requests: int) -> tuple[float | None, float | None]:
    """95 % limits of a share (Wilson 1927); None where there is nothing to divide."""
    if requests <= 0:
        return None, None
    z2 = _Z**2
    share = errors / requests
    middle = (share + z2 / (2 * requests)) / (1 + z2 / requests)
    half = (z2 * (share * (1 - share) / requests + z2 / (4 * requests**2))) ** 0.5 / (1 + z2 / requests)
    return max(0.0, middle - half), min(1.0, middle + half)


def p95_limits(histogram: Histogram) -> tuple[float, float] | None:
    """95 % limits of the p95, from the ranks between which it lies; None where the upper one is above all values."""
    count = sum(histogram.values())
    if count < ENOUGH:
        return None
    half = _Z * (0.95 * 0.05 / count) ** 0.5
    low, high = quantile(histogram, 0.95 - half), quantile(histogram, 0.95 + half)
    if 0.95 + half > 1.0 or low is None or high is None:
        return None
    return round(low, 1), round(high, 1)


def check_model_health(
    events: Iterable[HealthEvent],
    *,
    model: str,
    versions: Mapping[str, int],
    thresholds: Mapping[str, float],
    now: datetime,
    in_flight: Mapping[str, int] | None = None,
) -> tuple[VersionHealth, ...]:
    """Status of each version.

    Args:
        events: samples and probes of the model, oldest first, by arrival.
        model: the served name.
        versions: version → how many ready instances it has.
        thresholds: ``alert_thresholds`` of the configuration.
        now: UTC; samples that ended more than WINDOW_S before are not looked at.
        in_flight: version → requests that have not ended; none where it is not known.
    """
    running = in_flight or {}
    since = now - timedelta(seconds=WINDOW_S)
    samples: dict[str, list[HealthSampled]] = {version: [] for version in versions}
    probes: dict[str, dict[str, ProbePassed | ProbeFailed]] = {version: {} for version in versions}
    for event in events:
        if event.model != model or event.version not in versions:
            continue
        if isinstance(event, HealthSampled):
            if event.ended >= since:
                samples[event.version].append(event)
        elif isinstance(event, ProbePassed | ProbeFailed):
            probes[event.version][event.instance] = event
    return tuple(
        _status(
            version,
            numbers(samples[version]),
            tuple(probes[version].values()),
            count,
            thresholds,
            running.get(version, 0),
        )
        for version, count in versions.items()
    )


def findings(model: str, health: Iterable[VersionHealth], thresholds: Mapping[str, float]) -> tuple[Finding, ...]:
    """What an alert should be raised for now."""
    found: list[Finding] = []
    for one in health:
        over = _over(one.numbers, thresholds)
        found.extend(Finding(model, one.version, kind, f"{model} {one.version}: {why}") for kind, why in over.items())
        if one.status is HealthStatus.UNHEALTHY and not over:
            why = "; ".join(one.reasons)
            found.append(Finding(model, one.version, "version_unhealthy", f"{model} {one.version}: {why}"))
    return tuple(found)


def monitor_switch_impact(
    events: Iterable[HealthEvent], *, switch: str, model: str, began: datetime, ended: datetime | None, now: datetime
) -> SwitchImpact:
    """Before, during and after: windows as long as the switch took, at least WINDOW_S where there is as much."""
    until = ended or now
    span = max(until - began, timedelta(seconds=WINDOW_S))
    before: list[HealthSampled] = []
    during: list[HealthSampled] = []
    after: list[HealthSampled] = []
    for event in events:
        if not isinstance(event, HealthSampled) or event.model != model:
            continue
        if began - span <= event.ended < began:
            before.append(event)
        elif began <= event.ended <= until:
            during.append(event)
        elif ended is not None and ended < event.ended <= ended + span:
            after.append(event)
    return SwitchImpact(switch, numbers(before), numbers(during), numbers(after))


def _status(
    version: str,
    counted: Numbers,
    probes: tuple[ProbePassed | ProbeFailed, ...],
    instances: int,
    thresholds: Mapping[str, float],
    in_flight: int,
) -> VersionHealth:
    reasons: list[str] = []
    status = HealthStatus.HEALTHY
    failing = [probe for probe in probes if isinstance(probe, ProbeFailed)]
    row = max((probe.row for probe in failing), default=0)
    if not instances:
        status, reasons = HealthStatus.UNKNOWN, ["no ready instance"]
    elif not counted.requests and not probes:
        status, reasons = HealthStatus.UNKNOWN, [f"no request in {WINDOW_S:g} s and no probe yet"]
    if over := tuple(_over(counted, thresholds).values()):
        status = HealthStatus.UNHEALTHY
        reasons.extend(over)
    if row >= PROBES_UNHEALTHY and len(failing) >= max(1, instances):
        status = HealthStatus.UNHEALTHY
        reasons.append(f"{row} probes in a row failed: {failing[-1].reason}")
    elif row >= PROBES_DEGRADED and status is not HealthStatus.UNHEALTHY:
        status = HealthStatus.DEGRADED
        reasons.append(f"a probe of {len(failing)} of {instances} instances failed: {failing[-1].reason}")
    probe = "failing" if failing else "passed" if probes else "none yet"
    return VersionHealth(version, status, tuple(reasons), counted, instances, probe, in_flight)


def _over(counted: Numbers, thresholds: Mapping[str, float]) -> dict[str, str]:
    """Ceilings that the numbers are above for certain enough: the lower limit of the share counts, not the share."""
    over: dict[str, str] = {}
    ceiling = thresholds.get("error_rate")
    if ceiling is not None and counted.errors >= ERRORS_ENOUGH and counted.low is not None and counted.low > ceiling:
        share = counted.errors / counted.requests
        over["error_rate"] = (
            f"{counted.errors} of {counted.requests} requests failed ({share:.1%}, ceiling {ceiling:.1%})"
        )
    slow = thresholds.get("latency_p95")
    if slow is not None and counted.requests >= ENOUGH and counted.p95_ms is not None and counted.p95_ms > slow:
        over["latency_p95"] = f"p95 is {counted.p95_ms:.0f} ms (ceiling {slow:.0f} ms)"
    return over


def _add(into: dict[K, int], counts: Mapping[K, int]) -> None:
    for name, count in counts.items():
        into[name] = into.get(name, 0) + count


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
