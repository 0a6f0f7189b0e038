"""The log in plain sentences, and which model and switch each event belongs to. Knows no terminal and no store."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from turnout.events import subjects
from turnout.events.alert import AlertAcknowledged, AlertRaised, AlertResolved
from turnout.events.envelope import Unknown
from turnout.events.gateway import GatewayJoined, GatewayLeft, GatewayLost, RouteApplied, VersionDrained
from turnout.events.instance import (
    InstanceDraining,
    InstanceFailed,
    InstanceLoading,
    InstanceMeasured,
    InstanceProbed,
    InstanceProbeRequested,
    InstanceReady,
    InstanceRequested,
    InstanceSleepRequested,
    InstanceSlept,
    InstanceStopped,
    InstanceWakeRequested,
    InstanceWoken,
    TierFailed,
)
from turnout.events.model import (
    ActiveVersionChanged,
    DemandEnded,
    DemandSeen,
    EngineSpec,
    EvictionRequested,
    KnownGoodMarked,
    KnownGoodRevoked,
    ModelRegistered,
    PolicyChanged,
    PreloadEnded,
    PreloadRequested,
    ReplicasChanged,
    RulesChanged,
    ServingChanged,
    SwitchAdmitted,
    SwitchClosed,
    VersionDeregistered,
    VersionPinned,
    VersionRegistered,
    VersionRejected,
    VersionUnpinned,
    VersionUnseen,
    VersionValidated,
)
from turnout.events.route import RouteChanged
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
    SwitchFailed,
    SwitchPaused,
    SwitchPromoted,
    SwitchRequested,
    SwitchResumed,
    TargetReady,
    VerdictReached,
)
from turnout.events.units import size
from turnout.events.worker import SpareReleased, WorkerJoined, WorkerKeeps, WorkerLeft, WorkerLost

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turnout.events.envelope import Recorded

_OUTCOMES = {
    "completed": "completed",
    "rolled_back": "was rolled back",
    "aborted": "was aborted",
    "concluded": "ended as planned",
    "failed": "failed",
}
#: Why a switch stands still, by the cause in the event.
_PAUSES = {
    "operator": "paused",
    "pause": "waits to be promoted",
    "inconclusive": "held: the evidence says neither yes nor no",
    "invalid": "held: the comparison is broken",
}
_BAD = (SwitchFailed, VersionRejected, InstanceFailed, WorkerLost, GatewayLost)
_WARNING = (RollbackStarted, RolledBack, SwitchAborted, KnownGoodRevoked, SwitchPaused, TierFailed, HoldStarted)
_GOOD = (
    SwitchCompleted,
    SwitchConcluded,
    ActiveVersionChanged,
    InstanceReady,
    InstanceWoken,
    KnownGoodMarked,
    AlertResolved,
)
_DETAIL = (
    InstanceProbeRequested,
    VersionUnseen,
    RouteApplied,
    VersionDrained,
    InstanceLoading,
    InstanceMeasured,
    SwitchAdmitted,
    SwitchClosed,
    Unknown,
)


class Entry(msgspec.Struct, frozen=True):
    """One line of the audit.

    Attributes:
        sequence: the event's place in the log.
        time: UTC.
        actor: who asked, as in the envelope.
        type: of the event.
        model: served name that it concerns, empty for none.
        switch: id of the switch that it belongs to, empty for none.
        tone: ``good``, ``warning``, ``bad``, ``detail`` or empty: how a reader may mark it.
        sentence: what happened.
    """

    sequence: int
    time: datetime
    actor: str
    type: str
    model: str
    switch: str
    tone: str
    sentence: str


class Audit:
    """Fold that remembers which instance, switch and revision belongs to what. Feed it the log from the start."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._models: dict[str, str] = {}
        self._causes: dict[str, str] = {}
        self._revisions: dict[tuple[str, int], str] = {}

    def entry(self, recorded: Recorded) -> Entry:
        """The line of the log's next event. Never raises."""
        event = recorded.event
        aggregate, id = subjects.parse_event(recorded.subject)
        match event:
            case InstanceRequested(instance, model, version, _, _, cause):
                self._names[instance] = f"{instance} ({model} {version})"
                self._models[instance], self._causes[instance] = model, cause
            case SwitchRequested(switch, model, target):
                self._names[switch] = f"{model} → {target}"
                self._models[switch] = model
            case RouteChanged(model, revision, _, _, _, cause):
                self._revisions[model, revision] = cause
            case AlertRaised(alert):
                self._models[alert], self._causes[alert] = event.model, event.switch
            case _:
                pass
        model = id if aggregate in ("model", "route") else self._models.get(id, "") or getattr(event, "model", "")
        return Entry(
            sequence=recorded.sequence,
            time=recorded.envelope.time,
            actor=recorded.envelope.actor,
            type=recorded.type,
            model=model,
            switch=self._switch(recorded, aggregate, id),
            tone=tone(event),
            sentence=sentence(recorded, self._names),
        )

    def _switch(self, recorded: Recorded, aggregate: str, id: str) -> str:
        event = recorded.event
        match event:
            case RouteChanged() | InstanceRequested():
                cause = event.cause
            case RouteApplied(_, model, revision) | VersionDrained(_, model, _, revision):
                cause = self._revisions.get((model, revision), "")
            case _:
                cause = id if aggregate == "switch" else self._causes.get(id, "") or getattr(event, "switch", "")
        return cause if cause in self._models else getattr(event, "switch", "")


