"""Requests that wait for models on demand, on a place that has room for one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.simulation import Simulation

from turnout.core.model import SetServing
from turnout.events.model import DemandEnded, Serving

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


def of(sim: Simulation, kind: type) -> list[Recorded]:
    return [record for record in sim.net.log.records if isinstance(record.event, kind)]


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
