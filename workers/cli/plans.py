"""``switch --dry-run``: what a switch would do, and what it could find, from the traffic that is measured now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from turnout.core.health import WINDOW_S
from turnout.core.judging.plan import Detectable, detectable, units_to_pass
from turnout.core.strategies.base import judged_steps
from turnout.events.store import Unavailable
from turnout.events.units import size
from turnout.projections.audit import seconds
from turnout.workers.answers import CommandRejected, ControllerBug
from turnout.workers.cli.terminal import Terminal, rows, table
from turnout.workers.cli.words import share_text
from turnout.workers.client import HealthMonitor

if TYPE_CHECKING:
    from turnout.core.handling import Plan
    from turnout.workers.client import Client


class Traffic(msgspec.Struct, frozen=True):
    """What a model gets now; None where there is none. ``error_rate`` is the source's."""

    requests_per_s: float | None = None
    error_rate: float | None = None


class Reach(msgspec.Struct, frozen=True):
    """What can be found while the target has ``weight`` percent.

    ``units_to_pass``: requests to the target, or users of it where requests are sticky, that a pass takes; see
    ``plan.units_to_pass``.
    """

    weight: float
    found: tuple[Detectable, ...]
    units_to_pass: int | None = None


async def show_plan(io: Terminal, client: Client, plan: Plan) -> None:
    """Say what the switch would do, and what it could find."""
    traffic = await _traffic(client, plan)
    reach = reaches(plan, traffic)
    if io.json:
        made: dict[str, Any] = msgspec.to_builtins(plan)
        io.emit({**made, "traffic": traffic, "detectable": reach})
        return
    way = f"{plan.source} → {plan.target}" if plan.source else f"→ {plan.target}"
    how = plan.strategy + (f", policy {plan.policy}" if plan.policy else "")
    io.say(f"plan  {plan.model} {way} ({how}), target {plan.tier}")
    io.show(rows(table("STEP", "TIME"), [(step.what, _time(step.seconds, n)) for n, step in enumerate(plan.steps)]))
    if plan.bytes:
        io.say(f"memory of {plan.target}: {size(plan.bytes)}")
    if plan.holds:
        long = "of a length that was never measured" if plan.pause_s is None else f"of about {seconds(plan.pause_s)}"
        io.say(f"requests wait through a pause {long}", "yellow")
    for note in plan.notes:
        io.say(note)
    io.say(f"{plan.target} must carry all traffic within {seconds(plan.deadline_s)}")
    if reach:
        _show_reach(io, reach, traffic)
    if plan.policy:
        chosen = f" --policy {plan.policy}"
    else:
        chosen = f" --strategy {plan.strategy}" + (" --param …" if plan.parameters else "")
    chosen += " --hold" if plan.holds else ""
    io.next(f"turnout switch {plan.model} {plan.target}{chosen} --wait")


def reaches(plan: Plan, traffic: Traffic) -> tuple[Reach, ...]:
    """What can be found at each weight of the plan at which the two versions are compared."""
    if plan.judging.mode == "none":
        return ()
    weights = dict.fromkeys(stage.weight for stage in plan.stages if 0 < stage.weight < 100)
    steps = judged_steps(plan.stages)
    rate, failing = traffic.requests_per_s, traffic.error_rate
    return tuple(
        Reach(
            weight,
            detectable(plan.judging, weight, rate, failing, steps=steps),
            units_to_pass(plan.judging, weight),
        )
        for weight in weights
    )


async def _traffic(client: Client, plan: Plan) -> Traffic:
    """What the model gets now, as the controllers measure it."""
    try:
        report = await HealthMonitor(client).check_model_health(plan.model)
    except (CommandRejected, ControllerBug, Unavailable):
        return Traffic()  # a plan without it is better than none
    requests = sum(one.numbers.requests for one in report.versions)
    if not requests:
        return Traffic()
    source = next((one.numbers for one in report.versions if one.version == plan.source), None)
    return Traffic(requests / WINDOW_S, source.error_rate if source is not None else None)


def _time(took_s: float | None, number: int) -> str:
    if took_s is None:
        return "not measured yet" if number == 0 else ""
    return seconds(took_s) if took_s else ""


def _show_reach(io: Terminal, reach: tuple[Reach, ...], traffic: Traffic) -> None:
    if traffic.requests_per_s is None:
        io.say("what it can find, in requests to the target (no traffic yet: how long that takes is not known):")
    else:
        failing = "" if traffic.error_rate is None else f", {share_text(traffic.error_rate)} failing"
        io.say(f"what it can find at {traffic.requests_per_s:.3g} requests/s{failing} (the last {seconds(WINDOW_S)}):")
    heads = ("FAULT", *(f"AT {one.weight:g} %" for one in reach))
    faults = dict.fromkeys(found.what for one in reach for found in one.found)
    lines = [
        [what, *(_found(next((f for f in one.found if f.what == what), None)) for one in reach)] for what in faults
    ]
    io.show(rows(table(*heads), lines))
    asked = [f"{one.units_to_pass} at {one.weight:g} %" for one in reach if one.units_to_pass is not None]
    if asked:
        many = ", ".join(asked)
        io.say(f"a pass takes about so many requests to the target, or users of it where they are sticky: {many}")


def _found(found: Detectable | None) -> str:
    if found is None:
        return "not at all"
    after = f"{found.requests} requests"
    return after if found.seconds is None else f"{after}, {seconds(found.seconds)}"