def tone(event: object) -> str:
    """How an event may be marked: ``good``, ``warning``, ``bad``, ``detail`` or empty."""
    if isinstance(event, VerdictReached):
        return {"fail": "bad", "pass": "good"}.get(event.decision, "warning")
    if isinstance(event, InstanceProbed):
        return "detail" if event.ok else "bad"
    if isinstance(event, AlertRaised):
        return {"critical": "bad", "warning": "warning"}.get(event.severity, "")
    if isinstance(event, _BAD) or (isinstance(event, DemandEnded) and event.cause == "failed"):
        return "bad"
    if isinstance(event, _WARNING) or (isinstance(event, VersionDrained) and event.ended):
        return "warning"
    if isinstance(event, _GOOD):
        return "good"
    return "detail" if isinstance(event, _DETAIL) else ""


def sentence(recorded: Recorded, names: Mapping[str, str] | None = None) -> str:
    """What the event says, as one sentence without a full stop.

    Args:
        recorded: the event.
        names: ids of instances and switches → how to call them; an id that is missing stands for itself.
    """
    return _say(recorded, {} if names is None else names)


def who(actor: str) -> str:
    """The actor of an envelope as a person or process would be called: ``ops:alice`` is alice."""
    role, _, name = actor.partition(":")
    if (role, name) == ("ops", "config"):
        return "turnout.toml"
    return name or {"ops": "somebody"}.get(role, role)


def seconds(value: float) -> str:
    """A duration with the digits that matter: ``8 ms``, ``1.25 s``, ``6 s``, ``31 s``, ``12 min``."""
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 9.995:
        return f"{f'{value:.2f}'.rstrip('0').rstrip('.')} s"
    if value < 300:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min"


def _say(recorded: Recorded, names: Mapping[str, str]) -> str:
    event = recorded.event
    match event:
        case Unknown(type, version):
            return f"{type} (version {version}): this turnout is too old to read it"
        case RouteChanged():
            return _say_route(event, names)
        case (
            SwitchRequested()
            | InstancesRequested()
            | HoldStarted()
            | HoldReleased()
            | TargetReady()
            | StepStarted()
            | StepApplied()
            | VerdictReached()
            | SwitchPaused()
            | SwitchResumed()
            | SwitchPromoted()
            | BakeStarted()
            | DrainStarted()
            | SwitchCompleted()
            | RollbackStarted()
            | RolledBack()
            | SwitchAborted()
            | SwitchConcluded()
            | SwitchFailed()
        ):
            return _say_switch(event, recorded, names)
        case (
            InstanceRequested()
            | InstanceLoading()
            | InstanceReady()
            | InstanceMeasured()
            | InstanceProbeRequested()
            | InstanceProbed()
            | InstanceDraining()
            | InstanceStopped()
            | InstanceFailed()
            | TierFailed()
            | InstanceSleepRequested()
            | InstanceSlept()
            | InstanceWakeRequested()
            | InstanceWoken()
        ):
            return _say_instance(event, names)
        case GatewayJoined() | RouteApplied() | VersionDrained() | GatewayLost() | GatewayLeft():
            return _say_gateway(event)
        case WorkerJoined() | WorkerLost() | WorkerLeft() | WorkerKeeps() | SpareReleased():
            return _say_worker(event)
        case AlertRaised() | AlertAcknowledged() | AlertResolved():
            return _say_alert(event)
        case _:
            return _say_model(event, who(recorded.envelope.actor), names)


