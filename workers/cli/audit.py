"""``log`` and ``verify``: what happened, and whether the record of it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.table import Table
from rich.text import Text

from turnout.core.decider import Rejected
from turnout.events.chain import verify_chain
from turnout.projections.audit import Audit, Entry
from turnout.projections.views import Views
from turnout.workers.answers import CommandRejected
from turnout.workers.cli.terminal import DONE, FAILED, Terminal, common

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded
    from turnout.workers.client import Client

_STYLES = {"good": "green", "warning": "yellow", "bad": "bold red", "detail": "dim", "": ""}
_KINDS = ("model.*", "route.*", "switch.*", "worker.*", "gateway.*")


@click.command("log")
@click.argument("target", metavar="[MODEL|SWITCH]", required=False, default="")
@click.option("--follow", "-f", is_flag=True, help="Stay, and tell what happens.")
@common
def log(io: Terminal, target: str, follow: bool) -> None:
    """Tell what happened, in plain sentences: everything, or what concerns a model or a switch."""

    async def work(client: Client) -> int:
        audit, said = Audit(), Lines(io)
        found = False
        async for recorded in client.log(follow=follow):
            entry = audit.entry(recorded)
            if not target or target in (entry.model, entry.switch):
                found = True
                said.add(entry, recorded)
        if not found and target:
            raise CommandRejected(
                Rejected(
                    "target_unknown",
                    f"the log knows no model and no switch {target!r}",
                    "list the models with: turnout models",
                )
            )
        if not found:
            io.say("the log is empty")
        return DONE

    io.run(work)


class Lines:
    """Prints entries; the day is said whenever it changes."""

    def __init__(self, io: Terminal) -> None:
        self._io = io
        self._day = ""

    def add(self, entry: Entry, recorded: Recorded) -> None:
        """Print one."""
        if self._io.json:
            made: dict[str, Any] = msgspec.to_builtins(entry)
            made |= {
                "subject": recorded.subject,
                "command": recorded.envelope.command,
                "correlation": recorded.envelope.correlation,
                "event": msgspec.Raw(recorded.body),
            }
            self._io.emit(made)
            return
        local = entry.time.astimezone()
        day = f"{local:%A, %Y-%m-%d}"
        if day != self._day:
            self._io.out.print(Text(day, "bold"))
            self._day = day
        line = Table.grid(padding=(0, 2))
        line.add_column(no_wrap=True)
        line.add_column(overflow="fold")
        line.add_row(Text(f"{local:%H:%M:%S}", "dim"), Text(entry.sentence, _STYLES[entry.tone]))
        self._io.out.print(line)


class Report(msgspec.Struct):
    """What ``verify`` found. ``different``: keys of views that are not the fold of the log."""

    status: str
    events: int
    subjects: int
    problems: list[dict[str, Any]]
    views: int
    views_at: int
    different: list[str]


@click.command()
@common
def verify(io: Terminal) -> None:
    """Check the whole log's chain of digests, and rebuild all views from it and compare them with the stored ones."""

    async def work(client: Client) -> int:
        stored, checkpoint = await client.raw_views(*_KINDS)
        records = [recorded async for recorded in client.log()]
        views = Views()
        upto = checkpoint.sequence if checkpoint is not None else 0
        for recorded in records:
            if recorded.sequence <= upto:
                views.apply(recorded)
        rebuilt = {key: msgspec.json.decode(value) for key, value in views.everything().items()}
        have = {key: msgspec.json.decode(value) for key, value in stored.items()}
        different = sorted(key for key in rebuilt.keys() | have.keys() if rebuilt.get(key) != have.get(key))
        if checkpoint is not None and checkpoint.log != views.log:
            different.append("the checkpoint names another log")
        problems = [msgspec.to_builtins(problem) for problem in verify_chain(records)]
        report = Report(
            "broken" if problems or different else "whole",
            len(records),
            len({r.subject for r in records}),
            problems,
            len(rebuilt),
            upto,
            different,
        )
        if io.json:
            io.emit(report)
        else:
            _show(io, report)
        return FAILED if problems or different else DONE

    io.run(work)


def _show(io: Terminal, report: Report) -> None:
    if report.problems:
        io.err.print(Text(f"the chain is broken in {len(report.problems)} places:", "bold red"))
        for problem in report.problems:
            io.err.print(Text(f"  event {problem['sequence']} on {problem['subject']} {problem['what']}"))
    else:
        io.say(f"the chain of {report.events} events on {report.subjects} subjects is whole")
    if report.different:
        io.err.print(Text(f"{len(report.different)} views are not what the log says:", "bold red"))
        for key in report.different:
            io.err.print(Text(f"  {key}"))
        io.err.print(Text("the next leading controller rebuilds views of another log; else report this", "dim"))
    else:
        io.say(f"the {report.views} views are what the log says, up to event {report.views_at}")
