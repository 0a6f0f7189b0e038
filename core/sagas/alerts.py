"""The alerts saga: which alerts should stand now, from the world and the health findings. Pure; knows no sink.

An alert is one key for one trouble: while it stands, the same trouble is no news. Two sorts:

- A condition (``alert.CONDITIONS``) stands while it can be seen. What was measured stands for HOLD_S at least: a value
  near its ceiling must not ring again and again.
- What has happened (a rollback, a failed switch, a lost process) stands until somebody acknowledges it or until it is
  made good: the model's next switch has ended in another way, the process is back, left or replaced. The same occasion
  is never raised twice.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from turnout.core.alert import AlertState, RaiseAlert, ResolveAlert
from turnout.core.health import Finding  # noqa: TC001  part of a public signature
from turnout.core.judging.judgement import Decision
from turnout.core.sagas import placement, routes
from turnout.core.sagas.owed import Agenda, Owed, Write
from turnout.core.switch import ENDED, FORWARD, SwitchState
from turnout.core.world import SOUND_S
from turnout.events.gateway import GatewayLost
from turnout.events.switch import RolledBack, SwitchFailed
from turnout.events.worker import WorkerLost

if TYPE_CHECKING:
    from turnout.core.model import ModelState
    from turnout.core.world import World

#: A measured condition stands for so long at least, seconds.
HOLD_S = 300.0
_MEASURED = frozenset(("error_rate", "latency_p95", "judging_error"))
#: Failed loads in a row that are worth a person.
FAILURES = 3
#: A failed load says something about now for so long, seconds.
RECENT_S = 3600.0
#: A lost process that never came back stays a matter for so long, seconds.
GONE_S = 86400.0

#: Kinds that this saga raises, and so may end.
KINDS = frozenset(
    (
        *("switch_rolled_back", "switch_failed", "switch_held", "source_not_ready"),
        *("version_unhealthy", "error_rate", "latency_p95", "judging_error", "instance_failed"),
        *("gateway_lost", "worker_lost"),
    )
)
_FINDING_HINTS = {
    "latency_p95": "compare the versions: turnout health {model}; the ceiling is alert_thresholds.latency_p95",
    "judging_error": "the switch holds meanwhile; look at its evidence: turnout get {model}",
}


class _Trouble(msgspec.Struct, frozen=True):
    """An alert that should stand. ``since``: the log's sequence of what has happened, 0 for a condition."""

    alert: RaiseAlert
    since: int = 0


def agenda(world: World, findings: tuple[Finding, ...], now: datetime) -> Agenda:
    """Alerts to raise and to resolve now, and when to look again.

    Args:
        world: read only.
        findings: what the health evidence says now. A finding of another kind than KINDS is not looked at.
        now: UTC.
    """
    owed: list[Owed] = []
    wakes: list[datetime] = []
    troubles = {trouble.alert.alert: trouble for trouble in _troubles(world, findings, now, wakes)}
    for key, trouble in troubles.items():
        newest = world.raisings.get(key)
        seen = newest is not None and trouble.since and newest.sequence > trouble.since
        if key not in world.raised and not seen:
            owed.append(raising(world, trouble.alert))
    for key in sorted(world.raised):
        state: AlertState = world.state("alert", key)
        trouble_now = troubles.get(key)
        if state.kind not in KINDS or not (reason := _over(world, state, trouble_now)):
            continue
        until = world.raisings[key].envelope.time + timedelta(seconds=HOLD_S)
        if state.kind in _MEASURED and trouble_now is None and now < until:
            wakes.append(until)
            continue
        write = Write("alert", key, ResolveAlert(key, reason))
        owed.append(Owed(f"alert.{key}.{state.times}.resolved", (write,), state.switch or key))
    later = [wake for wake in wakes if wake > now]
    return Agenda(tuple(owed), min(later) if later else None)


def raising(world: World, alert: RaiseAlert) -> Owed:
    """The command that raises it for the next time."""
    state: AlertState = world.state("alert", alert.alert)
    write = Write("alert", alert.alert, alert)
    return Owed(f"alert.{alert.alert}.{state.times + 1}.raised", (write,), alert.switch or alert.alert)


def _over(world: World, state: AlertState, trouble: _Trouble | None) -> str:
    """Why a raised alert is over, or told anew; empty where it stands as it is."""
    if trouble is None:
        return _ending(world, state)
    if trouble.alert.switch != state.switch:
        return f"switch {trouble.alert.switch} came after {state.switch or 'it'}"
    if not trouble.since and trouble.alert.severity != state.severity:
        return f"it is {trouble.alert.severity} now"
    return ""


