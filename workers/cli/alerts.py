"""``alerts`` and ``alerts ack``: what needs a person, and that somebody has seen it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec
from rich.text import Text

from turnout.core.alert import AcknowledgeAlert
from turnout.core.decider import Accepted
from turnout.projections.alerts import AlertView
from turnout.workers.cli.terminal import DONE, Terminal, common, rows, table

if TYPE_CHECKING:
    from datetime import datetime

    from rich.table import Table

    from turnout.workers.client import Client

_SEVERITIES = {"critical": (0, "bold red"), "warning": (1, "yellow"), "info": (2, "cyan")}
_VIEWS = "alert.*"


@click.group(invoke_without_command=True)
@click.option("--all", "all_", is_flag=True, help="The newest that are over, too.")
@common
@click.pass_context
def alerts(ctx: click.Context, io: Terminal, all_: bool) -> None:
    """List what needs a person: the alerts that stand, the gravest first."""
    if ctx.invoked_subcommand is not None:
        return

    async def work(client: Client) -> int:
        stored, _ = await client.raw_views(_VIEWS)
        found = [msgspec.json.decode(raw, type=AlertView) for raw in stored.values()]
        shown = sorted((one for one in found if all_ or one.state != "resolved"), key=_rank)
        if io.json:
            io.emit({"alerts": shown})
            return DONE
        if not shown:
            io.say("no alert stands" if not all_ else "there was no alert yet")
            return DONE
        io.show(_table(shown))
        if first := next((one for one in shown if one.state == "raised"), None):
            io.say("")
            io.say(Text.assemble(("to do: ", "bold"), first.hint))
            io.next(f"turnout alerts ack {first.alert}")
        return DONE

    io.run(work)


@alerts.command()
@click.argument("key")
@click.option("--note", default="", help="What you found or do, for the log.")
@common
def ack(io: Terminal, key: str, note: str) -> None:
    """Say that you have seen alert KEY: no reminders any more.

    What has happened (a rollback, a failed switch, a lost process) is over with it. Whatever can still be seen stands
    until it ends by itself.
    """

    async def work(client: Client) -> int:
        answer = await client.send("alert.acknowledge", AcknowledgeAlert(key, note))
        new = isinstance(answer, Accepted) and bool(answer.events)
        over = isinstance(answer, Accepted) and len(answer.events) > 1
        if io.json:
            io.emit({"status": "accepted", "alert": key, "new": new, "resolved": over})
        elif not new:
            io.say(f"somebody has acknowledged {key} already")
        else:
            io.say(f"acknowledged {key}: it is over" if over else f"acknowledged {key}: it stands until its cause ends")
        return DONE

    io.run(work)


def _rank(view: AlertView) -> tuple[bool, int, float]:
    """Those that stand first, then the gravest, then the newest."""
    at = view.raised_at.timestamp() if view.raised_at is not None else 0.0
    return view.state == "resolved", _SEVERITIES.get(view.severity, (3, ""))[0], -at


def _table(shown: list[AlertView]) -> Table:
    made = table("SEVERITY", "ALERT", "SINCE", "STATE", "WHAT")
    lines: list[list[str | Text]] = []
    for one in shown:
        style = "dim" if one.state == "resolved" else _SEVERITIES.get(one.severity, (3, ""))[1]
        lines.append([Text(one.severity, style), one.alert, _local(one.raised_at), _state(one), one.summary])
    return rows(made, lines)


def _state(view: AlertView) -> str:
    if view.state == "resolved":
        return f"over: {view.reason}" if view.reason else "over"
    if view.state == "acknowledged":
        return f"seen by {view.acknowledged_by}" + (f": {view.note}" if view.note else "")
    return view.state


def _local(at: datetime | None) -> str:
    return "" if at is None else f"{at.astimezone():%Y-%m-%d %H:%M:%S}"
