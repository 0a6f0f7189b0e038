"""The world remembers what is live and what may be asked again, not all that ever was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.unit.core.story import FAKE, serving

from turnout.core import world as module
from turnout.events import subjects
from turnout.events.alert import AlertRaised, AlertResolved
from turnout.events.codec import Context, decode, record
from turnout.events.envelope import START
from turnout.events.gateway import GatewayJoined, GatewayLeft, GatewayLost
from turnout.events.instance import InstanceFailed, InstanceReady, InstanceRequested, InstanceStopped
from turnout.events.model import SwitchAdmitted, SwitchClosed, VersionDeregistered
from turnout.events.switch import SwitchAborted, SwitchRequested
from turnout.events.worker import WorkerJoined, WorkerLeft

if TYPE_CHECKING:
    from datetime import datetime

    from turnout.core.testing import WorldBuilder
    from turnout.core.world import World
    from turnout.events.envelope import Recorded


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten are remembered, twenty at most."""
    monkeypatch.setattr(module, "OVER_MOST", 10)
    monkeypatch.setattr(module, "COMMANDS_MOST", 10)
    monkeypatch.setattr(module, "LOST_MOST", 5)


def ended_switches(story: WorldBuilder, first: int, count: int) -> None:
    for n in range(first, first + count):
        id = f"sw-{n}"
        asked = SwitchRequested(id, "chat", "v2", "v1", "immediate", {}, False, "", story.now, 0.0, 1.0, story.now)
        closed = SwitchClosed("chat", id, "aborted")
        story.happens(SwitchAdmitted("chat", id, "v2"), asked, closed, SwitchAborted(id, "no"), after_s=0.0)


def written(world: World, subject: str, event: object, command: str, actor: str, at: datetime) -> Recorded:
    """One event as it is stored next."""
    position = world.position(subject)
    name, envelope, body = record(subject, event, Context(command, actor, "", "", at), 0, position)
    return decode(subject, world.sequence + 1, name, envelope, body)


def test_what_is_over_is_forgotten_after_enough_others_and_what_lives_is_not() -> None:
    story = serving()
    for n in range(100):
        story.happens(
            InstanceRequested(f"x{n}", "chat", "v2", "w1", FAKE, "restore"),
            InstanceReady(f"x{n}", "unix:/x", 1.0, 0.1, 1, ""),
            InstanceStopped(f"x{n}", 0.1),
            GatewayJoined(f"g-left-{n}", "http://g"),
            GatewayLeft(f"g-left-{n}"),
            GatewayJoined(f"g-lost-{n}", "http://g"),
            GatewayLost(f"g-lost-{n}", 7.0),
            WorkerJoined(f"w-left-{n}", "h", ("fake",), (), 1),
            WorkerLeft(f"w-left-{n}"),
            AlertRaised(f"gateway_lost.g-lost-{n}", "warning", "gateway_lost", "silent", "start it"),
            AlertResolved(f"gateway_lost.g-lost-{n}", "it is back"),
        )
        ended_switches(story, n, 1)
    world = story.world
    for known in (world.instances, world.switches, world.gateways, world.workers, world.alerts, world.raisings):
        assert len(known) <= 20 + module.LOST_MOST + 3, known.keys()
    assert set(world.lost) <= {("gateway", id) for id in world.gateways}
    assert {"g1", "g2"} <= world.gateways.keys()
    assert "w1" in world.workers
    assert "i1" in world.alive
    assert world.requested_instances == 101
    assert world.ended["chat"].subject == subjects.event("switch", "sw-99")
    assert world.switches["sw-99"].phase == "aborted"


def test_a_failed_load_of_a_version_is_forgotten_with_the_version() -> None:
    story = serving()
    story.happens(InstanceRequested("x", "chat", "v2", "w1", FAKE, "restore"), InstanceFailed("x", "loading", "no"))
    assert ("chat", "v2") in story.world.failures
    story.happens(VersionDeregistered("chat", "v2"))
    assert ("chat", "v2") not in story.world.failures


def test_what_was_forgotten_is_taken_back_from_its_history_without_counting_it_again() -> None:
    story = serving()
    subject = subjects.event("gateway", "g9")
    history: list[Recorded] = []
    for event in (GatewayJoined("g9", "http://g9"), GatewayLeft("g9")):
        history.append(written(story.world, subject, event, f"c{len(history)}", "gw:g9", story.now))
        story.world.apply(history[-1])
    ended_switches(story, 0, 40)
    world = story.world
    assert world.position(subject) == START
    count, newest, live = world.requested_instances, world.ended["chat"], set(world.live_gateways)
    # when somebody writes to it, meets a conflict and reads it again
    world.reread(tuple(history), world.sequence)
    assert world.position(subject) == history[-1].position
    assert world.gateways["g9"].left
    assert (world.requested_instances, world.ended["chat"], world.live_gateways) == (count, newest, live)
    # and what comes behind it is counted as ever
    again = written(world, subject, GatewayJoined("g9", "http://g9"), "c-again", "gw:g9", story.now)
    world.reread((*history, again), world.sequence)
    assert "g9" in world.live_gateways


def test_an_unknown_subject_that_the_tail_has_not_brought_yet_is_counted() -> None:
    story = serving()
    subject = subjects.event("gateway", "g9")
    joined = written(story.world, subject, GatewayJoined("g9", "http://g9"), "c1", "gw:g9", story.now)
    story.world.reread((joined,), story.world.sequence)
    assert "g9" in story.world.live_gateways


def test_an_operators_command_is_remembered_for_ever_and_others_for_a_while() -> None:
    story = serving()
    world = story.world
    for n in range(100):
        for actor in ("ops:alice", "controller"):
            event = SwitchAdmitted("chat", f"s{n}", "v2")
            subject = subjects.event("model", "chat")
            world.apply(written(world, subject, event, f"{actor}-{n}", actor, story.now))
    assert all(world.done(f"ops:alice-{n}") for n in range(100))
    remembered = [n for n in range(100) if world.done(f"controller-{n}")]
    assert remembered == list(range(remembered[0], 100))
    assert 10 <= len(remembered) <= 20
