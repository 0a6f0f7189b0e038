"""``report``: one switch from the log: what was asked, each step, each verdict with its figures, who, the end."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.text import Text

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
from turnout.projections.audit import Audit, seconds, who
from turnout.workers.cli.terminal import DONE, FAILED, Terminal, common, rows, table
from turnout.workers.cli.words import (
    bar,
    decision_style,
    e_text,
    effect_text,
    figure_text,
    figures_table,
    phase_style,
    phase_text,
    share_text,
    toml,
    value_text,
)

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded
    from turnout.workers.client import Client

_STYLES = {"good": "green", "warning": "yellow", "bad": "bold red", "detail": "dim", "": ""}
_METER = 12


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
        ended_because: the reason in the log.
        effect: the newest figures that have an interval: target over source.
        sample_ratio: the newest check that the split was kept, None where none was made.
        shares: the target's share over time, by the times at which gateways had applied it.
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
    ready_s: float | None = None
    warm: bool = False
    drain_s: float | None = None
    steps: list[Step] = []
    verdicts: list[VerdictReached] = []
    effect: list[Figure] = []
    sample_ratio: Figure | None = None
    shares: list[Share] = []
    moments: list[Moment] = []


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
        case RollbackStarted(_, _, _, reason, started):
            _leave(report, started)
            report.ended_because = reason
        case SwitchCompleted(_, drain_s):
            _end(report, "completed", at, 100.0, report.target)
            report.drain_s = drain_s
        case RolledBack():
            _end(report, "rolled_back", at, 0.0, report.source)
        case SwitchAborted(_, reason):
            _end(report, "aborted", at, 0.0, report.source)
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


@click.command()
@click.argument("switch")
@click.option("--html", type=click.Path(dir_okay=False, writable=True, path_type=Path), metavar="FILE",
              help="Write a page with plots, in one file.")  # fmt: skip
@common
def report(io: Terminal, switch: str, html: Path | None) -> None:
    """Tell everything about SWITCH (or the newest switch of a model) from the log: what was asked, each step with its
    time, each verdict with its figures, the effect with its interval, who did what, and how it ended.
    """  # noqa: D205  the first paragraph is what --help shows

    async def work(client: Client) -> int:
        view = await client.find_switch(switch, ended=True)
        story = Story(view.switch)
        async for recorded in client.log():
            story.take(recorded)
        made = story.report
        if made is None:
            return FAILED
        if html is not None:
            from turnout.workers.cli.page import page  # only where a page is asked for

            try:
                _write(html, page(made, client.clock.now()))
            except OSError as e:
                io.fail("file_not_written", f"{html} can't be written: {e.strerror}", "choose another place")
                return FAILED
        if io.json:
            io.emit(made)
        elif html is not None:
            io.say(f"wrote {html}")
        else:
            show(io, made, client.clock.now())
        return DONE

    io.run(work)


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def show(io: Terminal, made: Report, now: datetime) -> None:
    """The report as text."""
    way = f"{made.source} → {made.target}" if made.source else f"→ {made.target}"
    how = f"{'undo' if made.undo else made.strategy}{f', policy {made.policy}' if made.policy else ''}"
    io.say(Text.assemble((f"{made.model} {way}", "bold"), f"  {made.switch} ({how})"))
    io.say(Text.assemble((phase_text(made.outcome), phase_style(made.outcome)), summary(made, now)))
    for line in toml(made.parameters).splitlines():
        io.say(Text(f"  {line}", "dim"))
    if made.steps:
        io.say("")
        io.show(
            rows(
                table("STEP", "WEIGHT", "", "STARTED", "APPLIED IN", "LASTED", "WHY"),
                [
                    [
                        str(one.step),
                        f"{one.weight:g} %" + (f", copies of {one.mirror:g} %" if one.mirror else ""),
                        Text(bar(one.weight / 100, _METER), "cyan"),
                        f"{one.at.astimezone():%H:%M:%S}",
                        "-" if one.applied_s is None else seconds(one.applied_s),
                        "-" if one.lasted_s is None else seconds(one.lasted_s),
                        one.reason,
                    ]
                    for one in made.steps
                ],
            )
        )
    for verdict in made.verdicts:
        io.say("")
        _show_verdict(io, made, verdict)
    io.say("")
    for line in effects(made):
        io.say(line)
    io.say("")
    for moment in made.moments:
        person = "*" if moment.person else " "
        io.say(
            Text.assemble(
                (f"{moment.at.astimezone():%H:%M:%S} {person} ", "dim"), (moment.sentence, _STYLES[moment.tone])
            )
        )
    if any(moment.person for moment in made.moments):
        io.say(Text("         * asked for by a person", "dim"))


def summary(made: Report, now: datetime) -> str:
    """Who asked, how long it took, why it ended."""
    took = ""
    if made.asked_at is not None:
        end = made.ended_at or now
        verb = "after" if made.ended_at is not None else "since"
        took = f" {verb} {seconds(max(0.0, (end - made.asked_at).total_seconds()))}"
    because = f": {made.ended_because}" if made.ended_because else ""
    serves = f"; {made.model} serves {made.serves}" if made.serves else ""
    asked = f"; asked by {who(made.actor)}" + (f" ({made.reason})" if made.reason else "")
    return f"{took}{because}{serves}{asked}"


def effects(made: Report) -> list[str]:
    """The effect with its interval, and the sample-ratio check, one sentence each."""
    if not made.verdicts:
        return ["no verdict was reached" + (" yet" if made.outcome == "running" else "")]
    lines = [
        f"effect on {figure_text(figure.name)}: {made.target} has {effect_text(figure)} times what "
        f"{made.source or 'the source'} has "
        f"({value_text(figure.name, figure.target)} to {value_text(figure.name, figure.source)})"
        for figure in made.effect
    ]
    ratio = made.sample_ratio
    if ratio is not None:
        kept = "was kept" if ratio.e < ratio.e_needed else "was NOT kept: the comparison is broken"
        lines.append(
            f"sample ratio: the split {kept} (planned {share_text(ratio.source)}, seen {share_text(ratio.target)}, "
            f"e = {e_text(ratio.e)} of {e_text(ratio.e_needed)})"
        )
    return lines


def _show_verdict(io: Terminal, made: Report, verdict: VerdictReached) -> None:
    io.say(
        Text.assemble(
            f"verdict on step {verdict.step}: ",
            (verdict.decision, decision_style(verdict.decision)),
            f": {verdict.reason}" + (f" [{verdict.rule}]" if verdict.rule else ""),
        )
    )
    for version, requests, errors in (
        (made.source, verdict.source_requests, verdict.source_errors),
        (made.target, verdict.target_requests, verdict.target_errors),
    ):
        if version:
            share = f" ({share_text(errors / requests)})" if requests else ""
            io.say(Text(f"  {version}: {requests} requests, {errors} failed{share}", "dim"))
    if verdict.figures:
        io.show(figures_table(verdict.figures, made.source, made.target, _METER))
