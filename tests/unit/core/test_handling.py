"""Commands from outside: every verb, and every way in which one is refused."""

from __future__ import annotations

import ast
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.core.story import CONFIG, FAKE, Story, registered, serving

from turnout.core import alert, gateway, instance, model, residence, worker
from turnout.core.config import ModelSwitchingConfig
from turnout.core.decider import Rejected
from turnout.core.handling import (
    VERBS,
    AdvanceSwitch,
    AskCache,
    Context,
    ContinueSwitch,
    Defaults,
    EvictVersion,
    HoldSwitch,
    PlaceVersion,
    Plan,
    PreloadVersion,
    RetrySwitch,
    StartSpare,
    StartSwitch,
    StopInstance,
    StopSwitch,
    Told,
    UndoModel,
    WakeModel,
    switch_id,
)
from turnout.core.sagas.owed import decide
from turnout.core.switch import TWICE_S
from turnout.events.alert import AlertRaised, AlertResolved
from turnout.events.instance import InstanceDraining, InstanceFailed, InstanceRequested, InstanceStopped
from turnout.events.model import (
    ActiveVersionChanged,
    DemandSeen,
    EngineSpec,
    Inspection,
    KnownGoodMarked,
    ModelRegistered,
    PolicyChanged,
    PreloadRequested,
    RulesChanged,
    Serving,
    ServingChanged,
    SwitchAdmitted,
    SwitchClosed,
    VersionPinned,
    VersionRegistered,
    VersionRejected,
    VersionUnseen,
)
from turnout.events.route import RouteChanged, Rule
from turnout.events.switch import (
    RollbackStarted,
    RolledBack,
    StepStarted,
    SwitchAborted,
    SwitchPaused,
    SwitchRequested,
)
from turnout.events.worker import KeptEngine, WorkerJoined

if TYPE_CHECKING:
    from collections.abc import Callable

CORE = Path(__file__).parents[3] / "core"
FROZEN = ModelSwitchingConfig(enable_dynamic_registry=False)


def handled(
    story: Story,
    role: str,
    verb: str,
    body: object,
    *,
    command: str = "c1",
    actor: str = "alice",
    config: ModelSwitchingConfig = CONFIG,
    leads: bool = False,
) -> Any:
    """Handle a command and decide its writes; the events, the plan or the rejection."""
    type_, handler = VERBS[role, verb]
    assert isinstance(body, type_)
    context = Context(command, actor, story.now, config, Defaults(), leads)
    planned = handler(story.world, body, context)
    if isinstance(planned, Rejected | Told):
        return planned
    decided = decide(story.world, planned)
    return decided if isinstance(decided, Rejected) else [event for made in decided.values() for event in made]


def on_demand_without_a_version() -> Story:
    return registered().happens(ServingChanged("chat", Serving(on_demand=True)))


def baking() -> Story:
    story = serving().instance("i2", "v2").asked("v2")
    story.carry()
    story.applied().carry()
    story.carry()
    return story


def at_first_step() -> Story:
    """A gradual switch whose first step is applied."""
    story = serving().instance("i2", "v2").asked("v2", strategy="gradual")
    story.carry()
    story.applied().carry()
    return story


def promoted_once() -> Story:
    """It was promoted past its first step, and is at its second one a second later."""
    story = at_first_step()
    story.happens(*handled(story, "ops", "switch.promote", AdvanceSwitch("sw-1")))
    story.carry()
    return story


def gone_on() -> Story:
    """It has left its first step by itself."""
    story = at_first_step()
    return story.happens(StepStarted("sw-1", 2, 50.0, 9, "the first step took its time", story.now))


def gone_back() -> Story:
    """v2 was undone while it baked; v0 is an older version that is known to be good."""
    story = serving().happens(VersionRegistered("chat", "v0", FAKE, ""))
    story.happens(KnownGoodMarked("chat", "v0", "sw-a"), KnownGoodMarked("chat", "v1", "sw-b"))
    story.instance("i2", "v2").asked("v2").carry()
    story.applied().carry()
    story.carry()
    story.happens(*handled(story, "ops", "model.undo", UndoModel("chat")))
    return story.happens(RolledBack("sw-1", ("g1", "g2"), 0.1), SwitchClosed("chat", "sw-1", "rolled_back"))


def undo_runs() -> Story:
    """chat goes back from v2, which had completed, to v1."""
    story = draining().applied().drained("v1")
    story.carry()
    story.happens(*handled(story, "ops", "model.undo", UndoModel("chat")))
    return story


def paused() -> Story:
    story = at_first_step()
    return story.happens(SwitchPaused("sw-1", "operator", "lunch", story.now))


def held() -> Story:
    story = at_first_step()
    return story.happens(SwitchPaused("sw-1", "inconclusive", "too little traffic", story.now))


def refused() -> Story:
    files = EngineSpec("fake", path="/models/chat-v3")
    story = serving().happens(VersionRegistered("chat", "v3", files, model.digest(files)))
    return story.happens(VersionRejected("chat", "v3", "w1", "weights_truncated", "it ends too early", "copy it again"))


