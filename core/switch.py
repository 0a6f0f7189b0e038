"""Decisions of one switch: which step may follow which. What is owed next is sagas/switch.py's question."""

from __future__ import annotations

from datetime import datetime

import msgspec

from turnout.core.decider import Rejected
from turnout.core.strategies import STRATEGIES
from turnout.events.switch import (
    BakeStarted,
    DrainStarted,
    InstancesRequested,
    RollbackStarted,
    RolledBack,
    StepApplied,
    StepStarted,
    SwitchAborted,
    SwitchCompleted,
    SwitchEvent,
    SwitchFailed,
    SwitchRequested,
    TargetReady,
)

#: Outcomes: phases that no command leads out of.
ENDED = frozenset(("completed", "rolled_back", "aborted", "failed"))
#: The target has no traffic yet.
UNTOUCHED = frozenset(("requested", "loading", "ready"))
#: The target has traffic, and the source can have it back with one revision.
FORWARD = frozenset(("stepping", "stepped", "baking", "draining"))


class SwitchState(msgspec.Struct, frozen=True):
    """One switch.

    Attributes:
        phase: unknown, requested, loading, ready, stepping (a step waits for gateways), stepped (it was applied),
            baking, draining, rolling_back, or one of ENDED.
        step: number of the newest step, 0 before the first.
        weight: percent that the target has since that step.
        revision: route revision that the phase waits for.
        since: UTC, start of the phase's wait.
    """

    switch: str = ""
    model: str = ""
    target: str = ""
    source: str = ""
    strategy: str = ""
    parameters: dict[str, object] = {}
    undo: bool = False
    requested_at: datetime | None = None
    deadline: datetime | None = None
    bake_s: float = 0.0
    drain_s: float = 0.0
    phase: str = "unknown"
    instances: tuple[str, ...] = ()
    step: int = 0
    weight: float = 0.0
    revision: int = 0
    since: datetime | None = None
    bake_until: datetime | None = None
    cause: str = ""
    reason: str = ""


initial = SwitchState()


def evolve(state: SwitchState, event: SwitchEvent) -> SwitchState:
    """State after the event."""
    replace = msgspec.structs.replace
    match event:
        case SwitchRequested():
            return SwitchState(
                switch=event.switch,
                model=event.model,
                target=event.target,
                source=event.source,
                strategy=event.strategy,
                parameters=event.parameters,
                undo=event.undo,
                requested_at=event.at,
                deadline=event.deadline,
                bake_s=event.bake_s,
                drain_s=event.drain_s,
                phase="requested",
                since=event.at,
                reason=event.reason,
            )
        case InstancesRequested(_, instances):
            return replace(state, phase="loading", instances=instances)
        case TargetReady(_, instances):
            return replace(state, phase="ready", instances=instances)
        case StepStarted(_, step, weight, revision, _, at):
            return replace(state, phase="stepping", step=step, weight=weight, revision=revision, since=at)
        case StepApplied():
            return replace(state, phase="stepped")
        case BakeStarted(_, until):
            return replace(state, phase="baking", bake_until=until)
        case DrainStarted(_, _, revision, at):
            return replace(state, phase="draining", revision=revision, since=at)
        case RollbackStarted(_, revision, cause, reason, at):
            return replace(
                state, phase="rolling_back", weight=0.0, revision=revision, cause=cause, reason=reason, since=at
            )
        case SwitchCompleted():
            return replace(state, phase="completed")
        case RolledBack():
            return replace(state, phase="rolled_back")
        case SwitchAborted(_, reason):
            return replace(state, phase="aborted", reason=reason)
        case SwitchFailed(_, _, reason):
            return replace(state, phase="failed", reason=reason)


class OpenSwitch(msgspec.Struct, frozen=True):
    """Begin. Fields as in ``SwitchRequested``."""

    switch: str
    model: str
    target: str
    source: str
    strategy: str
    parameters: dict[str, object]
    undo: bool
    reason: str
    deadline: datetime
    bake_s: float
    drain_s: float
    at: datetime


class RecordInstancesRequested(msgspec.Struct, frozen=True):
    """Instances of the target were asked for."""

    switch: str
    instances: tuple[str, ...]


class RecordTargetReady(msgspec.Struct, frozen=True):
    """The target has proven instances."""

    switch: str
    instances: tuple[str, ...]
    seconds: float
    warm: bool


class StartStep(msgspec.Struct, frozen=True):
    """The strategy's next traffic level; its route revision is written in the same batch."""

    switch: str
    step: int
    weight: float
    revision: int
    reason: str
    at: datetime


class RecordStepApplied(msgspec.Struct, frozen=True):
    """All live gateways route by the step."""

    switch: str
    step: int
    revision: int
    gateways: tuple[str, ...]
    seconds: float


class StartBake(msgspec.Struct, frozen=True):
    """The strategy has finished: watch the target at full traffic."""

    switch: str
    until: datetime


class StartDrain(msgspec.Struct, frozen=True):
    """Let the version leave; the route without it is written in the same batch."""

    switch: str
    version: str
    revision: int
    at: datetime


class CompleteSwitch(msgspec.Struct, frozen=True):
    """The source has left every live gateway."""

    switch: str
    drain_s: float


class StartRollback(msgspec.Struct, frozen=True):
    """Give the source everything back; the route is written in the same batch."""

    switch: str
    revision: int
    cause: str
    reason: str
    at: datetime


