"""``stop``: one instance, by an operator's word."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from turnout.core.decider import Accepted
from turnout.core.handling import StopInstance
from turnout.workers.cli.terminal import DONE, Terminal, common

if TYPE_CHECKING:
    from turnout.workers.client import Client


@click.command()
@click.argument("instance")
@click.option("--force", is_flag=True, help="Also where requests may run on it: they are ended. Needs --reason.")
@click.option("--reason", default="", metavar="TEXT", help="Why, for the log.")
@common
def stop(io: Terminal, instance: str, force: bool, reason: str) -> None:
    """Stop INSTANCE (turnout get MODEL lists them). A version that is needed is loaded again on another one.

    Without --force it must be out of every route, and its worker waits until nothing is connected to it any more.

    \b
    turnout stop i7
    turnout stop i7 --force --reason "hangs in a kernel"
    """  # noqa: D301  click reads the backspace

    async def work(client: Client) -> int:
        answer = await client.send("instance.stop", StopInstance(instance, force, reason))
        new = isinstance(answer, Accepted) and bool(answer.events)
        if io.json:
            io.emit({"status": "accepted", "instance": instance, "forced": force, "new": new})
        elif not new:
            io.say(f"{instance} was asked to stop before: nothing to do")
        elif force:
            io.say(f"{instance} is stopped now, with whatever runs on it")
        else:
            io.say(f"{instance} is stopped when nothing is connected to it any more")
        return DONE

    io.run(work)