def ended() -> Story:
    story = serving().asked("v2")
    story.happens(SwitchAborted("sw-1", "no"))
    return story


def alert_raised() -> Story:
    return serving().happens(AlertRaised("switch_held.chat", "warning", "switch_held", "it waits", "decide", "chat"))


def alert_over() -> Story:
    return alert_raised().happens(AlertResolved("switch_held.chat", "it goes on"))


def draining() -> Story:
    story = baking().later(60.0)
    story.carry()
    return story


# --- every verb --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "verb", "body", "kinds"),
    [
        ("ops", "version.register", model.RegisterVersion("chat", "v3", FAKE), ["VersionRegistered"]),
        ("ops", "version.deregister", model.DeregisterVersion("chat", "v2"), ["VersionDeregistered"]),
        ("ops", "switch.start", StartSwitch("chat", "v2"), ["SwitchAdmitted", "SwitchRequested"]),
        ("ops", "model.policy", model.SetPolicy("chat", "slow", {"strategy": "gradual"}), ["PolicyChanged"]),
        ("ops", "model.rules", model.SetRules("chat", (Rule("short", "tokens < 100", "v2"),)), ["RulesChanged"]),
        ("ops", "version.preload", PreloadVersion("chat", "v2"), ["PreloadRequested"]),
        ("ops", "version.preload", PreloadVersion("chat", "v1"), []),
        ("ops", "version.pin", residence.PinVersion("chat", "v2"), ["VersionPinned"]),
        ("ops", "version.unpin", residence.UnpinVersion("chat", "v2"), []),
        ("ops", "version.replicas", residence.SetReplicas("chat", "v2", 3), ["ReplicasChanged"]),
        ("ops", "version.evict", EvictVersion("chat", "v2"), []),
        ("gw", "gateway.join", gateway.JoinGateway("g3", "http://g3"), ["GatewayJoined"]),
        ("gw", "gateway.applied", gateway.ReportApplied("g1", "chat", 2), ["RouteApplied"]),
        ("gw", "gateway.drained", gateway.ReportDrained("g1", "chat", "v1", 2), ["VersionDrained"]),
        ("gw", "gateway.leave", gateway.LeaveGateway("g1"), ["GatewayLeft"]),
        ("ops", "instance.stop", StopInstance("i1", force=True, reason="hangs"), ["InstanceDraining"]),
        ("worker", "worker.join", worker.JoinWorker("w2", "h", ("fake",), (), 1), ["WorkerJoined"]),
        ("worker", "worker.leave", worker.LeaveWorker("w1"), ["WorkerLeft"]),
        ("worker", "worker.kept", worker.ReportKept("w1", (KeptEngine("base-1", "base"),)), ["WorkerKeeps"]),
        ("worker", "worker.spare", StartSpare("w1", KeptEngine("spare-1", "spare")), ["WorkerKeeps"]),
        (
            "worker",
            "version.inspected",
            model.ReportInspected("chat", "v2", "w1", model.digest(FAKE), Inspection("c")),
            ["VersionValidated"],
        ),
        ("worker", "instance.loading", instance.ReportLoading("i1", "proving", 1.0), []),
        ("worker", "instance.ready", instance.ReportReady("i1", "unix:/n", 1.0, 0.1), ["InstanceReady"]),
        ("worker", "instance.measured", instance.ReportMeasured("i1", 5), ["InstanceMeasured"]),
        ("worker", "instance.probed", instance.ReportProbed("i1", "sw-1.1", True, 0.1), []),
        ("worker", "instance.tier", instance.ReportTierFailed("i1", "spare", "v0", "x"), ["TierFailed"]),
        ("worker", "instance.slept", instance.ReportSlept("i1", 1, 0.1), []),
        ("worker", "instance.woken", instance.ReportWoken("i1", 0.1, 0.1), []),
        ("worker", "instance.stopped", instance.ReportStopped("i1", 1.0), ["InstanceStopped"]),
        ("worker", "instance.failed", instance.ReportFailed("i1", "serving", "x"), ["InstanceFailed"]),
    ],
)
def test_each_verb_writes_its_events(role: str, verb: str, body: object, kinds: list[str]) -> None:
    assert [type(e).__name__ for e in handled(serving(), role, verb, body)] == kinds


@pytest.mark.parametrize(
    ("at", "verb", "body", "kinds"),
    [
        (at_first_step, "switch.pause", HoldSwitch("sw-1"), ["SwitchPaused"]),
        (paused, "switch.resume", ContinueSwitch("sw-1"), ["SwitchResumed"]),
        (at_first_step, "switch.promote", AdvanceSwitch("sw-1", 1), ["SwitchPromoted"]),
        (held, "switch.promote", AdvanceSwitch("sw-1"), ["SwitchPromoted"]),
        (alert_raised, "alert.acknowledge", alert.AcknowledgeAlert("switch_held.chat"), ["AlertAcknowledged"]),
        (ended, "switch.retry", RetrySwitch("sw-1"), ["SwitchRequested"]),
    ],
)
def test_each_word_of_an_operator_on_a_switch_writes_its_events(
    at: Callable[[], Story], verb: str, body: object, kinds: list[str]
) -> None:
    story = at()
    if verb == "switch.retry":
        story.happens(SwitchClosed("chat", "sw-1", "aborted"))
        kinds = ["SwitchAdmitted", *kinds]
    assert [type(e).__name__ for e in handled(story, "ops", verb, body, command="c9")] == kinds


