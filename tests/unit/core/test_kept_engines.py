"""Engines that are no instance's: spares and the bases of adapters count, make room first, and are preferred."""

from __future__ import annotations

import msgspec
from tests.unit.core.story import Story, registered

from turnout.core import worker
from turnout.core.config import CACHE, CacheConfig, ModelSwitchingConfig
from turnout.core.decider import Rejected
from turnout.core.fit import fit
from turnout.core.handling import VERBS, Context, Defaults, PlaceVersion, Placing, StartSpare, StartSwitch
from turnout.core.holdings import holdings
from turnout.core.memory import FAKE_BYTES
from turnout.core.placement import Ledger, Offer
from turnout.core.sagas import placement
from turnout.core.testing import given
from turnout.events.instance import InstanceDraining, InstanceReady, InstanceRequested, InstanceStopped, TierFailed
from turnout.events.model import (
    ActiveVersionChanged,
    EngineSpec,
    Inspection,
    PreloadRequested,
    ReplicasChanged,
    VersionPinned,
    VersionRegistered,
    VersionValidated,
)
from turnout.events.route import Endpoint, RouteChanged, Split
from turnout.events.worker import KeptEngine, SpareReleased, WorkerJoined, WorkerKeeps

MIB = 1 << 20
CONFIG = ModelSwitchingConfig()
OTHER = "another kind"


def spec(mib: int) -> EngineSpec:
    return EngineSpec("fake", args=(f"--memory={mib}",))


def lora(name: str) -> EngineSpec:
    return EngineSpec("fake", path="/base", adapter=f"/adapters/{name}")


ABOUT_LORA = Inspection("d", host_bytes=300 * MIB, adapter_bytes=5 * MIB, base_digest="b")
LORA = fit(lora("x"), ABOUT_LORA)


def joined(name: str, mib: int, *kept: KeptEngine, capacity: int = 8, domain: str = "") -> WorkerJoined:
    return WorkerJoined(name, f"host of {name}", ("fake",), ("cpu",), capacity, mib * MIB, {}, domain, kept)


def spare(mib: int, fits: str = OTHER, name: str = "spare-1", was: str = "") -> KeptEngine:
    return KeptEngine(name, "spare", fits, "chat a", mib * MIB, instance=was)


def base(mib: int, was: str = "", name: str = "base-1") -> KeptEngine:
    return KeptEngine(name, "base", LORA, "/base", mib * MIB, instance=was)


def story(*workers: WorkerJoined, **mib: int) -> Story:
    """Versions of so many MiB beside the fake engine's own."""
    made = registered()
    made.happens(*workers)
    return made.happens(*(VersionRegistered("chat", name, spec(size), "") for name, size in mib.items()))


def with_adapters(made: Story, *names: str) -> Story:
    for name in names:
        made.happens(VersionRegistered("chat", name, lora(name), ""), VersionValidated("chat", name, "w1", ABOUT_LORA))
    return made


def ready(made: Story, instance: str, version: str, mib: int, home: str = "w1", shared: str = "") -> Story:
    made.happens(InstanceRequested(instance, "chat", version, home, spec(0), "sw-0", 1, mib * MIB))
    return made.happens(InstanceReady(instance, f"unix:/{instance}", 1.0, 0.1, mib * MIB, "", base=shared))


def serving(made: Story, version: str, *instances: str) -> Story:
    split = Split(version, 100.0, tuple(Endpoint(i, f"unix:/{i}") for i in instances))
    made.happens(RouteChanged("chat", made.world.state("route", "chat").revision + 1, (split,), "s", 1.0, "x"))
    return made.happens(ActiveVersionChanged("chat", version, "", "sw-0")).applied()


def offers(made: Story, version: str) -> tuple[Offer, ...]:
    return Ledger(made.world, placement.evictable(made.world)).offers("chat", version)


def held(made: Story, name: str = "w1") -> int:
    return Ledger(made.world, ()).held(name).bytes // MIB


def requested(events: list[object]) -> list[InstanceRequested]:
    return [e for e in events if isinstance(e, InstanceRequested)]


def ask(made: Story, verb: str, body: msgspec.Struct, role: str = "ops") -> object:
    _, handler = VERBS[role, verb]
    return handler(made.world, body, Context("c1", "alice", made.now, CONFIG, Defaults()))


# --- the ledger --------------------------------------------------------------------------------------------------


