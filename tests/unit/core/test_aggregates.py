"""Each aggregate's behaviour: given what happened, when asked, then this."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from turnout.core import gateway, instance, model, route, switch, worker
from turnout.core.testing import given
from turnout.events.gateway import GatewayJoined, GatewayLeft, GatewayLost, RouteApplied, VersionDrained
from turnout.events.instance import (
    InstanceDraining,
    InstanceFailed,
    InstanceLoading,
    InstanceReady,
    InstanceRequested,
    InstanceSleepRequested,
    InstanceSlept,
    InstanceStopped,
    InstanceWakeRequested,
    InstanceWoken,
    TierFailed,
)
from turnout.events.model import (
    ActiveVersionChanged,
    EngineSpec,
    Inspection,
    KnownGoodMarked,
    KnownGoodRevoked,
    ModelRegistered,
    Probe,
    ReplicasChanged,
    SwitchAdmitted,
    SwitchClosed,
    VersionDeregistered,
    VersionRegistered,
    VersionRejected,
    VersionUnseen,
    VersionValidated,
)
from turnout.events.route import Endpoint, RouteChanged, Rule, Split
from turnout.events.switch import (
    BakeStarted,
    DrainStarted,
    InstancesRequested,
    RollbackStarted,
    RolledBack,
    StepApplied,
    StepStarted,
    SwitchAborted,
    SwitchCompleted,
    SwitchFailed,
    SwitchRequested,
    TargetReady,
)
from turnout.events.worker import WorkerJoined, WorkerLeft, WorkerLost

FAKE = EngineSpec("fake")
AT = datetime(2026, 1, 1, tzinfo=UTC)


# --- model -------------------------------------------------------------------------------------------------------

REGISTERED = (
    ModelRegistered("chat"),
    VersionRegistered("chat", "v1", FAKE, model.digest(FAKE)),
    VersionRegistered("chat", "v2", FAKE, model.digest(FAKE)),
)
ACTIVE = (*REGISTERED, ActiveVersionChanged("chat", "v1", "", "sw-0"), KnownGoodMarked("chat", "v1", "sw-0"))


def test_the_first_version_makes_the_model() -> None:
    given(model).when(model.RegisterVersion("chat", "v1", FAKE, "first")).then(
        ModelRegistered("chat"), VersionRegistered("chat", "v1", FAKE, model.digest(FAKE), "first")
    )


def test_replicas_may_be_said_with_the_registration_and_changed_by_a_second_one() -> None:
    def asked(replicas: int | None) -> model.RegisterVersion:
        return model.RegisterVersion("chat", "v1", FAKE, replicas=replicas)

    three = ReplicasChanged("chat", "v1", 3)
    registered = (ModelRegistered("chat"), VersionRegistered("chat", "v1", FAKE, model.digest(FAKE)), three)
    given(model).when(asked(3)).then(*registered)
    given(model, *registered).when(asked(3)).then_nothing()
    given(model, *registered).when(asked(None)).then_nothing()
    given(model, *registered).when(asked(1)).then(ReplicasChanged("chat", "v1", 1))
    given(model).when(asked(0)).then_rejected("parameters_invalid")


def test_a_version_registered_again_with_the_same_settings_is_no_news() -> None:
    given(model, *REGISTERED).when(model.RegisterVersion("chat", "v1", FAKE)).then_nothing()


def test_a_version_never_changes() -> None:
    other = EngineSpec("fake", args=("--x",))
    given(model, *REGISTERED).when(model.RegisterVersion("chat", "v1", other)).then_rejected("version_exists")


@pytest.mark.parametrize("name", ["", "two words", "a@b", "x" * 129, "tab\t", "new\nline"])
def test_a_served_name_that_no_client_could_send_is_refused(name: str) -> None:
    given(model).when(model.RegisterVersion(name, "v1", FAKE)).then_rejected("name_invalid")


@pytest.mark.parametrize("name", ["", "-v1", "v 1", "v/1", "x" * 65])
def test_a_version_name_is_plain(name: str) -> None:
    given(model).when(model.RegisterVersion("chat", name, FAKE)).then_rejected("name_invalid")


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "ü", "a.b"])
def test_names_of_real_models_are_taken(name: str) -> None:
    assert isinstance(given(model).when(model.RegisterVersion(name, "2026.1+q8", FAKE)).decision, tuple)


@pytest.mark.parametrize(
    "engine",
    [
        EngineSpec("tgi"),
        EngineSpec("vllm"),
        EngineSpec("vllm", path="/w", url="http://h:1"),
        EngineSpec("fake", command=("sh",)),
        EngineSpec("openai"),
        EngineSpec("openai", url="http://h:1", command=("serve",)),
        EngineSpec("openai", url="ftp://h"),
        EngineSpec("fake", args=("a\0b",)),
        EngineSpec("fake", probe=Probe(path="/metrics")),
        EngineSpec("vllm", adapter="/a"),
        EngineSpec("vllm", path="/w", adapter="/a\0b"),
        EngineSpec("openai", url="http://h:1", adapter="/a"),
    ],
)
def test_an_engine_that_can_not_be_meant_is_refused(engine: EngineSpec) -> None:
    given(model).when(model.RegisterVersion("chat", "v1", engine)).then_rejected("engine_invalid")


def test_the_digest_says_whether_two_engines_are_the_same() -> None:
    assert model.digest(EngineSpec("fake", args=("a",))) == model.digest(EngineSpec("fake", args=("a",)))
    assert model.digest(EngineSpec("fake", args=("a",))) != model.digest(EngineSpec("fake", args=("b",)))


def test_a_version_that_nothing_uses_may_go_and_takes_its_mark_along() -> None:
    after = given(model, *ACTIVE, KnownGoodMarked("chat", "v2", "sw-1")).when(model.DeregisterVersion("chat", "v2"))
    assert after.then(VersionDeregistered("chat", "v2")).state.known_good == ("v1",)


def test_a_version_that_is_not_there_need_not_go() -> None:
    given(model, *REGISTERED).when(model.DeregisterVersion("chat", "v9")).then_nothing()


def test_the_active_version_may_not_go() -> None:
    given(model, *ACTIVE).when(model.DeregisterVersion("chat", "v1")).then_rejected("version_in_use")


def test_no_version_goes_while_a_switch_runs() -> None:
    admitted = SwitchAdmitted("chat", "sw-1", "v2")
    given(model, *ACTIVE, admitted).when(model.DeregisterVersion("chat", "v2")).then_rejected("version_in_use")


def test_a_version_says_who_measured_what_and_what_it_comes_from() -> None:
    command = model.RegisterVersion("chat", "v3", FAKE, "tuned", ("tickets",), {"accuracy": 0.71}, "v1")
    added = VersionRegistered("chat", "v3", FAKE, model.digest(FAKE), "tuned", ("tickets",), {"accuracy": 0.71}, "v1")
    given(model, *REGISTERED).when(command).then(added)


@pytest.mark.parametrize(
    ("about", "code"),
    [
        ({"tags": ("two words",)}, "tag_invalid"),
        ({"tags": tuple(f"t{n}" for n in range(33))}, "tag_invalid"),
        ({"metrics": {"accuracy": float("nan")}}, "metric_invalid"),
        ({"metrics": {"": 1.0}}, "metric_invalid"),
        ({"parent": "v9"}, "parent_unknown"),
        ({"parent": "v3"}, "parent_unknown"),
    ],
)
def test_what_can_not_be_meant_of_a_version_is_refused(about: dict[str, Any], code: str) -> None:
    given(model, *REGISTERED).when(model.RegisterVersion("chat", "v3", FAKE, **about)).then_rejected(code)


FILES = EngineSpec("fake", path="/models/chat-v3")
WITH_FILES = (*ACTIVE, VersionRegistered("chat", "v3", FILES, model.digest(FILES)))
SEEN = Inspection("c0ffee", weight_bytes=2000, tensors=2)
TRUNCATED = VersionRejected("chat", "v3", "w1", "weights_truncated", "it ends too early", "copy it again")


def inspected(inspection: Inspection | None = None, code: str = "", worker: str = "w1") -> model.ReportInspected:
    reason, hint = ("it ends too early", "copy it again") if code else ("", "")
    return model.ReportInspected("chat", "v3", worker, model.digest(FILES), inspection, code, reason, hint)


def test_a_version_with_files_waits_until_a_worker_has_looked_at_them_once() -> None:
    before = given(model, *WITH_FILES)
    assert before.state.awaits_inspection("v3")
    assert not before.state.awaits_inspection("v1")
    after = before.when(inspected(SEEN)).then(VersionValidated("chat", "v3", "w1", SEEN))
    assert not after.state.awaits_inspection("v3")
    after.when(inspected(SEEN, worker="w2")).then_nothing()
    after.when(inspected(None, "weights_truncated", worker="w2")).then_nothing()


def test_a_version_whose_files_can_not_be_served_is_not_switched_to() -> None:
    refused = given(model, *WITH_FILES).when(inspected(None, "weights_truncated")).then(TRUNCATED)
    refused.when(model.AdmitSwitch("chat", "sw-1", "v3")).then_rejected("version_rejected")
    refused.when(model.SetRules("chat", (Rule("short", "tokens < 9", "v3"),))).then_rejected("rules_invalid")


def test_a_switch_to_a_version_that_nobody_has_looked_at_is_not_refused_for_being_early() -> None:
    given(model, *WITH_FILES).when(model.AdmitSwitch("chat", "sw-1", "v3")).then(SwitchAdmitted("chat", "sw-1", "v3"))


def test_a_rejected_version_may_be_registered_again_and_is_looked_at_again() -> None:
    other = EngineSpec("fake", path="/models/mended")
    again = given(model, *WITH_FILES, TRUNCATED).when(model.RegisterVersion("chat", "v3", other))
    after = again.then(VersionRegistered("chat", "v3", other, model.digest(other)))
    assert after.state.awaits_inspection("v3")
    after.when(inspected(SEEN)).then_nothing()  # of the settings before


def test_what_has_served_well_is_not_refused_by_a_later_look_at_its_files() -> None:
    served = (*WITH_FILES, KnownGoodMarked("chat", "v3", "sw-1"), TRUNCATED)
    given(model, *served).when(model.AdmitSwitch("chat", "sw-2", "v3")).then(SwitchAdmitted("chat", "sw-2", "v3"))


def test_a_worker_that_sees_the_files_overrules_one_that_does_not() -> None:
    unseen = VersionRejected("chat", "v3", "w1", "path_missing", "nothing is there")
    report = inspected(SEEN, worker="w2")
    given(model, *WITH_FILES, unseen).when(report).then(VersionValidated("chat", "v3", "w2", SEEN))
    given(model, *WITH_FILES, TRUNCATED).when(report).then_nothing()


def test_what_is_wrong_with_the_files_is_told_by_the_first_worker_that_sees_them() -> None:
    unseen = VersionRejected("chat", "v3", "w1", "path_missing", "nothing is there")
    given(model, *WITH_FILES, unseen).when(inspected(None, "weights_truncated")).then(TRUNCATED)
    given(model, *WITH_FILES, unseen).when(inspected(None, "path_not_allowed", worker="w2")).then_nothing()


def test_a_worker_says_once_that_it_can_not_see_the_files() -> None:
    note = model.NoteUnseen("chat", "v3", "w1", model.digest(FILES), "path_missing", "nothing is there")
    said = VersionUnseen("chat", "v3", "w1", "path_missing", "nothing is there")
    given(model, *WITH_FILES).when(note).then(said).when(note).then_nothing()


def test_a_rejection_without_a_reason_is_refused() -> None:
    given(model, *WITH_FILES).when(inspected()).then_rejected("request_invalid")


def test_a_switch_is_admitted_once() -> None:
    admitted = SwitchAdmitted("chat", "sw-1", "v2")
    command = model.AdmitSwitch("chat", "sw-1", "v2")
    given(model, *ACTIVE).when(command).then(admitted).when(command).then_nothing()


def test_only_one_switch_runs_on_a_model() -> None:
    admitted = SwitchAdmitted("chat", "sw-1", "v2")
    refused = given(model, *ACTIVE, admitted).when(model.AdmitSwitch("chat", "sw-2", "v2"))
    assert "sw-1" in refused.then_rejected("switch_running").reason


def test_a_switch_needs_a_registered_version() -> None:
    refused = given(model, *ACTIVE).when(model.AdmitSwitch("chat", "sw-1", "v9")).then_rejected("version_unknown")
    assert "v1, v2" in refused.reason


def test_a_switch_to_what_serves_already_is_refused() -> None:
    given(model, *ACTIVE).when(model.AdmitSwitch("chat", "sw-1", "v1")).then_rejected("already_active")


@pytest.mark.parametrize(
    "command", [model.DeregisterVersion("x", "v1"), model.AdmitSwitch("x", "s", "v"), model.CloseSwitch("x", "s", "o")]
)
def test_an_unknown_model_is_named(command: model.ModelCommand) -> None:
    given(model).when(command).then_rejected("model_unknown")


def test_a_completed_switch_makes_its_target_active_and_known_good() -> None:
    given(model, *ACTIVE, SwitchAdmitted("chat", "sw-1", "v2")).when(
        model.CloseSwitch("chat", "sw-1", "completed")
    ).then(
        ActiveVersionChanged("chat", "v2", "v1", "sw-1"),
        KnownGoodMarked("chat", "v2", "sw-1"),
        SwitchClosed("chat", "sw-1", "completed"),
    ).when(model.CloseSwitch("chat", "sw-1", "completed")).then_nothing()


def test_a_completed_undo_takes_the_mark_from_what_it_left() -> None:
    on_v2 = (
        *ACTIVE,
        ActiveVersionChanged("chat", "v2", "v1", "sw-1"),
        KnownGoodMarked("chat", "v2", "sw-1"),
        SwitchAdmitted("chat", "sw-2", "v1"),
    )
    assert given(model, *on_v2).state.undo_target == "v1"
    after = (
        given(model, *on_v2)
        .when(model.CloseSwitch("chat", "sw-2", "completed", revoke="v2"))
        .then(
            ActiveVersionChanged("chat", "v1", "v2", "sw-2"),
            KnownGoodMarked("chat", "v1", "sw-2"),
            KnownGoodRevoked("chat", "v2", "sw-2"),
            SwitchClosed("chat", "sw-2", "completed"),
        )
    )
    assert after.state.known_good == ("v1",)
    assert after.state.undo_target == ""


@pytest.mark.parametrize("outcome", ["failed", "aborted", "rolled_back"])
def test_a_switch_that_did_not_complete_changes_nothing_but_the_reservation(outcome: str) -> None:
    given(model, *ACTIVE, SwitchAdmitted("chat", "sw-1", "v2")).when(model.CloseSwitch("chat", "sw-1", outcome)).then(
        SwitchClosed("chat", "sw-1", outcome)
    )


def test_a_switch_that_holds_nothing_has_nothing_to_let_go() -> None:
    held = SwitchAdmitted("chat", "sw-2", "v2")
    given(model, *ACTIVE, held).when(model.CloseSwitch("chat", "sw-1", "completed")).then_nothing()


# --- route -------------------------------------------------------------------------------------------------------

V1 = (Split("v1", 100.0, (Endpoint("i1", "unix:/1"),)),)
BOTH = (Split("v1", 0.0, (Endpoint("i1", "unix:/1"),)), Split("v2", 100.0, (Endpoint("i2", "unix:/2"),)))


def changed(revision: int, splits: tuple[Split, ...]) -> RouteChanged:
    return RouteChanged("chat", revision, splits, "s", 60.0, "sw")


def test_a_table_that_says_nothing_new_is_no_revision() -> None:
    given(route, changed(1, V1)).when(route.ChangeRoute("chat", 2, V1, "s", 60.0, "x")).then_nothing()


@pytest.mark.parametrize("revision", [0, 1, 3])
def test_a_revision_made_from_an_old_table_is_refused(revision: int) -> None:
    refused = given(route, changed(1, V1)).when(route.ChangeRoute("chat", revision, BOTH, "s", 60.0, "x"))
    refused.then_rejected("revision_stale")


def test_weights_add_up_to_100_or_there_is_no_split() -> None:
    half = (Split("v1", 50.0, ()),)
    given(route).when(route.ChangeRoute("chat", 1, half, "s", 60.0, "x")).then_rejected("weights_off")
    given(route, changed(1, V1)).when(route.ChangeRoute("chat", 2, (), "s", 60.0, "sw")).then(changed(2, ()))


def test_the_table_remembers_with_which_revision_a_version_left() -> None:
    v2 = BOTH[1:]
    assert given(route, changed(1, V1), changed(2, BOTH), changed(3, v2)).state.left == {"v1": 3}
    assert given(route, changed(1, V1), changed(2, v2), changed(3, BOTH)).state.left == {}


def test_an_old_revision_changes_nothing() -> None:
    assert given(route, changed(2, V1), changed(1, BOTH)).state == given(route, changed(2, V1)).state


# --- instance ----------------------------------------------------------------------------------------------------

ASKED = InstanceRequested("i1", "chat", "v1", "w1", FAKE, "sw-1")
READY = InstanceReady("i1", "unix:/1", 1.0, 0.1, 5, "fp")
REPORT_READY = instance.ReportReady("i1", "unix:/1", 1.0, 0.1, 5, "fp")


def test_the_life_of_an_instance() -> None:
    (
        given(instance)
        .when(instance.RequestInstance("i1", "chat", "v1", "w1", FAKE, "sw-1"))
        .then(ASKED)
        .when(instance.ReportLoading("i1", "starting", 0.0))
        .then(InstanceLoading("i1", "starting", 0.0))
        .when(instance.ReportLoading("i1", "starting", 2.0))
        .then_nothing()
        .when(instance.ReportLoading("i1", "proving", 2.0, "x"))
        .then(InstanceLoading("i1", "proving", 2.0, "x"))
        .when(REPORT_READY)
        .then(READY)
        .when(REPORT_READY)
        .then_nothing()
        .when(instance.ReportLoading("i1", "starting", 3.0))
        .then_nothing()
        .when(instance.DrainInstance("i1", "idle"))
        .then(InstanceDraining("i1", "idle"))
        .when(instance.DrainInstance("i1", "other"))
        .then_nothing()
        .when(instance.ReportStopped("i1", 1.0))
        .then(InstanceStopped("i1", 1.0))
        .when(instance.ReportFailed("i1", "serving", "late"))
        .then_nothing()
    )


def test_an_instance_sleeps_and_wakes_when_it_is_asked_to() -> None:
    state = (
        given(instance, ASKED, READY)
        .when(instance.ReportSlept("i1", 1, 0.5, 7))
        .then_nothing()
        .when(instance.SleepInstance("i1", 1, "idle"))
        .then(InstanceSleepRequested("i1", 1, "idle"))
        .when(instance.SleepInstance("i1", 2, "idle"))
        .then_nothing()
        .when(instance.ReportSlept("i1", 1, 0.5, 7))
        .then(InstanceSlept("i1", 1, 0.5, 7))
        .when(REPORT_READY)
        .then_nothing()
        .when(instance.ReportWoken("i1", 0.3, 0.1, 9))
        .then_nothing()
        .when(instance.WakeInstance("i1", "sw-2"))
        .then(InstanceWakeRequested("i1", "sw-2"))
        .when(instance.ReportWoken("i1", 0.3, 0.1, 9))
        .then(InstanceWoken("i1", 0.3, 0.1, 9))
        .state
    )
    assert (state.phase, state.tier, state.bytes, state.address) == ("ready", "wake", 9, "unix:/1")


def test_a_late_word_of_an_earlier_sleep_is_not_taken_for_this_one() -> None:
    once = (InstanceSleepRequested("i1", 1, "a"), InstanceSlept("i1", 1, 1, 0), InstanceWakeRequested("i1", "b"))
    awake = given(instance, ASKED, READY, *once, InstanceWoken("i1", 1, 1, 9, 0, "unix:/2"))
    asked = awake.when(instance.SleepInstance("i1", 1, "c")).then(InstanceSleepRequested("i1", 1, "c"))
    asked.when(instance.ReportSlept("i1", 1, 0.5, 7)).then_nothing()
    slept = asked.when(instance.ReportSlept("i1", 1, 0.5, 7, number=2)).then(InstanceSlept("i1", 1, 0.5, 7))
    waking = slept.when(instance.WakeInstance("i1", "d", 9)).then(InstanceWakeRequested("i1", "d", 9))
    assert waking.state.bytes == 9, "it is charged with what it will hold"
    waking.when(instance.ReportWoken("i1", 0.3, 0.1, 9, 0, "unix:/2")).then_nothing()
    woken = InstanceWoken("i1", 0.3, 0.1, 9, 0, "unix:/3")
    again = waking.when(instance.ReportWoken("i1", 0.3, 0.1, 9, 0, "unix:/3", number=2)).then(woken)
    again.when(REPORT_READY).then_nothing()


def test_an_instance_that_sleeps_is_not_ready() -> None:
    state = given(instance, ASKED, READY, InstanceSleepRequested("i1", 2, "idle"), InstanceSlept("i1", 2, 1, 0)).state
    assert (state.phase, state.level) == ("asleep", 2)


def test_a_tier_that_failed_is_struck_off_once() -> None:
    failed = instance.ReportTierFailed("i1", "spare", "v0", "a stale head")
    state = (
        given(instance, ASKED)
        .when(failed)
        .then(TierFailed("i1", "spare", "v0", "a stale head"))
        .when(failed)
        .then_nothing()
        .state
    )
    assert state.struck == ("spare",)


def test_an_instance_that_nobody_asked_for_is_refused() -> None:
    given(instance).when(REPORT_READY).then_rejected("instance_unknown")


def test_an_instance_that_was_asked_to_stop_while_it_loaded_is_not_made_ready() -> None:
    given(instance, ASKED, InstanceDraining("i1", "aborted")).when(REPORT_READY).then_rejected("instance_draining")


def test_an_instance_that_comes_back_at_another_address_is_ready_there() -> None:
    again = instance.ReportReady("i1", "unix:/2", 0.0, 0.0)
    after = given(instance, ASKED, READY).when(again).then(InstanceReady("i1", "unix:/2", 0.0, 0.0, 0, ""))
    assert after.state.address == "unix:/2"


def test_a_failure_keeps_the_stage_the_reason_and_the_engines_own_words() -> None:
    failed = InstanceFailed("i1", "loading", "exit 1", ("no weights",), 1)
    report = instance.ReportFailed("i1", "loading", "exit 1", ("no weights",), 1)
    state = given(instance, ASKED).when(report).then(failed).state
    assert (state.phase, state.stage, state.reason, state.log_tail) == ("failed", "loading", "exit 1", ("no weights",))


# --- worker ------------------------------------------------------------------------------------------------------

JOIN = worker.JoinWorker("w1", "h1", ("fake",), ("cpu",), 4)
JOINED = WorkerJoined("w1", "h1", ("fake",), ("cpu",), 4)


def test_a_worker_comes_is_lost_and_comes_back() -> None:
    (
        given(worker)
        .when(JOIN)
        .then(JOINED)
        .when(JOIN)
        .then_nothing()
        .when(worker.LoseWorker("w1", 11.0))
        .then(WorkerLost("w1", 11.0))
        .when(worker.LoseWorker("w1", 12.0))
        .then_nothing()
        .when(JOIN)
        .then(JOINED)
        .when(worker.LeaveWorker("w1"))
        .then(WorkerLeft("w1"))
        .when(worker.LeaveWorker("w1"))
        .then_nothing()
    )


def test_a_worker_that_offers_something_else_is_news() -> None:
    more = worker.JoinWorker("w1", "h1", ("fake",), ("cpu",), 8)
    given(worker, JOINED).when(more).then(WorkerJoined("w1", "h1", ("fake",), ("cpu",), 8))


def test_a_worker_must_join_first() -> None:
    given(worker).when(worker.LeaveWorker("w1")).then_rejected("worker_unknown")


# --- gateway -----------------------------------------------------------------------------------------------------

G1 = GatewayJoined("g1", "http://g1")


def test_a_gateway_comes_is_lost_and_comes_back() -> None:
    join = gateway.JoinGateway("g1", "http://g1")
    (
        given(gateway)
        .when(join)
        .then(G1)
        .when(join)
        .then_nothing()
        .when(gateway.LoseGateway("g1", 7.0))
        .then(GatewayLost("g1", 7.0))
        .when(gateway.LoseGateway("g1", 8.0))
        .then_nothing()
        .when(join)
        .then(G1)
        .when(gateway.LeaveGateway("g1"))
        .then(GatewayLeft("g1"))
        .when(gateway.LeaveGateway("g1"))
        .then_nothing()
    )


def test_a_gateway_must_join_first() -> None:
    given(gateway).when(gateway.ReportApplied("g1", "chat", 1)).then_rejected("gateway_unknown")


def test_acknowledgements_only_grow() -> None:
    (
        given(gateway, G1)
        .when(gateway.ReportApplied("g1", "chat", 2))
        .then(RouteApplied("g1", "chat", 2))
        .when(gateway.ReportApplied("g1", "chat", 1))
        .then_nothing()
        .when(gateway.ReportDrained("g1", "chat", "v1", 2, 3))
        .then(VersionDrained("g1", "chat", "v1", 2, 3))
        .when(gateway.ReportDrained("g1", "chat", "v1", 2))
        .then_nothing()
    )


def test_what_came_late_does_not_take_an_acknowledgement_back() -> None:
    state = given(gateway, G1, RouteApplied("g1", "chat", 5), RouteApplied("g1", "chat", 3)).state
    assert state.applied == {"chat": 5}
    drained = (VersionDrained("g1", "chat", "v1", 5), VersionDrained("g1", "chat", "v1", 3))
    assert given(gateway, G1, *drained).state.drained == {("chat", "v1"): 5}


def test_a_gateway_has_drained_a_version_when_it_said_so_at_the_revision_that_it_left_with_or_later() -> None:
    state = given(gateway, G1, RouteApplied("g1", "chat", 1), RouteApplied("g1", "chat", 4)).state
    assert not state.has_drained("chat", "v1", 4)
    state = given(gateway, G1, RouteApplied("g1", "chat", 1), VersionDrained("g1", "chat", "v1", 4)).state
    assert not state.has_drained("chat", "v1", 4), "it does not route by that revision yet"
    both = (RouteApplied("g1", "chat", 1), RouteApplied("g1", "chat", 4), VersionDrained("g1", "chat", "v1", 4))
    assert given(gateway, G1, *both).state.has_drained("chat", "v1", 4)
    assert not given(gateway, G1, *both).state.has_drained("chat", "v1", 6), "it came back and left again"


def test_a_gateway_has_nothing_to_drain_of_what_left_before_its_first_revision() -> None:
    assert given(gateway, G1, RouteApplied("g1", "chat", 4)).state.has_drained("chat", "v1", 4)
    assert not given(gateway, G1, RouteApplied("g1", "chat", 3)).state.has_drained("chat", "v1", 4)


# --- switch ------------------------------------------------------------------------------------------------------

ASKED_FOR = SwitchRequested("sw", "chat", "v2", "v1", "immediate", {}, False, "why", AT, 60.0, 600.0, AT)
READY_NOW = TargetReady("sw", ("i2",), 1.0, True)
STEP = StepStarted("sw", 1, 100.0, 2, "all at once", AT)
APPLIED = StepApplied("sw", 1, 2, ("g1",), 0.1)
BAKE = BakeStarted("sw", AT + timedelta(seconds=60))
DRAIN = DrainStarted("sw", "v1", 3, AT)
ROLLBACK = RollbackStarted("sw", 3, "undo", "bad", AT)


def opened(**fields: object) -> switch.OpenSwitch:
    known: dict[str, Any] = {f: getattr(ASKED_FOR, f) for f in SwitchRequested.__struct_fields__}
    known |= fields
    return switch.OpenSwitch(**known)


def test_the_whole_way_of_a_switch_each_step_once() -> None:
    @dataclass
    class Step:
        command: switch.SwitchCommand
        event: object

    steps = [
        Step(opened(), ASKED_FOR),
        Step(switch.RecordInstancesRequested("sw", ("i2",)), InstancesRequested("sw", ("i2",))),
        Step(switch.RecordTargetReady("sw", ("i2",), 1.0, True), READY_NOW),
        Step(switch.StartStep("sw", 1, 100.0, 2, "all at once", AT), STEP),
        Step(switch.RecordStepApplied("sw", 1, 2, ("g1",), 0.1), APPLIED),
        Step(switch.StartBake("sw", AT + timedelta(seconds=60)), BAKE),
        Step(switch.StartDrain("sw", "v1", 3, AT), DRAIN),
        Step(switch.CompleteSwitch("sw", 1.0), SwitchCompleted("sw", 1.0)),
    ]
    now = given(switch)
    for step in steps:
        now = now.when(step.command).then(step.event)
        now.when(step.command).then_nothing()
    assert now.state.phase == "completed"


@pytest.mark.parametrize("strategy", ["", "rolling"])
def test_an_unknown_strategy_is_refused(strategy: str) -> None:
    assert "immediate" in given(switch).when(opened(strategy=strategy)).then_rejected("strategy_unknown").hint


def test_parameters_that_the_strategy_does_not_know_are_refused() -> None:
    given(switch).when(opened(parameters={"steps": 3})).then_rejected("parameters_invalid")


COMMANDS: tuple[switch.SwitchCommand, ...] = (
    switch.RecordInstancesRequested("sw", ("i9",)),
    switch.RecordTargetReady("sw", ("i9",), 1.0, False),
    switch.StartStep("sw", 1, 100.0, 2, "", AT),
    switch.RecordStepApplied("sw", 1, 2, ("g1",), 0.1),
    switch.StartBake("sw", AT),
    switch.StartDrain("sw", "v1", 3, AT),
    switch.CompleteSwitch("sw", 1.0),
    switch.StartRollback("sw", 3, "abort", "", AT),
    switch.FinishRollback("sw", ("g1",), 0.1),
    switch.AbortSwitch("sw", "x"),
    switch.FailSwitch("sw", "loading", "x"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_switch_is_named(command: switch.SwitchCommand) -> None:
    given(switch).when(command).then_rejected("switch_unknown")


@pytest.mark.parametrize(
    "end", [SwitchCompleted("sw", 1.0), RolledBack("sw", (), 1.0), SwitchAborted("sw", ""), SwitchFailed("sw", "s", "")]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_leads_out_of_an_end(end: object, command: switch.SwitchCommand) -> None:
    decided = given(switch, ASKED_FOR, end).when(command)
    if decided.decision != ():
        decided.then_rejected("switch_ended")


@pytest.mark.parametrize("before", [(), (InstancesRequested("sw", ("i2",)),), (READY_NOW,)])
def test_before_traffic_an_abort_or_a_failure_ends_the_switch_at_once(before: tuple[object, ...]) -> None:
    now = given(switch, ASKED_FOR, *before)
    now.when(switch.AbortSwitch("sw", "no")).then(SwitchAborted("sw", "no"))
    now.when(switch.FailSwitch("sw", "loading", "bad", ("x",))).then(SwitchFailed("sw", "loading", "bad", ("x",)))
    now.when(switch.StartRollback("sw", 3, "abort", "", AT)).then_rejected("out_of_turn")


@pytest.mark.parametrize("before", [(STEP,), (STEP, APPLIED), (STEP, APPLIED, BAKE), (STEP, APPLIED, BAKE, DRAIN)])
def test_once_traffic_has_moved_only_a_rollback_leads_back(before: tuple[object, ...]) -> None:
    now = given(switch, ASKED_FOR, READY_NOW, *before)
    now.when(switch.AbortSwitch("sw", "no")).then_rejected("out_of_turn")
    now.when(switch.FailSwitch("sw", "loading", "x")).then_rejected("out_of_turn")
    back = now.when(switch.StartRollback("sw", 3, "undo", "bad", AT)).then(ROLLBACK)
    back.when(switch.StartDrain("sw", "v1", 4, AT)).then_rejected("out_of_turn")
    back.when(switch.FinishRollback("sw", ("g1",), 0.5)).then(RolledBack("sw", ("g1",), 0.5))


def test_a_rollback_that_an_abort_began_ends_as_aborted() -> None:
    began = RollbackStarted("sw", 3, "abort", "stop it", AT)
    now = given(switch, ASKED_FOR, READY_NOW, STEP, began)
    now.when(switch.FinishRollback("sw", ("g1",), 0.5)).then(SwitchAborted("sw", "stop it"))


def test_steps_come_one_after_the_other() -> None:
    ready = given(switch, ASKED_FOR, READY_NOW)
    ready.when(switch.StartStep("sw", 2, 100.0, 3, "", AT)).then_rejected("out_of_turn")
    given(switch, ASKED_FOR, READY_NOW, STEP).when(switch.StartStep("sw", 2, 100.0, 3, "", AT)).then_rejected(
        "out_of_turn"
    )
    ready.when(switch.CompleteSwitch("sw", 0.0)).then_rejected("out_of_turn")


def test_a_first_switch_has_nothing_to_drain() -> None:
    first = SwitchRequested("sw", "chat", "v1", "", "immediate", {}, False, "", AT, 60.0, 600.0, AT)
    given(switch, first, READY_NOW, STEP, APPLIED).when(switch.CompleteSwitch("sw", 0.0)).then(
        SwitchCompleted("sw", 0.0)
    )