def test_a_retry_names_the_policy_whose_parameters_it_follows_though_that_may_have_changed() -> None:
    careful: dict[str, object] = {"strategy": "gradual", "steps": [{"setWeight": 10}], "bake": "7s"}
    story = serving().happens(PolicyChanged("chat", "careful", careful))
    story.happens(*handled(story, "ops", "switch.start", StartSwitch("chat", "v2", policy="careful"), command="c1"))
    (first,) = story.world.switches.values()
    story.happens(SwitchClosed("chat", first.switch, "aborted"), SwitchAborted(first.switch, "no"))
    story.happens(PolicyChanged("chat", "careful", {"strategy": "immediate"}))
    again = handled(story, "ops", "switch.retry", RetrySwitch(first.switch), command="c2")[1]
    assert isinstance(again, SwitchRequested)
    assert (again.policy, again.strategy, again.bake_s) == ("careful", "gradual", 7.0)


def test_a_worker_that_can_not_see_the_files_rejects_them_only_when_no_other_is_left_to_look() -> None:
    files = EngineSpec("fake", path="/models/chat-v3")
    story = serving().happens(
        WorkerJoined("w2", "h", ("fake",), (), 1),
        WorkerJoined("w3", "h", ("vllm",), (), 1),
        VersionRegistered("chat", "v3", files, model.digest(files)),
    )

    def says(worker: str, code: str) -> Any:
        report = model.ReportInspected("chat", "v3", worker, model.digest(files), None, code, "nothing is there")
        return handled(story, "worker", "version.inspected", report)

    (unseen,) = says("w1", "path_missing")
    assert unseen == VersionUnseen("chat", "v3", "w1", "path_missing", "nothing is there")
    (rejected,) = says("w1", "weights_truncated")
    assert isinstance(rejected, VersionRejected)
    story.happens(unseen)
    assert says("w1", "path_missing") == []  # w2 has not looked yet
    (rejected,) = says("w2", "path_not_allowed")
    assert rejected == VersionRejected("chat", "v3", "w2", "path_not_allowed", "nothing is there")


def test_the_cache_is_told_with_who_makes_room_next_and_why_the_others_stay() -> None:
    story = serving().instance("i2", "v2")
    story.happens(VersionPinned("chat", "v1"), PreloadRequested("chat", "v3", 0, story.now))
    story.happens(VersionRegistered("chat", "v3", EngineSpec("vllm", path="/m"), ""))
    told = handled(story, "ops", "cache.show", AskCache())
    (worker_,) = told.workers
    assert [(one.instance, one.leaves, one.pinned) for one in worker_.instances] == [("i1", 0, True), ("i2", 1, False)]
    assert worker_.instances[0].why == "active"
    assert worker_.instances[1].why == "number 1 to make room (least recently used first)"


def test_every_verb_is_tried_here_or_below() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{verb}"' in text for _, verb in VERBS)


def test_a_switch_takes_what_the_command_says_and_the_defaults_for_the_rest() -> None:
    story = serving()
    admitted, asked = handled(story, "ops", "switch.start", StartSwitch("chat", "v2", reason="new weights"))
    id = switch_id("c1")
    assert admitted == SwitchAdmitted("chat", id, "v2")
    assert isinstance(asked, SwitchRequested)
    assert (asked.source, asked.strategy, asked.reason, asked.undo) == ("v1", "immediate", "new weights", False)
    assert (asked.bake_s, asked.drain_s) == (60.0, 600.0)
    assert asked.deadline == story.now + timedelta(seconds=300)
    body = StartSwitch("chat", "v2", bake_s=0.0, drain_s=5.0, max_transition_time_s=9.0)
    _, asked = handled(story, "ops", "switch.start", body)
    assert (asked.bake_s, asked.drain_s, asked.deadline) == (0.0, 5.0, story.now + timedelta(seconds=9))


@pytest.mark.parametrize(("strategy", "weight"), [("immediate", 100.0), ("gradual", 10.0)])
def test_a_leader_writes_the_first_step_to_a_warm_target_with_the_command(strategy: str, weight: float) -> None:
    story = serving().instance("i2", "v2")
    body = StartSwitch("chat", "v2", strategy=strategy)
    at_once = handled(story, "ops", "switch.start", body, leads=True)
    assert [type(e).__name__ for e in at_once] == [
        "SwitchAdmitted",
        "SwitchRequested",
        "TargetReady",
        "StepStarted",
        "RouteChanged",
    ]
    assert next(split.weight for split in at_once[-1].splits if split.version == "v2") == weight
    # the same events, in two writes, are what the command and then the saga make of it
    asked = handled(story, "ops", "switch.start", body)
    story.happens(*asked, after_s=0.0)
    assert [*asked, *story.carry(switch_id("c1"))] == at_once


