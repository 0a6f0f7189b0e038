"""View ``switch.<id>``: one switch's progress, as an operator reads it. No decisions."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from turnout.events.switch import (
    BakeStarted,
    DrainStarted,
    InstancesRequested,
    RollbackStarted,
    RolledBack,
    StepApplied,
    StepStarted,
    SwitchAborted,
    SwitchCompleted,
    SwitchFailed,
    SwitchRequested,
    TargetReady,
)

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


class SwitchView(msgspec.Struct):
    """One switch.

    Attributes:
        switch: its id.
        model: the served name.
        source: version that served before; empty at a model's first switch.
        target: version that was asked for.
        strategy: name of the strategy.
        phase: requested, loading, ready, stepping, stepped, baking, draining, rolling_back, or the outcome:
            completed, rolled_back, aborted, failed.
        weight: percent that the target has.
        reason: why it was asked for, and later why it ended as it did.
        stage: where a failed load stopped.
        log_tail: the engine's own last lines after a failed load.
        actor: who asked.
        requested_at, ended_at: UTC.
        deadline, bake_until: UTC.
        ready_s: seconds from the request to a proven target; ``warm`` where nothing had to be loaded.
        cutover_s: seconds from the newest step to the last gateway's acknowledgement.
        drain_s: seconds from the first route without the source to its last request's end.
    """

    switch: str
    model: str = ""
    source: str = ""
    target: str = ""
    strategy: str = ""
    phase: str = "requested"
    weight: float = 0.0
    undo: bool = False
    reason: str = ""
    stage: str = ""
    log_tail: tuple[str, ...] = ()
    actor: str = ""
    requested_at: datetime | None = None
    ended_at: datetime | None = None
    deadline: datetime | None = None
    bake_until: datetime | None = None
    instances: tuple[str, ...] = ()
    ready_s: float | None = None
    warm: bool = False
    cutover_s: float | None = None
    drain_s: float | None = None


class Switches:
    """Fold of the switch events."""

    kind = "switch"

    def __init__(self) -> None:
        self.switches: dict[str, SwitchView] = {}
        self.changed: set[str] = set()

    def apply(self, recorded: Recorded) -> None:
        """Take one event; others than its own are skipped."""
        event = recorded.event
        time = recorded.envelope.time
        match event:
            case SwitchRequested(id):
                self._view(id)
                self.switches[id] = SwitchView(
                    switch=id,
                    model=event.model,
                    source=event.source,
                    target=event.target,
                    strategy=event.strategy,
                    undo=event.undo,
                    reason=event.reason,
                    actor=recorded.envelope.actor,
                    requested_at=event.at,
                    deadline=event.deadline,
                )
            case InstancesRequested(id, instances):
                view = self._view(id)
                view.phase, view.instances = "loading", instances
            case TargetReady(id, instances, seconds, warm):
                view = self._view(id)
                view.phase, view.instances, view.ready_s, view.warm = "ready", instances, seconds, warm
            case StepStarted(id, _, weight):
                view = self._view(id)
                view.phase, view.weight = "stepping", weight
            case StepApplied(id, _, _, _, seconds):
                view = self._view(id)
                view.phase, view.cutover_s = "stepped", seconds
            case BakeStarted(id, until):
                view = self._view(id)
                view.phase, view.bake_until = "baking", until
            case DrainStarted(id):
                self._view(id).phase = "draining"
            case SwitchCompleted(id, drain_s):
                view = self._view(id)
                view.phase, view.drain_s, view.ended_at = "completed", drain_s, time
            case RollbackStarted(id, _, _, reason):
                view = self._view(id)
                view.phase, view.weight, view.reason = "rolling_back", 0.0, reason
            case RolledBack(id):
                view = self._view(id)
                view.phase, view.ended_at = "rolled_back", time
            case SwitchAborted(id, reason):
                view = self._view(id)
                view.phase, view.weight, view.reason, view.ended_at = "aborted", 0.0, reason, time
            case SwitchFailed(id, stage, reason, log_tail):
                view = self._view(id)
                view.phase, view.stage, view.reason, view.log_tail = "failed", stage, reason, log_tail
                view.ended_at = time
            case _:
                return

    def view(self, id: str) -> SwitchView | None:
        """The view of one switch."""
        return self.switches.get(id)

    def _view(self, id: str) -> SwitchView:
        self.changed.add(id)
        return self.switches.setdefault(id, SwitchView(id))
