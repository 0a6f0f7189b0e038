"""What gateways, workers and people read, folded from a story."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turnout.core.testing import WorldBuilder
from turnout.events.gateway import GatewayJoined, GatewayLeft, GatewayLost, RouteApplied
from turnout.events.instance import (
    InstanceDraining,
    InstanceFailed,
    InstanceLoading,
    InstanceReady,
    InstanceRequested,
    InstanceStopped,
    TierFailed,
)
from turnout.events.model import (
    ActiveVersionChanged,
    EngineSpec,
    Inspection,
    KnownGoodMarked,
    KnownGoodRevoked,
    ModelRegistered,
    SwitchAdmitted,
    SwitchClosed,
    VersionDeregistered,
    VersionRegistered,
    VersionRejected,
    VersionUnseen,
    VersionValidated,
)
from turnout.events.route import Endpoint, RouteChanged, Split
from turnout.events.switch import SwitchAborted, SwitchFailed, SwitchPaused, SwitchPromoted, SwitchRequested
from turnout.events.worker import WorkerJoined, WorkerLeft, WorkerLost
from turnout.projections.fleet import GONE_MOST
from turnout.projections.routing import LEFT_MOST, RouteView
from turnout.projections.switches import ENDED_MOST
from turnout.projections.views import Views

if TYPE_CHECKING:
    from turnout.projections.registry import VersionView

FAKE = EngineSpec("fake")


def folded(*events: object) -> Views:
    builder = WorldBuilder()
    for event in events:
        builder.happens(event)
    views = Views()
    for one in builder.log:
        views.apply(one)
    return views


def route(revision: int, *versions: str) -> RouteChanged:
    share = 100.0 / len(versions) if versions else 0.0
    splits = tuple(Split(v, share, (Endpoint(f"i-{v}", f"unix:/{v}"),)) for v in versions)
    return RouteChanged("chat", revision, splits, "s", 60.0, "x")


def test_the_registry_tells_what_is_there_what_serves_and_what_runs() -> None:
    views = folded(
        ModelRegistered("chat"),
        VersionRegistered("chat", "v1", FAKE, "d1", "first"),
        VersionRegistered("chat", "v2", FAKE, "d2"),
        SwitchAdmitted("chat", "sw-1", "v1"),
        ActiveVersionChanged("chat", "v1", "", "sw-1"),
        KnownGoodMarked("chat", "v1", "sw-1"),
        SwitchClosed("chat", "sw-1", "completed"),
        SwitchAdmitted("chat", "sw-2", "v2"),
    )
    model = views.registry.models["chat"]
    assert list(model.versions) == ["v1", "v2"]
    assert (model.versions["v1"].note, model.versions["v1"].registered_by) == ("first", "test")
    assert (model.active, model.known_good, model.switch) == ("v1", ("v1",), "sw-2")
    assert (model.last_switch, model.last_outcome) == ("sw-1", "completed")


FILES = EngineSpec("fake", path="/models/chat-v3")
WITH_FILES = (ModelRegistered("chat"), VersionRegistered("chat", "v3", FILES, "d3", "", ("tickets",), {"f1": 0.7}))
SEEN = Inspection("c0ffee", weight_bytes=2000, tensors=2)


def test_the_registry_tells_what_a_versions_files_say_or_why_they_can_not_be_served() -> None:
    def version(*events: object) -> VersionView:
        return folded(*WITH_FILES, *events).registry.models["chat"].versions["v3"]

    assert (version().state, version().tags, version().metrics) == ("checking", ("tickets",), {"f1": 0.7})
    seen = version(VersionValidated("chat", "v3", "w1", SEEN))
    assert (seen.state, seen.inspection, seen.checked_by) == ("validated", SEEN, "w1")
    refused = VersionRejected("chat", "v3", "w1", "path_missing", "nothing is there", "copy it there")
    bad = version(refused)
    assert (bad.state, bad.code, bad.hint) == ("rejected", "path_missing", "copy it there")
    overruled = version(refused, VersionValidated("chat", "v3", "w2", SEEN))
    assert (overruled.state, overruled.reason) == ("validated", "")


def test_workers_that_may_run_it_are_shown_a_version_until_one_has_looked_at_its_files() -> None:
    w1, w2 = WorkerJoined("w1", "h", ("fake",), (), 2), WorkerJoined("w2", "h", ("fake",), (), 2)
    other = WorkerJoined("w3", "h", ("vllm",), (), 2)

    def shown(*events: object) -> list[str]:
        workers = folded(w1, *WITH_FILES, w2, other, *events).workers.workers
        return [id for id, view in workers.items() if "chat@v3" in view.inspect]

    assert shown() == ["w1", "w2"]
    assert shown(VersionUnseen("chat", "v3", "w1", "path_missing", "")) == ["w2"]
    assert shown(VersionValidated("chat", "v3", "w1", SEEN)) == []
    assert shown(VersionRejected("chat", "v3", "w1", "x", "y")) == []
    assert shown(VersionDeregistered("chat", "v3")) == []
    assert shown(VersionRejected("chat", "v3", "w1", "x", "y"), *WITH_FILES) == ["w1", "w2"]


def test_a_worker_that_joins_later_is_shown_what_was_rejected_because_nobody_saw_its_files() -> None:
    w1, w2 = WorkerJoined("w1", "h", ("fake",), (), 2), WorkerJoined("w2", "h", ("fake",), (), 2)
    unseen = VersionRejected("chat", "v3", "w1", "path_missing", "nothing is there")

    def shown(*events: object) -> list[str]:
        workers = folded(w1, *WITH_FILES, *events).workers.workers
        return [id for id, view in workers.items() if "chat@v3" in view.inspect]

    assert shown(unseen) == []
    assert shown(unseen, w2) == ["w2"]
    assert shown(unseen, w2, w1) == ["w1", "w2"], "it comes back, and its disk may have been mounted"
    assert shown(unseen, w2, VersionValidated("chat", "v3", "w2", SEEN)) == []
    assert shown(VersionRejected("chat", "v3", "w1", "weights_truncated", "x"), w2) == [], "others would find the same"
    assert shown(unseen, VersionDeregistered("chat", "v3"), w2) == []


def test_an_instance_comes_with_what_its_versions_files_said() -> None:
    asked = InstanceRequested("i1", "chat", "v3", "w1", FILES, "sw-1")
    views = folded(*WITH_FILES, VersionValidated("chat", "v3", "w1", SEEN), asked)
    assert views.workers.workers["w1"].instances["i1"].inspection == SEEN
    assert folded(*WITH_FILES, asked).workers.workers["w1"].instances["i1"].inspection is None


def test_the_registry_tells_how_often_a_version_was_loaded_and_how_long_the_newest_load_took() -> None:
    registered = (ModelRegistered("chat"), VersionRegistered("chat", "v1", FAKE, "d1"))
    first = (InstanceRequested("i1", "chat", "v1", "w1", FAKE, "sw-1"), InstanceReady("i1", "unix:/1", 2.0, 0.1, 5, ""))
    second = (InstanceRequested("i2", "chat", "v1", "w1", FAKE, "x"), InstanceReady("i2", "unix:/2", 1.0, 0.1, 6, ""))
    one = folded(*registered, *first, InstanceStopped("i1", 1.0), *second).registry.models["chat"].versions["v1"]
    assert (one.loads, one.load_s, one.bytes) == (2, 1.0, 6)


def test_a_deregistered_or_undone_version_is_not_known_good_any_more() -> None:
    marked = (KnownGoodMarked("chat", "v1", "a"), KnownGoodMarked("chat", "v2", "b"))
    assert folded(*marked, VersionDeregistered("chat", "v1")).registry.models["chat"].known_good == ("v2",)
    assert folded(*marked, KnownGoodRevoked("chat", "v2", "c")).registry.models["chat"].known_good == ("v1",)


def test_a_registered_model_has_a_route_before_anything_serves_it() -> None:
    assert folded(ModelRegistered("chat")).routing.routes["chat"] == RouteView("chat")


def test_a_route_tells_which_versions_have_left_with_which_revision() -> None:
    views = folded(route(1, "v1"), route(2, "v1", "v2"), route(3, "v2"), route(4, "v3"))
    assert views.routing.routes["chat"].left == {"v1": 3, "v2": 4}
    views = folded(route(1, "v1"), route(2, "v2"), route(3, "v1"))
    assert views.routing.routes["chat"].left == {"v2": 3}


def test_a_route_remembers_only_the_newest_that_have_left() -> None:
    views = folded(*(route(n, f"v{n}") for n in range(1, LEFT_MOST + 10)))
    left = views.routing.routes["chat"].left
    assert len(left) == LEFT_MOST
    assert "v1" not in left
    assert f"v{LEFT_MOST + 8}" in left


def test_a_worker_is_told_what_it_shall_run_until_it_has_ended() -> None:
    joined = WorkerJoined("w1", "h", ("fake",), ("cpu",), 2)
    asked = InstanceRequested("i1", "chat", "v1", "w1", FAKE, "sw-1")
    worker = folded(joined, asked, InstanceLoading("i1", "warming", 1.0, "50 %")).workers.workers["w1"]
    assert (worker.instances["i1"].phase, worker.instances["i1"].stage, worker.instances["i1"].detail) == (
        "loading",
        "warming",
        "50 %",
    )
    ready = (joined, asked, InstanceReady("i1", "unix:/1", 2.0, 0.1, 5, ""))
    one = folded(*ready).workers.workers["w1"].instances["i1"]
    assert (one.phase, one.address, one.load_s, one.bytes) == ("ready", "unix:/1", 2.0, 5)
    one = folded(*ready, InstanceDraining("i1", "idle", "bob")).workers.workers["w1"].instances["i1"]
    assert (one.phase, one.reason, one.forced_by) == ("draining", "idle", "bob")
    for end in (InstanceStopped("i1", 1.0), InstanceFailed("i1", "serving", "x")):
        assert folded(*ready, end).workers.workers["w1"].instances == {}


def test_a_worker_is_told_which_ways_have_failed_for_a_version_until_it_is_registered_anew() -> None:
    views = folded(
        WorkerJoined("w1", "h", ("fake",), ("cpu",), 2),
        InstanceRequested("i1", "chat", "v2", "w1", FAKE, "s"),
        TierFailed("i1", "spare", "chat v1", "x"),
        TierFailed("i1", "spare", "chat v1", "x"),
        InstanceRequested("i2", "chat", "v2", "w1", FAKE, "s"),
        InstanceRequested("i3", "chat", "v2", "w2", FAKE, "s"),
        InstanceRequested("i4", "chat", "v3", "w1", FAKE, "s"),
        VersionDeregistered("chat", "v2"),
        InstanceRequested("i5", "chat", "v2", "w1", FAKE, "s"),
    )
    workers = views.workers.workers
    struck = {i: one.struck for worker in workers.values() for i, one in worker.instances.items()}
    failed = (("spare", "chat v1"),)
    assert struck == {"i1": failed, "i2": failed, "i3": (), "i4": (), "i5": ()}


def test_workers_and_gateways_come_and_go() -> None:
    joined = WorkerJoined("w1", "h", ("fake",), (), 2)
    assert folded(joined, WorkerLost("w1", 11.0)).workers.workers["w1"].state == "lost"
    assert folded(joined, WorkerLost("w1", 11.0), joined).workers.workers["w1"].state == "live"
    assert folded(joined, WorkerLeft("w1")).workers.workers["w1"].state == "left"
    views = folded(GatewayJoined("g1", "u"), RouteApplied("g1", "chat", 3), RouteApplied("g1", "chat", 2))
    assert views.gateways.gateways["g1"].applied == {"chat": 3}
    assert folded(GatewayJoined("g1", "u"), GatewayLost("g1", 7.0)).gateways.gateways["g1"].state == "lost"


def test_a_failed_switch_says_where_it_stopped_and_what_the_engine_said_last() -> None:
    at = WorldBuilder().now
    asked = SwitchRequested("sw", "chat", "v2", "v1", "immediate", {}, False, "why", at, 60.0, 600.0, at)
    view = folded(asked, SwitchFailed("sw", "loading", "exit 1", ("last words",))).switches.switches["sw"]
    assert (view.phase, view.stage, view.reason, view.log_tail) == ("failed", "loading", "exit 1", ("last words",))
    assert view.ended_at is not None
    assert view.actor == "test"


def test_a_pause_says_why_beside_the_reason_that_the_switch_was_asked_for_with() -> None:
    at = WorldBuilder().now
    asked = SwitchRequested("sw", "chat", "v2", "v1", "canary", {}, False, "hotfix", at, 60.0, 600.0, at)
    paused = SwitchPaused("sw", "inconclusive", "0 of 50 requests", at)
    view = folded(asked, paused).switches.switches["sw"]
    assert (view.reason, view.paused, view.paused_because) == ("hotfix", "inconclusive", "0 of 50 requests")
    view = folded(asked, paused, SwitchPromoted("sw", 0, False, "go", at)).switches.switches["sw"]
    assert (view.reason, view.paused, view.paused_because) == ("hotfix", "", "")


def test_only_what_has_changed_since_a_sequence_is_taken_and_only_once() -> None:
    builder = WorldBuilder().happens(ModelRegistered("chat")).happens(ModelRegistered("embed"))
    views = Views()
    views.apply(builder.log[0])
    views.settle()
    views.apply(builder.log[1])
    views.settle()
    assert set(views.take(1)) == {"model.embed", "route.embed"}
    assert views.take(0) == {}


def test_views_know_which_log_they_are_the_fold_of() -> None:
    builder = WorldBuilder().happens(ModelRegistered("chat")).happens(ModelRegistered("embed"))
    views = Views()
    for one in builder.log:
        views.apply(one)
    assert (views.log, views.sequence) == (builder.log[0].digest, 2)


def test_every_view_is_one_json_object_that_reads_back() -> None:
    views = folded(
        ModelRegistered("a/b c"), GatewayJoined("g1", "u"), WorkerJoined("w1", "h", (), (), 1), route(1, "v1")
    )
    everything = views.everything()
    assert set(everything) == {"model.a=2Fb=20c", "route.a=2Fb=20c", "gateway.g1", "worker.w1", "route.chat"}
    assert all(isinstance(msgspec.json.decode(value), dict) for value in everything.values())


def asked(id: str, model: str) -> SwitchRequested:
    at = WorldBuilder().now
    return SwitchRequested(id, model, "v2", "v1", "immediate", {}, False, "", at, 0.0, 600.0, at)


def test_of_each_model_the_newest_ended_switches_are_kept_and_all_that_run() -> None:
    many = ENDED_MOST + 3
    ended = [one for n in range(many) for one in (asked(f"sw-{n}", "chat"), SwitchAborted(f"sw-{n}", "no"))]
    views = folded(asked("runs", "chat"), asked("other", "vision"), SwitchAborted("other", "no"), *ended)
    kept = {f"sw-{n}" for n in range(3, many)}
    assert set(views.switches.switches) == {"runs", "other", *kept}


def test_the_newest_gateways_that_are_gone_are_kept_and_all_that_live() -> None:
    many = GONE_MOST + 2
    went = [
        one
        for n in range(many)
        for one in (GatewayJoined(f"g{n}", "http://x"), GatewayLeft(f"g{n}") if n % 2 else GatewayLost(f"g{n}", 9.0))
    ]
    views = folded(GatewayJoined("lives", "http://y"), *went)
    assert set(views.gateways.gateways) == {"lives", *(f"g{n}" for n in range(2, many))}
    # a lost one that comes back joins; what it says before that makes it live for nobody
    late = folded(*went, RouteApplied("g0", "chat", 3))
    assert "g0" not in late.gateways.gateways
    back = folded(*went, RouteApplied("g0", "chat", 3), GatewayJoined("g0", "http://x"), RouteApplied("g0", "chat", 4))
    assert (back.gateways.gateways["g0"].state, back.gateways.gateways["g0"].applied) == ("live", {"chat": 4})


def test_invariant_5_what_was_stored_step_by_step_is_what_a_rebuild_stores_also_of_what_is_forgotten() -> None:
    builder = WorldBuilder()
    for n in range(ENDED_MOST + GONE_MOST + 5):
        builder.happens(asked(f"sw-{n}", "chat"), SwitchAborted(f"sw-{n}", "no"))
        builder.happens(GatewayJoined(f"g{n}", "http://x"), GatewayLost(f"g{n}", 9.0))
    views, stored = Views(), dict[str, bytes]()
    for one in builder.log:
        views.apply(one)
        views.settle()
        for key, value in views.take(0).items():
            if value is None:
                stored.pop(key, None)
            else:
                stored[key] = value
    again = Views()
    for one in builder.log:
        again.apply(one)
    assert stored == again.everything()
    assert len(stored) == ENDED_MOST + GONE_MOST
