"""How a version does: status with reasons, findings for alerts, and what a switch did to clients."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from turnout.core.health import (
    HealthStatus,
    VersionHealth,
    check_model_health,
    findings,
    monitor_switch_impact,
    wilson,
)
from turnout.events.health import HealthEvent, HealthSampled, ProbeFailed, ProbePassed, bin_of, merged, quantile

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
CEILINGS = {"error_rate": 0.05, "latency_p95": 5000.0}


def sample(
    version: str = "v1", *, ago_s: float = 1.0, ms: float = 100.0, ok: int = 50, failed: int = 0
) -> HealthSampled:
    ended = NOW - timedelta(seconds=ago_s)
    return HealthSampled(
        gateway="g1",
        model="chat",
        version=version,
        window=1,
        revision=1,
        share=1.0,
        started=ended - timedelta(seconds=1),
        ended=ended,
        requests=ok + failed,
        outcomes={"ok": ok, "http_error": failed},
        total_ms={bin_of(ms): ok},
    )


def health(*events: HealthEvent, instances: int = 1) -> VersionHealth:
    (one,) = check_model_health(events, model="chat", versions={"v1": instances}, thresholds=CEILINGS, now=NOW)
    return one


def test_a_version_that_answers_well_is_healthy() -> None:
    one = health(sample(ok=100))
    assert (one.status, one.reasons) == (HealthStatus.HEALTHY, ())
    assert one.numbers.error_rate == 0.0


@pytest.mark.parametrize(("ok", "failed"), [(2, 5), (100, 20)])
def test_a_version_that_errs_too_often_is_unhealthy_and_says_how_often(ok: int, failed: int) -> None:
    one = health(sample(ok=ok, failed=failed))
    assert one.status is HealthStatus.UNHEALTHY
    assert f"{failed} of {ok + failed} requests failed" in one.reasons[0]


def test_one_error_of_one_request_says_nothing_yet() -> None:
    assert health(sample(ok=0, failed=1)).status is HealthStatus.HEALTHY


def test_an_error_rate_that_may_be_below_the_ceiling_is_no_finding() -> None:
    assert findings("chat", (health(sample(ok=47, failed=3)),), CEILINGS) == ()


def test_a_slow_version_is_unhealthy() -> None:
    one = health(sample(ms=9000.0))
    assert one.status is HealthStatus.UNHEALTHY
    assert "ceiling 5000 ms" in one.reasons[0]


def test_nothing_known_is_unknown_and_never_healthy() -> None:
    assert health().status is HealthStatus.UNKNOWN
    assert health(sample(ago_s=3600.0)).status is HealthStatus.UNKNOWN
    assert health(sample(), instances=0).status is HealthStatus.UNKNOWN


def test_an_engine_that_hangs_while_it_looks_alive_is_found_by_its_probes() -> None:
    failed = [ProbeFailed("i1", "chat", "v1", row, row, "no answer within 5 s", NOW) for row in (1, 2, 3)]
    assert health(sample(), failed[0]).status is HealthStatus.DEGRADED
    one = health(sample(), *failed)
    assert one.status is HealthStatus.UNHEALTHY
    assert "3 probes in a row failed: no answer within 5 s" in one.reasons
    assert [f.kind for f in findings("chat", (one,), CEILINGS)] == ["version_unhealthy"]
    again = health(sample(), *failed, ProbePassed("i1", "chat", "v1", 4, 0.1, NOW))
    assert again.status is HealthStatus.HEALTHY


def test_a_finding_names_the_ceiling_that_was_passed() -> None:
    one = health(sample(ok=50, failed=50))
    (found,) = findings("chat", (one,), CEILINGS)
    assert (found.kind, found.version) == ("error_rate", "v1")
    assert "50 of 100 requests failed (50.0%, ceiling 5.0%)" in found.summary


def test_the_impact_of_a_switch_is_told_by_before_during_and_after() -> None:
    began, ended = NOW - timedelta(seconds=600), NOW - timedelta(seconds=300)
    events = (
        sample(ago_s=700, ok=10),
        sample(ago_s=400, ok=20, failed=1),
        sample("v2", ago_s=350, ok=5),
        sample("v2", ago_s=100, ok=40),
    )
    impact = monitor_switch_impact(events, switch="sw-1", model="chat", began=began, ended=ended, now=NOW)
    assert (impact.before.requests, impact.during.requests, impact.after.requests) == (10, 26, 40)
    assert (impact.before.errors, impact.during.errors, impact.after.errors) == (0, 1, 0)


def test_the_limits_of_a_share_are_wilsons() -> None:
    low, high = wilson(5, 100)
    assert low == pytest.approx(0.0215, abs=1e-4)
    assert high == pytest.approx(0.1118, abs=1e-4)
    assert wilson(0, 0) == (None, None)


def test_histograms_merge_by_adding_and_keep_their_quantiles() -> None:
    one, two = {bin_of(100.0): 95}, {bin_of(1000.0): 5}
    both = merged(one, two)
    assert sum(both.values()) == 100
    assert quantile(both, 0.5) == pytest.approx(100.0, rel=0.1)
    assert quantile(both, 0.99) == pytest.approx(1000.0, rel=0.1)
    assert quantile({}, 0.5) is None
