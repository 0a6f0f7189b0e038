"""Decisions of one alert: raised, seen by somebody, over. Which trouble there is, is sagas/alerts.py's question."""

from __future__ import annotations

import msgspec

from turnout.core.decider import Rejected
from turnout.events.alert import AlertAcknowledged, AlertEvent, AlertRaised, AlertResolved

#: Kinds whose end can be seen in the world or in the evidence. All others tell of something that has happened: such an
#: alert is over once somebody has seen it.
CONDITIONS = frozenset(
    (
        "switch_held",
        "version_unhealthy",
        "error_rate",
        "latency_p95",
        "source_not_ready",
        "instance_failed",
        "judging_error",
    )
)


class AlertState(msgspec.Struct, frozen=True):
    """The newest raising of one alert.

    ``times``: how often it was raised. ``raised`` and ``acknowledged`` are of the newest time.
    """

    alert: str = ""
    severity: str = ""
    kind: str = ""
    model: str = ""
    version: str = ""
    switch: str = ""
    raised: bool = False
    acknowledged: bool = False
    times: int = 0


initial = AlertState()


def evolve(state: AlertState, event: AlertEvent) -> AlertState:
    """State after the event."""
    match event:
        case AlertRaised(alert, severity, kind, _, _, model, version, switch):
            return AlertState(alert, severity, kind, model, version, switch, True, False, state.times + 1)
        case AlertAcknowledged():
            return msgspec.structs.replace(state, acknowledged=True)
        case AlertResolved():
            return msgspec.structs.replace(state, raised=False)


class RaiseAlert(msgspec.Struct, frozen=True):
    """Something needs a person. Fields as in ``AlertRaised``."""

    alert: str
    severity: str
    kind: str
    summary: str
    hint: str
    model: str = ""
    version: str = ""
    switch: str = ""


class AcknowledgeAlert(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``alert.acknowledge``: somebody has seen it. ``by`` is filled in from the command's actor."""

    alert: str
    note: str = ""
    by: str = ""


class ResolveAlert(msgspec.Struct, frozen=True):
    """The trouble is over; ``reason`` says how that is known."""

    alert: str
    reason: str


AlertCommand = RaiseAlert | AcknowledgeAlert | ResolveAlert


def decide(state: AlertState, command: AlertCommand) -> tuple[AlertEvent, ...] | Rejected:
    """Raise what is not raised, end what is."""
    match command:
        case RaiseAlert(alert, severity, kind, summary, hint, model, version, switch):
            if state.raised:
                return ()
            return (AlertRaised(alert, severity, kind, summary, hint, model, version, switch),)
        case ResolveAlert(alert, reason):
            return (AlertResolved(alert, reason),) if state.raised else ()
        case AcknowledgeAlert(alert, note, by):
            return _acknowledge(state, alert, note, by or "somebody")


def _acknowledge(state: AlertState, alert: str, note: str, by: str) -> tuple[AlertEvent, ...] | Rejected:
    if not state.times:
        return Rejected(
            "alert_unknown", f"there is no alert {alert!r}", "list the alerts that stand with: turnout alerts"
        )
    if state.acknowledged:
        return ()
    if not state.raised:
        return Rejected(
            "alert_resolved",
            f"alert {alert} is over: nobody needs to see it any more",
            "look at it with: turnout alerts --all",
        )
    seen = AlertAcknowledged(alert, by, note)
    if state.kind in CONDITIONS:
        return (seen,)
    return (seen, AlertResolved(alert, f"acknowledged by {by}"))
