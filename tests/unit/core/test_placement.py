"""Where a version goes, by its memory: what fits, what would have to go, what is refused, with the numbers."""

from __future__ import annotations

from tests.unit.core.story import Story, registered

from turnout.core import instance, memory
from turnout.core.config import CACHE, ModelSwitchingConfig
from turnout.core.decider import Rejected
from turnout.core.holdings import holdings
from turnout.core.memory import FAKE_BYTES, Need, estimate
from turnout.core.placement import Ledger
from turnout.core.sagas import placement
from turnout.events.instance import (
    InstanceDraining,
    InstanceMeasured,
    InstanceReady,
    InstanceRequested,
    InstanceStopped,
)
from turnout.events.model import (
    ActiveVersionChanged,
    EngineSpec,
    EvictionRequested,
    Inspection,
    ModelRegistered,
    PreloadEnded,
    PreloadRequested,
    ReplicasChanged,
    VersionPinned,
    VersionRegistered,
    VersionUnpinned,
    VersionValidated,
)
from turnout.events.route import Endpoint, RouteChanged, Split
from turnout.events.switch import TargetReady
from turnout.events.worker import WorkerJoined

MIB = 1 << 20


def spec(mib: int) -> EngineSpec:
    return EngineSpec("fake", args=(f"--memory={mib}",))


def story(*workers: WorkerJoined, **mib: int) -> Story:
    """Versions that need so many MiB besides the fake engine's own; ``a`` is active on i1, the others not loaded."""
    made = registered()
    made.happens(*(workers or (joined("w1", 1000),)))
    made.happens(*(VersionRegistered("chat", name, spec(size), "") for name, size in mib.items()))
    return made


def joined(worker: str, mib: int, capacity: int = 8, domain: str = "") -> WorkerJoined:
    return WorkerJoined(worker, f"host of {worker}", ("fake",), ("cpu",), capacity, mib * MIB, {}, domain)


def loaded(made: Story, instance: str, version: str, mib: int, worker: str = "w1") -> Story:
    """An instance that was admitted and measured with so many MiB."""
    made.happens(InstanceRequested(instance, "chat", version, worker, spec(0), "sw-0", 1, mib * MIB))
    return made.happens(InstanceReady(instance, f"unix:/run/{instance}", 1.0, 0.1, mib * MIB, ""))


def serving(made: Story, version: str, *instances: str) -> Story:
    split = Split(version, 100.0, tuple(Endpoint(i, f"unix:/run/{i}") for i in instances))
    made.happens(RouteChanged("chat", made.world.state("route", "chat").revision + 1, (split,), "s", 1.0, "x"))
    return made.happens(ActiveVersionChanged("chat", version, "", "sw-0")).applied()


def drained(events: list[object]) -> list[InstanceDraining]:
    return [e for e in events if isinstance(e, InstanceDraining)]


def requested(events: list[object]) -> list[InstanceRequested]:
    return [e for e in events if isinstance(e, InstanceRequested)]


# --- the estimate ------------------------------------------------------------------------------------------------


def test_before_the_first_load_the_settings_tell_the_size() -> None:
    assert estimate(story(a=300).world, "chat", "a", "w1") == Need(FAKE_BYTES + 300 * MIB, 0, "its --memory")


def test_what_was_measured_on_the_worker_beats_what_the_settings_say() -> None:
    made = loaded(story(a=300), "i1", "a", 350)
    assert estimate(made.world, "chat", "a", "w1") == Need(350 * MIB, 0, "measured on w1")
    elsewhere = estimate(made.world, "chat", "a", "w2")
    assert elsewhere.bytes == FAKE_BYTES + 300 * MIB


def test_a_version_with_the_same_settings_corrects_the_estimate() -> None:
    made = story(a=300)
    made.happens(VersionRegistered("chat", "b", spec(300), ""))
    loaded(made, "i1", "a", 400)
    need = estimate(made.world, "chat", "b", "w1")
    assert need == Need(400 * MIB, 0, "measured on w1 for a, which has the same settings")


