"""Facts of one alert: raised, seen by somebody, over. Names here are storage format."""

from __future__ import annotations

import msgspec


class AlertRaised(msgspec.Struct, frozen=True, gc=False):
    """Something needs a person.

    Attributes:
        alert: key, the same for the same trouble, e.g. ``rollback_failed.chat``: raised again only once it is resolved.
        severity: ``critical`` (act now), ``warning`` (act today) or ``info``.
        kind: what sort of trouble, a stable word: ``switch_rolled_back``, ``switch_held``, ``switch_failed``,
            ``version_unhealthy``, ``error_rate``, ``latency_p95``, ``source_not_ready``, ``gateway_lost``,
            ``worker_lost``, ``instance_failed``, ``judging_error``, ``store_full``.
        summary: one sentence with names and numbers.
        hint: what to do.
        model, version, switch: what it is about; empty where it is about none.
    """

    alert: str
    severity: str
    kind: str
    summary: str
    hint: str
    model: str = ""
    version: str = ""
    switch: str = ""


class AlertAcknowledged(msgspec.Struct, frozen=True, gc=False):
    """Somebody has seen it: no reminders any more."""

    alert: str
    by: str
    note: str = ""


class AlertResolved(msgspec.Struct, frozen=True, gc=False):
    """The trouble is over; ``reason`` says how that is known."""

    alert: str
    reason: str


AlertEvent = AlertRaised | AlertAcknowledged | AlertResolved
