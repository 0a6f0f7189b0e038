"""The log in plain sentences: every event type has one, and each line knows its model and switch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from turnout.events import alert, codec, gateway, instance, model, route, subjects, switch, worker
from turnout.events.codec import Context
from turnout.events.envelope import START, Recorded, Unknown
from turnout.events.units import size
from turnout.projections.audit import Audit, seconds, sentence, tone, who

if TYPE_CHECKING:
    import msgspec

NOW = datetime(2026, 11, 23, 22, 14, 3, tzinfo=UTC)
FAKE = model.EngineSpec("fake")
_sequence = 0


def recorded(aggregate: str, id: str, event: msgspec.Struct, actor: str = "controller") -> Recorded:
    global _sequence
    _sequence += 1
    subject = subjects.event(aggregate, id)
    context = Context("c1", actor, "", "", NOW)
    return codec.decode(subject, _sequence, *codec.record(subject, event, context, 0, START))


#: One of each type, with its aggregate, and the sentence that it must make.
SENTENCES: list[tuple[str, msgspec.Struct, str]] = [
    ("model", model.ModelRegistered("chat"), "alice made the model chat"),
    (
        "model",
        model.VersionRegistered("chat", "v1", model.EngineSpec("vllm", "/m/v1"), "d", "new weights"),
        "alice registered chat v1 (vllm, /m/v1): new weights",
    ),
    (
        "model",
        model.VersionRegistered("chat", "v3", model.EngineSpec("vllm", "/m/v1", adapter="/m/l"), "d", parent="v1"),
        "alice registered chat v3 (vllm, adapter /m/l on /m/v1) from v1",
    ),
    (
        "model",
        model.VersionValidated("chat", "v1", "w1", model.Inspection("c0ffee1234567890", 269 << 20, 272)),
        "chat v1 can be loaded, as its files say: content c0ffee123456, 272 tensors, 269 MiB",
    ),
    (
        "model",
        model.VersionRejected("chat", "v1", "w1", "weights_truncated", "it ends too early", "copy it again"),
        "chat v1 can't be served: it ends too early",
    ),
    (
        "model",
        model.VersionUnseen("chat", "v1", "w2", "path_missing", "nothing is there"),
        "w2 can't look at chat v1: nothing is there",
    ),
    ("model", model.VersionDeregistered("chat", "v1"), "alice deregistered chat v1"),
    ("model", model.VersionDeregistered("chat", "v1", "old"), "alice deregistered chat v1: old"),
    ("model", model.SwitchAdmitted("chat", "sw-1", "v2"), "chat is reserved for switch sw-1 to v2"),
    (
        "model",
        model.SwitchClosed("chat", "sw-1", "rolled_back"),
        "chat is free for the next switch: sw-1 was rolled back",
    ),
    ("model", model.ActiveVersionChanged("chat", "v2", "v1", "sw-1"), "chat serves v2 now (before: v1)"),
    ("model", model.KnownGoodMarked("chat", "v2", "sw-1"), "chat v2 is known to be good"),
    ("model", model.KnownGoodRevoked("chat", "v2", "sw-1"), "chat v2 was undone: no undo returns to it any more"),
    (
        "model",
        model.PolicyChanged("chat", "careful", {"strategy": "canary"}),
        "alice set policy careful of chat",
    ),
    ("model", model.PolicyChanged("chat", "careful", {}), "alice removed policy careful of chat"),
    ("model", model.RulesChanged("chat", (route.Rule("short", "tokens < 9"),)), "alice set the rules of chat: short"),
    ("model", model.RulesChanged("chat", ()), "alice removed the rules of chat"),
    (
        "model",
        model.ServingChanged("chat", model.Serving(on_demand=True, keep_alive_s=600)),
        "alice decided that chat is loaded on demand and kept for 10 min after its last use",
    ),
    (
        "model",
        model.ServingChanged("chat", model.Serving(on_demand=True, keep_alive_s=-1)),
        "alice decided that chat is loaded on demand and kept for ever",
    ),
    ("model", model.ServingChanged("chat", model.Serving()), "alice decided that chat is always loaded"),
    (
        "model",
        model.ActiveVersionChanged("chat", "v1", "", ""),
        "chat serves v1 as soon as somebody asks for it",
    ),
    ("model", model.DemandSeen("chat", "v1", "g1", NOW), "a request waits for chat at g1: v1 is needed"),
    (
        "model",
        model.DemandEnded("chat", "v1", "idle", "not used for 600 s", NOW),
        "chat v1 is not needed any more: not used for 600 s",
    ),
    (
        "model",
        model.DemandEnded("chat", "v1", "failed", "no memory", NOW),
        "chat v1 could not be loaded, and those who wait are told: no memory",
    ),
    (
        "switch",
        switch.SwitchRequested("sw-1", "chat", "v2", "v1", "immediate", {}, False, "new weights", NOW, 60, 600, NOW),
        "alice asked for chat v2 (immediate): new weights",
    ),
    ("switch", switch.InstancesRequested("sw-1", ("i2",)), "sw-1: i2 must be loaded first"),
    (
        "switch",
        switch.HoldStarted("sw-1", "v1", 4, "fast", 31.2, NOW),
        "sw-1: no place for both, so requests wait from revision 4 on while v1 makes room, a pause of about 31 s in "
        "which nobody can take over, as policy fast allows",
    ),
    (
        "switch",
        switch.HoldStarted("sw-1", "v1", 4, "", None, NOW),
        "sw-1: no place for both, so requests wait from revision 4 on while v1 makes room, a pause of a length never "
        "measured in which nobody can take over, as the command allows",
    ),
    (
        "switch",
        switch.HoldReleased("sw-1", "v2", 30.8),
        "sw-1: the requests that waited go on to v2, after a pause of 31 s",
    ),
    ("switch", switch.TargetReady("sw-1", ("i2",), 31.24, False), "sw-1: ready after 31 s (i2)"),
    (
        "switch",
        switch.StepStarted("sw-1", 1, 100, 4, "all at once", NOW),
        "sw-1: step 1 gives it 100 % with revision 4: all at once",
    ),
    (
        "switch",
        switch.StepApplied("sw-1", 1, 4, ("g1", "g2"), 0.0081),
        "sw-1: step 1 applied in 8 ms by g1, g2",
    ),
    (
        "switch",
        switch.BakeStarted("sw-1", NOW + timedelta(seconds=60)),
        "sw-1: bakes for 60 s, the old version stays warm",
    ),
    (
        "switch",
        switch.DrainStarted("sw-1", "v1", 5, NOW),
        "sw-1: v1 gets nothing new from revision 5 on and finishes what it has",
    ),
    (
        "switch",
        switch.StepStarted("sw-1", 1, 0, 4, "the first step", NOW, 20),
        "sw-1: step 1 gives it copies of 20 % of the requests with revision 4: the first step",
    ),
    (
        "switch",
        switch.VerdictReached(
            "sw-1", 1, "fail", "dead", "v2 failed 5 of 5 requests", "dead", 40, 5, 0, 5, 3, 1.5, (), 9, 2, NOW
        ),
        "sw-1: verdict on step 1 is fail: v2 failed 5 of 5 requests",
    ),
    (
        "switch",
        switch.SwitchPaused("sw-1", "operator", "lunch", NOW, NOW + timedelta(minutes=10)),
        "sw-1: paused for 10 min: lunch",
    ),
    (
        "switch",
        switch.SwitchPaused("sw-1", "inconclusive", "0 of 50 requests", NOW),
        "sw-1: held: the evidence says neither yes nor no: 0 of 50 requests",
    ),
    ("switch", switch.SwitchResumed("sw-1", "back", NOW), "sw-1: goes on: back"),
    ("switch", switch.SwitchPromoted("sw-1", 2, False, "", NOW), "sw-1: alice promoted it past step 2"),
    (
        "switch",
        switch.SwitchPromoted("sw-1", 2, True, "we are sure", NOW),
        "sw-1: alice promoted it past every further step, pause and analysis: we are sure",
    ),
    (
        "switch",
        switch.SwitchConcluded("sw-1", "v1", "24 h are over"),
        "sw-1: ended as planned, v1 stays: 24 h are over",
    ),
    ("switch", switch.SwitchCompleted("sw-1", 1.25), "sw-1: completed, drained in 1.25 s"),
    (
        "switch",
        switch.RollbackStarted("sw-1", 6, "undo", "wrong answers", NOW),
        "sw-1: goes back with revision 6 (undo): wrong answers",
    ),
    ("switch", switch.RolledBack("sw-1", ("g1",), 0.007), "sw-1: rolled back in 7 ms by g1"),
    ("switch", switch.SwitchAborted("sw-1", "not now"), "sw-1: aborted: not now"),
    (
        "switch",
        switch.SwitchFailed("sw-1", "loading", "the engine ended", ("a", "No such file", "  ")),
        'sw-1: failed in stage loading: the engine ended (engine: "No such file")',
    ),
    (
        "instance",
        instance.InstanceRequested("i2", "chat", "v2", "w1", FAKE, "restore", 2),
        "i2: worker w1 shall load it (fake) to restore it, attempt 2",
    ),
    ("instance", instance.InstanceLoading("i2", "loading", 12.0, "shard 1"), "i2: loading after 12 s: shard 1"),
    (
        "instance",
        instance.InstanceReady("i2", "unix:/s", 30.0, 0.5, 812 * 2**20, "v2"),
        "i2: proven ready, loaded in 30 s, probed in 500 ms, 812 MiB",
    ),
    (
        "instance",
        instance.InstanceReady("i2", "unix:/s", 0.8, 0.4, 0, "v2", "spare"),
        "i2: proven ready by the spare tier, loaded in 800 ms, probed in 400 ms",
    ),
    (
        "instance",
        instance.TierFailed("i2", "spare", "v1", "a stale head"),
        "i2: the spare tier failed (engine of v1), the next one is taken: a stale head",
    ),
    ("instance", instance.InstanceSleepRequested("i2", 1, "idle"), "i2: shall sleep (level 1): idle"),
    (
        "instance",
        instance.InstanceSlept("i2", 1, 0.5, 2**30, 2**29),
        "i2: asleep (level 1) in 500 ms, holds 1.5 GiB",
    ),
    ("instance", instance.InstanceWakeRequested("i2", "restore"), "i2: shall wake to restore it"),
    ("instance", instance.InstanceWoken("i2", 0.5, 0.2, 2**30), "i2: awake in 500 ms, proven in 200 ms"),
    (
        "instance",
        instance.InstanceDraining("i2", "idle", "alice"),
        "i2: asked to stop, forced by alice: idle",
    ),
    (
        "instance",
        instance.InstanceProbeRequested("i2", "sw-1.1", NOW),
        "i2: shall answer its golden probe once more",
    ),
    ("instance", instance.InstanceProbed("i2", "sw-1.1", True, 0.05), "i2: answered its golden probe in 50 ms"),
    (
        "instance",
        instance.InstanceProbed("i2", "sw-1.1", False, 5, "no answer"),
        "i2: failed its golden probe in 5 s: no answer",
    ),
    ("instance", instance.InstanceStopped("i2", 0.25), "i2: stopped in 250 ms"),
    (
        "instance",
        instance.InstanceFailed("i2", "serving", "the engine ended", (), -9),
        "i2: failed in stage serving (exit code -9): the engine ended",
    ),
    (
        "route",
        route.RouteChanged(
            "chat",
            5,
            (
                route.Split("v2", 100, (route.Endpoint("i2", "unix:/s"),)),
                route.Split("v1", 0, (route.Endpoint("i1", "unix:/t"),)),
            ),
            "sw-1",
            600,
            "repair",
        ),
        "chat is routed by revision 5 (repair): v2 100 % (i2), v1 0 % (i1)",
    ),
    (
        "alert",
        alert.AlertRaised(
            "switch_held.chat", "warning", "switch_held", "chat waits for a decision", "promote or abort"
        ),
        "warning alert switch_held.chat: chat waits for a decision",
    ),
    (
        "alert",
        alert.AlertAcknowledged("switch_held.chat", "bob", "on it"),
        "bob has seen alert switch_held.chat: on it",
    ),
    ("instance", instance.InstanceMeasured("i1", 900 << 20), "i1: holds 900 MiB now"),
    ("alert", alert.AlertResolved("switch_held.chat", "it goes on"), "alert switch_held.chat is over: it goes on"),
    ("gateway", gateway.GatewayJoined("g1", "http://h:1"), "gateway g1 takes requests at http://h:1"),
    ("gateway", gateway.RouteApplied("g1", "chat", 5), "gateway g1 routes chat by revision 5"),
    (
        "gateway",
        gateway.VersionDrained("g1", "chat", "v1", 5, 2),
        "gateway g1 has finished all requests of chat v1 (revision 5); 2 had to be ended",
    ),
    ("gateway", gateway.GatewayLost("g1", 6.5), "gateway g1 was silent for 6.5 s: not waited for any more"),
    ("gateway", gateway.GatewayLeft("g1"), "gateway g1 stopped"),
    (
        "worker",
        worker.WorkerJoined("w1", "h", ("vllm", "fake"), ("cuda:0",), 1),
        "worker w1 on h with cuda:0 offers 1 place for vllm, fake",
    ),
    (
        "worker",
        worker.WorkerJoined("w1", "h", ("fake",), ("cpu",), 8, 4 << 30),
        "worker w1 on h with cpu offers 8 places and 4.0 GiB for fake",
    ),
    (
        "worker",
        worker.WorkerKeeps("w1", (worker.KeptEngine("spare-1", "spare", bytes=3 << 20),)),
        "worker w1 keeps spare spare-1 (3 MiB) beside its instances",
    ),
    ("worker", worker.WorkerKeeps("w1", ()), "worker w1 keeps no engine beside its instances"),
    (
        "worker",
        worker.SpareReleased("w1", "spare-1", "makes room for chat v2"),
        "worker w1 is to end its spare spare-1: makes room for chat v2",
    ),
    ("model", model.VersionPinned("chat", "v1", "demo"), "alice pinned chat v1: it is kept loaded: demo"),
    ("model", model.VersionUnpinned("chat", "v1"), "alice unpinned chat v1"),
    (
        "model",
        model.PreloadRequested("chat", "v2", 5, NOW),
        "alice wishes chat v2 to be preloaded (priority 5)",
    ),
    ("model", model.PreloadEnded("chat", "v2", "ready"), "chat v2 is preloaded"),
    (
        "model",
        model.PreloadEnded("chat", "v2", "withdrawn", "evicted by alice"),
        "chat v2 is not to be preloaded any more: evicted by alice",
    ),
    (
        "model",
        model.EvictionRequested("chat", "v2", NOW, "room for v3"),
        "alice lets idle instances of chat v2 go: room for v3",
    ),
    ("model", model.ReplicasChanged("chat", "v2", 3), "alice wants 3 instances of chat v2"),
    ("worker", worker.WorkerLost("w1", 10.2), "worker w1 was silent for 10 s: taken for lost"),
    ("worker", worker.WorkerLeft("w1"), "worker w1 stopped"),
]


@pytest.mark.parametrize(("aggregate", "event", "said"), SENTENCES, ids=[type(e).__name__ for _, e, _ in SENTENCES])
def test_an_event_makes_its_sentence(aggregate: str, event: msgspec.Struct, said: str) -> None:
    assert sentence(recorded(aggregate, "x", event, "ops:alice")) == said


def test_no_event_type_is_without_a_sentence() -> None:
    assert {type(event).__name__ for _, event, _ in SENTENCES} == set(codec.TYPES)


def test_an_event_of_a_newer_turnout_is_told_as_such() -> None:
    one = recorded("model", "chat", model.ModelRegistered("chat"))
    newer = Recorded(one.subject, 9, "ModelPraised", Unknown("ModelPraised", 3, b"{}"), one.envelope, b"", b"{}")
    assert sentence(newer) == "ModelPraised (version 3): this turnout is too old to read it"
    assert Audit().entry(newer).tone == "detail"


REQUESTED = next(event for _, event, _ in SENTENCES if isinstance(event, switch.SwitchRequested))


def test_an_instance_and_a_switch_are_called_by_what_they_are() -> None:
    audit = Audit()
    audit.entry(recorded("switch", "sw-1", REQUESTED))
    audit.entry(recorded("instance", "i2", instance.InstanceRequested("i2", "chat", "v2", "w1", FAKE, "sw-1")))
    ready = audit.entry(recorded("instance", "i2", instance.InstanceReady("i2", "unix:/s", 1, 1, 0, "")))
    assert ready.sentence.startswith("i2 (chat v2): proven ready")
    assert (ready.model, ready.switch, ready.tone) == ("chat", "sw-1", "good")
    done = audit.entry(recorded("switch", "sw-1", switch.SwitchCompleted("sw-1", 0)))
    assert done.sentence == "chat → v2: completed"


def test_what_gateways_do_belongs_to_the_switch_that_made_the_revision() -> None:
    audit = Audit()
    audit.entry(recorded("switch", "sw-1", REQUESTED))
    audit.entry(recorded("route", "chat", route.RouteChanged("chat", 4, (), "sw-1", 600, "sw-1")))
    audit.entry(recorded("route", "chat", route.RouteChanged("chat", 5, (), "sw-1", 600, "repair")))
    by_switch = audit.entry(recorded("gateway", "g1", gateway.RouteApplied("g1", "chat", 4)))
    by_repair = audit.entry(recorded("gateway", "g1", gateway.RouteApplied("g1", "chat", 5)))
    assert (by_switch.model, by_switch.switch) == ("chat", "sw-1")
    assert (by_repair.model, by_repair.switch) == ("chat", "")


def test_what_concerns_no_model_belongs_to_none() -> None:
    entry = Audit().entry(recorded("worker", "w1", worker.WorkerLeft("w1")))
    assert (entry.model, entry.switch) == ("", "")


@pytest.mark.parametrize(
    ("actor", "name"),
    [
        ("ops:alice", "alice"),
        ("ops:config", "turnout.toml"),
        ("ops", "somebody"),
        ("controller", "controller"),
        ("worker:w1", "w1"),
    ],
)
def test_an_actor_is_called_by_its_name(actor: str, name: str) -> None:
    assert who(actor) == name


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0081, "8 ms"), (0.9999, "1 s"), (6.0, "6 s"), (1.25, "1.25 s"), (31.2, "31 s"), (720, "12 min")],
)
def test_a_duration_has_the_digits_that_matter(value: float, text: str) -> None:
    assert seconds(value) == text


def test_sizes_have_binary_units() -> None:
    assert (size(812 * 2**20), size(3 * 2**29)) == ("812 MiB", "1.5 GiB")


def test_a_cut_drain_is_a_warning() -> None:
    assert tone(gateway.VersionDrained("g1", "chat", "v1", 5, 2)) == "warning"
    assert tone(gateway.VersionDrained("g1", "chat", "v1", 5, 0)) == "detail"
