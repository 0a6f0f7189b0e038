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
from turnout.projections.fold import Fold

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


class SwitchView(msgspec.Struct, gc=False):
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


class Switches(Fold):
    """Fold of the switch events."""

    kind = "switch"

    def __init__(self) -> None:
        super().__init__(
            {
                SwitchRequested: self._requested,
                InstancesRequested: self._instances_requested,
                TargetReady: self._target_ready,
                StepStarted: self._step_started,
                StepApplied: self._step_applied,
                BakeStarted: self._bake_started,
                DrainStarted: self._drain_started,
                SwitchCompleted: self._completed,
                RollbackStarted: self._rollback_started,
                RolledBack: self._rolled_back,
                SwitchAborted: self._aborted,
                SwitchFailed: self._failed,
            }
        )
        self.switches: dict[str, SwitchView] = {}

    def view(self, id: str) -> SwitchView | None:
        """The view of one switch."""
        return self.switches.get(id)

    def _requested(self, event: SwitchRequested, recorded: Recorded) -> None:
        self.changed.add(event.switch)
        self.switches[event.switch] = SwitchView(
            switch=event.switch,
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

    def _instances_requested(self, event: InstancesRequested, recorded: Recorded) -> None:
        view = self._view(event.switch)
        view.phase = "loading"
        view.instances = event.instances

    def _target_ready(self, event: TargetReady, recorded: Recorded) -> None:
        view = self._view(event.switch)
        view.phase = "ready"
        view.instances = event.instances
        view.ready_s = event.seconds
        view.warm = event.warm

    def _step_started(self, event: StepStarted, recorded: Recorded) -> None:
        view = self._view(event.switch)
        view.phase = "stepping"
        view.weight = event.weight

    def _step_applied(self, event: StepApplied, recorded: Recorded) -> None:
        view = self._view(event.switch)
        view.phase = "stepped"
        view.cutover_s = event.seconds

    def _bake_started(self, event: BakeStarted, recorded: Recorded) -> None:
        view = self._view(event.switch)
        view.phase = "baking"
        view.bake_until = event.until

    def _drain_started(self, event: DrainStarted, recorded: Recorded) -> None:
        self._view(event.switch).phase = "draining"

    def _completed(self, event: SwitchCompleted, recorded: Recorded) -> None:
        view = self._end(event.switch, "completed", recorded)
        view.drain_s = event.drain_s

    def _rollback_started(self, event: RollbackStarted, recorded: Recorded) -> None:
        view = self._view(event.switch)
        view.phase = "rolling_back"
        view.weight = 0.0
        view.reason = event.reason

    def _rolled_back(self, event: RolledBack, recorded: Recorded) -> None:
        self._end(event.switch, "rolled_back", recorded)

    def _aborted(self, event: SwitchAborted, recorded: Recorded) -> None:
        view = self._end(event.switch, "aborted", recorded)
        view.weight = 0.0
        view.reason = event.reason

    def _failed(self, event: SwitchFailed, recorded: Recorded) -> None:
        view = self._end(event.switch, "failed", recorded)
        view.stage = event.stage
        view.reason = event.reason
        view.log_tail = event.log_tail

    def _end(self, id: str, outcome: str, recorded: Recorded) -> SwitchView:
        view = self._view(id)
        view.phase = outcome
        view.ended_at = recorded.envelope.time
        return view

    def _view(self, id: str) -> SwitchView:
        self.changed.add(id)
        view = self.switches.get(id)
        if view is None:
            view = self.switches[id] = SwitchView(id)
        return view