def test_a_leader_leaves_a_target_that_must_be_loaded_to_the_saga() -> None:
    events = handled(serving(), "ops", "switch.start", StartSwitch("chat", "v2"), leads=True)
    assert [type(e).__name__ for e in events] == ["SwitchAdmitted", "SwitchRequested"]


def test_the_switch_id_comes_from_the_commands_id() -> None:
    assert switch_id("c1") == switch_id("c1") != switch_id("c2")


def test_an_abort_before_traffic_ends_the_switch_and_frees_the_model() -> None:
    story = serving().asked("v2")
    story.carry()
    events = handled(story, "ops", "switch.abort", StopSwitch("sw-1"))
    assert {type(e).__name__ for e in events} == {"SwitchAborted", "SwitchClosed"}
    aborted = next(e for e in events if isinstance(e, SwitchAborted))
    assert aborted.reason == "aborted by alice"


@pytest.mark.parametrize("at", [baking, draining])
@pytest.mark.parametrize(
    ("verb", "body", "cause"),
    [("switch.abort", StopSwitch("sw-1", "no"), "abort"), ("model.undo", UndoModel("chat", "no"), "undo")],
)
def test_an_abort_or_undo_after_traffic_is_a_rollback_in_one_batch(
    at: Any, verb: str, body: object, cause: str
) -> None:
    story = at()
    back, route = handled(story, "ops", verb, body)
    assert isinstance(back, RollbackStarted)
    assert (back.cause, back.reason) == (cause, "no")
    assert isinstance(route, RouteChanged)
    assert [(s.version, s.weight) for s in route.splits] == [("v1", 100.0)]
    assert back.revision == route.revision == story.world.routes["chat"].revision + 1


def test_an_undo_before_traffic_aborts() -> None:
    events = handled(serving().asked("v2"), "ops", "model.undo", UndoModel("chat"))
    assert {type(e).__name__ for e in events} == {"SwitchAborted", "SwitchClosed"}


def test_an_undo_of_a_completed_switch_is_a_switch_back_without_a_bake() -> None:
    story = draining().applied().drained("v1")
    story.carry()
    admitted, asked = handled(story, "ops", "model.undo", UndoModel("chat", "bad answers"))
    assert admitted.target == "v1"
    assert isinstance(asked, SwitchRequested)
    assert (asked.source, asked.undo, asked.bake_s, asked.reason) == ("v2", True, 0.0, "bad answers")


def test_an_undo_with_a_dead_source_takes_an_older_good_version_and_an_abort_says_so() -> None:
    story = source_dead()
    story.happens(VersionRegistered("chat", "v0", FAKE, ""), KnownGoodMarked("chat", "v0", "sw-a")).instance("i7", "v0")
    aborted = handled(story, "ops", "switch.abort", StopSwitch("sw-1"))
    assert isinstance(aborted, Rejected)
    assert "v0 is ready and known to be good: turnout undo chat" in aborted.hint
    back, route = handled(story, "ops", "model.undo", UndoModel("chat", "bad answers"))
    assert (back.cause, back.to, back.reason) == ("undo", "v0", "bad answers")
    assert [split.version for split in route.splits] == ["v0"]
    story.happens(back, route)
    for verb, body in (("model.undo", UndoModel("chat")), ("switch.abort", StopSwitch("sw-1"))):
        assert handled(story, "ops", verb, body, command="again") == [], "it is on its way"


def test_an_abort_twice_or_after_the_rollback_began_is_no_second_rollback() -> None:
    story = baking()
    story.happens(*handled(story, "ops", "switch.abort", StopSwitch("sw-1")))
    assert handled(story, "ops", "switch.abort", StopSwitch("sw-1"), command="c2") == []


def test_a_promotion_that_is_typed_twice_counts_once_unless_the_second_one_names_its_step() -> None:
    story = promoted_once()
    refused = handled(story, "ops", "switch.promote", AdvanceSwitch("sw-1"))
    assert refused.code == "step_unseen"
    assert refused.hint == "to let it past step 2, too: turnout promote sw-1 --step 2"
    # the same click again is true already; a step that was read is obeyed, and so is everybody once time has passed
    assert handled(story, "ops", "switch.promote", AdvanceSwitch("sw-1", 1)) == []
    (named,) = handled(story, "ops", "switch.promote", AdvanceSwitch("sw-1", 2))
    (full,) = handled(story, "ops", "switch.promote", AdvanceSwitch("sw-1", full=True, reason="hotfix"))
    (later,) = handled(story.later(TWICE_S), "ops", "switch.promote", AdvanceSwitch("sw-1"))
    assert (named.step, full.full, later.step) == (2, True, 2)