def _ending(world: World, state: AlertState) -> str:
    """How the trouble of an alert has ended."""
    match state.kind:
        case "switch_rolled_back" | "switch_failed":
            ended = world.ended.get(state.model)
            if ended is None:
                return "no switch is known any more"
            newest: SwitchState = world.state("switch", getattr(ended.event, "switch", ""))
            return f"switch {newest.switch} to {newest.target} is {newest.phase.replace('_', ' ')}"
        case "switch_held" | "source_not_ready":
            switch: SwitchState = world.state("switch", state.switch)
            if switch.phase in ENDED:
                return f"switch {state.switch} is {switch.phase.replace('_', ' ')}"
            return f"switch {state.switch} goes on"
        case "gateway_lost" | "worker_lost":
            return "it is back, has left, was replaced, or nothing depends on it any more"
        case "instance_failed" | "version_unhealthy":
            if world.ready(state.model, state.version):
                return f"{state.model} {state.version} is well again"
            return f"nothing needs {state.model} {state.version} any more"
        case _:
            return f"nothing of it was seen for a while, or nothing routes to {state.model} {state.version} any more"


def _troubles(world: World, findings: tuple[Finding, ...], now: datetime, wakes: list[datetime]) -> list[_Trouble]:
    """Everything that is wrong now; the first of several with one key counts."""
    found: list[_Trouble] = []
    for name in sorted(world.models):
        model: ModelState = world.state("model", name)
        if model.switch:
            found.extend(_of_running(world, world.state("switch", model.switch), now))
        if name in world.ended:
            found.extend(_of_ended(world, name))
        holds = bool(model.switch) and world.state("switch", model.switch).alone
        for version in _needed(model, away=model.active if holds else ""):
            found.extend(_of_version(world, name, version, now, wakes))
    found.extend(_of_finding(world, finding) for finding in findings if finding.kind in KINDS)
    for kind, id in sorted(world.lost):
        found.extend(_of_gateway(world, id, now) if kind == "gateway" else _of_worker(world, id, now))
    first: dict[str, _Trouble] = {}
    for trouble in found:
        first.setdefault(trouble.alert.alert, trouble)
    return list(first.values())


def _room_for(world: World, state: SwitchState) -> str:
    """What keeps the source from being ready, and what a person may do where it is the target itself."""
    ready = world.ready(state.model, state.target)
    missing = placement.missing(world, state.model, state.source)
    if not missing or not ready or not (full := placement.no_room(world, state.model, state.source)):
        return f"; see what keeps it: turnout get {state.model}"
    end = f"turnout stop {ready[0].instance} --force --reason TEXT"
    return f", and {full.reason}; start another worker, or give it the room of {state.target}: {end}"


def _of_running(world: World, state: SwitchState, now: datetime) -> list[_Trouble]:
    found: list[_Trouble] = []
    model, id = state.model, state.switch
    if state.paused in ("inconclusive", "invalid"):
        why = {
            "inconclusive": "the evidence says neither yes nor no",
            "invalid": "the comparison itself is broken",
        }[state.paused]
        found.append(
            _Trouble(
                RaiseAlert(
                    f"switch_held.{model}",
                    "warning",
                    "switch_held",
                    f"{model}: switch {id} to {state.target} is held at step {state.step} ({state.weight:g} %): {why}",
                    f"look at the evidence: turnout get {model}; then turnout promote {id} --step {state.step}, or "
                    f"turnout abort {id}",
                    model,
                    state.target,
                    id,
                )
            )
        )
    if why := _wants_back(world, state, now):
        found.append(
            _Trouble(
                RaiseAlert(
                    f"source_not_ready.{model}",
                    "critical",
                    "source_not_ready",
                    f"{model}: switch {id} must go back to {state.source} ({why}), "
                    f"and neither {state.source} nor an older version has a ready instance; "
                    f"{state.target} keeps what it has",
                    f"it goes back as soon as {state.source} is ready{_room_for(world, state)}",
                    model,
                    state.source,
                    id,
                )
            )
        )
    return found


def _wants_back(world: World, state: SwitchState, now: datetime) -> str:
    """Why a switch must return to a source that isn't there; empty where it need not, or can."""
    if not state.source or world.ready(state.model, state.source):
        return ""
    stranded = not routes.way_back(world, state)
    if state.phase == "rolling_back":
        return (state.reason or state.cause) if stranded else ""
    if state.phase not in FORWARD:
        return ""
    if state.verdict == Decision.FAIL and stranded:
        return "the judge has found harm"
    if not world.ready(state.model, state.target) and stranded:
        return f"{state.target} has no ready instance left"
    late = state.deadline is not None and now >= state.deadline and not state.paused
    return "its time is up" if late and state.phase in ("stepping", "stepped") else ""


def _of_ended(world: World, model: str) -> list[_Trouble]:
    ended = world.ended[model]
    state: SwitchState = world.state("switch", getattr(ended.event, "switch", ""))
    id = state.switch
    retry = f"look at it: turnout status {id}; try again with: turnout retry {id}"
    match ended.event:
        case RolledBack(_, _, _, proof) if state.cause != "undo" or not proof:
            severity, what = "warning", f"was rolled back to {state.home}: {state.reason}"
            if state.to:
                severity, retry = "critical", f"see what became of {state.source}: turnout log {model}"
                what += f"; {state.source} had no ready instance"
            if not proof:
                severity, retry = "critical", f"check {state.home}: turnout health {model}"
                what += f"; {state.home} has all traffic and has not answered its golden probe since"
            kind = "switch_rolled_back"
        case SwitchFailed(_, stage, reason):
            severity, what, kind = "warning", f"failed in stage {stage}: {reason}", "switch_failed"
        case _:
            return []
    summary = f"{model}: switch {id} to {state.target} {what}"
    alert = RaiseAlert(f"{kind}.{model}", severity, kind, summary, retry, model, state.target, id)
    return [_Trouble(alert, ended.sequence)]


