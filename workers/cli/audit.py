"""``log`` and ``verify``: what happened, and whether the record of it is whole."""

from __future__ import annotations

import asyncio
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
_KINDS = ("model.*", "route.*", "switch.*", "worker.*", "gateway.*", "alert.*")
#: Seconds between two looks at a log that seems to end too early: the replica that answered may lag.
_LOOK_AGAIN_S = (0.2, 0.5, 1.0)


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
    """What ``verify`` found.

    Attributes:
        status: whole or broken.
        ends_at: sequence of the log's last event; ``views_at`` is the one that the stored views stand for.
        missing: events that the stored views know and the log does not have any more: its end is gone.
        problems: where the chain of digests breaks.
        views: how many the log makes.
        different: keys of stored views that are not what the log says.
    """

    status: str
    events: int
    ends_at: int
    missing: int
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
        upto = checkpoint.sequence if checkpoint is not None else 0
        records = await _whole_log(client, upto)
        ends_at = records[-1].sequence if records else 0
        missing = max(0, upto - ends_at)
        views = Views()
        for recorded in records:
            if recorded.sequence <= upto:
                views.apply(recorded)
        rebuilt = {key: msgspec.json.decode(value) for key, value in views.everything().items()}
        have = {key: msgspec.json.decode(value) for key, value in stored.items()}
        different = sorted(key for key in rebuilt.keys() | have.keys() if rebuilt.get(key) != have.get(key))
        if records and checkpoint is not None and checkpoint.log != views.log:
            different.append("the checkpoint names another log")
        problems = [msgspec.to_builtins(problem) for problem in verify_chain(records)]
        report = Report(
            "broken" if problems or different or missing else "whole",
            len(records),
            ends_at,
            missing,
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
        return DONE if report.status == "whole" else FAILED

    io.run(work)


async def _whole_log(client: Client, upto: int) -> list[Recorded]:
    """All events; looks again where they end before ``upto``."""
    records = [recorded async for recorded in client.log()]
    for pause_s in _LOOK_AGAIN_S:
        if (records[-1].sequence if records else 0) >= upto:
            break
        await asyncio.sleep(pause_s)
        records = [recorded async for recorded in client.log()]
    return records


def _show(io: Terminal, report: Report) -> None:
    if report.problems:
        io.err.print(Text(f"the chain is broken in {len(report.problems)} places:", "bold red"))
        for problem in report.problems:
            io.err.print(Text(f"  event {problem['sequence']} on {problem['subject']} {problem['what']}"))
    elif not report.missing:
        io.say(f"the chain of {report.events} events on {report.subjects} subjects is whole")
    if report.missing:
        ends = f"ends at event {report.ends_at}" if report.events else "is empty"
        gone = f"the last {report.missing} events are gone: the log {ends}, the views know event {report.views_at}"
        io.err.print(Text(gone, "bold red"))
        io.err.print(
            "controllers refuse to go on from there: put the event store back from a backup or a replica that has "
            "these events; where there is none, start with an empty store folder and register the versions anew"
        )
    if report.different:
        why = "changed by events that are gone" if report.missing else "not what the log says"
        io.err.print(Text(f"{len(report.different)} views are {why}:", "bold red"))
        for key in report.different:
            io.err.print(Text(f"  {key}"))
        if not report.missing:
            io.err.print(Text("the next leading controller rebuilds views of another log; else report this", "dim"))
    elif not report.missing:
        io.say(f"the {report.views} views are what the log says, up to event {report.views_at}")