def test_a_spare_takes_memory_and_a_place() -> None:
    made = story(joined("w1", 1000, spare(300)), a=400)
    assert held(made) == 300
    (offer,) = offers(made, "a")
    assert "free 700 MiB of 1000 MiB, 1 of 8 places taken" in offer.why
    assert offer.tier == "cold", "it is of another kind"


def test_an_evicted_engine_is_charged_once_while_it_turns_into_a_spare() -> None:
    made = ready(story(joined("w1", 1000), a=300), "i1", "a", 300)
    made.happens(InstanceDraining("i1", "x"))
    made.happens(WorkerKeeps("w1", (spare(300, was="i1"),)))
    assert held(made) == 300, "its instance is charged until it has stopped"
    made.happens(InstanceStopped("i1", 0.1))
    assert held(made) == 300, "and the spare from then on"
    made.happens(WorkerKeeps("w1", ()))
    assert held(made) == 0


def test_a_spare_that_gets_weights_is_charged_to_the_instance_only() -> None:
    made = story(joined("w1", 500, spare(300, fit(spec(250), None))), a=250)
    made.happens(InstanceRequested("i1", "chat", "a", "w1", spec(250), "sw", bytes=272 * MIB, into="spare-1"))
    assert held(made) == 272
    made.happens(InstanceReady("i1", "unix:/1", 1.0, 0.1, 280 * MIB, ""))
    assert held(made) == 280 + 300, "ready, and the spare is there still: it was not that one"
    made.happens(WorkerKeeps("w1", ()))
    assert held(made) == 280


def test_a_base_is_charged_by_itself_and_adapters_take_no_place() -> None:
    made = with_adapters(story(joined("w1", 1000)), "x", "y")
    made.happens(InstanceRequested("i1", "chat", "x", "w1", lora("x"), "sw", bytes=305 * MIB))
    made.happens(WorkerKeeps("w1", (base(100, was="i1"),)))
    assert (held(made), Ledger(made.world, ()).held("w1").places) == (305, 1), "charged to the one that starts it"
    made.happens(WorkerKeeps("w1", (base(290, was="i1"),)))
    made.happens(InstanceReady("i1", "unix:/1", 1.0, 0.1, 5 * MIB, "", base="base-1"))
    ready(made, "i2", "y", 5, shared="base-1")
    assert (held(made), Ledger(made.world, ()).held("w1").places) == (300, 1)
    made.happens(InstanceDraining("i1", "x"), InstanceStopped("i1", 0.1))
    assert held(made) == 295, "the base stays with its last adapter"


def test_on_a_device_an_adapter_holds_nothing_of_its_own_once_its_base_is_charged() -> None:
    made = with_adapters(story(WorkerJoined("w1", "h", ("fake",), ("cuda:0",), 8, 0, {"cuda:0": 900 * MIB})), "x")
    asked = InstanceRequested("i1", "chat", "x", "w1", lora("x"), "sw", 1, 0, 500 * MIB, "cuda:0")
    made.happens(asked)
    shared = KeptEngine("base-1", "base", LORA, "/base", 0, "cuda:0", 480 * MIB, "i1")
    made.happens(WorkerKeeps("w1", (shared,)), InstanceReady("i1", "unix:/1", 1.0, 0.1, 5 * MIB, "", base="base-1"))
    ledger = Ledger(made.world, ())
    assert ledger.lacks("w1", KeptEngine("s", "spare", device="cuda:0", device_bytes=420 * MIB)) == ""
    assert ledger.lacks("w1", KeptEngine("s", "spare", device="cuda:0", device_bytes=421 * MIB))


# --- making room -------------------------------------------------------------------------------------------------


def test_a_spare_is_given_up_before_any_cached_version() -> None:
    made = serving(ready(story(joined("w1", 1000, spare(300)), a=100, b=200, c=550), "i1", "a", 100), "a", "i1")
    ready(made, "i2", "b", 200)
    (offer,) = offers(made, "c")  # needs 572, 400 are free
    assert (offer.verdict, offer.evict, offer.ends) == ("evicts", (), ("spare-1",))
    made.asked("c")
    assert made.owes().owed == ()
    assert made.carry_placement() == [SpareReleased("w1", "spare-1", "makes room for chat c")]
    assert made.carry_placement() == [], "what it frees is counted on"
    made.happens(WorkerKeeps("w1", ()))
    assert [one.version for one in requested(list(made.carry()))] == ["c"]


