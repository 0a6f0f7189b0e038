"""View ``model.<model>``: versions, what is active, what is known to be good, which switch runs. No decisions."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from turnout.events.model import (
    ActiveVersionChanged,
    EngineSpec,
    KnownGoodMarked,
    KnownGoodRevoked,
    ModelRegistered,
    SwitchAdmitted,
    SwitchClosed,
    VersionDeregistered,
    VersionRegistered,
)

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


class VersionView(msgspec.Struct):
    """One version as it was registered, by whom and when (UTC)."""

    version: str
    engine: EngineSpec
    digest: str
    registered_at: datetime
    registered_by: str
    note: str = ""


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
    """

    model: str
    versions: dict[str, VersionView] = {}
    active: str = ""
    known_good: tuple[str, ...] = ()
    switch: str = ""
    last_switch: str = ""
    last_outcome: str = ""


class Registry:
    """Fold of the model events."""

    kind = "model"

    def __init__(self) -> None:
        self.models: dict[str, ModelView] = {}
        self.changed: set[str] = set()

    def apply(self, recorded: Recorded) -> None:
        """Take one event; others than its own are skipped."""
        event = recorded.event
        match event:
            case ModelRegistered(name):
                self.models.setdefault(name, ModelView(name))
            case VersionRegistered(name, version, engine, digest, note):
                self._model(name).versions[version] = VersionView(
                    version, engine, digest, recorded.envelope.time, recorded.envelope.actor, note
                )
            case VersionDeregistered(name, version):
                view = self._model(name)
                view.versions.pop(version, None)
                view.known_good = tuple(v for v in view.known_good if v != version)
            case SwitchAdmitted(name, switch):
                self._model(name).switch = switch
            case SwitchClosed(name, switch, outcome):
                view = self._model(name)
                view.switch, view.last_switch, view.last_outcome = "", switch, outcome
            case ActiveVersionChanged(name, version):
                self._model(name).active = version
            case KnownGoodMarked(name, version):
                view = self._model(name)
                view.known_good = (*(v for v in view.known_good if v != version), version)
            case KnownGoodRevoked(name, version):
                view = self._model(name)
                view.known_good = tuple(v for v in view.known_good if v != version)
            case _:
                return
        self.changed.add(name)

    def view(self, id: str) -> ModelView | None:
        """The view of one model."""
        return self.models.get(id)

    def _model(self, name: str) -> ModelView:
        return self.models.setdefault(name, ModelView(name))