def test_an_undo_that_is_typed_twice_goes_back_once() -> None:
    refused = handled(gone_back(), "ops", "model.undo", UndoModel("chat"))
    assert refused.reason.startswith("chat has left v2 and serves v1 since ")
    assert refused.hint == "if you mean that: turnout undo chat --to v0"
    _, named = handled(gone_back(), "ops", "model.undo", UndoModel("chat", to="v0"))
    assert (named.target, named.undo) == ("v0", True)
    _, asked = handled(gone_back().later(TWICE_S), "ops", "model.undo", UndoModel("chat"))
    assert (asked.target, asked.undo) == ("v0", True)
    # and while a completed switch is undone, a second undo does not undo the undo
    running = handled(undo_runs(), "ops", "model.undo", UndoModel("chat"), command="c2")
    assert running.reason.startswith("chat goes back from v2 to v1 already")
    stays = handled(undo_runs(), "ops", "model.undo", UndoModel("chat", to="v2"), command="c2")
    assert {type(event).__name__ for event in stays} == {"SwitchAborted", "SwitchClosed"}


def test_a_source_that_has_no_room_to_come_back_is_told_with_what_makes_some() -> None:
    story = serving(capacity=2).instance("i2", "v2").asked("v2")
    story.carry()
    story.applied().carry()
    story.happens(InstanceFailed("i1", "serving", "x"), InstanceRequested("i3", "other", "v1", "w1", FAKE, "restore"))
    refused = handled(story, "ops", "model.undo", UndoModel("chat"))
    assert refused.code == "source_not_ready"
    assert "chat v1 can't be loaded: w1: 2 of 2 places taken" in refused.reason
    assert "turnout stop INSTANCE --force" in refused.hint


# --- stopping an instance ----------------------------------------------------------------------------------------


def test_an_instance_that_no_gateway_uses_is_stopped_without_force() -> None:
    story = serving().instance("i2", "v2")
    (stopped,) = handled(story, "ops", "instance.stop", StopInstance("i2"))
    assert stopped == InstanceDraining("i2", "stopped by alice", "")


def test_a_stop_is_refused_with_the_number_of_gateways_that_may_use_the_instance() -> None:
    story = draining()  # v1 has left the route: g1 and g2 have not said that it drained
    story.applied().drained("v1", "g1")
    refused = handled(story, "ops", "instance.stop", StopInstance("i1"))
    assert refused.reason.startswith("1 of 2 live gateways may send requests of chat v1 to i1")
    refused = handled(serving(), "ops", "instance.stop", StopInstance("i1"))
    assert refused.reason.startswith("2 of 2 live gateways")


def test_a_forced_stop_names_who_forced_it_and_another_instance_takes_its_place() -> None:
    story = serving()
    (stopped,) = handled(story, "ops", "instance.stop", StopInstance("i1", force=True, reason="hangs"))
    assert stopped == InstanceDraining("i1", "hangs", "alice")
    story.happens(stopped)
    changed, *_ = story.carry_placement()
    assert [type(e).__name__ for e in (changed, *_)] == ["InstanceRequested", "RouteChanged"]
    assert not story.world.routes["chat"].names("i1")


def test_a_force_that_comes_while_the_proof_of_quiet_is_waited_for_is_news_once() -> None:
    story = serving().instance("i2", "v2")
    story.happens(*handled(story, "ops", "instance.stop", StopInstance("i2")))
    assert handled(story, "ops", "instance.stop", StopInstance("i2"), command="c2") == []
    forced = StopInstance("i2", force=True, reason="a gateway is cut off")
    story.happens(*handled(story, "ops", "instance.stop", forced, command="c3"))
    assert story.world.instances["i2"].forced
    assert handled(story, "ops", "instance.stop", forced, command="c4") == []


# --- plans -------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_is_known_and_none_for_what_is_not() -> None:
    plan = handled(serving(), "ops", "switch.plan", StartSwitch("chat", "v2"))
    assert isinstance(plan, Plan)
    assert (plan.source, plan.target, plan.tier, plan.seconds, plan.bytes) == ("v1", "v2", "cold", None, None)
    assert [s.what.split()[0] for s in plan.steps] == ["load", "give", "bake:", "drain"]
    assert plan.steps[1].what == "give v2 100 % at once"


def test_a_plan_knows_what_the_newest_load_took_and_a_warm_version() -> None:
    story = serving().instance("i2", "v2")
    plan = handled(story, "ops", "switch.plan", StartSwitch("chat", "v2"))
    assert (plan.tier, plan.seconds, plan.bytes) == ("warm", 0.0, 1000)
    story.happens(InstanceFailed("i2", "serving", "x"))
    plan = handled(story, "ops", "switch.plan", StartSwitch("chat", "v2"))
    assert (plan.tier, plan.seconds) == ("cold", 1.0)


def test_a_first_versions_plan_has_nothing_to_bake_or_drain() -> None:
    plan = handled(registered("v1"), "ops", "switch.plan", StartSwitch("chat", "v1"))
    assert len(plan.steps) == 2