def test_what_needs_more_than_the_spare_also_evicts_exactly_what_is_missing() -> None:
    made = serving(ready(story(joined("w1", 1000, spare(300)), a=100, b=200, c=800), "i1", "a", 100), "a", "i1")
    ready(made, "i2", "b", 200)
    (offer,) = offers(made, "c")
    assert (offer.verdict, offer.evict, offer.ends) == ("evicts", ("i2",), ("spare-1",))
    made.asked("c")
    left = made.carry_placement()
    assert InstanceDraining("i2", "makes room for chat c") in left
    assert SpareReleased("w1", "spare-1", "makes room for chat c") in left


def test_a_spare_is_given_up_where_a_worker_holds_more_than_it_may() -> None:
    made = serving(ready(story(joined("w1", 1000, spare(300)), a=300, b=300), "i1", "a", 300), "a", "i1")
    ready(made, "i2", "b", 300).happens(joined("w1", 700, spare(300)))
    assert made.carry_placement() == [SpareReleased("w1", "spare-1", "w1 holds more than its memory")]


def test_a_spare_takes_no_part_in_the_cache_limits() -> None:
    made = serving(ready(story(joined("w1", 1000, spare(300)), a=100, b=100), "i1", "a", 100), "a", "i1")
    ready(made, "i2", "b", 100).later(7200.0)
    events = made.carry_placement(ModelSwitchingConfig(max_cached_models=1, model_ttl_seconds=9000))
    assert events == [], "one idle instance is kept, and the spare beside it"


def test_a_preload_takes_the_room_of_a_spare_that_does_not_fit_it() -> None:
    made = story(joined("w1", 500, spare(300)), a=300)
    made.happens(PreloadRequested("chat", "a", 0, made.now))
    assert made.carry_placement() == [SpareReleased("w1", "spare-1", "makes room to preload chat a")]


def test_the_last_idle_adapter_frees_its_base_and_one_of_several_does_not() -> None:
    made = with_adapters(story(joined("w1", 400, base(290)), a=50, b=280), "x", "y")
    serving(ready(made, "i1", "a", 50), "a", "i1")
    ready(made, "i2", "x", 5, shared="base-1")
    (alone,) = offers(made, "b")  # needs 302, 55 are free
    assert (alone.verdict, alone.evict) == ("evicts", ("i2",))
    ready(made.later(1.0), "i3", "y", 5, shared="base-1")
    assert set(offers(made, "b")[0].evict) <= {"i2", "i3"}
    made.asked("b")
    for _ in range(3):
        made.carry_placement()
        for one in ("i2", "i3"):
            if made.world.instances[one].phase == "draining":
                made.happens(InstanceStopped(one, 0.1))
    made.happens(WorkerKeeps("w1", ()))
    assert [one.version for one in requested(list(made.carry()))] == ["b"]
    pinned = with_adapters(story(joined("w1", 400, base(290)), b=280), "x", "y")
    ready(ready(pinned, "i2", "x", 5, shared="base-1"), "i3", "y", 5, shared="base-1").happens(
        VersionPinned("chat", "x")
    )
    assert offers(pinned, "b")[0].verdict == "full", "a pinned adapter keeps its base"


# --- where -------------------------------------------------------------------------------------------------------


def test_the_worker_with_a_fitting_spare_is_taken_and_the_spare_named() -> None:
    fits = fit(spec(250), None)
    made = story(joined("w1", 900), joined("w2", 900, spare(280, fits)), a=250)
    first, second = offers(made, "a")
    assert (first.worker, first.tier, first.into) == ("w2", "spare", "spare-1")
    assert first.why.startswith("takes spare-1, which holds chat a and 280 MiB, needs 272 MiB")
    assert (second.worker, second.tier) == ("w1", "cold")
    made.asked("a", source="")
    (asked,) = requested(list(made.carry()))
    assert (asked.worker, asked.into, asked.bytes) == ("w2", "spare-1", FAKE_BYTES + 250 * MIB)