def about(mib: int, architecture: str = "LlamaForCausalLM", kv: int = 100) -> Inspection:
    return Inspection(
        f"d{mib}", weight_bytes=mib * MIB, kv_bytes=kv * MIB, host_bytes=mib * MIB, architecture=architecture
    )


def looked_at(made: Story, version: str, told: Inspection, *args: str, model: str = "chat") -> Story:
    made.happens(VersionRegistered(model, version, EngineSpec("vllm", path=f"/{version}", args=args), ""))
    return made.happens(VersionValidated(model, version, "w1", told))


def test_what_was_measured_corrects_versions_of_the_same_architecture_by_the_ratio_it_was_wrong_by() -> None:
    made = loaded(looked_at(story(), "a", about(400)), "i1", "a", 500)
    looked_at(made, "b", about(800), "--max-model-len=512")
    need = estimate(made.world, "chat", "b", "w1")
    assert need == Need(1000 * MIB, 0, "measured on w1 for a, which has the same architecture")
    looked_at(made.happens(ModelRegistered("other")), "v1", about(200), model="other")
    elsewhere = estimate(made.world, "other", "v1", "w1")
    assert elsewhere == Need(250 * MIB, 0, "measured on w1 for chat a, which has the same settings")
    looked_at(made, "c", about(800, "Qwen3ForCausalLM"))
    assert estimate(made.world, "chat", "c", "w1").source == "estimated from its files", "another architecture"


def test_a_second_load_uses_what_the_first_was_measured_at() -> None:
    made = loaded(looked_at(story(), "a", about(400)), "i1", "a", 500)
    made.happens(InstanceStopped("i1", 0.1))
    assert estimate(made.world, "chat", "a", "w1") == Need(500 * MIB, 0, "measured on w1")


def test_on_a_device_weights_and_cache_are_charged_or_the_share_that_an_engine_takes() -> None:
    devices = {"cuda:0": 20_000 * MIB}
    made = story(WorkerJoined("w1", "h", ("vllm",), ("cuda:0",), 8, 9000 * MIB, devices))
    looked_at(looked_at(made, "a", about(4000)), "b", about(4000, kv=0))
    looked_at(made, "c", about(4000, kv=0), "--gpu-memory-utilization=0.5")
    assert estimate(made.world, "chat", "a", "w1").device_bytes == 4100 * MIB + memory.DEVICE_BYTES
    assert estimate(made.world, "chat", "b", "w1").device_bytes == 18_000 * MIB
    assert estimate(made.world, "chat", "c", "w1").device_bytes == 10_000 * MIB
    (offer,) = Ledger(made.world, ()).offers("chat", "b")
    assert (offer.device, offer.verdict) == ("cuda:0", "fits")


def test_what_was_admitted_on_a_device_stays_charged_until_it_is_measured() -> None:
    made = story(WorkerJoined("w1", "h", ("fake",), ("cuda:0",), 8, 9000 * MIB, {"cuda:0": 900 * MIB}), a=10)
    made.happens(InstanceRequested("i1", "chat", "a", "w1", spec(10), "sw", 1, MIB, 500 * MIB, "cuda:0"))
    made.happens(InstanceReady("i1", "unix:/1", 1.0, 0.1, MIB, ""))
    assert made.world.instances["i1"].device_bytes == 500 * MIB
    unseen = instance.decide(made.world.instances["i1"], instance.ReportMeasured("i1", 99 * MIB, 0))
    assert unseen == (InstanceMeasured("i1", 99 * MIB, 500 * MIB),)


def test_of_an_engine_that_says_nothing_nothing_is_known_until_it_was_loaded_somewhere() -> None:
    made = story()
    made.happens(VersionRegistered("chat", "o", EngineSpec("openai", command=("serve",)), ""))
    assert not estimate(made.world, "chat", "o", "w1").known
    made.happens(VersionRegistered("chat", "u", EngineSpec("openai", url="http://x"), ""))
    assert estimate(made.world, "chat", "u", "w1") == Need(source="it runs elsewhere")
    assert memory.FAKE_BYTES == FAKE_BYTES


