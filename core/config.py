"""What an operator decides once for all switches and for the cache. Values only; workers/settings.py reads them."""

from __future__ import annotations

import math

import msgspec

from turnout.core import cron
from turnout.core.cache import Policy

#: Names of strategies in ``[cache] warm``.
WARM = ("recent", "predicted")


class ModelSwitchingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The eleven fields of the seed design, with their defaults.

    Attributes:
        enable_dynamic_registry: versions may be registered while turnout runs; else only turnout.toml's are served.
        max_cached_models: ready instances that no route uses, kept warm on each worker, and as many asleep where their
            engines can sleep; 0 stops them once drained.
        model_ttl_seconds: how long such an instance is kept at most; asleep, twice as long.
        default_switch_strategy: what a switch uses where none is named.
        enable_health_checks: workers ask their ready engines a golden question regularly, and replace a hung one.
        health_check_interval: seconds between two such questions.
        max_transition_time: seconds from the request until the target must carry all its traffic; what the strategy
            itself plans to wait (pauses, judged steps) comes on top; time that a switch stands still is not counted.
        enable_request_tracking: gateways keep a record of each running request (not only counts) and list them.
        enable_metrics: processes answer ``/metrics``.
        metrics_interval: seconds between two health samples that a gateway publishes; while a switch runs it does so
            four times a second.
        alert_thresholds: ceilings; ``error_rate`` as a share, ``latency_p95`` in milliseconds. Above them an alert is
            raised, and a running switch is judged by them.
    """

    enable_dynamic_registry: bool = True
    max_cached_models: int = 5
    model_ttl_seconds: float = 3600
    default_switch_strategy: str = "immediate"
    enable_health_checks: bool = True
    health_check_interval: float = 30.0
    max_transition_time: float = 300.0
    enable_request_tracking: bool = True
    enable_metrics: bool = True
    metrics_interval: float = 60.0
    alert_thresholds: dict[str, float] = msgspec.field(
        default_factory=lambda: {"error_rate": 0.05, "latency_p95": 5000.0}
    )

    def problems(self, strategies: frozenset[str]) -> tuple[str, ...]:
        """What can't be meant, one sentence each, naming the field. ``strategies``: the names that exist."""
        found: list[str] = []
        if self.max_cached_models < 0:
            found.append(f"max_cached_models is {self.max_cached_models}: give 0 (keep none warm) or more")
        for field in ("model_ttl_seconds", "health_check_interval", "max_transition_time", "metrics_interval"):
            value: float = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                found.append(f"{field} is {value}: give a number of seconds above 0")
        if self.default_switch_strategy not in strategies:
            names = ", ".join(sorted(strategies))
            found.append(f"default_switch_strategy is {self.default_switch_strategy!r}: choose one of {names}")
        for name, value in self.alert_thresholds.items():
            if name not in ("error_rate", "latency_p95"):
                found.append(f"alert_thresholds has an unknown name {name!r}: known are error_rate and latency_p95")
            elif not (math.isfinite(value) and value > 0) or (name == "error_rate" and value > 1):
                unit = "a share between 0 and 1" if name == "error_rate" else "milliseconds above 0"
                found.append(f"alert_thresholds.{name} is {value}: give {unit}")
        return tuple(found)


class Scheduled(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A version that shall be loaded at certain minutes. ``cron``: five fields, UTC; see core/cron.py."""

    model: str
    version: str
    cron: str


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the cache of idle instances does beyond ``max_cached_models`` and ``model_ttl_seconds``.

    Attributes:
        policy: who leaves first: ``lru`` (least recently used) or ``cost`` (the cheapest to load again for its size).
        warm: what is loaded ahead where there is room: ``recent`` (what was used last) and ``predicted`` (what the
            switches so far let expect).
        schedule: what is loaded ahead at certain minutes.
        version_ttl_seconds: a version that nobody has used for so long is deregistered; 0 for never.
    """

    policy: Policy = "lru"
    warm: tuple[str, ...] = ()
    schedule: tuple[Scheduled, ...] = ()
    version_ttl_seconds: float = 0.0

    def problems(self) -> tuple[str, ...]:
        """What can't be meant, one sentence each, naming the field."""
        found = [
            f"warm names {name!r}: choose from {', '.join(WARM)} (times are written as [[cache.schedule]])"
            for name in self.warm
            if name not in WARM
        ]
        if not 0 <= self.version_ttl_seconds < 1e10:
            found.append(f"version_ttl_seconds is {self.version_ttl_seconds}: give a number of seconds, 0 for never")
        for number, one in enumerate(self.schedule, 1):
            found.extend(
                f"schedule number {number}: {key} is empty: give its name"
                for key in ("model", "version")
                if not getattr(one, key)
            )
            if isinstance(problem := cron.parse(one.cron), str):
                found.append(f"schedule number {number}: cron {problem}")
        return tuple(found)


#: What holds where nothing else was said.
CACHE = CacheConfig()
