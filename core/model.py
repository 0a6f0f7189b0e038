"""Decisions of one model: which versions exist, which is active, whether a switch may start."""

from __future__ import annotations

import hashlib
import re

import msgspec

from turnout.core import policy, rules
from turnout.core.decider import Rejected
from turnout.events.model import (
    ActiveVersionChanged,
    EngineSpec,
    KnownGoodMarked,
    KnownGoodRevoked,
    ModelEvent,
    ModelRegistered,
    PolicyChanged,
    RulesChanged,
    SwitchAdmitted,
    SwitchClosed,
    VersionDeregistered,
    VersionRegistered,
)
from turnout.events.route import Rule

ENGINE_KINDS = ("vllm", "openai", "fake")

_MODEL = re.compile(r"[^\s\x00-\x1f\x7f@]{1,128}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


class ModelState(msgspec.Struct, frozen=True):
    """What is registered, what serves, what is known to be good (newest last), the switch that runs, and what was set.

    ``policies``: name → as it was given. ``rules``: in their order.
    """

    model: str = ""
    versions: dict[str, EngineSpec] = {}
    active: str = ""
    known_good: tuple[str, ...] = ()
    switch: str = ""
    target: str = ""
    policies: dict[str, dict[str, object]] = {}
    rules: tuple[Rule, ...] = ()

    @property
    def undo_target(self) -> str:
        """The newest version that is known to be good and not active; empty where there is none."""
        return next((v for v in reversed(self.known_good) if v != self.active), "")


initial = ModelState()


def evolve(state: ModelState, event: ModelEvent) -> ModelState:
    """State after the event."""
    replace = msgspec.structs.replace
    match event:
        case ModelRegistered():
            return replace(state, model=event.model)
        case VersionRegistered():
            return replace(state, model=event.model, versions={**state.versions, event.version: event.engine})
        case VersionDeregistered():
            versions = {name: engine for name, engine in state.versions.items() if name != event.version}
            return replace(state, versions=versions, known_good=_without(state.known_good, event.version))
        case SwitchAdmitted():
            return replace(state, switch=event.switch, target=event.target)
        case SwitchClosed():
            return replace(state, switch="", target="")
        case ActiveVersionChanged():
            return replace(state, active=event.version)
        case KnownGoodMarked():
            return replace(state, known_good=(*_without(state.known_good, event.version), event.version))
        case KnownGoodRevoked():
            return replace(state, known_good=_without(state.known_good, event.version))
        case PolicyChanged():
            others = {other: one for other, one in state.policies.items() if other != event.name}
            return replace(state, policies={**others, event.name: event.policy} if event.policy else others)
        case RulesChanged():
            return replace(state, rules=event.rules)


class RegisterVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Add an immutable version; the first one makes the model."""

    model: str
    version: str
    engine: EngineSpec
    note: str = ""


class DeregisterVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Take a version away that nothing uses."""

    model: str
    version: str


class AdmitSwitch(msgspec.Struct, frozen=True):
    """Reserve the model for a switch."""

    model: str
    switch: str
    target: str


class CloseSwitch(msgspec.Struct, frozen=True):
    """Let the model go. ``completed`` makes the switch's target active and known good; an undo revokes ``revoke``."""

    model: str
    switch: str
    outcome: str
    revoke: str = ""


class SetPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name a way to switch; an empty policy takes the name away. Running switches keep what they began with."""

    model: str
    name: str
    policy: dict[str, object]


class SetRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """These are the model's rules from now on, all of them."""

    model: str
    rules: tuple[Rule, ...]


ModelCommand = RegisterVersion | DeregisterVersion | AdmitSwitch | CloseSwitch | SetPolicy | SetRules


def decide(state: ModelState, command: ModelCommand) -> tuple[ModelEvent, ...] | Rejected:
    """Whether the registry allows it."""
    match command:
        case RegisterVersion():
            return _register(state, command)
        case _ if not state.model:
            return unknown_model(command.model)
        case DeregisterVersion(_, version):
            return _deregister(state, version)
        case AdmitSwitch():
            return _admit(state, command)
        case CloseSwitch():
            return _close(state, command)
        case SetPolicy():
            return _set_policy(state, command)
        case SetRules():
            return _set_rules(state, command)


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
    if known == engine:
        return ()
    if known is not None:
        return Rejected(
            "version_exists",
            f"{model} {version} is registered with other settings, and a version never changes",
            "register the new settings under another version name",
        )
    if problem := _engine_problem(engine):
        return problem
    added = VersionRegistered(model, version, engine, digest(engine), command.note)
    return (added,) if state.model else (ModelRegistered(model), added)


def _engine_problem(engine: EngineSpec) -> Rejected | None:
    def wrong(reason: str, hint: str) -> Rejected:
        return Rejected("engine_invalid", reason, hint)

    if engine.kind not in ENGINE_KINDS:
        return wrong(f"there is no engine kind {engine.kind!r}", f"choose one of {', '.join(ENGINE_KINDS)}")
    if any("\0" in word for word in (engine.path, engine.url, *engine.command, *engine.args)):
        return wrong("a setting holds a zero byte", "remove it")
    if engine.probe.path and not engine.probe.path.startswith("/v1/"):
        return wrong(f"the probe's path is {engine.probe.path!r}", "give a path under /v1/")
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


def _deregister(state: ModelState, version: str) -> tuple[ModelEvent, ...] | Rejected:
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
    if state.switch:
        return Rejected(
            "version_in_use",
            f"switch {state.switch} runs on {state.model}",
            f"wait for it or abort it: turnout abort {state.switch}",
        )
    return (VersionDeregistered(state.model, version),)


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
        return closed
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
    problems += [f"rule {r.name!r}: its model is {state.model} itself" for r in command.rules if r.model == state.model]
    if problems:
        return Rejected("rules_invalid", "; ".join(problems), "docs/rules.md has every name that a rule may use")
    return (RulesChanged(command.model, command.rules),)


def _without(versions: tuple[str, ...], version: str) -> tuple[str, ...]:
    return tuple(v for v in versions if v != version)