def _say_model(event: object, actor: str, names: Mapping[str, str]) -> str:
    match event:
        case ModelRegistered(model):
            return f"{actor} made the model {model}"
        case VersionRegistered(model, version, engine, _, note, _, _, parent):
            made = f" from {parent}" if parent else ""
            return f"{actor} registered {model} {version} ({_engine(engine)}){made}{_because(note)}"
        case VersionValidated(model, version, _, seen):
            weights = f", {seen.tensors} tensors, {size(seen.weight_bytes)}" if seen.tensors else ""
            return f"{model} {version} can be loaded, as its files say: content {seen.digest[:12]}{weights}"
        case VersionRejected(model, version, _, _, reason):
            return f"{model} {version} can't be served{_because(reason)}"
        case VersionUnseen(model, version, worker, _, reason):
            return f"{worker} can't look at {model} {version}{_because(reason)}"
        case VersionDeregistered(model, version, reason):
            return f"{actor} deregistered {model} {version}{_because(reason)}"
        case SwitchAdmitted(model, switch, target):
            return f"{model} is reserved for switch {switch} to {target}"
        case SwitchClosed(model, switch, outcome):
            return f"{model} is free for the next switch: {switch} {_OUTCOMES.get(outcome, outcome)}"
        case ActiveVersionChanged(model, version, _, switch) if not switch:
            return f"{model} serves {version} as soon as somebody asks for it"
        case ActiveVersionChanged(model, version, previous):
            return f"{model} serves {version} now" + (f" (before: {previous})" if previous else "")
        case (
            VersionPinned()
            | VersionUnpinned()
            | PreloadRequested()
            | PreloadEnded()
            | EvictionRequested()
            | ReplicasChanged()
        ):
            return _say_residence(event, actor)
        case KnownGoodMarked(model, version):
            return f"{model} {version} is known to be good"
        case KnownGoodRevoked(model, version):
            return f"{model} {version} was undone: no undo returns to it any more"
        case PolicyChanged(model, name, policy):
            return f"{actor} set policy {name} of {model}" if policy else f"{actor} removed policy {name} of {model}"
        case RulesChanged(model, rules):
            named = _several(tuple(rule.name for rule in rules))
            return f"{actor} set the rules of {model}: {named}" if rules else f"{actor} removed the rules of {model}"
        case ServingChanged(model, serving):
            if not serving.on_demand:
                return f"{actor} decided that {model} is always loaded"
            kept = "for ever" if serving.keep_alive_s < 0 else f"for {seconds(serving.keep_alive_s)} after its last use"
            return f"{actor} decided that {model} is loaded on demand and kept {kept}"
        case DemandSeen(model, version, gateway):
            return f"a request waits for {model} at {gateway}: {version} is needed"
        case DemandEnded(model, version, cause, reason):
            if cause == "failed":
                return f"{model} {version} could not be loaded, and those who wait are told{_because(reason)}"
            return f"{model} {version} is not needed any more{_because(reason)}"
        case _:
            return type(event).__name__


