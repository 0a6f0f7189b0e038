"""Commands from outside → commands for aggregates. One table of verbs; pure over the world.

A verb belongs to one role (``ops``, ``gw``, ``worker``): the subject of a command carries the role, and an account may
publish only its own. Each handler returns the writes that make the command true together, or why it can't be.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from turnout.core import alert, gateway, instance, model, policy, residence, switch, worker
from turnout.core.config import CACHE, CacheConfig, ModelSwitchingConfig
from turnout.core.decider import Rejected
from turnout.core.holdings import Holdings, holdings
from turnout.core.judging.judgement import JudgeSettings
from turnout.core.model import AdmitSwitch, unknown_model
from turnout.core.placement import COLD, FULL, Ledger, Offer, why_kept
from turnout.core.sagas import placement, routes
from turnout.core.sagas import switch as saga
from turnout.core.sagas.owed import Write, decide
from turnout.core.strategies import STRATEGIES
from turnout.core.strategies.base import Stage
from turnout.core.switch import (
    ENDED,
    FORWARD,
    UNTOUCHED,
    AbortSwitch,
    OpenSwitch,
    PauseSwitch,
    PromoteSwitch,
    ResumeSwitch,
    SwitchState,
    unknown_switch,
)
from turnout.events import subjects
from turnout.events.model import UNSEEN
from turnout.events.route import Hold
from turnout.events.worker import KeptEngine

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
        max_transition_time_s: None for the configured default, to which the waits that the strategy plans are added.
        policy: name of one of the model's policies, instead of strategy and parameters.
        hold: where there is no place for both versions, requests may wait while one makes room for the other; None for
            what the policy says, else no.
    """

    model: str
    version: str
    strategy: str = ""
    parameters: dict[str, object] = {}
    reason: str = ""
    bake_s: float | None = None
    drain_s: float | None = None
    max_transition_time_s: float | None = None
    policy: str = ""
    hold: bool | None = None


class StopSwitch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``switch.abort``: end a running switch; what has moved goes back to the source."""

    switch: str
    reason: str = ""


class HoldSwitch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``switch.pause``: stand still at the next step's door; ``seconds``: go on by itself after them."""

    switch: str
    reason: str = ""
    seconds: float | None = None


class ContinueSwitch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``switch.resume``: go on after ``switch.pause``."""

    switch: str
    reason: str = ""


class AdvanceSwitch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``switch.promote``: let it past its step.

    ``step`` is the one that its author has seen, so that a second click does nothing. None: whichever it is now, but
    not moments after another promotion, whose second click this may be.
    ``full``: past every further step, pause and analysis; needs a reason.
    """

    switch: str
    step: int | None = None
    full: bool = False
    reason: str = ""


class RetrySwitch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``switch.retry``: a new switch with the same target, strategy and parameters, and fresh evidence."""

    switch: str
    reason: str = ""


class StopInstance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``instance.stop``: ask an instance's worker to stop it, whatever wants it warm.

    ``force``: also where gateways may have requests on it, and without the worker's proof of quiet; needs a reason.
    """

    instance: str
    force: bool = False
    reason: str = ""


class UndoModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``model.undo``: roll the running switch back, or return to the last known good version.

    Where the running switch's source is not ready, the newest version that is known to be good and ready is taken.
    ``hold``: as there, of a switch. ``to``: the version that its author wants back; it is refused where it would go to
    another one. Empty for whichever it is, but not moments after the model went back, whose second click this may be.
    """

    model: str
    reason: str = ""
    hold: bool = False
    to: str = ""


class WakeModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``model.wake``: a request waits at this gateway for a model that is served on demand."""

    model: str
    gateway: str


class Step(msgspec.Struct, frozen=True):
    """One line of a plan."""

    what: str
    seconds: float | None = None


