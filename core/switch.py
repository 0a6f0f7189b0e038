"""Decisions of one switch: which step may follow which. What is owed next is sagas/switch.py's question."""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec

from turnout.core.decider import Rejected
from turnout.core.judging.judgement import Decision, Judgement
from turnout.core.strategies import STRATEGIES
from turnout.events.route import Hold
from turnout.events.switch import (
    BakeStarted,
    DrainStarted,
    HoldReleased,
    HoldStarted,
    InstancesRequested,
    RollbackStarted,
    RolledBack,
    StepApplied,
    StepStarted,
    SwitchAborted,
    SwitchCompleted,
    SwitchConcluded,
    SwitchEvent,
    SwitchFailed,
    SwitchPaused,
    SwitchPromoted,
    SwitchRequested,
    SwitchResumed,
    TargetReady,
    VerdictReached,
)

#: Outcomes: phases that no command leads out of.
ENDED = frozenset(("completed", "rolled_back", "aborted", "concluded", "failed"))
#: Outcomes after which the same target may be tried again.
_RETRIED = frozenset(("rolled_back", "aborted", "failed"))
#: The target has no traffic yet.
UNTOUCHED = frozenset(("requested", "loading", "ready"))
#: The target has traffic, and the source can have it back with one revision.
FORWARD = frozenset(("stepping", "stepped", "baking", "draining"))
#: So long after a promotion, seconds, a promotion that names no step is taken for the same one given twice.
TWICE_S = 10.0
#: Where an operator may make it stand still.
PAUSABLE = frozenset(("requested", "loading", "ready", "stepping", "stepped", "baking"))


class SwitchState(msgspec.Struct, frozen=True):
    """One switch.

    Attributes:
        phase: unknown, requested, loading, ready, stepping (a step waits for gateways), stepped (it was applied),
            baking, draining, rolling_back, holding (requests wait while the source makes room), or one of ENDED.
        step: number of the newest step, 0 before the first.
        weight: percent that the target has since that step; ``mirror``: percent that is copied to it.
        revision: route revision that the phase waits for.
        since: UTC, start of the phase's wait.
        applied_at: UTC, when every gateway had applied the step; pauses since then move it.
        paused: why it stands still (see ``SwitchPaused``), empty where it does not; since ``paused_at``.
        promoted: newest step that an operator has let it past, at ``promoted_at`` (UTC); ``full``: past all.
        verdict: newest decision of the judge on this step, empty where there is none.
        to: version that a rollback gave everything to because the source was not ready; empty for the source.
        hold: bounds within which requests may wait where there is no place for both; None: they may not.
        held_at: since when they had to (UTC), None where they never had; ``released``: they have gone on.
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
    mirror: float = 0.0
    applied_at: datetime | None = None
    paused: str = ""
    paused_at: datetime | None = None
    paused_until: datetime | None = None
    promoted: int = 0
    promoted_at: datetime | None = None
    full: bool = False
    verdict: str = ""
    policy: str = ""
    to: str = ""
    hold: Hold | None = None
    held_at: datetime | None = None
    released: bool = False

    @property
    def home(self) -> str:
        """The version that has everything when the switch has gone back."""
        return self.to or self.source

    @property
    def alone(self) -> bool:
        """Whether the target has taken the source's place, so that there is nothing to bake, drain or go back to."""
        return self.held_at is not None and self.phase in ("holding", "ready", "stepping", "stepped")

    @property
    def holds(self) -> bool:
        """Whether requests wait for the switch."""
        return self.held_at is not None and self.phase in ("holding", "rolling_back")


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
                policy=event.policy,
                hold=event.hold,
            )
        case HoldStarted():
            return replace(state, phase="holding", revision=event.revision, since=event.at, held_at=event.at)
        case HoldReleased():
            return replace(state, released=True)
        case InstancesRequested():
            phase = "holding" if state.phase == "holding" else "loading"
            return replace(state, phase=phase, instances=event.instances)
        case TargetReady():
            return replace(state, phase="ready", instances=event.instances)
        case StepStarted():
            return replace(
                state,
                phase="stepping",
                step=event.step,
                weight=event.weight,
                mirror=event.mirror,
                revision=event.revision,
                since=event.at,
                verdict="",
            )
        case StepApplied():
            applied_at = None if state.since is None else state.since + timedelta(seconds=event.seconds)
            return replace(state, phase="stepped", applied_at=applied_at)
        case VerdictReached():
            return replace(state, verdict=event.decision)
        case SwitchPaused():
            return replace(state, paused=event.cause, paused_at=event.at, paused_until=event.until)
        case SwitchResumed():
            return _go_on(state, event.at)
        case SwitchPromoted():
            return replace(
                _go_on(state, event.at),
                promoted=max(state.promoted, event.step),
                promoted_at=event.at,
                full=state.full or event.full,
            )
        case BakeStarted():
            return replace(state, phase="baking", bake_until=event.until)
        case DrainStarted():
            return replace(state, phase="draining", revision=event.revision, since=event.at)
        case RollbackStarted():
            return replace(
                state,
                phase="rolling_back",
                weight=0.0,
                mirror=0.0,
                revision=event.revision,
                cause=event.cause,
                reason=event.reason,
                since=event.at,
                paused="",
                to=event.to,
            )
        case SwitchCompleted():
            return replace(state, phase="completed")
        case RolledBack():
            return replace(state, phase="rolled_back")
        case SwitchAborted():
            return replace(state, phase="aborted", reason=event.reason)
        case SwitchConcluded():
            return replace(state, phase="concluded", reason=event.reason)
        case SwitchFailed():
            return replace(state, phase="failed", reason=event.reason)