def test_a_way_that_has_failed_for_the_version_there_is_not_counted_on() -> None:
    made = story(joined("w1", 900, spare(280, fit(spec(250), None))), a=250)
    made.happens(InstanceRequested("i1", "chat", "a", "w1", spec(250), "sw", into="spare-1"))
    made.happens(TierFailed("i1", "spare", "chat a", "a stale head"), InstanceStopped("i1", 0.1))
    assert offers(made, "a")[0].tier == "cold"
    made.happens(WorkerKeeps("w1", (msgspec.structs.replace(spare(280, fit(spec(250), None)), holds="chat b"),)))
    assert offers(made, "a")[0].tier == "spare", "it failed from another source"


def test_a_fitting_spare_needs_no_memory_and_no_place_beside_its_own() -> None:
    made = story(joined("w1", 300, spare(280, fit(spec(250), None)), capacity=1), a=250)
    (offer,) = offers(made, "a")
    assert (offer.verdict, offer.tier) == ("fits", "spare")
    made.asked("a", source="")
    assert [one.into for one in requested(list(made.carry()))] == ["spare-1"]
    assert offers(made, "a")[0].verdict == "full", "it is spoken for"


def test_fit_comes_before_the_tier() -> None:
    made = story(joined("w1", 900), joined("w2", 400, spare(100, fit(spec(350), None))), a=350)
    ready(made, "i9", "b", 150, "w2").happens(VersionRegistered("chat", "b", spec(100), ""))
    first, second = offers(made, "a")
    assert (first.worker, first.verdict, first.tier) == ("w1", "fits", "cold")
    assert (second.worker, second.verdict, second.tier) == ("w2", "evicts", "spare")


def test_an_adapter_goes_to_its_running_base_for_the_bytes_of_its_files() -> None:
    made = with_adapters(story(joined("w1", 900), joined("w2", 320, base(300))), "x", "y")
    ready(made, "i1", "x", 5, "w2", shared="base-1")
    first = offers(made, "y")[0]
    assert (first.worker, first.tier, first.into, first.need.bytes) == ("w2", "adapter", "base-1", 5 * MIB)
    made.asked("y", source="")
    (asked,) = requested(list(made.carry()))
    assert (asked.into, asked.bytes) == ("base-1", 5 * MIB)
    assert offers(made, "x")[0].why.startswith("shares base-1, which holds /base and 300 MiB")


def test_a_base_that_is_leaving_is_offered_to_nobody() -> None:
    made = with_adapters(story(joined("w1", 900, base(300))), "x", "y")
    ready(made, "i1", "x", 5, shared="base-1").happens(InstanceDraining("i1", "x"))
    assert offers(made, "y")[0].tier == "cold"


def test_a_bases_measured_memory_corrects_the_estimate_of_the_next_one() -> None:
    made = with_adapters(story(joined("w1", 900)), "x", "y")
    assert offers(made, "y")[0].need.bytes == FAKE_BYTES
    made.happens(InstanceRequested("i1", "chat", "x", "w1", lora("x"), "sw", bytes=300 * MIB))
    made.happens(WorkerKeeps("w1", (base(7, was="i1"),)), InstanceStopped("i1", 0.1))
    assert offers(made, "y")[0].need.bytes == FAKE_BYTES, "it had only begun to grow"
    made.happens(WorkerKeeps("w1", (base(240),)), WorkerKeeps("w1", ()))
    need = offers(made, "y")[0].need
    assert (need.bytes, need.source) == (245 * MIB, "its base was measured on w1")


def test_replicas_are_spread_although_one_worker_has_two_spares() -> None:
    fits = fit(spec(100), None)
    both = (spare(120, fits, "spare-1"), spare(120, fits, "spare-2"))
    made = story(joined("w1", 900, *both, domain="left"), joined("w2", 900, domain="right"), a=100)
    assert [offer.worker for offer in placement.plan(made.world, Ledger(made.world, ()), "chat", "a", 2)] == ["w1"] * 2
    made.happens(ReplicasChanged("chat", "a", 2)).asked("a", source="")
    asked = requested(list(made.carry()))
    assert [(one.worker, one.into) for one in asked] == [("w1", "spare-1"), ("w2", "")]


# --- what is told ------------------------------------------------------------------------------------------------


