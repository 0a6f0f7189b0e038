"""``report``: everything about one switch, as text, as JSON, or as a page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from turnout.projections.audit import seconds
from turnout.workers.cli.page import page
from turnout.workers.cli.story import effects, periods, summary
from turnout.workers.cli.terminal import DONE, FAILED, Terminal, common, rows, table
from turnout.workers.cli.words import (
    bar,
    decision_style,
    figures_table,
    impact_cells,
    phase_style,
    phase_text,
    share_text,
    toml,
)
from turnout.workers.client import ModelSwitcher

if TYPE_CHECKING:
    from datetime import datetime

    from turnout.events.switch import VerdictReached
    from turnout.workers.client import Client
    from turnout.workers.story import Report

_STYLES = {"good": "green", "warning": "yellow", "bad": "bold red", "detail": "dim", "": ""}
_METER = 12


@click.command()
@click.argument("switch")
@click.option("--html", type=click.Path(dir_okay=False, writable=True, path_type=Path), metavar="FILE",
              help="Write a page with plots, in one file.")  # fmt: skip
@common
def report(io: Terminal, switch: str, html: Path | None) -> None:
    """Tell everything about SWITCH (or the newest switch of a model) from the log: what was asked, each step with its
    time, each verdict with its figures, the effect with its interval, who did what, and how it ended; and what clients
    noticed before, during and after it, while the samples of that time are kept.
    """  # noqa: D205  the first paragraph is what --help shows

    async def work(client: Client) -> int:
        view = await client.find_switch(switch, ended=True)
        made = await ModelSwitcher(client).get_switch_report(view.switch)
        if html is not None:
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
    if made.impact is not None and (told := periods(made.impact)):
        io.say("")
        io.say(f"what clients of {made.model} noticed, all versions together (95 % limits in brackets)")
        io.show(
            rows(
                table("  PERIOD", "REQUESTS", "FAILED", "FIRST BYTE P50", "FIRST BYTE P95", "LAST BYTE P95"),
                [[f"  {name}", *impact_cells(counted)] for name, counted in told],
            )
        )
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
