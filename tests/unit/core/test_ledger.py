"""Complaint 10 of notes/peers.md: memory is reserved before a load, never beyond the bound, and given back after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.core.story import CONFIG, Story

from turnout.core.decider import Rejected
from turnout.core.handling import VERBS, Context, Defaults, EvictVersion, PreloadVersion, StartSwitch, Told, UndoModel
from turnout.core.residence import PinVersion, SetReplicas, UnpinVersion
from turnout.core.sagas.owed import decide
from turnout.core.world import World
from turnout.events.gateway import GatewayJoined, RouteApplied, VersionDrained
from turnout.events.instance import InstanceFailed, InstanceReady, InstanceRequested, InstanceStopped
from turnout.events.model import EngineSpec, ModelRegistered, VersionRegistered
from turnout.events.switch import SwitchFailed
from turnout.events.worker import WorkerJoined

if TYPE_CHECKING:
    from turnout.core.instance import InstanceState

#: Host memory of each worker for its engines, bytes.
WORKERS = {"w1": 400 << 20, "w2": 250 << 20}
#: MiB that a version holds beside what every engine takes.
SIZES = {"v1": 80, "v2": 80, "v3": 150, "v4": 30, "huge": 900}


def cluster() -> Story:
    """Two workers, two gateways, versions of different size; nothing serves."""
    story = Story()
    for worker, memory in WORKERS.items():
        story.happens(WorkerJoined(worker, worker, ("fake",), (), 8, memory))
    for gateway in ("g1", "g2"):
        story.happens(GatewayJoined(gateway, f"http://{gateway}"))
    story.happens(ModelRegistered("chat"))
    for version, mib in SIZES.items():
        story.happens(VersionRegistered("chat", version, EngineSpec("fake", args=(f"--memory={mib}",)), version))
    return story


def ask(story: Story, verb: str, body: object, command: str) -> bool:
    """Give an operator's command. False where it is refused."""
    planned = VERBS["ops", verb][1](story.world, body, Context(command, "alice", story.now, CONFIG, Defaults()))
    if isinstance(planned, Rejected | Told):
        return False
    decided = decide(story.world, planned)
    if isinstance(decided, Rejected):
        return False
    for events in decided.values():
        story.happens(*events, after_s=0.0)
    return True


def alive(story: Story, *phases: str) -> list[InstanceState]:
    """Instances in one of these phases, oldest first."""
    found = (story.world.instances[id] for id in sorted(story.world.alive, key=lambda id: int(id[1:])))
    return [one for one in found if one.phase in phases]


def settle(story: Story) -> None:
    """Carry out what is owed until nothing is; gateways answer at once."""
    for _ in range(60):
        route = story.world.routes.get("chat")
        if route is not None:
            served = {split.version for split in route.splits}
            for gateway in ("g1", "g2"):
                story.happens(RouteApplied(gateway, "chat", route.revision), after_s=0.0)
                for version in SIZES.keys() - served:
                    story.happens(VersionDrained(gateway, "chat", version, route.revision), after_s=0.0)
        owed = [one for id in sorted(story.world.running) for one in story.owes(id).owed] + list(story.placement().owed)
        if not any(story.carry_out(one) for one in owed[:1]):
            return


def charged(world: World) -> dict[str, int]:
    """Worker → bytes that its instances are charged with."""
    held = dict.fromkeys(WORKERS, 0)
    for id in world.alive:
        one = world.instances[id]
        held[one.worker] += one.bytes
    return held


def never_beyond(story: Story) -> None:
    """Fold the log again and look at every event."""
    world = World()
    for recorded in story.log:
        world.apply(recorded)
        if isinstance(recorded.event, InstanceRequested):
            held = charged(world)
            assert all(held[worker] <= most for worker, most in WORKERS.items()), (recorded.event, held)


KINDS = ("switch", "preload", "pin", "unpin", "evict", "replicas", "undo", "ready", "oom", "die", "stopped", "later")


@settings(max_examples=60, deadline=None)
@given(
    acts=st.lists(
        st.tuples(st.sampled_from(KINDS), st.sampled_from(list(SIZES)), st.integers(1, 3)), min_size=30, max_size=50
    )
)
def test_complaint_10_whatever_is_asked_and_whatever_dies_no_worker_is_charged_beyond_its_memory(
    acts: list[tuple[str, str, int]],
) -> None:
    story = cluster()
    for number, (kind, version, count) in enumerate(acts):
        command = f"c{number}"
        match kind:
            case "switch":
                ask(story, "switch.start", StartSwitch("chat", version, bake_s=0.0), command)
            case "preload":
                ask(story, "version.preload", PreloadVersion("chat", version, count), command)
            case "pin":
                ask(story, "version.pin", PinVersion("chat", version), command)
            case "unpin":
                ask(story, "version.unpin", UnpinVersion("chat", version), command)
            case "evict":
                ask(story, "version.evict", EvictVersion("chat", version), command)
            case "replicas":
                ask(story, "version.replicas", SetReplicas("chat", version, count), command)
            case "undo":
                ask(story, "model.undo", UndoModel("chat"), command)
            case "ready":
                for one in alive(story, "requested", "loading")[:count]:
                    story.happens(InstanceReady(one.instance, f"unix:/{one.instance}", 1.0, 0.1, one.bytes, ""))
            case "oom":
                for one in alive(story, "requested", "loading")[:1]:
                    story.happens(InstanceFailed(one.instance, "loading", "out of memory"))
            case "die":
                for one in alive(story, "ready")[:1]:
                    story.happens(InstanceFailed(one.instance, "serving", "killed"))
            case "stopped":
                for one in alive(story, "draining"):
                    story.happens(InstanceStopped(one.instance, 0.1))
            case _:
                story.later(20.0 * count)
        settle(story)
    never_beyond(story)
    assert not [r for r in story.log if isinstance(r.event, InstanceRequested) and r.event.version == "huge"]


def test_complaint_10_a_load_that_runs_out_of_memory_leaves_everything_as_it_was() -> None:
    story = cluster()
    ask(story, "switch.start", StartSwitch("chat", "v1", bake_s=0.0), "c1")
    settle(story)
    (one,) = alive(story, "requested")
    story.happens(InstanceReady(one.instance, "unix:/i1", 1.0, 0.1, one.bytes, ""))
    settle(story)
    before, route = charged(story.world), story.world.routes["chat"]
    assert story.world.models["chat"].active == "v1"
    # when every try to load v2 runs out of memory
    assert ask(story, "switch.start", StartSwitch("chat", "v2"), "c2")
    settle(story)
    tries = 0
    while story.world.running and tries < 20:
        for loading in alive(story, "requested", "loading"):
            assert sum(charged(story.world).values()) == sum(before.values()) + loading.bytes
            story.happens(InstanceFailed(loading.instance, "loading", "out of memory"))
            tries += 1
        story.later(30.0)
        settle(story)
    # then the switch has failed, nothing is charged for it, and nothing else has moved
    assert [r.event.stage for r in story.log if isinstance(r.event, SwitchFailed)] == ["loading"]
    assert charged(story.world) == before
    assert story.world.routes["chat"] == route
    assert story.world.models["chat"].active == "v1"
    never_beyond(story)