# --- admission ---------------------------------------------------------------------------------------------------


def test_what_is_larger_than_the_memory_is_refused_with_the_numbers_and_nothing_is_unloaded() -> None:
    made = serving(loaded(story(a=300, b=100, huge=5000), "i1", "a", 300), "a", "i1")
    loaded(made, "i2", "b", 100)
    full = placement.no_room(made.world, "chat", "huge")
    assert isinstance(full, Rejected)
    assert full.code == "no_memory"
    assert "needs 4.9 GiB (its --memory), free 600 MiB of 1000 MiB" in full.reason
    assert "100 MiB could be evicted; stays: chat a (i1) 300 MiB, active" in full.reason
    made.asked("huge")
    assert not drained(made.carry_placement())


def test_exactly_what_is_needed_is_evicted_least_recently_used_first() -> None:
    made = serving(loaded(story(a=300, b=200, c=200, d=350), "i1", "a", 300), "a", "i1")
    loaded(made, "i2", "b", 200)
    loaded(made.later(5.0), "i3", "c", 200)
    made.asked("d")  # needs 372 MiB, 300 are free
    assert made.owes().owed == (), "it waits"
    assert drained(made.carry_placement()) == [InstanceDraining("i2", "makes room for chat d")]
    assert not drained(made.carry_placement()), "what it frees is counted on"
    made.happens(InstanceStopped("i2", 0.1))
    (asked,) = requested(list(made.carry()))
    assert (asked.worker, asked.bytes) == ("w1", FAKE_BYTES + 350 * MIB)


def test_pinned_instances_make_no_room_and_the_refusal_names_them() -> None:
    made = serving(loaded(story(a=300, b=200, d=550), "i1", "a", 300), "a", "i1")
    loaded(made, "i2", "b", 200).happens(VersionPinned("chat", "b"))
    full = placement.no_room(made.world, "chat", "d")
    assert full is not None
    assert "chat b (i2) 200 MiB, pinned" in full.reason
    made.asked("d")
    assert not drained(made.carry_placement(ModelSwitchingConfig(max_cached_models=0)))


def test_what_was_asked_to_be_evicted_leaves_and_what_became_idle_later_stays() -> None:
    made = serving(loaded(story(a=300, b=200, c=100), "i1", "a", 300), "a", "i1")
    loaded(made, "i2", "b", 200)
    made.later(1.0).happens(EvictionRequested("chat", "b", made.now, "room for others"))
    loaded(made.later(1.0), "i3", "c", 100)
    assert drained(made.carry_placement()) == [InstanceDraining("i2", "room for others")]
    assert not drained(made.carry_placement())


def test_what_is_not_bounded_is_limited_by_places_alone() -> None:
    made = story(joined("w1", 0, capacity=1), a=9999)
    assert placement.no_room(made.world, "chat", "a") is None


def test_a_lowered_bound_lets_idle_instances_go_but_not_what_is_pinned() -> None:
    made = serving(loaded(story(a=300, b=200, c=200), "i1", "a", 300), "a", "i1")
    loaded(loaded(made, "i2", "b", 200), "i3", "c", 200).happens(VersionPinned("chat", "b"))
    made.happens(joined("w1", 400))
    assert drained(made.carry_placement()) == [InstanceDraining("i3", "w1 holds more than its memory")]


def test_a_bound_below_what_is_pinned_and_used_lets_nothing_of_that_go_and_refuses_the_next_load() -> None:
    made = serving(loaded(story(a=300, b=200, c=10), "i1", "a", 300), "a", "i1")
    loaded(made, "i2", "b", 200).happens(VersionPinned("chat", "b")).happens(joined("w1", 100))
    assert not drained(made.carry_placement())
    full = placement.no_room(made.world, "chat", "c")
    assert full is not None
    assert full.code == "no_memory"
    assert "chat b (i2) 200 MiB, pinned" in full.reason
    made.happens(VersionUnpinned("chat", "b"))
    assert drained(made.carry_placement()) == [InstanceDraining("i2", "w1 holds more than its memory")]