def _go_on(state: SwitchState, at: datetime) -> SwitchState:
    """The switch moves again: the time that it stood still counts for no deadline."""
    if state.paused_at is None or not state.paused:
        return state
    stood = max(at - state.paused_at, timedelta())

    def later(time: datetime | None) -> datetime | None:
        return None if time is None else time + stood

    return msgspec.structs.replace(
        state,
        paused="",
        paused_at=None,
        paused_until=None,
        applied_at=later(state.applied_at),
        deadline=later(state.deadline),
        bake_until=later(state.bake_until),
    )


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
    policy: str = ""
    hold: Hold | None = None


class StartHold(msgspec.Struct, frozen=True):
    """Let requests wait while the source makes room; the route without it is written in the same batch."""

    switch: str
    revision: int
    expected_s: float | None
    at: datetime


class ReleaseHold(msgspec.Struct, frozen=True):
    """The requests that waited have somewhere to go."""

    switch: str
    version: str
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
    """The strategy's next traffic level; its route revision is written in the same batch.

    ``verdict``: the judgement that let it go on, where one was asked for.
    """

    switch: str
    step: int
    weight: float
    revision: int
    reason: str
    at: datetime
    mirror: float = 0.0
    verdict: Judgement | None = None


class RecordStepApplied(msgspec.Struct, frozen=True):
    """All live gateways route by the step."""

    switch: str
    step: int
    revision: int
    gateways: tuple[str, ...]
    seconds: float


class RecordVerdict(msgspec.Struct, frozen=True):
    """The judge decided, and nothing can be done about it now."""

    switch: str
    verdict: Judgement
    at: datetime


class PauseSwitch(msgspec.Struct, frozen=True):
    """Stand still. ``cause`` as in ``SwitchPaused``; ``verdict``: where evidence or the want of it is the reason."""

    switch: str
    cause: str
    reason: str
    at: datetime
    until: datetime | None = None
    verdict: Judgement | None = None


class ResumeSwitch(msgspec.Struct, frozen=True):
    """Go on after an operator's pause, or when a pause's time is up."""

    switch: str
    reason: str
    at: datetime


class PromoteSwitch(msgspec.Struct, frozen=True):
    """Let it past ``step``, the one that its author has seen; None where the author named none. ``full``: past all."""

    switch: str
    step: int | None
    full: bool
    reason: str
    at: datetime


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
    """Give the source everything back; the route is written in the same batch. ``verdict``: where one is the cause.

    ``to``: as in ``RollbackStarted``. A rollback under way may be sent on to another version, whose source died.
    """

    switch: str
    revision: int
    cause: str
    reason: str
    at: datetime
    verdict: Judgement | None = None
    to: str = ""