class FinishRollback(msgspec.Struct, frozen=True):
    """All live gateways route by the rollback."""

    switch: str
    gateways: tuple[str, ...]
    seconds: float


class AbortSwitch(msgspec.Struct, frozen=True):
    """An operator ends a switch that has not touched traffic."""

    switch: str
    reason: str


class FailSwitch(msgspec.Struct, frozen=True):
    """The target can't be made ready; traffic was never touched."""

    switch: str
    stage: str
    reason: str
    log_tail: tuple[str, ...] = ()


SwitchCommand = (
    OpenSwitch
    | RecordInstancesRequested
    | RecordTargetReady
    | StartStep
    | RecordStepApplied
    | StartBake
    | StartDrain
    | CompleteSwitch
    | StartRollback
    | FinishRollback
    | AbortSwitch
    | FailSwitch
)


def decide(state: SwitchState, command: SwitchCommand) -> tuple[SwitchEvent, ...] | Rejected:
    """Only the next step of the phase, once; anything else is refused with the phase's name."""
    match command:
        case OpenSwitch():
            return _open(state, command)
        case _ if state.phase == "unknown":
            return unknown_switch(command.switch)
        case AbortSwitch(switch, reason):
            if state.phase in UNTOUCHED:
                return (SwitchAborted(switch, reason),)
            return () if state.phase == "aborted" else _out_of_turn(state, "abort before traffic")
        case _ if state.phase in ENDED:
            return () if _is_outcome(state, command) else _out_of_turn(state, type(command).__name__)
        case RecordInstancesRequested(switch, instances):
            if state.phase == "requested":
                return (InstancesRequested(switch, instances),)
            return () if state.instances == instances else _out_of_turn(state, "load")
        case RecordTargetReady(switch, instances, seconds, warm):
            if state.phase in ("requested", "loading"):
                return (TargetReady(switch, instances, seconds, warm),)
            return ()
        case FailSwitch(switch, stage, reason, log_tail):
            if state.phase in UNTOUCHED or not state.source:
                return (SwitchFailed(switch, stage, reason, log_tail),)
            return _out_of_turn(state, "fail")
        case StartStep(switch, step, weight, revision, reason, at):
            if step <= state.step:
                return ()
            if state.phase in ("ready", "stepped") and step == state.step + 1:
                return (StepStarted(switch, step, weight, revision, reason, at),)
            return _out_of_turn(state, f"step {step}")
        case RecordStepApplied(switch, step, revision, gateways, seconds):
            if state.phase == "stepping" and step == state.step:
                return (StepApplied(switch, step, revision, gateways, seconds),)
            return ()
        case StartBake(switch, until):
            if state.phase == "stepped":
                return (BakeStarted(switch, until),)
            return () if state.bake_until == until else _out_of_turn(state, "bake")
        case StartDrain(switch, version, revision, at):
            if state.phase in ("stepped", "baking"):
                return (DrainStarted(switch, version, revision, at),)
            return () if state.phase == "draining" else _out_of_turn(state, "drain")
        case CompleteSwitch(switch, drain_s):
            if state.phase == "draining" or (state.phase == "stepped" and not state.source):
                return (SwitchCompleted(switch, drain_s),)
            return _out_of_turn(state, "complete")
        case StartRollback(switch, revision, cause, reason, at):
            if state.phase in FORWARD:
                return (RollbackStarted(switch, revision, cause, reason, at),)
            return () if state.phase == "rolling_back" else _out_of_turn(state, "roll back")
        case FinishRollback(switch, gateways, seconds):
            if state.phase != "rolling_back":
                return _out_of_turn(state, "finish the rollback")
            if state.cause == "abort":
                return (SwitchAborted(switch, state.reason),)
            return (RolledBack(switch, gateways, seconds),)


def unknown_switch(switch: str) -> Rejected:
    """No such switch."""
    return Rejected(
        "switch_unknown", f"there is no switch {switch!r}", "list them with: turnout log, or turnout get MODEL"
    )


def _open(state: SwitchState, command: OpenSwitch) -> tuple[SwitchEvent, ...] | Rejected:
    if state.switch == command.switch:
        return ()
    strategy = STRATEGIES.get(command.strategy)
    if strategy is None:
        return Rejected(
            "strategy_unknown",
            f"there is no strategy {command.strategy!r}",
            f"choose one of {', '.join(sorted(STRATEGIES))}",
        )
    if problems := strategy.problems(command.parameters):
        return Rejected("parameters_invalid", "; ".join(problems), f"see: turnout switch --help, {command.strategy}")
    return (
        SwitchRequested(
            command.switch,
            command.model,
            command.target,
            command.source,
            command.strategy,
            command.parameters,
            command.undo,
            command.reason,
            command.deadline,
            command.bake_s,
            command.drain_s,
            command.at,
        ),
    )


def _is_outcome(state: SwitchState, command: SwitchCommand) -> bool:
    """Whether the command asks for the end that the switch has already."""
    match command:
        case CompleteSwitch():
            return state.phase == "completed"
        case FailSwitch():
            return state.phase == "failed"
        case FinishRollback():
            return state.phase == ("aborted" if state.cause == "abort" else "rolled_back")
        case _:
            return False


def _out_of_turn(state: SwitchState, what: str) -> Rejected:
    code = "switch_ended" if state.phase in ENDED else "out_of_turn"
    return Rejected(
        code,
        f"switch {state.switch} is {state.phase.replace('_', ' ')}: it can't {what}",
        f"look at it: turnout status {state.switch}",
    )