def test_a_limit_below_what_is_pinned_keeps_the_pinned_ones_alone_and_wishes_are_told_so() -> None:
    made = serving(loaded(story(a=10, b=10, c=10, d=10, e=10), "i1", "a", 10), "a", "i1")
    loaded(loaded(loaded(made, "i2", "b", 10), "i3", "c", 10), "i4", "d", 10)
    made.happens(VersionPinned("chat", "b"), VersionPinned("chat", "c"))
    one = ModelSwitchingConfig(max_cached_models=1)
    (gone,) = drained(made.carry_placement(one))
    assert (gone.instance, gone.reason) == ("i4", "least recently used of more than 1 (max_cached_models)")
    made.happens(InstanceStopped("i4", 0.1), PreloadRequested("chat", "e", 0, made.now))
    assert made.carry_placement(one) == [], "it waits: nothing that is pinned makes room"
    (waits,) = holdings(made.world, one, CACHE).waiting
    assert "keeps 2 idle instances, 2 of them pinned (max_cached_models)" in waits.waits_for


def test_where_everything_is_pinned_a_load_is_refused_and_the_hint_says_unpin() -> None:
    made = serving(loaded(story(joined("w1", 0, capacity=2), a=10, b=10, c=10), "i1", "a", 10), "a", "i1")
    loaded(made, "i2", "b", 10).happens(VersionPinned("chat", "a"), VersionPinned("chat", "b"))
    full = placement.no_room(made.world, "chat", "c")
    assert full is not None
    assert (full.code, "turnout unpin" in full.hint) == ("no_capacity", True)
    assert "chat b (i2) 10 MiB, pinned" in full.reason


def test_three_wishes_of_which_only_one_fits_settle_and_the_others_say_what_they_wait_for() -> None:
    made = story(joined("w1", 300), a=200, b=200, c=200)
    made.happens(*(PreloadRequested("chat", v, n, made.now) for n, v in enumerate(("a", "b", "c"))))
    for _ in range(9):
        for event in made.carry_placement():
            if isinstance(event, InstanceRequested):
                loaded_event = InstanceReady(event.instance, f"unix:/{event.instance}", 1.0, 0.1, 222 * MIB, "")
                made.happens(loaded_event)
    here = {made.world.instances[id].version for id in made.world.alive}
    assert here == {"c"}, "the highest priority, and nothing goes round"
    waiting = holdings(made.world, ModelSwitchingConfig(), CACHE).waiting
    assert {one.version for one in waiting} == {"a", "b"}
    assert all("free 78 MiB of 300 MiB" in one.waits_for for one in waiting)


# --- where -------------------------------------------------------------------------------------------------------


def test_the_worker_that_has_room_is_taken_before_one_that_would_have_to_evict() -> None:
    made = serving(loaded(story(joined("w1", 400), joined("w2", 400), a=100, b=200, c=200), "i1", "a", 100), "a", "i1")
    loaded(made, "i2", "b", 200)
    first, second = Ledger(made.world, placement.evictable(made.world)).offers("chat", "c")
    assert (first.worker, first.verdict) == ("w2", "fits")
    assert (second.worker, second.verdict, second.evict) == ("w1", "evicts", ("i2",))


def test_replicas_are_spread_over_failure_domains_first_and_all_of_them_make_the_target_ready() -> None:
    workers = (joined("w1", 900, domain="left"), joined("w2", 900, domain="left"), joined("w3", 900, domain="right"))
    made = story(*workers, a=100).happens(ReplicasChanged("chat", "a", 2)).asked("a", source="")
    asked = requested(list(made.carry()))
    assert [one.worker for one in asked] == ["w1", "w3"]
    made.ready("i1")
    assert made.owes().owed == (), "one of two is not ready"
    made.ready("i2")
    events = made.carry()
    assert next(e for e in events if isinstance(e, TargetReady)).instances == ("i1", "i2")


