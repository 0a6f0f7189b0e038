"""When a person is needed, how often that is said, and when it is over."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from tests.unit.core.story import FAKE, GATEWAYS, Story, serving

from turnout.core import alert
from turnout.core.alert import AcknowledgeAlert, RaiseAlert, ResolveAlert
from turnout.core.health import Finding
from turnout.core.sagas import alerts as saga
from turnout.core.testing import given
from turnout.events.alert import AlertAcknowledged, AlertEvent, AlertRaised, AlertResolved
from turnout.events.gateway import GatewayJoined, GatewayLost
from turnout.events.instance import InstanceFailed, InstanceRequested
from turnout.events.model import KnownGoodMarked, SwitchAdmitted, SwitchClosed, VersionRegistered
from turnout.events.switch import (
    RollbackStarted,
    RolledBack,
    StepApplied,
    StepStarted,
    SwitchCompleted,
    SwitchFailed,
    SwitchPaused,
    SwitchPromoted,
    SwitchRequested,
    TargetReady,
    VerdictReached,
)
from turnout.events.worker import WorkerJoined, WorkerLeft, WorkerLost

RAISED = AlertRaised("error_rate.chat.v1", "critical", "error_rate", "too many", "look", "chat", "v1")
RAISE = RaiseAlert("error_rate.chat.v1", "critical", "error_rate", "too many", "look", "chat", "v1")
HAPPENED = AlertRaised("gateway_lost.g1", "warning", "gateway_lost", "silent", "look")
SLOW = Finding("chat", "v1", "latency_p95", "chat v1: p95 is 9000 ms (ceiling 5000 ms)")


class Watch(Story):
    """A story whose alerts are kept by the saga."""

    findings: tuple[Finding, ...] = ()

    def look(self) -> list[object]:
        """Carry out what the saga owes until it owes nothing."""
        events: list[object] = []
        for _ in range(5):
            agenda = saga.agenda(self.world, self.findings, self.now)
            if not agenda.owed:
                return events
            for owed in agenda.owed:
                events.extend(self.carry_out(owed))
        raise AssertionError("the saga never comes to rest")


def watch(*versions: str) -> Watch:
    story = Watch()
    for recorded in serving(*versions).log:
        story.happens(recorded.event)
    assert story.look() == []
    return story


def told(events: list[object]) -> list[tuple[str, str]]:
    """(what, key) of alert events."""
    return [(type(e).__name__.removeprefix("Alert"), e.alert) for e in events if isinstance(e, AlertEvent)]


def begun(story: Watch, id: str = "sw-1", target: str = "v2") -> Watch:
    """A switch has brought 10 % to its target."""
    story.later(1.0)
    story.happens(
        SwitchAdmitted("chat", id, target),
        SwitchRequested(
            switch=id,
            model="chat",
            target=target,
            source="v1",
            strategy="canary",
            parameters={},
            undo=False,
            reason="",
            deadline=story.now + timedelta(seconds=300),
            bake_s=0.0,
            drain_s=60.0,
            at=story.now,
        ),
    )
    if not story.world.ready("chat", target):
        story.instance(f"i-{target}", target)
    return story.happens(
        TargetReady(id, (f"i-{target}",), 1.0, False),
        StepStarted(id, 1, 10.0, 2, "", story.now),
        StepApplied(id, 1, 2, GATEWAYS, 0.1),
    )


def back(story: Watch, id: str = "sw-1", cause: str = "verdict", proof: str = "i1") -> Watch:
    """It was rolled back."""
    return story.happens(RollbackStarted(id, 3, cause, "too many errors", story.now)).happens(
        SwitchClosed("chat", id, "rolled_back"), RolledBack(id, GATEWAYS, 0.2, proof)
    )


# --- the decider -------------------------------------------------------------------------------------------------


def test_an_alert_is_raised_once_and_again_only_after_it_was_resolved() -> None:
    given(alert).when(RAISE).then(RAISED).when(RAISE).then_nothing().when(ResolveAlert(RAISE.alert, "calm")).then(
        AlertResolved(RAISE.alert, "calm")
    ).when(RAISE).then(RAISED)


def test_resolving_what_is_not_raised_does_nothing() -> None:
    given(alert).when(ResolveAlert("x", "calm")).then_nothing()
    given(alert, RAISED, AlertResolved(RAISE.alert, "calm")).when(ResolveAlert(RAISE.alert, "calm")).then_nothing()


def test_a_condition_stands_on_after_somebody_has_seen_it() -> None:
    seen = AlertAcknowledged(RAISE.alert, "alice", "on it")
    after = given(alert, RAISED).when(AcknowledgeAlert(RAISE.alert, "on it", "alice")).then(seen)
    after.when(AcknowledgeAlert(RAISE.alert, "me too", "bob")).then_nothing()


def test_what_has_happened_is_over_when_somebody_has_seen_it_and_a_second_click_does_nothing() -> None:
    seen = AlertAcknowledged(HAPPENED.alert, "alice")
    over = AlertResolved(HAPPENED.alert, "acknowledged by alice")
    after = given(alert, HAPPENED).when(AcknowledgeAlert(HAPPENED.alert, by="alice")).then(seen, over)
    after.when(AcknowledgeAlert(HAPPENED.alert, by="alice")).then_nothing()


def test_only_an_alert_that_stands_can_be_acknowledged() -> None:
    given(alert).when(AcknowledgeAlert("x")).then_rejected("alert_unknown")
    over = given(alert, RAISED, AlertResolved(RAISE.alert, "calm"))
    over.when(AcknowledgeAlert(RAISE.alert)).then_rejected("alert_resolved")


def test_an_acknowledgement_counts_for_the_raising_that_it_was_given_for() -> None:
    again = given(alert, RAISED, AlertAcknowledged(RAISE.alert, "alice"), AlertResolved(RAISE.alert, "calm"), RAISED)
    again.when(AcknowledgeAlert(RAISE.alert, by="bob")).then(AlertAcknowledged(RAISE.alert, "bob"))


# --- switches ----------------------------------------------------------------------------------------------------


def test_a_rollback_needs_a_person_until_the_next_switch_of_the_model_completes() -> None:
    story = back(begun(watch()))
    (raised,) = story.look()
    assert isinstance(raised, AlertRaised)
    assert (raised.alert, raised.severity, raised.switch) == ("switch_rolled_back.chat", "warning", "sw-1")
    assert "too many errors" in raised.summary
    assert "turnout retry sw-1" in raised.hint
    begun(story, "sw-2")
    assert story.look() == []
    story.happens(SwitchClosed("chat", "sw-2", "completed"), SwitchCompleted("sw-2", 0.1))
    assert told(story.look()) == [("Resolved", "switch_rolled_back.chat")]


def test_a_rollback_that_somebody_has_seen_is_never_raised_again() -> None:
    story = back(begun(watch()))
    story.look()
    seen = alert.decide(story.world.alerts["switch_rolled_back.chat"], AcknowledgeAlert("switch_rolled_back.chat"))
    assert isinstance(seen, tuple)
    story.happens(*seen)
    assert story.look() == []


def test_a_second_rollback_is_told_as_such() -> None:
    story = back(begun(watch()))
    story.look()
    back(begun(story, "sw-2"), "sw-2")
    resolved, raised = story.look()
    assert isinstance(resolved, AlertResolved)
    assert isinstance(raised, AlertRaised)
    assert raised.switch == "sw-2"


def test_a_rollback_whose_source_never_answered_is_critical_even_if_an_operator_asked_for_it() -> None:
    assert back(begun(watch()), cause="undo", proof="i1").look() == []
    (raised,) = back(begun(watch()), cause="undo", proof="").look()
    assert isinstance(raised, AlertRaised)
    assert raised.severity == "critical"
    assert "has not answered its golden probe" in raised.summary


def test_a_failed_switch_says_where_it_failed() -> None:
    story = begun(watch())
    story.happens(SwitchClosed("chat", "sw-1", "failed"), SwitchFailed("sw-1", "loading", "no such file"))
    (raised,) = story.look()
    assert isinstance(raised, AlertRaised)
    assert raised.alert == "switch_failed.chat"
    assert "stage loading: no such file" in raised.summary


def test_a_held_switch_needs_a_person_until_it_goes_on() -> None:
    for cause, raised in (("inconclusive", True), ("invalid", True), ("operator", False), ("pause", False)):
        story = begun(watch())
        story.happens(SwitchPaused("sw-1", cause, "why", story.now))
        assert told(story.look()) == ([("Raised", "switch_held.chat")] if raised else [])
        story.happens(SwitchPromoted("sw-1", 1, False, "", story.now))
        assert told(story.look()) == ([("Resolved", "switch_held.chat")] if raised else [])


def test_a_switch_that_can_not_go_back_is_critical_until_its_source_is_ready() -> None:
    story = begun(watch())
    story.happens(
        VerdictReached("sw-1", 1, "fail", "dead", "5 refused", "dead", 9, 9, 0, 5, 0, 1.0, (), 1, 1, story.now)
    )
    assert story.look() == []
    story.happens(InstanceFailed("i1", "serving", "died"))
    assert ("Raised", "source_not_ready.chat") in told(story.look())
    assert story.world.alerts["source_not_ready.chat"].severity == "critical"
    story.instance("i9", "v1")
    assert ("Resolved", "source_not_ready.chat") in told(story.look())


def test_where_the_target_has_the_only_room_of_its_source_the_alert_says_how_to_give_it_back() -> None:
    story = begun(watch())
    story.happens(WorkerJoined("w1", "h1", ("fake",), (), 1), InstanceFailed("i1", "serving", "died"))
    story.happens(
        VerdictReached("sw-1", 1, "fail", "dead", "5 refused", "dead", 9, 9, 0, 5, 0, 1.0, (), 1, 1, story.now)
    )
    (hint,) = (one.hint for one in story.look() if isinstance(one, AlertRaised) and one.kind == "source_not_ready")
    assert "1 of 1 places taken" in hint
    assert hint.endswith("give it the room of v2: turnout stop i-v2 --force --reason TEXT")


def test_a_way_back_to_an_older_version_is_no_dead_end_and_told_as_critical_when_it_is_over() -> None:
    story = begun(watch())
    story.happens(VersionRegistered("chat", "v0", FAKE, "")).instance("i5", "v0")
    story.happens(KnownGoodMarked("chat", "v0", "sw-a"), KnownGoodMarked("chat", "v1", "sw-0"))
    story.happens(
        VerdictReached("sw-1", 1, "fail", "dead", "5 refused", "dead", 9, 9, 0, 5, 0, 1.0, (), 1, 1, story.now)
    )
    story.happens(InstanceFailed("i1", "serving", "died"))
    assert "source_not_ready.chat" not in [key for _, key in told(story.look())]
    story.happens(RollbackStarted("sw-1", 9, "verdict", "5 refused", story.now, "v0"))
    story.happens(SwitchClosed("chat", "sw-1", "rolled_back"), RolledBack("sw-1", ("g1",), 0.1, "i5"))
    raised = next(one for one in story.look() if isinstance(one, AlertRaised) and one.kind == "switch_rolled_back")
    assert raised.severity == "critical"
    assert "rolled back to v0: 5 refused; v1 had no ready instance" in raised.summary


# --- processes and versions --------------------------------------------------------------------------------------


def test_a_lost_gateway_is_a_matter_until_another_takes_its_place() -> None:
    story = watch()
    story.happens(GatewayLost("g1", 6.5), after_s=10.0)
    assert told(story.look()) == [("Raised", "gateway_lost.g1")]
    story.happens(GatewayJoined("g9", "http://elsewhere"))
    assert story.look() == []
    story.happens(GatewayJoined("g3", "http://g1"))
    assert told(story.look()) == [("Resolved", "gateway_lost.g1")]
    story.happens(GatewayLost("g3", 6.5))
    assert told(story.look()) == [("Raised", "gateway_lost.g3")], "g1 was told already"


def test_a_gateway_that_was_replaced_before_it_was_missed_is_no_matter() -> None:
    story = watch()
    story.happens(GatewayJoined("g3", "http://g1"), after_s=10.0)
    story.happens(GatewayLost("g1", 6.5), after_s=3.0)
    assert story.look() == []


def test_a_gateway_that_shares_its_port_with_others_is_missed_all_the_same() -> None:
    story = watch()
    story.happens(GatewayJoined("g3", "http://g1"))
    story.happens(GatewayLost("g1", 6.5), after_s=10.0)
    assert told(story.look()) == [("Raised", "gateway_lost.g1")]


def test_a_gateway_that_never_comes_back_is_a_matter_for_a_day() -> None:
    story = watch()
    story.happens(GatewayLost("g1", 6.5), after_s=10.0)
    story.look()
    assert told(story.later(saga.GONE_S).look()) == [("Resolved", "gateway_lost.g1")]


def test_a_lost_worker_is_a_matter_while_engines_run_on_it() -> None:
    joined = WorkerJoined("w1", "h1", ("fake",), (), 4)
    for end in (joined, WorkerLeft("w1")):
        story = watch()
        story.happens(WorkerLost("w1", 11.0))
        (raised,) = story.look()
        assert isinstance(raised, AlertRaised)
        assert "chat v1" in raised.summary
        assert told(story.happens(end).look()) == [("Resolved", "worker_lost.w1")]
    idle = Watch()
    idle.happens(joined).happens(WorkerLost("w1", 11.0))
    assert idle.look() == []


def test_each_loss_of_the_same_worker_is_told() -> None:
    story = watch()
    story.happens(WorkerLost("w1", 11.0))
    story.look()
    story.happens(WorkerJoined("w1", "h1", ("fake",), (), 4))
    story.look()
    story.happens(WorkerLost("w1", 11.0))
    assert told(story.look()) == [("Raised", "worker_lost.w1")]


def test_an_active_version_whose_only_instance_died_is_critical_until_it_is_back() -> None:
    story = watch()
    story.happens(InstanceFailed("i1", "serving", "died"))
    assert told(story.look()) == [("Raised", "version_unhealthy.chat.v1")]
    assert story.world.alerts["version_unhealthy.chat.v1"].severity == "critical"
    story.instance("i2", "v1")
    assert told(story.look()) == [("Resolved", "version_unhealthy.chat.v1")]


def test_an_active_version_that_is_on_its_way_without_a_failure_is_no_matter() -> None:
    story = Watch()
    for recorded in serving().log:
        if getattr(recorded.event, "instance", "") != "i1":
            story.happens(recorded.event)
    assert story.look() == [], "there is a place for it"
    engine = story.world.models["chat"].versions["v1"]
    story.happens(InstanceRequested("i7", "chat", "v1", "w1", engine, "restore"))
    assert story.look() == []


def test_a_needed_version_that_fails_three_times_in_a_row_is_told_until_it_runs_for_a_while() -> None:
    story = watch()
    engine = story.world.models["chat"].versions["v1"]
    story.happens(InstanceFailed("i1", "serving", "died"))
    for id in ("i2", "i3"):
        assert ("Raised", "instance_failed.chat.v1") not in told(story.look())
        story.happens(InstanceRequested(id, "chat", "v1", "w1", engine, "restore"))
        story.happens(InstanceFailed(id, "loading", "exit 1"))
    assert ("Raised", "instance_failed.chat.v1") in told(story.look())
    story.instance("i4", "v1")
    assert ("Resolved", "instance_failed.chat.v1") not in told(story.look())
    wake = saga.agenda(story.world, (), story.now).wake
    assert wake is not None
    story.now = wake
    assert told(story.look()) == [("Resolved", "instance_failed.chat.v1")]


# --- measured ----------------------------------------------------------------------------------------------------


def test_what_was_measured_stands_for_a_while_so_that_it_does_not_ring_again_and_again() -> None:
    story = watch()
    story.findings = (SLOW,)
    assert told(story.look()) == [("Raised", "latency_p95.chat.v1")]
    assert story.look() == []
    story.findings = ()
    assert story.later(1.0).look() == []
    wake = saga.agenda(story.world, (), story.now).wake
    assert wake is not None
    story.now = wake
    assert told(story.look()) == [("Resolved", "latency_p95.chat.v1")]


def test_errors_of_the_version_that_serves_are_graver_than_those_of_a_candidate() -> None:
    story = watch()
    story.findings = tuple(Finding("chat", v, "error_rate", f"chat {v}: 9 of 20 failed") for v in ("v1", "v2"))
    story.look()
    severities = {key: state.severity for key, state in story.world.alerts.items()}
    assert severities == {"error_rate.chat.v1": "critical", "error_rate.chat.v2": "warning"}


def test_an_alert_of_another_kind_is_not_the_sagas_to_resolve() -> None:
    story = watch()
    story.happens(AlertRaised("store_full", "critical", "store_full", "no room", "make some"))
    assert story.look() == []


def test_two_leaders_that_see_the_same_owe_the_same_command() -> None:
    def owed(story: Watch) -> Any:
        return saga.agenda(story.world, (SLOW,), story.now).owed

    one, other = back(begun(watch())), back(begun(watch()))
    assert [o.id for o in owed(one)] == ["alert.switch_rolled_back.chat.1.raised", "alert.latency_p95.chat.v1.1.raised"]
    assert owed(one) == owed(other)
