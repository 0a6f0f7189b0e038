"""The switch saga: from the world alone, what one running switch owes now.

The way: requested → (loading) → ready → step, applied, step, … → bake → drain → completed; or a rollback on the same
road. Every wait is a condition on the world or a deadline that stands in an event, so any controller can go on at any
point after a kill -9.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from turnout.core.instance import ENDED as INSTANCE_ENDED
from turnout.core.model import CloseSwitch
from turnout.core.sagas import placement, routes
from turnout.core.sagas.owed import Agenda, Owed, Write
from turnout.core.strategies import STRATEGIES
from turnout.core.strategies.base import Evidence, Finish, Operation, SetWeight
from turnout.core.switch import (
    FORWARD,
    UNTOUCHED,
    CompleteSwitch,
    FailSwitch,
    FinishRollback,
    RecordInstancesRequested,
    RecordStepApplied,
    RecordTargetReady,
    StartBake,
    StartDrain,
    StartRollback,
    StartStep,
    SwitchState,
)

if TYPE_CHECKING:
    from turnout.core.instance import InstanceState
    from turnout.core.world import World


def agenda(world: World, id: str, now: datetime) -> Agenda:
    """What the switch owes now, at most one command, and its next deadline."""
    state: SwitchState = world.state("switch", id)
    if trouble := _trouble(world, state, now):
        return Agenda((trouble,))
    match state.phase:
        case "requested" | "loading":
            return _make_ready(world, state, now)
        case "ready" | "stepped":
            return _next_step(world, state, now)
        case "stepping":
            return _await_step(world, state, now)
        case "baking":
            return _bake(world, state, now)
        case "draining":
            return _drain(world, state, now)
        case "rolling_back":
            return _roll_back(world, state, now)
        case _:
            return Agenda()


def rollback(world: World, state: SwitchState, cause: str, reason: str, now: datetime) -> tuple[Write, ...]:
    """Give the source everything back: one revision, in one batch with the fact."""
    route, revision = routes.change(
        world, state.model, {state.source: 100.0}, salt=state.switch, drain_s=state.drain_s, cause=state.switch
    )
    return (Write("switch", state.switch, StartRollback(state.switch, revision, cause, reason, now)), route)


def close(state: SwitchState, outcome: str) -> Write:
    """Let the model go; travels with the switch's last event, and before it.

    A batch is stored at once but may be folded event by event: between the two, the model must not look as if its old
    version were still the active one.
    """
    revoke = state.source if state.undo and outcome == "completed" else ""
    return Write("model", state.model, CloseSwitch(state.model, state.switch, outcome, revoke))


def _trouble(world: World, state: SwitchState, now: datetime) -> Owed | None:
    """A dead target or a passed deadline, wherever the switch stands."""
    late = state.deadline is not None and now >= state.deadline
    limit = _seconds(state.requested_at, state.deadline)
    if state.phase in UNTOUCHED:
        return _load_trouble(world, state, late, limit)
    if state.phase not in FORWARD or not world.ready(state.model, state.source):
        return None  # nothing to go back to: placement restores what is missing
    if not world.ready(state.model, state.target):
        failed = _failed(world, state)
        why = f"{state.target} has no ready instance left" + (f": {failed.reason}" if failed else "")
        return _owe(state, "rollback", *rollback(world, state, "failure", why, now))
    if late and state.phase in ("stepping", "stepped"):
        why = f"{state.target} did not carry all traffic within {limit:g} s (max_transition_time)"
        return _owe(state, "rollback", *rollback(world, state, "deadline", why, now))
    return None


def _load_trouble(world: World, state: SwitchState, late: bool, limit: float) -> Owed | None:
    if world.ready(state.model, state.target):
        return None
    if failed := _failed(world, state):
        command = FailSwitch(state.switch, failed.stage, failed.reason, failed.log_tail)
    elif state.phase == "ready":
        command = FailSwitch(state.switch, "serving", f"{state.target} was stopped before it got traffic")
    elif stopped := _stopped(world, state):
        command = FailSwitch(
            state.switch, stopped.stage or "starting", f"{stopped.instance} was stopped while it loaded"
        )
    elif late:
        loading = world.instances_of(state.model, state.target, "requested", "loading")
        stage = (loading[0].stage or "starting") if loading else "placement"
        why = f"not ready within {limit:g} s (max_transition_time)"
        if not loading:
            why += "; " + placement.no_room(world, world.models[state.model].versions[state.target].kind)
        command = FailSwitch(state.switch, stage, why)
    else:
        return None
    return _owe(state, "fail", close(state, "failed"), Write("switch", state.switch, command))


def _failed(world: World, state: SwitchState) -> InstanceState | None:
    """The newest failed instance among those that the switch waits for."""
    failed = [world.instances[i] for i in state.instances if world.state("instance", i).phase == "failed"]
    return failed[-1] if failed else None


def _stopped(world: World, state: SwitchState) -> InstanceState | None:
    """The newest instance that the switch waited for, if all of them were stopped (their worker left)."""
    waited = [world.state("instance", i) for i in state.instances]
    return waited[-1] if waited and all(one.phase in INSTANCE_ENDED for one in waited) else None


def _make_ready(world: World, state: SwitchState, now: datetime) -> Agenda:
    ready = tuple(i.instance for i in world.ready(state.model, state.target))
    if ready:
        seconds = _seconds(state.requested_at, now)
        proven = RecordTargetReady(state.switch, ready, seconds, warm=state.phase == "requested")
        return Agenda((_owe(state, "ready", Write("switch", state.switch, proven)),))
    wait = Agenda(wake=state.deadline)
    if state.phase == "loading":
        return wait
    under_way = tuple(i.instance for i in world.instances_of(state.model, state.target, "requested", "loading"))
    if under_way:
        record = RecordInstancesRequested(state.switch, under_way)
        return Agenda((_owe(state, "load", Write("switch", state.switch, record)),))
    request = placement.request(world, state.model, state.target, cause=state.switch)
    if request is None:
        return wait  # no room yet: placement makes some, or the deadline ends it
    record = RecordInstancesRequested(state.switch, (request.id,))
    return Agenda((_owe(state, "load", Write("switch", state.switch, record), request),))


def _next_step(world: World, state: SwitchState, now: datetime) -> Agenda:
    since = None if state.step == 0 else state.since
    operation = Operation(state.switch, state.source, state.target, state.step, state.weight, since, state.parameters)
    action = STRATEGIES[state.strategy].execute_switch(operation, Evidence(now))
    match action:
        case SetWeight(weight, reason):
            step = state.step + 1
            route, revision = routes.change(
                world,
                state.model,
                routes.split(state, weight),
                salt=state.switch,
                drain_s=state.drain_s,
                cause=state.switch,
            )
            start = StartStep(state.switch, step, weight, revision, reason, now)
            return Agenda((_owe(state, f"step.{step}", Write("switch", state.switch, start), route),))
        case Finish():
            return _finish(world, state, now)


def _finish(world: World, state: SwitchState, now: datetime) -> Agenda:
    if not state.source:
        complete = Write("switch", state.switch, CompleteSwitch(state.switch, 0.0))
        return Agenda((_owe(state, "complete", close(state, "completed"), complete),))
    if state.bake_s > 0:
        until = now + timedelta(seconds=state.bake_s)
        return Agenda((_owe(state, "bake", Write("switch", state.switch, StartBake(state.switch, until))),))
    return Agenda((_start_drain(world, state, now),))


def _await_step(world: World, state: SwitchState, now: datetime) -> Agenda:
    gateways = routes.applied(world, state.model, state.revision)
    if gateways is None:
        return Agenda(wake=state.deadline)
    seconds = _seconds(state.since, now)
    record = RecordStepApplied(state.switch, state.step, state.revision, gateways, seconds)
    return Agenda((_owe(state, f"applied.{state.step}", Write("switch", state.switch, record)),))


def _bake(world: World, state: SwitchState, now: datetime) -> Agenda:
    if state.bake_until is not None and now < state.bake_until:
        return Agenda(wake=state.bake_until)
    return Agenda((_start_drain(world, state, now),))


def _start_drain(world: World, state: SwitchState, now: datetime) -> Owed:
    route, revision = routes.change(
        world, state.model, {state.target: 100.0}, salt=state.switch, drain_s=state.drain_s, cause=state.switch
    )
    start = StartDrain(state.switch, state.source, revision, now)
    return _owe(state, "drain", Write("switch", state.switch, start), route)


def _drain(world: World, state: SwitchState, now: datetime) -> Agenda:
    if routes.applied(world, state.model, state.revision) is None:
        return Agenda()
    if not routes.drained(world, state.model, state.source):
        return Agenda()
    complete = CompleteSwitch(state.switch, _seconds(state.since, now))
    return Agenda((_owe(state, "complete", close(state, "completed"), Write("switch", state.switch, complete)),))


def _roll_back(world: World, state: SwitchState, now: datetime) -> Agenda:
    gateways = routes.applied(world, state.model, state.revision)
    if gateways is None or not world.ready(state.model, state.source):
        return Agenda()
    finish = FinishRollback(state.switch, gateways, _seconds(state.since, now))
    outcome = "aborted" if state.cause == "abort" else "rolled_back"
    return Agenda((_owe(state, "rolled_back", close(state, outcome), Write("switch", state.switch, finish)),))


def _owe(state: SwitchState, what: str, *writes: Write) -> Owed:
    return Owed(f"{state.switch}.{what}", writes, state.switch)


def _seconds(start: datetime | None, end: datetime | None) -> float:
    if start is None or end is None:
        return 0.0
    return round(max(0.0, (end - start).total_seconds()), 6)