def _say_switch(event: object, recorded: Recorded, names: Mapping[str, str]) -> str:
    actor = who(recorded.envelope.actor)
    if isinstance(event, SwitchRequested):
        if event.undo:
            return f"{actor} undid {event.model}: from {event.source} back to {event.target}{_because(event.reason)}"
        how = f"{event.strategy}, policy {event.policy}" if event.policy else event.strategy
        return f"{actor} asked for {event.model} {event.target} ({how}){_because(event.reason)}"
    name = names.get(getattr(event, "switch", ""), getattr(event, "switch", ""))
    match event:
        case InstancesRequested(_, instances):
            return f"{name}: {_several(instances)} must be loaded first"
        case HoldStarted(_, version, revision, allowed_by, expected_s):
            how_long = "of a length never measured" if expected_s is None else f"of about {seconds(expected_s)}"
            by = f"policy {allowed_by} allows" if allowed_by else "the command allows"
            return (
                f"{name}: no place for both, so requests wait from revision {revision} on while {version} makes room, "
                f"a pause {how_long} in which nobody can take over, as {by}"
            )
        case HoldReleased(_, version, took_s):
            return f"{name}: the requests that waited go on to {version}, after a pause of {seconds(took_s)}"
        case TargetReady(_, instances, took_s, warm):
            after = "already" if warm else f"after {seconds(took_s)}"
            return f"{name}: ready {after} ({_several(instances)})"
        case StepStarted(_, step, weight, revision, reason, _, mirror):
            gives = f"gives it copies of {mirror:g} % of the requests" if mirror else f"gives it {weight:g} %"
            return f"{name}: step {step} {gives} with revision {revision}{_because(reason)}"
        case StepApplied(_, step, _, gateways, took_s):
            by = _several(gateways) if gateways else "no gateway, as none is live"
            return f"{name}: step {step} applied in {seconds(took_s)} by {by}"
        case VerdictReached(_, step, decision, _, reason):
            return f"{name}: verdict on step {step} is {decision}{_because(reason)}"
        case SwitchPaused(_, cause, reason, _, until):
            for_s = "" if until is None else f" for {seconds((until - event.at).total_seconds())}"
            return f"{name}: {_PAUSES.get(cause, cause)}{for_s}{_because(reason)}"
        case SwitchResumed(_, reason):
            return f"{name}: goes on{_because(reason)}"
        case SwitchPromoted(_, step, full, reason):
            past = "past every further step, pause and analysis" if full else f"past step {step}"
            return f"{name}: {actor} promoted it {past}{_because(reason)}"
        case BakeStarted(_, until):
            left_s = max(0.0, (until - recorded.envelope.time).total_seconds())
            return f"{name}: bakes for {seconds(left_s)}, the old version stays warm"
        case DrainStarted(_, version, revision):
            return f"{name}: {version} gets nothing new from revision {revision} on and finishes what it has"
        case SwitchCompleted(_, took_s):
            return f"{name}: completed" + (f", drained in {seconds(took_s)}" if took_s else "")
        case RollbackStarted(_, revision, cause, reason, _, to):
            back = f"back to {to}, which is known to be good, as the source is not ready," if to else "back"
            return f"{name}: goes {back} with revision {revision} ({cause}){_because(reason)}"
        case RolledBack(_, gateways, took_s, proof):
            proven = f"; {names.get(proof, proof)} answered its probe" if proof else ""
            return f"{name}: rolled back in {seconds(took_s)} by {_several(gateways) or 'no gateway'}{proven}"
        case SwitchAborted(_, reason):
            return f"{name}: {reason}" if reason.startswith("aborted by") else f"{name}: aborted{_because(reason)}"
        case SwitchConcluded(_, kept, reason):
            return f"{name}: ended as planned, {kept} stays{_because(reason)}"
        case SwitchFailed(_, stage, reason, log_tail):
            return f"{name}: failed in stage {stage}{_because(reason)}{_last_words(log_tail)}"
        case _:
            return type(event).__name__


def _say_instance(event: object, names: Mapping[str, str]) -> str:
    id = str(getattr(event, "instance", ""))
    name = names.get(id, id)
    match event:
        case InstanceRequested(_, _, _, worker, engine, cause, attempt):
            again = f", attempt {attempt}" if attempt > 1 else ""
            why = {"restore": "to restore it", "preload": "ahead of a switch"}.get(cause, f"for {cause}")
            needs = f", needs {size(event.bytes)}" if event.bytes else ""
            return f"{name}: worker {worker} shall load it ({_engine(engine)}) {why}{needs}{again}"
        case InstanceLoading(_, stage, took_s, detail):
            return f"{name}: {stage} after {seconds(took_s)}{_because(detail)}"
        case InstanceReady(_, _, load_s, probe_s, bytes, _, tier):
            memory = f", {size(bytes)}" if bytes else ""
            way = "" if tier == "cold" else f" by the {tier} tier"
            return f"{name}: proven ready{way}, loaded in {seconds(load_s)}, probed in {seconds(probe_s)}{memory}"
        case TierFailed(_, tier, source, reason):
            held = f" (engine of {source})" if source else ""
            return f"{name}: the {tier} tier failed{held}, the next one is taken{_because(reason)}"
        case InstanceSleepRequested(_, level, reason):
            return f"{name}: shall sleep (level {level}){_because(reason)}"
        case InstanceSlept(_, level, took_s, bytes, device_bytes):
            return f"{name}: asleep (level {level}) in {seconds(took_s)}, holds {size(bytes + device_bytes)}"
        case InstanceWakeRequested(_, cause):
            return f"{name}: shall wake {'to restore it' if cause == 'restore' else f'for {cause}'}"
        case InstanceWoken(_, took_s, probe_s):
            return f"{name}: awake in {seconds(took_s)}, proven in {seconds(probe_s)}"
        case InstanceMeasured(_, bytes, device_bytes):
            devices = f", and {size(device_bytes)} on its device" if device_bytes else ""
            return f"{name}: holds {size(bytes)} now{devices}"
        case InstanceProbeRequested():
            return f"{name}: shall answer its golden probe once more"
        case InstanceProbed(_, _, ok, took_s, reason):
            return f"{name}: {'answered' if ok else 'failed'} its golden probe in {seconds(took_s)}{_because(reason)}"
        case InstanceDraining(_, reason, forced_by):
            forced = f", forced by {forced_by}" if forced_by else ""
            return f"{name}: asked to stop{forced}{_because(reason)}"
        case InstanceStopped(_, took_s):
            return f"{name}: stopped in {seconds(took_s)}"
        case InstanceFailed(_, stage, reason, log_tail, exit_code):
            code = "" if exit_code is None else f" (exit code {exit_code})"
            return f"{name}: failed in stage {stage}{code}{_because(reason)}{_last_words(log_tail)}"
        case _:
            return type(event).__name__