class FinishRollback(msgspec.Struct, frozen=True):
    """All live gateways route by the rollback; ``proof`` as in ``RolledBack``."""

    switch: str
    gateways: tuple[str, ...]
    seconds: float
    proof: str = ""


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
    | StartHold
    | ReleaseHold
    | RecordInstancesRequested
    | RecordTargetReady
    | StartStep
    | RecordStepApplied
    | RecordVerdict
    | PauseSwitch
    | ResumeSwitch
    | PromoteSwitch
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
            return () if _is_outcome(state, command) else _out_of_turn(state, _ASKED.get(type(command), "go on"))
        case StartHold(switch, revision, expected_s, at):
            if state.phase == "requested" and state.hold is not None and not state.paused:
                return (HoldStarted(switch, state.source, revision, state.policy, expected_s, at),)
            return () if state.held_at is not None else _out_of_turn(state, "hold requests")
        case ReleaseHold(switch, version, at):
            if state.held_at is None or state.released:
                return ()
            return (HoldReleased(switch, version, max(0.0, (at - state.held_at).total_seconds())),)
        case RecordInstancesRequested(switch, instances):
            if state.phase != "requested" and state.instances == instances:
                return ()
            if state.phase in ("requested", "loading", "holding"):  # again, where what slept could not be woken
                return (InstancesRequested(switch, instances),)
            return _out_of_turn(state, "load")
        case RecordTargetReady(switch, instances, seconds, warm):
            if state.phase in ("requested", "loading", "holding"):
                return (TargetReady(switch, instances, seconds, warm),)
            return ()
        case FailSwitch(switch, stage, reason, log_tail):
            if state.phase in UNTOUCHED or not state.source:
                return (SwitchFailed(switch, stage, reason, log_tail),)
            return _out_of_turn(state, "fail")
        case StartStep(switch, step, weight, revision, reason, at, mirror, verdict):
            if step <= state.step:
                return ()
            if state.phase in ("ready", "stepped") and step == state.step + 1:
                return (*_receipt(state, verdict, at), StepStarted(switch, step, weight, revision, reason, at, mirror))
            return _out_of_turn(state, f"step {step}")
        case RecordVerdict(_, verdict, at):
            return () if state.verdict == _word(verdict) else _receipt(state, verdict, at)
        case PauseSwitch():
            return _pause(state, command)
        case ResumeSwitch():
            return _resume(state, command)
        case PromoteSwitch():
            return _promote(state, command)
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
            if state.phase == "draining" or (state.phase == "stepped" and (not state.source or state.alone)):
                return (SwitchCompleted(switch, drain_s),)
            return _out_of_turn(state, "complete")
        case StartRollback(switch, revision, cause, reason, at, verdict, to):
            if state.phase in FORWARD or state.phase == "holding":
                return (*_receipt(state, verdict, at), RollbackStarted(switch, revision, cause, reason, at, to))
            if state.phase == "rolling_back":
                return () if state.to == to else (RollbackStarted(switch, revision, cause, reason, at, to),)
            return _out_of_turn(state, "roll back")
        case FinishRollback(switch, gateways, seconds, proof):
            if state.phase != "rolling_back":
                return _out_of_turn(state, "finish the rollback")
            match state.cause:
                case "abort":
                    return (SwitchAborted(switch, state.reason),)
                case "concluded":
                    return (SwitchConcluded(switch, state.home, state.reason),)
                case _:
                    return (RolledBack(switch, gateways, seconds, proof),)


#: What an operator's command asks a switch to do, as in "it can't …".
_ASKED: dict[type, str] = {PauseSwitch: "pause", ResumeSwitch: "be resumed", PromoteSwitch: "be promoted"}


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
            command.policy,
            command.hold,
        ),
    )


def outcome_of(state: SwitchState) -> str:
    """How a switch that is rolling back will have ended."""
    return {"abort": "aborted", "concluded": "concluded"}.get(state.cause, "rolled_back")


def _word(verdict: Judgement) -> str:
    """The decision as the log has it."""
    return "inconclusive" if verdict.decision in (Decision.HOLD, Decision.ERROR) else str(verdict.decision)