def _needed(model: ModelState, away: str) -> tuple[str, ...]:
    """Versions that requests may go to outside a switch; a running switch tells of its target itself.

    ``away``: the version that makes room for its successor while requests wait.
    """
    needed = [model.active] if model.active != away else []
    return tuple(dict.fromkeys((*needed, *(rule.version for rule in model.rules if rule.version))))


def _of_version(world: World, model: str, version: str, now: datetime, wakes: list[datetime]) -> list[_Trouble]:
    """Of a needed version: nothing serves it, or it fails again and again."""
    found: list[_Trouble] = []
    ready = world.ready(model, version)
    failures = world.failures.get((model, version))
    age_s = RECENT_S if failures is None else (now - failures.last).total_seconds()
    recent = age_s < RECENT_S
    if not ready and any(worker.live for worker in world.workers.values()):
        # A model that is loaded on demand may be at zero, and waits for its turn where others have the places.
        on_demand = world.models[model].serving.on_demand
        why = "its last one failed" if recent else "" if on_demand else _no_place(world, model, version)
        if why:
            found.append(
                _Trouble(
                    RaiseAlert(
                        f"version_unhealthy.{model}.{version}",
                        "critical",
                        "version_unhealthy",
                        f"{model} {version} has no ready instance: {why}",
                        f"see what happened: turnout log {model}; go back with: turnout undo {model}",
                        model,
                        version,
                    )
                )
            )
    if failures is not None and failures.count >= FAILURES and recent and (not ready or age_s < SOUND_S):
        wakes.append(failures.last + timedelta(seconds=SOUND_S))
        found.append(
            _Trouble(
                RaiseAlert(
                    f"instance_failed.{model}.{version}",
                    "warning",
                    "instance_failed",
                    f"instances of {model} {version} failed {failures.count} times in a row",
                    f"see why: turnout log {model}; turnout goes on trying",
                    model,
                    version,
                )
            )
        )
    return found


def _no_place(world: World, model: str, version: str) -> str:
    """Why the version can't be loaded anywhere; empty where it is on the way or can be."""
    if version not in world.models[model].versions:
        return ""
    full = placement.no_room(world, model, version)
    return "" if full is None else full.reason


def _of_finding(world: World, finding: Finding) -> _Trouble:
    model, version = finding.model, finding.version
    serves = world.state("model", model).active == version
    severity = "critical" if serves and finding.kind in ("error_rate", "version_unhealthy") else "warning"
    hint = _FINDING_HINTS.get(
        finding.kind, "compare the versions: turnout health {model}; go back with: turnout undo {model}"
    ).format(model=model)
    key = f"{finding.kind}.{model}.{version}"
    return _Trouble(RaiseAlert(key, severity, finding.kind, finding.summary, hint, model, version))


def _of_gateway(world: World, id: str, now: datetime) -> list[_Trouble]:
    lost = world.lost["gateway", id]
    if not isinstance(lost.event, GatewayLost) or (now - lost.envelope.time).total_seconds() >= GONE_S:
        return []
    heard = lost.envelope.time - timedelta(seconds=lost.event.silent_s)
    address = world.gateways[id].address
    if any(joined > heard and world.gateways[other].address == address for other, joined in world.joined.items()):
        return []  # the process that took its place
    left = len(world.live_gateways)
    others = f"{left} other{'s are' if left > 1 else ' is'} live" if left else "no other one is live"
    alert = RaiseAlert(
        f"gateway_lost.{id}",
        "warning" if left else "critical",
        "gateway_lost",
        f"gateway {id} at {address} was silent for {lost.event.silent_s:g} s; {others}",
        "if it still serves, it can't reach NATS and routes by its last table: check both; else start it again",
    )
    return [_Trouble(alert, lost.sequence)]


def _of_worker(world: World, id: str, now: datetime) -> list[_Trouble]:
    lost = world.lost["worker", id]
    if not isinstance(lost.event, WorkerLost) or (now - lost.envelope.time).total_seconds() >= GONE_S:
        return []
    here = [world.instances[one] for one in sorted(world.alive) if world.instances[one].worker == id]
    if not here:
        return []
    names = ", ".join(dict.fromkeys(f"{one.model} {one.version}" for one in here))
    alert = RaiseAlert(
        f"worker_lost.{id}",
        "warning",
        "worker_lost",
        f"worker {id} was silent for {lost.event.silent_s:g} s; its engines ({names}) may still serve, unwatched",
        "start it again in its folder: it takes its engines over; elsewhere they are replaced where there is room",
    )
    return [_Trouble(alert, lost.sequence)]
