"""Requests that wait: models on demand on one place, and a switch that holds; with a controller that dies anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.sim.simulation import Simulation

from turnout.core.model import SetServing
from turnout.events.model import DemandEnded, Serving
from turnout.events.switch import HoldReleased, HoldStarted

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


def of(sim: Simulation, kind: type) -> list[Recorded]:
    return [record for record in sim.net.log.records if isinstance(record.event, kind)]


def _kill_after(sim: Simulation, events: int) -> None:
    """The controller dies when the log has grown by so many events."""
    begin, checked = len(sim.net.log.records), sim.net.log.appended

    def appended(batch: tuple[Recorded, ...]) -> None:
        checked(batch)
        if len(sim.net.log.records) - begin >= events:
            sim.net.log.appended = checked
            sim.processes["c1"].crash()
            sim.loop.call_later(0.5, sim.restart, "c1")

    sim.net.log.appended = appended


def _hold(kill_after: int, *, fails: int = 0, sleeps: int = 0) -> Simulation:
    """v1 makes room for v2 under load, asleep where it ``sleeps``; the controller is killed after some events."""
    sim = Simulation(21, workers=1, capacity=1)

    async def scenario() -> None:
        await sim.ready()
        await sim.register("chat", "v1", sleeps=sleeps)
        await sim.switch("chat", "v1")
        await sim.until(lambda: sim.world.state("model", "chat").active == "v1")
        await sim.register("chat", "v2", load_s=2.0, fails=fails)
        sim.clients("chat", every_s=0.1, longest_s=0.5)
        checked = sim.net.log.appended
        _kill_after(sim, kill_after)
        await sim.switch("chat", "v2", hold=True)
        await sim.until(lambda: sim.world.switches and not sim.world.running, 120.0)
        sim.net.log.appended = checked
        await sim.rest()

    sim.run(scenario())
    return sim


def test_invariant_4_is_waived_while_requests_are_held_and_none_of_them_fails() -> None:
    sim = _hold(10_000)
    assert (len(of(sim, HoldStarted)), len(of(sim, HoldReleased))) == (1, 1)
    assert sim.world.state("model", "chat").active == "v2"
    assert sim.fleet.counts["held"] > 0
    assert sim.fleet.counts["excused"] == 0


@pytest.mark.parametrize("sleeps", [0, 1])
@pytest.mark.parametrize(("fails", "serves"), [(0, "v2"), (1, "v1")])
def test_invariant_7_a_switch_that_holds_goes_on_after_a_kill_at_any_event(
    fails: int, serves: str, sleeps: int
) -> None:
    for events in range(1, 26, 3):
        sim = _hold(events, fails=fails, sleeps=sleeps)
        assert sim.world.state("model", "chat").active == serves
        assert sim.fleet.counts["excused"] == 0
        assert (sim.fleet.counts["slept"], sim.fleet.counts["woken"]) == (sleeps, sleeps * fails)


def test_models_on_demand_on_one_place_sleep_and_wake_in_turns_and_no_request_fails() -> None:
    sim = Simulation(23, workers=1, capacity=1)
    serving = Serving(on_demand=True, keep_alive_s=3.0, residency_s=5.0)

    async def scenario() -> None:
        await sim.ready()
        for model in ("a", "b"):
            await sim.register(model, "v1", load_s=0.5, sleeps=1)
            await sim.command("model.serving", SetServing(model, serving))
        await sim.until(lambda: all(m in sim.world.routes for m in ("a", "b")))
        for model in ("a", "b"):
            sim.clients(model, every_s=0.5, longest_s=0.2)
        await sim.pause(20.0)
        sim.processes["w1"].crash()
        sim.restart("w1")
        await sim.pause(20.0)

    sim.run(scenario())
    assert sim.fleet.counts["woken"] >= 2
    assert sim.fleet.counts["excused"] == 0
    assert sim.fleet.counts["answered"] > 80


def test_two_models_on_one_place_are_served_in_turns_and_no_request_fails() -> None:
    sim = Simulation(22, workers=1, capacity=1)
    serving = Serving(on_demand=True, keep_alive_s=-1.0, residency_s=5.0)

    async def scenario() -> None:
        await sim.ready()
        for model in ("a", "b"):
            await sim.register(model, "v1", load_s=0.5)
            await sim.command("model.serving", SetServing(model, serving))
        await sim.until(lambda: all(m in sim.world.routes for m in ("a", "b")))
        for model in ("a", "b"):
            sim.clients(model, every_s=0.2, longest_s=0.2)
        await sim.pause(40.0)

    sim.run(scenario())
    swaps = len(of(sim, DemandEnded))
    assert 2 <= swaps <= 10
    assert sim.fleet.counts["excused"] == 0
    assert sim.fleet.counts["answered"] > 200
