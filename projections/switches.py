"""View ``switch.<id>``: one switch's progress, as an operator reads it. No decisions."""

from __future__ import annotations

from collections import deque
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

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
from turnout.projections.fold import Fold

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


#: Views of ended switches that are kept of each model, the newest. Older ones are told by the log.
ENDED_MOST = 100


class SwitchView(msgspec.Struct, gc=False):
    """One switch.

    Attributes:
        switch: its id.
        model: the served name.
        source: version that served before; empty at a model's first switch.
        target: version that was asked for.
        strategy: name of the strategy.
        phase: requested, loading, ready, stepping, stepped, paused, baking, draining, rolling_back, or the outcome:
            completed, rolled_back, aborted, concluded (an experiment ended and the source stays), failed.
        weight: percent that the target has; ``mirror``: percent of the requests that are copied to it.
        step: number of the newest step.
        paused: why it stands still: operator, pause (the policy's), inconclusive, invalid; empty where it does not.
        paused_because: the reason of the pause, in the words of whoever asked for it.
        paused_until: UTC, when it goes on by itself; None where somebody must decide.
        verdict: the judge's newest decision with all its figures; ``verdicts`` counts them.
        policy: name of the policy that it follows, empty for none; ``parameters`` are the strategy's own.
        reason: why it was asked for, and later why it ended as it did.
        stage: where a failed load stopped.
        log_tail: the engine's own last lines after a failed load.
        actor: who asked.
        requested_at, ended_at: UTC.
        deadline, bake_until: UTC.
        ready_s: seconds from the request to a proven target; ``warm`` where nothing had to be loaded.
        cutover_s: seconds from the newest step to the last gateway's acknowledgement.
        drain_s: seconds from the first route without the source to its last request's end.
        back_to: version that a rollback gave everything to: the source, or an older one where the source was not ready;
            empty where nothing was rolled back.
        expected_pause_s, pause_s: seconds that requests had to wait, as foretold and in fact; None where none had to.
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
    step: int = 0
    mirror: float = 0.0
    paused: str = ""
    paused_because: str = ""
    paused_until: datetime | None = None
    verdict: VerdictReached | None = None
    verdicts: int = 0
    policy: str = ""
    parameters: dict[str, object] = {}
    back_to: str = ""
    expected_pause_s: float | None = None
    pause_s: float | None = None


class Switches(Fold):
    """Fold of the switch events.

    Attributes:
        switches: id → view, those that run and the newest that have ended.
    """

    kind = "switch"

    def __init__(self) -> None:
        super().__init__(
            {
                SwitchRequested: self._requested,
                InstancesRequested: self._instances_requested,
                HoldStarted: self._hold_started,
                HoldReleased: self._hold_released,
                TargetReady: self._target_ready,
                StepStarted: self._step_started,
                StepApplied: self._step_applied,
                VerdictReached: self._verdict_reached,
                SwitchPaused: self._paused,
                SwitchResumed: self._resumed,
                SwitchPromoted: self._resumed,
                BakeStarted: self._bake_started,
                DrainStarted: self._drain_started,
                SwitchCompleted: self._completed,
                RollbackStarted: self._rollback_started,
                RolledBack: self._rolled_back,
                SwitchAborted: self._aborted,
                SwitchConcluded: self._concluded,
                SwitchFailed: self._failed,
            }
        )
        self.switches: dict[str, SwitchView] = {}
        #: Paused switch → its phase before, and since when it stands still.
        self._before: dict[str, tuple[str, datetime]] = {}
        #: Model → its ended switches that are kept, in the order in which they ended.
        self._ended: dict[str, deque[str]] = {}

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
            policy=event.policy,
            parameters=event.parameters,
        )

    def _instances_requested(self, event: InstancesRequested, recorded: Recorded) -> None:
        view = self._view(event.switch)
        if view.phase != "holding":
            self._move(view, "loading")
        view.instances = event.instances

    def _hold_started(self, event: HoldStarted, recorded: Recorded) -> None:
        view = self._view(event.switch)
        view.phase = "holding"
        view.expected_pause_s = event.expected_s

    def _hold_released(self, event: HoldReleased, recorded: Recorded) -> None:
        self._view(event.switch).pause_s = event.seconds

    def _target_ready(self, event: TargetReady, recorded: Recorded) -> None:
        view = self._view(event.switch)
        self._move(view, "ready")
        view.instances = event.instances
        view.ready_s = event.seconds
        view.warm = event.warm

    def _step_started(self, event: StepStarted, recorded: Recorded) -> None:
        view = self._view(event.switch)
        view.phase = "stepping"
        view.step = event.step
        view.weight = event.weight
        view.mirror = event.mirror

    def _step_applied(self, event: StepApplied, recorded: Recorded) -> None:
        view = self._view(event.switch)
        self._move(view, "stepped")
        view.cutover_s = event.seconds

    def _verdict_reached(self, event: VerdictReached, recorded: Recorded) -> None:
        view = self._view(event.switch)
        view.verdict = event
        view.verdicts += 1

    def _paused(self, event: SwitchPaused, recorded: Recorded) -> None:
        view = self._view(event.switch)
        self._before.setdefault(event.switch, (view.phase, event.at))
        view.phase, view.paused, view.paused_until = "paused", event.cause, event.until
        view.paused_because = event.reason

    def _resumed(self, event: SwitchResumed | SwitchPromoted, recorded: Recorded) -> None:
        view = self._view(event.switch)
        phase, at = self._before.pop(event.switch, (view.phase, event.at))
        self._moves(view)
        if view.phase == "paused":
            view.phase = phase
        stood = event.at - at  # counts for no deadline
        view.deadline = None if view.deadline is None else view.deadline + stood
        view.bake_until = None if view.bake_until is None else view.bake_until + stood

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
        self._moves(view)
        self._before.pop(event.switch, None)
        view.weight = view.mirror = 0.0
        view.reason = event.reason
        view.back_to = event.to or view.source

    def _rolled_back(self, event: RolledBack, recorded: Recorded) -> None:
        self._end(event.switch, "rolled_back", recorded)

    def _aborted(self, event: SwitchAborted, recorded: Recorded) -> None:
        view = self._end(event.switch, "aborted", recorded)
        view.weight = 0.0
        view.reason = event.reason

    def _concluded(self, event: SwitchConcluded, recorded: Recorded) -> None:
        view = self._end(event.switch, "concluded", recorded)
        view.reason = event.reason

    def _failed(self, event: SwitchFailed, recorded: Recorded) -> None:
        view = self._end(event.switch, "failed", recorded)
        view.stage = event.stage
        view.reason = event.reason
        view.log_tail = event.log_tail

    @staticmethod
    def _moves(view: SwitchView) -> None:
        """It stands still no more."""
        view.paused, view.paused_because, view.paused_until = "", "", None

    def _move(self, view: SwitchView, phase: str) -> None:
        """Into the next phase; what is paused shows it when it goes on."""
        if view.switch in self._before:
            self._before[view.switch] = (phase, self._before[view.switch][1])
        else:
            view.phase = phase

    def _end(self, id: str, outcome: str, recorded: Recorded) -> SwitchView:
        view = self._view(id)
        self._before.pop(id, None)
        self._moves(view)
        view.phase = outcome
        view.ended_at = recorded.envelope.time
        ended = self._ended.setdefault(view.model, deque())
        if id not in ended:
            ended.append(id)
        if len(ended) > ENDED_MOST:
            oldest = ended.popleft()
            del self.switches[oldest]
            self.changed.add(oldest)
        return view

    def _view(self, id: str) -> SwitchView:
        self.changed.add(id)
        view = self.switches.get(id)
        if view is None:
            view = self.switches[id] = SwitchView(id)
        return view