def test_where_one_version_has_room_a_switch_is_refused_unless_it_may_hold_and_the_plan_foretells_the_pause() -> None:
    story = serving(capacity=1)
    full = handled(story, "ops", "switch.plan", StartSwitch("chat", "v2"))
    assert (full.code, "--hold" in full.hint) == ("no_capacity", True)
    plan = handled(story, "ops", "switch.plan", StartSwitch("chat", "v2", hold=True))
    assert (plan.holds, plan.pause_s) == (True, None)
    assert [s.what.split()[0] for s in plan.steps] == ["let", "let", "stop", "load", "give"]
    story.happens(InstanceStopped("i1", 0.25)).instance("i2", "v2")
    story.happens(InstanceStopped("i2", 0.5)).instance("i3", "v1")
    assert handled(story, "ops", "switch.plan", StartSwitch("chat", "v2", hold=True)).pause_s == 1.25


def test_a_strategy_that_needs_both_versions_can_not_hold() -> None:
    refused = handled(serving(), "ops", "switch.plan", StartSwitch("chat", "v2", "canary", hold=True))
    assert refused.code == "parameters_invalid"
    assert "canary needs both versions" in refused.reason


def test_a_hold_changes_nothing_where_both_versions_have_room() -> None:
    plan = handled(serving(), "ops", "switch.plan", StartSwitch("chat", "v2", hold=True))
    assert (plan.holds, plan.pause_s) == (False, None)
    assert [s.what.split()[0] for s in plan.steps] == ["load", "give", "bake:", "drain"]


def test_a_plan_is_refused_as_the_switch_would_be() -> None:
    assert handled(serving(), "ops", "switch.plan", StartSwitch("chat", "v9")).code == "version_unknown"


# --- every refusal -----------------------------------------------------------------------------------------------


def first_switch_moved() -> Story:
    story = registered("v1").asked("v1", source="").instance("i1", "v1")
    story.carry()
    return story


def source_dead() -> Story:
    story = baking()
    story.happens(InstanceFailed("i1", "serving", "x"))
    return story


def ruled() -> Story:
    """Rule r of the model names v2."""
    return serving().happens(RulesChanged("chat", (Rule("r", "tokens < 100", "v2"),)))


def elsewhere() -> Story:
    """Rule r of chat sends pictures to vision, which has one version and serves nothing."""
    story = serving().happens(ModelRegistered("vision"), VersionRegistered("vision", "v1", FAKE, ""))
    return story.happens(RulesChanged("chat", (Rule("r", "'image' in modality", model="vision"),)))


def known_good_without_worker() -> Story:
    """v2 is active, v1 known good; nothing of v1 is loaded and there is no worker."""
    story = registered("v1", "v2", capacity=0)
    return story.happens(
        KnownGoodMarked("chat", "v1", "a"),
        KnownGoodMarked("chat", "v2", "b"),
        ActiveVersionChanged("chat", "v2", "v1", "b"),
    )


def pinned() -> Story:
    return serving().happens(VersionPinned("chat", "v2"))


def small() -> Story:
    """The worker has room for one engine of the fake kind; version ``large`` would never fit."""
    story = serving().happens(WorkerJoined("w1", "h1", ("fake",), (), 4, 1200))
    return story.happens(VersionRegistered("chat", "large", EngineSpec("fake", args=("--memory=1",)), ""))


