"""Numbers as Prometheus reads them, and settings that can't be meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from turnout.workers.gateway.metrics import BOUNDS_S, FAILURES, Gauge, Histogram, MetricsCollector
from turnout.workers.gateway.settings import GatewaySettings, TimeLimits


def samples(collector: MetricsCollector) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(collector.render().decode())
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_what_was_counted_is_rendered() -> None:
    metrics = MetricsCollector()
    numbers = metrics.version("chat", "v1")
    numbers.statuses[2] += 3
    numbers.retries += 1
    numbers.failed("cut")
    numbers.total.observe(0.02)
    numbers.total.observe(1000)
    metrics.refuse(404)
    metrics.gauges.append(Gauge("turnout_gateway_connections", "x", lambda: 7.0))
    metrics.in_flight = lambda: [("chat", "v1", 2)]
    metrics.revisions = lambda: {"chat": 5}
    read = samples(metrics)
    assert read["turnout_gateway_answers_total", "2xx", "chat", "v1"] == 3
    assert read["turnout_gateway_failures_total", "chat", "cut", "v1"] == 1
    assert read["turnout_gateway_retries_total", "chat", "v1"] == 1
    assert read["turnout_gateway_refused_total", "404"] == 1
    assert read["turnout_gateway_connections",] == 7
    assert read["turnout_gateway_in_flight", "chat", "v1"] == 2
    assert read["turnout_gateway_route_revision", "chat"] == 5
    assert read["turnout_gateway_request_seconds_bucket", "0.01", "chat", "v1"] == 0
    assert read["turnout_gateway_request_seconds_bucket", "0.025", "chat", "v1"] == 1
    assert read["turnout_gateway_request_seconds_bucket", "+Inf", "chat", "v1"] == 2


@given(st.lists(st.floats(0.0, 400.0) | st.sampled_from(BOUNDS_S)))
def test_many_at_once_are_counted_as_one_by_one(seconds: list[float]) -> None:
    single, many = Histogram(), Histogram()
    for one in seconds:
        single.observe(one)
    many.observe_sorted(sorted(seconds))
    assert many.counts == single.counts
    assert many.sum_s == pytest.approx(single.sum_s)


def test_what_stands_on_lists_is_counted_before_anything_is_rendered() -> None:
    metrics = MetricsCollector()
    numbers = metrics.version("chat", "v1")
    numbers.whole(0.2)
    metrics.gather = lambda: numbers.add_whole([0.01, 0.02])
    read = samples(metrics)
    assert read["turnout_gateway_answers_total", "2xx", "chat", "v1"] == 3
    assert read["turnout_gateway_first_byte_seconds_bucket", "0.025", "chat", "v1"] == 2
    assert read["turnout_gateway_request_seconds_sum", "chat", "v1"] == pytest.approx(0.23)


def test_kinds_of_failure_are_few_and_each_is_one() -> None:
    assert len(FAILURES) == len(set(FAILURES)) < 20


def test_settings_that_cannot_be_meant_are_named() -> None:
    settings = GatewaySettings(
        header_s=0,
        port=70000,
        limits=TimeLimits(total_s=-1),
        model_limits={"chat": TimeLimits(between_s=float("nan"))},
    )
    problems = " ".join(settings.problems())
    for name in ("header_s", "port", "limits.total_s", "model_limits.chat.between_s"):
        assert name in problems
    assert GatewaySettings().problems() == ()
    assert GatewaySettings(port=0, reuse_port=True).problems() != ()