def _receipt(state: SwitchState, verdict: Judgement | None, at: datetime) -> tuple[SwitchEvent, ...]:
    """The judge's decision with everything that it was made from; one that holds has run out of time."""
    if verdict is None:
        return ()
    return (
        VerdictReached(
            state.switch,
            state.step,
            _word(verdict),
            verdict.rule,
            verdict.reason or verdict.missing,
            verdict.metric,
            verdict.source_requests,
            verdict.target_requests,
            verdict.source_errors,
            verdict.target_errors,
            verdict.target_users,
            verdict.seconds,
            verdict.figures,
            verdict.samples,
            verdict.gateways,
            at,
        ),
    )


def _pause(state: SwitchState, command: PauseSwitch) -> tuple[SwitchEvent, ...] | Rejected:
    if state.paused == command.cause:
        return ()
    if state.phase not in PAUSABLE:
        return _out_of_turn(state, "pause")
    if state.paused and command.cause != "operator":
        return ()  # it stands still already; an operator's pause may come on top of the policy's
    paused = SwitchPaused(command.switch, command.cause, command.reason, command.at, command.until)
    return (*_receipt(state, command.verdict, command.at), paused)


def _resume(state: SwitchState, command: ResumeSwitch) -> tuple[SwitchEvent, ...] | Rejected:
    if not state.paused:
        return ()
    if state.paused != "operator":
        return Rejected(
            "waits_for_a_decision",
            f"switch {state.switch} was not paused by an operator: {state.paused}",
            f"let it go on with: turnout promote {state.switch} --step {state.step}, or end it with: "
            f"turnout abort {state.switch}",
        )
    return (SwitchResumed(command.switch, command.reason, command.at),)


def _promote(state: SwitchState, command: PromoteSwitch) -> tuple[SwitchEvent, ...] | Rejected:
    step = state.step if command.step is None else command.step
    if (command.full and state.full) or (not command.full and step <= state.promoted):
        return ()
    if step > state.step:
        return Rejected(
            "step_ahead",
            f"switch {state.switch} is at step {state.step}, not at {step}",
            f"look at it: turnout status {state.switch}",
        )
    if not command.full and step < state.step:
        return Rejected(
            "step_passed",
            f"switch {state.switch} has left step {step} by itself: it is at step {state.step}",
            f"look at it: turnout status {state.switch}; then name the step that you see: "
            f"turnout promote {state.switch} --step N",
        )
    if not command.full and command.step is None and state.promoted_at is not None:
        since_s = (command.at - state.promoted_at).total_seconds()
        if since_s < TWICE_S:
            return Rejected(
                "step_unseen",
                f"switch {state.switch} was promoted past step {state.promoted} {since_s:.1f} s ago and is at step "
                f"{state.step} now: this looks like the same promotion, given twice",
                f"to let it past step {state.step}, too: turnout promote {state.switch} --step {state.step}",
            )
    if command.full and not command.reason:
        return Rejected(
            "reason_missing",
            "a full promotion skips every further step, pause and analysis, and the log must say why",
            "give the reason: --reason TEXT",
        )
    if state.phase not in ("stepping", "stepped"):
        return _out_of_turn(state, "be promoted")
    if state.paused == "operator" and not command.full:
        return Rejected(
            "switch_paused",
            f"switch {state.switch} was paused by an operator",
            f"let it go on first: turnout resume {state.switch}",
        )
    return (SwitchPromoted(command.switch, state.step, command.full, command.reason, command.at),)


def _is_outcome(state: SwitchState, command: SwitchCommand) -> bool:
    """Whether the command asks for the end that the switch has already."""
    match command:
        case CompleteSwitch():
            return state.phase == "completed"
        case FailSwitch():
            return state.phase == "failed"
        case FinishRollback():
            return state.phase == outcome_of(state)
        case _:
            return False


def _out_of_turn(state: SwitchState, what: str) -> Rejected:
    code = "switch_ended" if state.phase in ENDED else "out_of_turn"
    return Rejected(
        code,
        f"switch {state.switch} is {state.phase.replace('_', ' ')}: it can't {what}",
        f"look at it: turnout status {state.switch}"
        + (f"; try the version again with: turnout retry {state.switch}" if state.phase in _RETRIED else ""),
    )
