"""Configuration, cache and strategies: choices over values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from turnout.core.cache import Idle, Leave, evict
from turnout.core.config import ModelSwitchingConfig
from turnout.core.sagas.owed import Agenda, Owed, merge
from turnout.core.strategies import STRATEGIES, ImmediateSwitch
from turnout.core.strategies.base import Finish, SetWeight
from turnout.core.testing import asked

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = frozenset(STRATEGIES)


def test_the_defaults_are_those_of_the_design_and_have_no_problem() -> None:
    config = ModelSwitchingConfig()
    assert config.problems(NAMES) == ()
    assert {f: getattr(config, f) for f in ModelSwitchingConfig.__struct_fields__} == {
        "enable_dynamic_registry": True,
        "max_cached_models": 5,
        "model_ttl_seconds": 3600,
        "default_switch_strategy": "immediate",
        "enable_health_checks": True,
        "health_check_interval": 30.0,
        "max_transition_time": 300.0,
        "enable_request_tracking": True,
        "enable_metrics": True,
        "metrics_interval": 60.0,
        "alert_thresholds": {"error_rate": 0.05, "latency_p95": 5000.0},
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_cached_models", -1),
        ("model_ttl_seconds", 0),
        ("model_ttl_seconds", float("inf")),
        ("health_check_interval", -1.0),
        ("max_transition_time", float("nan")),
        ("metrics_interval", 0.0),
        ("default_switch_strategy", "rolling"),
        ("alert_thresholds", {"error_rat": 0.1}),
        ("alert_thresholds", {"error_rate": 1.5}),
        ("alert_thresholds", {"error_rate": 0.0}),
        ("alert_thresholds", {"latency_p95": float("nan")}),
    ],
)
def test_what_can_not_be_meant_is_one_sentence_that_names_the_field(field: str, value: object) -> None:
    (problem,) = ModelSwitchingConfig(**{field: value}).problems(NAMES)  # type: ignore[arg-type]
    assert field in problem


def test_two_configurations_do_not_share_their_thresholds() -> None:
    ModelSwitchingConfig().alert_thresholds["error_rate"] = 0.5
    assert ModelSwitchingConfig().alert_thresholds["error_rate"] == 0.05


# --- cache -------------------------------------------------------------------------------------------------------


def idle(instance: str, minutes: float, worker: str = "w1", *, protected: bool = False) -> Idle:
    return Idle(instance, worker, NOW - timedelta(minutes=minutes), protected)


def test_the_least_recently_used_leaves_first() -> None:
    kept = (idle("i1", 30), idle("i2", 20), idle("i3", 10))
    assert list(evict(kept, NOW, 2, 1e6)) == ["i1"]
    assert list(evict(kept, NOW, 0, 1e6)) == ["i3", "i2", "i1"]
    assert evict(kept, NOW, 3, 1e6) == {}


def test_what_an_undo_needs_leaves_last() -> None:
    assert list(evict((idle("i1", 30, protected=True), idle("i2", 1)), NOW, 1, 1e6)) == ["i2"]


def test_each_worker_keeps_its_own() -> None:
    assert evict((idle("i1", 30), idle("i2", 20, "w2")), NOW, 1, 1e6) == {}


def test_what_is_idle_for_too_long_leaves_whatever_is_kept() -> None:
    leaving = evict((idle("i1", 2, protected=True), idle("i2", 0.5)), NOW, 5, 60.0)
    assert leaving == {"i1": Leave("idle for 60 s (model_ttl_seconds)")}


def test_what_leaves_for_its_age_takes_no_place() -> None:
    assert list(evict((idle("i1", 9), idle("i2", 0.5), idle("i3", 0.2)), NOW, 2, 60.0)) == ["i1"]


# --- strategies --------------------------------------------------------------------------------------------------


def test_immediate_gives_everything_in_one_step_and_is_done() -> None:
    assert asked(ImmediateSwitch(), weight=0.0) == SetWeight(100.0, "all at once")
    assert isinstance(asked(ImmediateSwitch(), weight=100.0, step=1, since_s=1.0), Finish)


def test_immediate_takes_no_parameters() -> None:
    assert ImmediateSwitch().problems({}) == ()
    assert "steps" in ImmediateSwitch().problems({"steps": 3})[0]


def test_strategies_are_found_by_the_name_that_they_have() -> None:
    assert all(name == strategy.name for name, strategy in STRATEGIES.items())


# --- agendas -----------------------------------------------------------------------------------------------------


def test_agendas_add_up_to_all_that_is_owed_and_the_earliest_wake() -> None:
    one, two = Owed("a", (), ""), Owed("b", (), "")
    later = NOW + timedelta(seconds=5)
    assert merge((Agenda((one,), later), Agenda(), Agenda((two,), NOW))) == Agenda((one, two), NOW)
    assert merge(()) == Agenda()