def test_replicas_that_do_not_all_fit_are_refused_with_how_many_would() -> None:
    made = story(joined("w1", 300), a=100).happens(ReplicasChanged("chat", "a", 3))
    full = placement.no_room(made.world, "chat", "a")
    assert full is not None
    assert "(2 of 3 instances would fit)" in full.reason


def test_a_replica_that_is_gone_is_placed_again() -> None:
    made = story(joined("w1", 900), joined("w2", 900), a=100).happens(ReplicasChanged("chat", "a", 2))
    serving(loaded(loaded(made, "i1", "a", 100), "i2", "a", 100, "w2"), "a", "i1", "i2")
    assert not requested(made.carry_placement())
    made.happens(InstanceStopped("i2", 0.1))
    assert [one.worker for one in requested(made.carry_placement())] == ["w2"]


# --- preload -----------------------------------------------------------------------------------------------------


def test_a_wish_is_loaded_where_there_is_room_and_then_over() -> None:
    made = story(a=100)
    made.happens(PreloadRequested("chat", "a", 0, made.now))
    (asked,) = requested(made.carry_placement())
    assert (asked.cause, asked.priority) == ("preload", 0)
    assert not drained(made.carry_placement()), "it is wanted although nobody switches to it"
    made.ready("i1")
    assert made.carry_placement() == [PreloadEnded("chat", "a", "ready")]


def test_wishes_that_contradict_each_other_never_unload_each_other() -> None:
    made = story(joined("w1", 300), a=200, b=200)
    made.happens(PreloadRequested("chat", "a", 3, made.now), PreloadRequested("chat", "b", 3, made.now))
    assert [one.version for one in requested(made.carry_placement())] == ["a"]
    made.ready("i1")
    made.carry_placement()
    for _ in range(5):
        assert made.carry_placement() == [], "b waits for room that a gives by itself"


def test_a_higher_wish_makes_room_at_the_cost_of_a_lower_one() -> None:
    made = story(joined("w1", 300), a=200, b=200)
    made.happens(PreloadRequested("chat", "a", 3, made.now))
    made.carry_placement()
    loaded(made, "i1", "a", 220)
    made.carry_placement()
    made.happens(PreloadRequested("chat", "b", 4, made.now))
    assert drained(made.carry_placement()) == [InstanceDraining("i1", "makes room to preload chat b")]


def test_a_wish_never_pushes_out_what_the_cache_is_full_of() -> None:
    made = serving(loaded(story(a=100, b=100, c=100), "i1", "a", 100), "a", "i1")
    loaded(made, "i2", "b", 100)
    made.happens(PreloadRequested("chat", "c", 0, made.now))
    assert made.carry_placement(ModelSwitchingConfig(max_cached_models=1)) == []
    assert len(requested(made.carry_placement(ModelSwitchingConfig(max_cached_models=2)))) == 1
    assert CACHE.policy == "lru"


# --- in the place of another -------------------------------------------------------------------------------------


def test_a_target_takes_the_sources_memory_only_where_there_is_no_other_and_that_is_enough() -> None:
    made = serving(loaded(story(a=600, b=100, c=500, d=1000), "i1", "a", 600), "a", "i1")
    assert not placement.must_swap(made.world, "chat", "a", "b"), "both have room"
    assert placement.must_swap(made.world, "chat", "a", "c")
    assert not placement.must_swap(made.world, "chat", "a", "d"), "it is larger than the memory"
    loaded(made, "i2", "b", 300)
    assert placement.must_swap(made.world, "chat", "a", "c"), "what is idle is not enough"
    made.happens(VersionPinned("chat", "a"))
    assert not placement.must_swap(made.world, "chat", "a", "c"), "it is pinned"
