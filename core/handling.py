"""Commands from outside → commands for aggregates. One table of verbs; pure over the world.

A verb belongs to one role (``ops``, ``gw``, ``worker``): the subject of a command carries the role, and an account may
publish only its own. Each handler returns the writes that make the command true together, or why it can't be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from turnout.core import gateway, instance, model, worker
from turnout.core.config import ModelSwitchingConfig
from turnout.core.decider import Rejected
from turnout.core.model import AdmitSwitch, unknown_model
from turnout.core.sagas import placement
from turnout.core.sagas import switch as saga
from turnout.core.sagas.owed import Write
from turnout.core.switch import ENDED, FORWARD, UNTOUCHED, AbortSwitch, OpenSwitch, SwitchState, unknown_switch

if TYPE_CHECKING:
    from turnout.core.world import World


class StartSwitch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``switch.start`` and ``switch.plan``: send a model's traffic to a version.

    Attributes:
        model: the served name.
        version: the target.
        strategy: empty for the configured default.
        parameters: the strategy's own.
        reason: why, for the log.
        bake_s: seconds that the old version stays warm; None for the configured default.
        drain_s: seconds that its last requests may run; None for the configured default.
        max_transition_time_s: None for the configured default.
    """

    model: str
    version: str
    strategy: str = ""
    parameters: dict[str, object] = {}
    reason: str = ""
    bake_s: float | None = None
    drain_s: float | None = None
    max_transition_time_s: float | None = None


class StopSwitch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``switch.abort``: end a running switch; what has moved goes back to the source."""

    switch: str
    reason: str = ""


class UndoModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``model.undo``: roll the running switch back, or return to the last known good version."""

    model: str
    reason: str = ""


class Step(msgspec.Struct, frozen=True):
    """One line of a plan."""

    what: str
    seconds: float | None = None


class Plan(msgspec.Struct, frozen=True, tag="plan", tag_field="status"):
    """What a switch would do. ``seconds`` and ``bytes`` are None where nothing was measured yet."""

    model: str
    source: str
    target: str
    strategy: str
    tier: str
    seconds: float | None
    bytes: int | None
    steps: tuple[Step, ...]


class Defaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a switch uses where the command says nothing (turnout.toml, ``[switch]``). Seconds."""

    bake_s: float = 60.0
    drain_s: float = 600.0


class Context(msgspec.Struct, frozen=True):
    """What a handler may know besides the world."""

    command: str
    actor: str
    now: datetime
    config: ModelSwitchingConfig
    defaults: Defaults


Writes = tuple[Write, ...]
Handler = Callable[["World", Any, Context], "Writes | Rejected | Plan"]


def switch_id(command: str) -> str:
    """Id of the switch that a command opens: made from the command's id, so that a repeated command names the same."""
    return "sw-" + hashlib.sha256(command.encode()).hexdigest()[:10]


def _register(world: World, body: model.RegisterVersion, context: Context) -> Writes | Rejected:
    if not context.config.enable_dynamic_registry and context.actor != "config":
        return Rejected(
            "registry_frozen",
            "this turnout serves only the models of its configuration file (enable_dynamic_registry = false)",
            "add the version to turnout.toml and restart the controller",
        )
    return (Write("model", body.model, body),)


def _deregister(world: World, body: model.DeregisterVersion, context: Context) -> Writes | Rejected:
    if not context.config.enable_dynamic_registry and context.actor != "config":
        return Rejected(
            "registry_frozen",
            "this turnout serves only the models of its configuration file (enable_dynamic_registry = false)",
            "remove the version from turnout.toml and restart the controller",
        )
    return (Write("model", body.model, body),)


def _start(world: World, body: StartSwitch, context: Context) -> Writes | Rejected:
    state: model.ModelState = world.state("model", body.model)
    if not state.model:
        return unknown_model(body.model)
    for name in ("bake_s", "drain_s", "max_transition_time_s"):
        value: float | None = getattr(body, name)
        if value is not None and not 0 <= value < 1e9:
            return Rejected("parameters_invalid", f"{name} is {value}", "give a number of seconds, 0 or more")
    admitted = model.decide(state, AdmitSwitch(body.model, switch_id(context.command), body.version))
    if isinstance(admitted, Rejected):
        return admitted
    if problem := _no_way(world, body.model, body.version):
        return problem
    return _open(world, body, context, undo=False)


def _open(world: World, body: StartSwitch, context: Context, *, undo: bool) -> Writes:
    state: model.ModelState = world.state("model", body.model)
    config, defaults, id = context.config, context.defaults, switch_id(context.command)
    limit = config.max_transition_time if body.max_transition_time_s is None else body.max_transition_time_s
    opened = OpenSwitch(
        switch=id,
        model=body.model,
        target=body.version,
        source=state.active,
        strategy=body.strategy or config.default_switch_strategy,
        parameters=body.parameters,
        undo=undo,
        reason=body.reason,
        deadline=context.now + timedelta(seconds=limit),
        bake_s=defaults.bake_s if body.bake_s is None else body.bake_s,
        drain_s=defaults.drain_s if body.drain_s is None else body.drain_s,
        at=context.now,
    )
    return (Write("model", body.model, AdmitSwitch(body.model, id, body.version)), Write("switch", id, opened))


