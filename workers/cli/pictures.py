"""Everything about one model in one value, put together from views; and what its running switch waits for.

Knows no terminal: ``get`` draws it, or prints it as JSON.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from turnout.core.judging.judgement import Judgement
from turnout.core.strategies import STRATEGIES
from turnout.core.strategies.base import Evidence, Finish, GoBack, Hold, Operation, SetWeight, Wait
from turnout.events import subjects
from turnout.projections.fleet import GatewayView, WorkerView
from turnout.projections.registry import ModelView
from turnout.projections.routing import RouteView
from turnout.projections.switches import SwitchView
from turnout.workers.cli.words import left_s

if TYPE_CHECKING:
    from turnout.core.switch import SwitchState


class Outlook(msgspec.Struct, frozen=True):
    """What a switch does next. ``at``: UTC, the latest time at which that is decided; None where no time decides it."""

    what: str
    at: datetime | None = None


class Picture(msgspec.Struct, frozen=True):
    """Everything about one model, also as JSON.

    ``evidence``: what the judge sees of the running switch's step; None where nothing is judged, or nobody answers.
    ``outlook``: what that switch does next, None where it is not known.
    """

    model: ModelView
    route: RouteView | None
    switch: SwitchView | None
    instances: list[dict[str, Any]]
    gateways: list[dict[str, Any]]
    evidence: Judgement | None = None
    outlook: Outlook | None = None


def keys(model: str) -> tuple[str, ...]:
    """The views that a picture is made from."""
    return subjects.view_key("model", model), subjects.view_key("route", model), "switch.*", "worker.*", "gateway.*"


def picture(name: str, found: dict[str, Any]) -> Picture | None:
    """Put the views of one model together; None where it is not registered."""
    view = found.get(subjects.view_key("model", name))
    if not isinstance(view, ModelView):
        return None
    switch = found.get(subjects.view_key("switch", view.switch)) if view.switch else None
    instances: list[dict[str, Any]] = [
        {"worker": worker.worker, "worker_state": worker.state, **msgspec.to_builtins(one)}
        for worker in found.values()
        if isinstance(worker, WorkerView)
        for one in worker.instances.values()
        if one.model == name
    ]
    gateways = [
        {"gateway": g.gateway, "address": g.address, "state": g.state, "revision": g.applied.get(name, 0)}
        for g in found.values()
        if isinstance(g, GatewayView) and g.state == "live"
    ]
    return Picture(view, found.get(subjects.view_key("route", name)), switch, instances, gateways)


def outlook(state: SwitchState, judgement: Judgement | None, now: datetime) -> Outlook | None:
    """What a switch that stands at a step does next: its own strategy is asked, as a controller asks it.

    Args:
        state: as its own events tell it.
        judgement: of its newest step.
        now: UTC.
    """
    if state.paused:
        if state.paused_until is not None:
            return Outlook("goes on by itself after the pause", state.paused_until)
        who = "an operator resumes" if state.paused == "operator" else "an operator promotes"
        return Outlook(f"stands still until {who} or aborts it")
    if state.phase != "stepped" or state.strategy not in STRATEGIES:
        return None
    operation = Operation(
        switch=state.switch,
        source=state.source,
        target=state.target,
        step=state.step,
        weight=state.weight,
        since=state.applied_at,
        parameters=state.parameters,
        promoted=state.promoted,
        full=state.full,
    )
    if judgement is not None and judgement.step != state.step:
        judgement = None
    match STRATEGIES[state.strategy].execute_switch(operation, Evidence(now, judgement)):
        case Wait(reason, until):
            return Outlook(reason, until)
        case Hold(reason):
            return Outlook(f"is held: {reason}")
        case SetWeight(weight, reason):
            return Outlook(f"goes to {weight:g} %: {reason}")
        case GoBack(reason):
            return Outlook(f"goes back: {reason}")
        case Finish():
            return None


def waits(seen: Picture, switch: SwitchView, now: datetime) -> list[str]:
    """What a running switch waits for, as far as the views can tell."""
    match switch.phase:
        case "requested" | "loading":
            found = [i for i in seen.instances if i["instance"] in switch.instances and i["phase"] != "ready"]
            return [f"waits for {i['instance']} on {i['worker']}: {i['stage'] or i['phase']}" for i in found] or [
                f"waits for an instance of {switch.target}"
            ]
        case "stepping" | "rolling_back":
            fresh = seen.route.revision if seen.route else 0
            behind = [g["gateway"] for g in seen.gateways if g["revision"] < fresh]
            return [f"waits for gateway {', '.join(behind)}"] if behind else []
        case "baking":
            return [f"bakes for {left_s(switch.bake_until, now)} s more; {switch.source} stays warm"]
        case "paused" if switch.paused_because:
            return [f"stands still: {switch.paused_because}"]
        case "draining":
            return [f"waits for the last requests of {switch.source}"]
        case _:
            return []