class Plan(msgspec.Struct, frozen=True, tag="plan", tag_field="status"):
    """What a switch would do. ``seconds`` and ``bytes`` are None where nothing was measured yet.

    Attributes:
        steps: everything in order, the traffic levels among them.
        notes: what else the strategy does, in words.
        stages: the traffic levels that the strategy plans; none where the model serves nothing yet.
        judging: how each of them is judged, with the configured ceilings where the parameters name none.
        deadline_s: seconds until the target must carry all its traffic.
        policy: name of the policy that it follows, empty for none; ``parameters`` are the strategy's own.
        holds: there is no place for both versions: requests wait, about ``pause_s`` seconds: until the old version has
            finished what it has and has left, and the new one is ready; None where that was never measured.
    """

    model: str
    source: str
    target: str
    strategy: str
    tier: str
    seconds: float | None
    bytes: int | None
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    stages: tuple[Stage, ...]
    judging: JudgeSettings
    deadline_s: float
    policy: str
    parameters: dict[str, object]
    holds: bool = False
    pause_s: float | None = None


class Defaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a switch uses where the command says nothing (turnout.toml, ``[switch]``). Seconds.

    ``hold_queue``, ``hold_wait_s``: requests that may wait in each gateway, and how long, for a switch that may hold.
    """

    bake_s: float = 60.0
    drain_s: float = 600.0
    hold_queue: int = 256
    hold_wait_s: float = 120.0


class Context(msgspec.Struct, frozen=True):
    """What a handler may know besides the world.

    ``leads``: the process leads, and no saga writes before this command is stored. So what a saga would owe next may be
    written with it.
    """

    command: str
    actor: str
    now: datetime
    config: ModelSwitchingConfig
    defaults: Defaults
    leads: bool = False
    cache: CacheConfig = CACHE


class PreloadVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``version.preload``: load it once there is room; it makes room only where something has a lower priority."""

    model: str
    version: str
    priority: int = 0


class EvictVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``version.evict``: let its idle instances go now, and forget a wish to preload it."""

    model: str
    version: str
    reason: str = ""


class AskCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``cache.show``: what is loaded where, why it stays or goes, and which preloads wait? Changes nothing."""


class PlaceVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``version.place``: where could it be loaded now? Changes nothing."""

    model: str
    version: str


class StartSpare(msgspec.Struct, frozen=True):
    """``worker.spare``: a worker asks whether it may start an engine without a version. ``engine``: as it would be."""

    worker: str
    engine: KeptEngine


class Placing(msgspec.Struct, frozen=True, tag="placement", tag_field="status"):
    """Where a version could be loaded now.

    Attributes:
        loaded: where it is loaded or being loaded already.
        replicas: how many instances it has while it serves; ``missing``: how many of them it lacks.
        chosen: the workers that would be asked for those; fewer where there is no room for all.
        offers: what each live worker says, the best first.
    """

    model: str
    version: str
    loaded: tuple[str, ...]
    replicas: int
    missing: int
    chosen: tuple[str, ...]
    offers: tuple[Offer, ...]


Writes = tuple[Write, ...]
#: Answers that change nothing.
Told = Plan | Placing | Holdings
Handler = Callable[["World", Any, Context], "Writes | Rejected | Told"]


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


def _inspected(world: World, body: model.ReportInspected, context: Context) -> Writes | Rejected:
    """A worker's word on a version's files; that it can't see them only counts when no other worker is left to look."""
    state: model.ModelState = world.state("model", body.model)
    if not state.model:
        return unknown_model(body.model)
    engine = state.versions.get(body.version)
    if engine is not None and body.inspection is None and body.code in UNSEEN:
        blind = (*state.unseen.get(body.version, {}), body.worker)
        if any(w.live and engine.kind in w.engines and w.worker not in blind for w in world.workers.values()):
            note = model.NoteUnseen(body.model, body.version, body.worker, body.settings, body.code, body.reason)
            return (Write("model", body.model, note),)
    return (Write("model", body.model, body),)


def _set_policy(world: World, body: model.SetPolicy, context: Context) -> Writes | Rejected:
    return (Write("model", body.model, body),)