def _no_way(world: World, name: str, version: str) -> Rejected | None:
    """Why the version can't be loaded anywhere; None where it is loaded or has a place."""
    if world.instances_of(name, version, "requested", "loading", "ready"):
        return None
    if placement.request(world, name, version, cause="") is not None or placement.evictable(world):
        return None
    kind = world.models[name].versions[version].kind
    return Rejected(
        "no_capacity",
        f"{name} {version} can't be loaded: {placement.no_room(world, kind)}",
        f"start a worker that may run {kind} engines (turnout worker), or raise its capacity",
    )


def _plan(world: World, body: StartSwitch, context: Context) -> Plan | Rejected:
    writes = _start(world, body, context)
    if isinstance(writes, Rejected):
        return writes
    opened = writes[1].command
    assert isinstance(opened, OpenSwitch)  # noqa: S101  what _open returns
    warm = bool(world.ready(body.model, body.version))
    load = world.loads.get((body.model, body.version))
    seconds = 0.0 if warm else (load.seconds if load else None)
    steps = [
        Step(f"{body.version} is ready already" if warm else f"load and prove {body.version}", seconds),
        Step(f"give {body.version} all traffic; wait for {len(world.live_gateways)} gateways"),
    ]
    if opened.source:
        steps.append(Step(f"bake: keep {opened.source} warm", opened.bake_s))
        steps.append(Step(f"drain {opened.source}, at most", opened.drain_s))
    return Plan(
        model=body.model,
        source=opened.source,
        target=body.version,
        strategy=opened.strategy,
        tier="warm" if warm else "cold",
        seconds=seconds,
        bytes=load.bytes if load and load.bytes else None,
        steps=tuple(steps),
    )


def _abort(world: World, body: StopSwitch, context: Context) -> Writes | Rejected:
    state: SwitchState = world.state("switch", body.switch)
    if state.phase == "unknown":
        return unknown_switch(body.switch)
    return _back(world, state, "abort", body.reason or f"aborted by {context.actor}", context)


def _undo(world: World, body: UndoModel, context: Context) -> Writes | Rejected:
    state: model.ModelState = world.state("model", body.model)
    if not state.model:
        return unknown_model(body.model)
    reason = body.reason or f"undone by {context.actor}"
    if state.switch:
        return _back(world, world.state("switch", state.switch), "undo", reason, context)
    target = state.undo_target
    if not target:
        return Rejected(
            "nothing_to_undo",
            f"{body.model} has no earlier version that is known to be good (active: {state.active or 'none'})",
            f"name the version: turnout switch {body.model} VERSION",
        )
    if problem := _no_way(world, body.model, target):
        return problem
    start = StartSwitch(body.model, target, strategy="immediate", reason=reason, bake_s=0.0)
    return _open(world, start, context, undo=True)


def _back(world: World, state: SwitchState, cause: str, reason: str, context: Context) -> Writes | Rejected:
    if state.phase in ENDED:
        return Rejected(
            "switch_ended",
            f"switch {state.switch} is {state.phase.replace('_', ' ')} already",
            f"to go back to the version before: turnout undo {state.model}",
        )
    if state.phase in UNTOUCHED:
        return (Write("switch", state.switch, AbortSwitch(state.switch, reason)), saga.close(state, "aborted"))
    if state.phase in FORWARD and not state.source:
        return Rejected(
            "nothing_to_undo",
            f"{state.target} is the first version of {state.model}: there is none to go back to",
            f"register another one and switch to it: turnout switch {state.model} VERSION",
        )
    if not world.ready(state.model, state.source):
        return Rejected(
            "source_not_ready",
            f"{state.source} has no ready instance to take the traffic back",
            f"it is being restored; try again when it is ready: turnout get {state.model}",
        )
    return saga.rollback(world, state, cause, reason, context.now)


def _gateway(world: World, body: gateway.GatewayCommand, context: Context) -> Writes | Rejected:
    return (Write("gateway", body.gateway, body),) if body.gateway else _nameless("gateway")


def _worker(world: World, body: worker.WorkerCommand, context: Context) -> Writes | Rejected:
    return (Write("worker", body.worker, body),) if body.worker else _nameless("worker")


def _nameless(kind: str) -> Rejected:
    return Rejected("name_invalid", f"the {kind} has no id", "give an id that no other one has")


def _instance(world: World, body: Any, context: Context) -> Writes:
    return (Write("instance", body.instance, body),)


#: (role, verb) → type of the body and its handler.
VERBS: dict[tuple[str, str], tuple[type[msgspec.Struct], Handler]] = {
    ("ops", "version.register"): (model.RegisterVersion, _register),
    ("ops", "version.deregister"): (model.DeregisterVersion, _deregister),
    ("ops", "switch.start"): (StartSwitch, _start),
    ("ops", "switch.plan"): (StartSwitch, _plan),
    ("ops", "switch.abort"): (StopSwitch, _abort),
    ("ops", "model.undo"): (UndoModel, _undo),
    ("gw", "gateway.join"): (gateway.JoinGateway, _gateway),
    ("gw", "gateway.applied"): (gateway.ReportApplied, _gateway),
    ("gw", "gateway.drained"): (gateway.ReportDrained, _gateway),
    ("gw", "gateway.leave"): (gateway.LeaveGateway, _gateway),
    ("worker", "worker.join"): (worker.JoinWorker, _worker),
    ("worker", "worker.leave"): (worker.LeaveWorker, _worker),
    ("worker", "instance.loading"): (instance.ReportLoading, _instance),
    ("worker", "instance.ready"): (instance.ReportReady, _instance),
    ("worker", "instance.stopped"): (instance.ReportStopped, _instance),
    ("worker", "instance.failed"): (instance.ReportFailed, _instance),
}