REFUSALS: list[tuple[str, Any, str, str, object]] = [
    ("name_invalid", serving, "ops", "version.register", model.RegisterVersion("a b", "v1", FAKE)),
    ("name_invalid", serving, "gw", "gateway.join", gateway.JoinGateway("", "http://x")),
    ("name_invalid", serving, "worker", "worker.join", worker.JoinWorker("", "h", (), (), 1)),
    ("engine_invalid", serving, "ops", "version.register", model.RegisterVersion("chat", "v3", EngineSpec("x"))),
    (
        "version_exists",
        serving,
        "ops",
        "version.register",
        model.RegisterVersion("chat", "v1", EngineSpec("fake", args=("--x",))),
    ),
    ("model_unknown", serving, "ops", "version.deregister", model.DeregisterVersion("x", "v1")),
    ("model_unknown", serving, "ops", "switch.start", StartSwitch("x", "v1")),
    ("model_unknown", serving, "ops", "model.undo", UndoModel("x")),
    ("version_in_use", serving, "ops", "version.deregister", model.DeregisterVersion("chat", "v1")),
    ("version_unknown", serving, "ops", "switch.start", StartSwitch("chat", "v9")),
    ("already_active", serving, "ops", "switch.start", StartSwitch("chat", "v1")),
    ("switch_running", baking, "ops", "switch.start", StartSwitch("chat", "v2")),
    ("strategy_unknown", serving, "ops", "switch.start", StartSwitch("chat", "v2", strategy="rolling")),
    ("parameters_invalid", serving, "ops", "switch.start", StartSwitch("chat", "v2", parameters={"steps": 1})),
    ("parameters_invalid", serving, "ops", "switch.start", StartSwitch("chat", "v2", bake_s=-1.0)),
    ("parameters_invalid", serving, "ops", "switch.start", StartSwitch("chat", "v2", drain_s=float("nan"))),
    ("parameters_invalid", serving, "ops", "switch.start", StartSwitch("chat", "v2", max_transition_time_s=1e10)),
    ("no_capacity", lambda: serving(capacity=1), "ops", "switch.start", StartSwitch("chat", "v2")),
    ("no_capacity", known_good_without_worker, "ops", "model.undo", UndoModel("chat")),
    ("no_memory", small, "ops", "switch.start", StartSwitch("chat", "v2")),
    ("no_memory", small, "ops", "version.preload", PreloadVersion("chat", "large")),
    ("version_in_use", serving, "ops", "version.evict", EvictVersion("chat", "v1")),
    ("version_in_use", pinned, "ops", "version.evict", EvictVersion("chat", "v2")),
    ("version_in_use", pinned, "ops", "version.deregister", model.DeregisterVersion("chat", "v2")),
    ("model_unknown", serving, "ops", "version.place", PlaceVersion("x", "v1")),
    ("version_unknown", serving, "ops", "version.place", PlaceVersion("chat", "v9")),
    ("version_unknown", serving, "ops", "version.pin", residence.PinVersion("chat", "v9")),
    ("version_unknown", serving, "ops", "version.replicas", residence.SetReplicas("chat", "v9", 2)),
    ("parameters_invalid", serving, "ops", "version.replicas", residence.SetReplicas("chat", "v2", 0)),
    ("parameters_invalid", serving, "ops", "version.preload", PreloadVersion("chat", "v2", 101)),
    ("switch_unknown", serving, "ops", "switch.abort", StopSwitch("sw-9")),
    ("switch_ended", ended, "ops", "switch.abort", StopSwitch("sw-1")),
    ("nothing_to_undo", serving, "ops", "model.undo", UndoModel("chat")),
    ("nothing_to_undo", first_switch_moved, "ops", "model.undo", UndoModel("chat")),
    ("source_not_ready", source_dead, "ops", "model.undo", UndoModel("chat")),
    ("policy_unknown", serving, "ops", "switch.start", StartSwitch("chat", "v2", policy="careful")),
    ("policy_invalid", serving, "ops", "model.policy", model.SetPolicy("chat", "careful", {"strategy": "rolling"})),
    ("name_invalid", serving, "ops", "model.policy", model.SetPolicy("chat", "a b", {})),
    ("rules_invalid", serving, "ops", "model.rules", model.SetRules("chat", (Rule("r", "tokens <", "v1"),))),
    ("rules_invalid", serving, "ops", "model.rules", model.SetRules("chat", (Rule("r", "tokens < 9", "v9"),))),
    ("rules_invalid", serving, "ops", "model.rules", model.SetRules("chat", (Rule("r", "tools", model="vision"),))),
    ("version_in_use", elsewhere, "ops", "version.deregister", model.DeregisterVersion("vision", "v1")),
    ("tag_invalid", serving, "ops", "version.register", model.RegisterVersion("chat", "v3", FAKE, "", ("a b",))),
    (
        "metric_invalid",
        serving,
        "ops",
        "version.register",
        model.RegisterVersion("chat", "v3", FAKE, metrics={"f1": float("inf")}),
    ),
    ("parent_unknown", serving, "ops", "version.register", model.RegisterVersion("chat", "v3", FAKE, parent="v9")),
    ("version_rejected", refused, "ops", "switch.start", StartSwitch("chat", "v3")),
    (
        "request_invalid",
        serving,
        "worker",
        "version.inspected",
        model.ReportInspected("chat", "v2", "w1", model.digest(FAKE)),
    ),
    ("version_in_use", ruled, "ops", "version.deregister", model.DeregisterVersion("chat", "v2")),
    (
        "parameters_invalid",
        serving,
        "ops",
        "switch.start",
        StartSwitch("chat", "v2", strategy="gradual", max_transition_time_s=1.0),
    ),
    ("parameters_invalid", at_first_step, "ops", "switch.pause", HoldSwitch("sw-1", seconds=-1.0)),
    ("switch_ended", ended, "ops", "switch.pause", HoldSwitch("sw-1")),
    ("switch_ended", ended, "ops", "switch.resume", ContinueSwitch("sw-1")),
    ("switch_ended", ended, "ops", "switch.promote", AdvanceSwitch("sw-1", full=True, reason="hotfix")),
    ("switch_unknown", serving, "ops", "switch.resume", ContinueSwitch("sw-9")),
    ("waits_for_a_decision", held, "ops", "switch.resume", ContinueSwitch("sw-1")),
    ("step_ahead", at_first_step, "ops", "switch.promote", AdvanceSwitch("sw-1", 7)),
    ("step_passed", gone_on, "ops", "switch.promote", AdvanceSwitch("sw-1", 1)),
    ("step_unseen", promoted_once, "ops", "switch.promote", AdvanceSwitch("sw-1")),
    ("undo_running", undo_runs, "ops", "model.undo", UndoModel("chat")),
    ("undo_elsewhere", gone_back, "ops", "model.undo", UndoModel("chat", to="v2")),
    ("undo_elsewhere", baking, "ops", "model.undo", UndoModel("chat", to="v2")),
    ("undone_already", gone_back, "ops", "model.undo", UndoModel("chat")),
    ("reason_missing", at_first_step, "ops", "switch.promote", AdvanceSwitch("sw-1", full=True)),
    ("switch_paused", paused, "ops", "switch.promote", AdvanceSwitch("sw-1")),
    ("switch_running", at_first_step, "ops", "switch.retry", RetrySwitch("sw-1")),
    ("switch_unknown", serving, "ops", "switch.retry", RetrySwitch("sw-9")),
    ("serving_invalid", serving, "ops", "model.serving", model.SetServing("chat", Serving(on_demand=True, queue=0))),
    ("not_on_demand", serving, "gw", "model.wake", WakeModel("chat", "g1")),
    ("nothing_active", on_demand_without_a_version, "gw", "model.wake", WakeModel("chat", "g1")),
    ("alert_unknown", serving, "ops", "alert.acknowledge", alert.AcknowledgeAlert("switch_held.chat")),
    ("alert_resolved", alert_over, "ops", "alert.acknowledge", alert.AcknowledgeAlert("switch_held.chat")),
    ("gateway_unknown", serving, "gw", "gateway.applied", gateway.ReportApplied("g9", "chat", 1)),
    ("worker_unknown", serving, "worker", "worker.leave", worker.LeaveWorker("w9")),
    ("instance_unknown", serving, "ops", "instance.stop", StopInstance("i9")),
    ("instance_in_use", serving, "ops", "instance.stop", StopInstance("i1")),
    ("reason_missing", serving, "ops", "instance.stop", StopInstance("i1", force=True)),
    ("instance_unknown", serving, "worker", "instance.ready", instance.ReportReady("i9", "unix:/x", 1.0, 0.1)),
]


