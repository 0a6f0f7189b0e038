"""The story of one switch, told by the log alone: what was asked, each step, each verdict, who did what, the end.

A fold. Knows neither terminal nor page nor HTTP: they show what it made.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from turnout.core.health import SwitchImpact
from turnout.events.switch import (
    BakeStarted,
    DrainStarted,
    Figure,
    RollbackStarted,
    RolledBack,
    StepApplied,
    StepStarted,
    SwitchAborted,
    SwitchCompleted,
    SwitchConcluded,
    SwitchFailed,
    SwitchRequested,
    TargetReady,
    VerdictReached,
)
from turnout.projections.audit import Audit

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


class Step(msgspec.Struct):
    """One traffic level.

    ``applied_s``: until every gateway (named) had it; None where that never came. ``lasted_s``: until what came next.
    """

    step: int
    weight: float
    mirror: float
    revision: int
    reason: str
    at: datetime
    applied_s: float | None = None
    gateways: tuple[str, ...] = ()
    lasted_s: float | None = None


class Moment(msgspec.Struct, frozen=True):
    """One line of what happened. ``actor``: as in the envelope; ``person``: an operator asked for it."""

    at: datetime
    actor: str
    person: bool
    type: str
    tone: str
    sentence: str


class Share(msgspec.Struct, frozen=True):
    """From ``at`` (UTC) on the target has ``weight`` percent."""

    at: datetime
    weight: float


class Report(msgspec.Struct):
    """One switch.

    Attributes:
        outcome: running, completed, rolled_back, aborted, concluded or failed.
        serves: the version that has all the traffic after it; empty while it runs, and where that is none.
        back_to: where a rollback goes; empty without one.
        ended_because: the reason in the log.
        effect: the newest figures that have an interval: target over source.
        sample_ratio: the newest check that the split was kept, None where none was made.
        shares: the target's share over time, by the times at which gateways had applied it.
        impact: what clients noticed, by samples that are kept for a while only; None where they are gone, or nobody
            could be asked. Everything else is the log's.
    """

    switch: str
    model: str = ""
    source: str = ""
    target: str = ""
    strategy: str = ""
    policy: str = ""
    parameters: dict[str, object] = {}
    undo: bool = False
    reason: str = ""
    actor: str = ""
    asked_at: datetime | None = None
    ended_at: datetime | None = None
    outcome: str = "running"
    ended_because: str = ""
    serves: str = ""
    back_to: str = ""
    ready_s: float | None = None
    warm: bool = False
    drain_s: float | None = None
    steps: list[Step] = []
    verdicts: list[VerdictReached] = []
    effect: list[Figure] = []
    sample_ratio: Figure | None = None
    shares: list[Share] = []
    moments: list[Moment] = []
    impact: SwitchImpact | None = None


class Story:
    """Fold of the log to the report of one switch. Feed it the log from the start."""

    def __init__(self, switch: str) -> None:
        self._audit = Audit()
        self._switch = switch
        self.report: Report | None = None

    def take(self, recorded: Recorded) -> None:
        """The log's next event."""
        entry = self._audit.entry(recorded)
        if entry.switch != self._switch:
            return
        if isinstance(recorded.event, SwitchRequested):
            self.report = _begun(recorded.event, recorded)
        report = self.report
        if report is None:
            return  # the reservation, written just before
        if entry.tone != "detail":
            person = recorded.envelope.actor.partition(":")[0] == "ops"
            at, actor = recorded.envelope.time, recorded.envelope.actor
            report.moments.append(Moment(at, actor, person, entry.type, entry.tone, entry.sentence))
        if getattr(recorded.event, "switch", "") == self._switch:
            _take(report, recorded)


def _begun(event: SwitchRequested, recorded: Recorded) -> Report:
    return Report(
        switch=event.switch,
        model=event.model,
        source=event.source,
        target=event.target,
        strategy=event.strategy,
        policy=event.policy,
        parameters=event.parameters,
        undo=event.undo,
        reason=event.reason,
        actor=recorded.envelope.actor,
        asked_at=event.at,
        shares=[Share(event.at, 0.0)],
    )


def _take(report: Report, recorded: Recorded) -> None:
    """What an event of the switch adds."""
    at = recorded.envelope.time
    match recorded.event:
        case TargetReady(_, _, took_s, warm):
            report.ready_s, report.warm = took_s, warm
        case StepStarted(_, step, weight, revision, reason, started, mirror):
            _leave(report, started)
            report.steps.append(Step(step, weight, mirror, revision, reason, started))
        case StepApplied(_, _, _, gateways, took_s):
            if report.steps:
                report.steps[-1].applied_s, report.steps[-1].gateways = took_s, gateways
                report.shares.append(Share(at, report.steps[-1].weight))
        case VerdictReached() as verdict:
            report.verdicts.append(verdict)
            report.effect = [f for f in verdict.figures if f.low is not None and f.high is not None] or report.effect
            ratio = next((f for f in verdict.figures if f.name == "sample_ratio"), None)
            report.sample_ratio = ratio or report.sample_ratio
        case BakeStarted() | DrainStarted():
            _leave(report, at)
        case RollbackStarted(_, _, _, reason, started, to):
            _leave(report, started)
            report.ended_because, report.back_to = reason, to or report.source
        case SwitchCompleted(_, drain_s):
            _end(report, "completed", at, 100.0, report.target)
            report.drain_s = drain_s
        case RolledBack():
            _end(report, "rolled_back", at, 0.0, report.back_to)
        case SwitchAborted(_, reason):
            _end(report, "aborted", at, 0.0, report.back_to or report.source)
            report.ended_because = reason
        case SwitchConcluded(_, kept, reason):
            _end(report, "concluded", at, 0.0, kept)
            report.ended_because = reason
        case SwitchFailed(_, stage, reason):
            _end(report, "failed", at, 0.0, report.source)
            report.ended_because = f"stage {stage}: {reason}"
        case _:
            pass


def _leave(report: Report, at: datetime) -> None:
    """The newest step is over."""
    if report.steps and report.steps[-1].lasted_s is None:
        report.steps[-1].lasted_s = max(0.0, (at - report.steps[-1].at).total_seconds())


def _end(report: Report, outcome: str, at: datetime, weight: float, serves: str) -> None:
    _leave(report, at)
    report.outcome, report.ended_at, report.serves = outcome, at, serves
    report.shares.append(Share(at, weight))
