"""Engines that sleep: woken by the switch that wants them, also where their worker or they themselves die meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.sim.simulation import Simulation

from turnout.events.instance import InstanceFailed, InstanceReady, InstanceSlept, InstanceWakeRequested, InstanceWoken

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


def of(sim: Simulation, kind: type) -> list[Recorded]:
    return [record for record in sim.net.log.records if isinstance(record.event, kind)]


def _wakes_v1(killed_at: str = "", *, wake_fails: int = 0) -> Simulation:
    """v1 sleeps, as v3 needed its place, and is switched to; its worker dies when its engine is ``killed_at``."""
    sim = Simulation(31, workers=1, capacity=2)

    async def scenario() -> None:
        await sim.ready()
        for version in ("v1", "v2", "v3"):
            await sim.register("chat", version, sleeps=1, wake_fails=wake_fails, load_s=0.5)
        states: list[str] = []

        def moved() -> None:
            """The worker dies once, as soon as v1's engine is there."""
            engine = next((e for e in sim.fleet.engines.values() if e.version == "v1"), None)
            state = "" if engine is None else f"{engine.state} {engine.wakes}"
            if state and state not in states:
                states.append(state)
                if state == killed_at:
                    sim.processes["w1"].crash()
                    sim.loop.call_later(0.5, sim.restart, "w1")
            sim.loop.call_later(0.05, moved)

        moved()
        for version in ("v1", "v2", "v3"):
            await sim.switch("chat", version, bake_s=0.0)
            await sim.until(lambda v=version: sim.world.state("model", "chat").active == v)  # type: ignore[misc]
            if version == "v1":
                sim.clients("chat", every_s=0.1, longest_s=0.5)
        await sim.pause(5.0)
        await sim.switch("chat", "v1", bake_s=0.0)
        await sim.until(lambda: sim.world.state("model", "chat").active == "v1")
        assert not killed_at or killed_at in states, states
        await sim.rest()

    sim.run(scenario())
    return sim


@pytest.mark.parametrize("killed_at", ["", "asleep 0"])
def test_what_sleeps_is_woken_also_by_the_worker_that_comes_after_its_own(killed_at: str) -> None:
    sim = _wakes_v1(killed_at)
    assert len([r for r in of(sim, InstanceReady) if "cold" in str(r.event)]) == 3, "none was loaded twice"
    assert of(sim, InstanceWoken)
    assert sim.fleet.counts["excused"] == 0


@pytest.mark.parametrize(("killed_at", "stage"), [("turning 0", "sleeping"), ("turning 1", "waking")])
def test_invariant_9_an_engine_whose_worker_died_over_its_sleep_is_replaced_and_not_tried_again(
    killed_at: str, stage: str
) -> None:
    sim = _wakes_v1(killed_at)
    (failed,) = [r.event for r in of(sim, InstanceFailed)]
    assert isinstance(failed, InstanceFailed)
    assert failed.stage == stage
    assert len(of(sim, InstanceReady)) == 4
    assert sim.fleet.counts["excused"] == 0


def test_invariant_9_a_wake_that_fails_is_not_tried_again_and_its_switch_loads_the_version_cold() -> None:
    sim = _wakes_v1(wake_fails=1)
    assert len(of(sim, InstanceWakeRequested)) == sim.fleet.counts["not_woken"] == 1
    assert of(sim, InstanceSlept)
    assert not of(sim, InstanceWoken)
    assert {s.phase for s in sim.world.switches.values()} == {"completed"}
    assert sim.fleet.counts["excused"] == 0
