"""The switch saga: from the world alone, what one running switch owes now.

The way: requested → (loading) → ready → step, applied, step, … → bake → drain → completed; or a rollback on the same
road: to the source, and where that is not ready while the target is bad, to the newest version that is known to be
good. Where there is no place for both and the policy allows it, requests are held in between: the source leaves first.
Every wait is a condition on the world, a deadline that stands in an event, or evidence that can be read again, so
any controller can go on at any point after a kill -9. The judgement comes from outside (a fold over health samples);
what it leads to is decided here, and written with all its figures.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from turnout.core.instance import ENDED as INSTANCE_ENDED
from turnout.core.instance import SLUMBER, RequestProbe
from turnout.core.judging.judgement import Decision, Judgement
from turnout.core.model import CloseSwitch
from turnout.core.sagas import placement, routes
from turnout.core.sagas.owed import Agenda, Owed, Write
from turnout.core.strategies import STRATEGIES
from turnout.core.strategies.base import Evidence, Finish, GoBack, Hold, Operation, SetWeight, Wait
from turnout.core.switch import (
    FORWARD,
    PAUSABLE,
    UNTOUCHED,
    CompleteSwitch,
    FailSwitch,
    FinishRollback,
    PauseSwitch,
    RecordInstancesRequested,
    RecordStepApplied,
    RecordTargetReady,
    RecordVerdict,
    ReleaseHold,
    ResumeSwitch,
    StartBake,
    StartDrain,
    StartHold,
    StartRollback,
    StartStep,
    SwitchState,
    evolve,
    outcome_of,
)
from turnout.events.switch import TargetReady

if TYPE_CHECKING:
    from turnout.core.instance import InstanceState
    from turnout.core.world import World
    from turnout.events.route import Hold as Held


#: How long a rollback waits for a good answer of the source before it ends without one, seconds: its traffic is back
#: long before, and the model must not be held for ever.
PROOF_S = 60.0
PROBE_AGAIN_S = 5.0
_ON_THE_WAY = ("requested", "loading", "waking")


def agenda(world: World, id: str, now: datetime, judgement: Judgement | None = None) -> Agenda:
    """What the switch owes now, at most one command, and its next deadline.

    ``judgement``: of the switch's newest step; None where nothing is known.
    """
    state: SwitchState = world.state("switch", id)
    if judgement is not None and judgement.step != state.step:
        judgement = None  # of a step that is over
    if trouble := _trouble(world, state, now) or _harm(world, state, judgement, now):
        return Agenda((trouble,))
    if state.paused and (resumed := _stand_still(state, now)) is not None:
        return resumed
    match state.phase:
        case "requested" | "loading":
            return _make_ready(world, state, now)
        case "ready" | "stepped":
            return _next_step(world, state, judgement, now)
        case "holding":
            return _swap(world, state, now)
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


def begin(world: World, state: SwitchState, now: datetime) -> tuple[Write, ...]:
    """What a switch that is being requested owes at once: its first step where the target is ready, else nothing.

    Only for the leader in its turn: whoever writes it must be sure that nobody asks the target to stop meanwhile.
    """
    ready = tuple(i.instance for i in world.ready(state.model, state.target))
    if not ready or placement.missing(world, state.model, state.target):
        return ()
    return _start(world, state, ready, now)


def rollback(
    world: World,
    state: SwitchState,
    cause: str,
    reason: str,
    now: datetime,
    verdict: Judgement | None = None,
    home: str = "",
) -> tuple[Write, ...]:
    """Give the source, or ``home`` in its place, everything: one revision, in one batch with the fact."""
    route, revision = _route(world, state, routes.source_only(home or state.source))
    to = "" if home == state.source else home
    start = StartRollback(state.switch, revision, cause, reason, now, verdict, to)
    return (Write("switch", state.switch, start), route)


def close(state: SwitchState, outcome: str) -> Write:
    """Let the model go; travels with the switch's last event, and before it.

    A batch is stored at once but may be folded event by event: between the two, the model must not look as if its old
    version were still the active one.
    """
    revoke = state.source if state.undo and outcome == "completed" else ""
    return Write("model", state.model, CloseSwitch(state.model, state.switch, outcome, revoke, state.to))


def _trouble(world: World, state: SwitchState, now: datetime) -> Owed | None:
    """A dead target or a passed deadline, wherever the switch stands."""
    late = state.deadline is not None and now >= state.deadline and not state.paused
    limit = _seconds(state.requested_at, state.deadline)
    if state.phase in UNTOUCHED:
        return _load_trouble(world, state, late, limit)
    if state.phase == "holding":
        return _swap_trouble(world, state, late, limit, now)
    if state.alone:
        return None  # placement restores the target, as it does of a first version
    home = routes.way_back(world, state) if state.source else ""
    if state.phase not in FORWARD or not home:
        return None  # nothing to go back to: placement restores what is missing
    if not world.ready(state.model, state.target):
        failed = _failed(world, state)
        why = f"{state.target} has no ready instance left" + (f": {failed.reason}" if failed else "")
        return _owe(state, "rollback", *rollback(world, state, "failure", why, now, home=home))
    if late and state.phase in ("stepping", "stepped") and home == state.source:
        why = f"{state.target} did not carry all traffic within {limit:g} s (max_transition_time)"
        return _owe(state, "rollback", *rollback(world, state, "deadline", why, now))
    return None


def _harm(world: World, state: SwitchState, judgement: Judgement | None, now: datetime) -> Owed | None:
    """Evidence of harm, in a step or in the bake, paused or not: back to what is ready and known, or at least said."""
    if judgement is None or judgement.decision is not Decision.FAIL or not state.source:
        return None
    if state.phase not in ("stepping", "stepped", "baking") or not _judged(state):
        return None
    if home := routes.way_back(world, state):
        back = rollback(world, state, "verdict", judgement.reason, now, judgement, home)
        return _owe(state, "rollback", *back)
    if state.verdict == Decision.FAIL:
        return None  # said already; placement restores the source, and then it is rolled back
    record = RecordVerdict(state.switch, judgement, now)
    return _owe(state, f"verdict.{state.step}", Write("switch", state.switch, record))


def _judged(state: SwitchState) -> bool:
    """Whether the judge may act on this switch."""
    return STRATEGIES[state.strategy].judging(state.parameters).mode == "on"


def _stand_still(state: SwitchState, now: datetime) -> Agenda | None:
    """What a paused switch owes: nothing, until its time is up. None where its phase goes on all the same."""
    if state.phase not in PAUSABLE or state.phase in ("requested", "loading", "stepping"):
        return None  # loading and acknowledging go on; only the next step waits
    if state.paused_until is None:
        return Agenda()
    if now < state.paused_until:
        return Agenda(wake=state.paused_until)
    resume = ResumeSwitch(state.switch, "the pause is over", now)
    pause = "" if state.paused_at is None else f"{state.paused_at.timestamp():.6f}"  # a step may be paused twice
    return Agenda((_owe(state, f"resume.{pause}", Write("switch", state.switch, resume)),))


def _load_trouble(world: World, state: SwitchState, late: bool, limit: float) -> Owed | None:
    if world.ready(state.model, state.target) and not placement.missing(world, state.model, state.target):
        return None
    if failed := _failed(world, state):
        command = FailSwitch(state.switch, failed.stage, failed.reason, failed.log_tail)
    elif world.ready(state.model, state.target):
        return None
    elif state.phase == "ready":
        command = FailSwitch(state.switch, "serving", f"{state.target} was stopped before it got traffic")
    elif stopped := _stopped(world, state):
        command = FailSwitch(
            state.switch, stopped.stage or "starting", f"{stopped.instance} was stopped while it loaded"
        )
    elif refused := world.models[state.model].rejection(state.target):
        command = FailSwitch(state.switch, "checking", f"{state.target} can't be served: {refused.reason}")
    elif state.phase == "requested" and (large := placement.too_large(world, state.model, state.target)):
        command = FailSwitch(state.switch, "placement", large.reason)
    elif late:
        loading = world.instances_of(state.model, state.target, *_ON_THE_WAY)
        unseen = not loading and placement.awaits_inspection(world, state.model, state.target)
        stage = (loading[0].stage or "starting") if loading else "checking" if unseen else "placement"
        why = f"not ready within {limit:g} s (max_transition_time)"
        if unseen:
            why += f"; no worker has said yet what is in the files of {state.target}"
        elif not loading and (full := placement.no_room(world, state.model, state.target)):
            why += "; " + full.reason
        elif not loading and _first(world, state):
            why += f"; its room is left for {state.source}, which has no ready instance and is loaded first"
        command = FailSwitch(state.switch, stage, why)
    else:
        return None
    return _owe(state, "fail", close(state, "failed"), Write("switch", state.switch, command))


def _swap_trouble(world: World, state: SwitchState, late: bool, limit: float, now: datetime) -> Owed | None:
    """The target can't take the source's place: the old one comes back for the requests that wait."""
    if world.ready(state.model, state.target):
        return None
    if failed := _failed(world, state):
        cause, why = "failure", f"{state.target} could not be loaded ({failed.stage}): {failed.reason}"
    elif stopped := _stopped(world, state):
        cause, why = "failure", f"{stopped.instance} was stopped while it loaded"
    elif late:
        cause, why = "deadline", f"{state.target} was not ready within {limit:g} s (max_transition_time)"
    elif not state.instances and now >= _patience(state) and world.ready(state.model, state.source):
        waited = (now - _patience(state)).total_seconds() + (state.hold.wait_s / 2 if state.hold else 0.0)
        cause, why = "deadline", f"{state.source} had requests still after {waited:.0f} s, and others wait for it"
    else:
        return None
    return _owe(state, "rollback", *rollback(world, state, cause, why, now))


def _patience(state: SwitchState) -> datetime:
    """How long the source may take to finish what it has: half the time that others wait at most."""
    since = state.held_at or datetime.max.replace(tzinfo=UTC)
    return since + timedelta(seconds=state.hold.wait_s / 2 if state.hold is not None else 0.0)


def _failed(world: World, state: SwitchState) -> InstanceState | None:
    """The newest failed instance among those that the switch waits for."""
    failed = [
        world.instances[i]
        for i in state.instances
        if (one := world.state("instance", i)).phase == "failed" and one.stage not in SLUMBER
    ]
    return failed[-1] if failed else None


def _stopped(world: World, state: SwitchState) -> InstanceState | None:
    """The newest instance that the switch waited for, if all of them were stopped (their worker left)."""
    waited = [world.state("instance", i) for i in state.instances]
    if _not_woken(world, state):
        return None
    return waited[-1] if waited and all(one.phase in INSTANCE_ENDED for one in waited) else None


def _not_woken(world: World, state: SwitchState) -> bool:
    """All that the switch waited for slept and could not be woken: no fault of the version, which is loaded anew."""
    waited = [world.state("instance", i) for i in state.instances]
    return bool(waited) and all(one.phase == "failed" and one.stage in SLUMBER for one in waited)


def _load_of(state: SwitchState) -> str:
    """Name of the load that is owed: another one for each that was in vain."""
    return ".".join(("load", *state.instances))


def _make_ready(world: World, state: SwitchState, now: datetime) -> Agenda:
    ready = tuple(i.instance for i in world.ready(state.model, state.target))
    under_way = tuple(i.instance for i in world.instances_of(state.model, state.target, *_ON_THE_WAY))
    again = _not_woken(world, state)
    lacking = placement.missing(world, state.model, state.target) if state.phase == "requested" or again else 0
    if ready and not under_way and not lacking:  # all replicas: the first step may give them all traffic
        return Agenda((_owe(state, "ready", *_start(world, state, ready, now)),))
    wait = Agenda(wake=state.deadline)
    if state.phase == "loading" and not again:
        return wait
    if lacking and placement.awaits_inspection(world, state.model, state.target):
        return wait  # a worker looks at its files
    if not again and _may_hold(world, state):
        return Agenda((_start_hold(world, state, now),))
    first = _first(world, state)
    requests = placement.request(world, state.model, state.target, cause=state.switch, count=lacking, first=first)
    if requests is None:
        return wait  # no room yet: placement makes some, or the deadline ends it
    record = RecordInstancesRequested(state.switch, (*under_way, *(one.id for one in requests)))
    return Agenda((_owe(state, _load_of(state), Write("switch", state.switch, record), *requests),))


def _first(world: World, state: SwitchState) -> tuple[tuple[str, str], ...]:
    """(model, version) of a lost source whose room the target must leave: it shares the traffic, and is the way back.

    A target that gets everything at once may take it: that is the way out where the source can't come back.
    """
    shared = any(stage.weight < 100 for stage in STRATEGIES[state.strategy].stages(state.parameters))
    if not shared or not state.source or world.ready(state.model, state.source):
        return ()
    lost = placement.loadable(world, state.model, state.source)
    return ((state.model, state.source),) if lost else ()


def _may_hold(world: World, state: SwitchState) -> bool:
    """Whether requests may wait for the switch, and have to."""
    if state.hold is None or not state.source or state.paused:
        return False
    return placement.must_swap(world, state.model, state.source, state.target)


def _start_hold(world: World, state: SwitchState, now: datetime) -> Owed:
    route, revision = _route(world, state, routes.source_only(""), state.hold)
    start = StartHold(state.switch, revision, pause_s(world, state.model, state.source, state.target), now)
    return _owe(state, "hold", Write("switch", state.switch, start), route)


def pause_s(world: World, model: str, source: str, target: str) -> float | None:
    """Seconds for which requests will wait, as measured; None where the target was never loaded.

    What the source has runs to its end, it leaves, and the target becomes ready. What was never measured of the first
    two counts for nothing.
    """
    load = world.loads.get((model, target))
    if load is None:
        return None
    asleep = world.instances_of(model, target, "asleep")
    ready_s = world.took.get((model, target, "wake"), load.seconds) if asleep else load.seconds
    return round(world.drains.get(model, 0.0) + leaving_s(world, model, source) + ready_s, 3)


def leaving_s(world: World, model: str, version: str) -> float:
    """Seconds that the version's instance takes to leave: as before, else as the slowest of its engine's kind."""
    kind = world.models[model].versions[version].kind
    alike = [
        seconds
        for (name, other), seconds in world.stops.items()
        if name in world.models and (spec := world.models[name].versions.get(other)) is not None and spec.kind == kind
    ]
    return world.stops.get((model, version), max(alike, default=0.0))


def _swap(world: World, state: SwitchState, now: datetime) -> Agenda:
    """The source finishes and leaves (placement sees to it), then the target is loaded in its place."""
    ready = tuple(i.instance for i in world.ready(state.model, state.target))
    if ready and not world.instances_of(state.model, state.target, *_ON_THE_WAY):
        return Agenda((_owe(state, "ready", *_start(world, state, ready, now)),))
    if ready or (state.instances and not _not_woken(world, state)):
        return Agenda(wake=state.deadline)
    lacking = placement.missing(world, state.model, state.target)
    requests = placement.request(world, state.model, state.target, cause=state.switch, count=lacking)
    if requests is None:
        return Agenda(wake=_earliest(_patience(state) if _patience(state) > now else None, state.deadline))
    record = RecordInstancesRequested(state.switch, tuple(one.id for one in requests))
    return Agenda((_owe(state, _load_of(state), Write("switch", state.switch, record), *requests),))


def _start(world: World, state: SwitchState, ready: tuple[str, ...], now: datetime) -> tuple[Write, ...]:
    """The target is ready, and its first step: in one write, so that the disk is waited for once."""
    seconds = _seconds(state.requested_at, now)
    proven = RecordTargetReady(state.switch, ready, seconds, warm=state.phase == "requested")
    then = evolve(state, TargetReady(proven.switch, ready, seconds, proven.warm))
    first = Agenda() if then.paused else _next_step(world, then, None, now)
    return (Write("switch", state.switch, proven), *(write for owed in first.owed for write in owed.writes))


def _next_step(world: World, state: SwitchState, judgement: Judgement | None, now: datetime) -> Agenda:
    if not state.source and state.weight < 100:  # every strategy's steps are between two versions
        return Agenda((_step(world, state, SetWeight(100.0, "nothing serves yet: no steps to take"), None, now),))
    operation = Operation(
        switch=state.switch,
        source=state.source,
        target=state.target,
        step=state.step,
        weight=state.weight,
        since=None if state.step == 0 else state.applied_at,
        parameters=state.parameters,
        promoted=state.promoted,
        full=state.full,
    )
    action = STRATEGIES[state.strategy].execute_switch(operation, Evidence(now, judgement))
    match action:
        case SetWeight():
            passed = judgement if judgement is not None and judgement.decision is Decision.PASS else None
            return Agenda((_step(world, state, action, passed, now),))
        case Wait(_, until):
            return Agenda(wake=_earliest(until, state.deadline))
        case Hold(reason, cause):
            verdict = judgement if cause != "pause" else None
            pause = PauseSwitch(state.switch, cause, reason, now, verdict=verdict)
            # A step may be held again after an operator's pause has come and gone, which has moved its time.
            since = "" if state.applied_at is None else f"{state.applied_at.timestamp():.6f}"
            return Agenda((_owe(state, f"hold.{state.step}.{cause}.{since}", Write("switch", state.switch, pause)),))
        case GoBack(reason, cause):
            if not world.ready(state.model, state.source):
                return Agenda(wake=state.deadline)  # placement restores it
            verdict = judgement if cause in ("verdict", "inconclusive", "concluded") else None
            return Agenda((_owe(state, "rollback", *rollback(world, state, cause, reason, now, verdict)),))
        case Finish():
            return _finish(world, state, now)


def _step(world: World, state: SwitchState, action: SetWeight, passed: Judgement | None, now: datetime) -> Owed:
    step = state.step + 1
    wanted = routes.split(state, action.weight, action.mirror)
    waits = routes.demand(world.models[state.model]) if state.alone else routes.hold(world, state.model)
    route, revision = _route(world, state, wanted, waits)
    start = StartStep(state.switch, step, action.weight, revision, action.reason, now, action.mirror, passed)
    release = _release(state, state.target, now)
    return _owe(state, f"step.{step}", Write("switch", state.switch, start), *release, route)


def _release(state: SwitchState, version: str, now: datetime) -> tuple[Write, ...]:
    """The requests that waited go on, where some had to."""
    if state.held_at is None or state.released:
        return ()
    return (Write("switch", state.switch, ReleaseHold(state.switch, version, now)),)


def _finish(world: World, state: SwitchState, now: datetime) -> Agenda:
    if not state.source or state.alone:
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
    route, revision = _route(world, state, routes.source_only(state.target))
    start = StartDrain(state.switch, state.source, revision, now)
    return _owe(state, "drain", Write("switch", state.switch, start), route)


def _drain(world: World, state: SwitchState, now: datetime) -> Agenda:
    if routes.applied(world, state.model, state.revision) is None:
        return Agenda()
    stays = any(part.version == state.source for part in world.state("route", state.model).parts)  # a rule names it
    if not stays and not routes.drained(world, state.model, state.source):
        return Agenda()
    complete = CompleteSwitch(state.switch, _seconds(state.since, now))
    return Agenda((_owe(state, "complete", close(state, "completed"), Write("switch", state.switch, complete)),))


def _roll_back(world: World, state: SwitchState, now: datetime) -> Agenda:
    """Done when every gateway has acknowledged and the version that serves has answered its golden probe since."""
    gateways = routes.applied(world, state.model, state.revision)
    serving = world.ready(state.model, state.home)
    if not serving and (home := routes.way_back(world, state)):
        again = rollback(world, state, state.cause, state.reason, now, home=home)
        return Agenda((_owe(state, f"rollback.{world.state('route', state.model).revision + 1}", *again),))
    if gateways is None or not serving:
        return Agenda()
    proven = next((one.instance for one in serving if one.sound and one.probed.startswith(f"{state.switch}.")), "")
    given_up = None if state.since is None else state.since + timedelta(seconds=PROOF_S)
    if not proven and (given_up is None or now < given_up):
        return _prove(state, serving[0], now, given_up)
    finish = FinishRollback(state.switch, gateways, _seconds(state.since, now), proven)
    closing = close(state, outcome_of(state))
    release = _release(state, state.home, now)
    return Agenda((_owe(state, "rolled_back", closing, *release, Write("switch", state.switch, finish)),))


def _prove(state: SwitchState, one: InstanceState, now: datetime, given_up: datetime | None) -> Agenda:
    """Ask the version's first instance, and again a while after a bad answer."""
    asked = one.probe.startswith(f"{state.switch}.")
    if asked and one.probed != one.probe:
        return Agenda(wake=given_up)
    again = None if one.probe_at is None else one.probe_at + timedelta(seconds=PROBE_AGAIN_S)
    if asked and again is not None and now < again:
        return Agenda(wake=again)
    number = int(one.probe.rpartition(".")[2]) + 1 if asked else 1
    cause = f"{state.switch}.{number}"
    probe = RequestProbe(one.instance, cause, now)
    return Agenda((Owed(f"probe.{one.instance}.{cause}", (Write("instance", one.instance, probe),), state.switch),))


def _route(
    world: World, state: SwitchState, wanted: routes.Table, waits: Held | msgspec.UnsetType | None = msgspec.UNSET
) -> tuple[Write, int]:
    """The model's route as the switch wants it, and the revision that it will have; ``waits`` as in ``change``."""
    return routes.change(
        world, state.model, wanted, salt=state.switch, drain_s=state.drain_s, cause=state.switch, waits=waits
    )


def _owe(state: SwitchState, what: str, *writes: Write) -> Owed:
    return Owed(f"{state.switch}.{what}", writes, state.switch)


def _earliest(*times: datetime | None) -> datetime | None:
    return min((time for time in times if time is not None), default=None)


def _seconds(start: datetime | None, end: datetime | None) -> float:
    if start is None or end is None:
        return 0.0
    return round(max(0.0, (end - start).total_seconds()), 6)