def _say_route(event: RouteChanged, names: Mapping[str, str]) -> str:
    shares = ", ".join(
        f"{split.version} {split.weight:g} % ({_several(tuple(e.instance for e in split.endpoints))})"
        for split in event.splits
    )
    why = f" ({event.cause})" if event.cause == "repair" else ""
    copies = "".join(f", copies of {mirror.percent:g} % to {mirror.version}" for mirror in event.mirrors)
    nothing = "requests wait" if event.hold is not None else "nothing serves it"
    return f"{event.model} is routed by revision {event.revision}{why}: {shares or nothing}{copies}"


def _say_gateway(event: object) -> str:
    match event:
        case GatewayJoined(gateway, address):
            return f"gateway {gateway} takes requests at {address}"
        case RouteApplied(gateway, model, revision):
            return f"gateway {gateway} routes {model} by revision {revision}"
        case VersionDrained(gateway, model, version, revision, ended):
            cut = f"; {ended} had to be ended" if ended else ""
            return f"gateway {gateway} has finished all requests of {model} {version} (revision {revision}){cut}"
        case GatewayLost(gateway, silent_s):
            return f"gateway {gateway} was silent for {seconds(silent_s)}: not waited for any more"
        case GatewayLeft(gateway):
            return f"gateway {gateway} stopped"
        case _:
            return type(event).__name__


def _say_residence(
    event: VersionPinned | VersionUnpinned | PreloadRequested | PreloadEnded | EvictionRequested | ReplicasChanged,
    actor: str,
) -> str:
    name = f"{event.model} {event.version}"
    match event:
        case VersionPinned():
            return f"{actor} pinned {name}: it is kept loaded{_because(event.reason)}"
        case VersionUnpinned():
            return f"{actor} unpinned {name}"
        case PreloadRequested():
            return f"{actor} wishes {name} to be preloaded (priority {event.priority}){_because(event.reason)}"
        case PreloadEnded(_, _, outcome, reason):
            words = {"ready": "is preloaded", "failed": "could not be preloaded"}
            return f"{name} {words.get(outcome, 'is not to be preloaded any more')}{_because(reason)}"
        case EvictionRequested():
            return f"{actor} lets idle instances of {name} go{_because(event.reason)}"
        case ReplicasChanged(_, _, replicas):
            return f"{actor} wants {replicas} instance{'' if replicas == 1 else 's'} of {name}"


def _say_worker(event: object) -> str:
    match event:
        case WorkerJoined(worker, host, engines, devices, capacity):
            on = f" with {', '.join(devices)}" if devices else ""
            places = "1 place" if capacity == 1 else f"{capacity} places"
            memory = f" and {size(event.memory_bytes)}" if event.memory_bytes else ""
            return f"worker {worker} on {host}{on} offers {places}{memory} for {', '.join(engines)}"
        case WorkerLost(worker, silent_s):
            return f"worker {worker} was silent for {seconds(silent_s)}: taken for lost"
        case WorkerLeft(worker):
            return f"worker {worker} stopped"
        case WorkerKeeps(worker, kept):
            names = ", ".join(f"{engine.role} {engine.name} ({size(engine.bytes)})" for engine in kept)
            return f"worker {worker} keeps {names or 'no engine'} beside its instances"
        case SpareReleased(worker, name, reason):
            return f"worker {worker} is to end its spare {name}{_because(reason)}"
        case _:
            return type(event).__name__


def _say_alert(event: AlertRaised | AlertAcknowledged | AlertResolved) -> str:
    match event:
        case AlertRaised(alert, severity, _, summary):
            return f"{severity} alert {alert}: {summary}"
        case AlertAcknowledged(alert, by, note):
            return f"{by} has seen alert {alert}{_because(note)}"
        case AlertResolved(alert, reason):
            return f"alert {alert} is over{_because(reason)}"


def _engine(engine: EngineSpec) -> str:
    source = engine.path or engine.url or " ".join(engine.command)
    if engine.adapter:
        return f"{engine.kind}, adapter {engine.adapter} on {source}"
    return f"{engine.kind}, {source}" if source else engine.kind


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _last_words(log_tail: tuple[str, ...]) -> str:
    """The engine's last line, where it says more than white space."""
    last = next((line.strip() for line in reversed(log_tail) if line.strip()), "")
    return f' (engine: "{last}")' if last else ""


def _several(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
