"""What people read of alerts, folded from a story."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from turnout.events import subjects
from turnout.events.alert import AlertAcknowledged, AlertEvent, AlertRaised, AlertResolved
from turnout.events.codec import Context, decode, record
from turnout.events.envelope import START, Position, Recorded
from turnout.events.switch import SwitchRequested
from turnout.projections import audit
from turnout.projections.alerts import RESOLVED_MOST
from turnout.projections.views import Views

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def recorded(*events: AlertEvent | SwitchRequested) -> list[Recorded]:
    """One a second."""
    positions: dict[str, Position] = {}
    log: list[Recorded] = []
    for n, event in enumerate(events, 1):
        match event:
            case SwitchRequested(switch):
                subject = subjects.event("switch", switch)
            case AlertRaised(alert) | AlertAcknowledged(alert) | AlertResolved(alert):
                subject = subjects.event("alert", alert)
        context = Context(f"c{n}", "controller", "", "", T0 + timedelta(seconds=n))
        log.append(decode(subject, n, *record(subject, event, context, 0, positions.get(subject, START))))
        positions[subject] = log[-1].position
    return log


def folded(*events: AlertEvent) -> Views:
    views = Views()
    for one in recorded(*events):
        views.apply(one)
    return views


def raised(key: str = "a", severity: str = "warning", model: str = "", switch: str = "") -> AlertRaised:
    return AlertRaised(key, severity, "gateway_lost", f"{key} is silent", "look", model, "", switch)


def test_an_alert_tells_since_when_it_stands_who_has_seen_it_and_how_it_ended() -> None:
    view = folded(raised(), AlertAcknowledged("a", "alice", "on it")).alerts.alerts["a"]
    assert (view.state, view.acknowledged_by, view.note) == ("acknowledged", "alice", "on it")
    assert (view.raised_at, view.resolved_at) == (T0 + timedelta(seconds=1), None)
    view = folded(raised(), AlertAcknowledged("a", "alice"), AlertResolved("a", "it is back")).alerts.alerts["a"]
    assert (view.state, view.reason, view.acknowledged_by) == ("resolved", "it is back", "alice")
    assert view.resolved_at == T0 + timedelta(seconds=3)


def test_an_alert_that_is_raised_again_is_a_new_one_under_its_key() -> None:
    views = folded(raised(), AlertAcknowledged("a", "alice"), AlertResolved("a", "back"), raised())
    view = views.alerts.alerts["a"]
    assert (view.state, view.times, view.acknowledged_by, view.id) == ("raised", 2, "", "c4:0")
    assert views.alerts.standing() == (view,)


def test_the_news_are_raisings_and_resolutions_in_the_logs_order() -> None:
    news = folded(raised(), raised("b"), AlertAcknowledged("a", "alice"), AlertResolved("a", "back")).alerts.news
    assert [(sequence, view.state, view.alert) for sequence, view in news] == [
        (1, "raised", "a"),
        (2, "raised", "b"),
        (4, "resolved", "a"),
    ]


def test_only_the_newest_that_are_over_are_kept_and_all_that_stand() -> None:
    events: list[AlertEvent] = [raised("stands")]
    for n in range(RESOLVED_MOST + 1):
        events += [raised(f"g{n}"), AlertResolved(f"g{n}", "back")]
    views = folded(*events)
    views.settle()
    everything = views.everything()
    assert "alert.stands" in everything
    assert "alert.g0" not in everything
    assert len(everything) == RESOLVED_MOST + 1
    assert views.take(0)["alert.g0"] is None, "its view is removed where it is stored"


def test_the_audit_tells_an_alert_with_its_model_and_switch() -> None:
    log = recorded(
        SwitchRequested("sw-1", "chat", "v2", "v1", "immediate", {}, False, "", T0, 0.0, 0.0, T0),
        raised("a", "critical", "chat", "sw-1"),
        AlertAcknowledged("a", "alice", "on it"),
        AlertResolved("a", "back"),
    )
    folding = audit.Audit()
    _, *entries = [folding.entry(one) for one in log]
    assert [entry.sentence for entry in entries] == [
        "critical alert a: a is silent",
        "alice has seen alert a: on it",
        "alert a is over: back",
    ]
    assert [entry.tone for entry in entries] == ["bad", "", "good"]
    assert {(entry.model, entry.switch) for entry in entries} == {("chat", "sw-1")}
