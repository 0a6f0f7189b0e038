"""View ``model.<model>``: versions, what is active, what is known to be good, which switch runs. No decisions."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from turnout.events.instance import InstanceFailed, InstanceReady, InstanceRequested, InstanceStopped
from turnout.events.model import (
    ActiveVersionChanged,
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
    VersionValidated,
)
from turnout.events.route import Rule
from turnout.projections.fold import Fold

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.events.envelope import Recorded


class VersionView(msgspec.Struct):
    """One version as it was registered, by whom and when (UTC), and what its files say.

    Attributes:
        digest: of ``engine``.
        state: ``checking`` until a worker has looked at its files, then ``validated`` or ``rejected``. A version
            without files is validated at once.
        inspection: what the files say; None where it has none or nobody has looked yet.
        code, reason, hint: why it is rejected, and what to do; empty where it is not.
        checked_at: when (UTC) its files were looked at, by the worker ``checked_by``.
        loads: how often an instance of it became ready; the newest after ``load_s`` seconds, with ``bytes`` of memory.
    """

    version: str
    engine: EngineSpec
    digest: str
    registered_at: datetime
    registered_by: str
    note: str = ""
    tags: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    parent: str = ""
    state: str = "validated"
    inspection: Inspection | None = None
    code: str = ""
    reason: str = ""
    hint: str = ""
    checked_at: datetime | None = None
    checked_by: str = ""
    loads: int = 0
    load_s: float = 0.0
    bytes: int = 0


class ModelView(msgspec.Struct):
    """One served name.

    Attributes:
        model: the served name.
        versions: by name, in the order of registration.
        active: version that serves when no switch runs; empty where none does yet.
        known_good: versions that finished a bake, newest last; the last one other than ``active`` is where an undo
            goes.
        switch: id of the running switch, empty where none runs.
        last_switch: id of the newest switch that ended, and ``last_outcome`` how.
        policies: name → policy as it was given.
        rules: in the order in which gateways ask them.
        sequence: of the model's newest event; a command may ask to be refused where the model has moved on since.
        serving: always loaded, or on demand; ``wanted``: on demand and in use, or on the way to it.
        pinned: versions whose instances the cache keeps.
        preloads: version that waits to be preloaded → its priority.
        replicas: version → instances while it serves, where that is not one.
    """

    model: str
    versions: dict[str, VersionView] = {}
    active: str = ""
    known_good: tuple[str, ...] = ()
    switch: str = ""
    last_switch: str = ""
    last_outcome: str = ""
    policies: dict[str, dict[str, object]] = {}
    rules: tuple[Rule, ...] = ()
    sequence: int = 0
    serving: Serving = Serving()
    wanted: bool = False
    pinned: tuple[str, ...] = ()
    preloads: dict[str, int] = {}
    replicas: dict[str, int] = {}


class Registry(Fold):
    """Fold of the model events, and of the instances that became ready."""

    kind = "model"

    def __init__(self) -> None:
        super().__init__(
            {
                ModelRegistered: self._model_registered,
                VersionRegistered: self._version_registered,
                VersionValidated: self._version_validated,
                VersionRejected: self._version_rejected,
                VersionDeregistered: self._version_deregistered,
                SwitchAdmitted: self._switch_admitted,
                SwitchClosed: self._switch_closed,
                ActiveVersionChanged: self._active_version_changed,
                KnownGoodMarked: self._known_good_marked,
                KnownGoodRevoked: self._known_good_revoked,
                PolicyChanged: self._policy_changed,
                RulesChanged: self._rules_changed,
                InstanceRequested: self._instance_requested,
                InstanceReady: self._instance_ready,
                InstanceStopped: self._instance_ended,
                InstanceFailed: self._instance_ended,
                ServingChanged: self._serving_changed,
                DemandSeen: self._demand_seen,
                DemandEnded: self._demand_ended,
                VersionPinned: self._version_pinned,
                VersionUnpinned: self._version_unpinned,
                PreloadRequested: self._preload_requested,
                PreloadEnded: self._preload_ended,
                EvictionRequested: self._eviction_requested,
                ReplicasChanged: self._replicas_changed,
            }
        )
        self.folds = {
            **self.folds,
            **{type: self._noted(self.folds.get(type)) for type in get_args(ModelEvent)},
        }
        self.models: dict[str, ModelView] = {}
        self._homes: dict[str, tuple[str, str]] = {}  # instance → its model and version, as long as it lives

    def view(self, id: str) -> ModelView | None:
        """The view of one model."""
        return self.models.get(id)

    def _noted(self, fold: Callable[[Any, Recorded], None] | None) -> Callable[[Any, Recorded], None]:
        """The same, and the view says which event was its newest."""

        def folded(event: Any, recorded: Recorded) -> None:
            if fold is not None:
                fold(event, recorded)
            self._model(event.model).sequence = recorded.sequence

        return folded

    def _model_registered(self, event: ModelRegistered, recorded: Recorded) -> None:
        self._model(event.model)

    def _version_registered(self, event: VersionRegistered, recorded: Recorded) -> None:
        envelope = recorded.envelope
        self._model(event.model).versions[event.version] = VersionView(
            event.version,
            event.engine,
            event.digest,
            envelope.time,
            envelope.actor,
            event.note,
            event.tags,
            event.metrics,
            event.parent,
            state="checking" if event.engine.path or event.engine.adapter else "validated",
        )

    def _version_validated(self, event: VersionValidated, recorded: Recorded) -> None:
        view = self._model(event.model).versions.get(event.version)
        if view is not None:
            view.state = "validated"
            view.inspection = event.inspection
            view.code = view.reason = view.hint = ""
            view.checked_at = recorded.envelope.time
            view.checked_by = event.worker

    def _version_rejected(self, event: VersionRejected, recorded: Recorded) -> None:
        view = self._model(event.model).versions.get(event.version)
        if view is not None:
            view.state = "rejected"
            view.code, view.reason, view.hint = event.code, event.reason, event.hint
            view.checked_at = recorded.envelope.time
            view.checked_by = event.worker

    def _version_deregistered(self, event: VersionDeregistered, recorded: Recorded) -> None:
        view = self._model(event.model)
        view.versions.pop(event.version, None)
        view.known_good = _without(view.known_good, event.version)
        view.pinned = _without(view.pinned, event.version)
        view.preloads.pop(event.version, None)
        view.replicas.pop(event.version, None)

    def _switch_admitted(self, event: SwitchAdmitted, recorded: Recorded) -> None:
        self._model(event.model).switch = event.switch

    def _switch_closed(self, event: SwitchClosed, recorded: Recorded) -> None:
        view = self._model(event.model)
        view.switch = ""
        view.last_switch = event.switch
        view.last_outcome = event.outcome

    def _active_version_changed(self, event: ActiveVersionChanged, recorded: Recorded) -> None:
        view = self._model(event.model)
        view.active = event.version
        view.wanted = view.wanted or bool(event.switch)

    def _known_good_marked(self, event: KnownGoodMarked, recorded: Recorded) -> None:
        view = self._model(event.model)
        view.known_good = (*_without(view.known_good, event.version), event.version)

    def _known_good_revoked(self, event: KnownGoodRevoked, recorded: Recorded) -> None:
        view = self._model(event.model)
        view.known_good = _without(view.known_good, event.version)

    def _policy_changed(self, event: PolicyChanged, recorded: Recorded) -> None:
        policies = self._model(event.model).policies
        if event.policy:
            policies[event.name] = event.policy
        else:
            policies.pop(event.name, None)

    def _rules_changed(self, event: RulesChanged, recorded: Recorded) -> None:
        self._model(event.model).rules = event.rules

    def _instance_requested(self, event: InstanceRequested, recorded: Recorded) -> None:
        self._homes[event.instance] = (event.model, event.version)

    def _instance_ready(self, event: InstanceReady, recorded: Recorded) -> None:
        model, version = self._homes.get(event.instance, ("", ""))
        view = self.models.get(model)
        if view is None or version not in view.versions:
            return
        self.changed.add(model)
        one = view.versions[version]
        one.loads += 1
        one.load_s = event.load_s
        one.bytes = event.bytes

    def _instance_ended(self, event: InstanceStopped | InstanceFailed, recorded: Recorded) -> None:
        self._homes.pop(event.instance, None)

    def _serving_changed(self, event: ServingChanged, recorded: Recorded) -> None:
        self._model(event.model).serving = event.serving

    def _demand_seen(self, event: DemandSeen, recorded: Recorded) -> None:
        self._model(event.model).wanted = True

    def _demand_ended(self, event: DemandEnded, recorded: Recorded) -> None:
        self._model(event.model).wanted = False

    def _version_pinned(self, event: VersionPinned, recorded: Recorded) -> None:
        view = self._model(event.model)
        view.pinned = (*_without(view.pinned, event.version), event.version)

    def _version_unpinned(self, event: VersionUnpinned, recorded: Recorded) -> None:
        view = self._model(event.model)
        view.pinned = _without(view.pinned, event.version)

    def _preload_requested(self, event: PreloadRequested, recorded: Recorded) -> None:
        self._model(event.model).preloads[event.version] = event.priority

    def _preload_ended(self, event: PreloadEnded, recorded: Recorded) -> None:
        self._model(event.model).preloads.pop(event.version, None)

    def _eviction_requested(self, event: EvictionRequested, recorded: Recorded) -> None:
        self._model(event.model).preloads.pop(event.version, None)

    def _replicas_changed(self, event: ReplicasChanged, recorded: Recorded) -> None:
        replicas = self._model(event.model).replicas
        if event.replicas == 1:
            replicas.pop(event.version, None)
        else:
            replicas[event.version] = event.replicas

    def _model(self, name: str) -> ModelView:
        self.changed.add(name)
        view = self.models.get(name)
        if view is None:
            view = self.models[name] = ModelView(name)
        return view


def _without(versions: tuple[str, ...], version: str) -> tuple[str, ...]:
    if version not in versions:
        return versions
    at = versions.index(version)
    return versions[:at] + versions[at + 1 :]