@pytest.mark.parametrize(("code", "at", "role", "verb", "body"), REFUSALS)
def test_a_refusal_has_its_code_a_reason_and_a_hint(code: str, at: Any, role: str, verb: str, body: object) -> None:
    refused = handled(at(), role, verb, body)
    assert isinstance(refused, Rejected), refused
    assert refused.code == code
    assert refused.reason
    assert refused.hint
    assert not refused.reason.endswith(".")
    assert "Switch" not in refused.reason, "no name of the code's"


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("version.register", model.RegisterVersion("chat", "v3", FAKE)),
        ("version.deregister", model.DeregisterVersion("chat", "v2")),
    ],
)
def test_a_frozen_registry_takes_versions_from_the_configuration_file_only(verb: str, body: object) -> None:
    refused = handled(serving(), "ops", verb, body, config=FROZEN)
    assert refused.code == "registry_frozen"
    assert refused.hint
    assert len(handled(serving(), "ops", verb, body, config=FROZEN, actor="config")) == 1


#: Codes that no command from outside can meet alone; their own tests provoke them.
INSIDE = {"revision_stale", "weights_off", "out_of_turn", "instance_draining", "registry_frozen"}


def test_every_code_that_the_core_can_give_is_provoked() -> None:
    codes = {
        str(node.args[0].value)
        for path in CORE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Rejected"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert codes - {r[0] for r in REFUSALS} <= INSIDE
    assert {r[0] for r in REFUSALS} <= codes | {"switch_ended"}
    tests = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    assert all(f'"{code}"' in tests for code in codes)


def test_a_version_without_a_place_may_be_asked_for_where_something_idle_makes_room() -> None:
    story = serving("v1", "v2", "v3", capacity=2).instance("i2", "v2")
    assert len(handled(story, "ops", "switch.start", StartSwitch("chat", "v3"))) == 2


def test_a_model_is_served_on_demand_and_asked_for() -> None:
    story = registered("v1", "v2")
    serve = model.SetServing("chat", Serving(on_demand=True), "v2")
    assert [type(e) for e in handled(story, "ops", "model.serving", serve)] == [ServingChanged, ActiveVersionChanged]
    story.happens(ServingChanged("chat", Serving(on_demand=True)), ActiveVersionChanged("chat", "v2", "", ""))
    assert handled(story, "gw", "model.wake", WakeModel("chat", "g1")) == [DemandSeen("chat", "v2", "g1", story.now)]


def test_a_switch_of_a_model_at_zero_has_no_source_to_keep_loaded() -> None:
    story = registered("v1", "v2")
    story.happens(ServingChanged("chat", Serving(on_demand=True)), ActiveVersionChanged("chat", "v1", "", ""))
    _, asked = handled(story, "ops", "switch.start", StartSwitch("chat", "v2"))
    assert isinstance(asked, SwitchRequested)
    assert asked.source == ""
