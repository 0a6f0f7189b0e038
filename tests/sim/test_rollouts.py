"""Every strategy with the real judge, over simulated engines that err, die and hang; and a kill at every event."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import pytest
from tests.sim.simulation import Simulation

from turnout.core.decider import Accepted
from turnout.core.handling import AdvanceSwitch
from turnout.core.model import SetRules
from turnout.events.health import HealthSampled
from turnout.events.route import Rule
from turnout.events.switch import RolledBack, StepApplied, VerdictReached

if TYPE_CHECKING:
    from turnout.core.switch import SwitchState
    from turnout.events.envelope import Recorded

QUICK: dict[str, object] = {"minRequests": 10, "minUsers": 1, "minSeconds": 1, "errorMargin": 20, "compare": ["errors"]}
#: Each strategy, quick enough for a run of seconds, and how it ends when all is well.
WAYS: dict[str, tuple[str, dict[str, object], str]] = {
    "immediate": ("immediate", {}, "completed"),
    "gradual": ("gradual", {"steps": [{"setWeight": 25}, {"pause": {"duration": 1}}]}, "completed"),
    "canary": (
        "canary",
        {"steps": [{"setWeight": 20}], "judge": QUICK, "stepDeadline": 5, "onInconclusive": "promote"},
        "completed",
    ),
    "shadow": (
        "canary",
        {
            "shadow": {"percent": 50, "duration": 1},
            "steps": [{"setWeight": 20}],
            "judge": QUICK,
            "stepDeadline": 5,
            "onInconclusive": "promote",
        },
        "completed",
    ),
    "ab": ("ab", {"split": 50, "until": {"duration": 2}}, "concluded"),
}


def run(way: str, *, kill_after: int = 10_000, **flags: float) -> tuple[Simulation, SwitchState]:
    """One switch to v2 under load, and a kill -9 of the controller after so many events."""
    strategy, parameters, _ = WAYS[way]
    sim = Simulation(21, controllers=1)

    async def scenario() -> None:
        await sim.ready()
        await sim.serve("chat", "v1")
        await sim.register("chat", "v2", load_s=0.2, **flags)
        for _ in range(4):
            sim.clients("chat", every_s=0.05, longest_s=0.2)
        begin = len(sim.net.log.records)
        checked = sim.net.log.appended

        def appended(batch: tuple[Recorded, ...]) -> None:
            checked(batch)
            if len(sim.net.log.records) - begin >= kill_after:
                sim.net.log.appended = checked
                sim.processes["c1"].crash()
                sim.loop.call_later(0.5, sim.restart, "c1")

        sim.net.log.appended = appended
        await sim.switch("chat", "v2", strategy=strategy, parameters=parameters, bake_s=3.0)
        await sim.until(lambda: any(s.target == "v2" for s in sim.world.switches.values()))
        await sim.until(lambda: not sim.world.running, 90.0)
        sim.net.log.appended = checked
        await sim.rest()

    sim.run(scenario())
    (state,) = [s for s in sim.world.switches.values() if s.target == "v2"]
    return sim, state


E = TypeVar("E")


def of_type(sim: Simulation, type_: type[E]) -> list[E]:
    return [record.event for record in sim.net.log.records if isinstance(record.event, type_)]


@pytest.mark.parametrize("way", WAYS)
def test_invariant_7_every_strategy_comes_to_the_same_end_after_a_kill_at_any_event(way: str) -> None:
    expected = WAYS[way][2]
    whole, state = run(way)
    assert state.phase == expected
    reached = [e.step for e in of_type(whole, StepApplied)]
    for n in range(1, len(whole.net.log.records), 2):
        sim, again = run(way, kill_after=n)
        assert again.phase == expected, f"killed after {n} events: {again.reason}"
        assert [e.step for e in of_type(sim, StepApplied)] == reached


@pytest.mark.parametrize("way", ["immediate", "gradual", "canary"])
@pytest.mark.parametrize("errors", [0.5, 1.0])
def test_a_version_that_errs_is_rolled_back_by_every_strategy(way: str, errors: float) -> None:
    sim, state = run(way, errors=errors)
    assert state.phase == "rolled_back"
    assert state.cause == "verdict"
    assert sim.world.state("model", "chat").active == "v1"
    verdict = of_type(sim, VerdictReached)[-1]
    assert verdict.decision == "fail"
    assert "v2" in verdict.reason
    assert of_type(sim, RolledBack)[-1].proof, "the old version answered its probe"


def test_invariant_9_a_rollback_after_a_kill_has_its_verdict_in_the_log() -> None:
    whole, _ = run("canary", errors=1.0)
    for n in range(4, len(whole.net.log.records), 3):
        sim, state = run("canary", kill_after=n, errors=1.0)
        assert state.phase == "rolled_back"
        assert any(verdict.decision == "fail" for verdict in of_type(sim, VerdictReached))


def test_a_canary_without_traffic_is_held_and_may_still_be_promoted() -> None:
    """Complaint 14: no data is neither good news nor bad, and what is held goes on when a person says so."""
    sim = Simulation(22, controllers=2)
    held: list[str] = []

    async def scenario() -> None:
        await sim.ready()
        await sim.serve("chat", "v1", "v2")
        parameters: dict[str, object] = {"steps": [{"setWeight": 20}], "judge": QUICK, "stepDeadline": 3}
        await sim.switch("chat", "v2", strategy="canary", parameters=parameters, bake_s=0.5)
        await sim.until(lambda: any(s.paused for s in sim.world.switches.values()))
        (state,) = [s for s in sim.world.switches.values() if s.paused]
        held.append(state.paused)
        await sim.pause(600.0)
        assert sim.world.switches[state.switch].paused, "it waits for a person, however long"
        await sim.command("switch.promote", AdvanceSwitch(state.switch, state.step))
        await sim.until(lambda: sim.world.state("model", "chat").active == "v2")
        await sim.rest()

    sim.run(scenario())
    assert held == ["inconclusive"]
    (verdict,) = of_type(sim, VerdictReached)
    assert verdict.decision == "inconclusive"
    assert "0 of 10" in verdict.reason


def test_a_request_goes_where_the_rules_say_on_every_revision_of_a_rollout() -> None:
    """A version's rule, another model's and a candidate's, through a canary, its rollback and a change of the rules.

    Each choice of each gateway is checked against the rules of the revision that it has applied (invariants.py).
    """
    sim = Simulation(24, gateways=3)
    beta = Rule("beta", "headers['x-team'] == 'beta'", version="v3")
    pictures = Rule("pictures", "'image' in modality", model="vision")
    short = Rule("short", "tokens < 100", candidate=True)
    ruled: dict[str, int] = {}

    async def scenario() -> None:
        await sim.ready()
        await sim.serve("vision", "v1")
        await sim.serve("chat", "v1", "v3")
        await sim.register("chat", "v2", load_s=0.2, errors=0.5)
        assert isinstance(await sim.command("model.rules", SetRules("chat", (beta, pictures, short))), Accepted)
        for _ in range(6):
            sim.clients("chat", every_s=0.03, longest_s=0.2)
        await sim.until(lambda: sim.world.ready("chat", "v3"))
        strategy, parameters, _ = WAYS["canary"]
        await sim.switch("chat", "v2", strategy=strategy, parameters=parameters, bake_s=1.0)
        await sim.until(lambda: any(s.phase == "rolled_back" for s in sim.world.switches.values()), 90.0)
        ruled["before"] = sim.fleet.counts["ruled"]
        assert isinstance(await sim.command("model.rules", SetRules("chat", (short, pictures))), Accepted)
        await sim.register("chat", "v4", load_s=0.2)
        await sim.switch("chat", "v4", strategy="gradual", parameters=WAYS["gradual"][1], bake_s=1.0)
        await sim.until(lambda: sim.world.state("model", "chat").active == "v4", 90.0)
        await sim.rest()

    sim.run(scenario())
    assert ruled["before"] > 200
    assert sim.fleet.counts["ruled"] > ruled["before"] + 200
    assert of_type(sim, VerdictReached)[0].target_requests < 200, "the judge counts the candidate's share alone"


def test_duplicate_and_late_samples_change_nothing() -> None:
    """Every sample arrives twice, the second time much later: the outcome is the same."""
    sim = Simulation(23)

    async def scenario() -> None:
        await sim.ready()
        await sim.serve("chat", "v1", "v2")
        for _ in range(4):
            sim.clients("chat", every_s=0.05, longest_s=0.2)

        async def echo() -> None:
            said = 0
            while True:
                await sim.pause(1.0)
                for at, event in sim.net.health[said:]:
                    if isinstance(event, HealthSampled):
                        sim.net.health.append((at, event))
                said = len(sim.net.health)

        sim.tasks.append(sim.loop.create_task(echo()))
        strategy, parameters, _ = WAYS["canary"]
        await sim.switch("chat", "v2", strategy=strategy, parameters=parameters, bake_s=0.5)
        await sim.until(lambda: sim.world.state("model", "chat").active == "v2", 90.0)
        sim.tasks[-1].cancel()
        await sim.rest()

    sim.run(scenario())
