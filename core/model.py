"""Decisions of one model: which versions exist, which is active, whether a switch may start."""

from __future__ import annotations

import hashlib
import math
import re
from datetime import datetime

import msgspec

from turnout.core import policy, residence, rules, serving
from turnout.core.decider import Rejected
from turnout.core.residence import Residence, ResidenceCommand
from turnout.events.model import (
    UNSEEN,
    ActiveVersionChanged,
    Contents,
    DemandEnded,
    DemandSeen,
    EngineSpec,
    EvictionRequested,
    Inspection,
    KnownGoodMarked,
    KnownGoodRevoked,
    ModelEvent,
    ModelRegistered,
    PolicyChanged,
    PreloadEnded,
    PreloadRequested,
    ReplicasChanged,
    RulesChanged,
    Serving,
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
from turnout.events.route import Rule

ENGINE_KINDS = ("vllm", "openai", "fake")

_MODEL = re.compile(r"[^\s\x00-\x1f\x7f@]{1,128}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_METRIC = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
#: Tags and metrics of one version: they travel in one event.
_WORDS_MOST = 32


class ModelState(msgspec.Struct, frozen=True):
    """What is registered, what serves, what is known to be good (newest last), the switch that runs, and what was set.

    Attributes:
        validated: version → what its files say. A version without files has none.
        rejected: version → why its files can't be served.
        unseen: version → workers that can't see its files, with what they said, as long as nobody has looked at them.
        policies: name → as it was given.
        rules: in their order.
        serving: always loaded, or on demand.
        wanted: a model that is served on demand is in use, since ``wanted_at`` (UTC, None where a switch loaded it).
        failed: how often it could not be loaded when it was asked for; ``why``: the last time.
        left_at: when it made room for another model (UTC): what was ready before that leaves, whoever asks for it.
        residence: what shall be loaded.
    """

    model: str = ""
    versions: dict[str, EngineSpec] = {}
    validated: dict[str, Inspection] = {}
    rejected: dict[str, VersionRejected] = {}
    unseen: dict[str, dict[str, VersionUnseen]] = {}
    active: str = ""
    known_good: tuple[str, ...] = ()
    switch: str = ""
    target: str = ""
    policies: dict[str, dict[str, object]] = {}
    rules: tuple[Rule, ...] = ()
    residence: Residence = Residence()
    serving: Serving = Serving()
    wanted: bool = False
    wanted_at: datetime | None = None
    failed: int = 0
    why: str = ""
    left_at: datetime | None = None

    @property
    def at_zero(self) -> bool:
        """Whether nothing of it needs to be loaded until somebody asks."""
        return self.serving.on_demand and not self.wanted

    @property
    def undo_target(self) -> str:
        """The newest version that is known to be good and not active; empty where there is none."""
        return next((v for v in reversed(self.known_good) if v != self.active), "")

    def awaits_inspection(self, version: str) -> bool:
        """Whether it has files and nobody has said yet what is in them."""
        engine = self.versions.get(version)
        decided = version in self.validated or version in self.rejected
        return engine is not None and has_files(engine) and not decided

    def rejection(self, version: str) -> VersionRejected | None:
        """Why it may not be loaded. What has served well is not refused: a new check must not undo an old proof."""
        return None if version in self.known_good else self.rejected.get(version)


initial = ModelState()


def evolve(state: ModelState, event: ModelEvent) -> ModelState:
    """State after the event."""
    replace = msgspec.structs.replace
    match event:
        case ModelRegistered():
            return replace(state, model=event.model)
        case VersionRegistered():
            return replace(
                _uninspected(state, event.version),
                model=event.model,
                versions={**state.versions, event.version: event.engine},
            )
        case VersionValidated():
            validated = {**state.validated, event.version: event.inspection}
            return replace(_uninspected(state, event.version), validated=validated)
        case VersionRejected():
            return replace(_uninspected(state, event.version), rejected={**state.rejected, event.version: event})
        case VersionUnseen():
            said = {**state.unseen.get(event.version, {}), event.worker: event}
            return replace(state, unseen={**state.unseen, event.version: said})
        case VersionDeregistered():
            versions = {name: engine for name, engine in state.versions.items() if name != event.version}
            return replace(
                _uninspected(state, event.version),
                versions=versions,
                known_good=_without(state.known_good, event.version),
                residence=residence.forget(state.residence, event.version),
            )
        case SwitchAdmitted():
            return replace(state, switch=event.switch, target=event.target)
        case SwitchClosed():
            return replace(state, switch="", target="")
        case ActiveVersionChanged():
            if not event.switch:
                return replace(state, active=event.version)
            return replace(state, active=event.version, wanted=True)
        case KnownGoodMarked():
            return replace(state, known_good=(*_without(state.known_good, event.version), event.version))
        case KnownGoodRevoked():
            return replace(state, known_good=_without(state.known_good, event.version))
        case PolicyChanged():
            others = {other: one for other, one in state.policies.items() if other != event.name}
            return replace(state, policies={**others, event.name: event.policy} if event.policy else others)
        case RulesChanged():
            return replace(state, rules=event.rules)
        case ServingChanged():
            return replace(state, serving=event.serving)
        case DemandSeen():
            return replace(state, wanted=True, wanted_at=event.at)
        case DemandEnded():
            if event.cause != "failed":
                left_at = event.at if event.cause == "room" else state.left_at
                return replace(state, wanted=False, wanted_at=None, left_at=left_at)
            return replace(state, wanted=False, wanted_at=None, failed=state.failed + 1, why=event.reason)
        case (
            VersionPinned()
            | VersionUnpinned()
            | PreloadRequested()
            | PreloadEnded()
            | EvictionRequested()
            | ReplicasChanged()
        ):
            return replace(state, residence=residence.evolve(state.residence, event))


class RegisterVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Add an immutable version; the first one makes the model. Fields as in the event ``VersionRegistered``.

    ``replicas``: its instances while it serves, also of a version that is registered already; None leaves it as it is.
    """

    model: str
    version: str
    engine: EngineSpec
    note: str = ""
    tags: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    parent: str = ""
    trust_architecture: bool = False
    replicas: int | None = None


class ReportInspected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker has read a version's files, or could not.

    Attributes:
        settings: digest of the engine settings by which it looked: an answer about others is out of date.
        inspection: what the files say; None where they can't be served, and ``code``, ``reason``, ``hint`` say why.
        contents: what a comparison reads, where they can.
    """

    model: str
    version: str
    worker: str
    settings: str
    inspection: Inspection | None = None
    code: str = ""
    reason: str = ""
    hint: str = ""
    contents: Contents = Contents()


class NoteUnseen(msgspec.Struct, frozen=True):
    """A worker can't see the version's files, and another one has not looked yet."""

    model: str
    version: str
    worker: str
    settings: str
    code: str
    reason: str


class DeregisterVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Take a version away that nothing uses. ``reason``: why, for the log."""

    model: str
    version: str
    reason: str = ""


class AdmitSwitch(msgspec.Struct, frozen=True):
    """Reserve the model for a switch."""

    model: str
    switch: str
    target: str


class CloseSwitch(msgspec.Struct, frozen=True):
    """Let the model go. ``completed`` makes the switch's target active and known good; an undo revokes ``revoke``.

    ``active``: the version that serves from now on where a rollback could not go back to the source; empty else.
    """

    model: str
    switch: str
    outcome: str
    revoke: str = ""
    active: str = ""


class SetPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name a way to switch; an empty policy takes the name away. Running switches keep what they began with."""

    model: str
    name: str
    policy: dict[str, object]


class SetRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """These are the model's rules from now on, all of them."""

    model: str
    rules: tuple[Rule, ...]


class SetServing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Serve the model like this. ``version``: what a model loads on demand that serves none yet; empty: its first."""

    model: str
    serving: Serving
    version: str = ""


class SeeDemand(msgspec.Struct, frozen=True):
    """A request waits at a gateway for a model that is served on demand."""

    model: str
    gateway: str
    at: datetime


class EndDemand(msgspec.Struct, frozen=True):
    """A model that is served on demand is not needed any more. ``cause`` as in ``DemandEnded``."""

    model: str
    cause: str
    reason: str
    at: datetime


ModelCommand = (
    RegisterVersion
    | ReportInspected
    | NoteUnseen
    | DeregisterVersion
    | AdmitSwitch
    | CloseSwitch
    | SetPolicy
    | SetRules
    | SetServing
    | SeeDemand
    | EndDemand
    | ResidenceCommand
)


def decide(state: ModelState, command: ModelCommand) -> tuple[ModelEvent, ...] | Rejected:
    """Whether the registry allows it."""
    match command:
        case RegisterVersion():
            return _register(state, command)
        case _ if not state.model:
            return unknown_model(command.model)
        case ReportInspected():
            return _inspected(state, command)
        case NoteUnseen():
            return _unseen(state, command)
        case DeregisterVersion(_, version, reason):
            return _deregister(state, version, reason)
        case AdmitSwitch():
            return _admit(state, command)
        case CloseSwitch():
            return _close(state, command)
        case SetPolicy():
            return _set_policy(state, command)
        case SetRules():
            return _set_rules(state, command)
        case SetServing():
            return _set_serving(state, command)
        case SeeDemand(model, gateway, at):
            return _see_demand(state, model, gateway, at)
        case EndDemand(model, cause, reason, at):
            if not state.serving.on_demand or not state.wanted or state.switch:
                return ()
            return (DemandEnded(model, state.active, cause, reason, at),)
        case _:
            return residence.decide(state.residence, command, frozenset(state.versions))


def unknown_model(model: str) -> Rejected:
    """No such served name."""
    return Rejected(
        "model_unknown",
        f"no model {model!r} is registered",
        f"register a version first: turnout register {model} VERSION --engine …",
    )


def digest(engine: EngineSpec) -> str:
    """SHA-256 (hex) of the engine's canonical JSON: equal digests mean the same settings."""
    return hashlib.sha256(msgspec.json.encode(engine, order="deterministic")).hexdigest()


def has_files(engine: EngineSpec) -> bool:
    """Whether there is something on a worker's disk to look at before it is loaded."""
    return bool(engine.path or engine.adapter)


def _register(state: ModelState, command: RegisterVersion) -> tuple[ModelEvent, ...] | Rejected:
    model, version, engine = command.model, command.version, command.engine
    if not _MODEL.fullmatch(model):
        return Rejected(
            "name_invalid",
            f"{model!r} can't be a served name",
            "use up to 128 characters without blanks, control characters or '@'",
        )
    if not _VERSION.fullmatch(version):
        return Rejected(
            "name_invalid",
            f"{version!r} can't be a version's name",
            "use up to 64 letters, digits and . _ + -, starting with a letter or digit",
        )
    known = state.versions.get(version)
    again = state.rejection(version) is not None  # nothing has ever run of it, and its files may be mended by now
    replicas = _replicas(state, command)
    if isinstance(replicas, Rejected) or (known == engine and not again):
        return replicas
    if known is not None and not again:
        return Rejected(
            "version_exists",
            f"{model} {version} is registered with other settings, and a version never changes",
            "register the new settings under another version name",
        )
    if problem := _engine_problem(engine):
        return problem
    if problem := _about_problem(state, command):
        return problem
    added = VersionRegistered(
        model,
        version,
        engine,
        digest(engine),
        command.note,
        command.tags,
        command.metrics,
        command.parent,
        command.trust_architecture,
    )
    return (added, *replicas) if state.model else (ModelRegistered(model), added, *replicas)


def _replicas(state: ModelState, command: RegisterVersion) -> tuple[ModelEvent, ...] | Rejected:
    if command.replicas is None:
        return ()
    wanted = residence.SetReplicas(command.model, command.version, command.replicas)
    return residence.decide(state.residence, wanted, frozenset((*state.versions, command.version)))


def _about_problem(state: ModelState, command: RegisterVersion) -> Rejected | None:
    """What is wrong with tags, metrics or parent."""
    if len(command.tags) > _WORDS_MOST:
        return Rejected("tag_invalid", f"{len(command.tags)} tags are too many", f"give at most {_WORDS_MOST}")
    if len(command.metrics) > _WORDS_MOST:
        return Rejected("metric_invalid", f"{len(command.metrics)} metrics are too many", f"give at most {_WORDS_MOST}")
    for tag in command.tags:
        if not _VERSION.fullmatch(tag):
            return Rejected(
                "tag_invalid",
                f"{tag!r} can't be a tag",
                "use up to 64 letters, digits and . _ + -, starting with a letter or digit",
            )
    for name, value in command.metrics.items():
        if not _METRIC.fullmatch(name) or not math.isfinite(value):
            return Rejected(
                "metric_invalid",
                f"metric {name!r} is {value}",
                "give a name of up to 64 characters and a number: accuracy=0.71",
            )
    if command.parent and (command.parent == command.version or command.parent not in state.versions):
        known = ", ".join(v for v in state.versions if v != command.version) or "none"
        return Rejected(
            "parent_unknown",
            f"{command.model} has no other version {command.parent!r} to come from (registered: {known})",
            "name a registered version, or leave the parent out",
        )
    return None


def _inspected(state: ModelState, report: ReportInspected) -> tuple[ModelEvent, ...] | Rejected:
    if _out_of_date(state, report) or report.version in state.validated:
        return ()
    if report.inspection is not None:
        refused = state.rejected.get(report.version)
        if refused is not None and refused.code not in UNSEEN:
            return ()
        return (VersionValidated(state.model, report.version, report.worker, report.inspection, report.contents),)
    if not report.code or not report.reason:
        return Rejected("request_invalid", "a rejection without code and reason", "say why the files can't be served")
    refused = state.rejected.get(report.version)
    if refused is not None and (refused.code not in UNSEEN or report.code in UNSEEN):
        return ()
    return (VersionRejected(state.model, report.version, report.worker, report.code, report.reason, report.hint),)


def _unseen(state: ModelState, note: NoteUnseen) -> tuple[ModelEvent, ...]:
    known = not state.awaits_inspection(note.version) or note.worker in state.unseen.get(note.version, {})
    if known or _out_of_date(state, note):
        return ()
    return (VersionUnseen(state.model, note.version, note.worker, note.code, note.reason),)


def _out_of_date(state: ModelState, report: ReportInspected | NoteUnseen) -> bool:
    """Whether it speaks of a version that is gone or has other settings now."""
    engine = state.versions.get(report.version)
    return engine is None or report.settings != digest(engine)


def _engine_problem(engine: EngineSpec) -> Rejected | None:
    def wrong(reason: str, hint: str) -> Rejected:
        return Rejected("engine_invalid", reason, hint)

    if engine.kind not in ENGINE_KINDS:
        return wrong(f"there is no engine kind {engine.kind!r}", f"choose one of {', '.join(ENGINE_KINDS)}")
    if any("\0" in word for word in (engine.path, engine.adapter, engine.url, *engine.command, *engine.args)):
        return wrong("a setting holds a zero byte", "remove it")
    if engine.probe.path and not engine.probe.path.startswith("/v1/"):
        return wrong(f"the probe's path is {engine.probe.path!r}", "give a path under /v1/")
    if engine.adapter and engine.kind == "openai":
        return wrong("an openai version takes no adapter", "use --engine vllm, or give it to your own server's command")
    if engine.adapter and not engine.path:
        return wrong("an adapter needs its base", "name the folder of the base's weights: --source PATH")
    match engine.kind:
        case "vllm" if not engine.path:
            return wrong("a vllm version needs its weights", "name the folder: --source PATH")
        case "openai" if bool(engine.url) == bool(engine.command):
            return wrong("an openai version needs a server", "give either --url URL or --command COMMAND")
        case "openai" if engine.url and not engine.url.startswith(("http://", "unix:")):
            return wrong(f"the address is {engine.url!r}", "give http://HOST:PORT or unix:/PATH")
        case "vllm" | "fake" if engine.url or engine.command:
            return wrong(f"a {engine.kind} version takes no url and no command", "use --engine openai for those")
        case _:
            return None


def _deregister(state: ModelState, version: str, reason: str) -> tuple[ModelEvent, ...] | Rejected:
    if version not in state.versions:
        return ()
    if version == state.active:
        return Rejected(
            "version_in_use",
            f"{state.model} serves {version}",
            f"switch to another version first: turnout switch {state.model} VERSION",
        )
    if named := [rule.name for rule in state.rules if rule.version == version]:
        return Rejected(
            "version_in_use",
            f"rule {named[0]!r} of {state.model} sends requests to {version}",
            f"take the rule away first: turnout rules set {state.model} FILE",
        )
    if version in state.residence.pinned:
        return Rejected(
            "version_in_use",
            f"{state.model} {version} is pinned",
            f"unpin it first: turnout unpin {state.model} {version}",
        )
    if state.switch:
        return Rejected(
            "version_in_use",
            f"switch {state.switch} runs on {state.model}",
            f"wait for it or abort it: turnout abort {state.switch}",
        )
    return (VersionDeregistered(state.model, version, reason),)


def _admit(state: ModelState, command: AdmitSwitch) -> tuple[ModelEvent, ...] | Rejected:
    if state.switch == command.switch:
        return ()
    if command.target not in state.versions:
        known = ", ".join(state.versions) or "none"
        return Rejected(
            "version_unknown",
            f"{state.model} has no version {command.target!r} (registered: {known})",
            f"register it first: turnout register {state.model} {command.target} --engine …",
        )
    if state.switch:
        return Rejected(
            "switch_running",
            f"switch {state.switch} to {state.target} runs on {state.model}",
            f"wait for it (turnout status {state.switch}) or end it (turnout abort {state.switch})",
        )
    if refused := state.rejection(command.target):
        return Rejected(
            "version_rejected",
            f"{command.target} can't be served: {refused.reason}",
            refused.hint
            or f"mend it and register it again: turnout register {state.model} {command.target} --engine …",
        )
    if command.target == state.active:
        return Rejected(
            "already_active", f"{state.model} serves {command.target} already", "nothing to do: choose another version"
        )
    return (SwitchAdmitted(state.model, command.switch, command.target),)


def _close(state: ModelState, command: CloseSwitch) -> tuple[ModelEvent, ...]:
    if not state.switch or state.switch != command.switch:
        return ()
    closed: tuple[ModelEvent, ...] = (SwitchClosed(state.model, command.switch, command.outcome),)
    if command.outcome != "completed":
        if command.active in ("", state.active):
            return closed
        return (ActiveVersionChanged(state.model, command.active, state.active, command.switch), *closed)
    changed: list[ModelEvent] = [
        ActiveVersionChanged(state.model, state.target, state.active, command.switch),
        KnownGoodMarked(state.model, state.target, command.switch),
    ]
    if command.revoke:
        changed.append(KnownGoodRevoked(state.model, command.revoke, command.switch))
    return (*changed, *closed)


def _set_policy(state: ModelState, command: SetPolicy) -> tuple[ModelEvent, ...] | Rejected:
    if not _VERSION.fullmatch(command.name):
        return Rejected(
            "name_invalid",
            f"{command.name!r} can't be a policy's name",
            "use up to 64 letters, digits and . _ + -, starting with a letter or digit",
        )
    if state.policies.get(command.name, {}) == command.policy:
        return ()
    if command.policy and isinstance(problems := policy.parse(command.policy), tuple):
        return Rejected("policy_invalid", "; ".join(problems), "docs/strategies.md has every word of a policy")
    return (PolicyChanged(command.model, command.name, command.policy),)


def _set_rules(state: ModelState, command: SetRules) -> tuple[ModelEvent, ...] | Rejected:
    if state.rules == command.rules:
        return ()
    problems = list(rules.problems(command.rules))
    problems += [
        f"rule {rule.name!r}: {state.model} has no version {rule.version!r} (registered: {', '.join(state.versions)})"
        for rule in command.rules
        if rule.version and rule.version not in state.versions
    ]
    problems += [
        f"rule {rule.name!r}: {rule.version} can't be served: {refused.reason}"
        for rule in command.rules
        if (refused := state.rejection(rule.version)) is not None
    ]
    problems += [f"rule {r.name!r}: its model is {state.model} itself" for r in command.rules if r.model == state.model]
    if problems:
        return Rejected("rules_invalid", "; ".join(problems), "docs/rules.md has every name that a rule may use")
    return (RulesChanged(command.model, command.rules),)


def _set_serving(state: ModelState, command: SetServing) -> tuple[ModelEvent, ...] | Rejected:
    wanted = command.serving
    if problems := serving.problems(wanted):
        return Rejected("serving_invalid", "; ".join(problems), "docs/on-demand.md says what each field means")
    if command.version and command.version not in state.versions:
        return Rejected(
            "version_unknown",
            f"{state.model} has no version {command.version!r} (registered: {', '.join(state.versions) or 'none'})",
            f"register it first: turnout register {state.model} {command.version} --engine …",
        )
    changed: list[ModelEvent] = []
    if wanted != state.serving:
        changed.append(ServingChanged(state.model, wanted))
    first = command.version or next(iter(state.versions), "")
    if wanted.on_demand and not state.active and not state.switch and first:
        changed.append(ActiveVersionChanged(state.model, first, "", ""))
    return tuple(changed)


def _see_demand(state: ModelState, model: str, gateway: str, at: datetime) -> tuple[ModelEvent, ...] | Rejected:
    if not state.serving.on_demand:
        return Rejected(
            "not_on_demand",
            f"{model} is not served on demand",
            f"allow it: turnout on-demand {model}",
        )
    if not state.active:
        return Rejected(
            "nothing_active",
            f"{model} has no active version that could be loaded",
            f"switch to one: turnout switch {model} VERSION",
        )
    return () if state.wanted else (DemandSeen(model, state.active, gateway, at),)


def _without(versions: tuple[str, ...], version: str) -> tuple[str, ...]:
    if version not in versions:
        return versions
    at = versions.index(version)
    return versions[:at] + versions[at + 1 :]


def _uninspected(state: ModelState, version: str) -> ModelState:
    """Without what was known of the version's files."""
    if version not in state.validated and version not in state.rejected and version not in state.unseen:
        return state
    return msgspec.structs.replace(
        state,
        validated={v: one for v, one in state.validated.items() if v != version},
        rejected={v: one for v, one in state.rejected.items() if v != version},
        unseen={v: workers for v, workers in state.unseen.items() if v != version},
    )