def _set_rules(world: World, body: model.SetRules, context: Context) -> Writes | Rejected:
    """What a rule sends elsewhere must have somewhere to go: the model itself can't see the others."""
    there = sorted(name for name, state in world.models.items() if state.versions)
    lost = [rule for rule in body.rules if rule.model and rule.model not in there]
    if lost and world.state("model", body.model).model:
        rule = lost[0]
        return Rejected(
            "rules_invalid",
            f"rule {rule.name!r}: there is no model {rule.model!r} (registered: {', '.join(there)})",
            f"register a version of it first: turnout register {rule.model} VERSION --engine …",
        )
    return (Write("model", body.model, body),)


def _set_serving(world: World, body: model.SetServing, context: Context) -> Writes | Rejected:
    return (Write("model", body.model, body),)


def _wake(world: World, body: WakeModel, context: Context) -> Writes | Rejected:
    return (Write("model", body.model, model.SeeDemand(body.model, body.gateway, context.now)),)


def _acknowledge(world: World, body: alert.AcknowledgeAlert, context: Context) -> Writes | Rejected:
    by = msgspec.structs.replace(body, by=body.by or context.actor)
    return (Write("alert", body.alert, by),) if body.alert else _nameless("alert")


def _deregister(world: World, body: model.DeregisterVersion, context: Context) -> Writes | Rejected:
    if not context.config.enable_dynamic_registry and context.actor != "config":
        return Rejected(
            "registry_frozen",
            "this turnout serves only the models of its configuration file (enable_dynamic_registry = false)",
            "remove the version from turnout.toml and restart the controller",
        )
    if set(world.state("model", body.model).versions) == {body.version}:  # its last one: the model goes, too
        for name in sorted(world.models):
            for rule in world.models[name].rules:
                if rule.model == body.model:
                    return Rejected(
                        "version_in_use",
                        f"rule {rule.name!r} of {name} sends requests to {body.model}, whose last version this is",
                        f"take the rule away first: turnout rules set {name} FILE",
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
    if body.policy:
        planned = _by_policy(state, body)
        if isinstance(planned, Rejected):
            return planned
        body = planned
    strategy = body.strategy or context.config.default_switch_strategy
    if body.hold and strategy != policy.HOLDABLE:
        return Rejected("parameters_invalid", policy.no_hold(strategy), "the target takes the source's place at once")
    if problem := _no_way(world, body.model, body.version, context.cache, hold=bool(body.hold)):
        return problem
    return _open(world, body, context, undo=False)


def _by_policy(state: model.ModelState, body: StartSwitch) -> StartSwitch | Rejected:
    """The command with what the policy says; what the command says itself wins, but for strategy and parameters."""
    raw = state.policies.get(body.policy)
    if raw is None:
        known = ", ".join(sorted(state.policies)) or "none"
        return Rejected(
            "policy_unknown",
            f"{state.model} has no policy {body.policy!r} (set: {known})",
            f"set it first: turnout policy set {state.model} {body.policy} FILE",
        )
    if body.strategy or body.parameters:
        return Rejected(
            "parameters_invalid",
            "a policy names strategy and parameters itself",
            "give either --policy, or --strategy and its parameters",
        )
    parsed = policy.parse(raw)
    if isinstance(parsed, tuple):  # it was checked when it was set; this turnout is stricter
        return Rejected("policy_invalid", "; ".join(parsed), f"set it again: turnout policy set {state.model}")
    return msgspec.structs.replace(
        body,
        strategy=parsed.strategy,
        parameters=parsed.parameters,
        bake_s=parsed.bake_s if body.bake_s is None else body.bake_s,
        drain_s=parsed.drain_s if body.drain_s is None else body.drain_s,
        hold=parsed.hold if body.hold is None else body.hold,
        max_transition_time_s=(
            parsed.max_transition_time_s if body.max_transition_time_s is None else body.max_transition_time_s
        ),
    )


def _open(world: World, body: StartSwitch, context: Context, *, undo: bool) -> Writes | Rejected:
    state: model.ModelState = world.state("model", body.model)
    config, defaults, id = context.config, context.defaults, switch_id(context.command)
    strategy = body.strategy or config.default_switch_strategy
    limit = _limit_s(strategy, body, config)
    if isinstance(limit, Rejected):
        return limit
    opened = OpenSwitch(
        switch=id,
        model=body.model,
        target=body.version,
        source="" if state.at_zero else state.active,
        strategy=strategy,
        parameters=body.parameters,
        undo=undo,
        reason=body.reason,
        deadline=context.now + timedelta(seconds=limit),
        bake_s=defaults.bake_s if body.bake_s is None else body.bake_s,
        drain_s=defaults.drain_s if body.drain_s is None else body.drain_s,
        at=context.now,
        policy=body.policy,
        hold=Hold(defaults.hold_queue, defaults.hold_wait_s) if body.hold else None,
    )
    writes = (Write("model", body.model, AdmitSwitch(body.model, id, body.version)), Write("switch", id, opened))
    if not context.leads:
        return writes
    requested = switch.decide(switch.initial, opened)
    if isinstance(requested, Rejected):
        return requested
    begun = functools.reduce(switch.evolve, requested, switch.initial)
    return (*writes, *saga.begin(world, begun, context.now))


def _limit_s(strategy: str, body: StartSwitch, config: ModelSwitchingConfig) -> float | Rejected:
    """Seconds until the target must carry all its traffic: what the strategy plans to wait is no delay."""
    if strategy not in STRATEGIES or STRATEGIES[strategy].problems(body.parameters):
        return config.max_transition_time  # the switch's own decider refuses it
    shortest, longest = policy.waits_s(strategy, body.parameters)
    given = body.max_transition_time_s
    if given is None:
        return config.max_transition_time + longest
    if given < shortest:
        return Rejected(
            "parameters_invalid",
            f"the steps of {strategy} take at least {shortest:g} s, and max_transition_time is {given:g} s",
            "give more time, or shorter pauses",
        )
    return given


def _no_way(world: World, name: str, version: str, cache: CacheConfig, *, hold: bool = False) -> Rejected | None:
    """Why the version can't be loaded; None where it is there or has room, or may take the active one's."""
    full = placement.no_room(world, name, version, cache)
    active = world.models[name].active
    if full is None or not active or not placement.must_swap(world, name, active, version):
        return full
    if hold:
        return None
    wait = f"; or let requests wait while {active} makes room: --hold (--dry-run --hold tells the pause)"
    return msgspec.structs.replace(full, hint=full.hint + wait)


def _plan(world: World, body: StartSwitch, context: Context) -> Plan | Rejected:
    writes = _start(world, body, context)
    if isinstance(writes, Rejected):
        return writes
    if isinstance(refused := decide(world, writes), Rejected):
        return refused
    opened = writes[1].command
    assert isinstance(opened, OpenSwitch)  # noqa: S101  what _open returns
    warm = bool(world.ready(body.model, body.version))
    load = world.loads.get((body.model, body.version))
    tier = "warm" if warm else _tier(world, body.model, body.version, context.cache)
    seconds = 0.0 if warm else world.took.get((body.model, body.version, tier))
    steps = [Step(f"{body.version} is ready already" if warm else f"load and prove {body.version}", seconds)]
    strategy, thresholds = STRATEGIES[opened.strategy], context.config.alert_thresholds
    judging = strategy.judging(opened.parameters)
    stages: tuple[Stage, ...] = ()
    notes: tuple[str, ...] = ()
    holds = opened.hold is not None and placement.must_swap(world, body.model, opened.source, body.version)
    pause_s = saga.pause_s(world, body.model, opened.source, body.version) if holds else None
    if holds and opened.hold is not None:
        steps = [
            Step(f"let new requests wait, at most {opened.hold.queue} in each gateway", opened.hold.wait_s),
            Step(f"let {opened.source} finish what it has", world.drains.get(body.model)),
            Step(f"stop {opened.source}, or let it sleep", saga.leaving_s(world, body.model, opened.source) or None),
            steps[0],
            Step(f"give {body.version} all traffic, and the requests that waited"),
        ]
        notes = (
            f"there is no place for both: until {body.version} is ready nobody can take over; where it fails, "
            f"{opened.source} comes back",
        )
    elif opened.source:
        stages, lines = strategy.stages(opened.parameters), strategy.describe(opened.parameters)
        steps.extend(
            Step(f"give {body.version} {line}", stage.pause_s) for line, stage in zip(lines, stages, strict=False)
        )
        notes = lines[len(stages) :]
        steps.append(Step(f"bake: keep {opened.source} warm", opened.bake_s))
        steps.append(Step(f"drain {opened.source}, at most", opened.drain_s))
    else:
        steps.append(Step(f"give {body.version} all traffic: nothing serves yet, so there are no steps"))
    return Plan(
        model=body.model,
        source=opened.source,
        target=body.version,
        strategy=opened.strategy,
        tier=tier,
        seconds=seconds,
        bytes=load.bytes if load and load.bytes else None,
        steps=tuple(steps),
        notes=notes,
        stages=stages,
        judging=msgspec.structs.replace(
            judging,
            error_ceiling=judging.error_ceiling or thresholds.get("error_rate"),
            latency_ceiling_ms=judging.latency_ceiling_ms or thresholds.get("latency_p95"),
        ),
        deadline_s=(opened.deadline - opened.at).total_seconds(),
        policy=opened.policy,
        parameters=opened.parameters,
        holds=holds,
        pause_s=pause_s,
    )


def _tier(world: World, name: str, version: str, cache: CacheConfig) -> str:
    """How the first instance that it lacks would be made ready, as far as the log tells."""
    offers = Ledger(world, placement.evictable(world), cache.policy).offers(name, version)
    return offers[0].tier if offers else COLD


def _known(world: World, name: str, version: str) -> Rejected | None:
    state: model.ModelState = world.state("model", name)
    if not state.model:
        return unknown_model(name)
    if version in state.versions:
        return None
    return Rejected(
        "version_unknown",
        f"{name} has no version {version!r} (registered: {', '.join(state.versions) or 'none'})",
        f"register it first: turnout register {name} {version} --engine …",
    )


def _place(world: World, body: PlaceVersion, context: Context) -> Placing | Rejected:
    if problem := _known(world, body.model, body.version):
        return problem
    here = world.instances_of(body.model, body.version, "requested", "loading", "waking", "ready")
    lacking = placement.missing(world, body.model, body.version)
    idle = placement.evictable(world)
    planned = placement.plan(world, Ledger(world, idle, context.cache.policy), body.model, body.version, lacking)
    return Placing(
        body.model,
        body.version,
        tuple(one.worker for one in here),
        world.models[body.model].residence.wanted(body.version),
        lacking,
        tuple(offer.worker for offer in planned if offer.verdict != FULL),
        Ledger(world, idle, context.cache.policy).offers(body.model, body.version),
    )


def _cache(world: World, body: AskCache, context: Context) -> Holdings:
    return holdings(world, context.config, context.cache)


def _preload(world: World, body: PreloadVersion, context: Context) -> Writes | Rejected:
    if problem := _known(world, body.model, body.version):
        return problem
    if world.ready(body.model, body.version):
        return (Write("model", body.model, residence.EndPreload(body.model, body.version, "ready")),)
    if not context.config.max_cached_models:
        return Rejected(
            "no_capacity",
            "max_cached_models is 0: what no route uses is not kept",
            "raise max_cached_models in turnout.toml and restart the controller",
        )
    if (refused := world.models[body.model].rejection(body.version)) is not None:
        return Rejected(refused.code, refused.reason, refused.hint)
    if (large := placement.too_large(world, body.model, body.version)) is not None:
        return large
    wish = residence.WishPreload(body.model, body.version, body.priority, context.now)
    return (Write("model", body.model, wish),)


def _evict(world: World, body: EvictVersion, context: Context) -> Writes | Rejected:
    if problem := _known(world, body.model, body.version):
        return problem
    state: model.ModelState = world.state("model", body.model)
    if body.version in state.residence.pinned:
        return Rejected(
            "version_in_use",
            f"{body.model} {body.version} is pinned",
            f"unpin it first: turnout unpin {body.model} {body.version}",
        )
    idle = {one.instance for one in placement.evictable(world)}
    here = world.instances_of(body.model, body.version, "ready")
    if held := [one for one in here if one.instance not in idle]:
        return Rejected(
            "version_in_use",
            f"{body.model} {body.version} is in use on {', '.join(one.worker for one in held)}"
            f" ({why_kept(world, held[0])})",
            f"switch to another version first: turnout switch {body.model} VERSION",
        )
    if not here and body.version not in state.residence.wishes:
        return (Write("model", body.model, residence.EndPreload(body.model, body.version, "withdrawn")),)
    reason = body.reason or f"evicted by {context.actor}"
    return (Write("model", body.model, residence.Evict(body.model, body.version, context.now, reason)),)


def _pin(
    world: World, body: residence.PinVersion | residence.UnpinVersion | residence.SetReplicas, context: Context
) -> Writes | Rejected:
    return _known(world, body.model, body.version) or (Write("model", body.model, body),)


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
        running: SwitchState = world.state("switch", state.switch)
        if running.undo and running.phase not in ENDED and body.to != running.source:
            return Rejected(
                "undo_running",
                f"{body.model} goes back from {running.source} to {running.target} already: switch {running.switch}",
                f"look at it: turnout status {running.switch}; to stay at {running.source}: "
                f"turnout undo {body.model} --to {running.source}",
            )
        if body.to not in ("", running.source):
            return _elsewhere(body, running.source)
        return _back(world, running, "undo", reason, context)
    target = state.undo_target
    if target and not body.to and (twice := _went_back(world, state, target, context.now)):
        return twice
    if body.to not in ("", target):
        return _elsewhere(body, target)
    if not target:
        return Rejected(
            "nothing_to_undo",
            f"{body.model} has no earlier version that is known to be good (active: {state.active or 'none'})",
            f"name the version: turnout switch {body.model} VERSION",
        )
    if problem := _no_way(world, body.model, target, context.cache, hold=body.hold):
        return problem
    # Nobody judges it: an operator has decided, and evidence must not undo the undo.
    unjudged: dict[str, object] = {"judge": {"mode": "none"}}
    start = StartSwitch(body.model, target, "immediate", unjudged, reason, bake_s=0.0, hold=body.hold)
    return _open(world, start, context, undo=True)


def _elsewhere(body: UndoModel, back: str) -> Rejected:
    return Rejected(
        "undo_elsewhere",
        f"an undo of {body.model} goes to {back or 'no version'}, not to {body.to}",
        f"switch to it: turnout switch {body.model} {body.to}",
    )


def _went_back(world: World, state: model.ModelState, target: str, now: datetime) -> Rejected | None:
    """Why an undo goes no further: the model has just gone back, asked or by itself. None where it has not."""
    ended = world.ended.get(state.model)
    if ended is None:
        return None
    since_s = (now - ended.envelope.time).total_seconds()
    last: SwitchState = world.state("switch", subjects.parse_event(ended.subject)[1])
    if since_s >= switch.TWICE_S or (last.phase == "completed" and not last.undo):
        return None
    left = last.source if last.undo and last.phase == "completed" else last.target
    return Rejected(
        "undone_already",
        f"{state.model} has left {left} and serves {state.active} since {since_s:.1f} s ago (switch {last.switch}): "
        f"this looks like the same wish, and would go on to {target}",
        f"if you mean that: turnout undo {state.model} --to {target}",
    )


def _back(world: World, state: SwitchState, cause: str, reason: str, context: Context) -> Writes | Rejected:
    if state.phase in ENDED:
        return Rejected(
            "switch_ended",
            f"switch {state.switch} is {state.phase.replace('_', ' ')} already",
            f"to go back to the version before: turnout undo {state.model}",
        )
    if state.phase in UNTOUCHED:
        return (Write("switch", state.switch, AbortSwitch(state.switch, reason)), saga.close(state, "aborted"))
    if state.phase == "holding":
        return saga.rollback(world, state, cause, reason, context.now)
    if state.phase in FORWARD and (not state.source or state.alone):
        return Rejected(
            "nothing_to_undo",
            f"{state.target} is the first version of {state.model}: there is none to go back to"
            if not state.source
            else f"{state.target} has taken the place of {state.source}, and the switch is about to end",
            f"register another one and switch to it: turnout switch {state.model} VERSION"
            if not state.source
            else f"when it has ended: turnout undo {state.model} --hold",
        )
    home = routes.way_back(world, state)
    if not home or (cause == "abort" and home not in (state.source, state.to)):
        other = f"; {home} is ready and known to be good: turnout undo {state.model}" if home else ""
        if full := _no_way(world, state.model, state.source, context.cache):
            return Rejected(
                "source_not_ready",
                f"{state.source} has no ready instance to take the traffic back, and {full.reason}",
                "make room for it: start another worker (turnout worker), or end an instance: turnout stop INSTANCE "
                f"--force --reason TEXT{other}",
            )
        return Rejected(
            "source_not_ready",
            f"{state.source} has no ready instance to take the traffic back",
            f"it is being restored; try again when it is ready: turnout get {state.model}{other}",
        )
    return saga.rollback(world, state, cause, reason, context.now, home=home)


def _pause(world: World, body: HoldSwitch, context: Context) -> Writes | Rejected:
    if body.seconds is not None and not 0 < body.seconds < 1e9:
        return Rejected("parameters_invalid", f"seconds is {body.seconds}", "give a number of seconds above 0")
    until = None if body.seconds is None else context.now + timedelta(seconds=body.seconds)
    reason = body.reason or f"paused by {context.actor}"
    return (Write("switch", body.switch, PauseSwitch(body.switch, "operator", reason, context.now, until)),)


def _resume(world: World, body: ContinueSwitch, context: Context) -> Writes | Rejected:
    reason = body.reason or f"resumed by {context.actor}"
    return (Write("switch", body.switch, ResumeSwitch(body.switch, reason, context.now)),)


def _promote(world: World, body: AdvanceSwitch, context: Context) -> Writes | Rejected:
    reason = body.reason or ("" if body.full else f"promoted by {context.actor}")
    return (Write("switch", body.switch, PromoteSwitch(body.switch, body.step, body.full, reason, context.now)),)


def _retry(world: World, body: RetrySwitch, context: Context) -> Writes | Rejected:
    state: SwitchState = world.state("switch", body.switch)
    if state.phase == "unknown":
        return unknown_switch(body.switch)
    if state.phase not in ENDED:
        return Rejected(
            "switch_running",
            f"switch {state.switch} is {state.phase.replace('_', ' ')}: there is nothing to retry yet",
            f"wait for it (turnout status {state.switch}) or end it (turnout abort {state.switch})",
        )
    again = StartSwitch(
        model=state.model,
        version=state.target,
        strategy=state.strategy,
        parameters=state.parameters,
        reason=body.reason or f"retry of {state.switch}",
        bake_s=state.bake_s,
        drain_s=state.drain_s,
        hold=state.hold is not None,
    )
    writes = _start(world, again, context)
    if isinstance(writes, Rejected):
        return writes
    replace = msgspec.structs.replace  # what it follows was frozen then; the policy's name goes with it
    return tuple(
        replace(write, command=replace(write.command, policy=state.policy))
        if isinstance(write.command, OpenSwitch)
        else write
        for write in writes
    )


def _stop(world: World, body: StopInstance, context: Context) -> Writes | Rejected:
    one: instance.InstanceState = world.state("instance", body.instance)
    if one.phase == "unknown":
        return Rejected(
            "instance_unknown", f"there is no instance {body.instance!r}", "list a model's instances: turnout get MODEL"
        )
    if body.force and not body.reason:
        return Rejected(
            "reason_missing",
            "a forced stop ends requests that run, and the log must say why",
            "give the reason: --reason TEXT",
        )
    if not body.force and not placement.safe(world, one):
        users, live = placement.users(world, one), world.live_gateways
        return Rejected(
            "instance_in_use",
            f"{len(users)} of {len(live)} live gateways may send requests of {one.model} {one.version} to "
            f"{one.instance}, or have some on it",
            f"switch {one.model} to another version and wait until it has drained, or end what runs on it: "
            f"turnout stop {one.instance} --force --reason TEXT",
        )
    by = context.actor or "an operator"
    command = instance.DrainInstance(
        one.instance, body.reason or f"stopped by {by}", forced_by=by if body.force else ""
    )
    return (Write("instance", one.instance, command),)


def _gateway(world: World, body: gateway.GatewayCommand, context: Context) -> Writes | Rejected:
    return (Write("gateway", body.gateway, body),) if body.gateway else _nameless("gateway")


def _worker(world: World, body: worker.WorkerCommand, context: Context) -> Writes | Rejected:
    return (Write("worker", body.worker, body),) if body.worker else _nameless("worker")


def _start_spare(world: World, body: StartSpare, context: Context) -> Writes | Rejected:
    """Only where it fits beside everything, and nothing that is needed waits for room."""
    state: worker.WorkerState = world.state("worker", body.worker)
    others = tuple(engine for engine in state.kept if engine.name != body.engine.name)
    kept = tuple(sorted((*others, body.engine), key=lambda engine: engine.name))
    if placement.something_needed_waits(world):
        return Rejected("no_capacity", "something that is needed waits for room", "ask again later")
    if state.live and (lacks := Ledger(world, ()).lacks(body.worker, body.engine)):
        return Rejected("no_memory", lacks, "ask again once something has left")
    return (Write("worker", body.worker, worker.ReportKept(body.worker, kept)),)


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
    ("ops", "switch.pause"): (HoldSwitch, _pause),
    ("ops", "switch.resume"): (ContinueSwitch, _resume),
    ("ops", "switch.promote"): (AdvanceSwitch, _promote),
    ("ops", "switch.retry"): (RetrySwitch, _retry),
    ("ops", "version.preload"): (PreloadVersion, _preload),
    ("ops", "version.evict"): (EvictVersion, _evict),
    ("ops", "version.pin"): (residence.PinVersion, _pin),
    ("ops", "version.unpin"): (residence.UnpinVersion, _pin),
    ("ops", "version.replicas"): (residence.SetReplicas, _pin),
    ("ops", "version.place"): (PlaceVersion, _place),
    ("ops", "cache.show"): (AskCache, _cache),
    ("ops", "model.policy"): (model.SetPolicy, _set_policy),
    ("ops", "model.rules"): (model.SetRules, _set_rules),
    ("ops", "model.serving"): (model.SetServing, _set_serving),
    ("ops", "alert.acknowledge"): (alert.AcknowledgeAlert, _acknowledge),
    ("ops", "model.undo"): (UndoModel, _undo),
    ("ops", "instance.stop"): (StopInstance, _stop),
    ("gw", "model.wake"): (WakeModel, _wake),
    ("gw", "gateway.join"): (gateway.JoinGateway, _gateway),
    ("gw", "gateway.applied"): (gateway.ReportApplied, _gateway),
    ("gw", "gateway.drained"): (gateway.ReportDrained, _gateway),
    ("gw", "gateway.leave"): (gateway.LeaveGateway, _gateway),
    ("worker", "worker.join"): (worker.JoinWorker, _worker),
    ("worker", "worker.leave"): (worker.LeaveWorker, _worker),
    ("worker", "worker.kept"): (worker.ReportKept, _worker),
    ("worker", "worker.spare"): (StartSpare, _start_spare),
    ("worker", "version.inspected"): (model.ReportInspected, _inspected),
    ("worker", "instance.loading"): (instance.ReportLoading, _instance),
    ("worker", "instance.ready"): (instance.ReportReady, _instance),
    ("worker", "instance.tier"): (instance.ReportTierFailed, _instance),
    ("worker", "instance.slept"): (instance.ReportSlept, _instance),
    ("worker", "instance.woken"): (instance.ReportWoken, _instance),
    ("worker", "instance.measured"): (instance.ReportMeasured, _instance),
    ("worker", "instance.probed"): (instance.ReportProbed, _instance),
    ("worker", "instance.stopped"): (instance.ReportStopped, _instance),
    ("worker", "instance.failed"): (instance.ReportFailed, _instance),
}