def test_the_cache_shows_spares_and_bases_with_their_turn() -> None:
    made = with_adapters(story(joined("w1", 1000, base(300), spare(100)), a=100), "x")
    ready(ready(made, "i1", "x", 5, shared="base-1"), "i2", "a", 100)
    (home,) = holdings(made.world, CONFIG, CacheConfig()).workers
    of_base, of_spare = home.engines
    assert (of_base.role, of_base.why) == ("base", "1 adapter on it: it ends with the last")
    assert (of_spare.role, of_spare.leaves) == ("spare", 1)
    assert sorted(one.leaves for one in home.instances) == [2, 3]
    assert home.bytes == (300 + 100 + 5 + 100) * MIB
    made.happens(SpareReleased("w1", "spare-1", "x"))
    assert holdings(made.world, CONFIG, CacheConfig()).workers[0].engines[1].why == "asked to end"


def test_a_dry_run_names_tier_and_engine() -> None:
    made = story(joined("w1", 900, spare(280, fit(spec(250), None))), a=250)
    placing = ask(made, "version.place", PlaceVersion("chat", "a"))
    assert isinstance(placing, Placing)
    assert (placing.offers[0].tier, placing.offers[0].into) == ("spare", "spare-1")


def test_the_plan_of_a_switch_tells_the_tier_and_what_that_took_before() -> None:
    fits = fit(spec(250), None)
    made = story(joined("w1", 2000), a=250, b=250)
    serving(ready(made, "i1", "a", 250), "a", "i1")
    ready(made, "i2", "b", 250).happens(InstanceDraining("i2", "x"), InstanceStopped("i2", 0.1))
    cold = ask(made, "switch.plan", StartSwitch("chat", "b"))
    assert (getattr(cold, "tier", ""), getattr(cold, "seconds", None)) == ("cold", 1.0)
    made.happens(WorkerKeeps("w1", (spare(280, fits),)))
    by_spare = ask(made, "switch.plan", StartSwitch("chat", "b"))
    assert (getattr(by_spare, "tier", ""), getattr(by_spare, "seconds", 0)) == ("spare", None)


# --- the worker's word -------------------------------------------------------------------------------------------


def test_a_worker_says_what_it_keeps_when_that_is_news_and_a_spare_is_released_once() -> None:
    one, no = spare(300), worker.ReleaseSpare("w1", "base-1", "x")
    keeps = WorkerKeeps("w1", (one, base(100)))
    given(worker, joined("w1", 900)).when(worker.ReportKept("w1", keeps.kept)).then(keeps)
    given(worker, joined("w1", 900), keeps).when(worker.ReportKept("w1", keeps.kept)).then()
    release = worker.ReleaseSpare("w1", "spare-1", "makes room")
    released = SpareReleased("w1", "spare-1", "makes room")
    given(worker, joined("w1", 900), keeps).when(release).then(released)
    given(worker, joined("w1", 900), keeps, released).when(release).then()
    given(worker, joined("w1", 900), keeps).when(no).then()
    given(worker, joined("w1", 900), keeps, released, WorkerKeeps("w1", ())).when(release).then()


def test_a_spare_is_started_ahead_only_where_it_fits_beside_everything() -> None:
    made = serving(ready(story(joined("w1", 500), a=300, b=400), "i1", "a", 300), "a", "i1")
    small, large = StartSpare("w1", spare(150)), StartSpare("w1", spare(250))
    assert isinstance(ask(made, "worker.spare", small, "worker"), tuple)
    refused = ask(made, "worker.spare", large, "worker")
    assert isinstance(refused, Rejected)
    assert (refused.code, refused.reason) == (
        "no_memory",
        "it needs 250 MiB, 200 MiB are free, and 1 of 8 places are taken",
    )
    made.asked("b")
    waits = ask(made, "worker.spare", small, "worker")
    assert isinstance(waits, Rejected), "what is needed goes first"
    assert waits.code == "no_capacity"


def test_versions_fit_the_same_engine_by_settings_and_shape_not_by_name() -> None:
    told = Inspection("one", shape_digest="s", tensors_digest="t")
    with_files = EngineSpec("fake", path="/a")
    assert fit(with_files, told) == fit(EngineSpec("fake", path="/b"), msgspec.structs.replace(told, digest="two"))
    assert fit(with_files, told) != fit(with_files, msgspec.structs.replace(told, tensors_digest="u"))
    assert fit(with_files, told) != fit(EngineSpec("fake", path="/a", args=("--x",)), told)
    assert fit(with_files, None) == "", "nobody has looked at its files"
    assert fit(EngineSpec("openai", url="http://x"), None) == ""
    assert CACHE.policy == "lru"
