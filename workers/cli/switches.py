"""``switch``, ``status``, ``abort``, ``undo``: ask for a version, watch it, take it back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from turnout.core.handling import Plan, StartSwitch
from turnout.core.strategies import STRATEGIES
from turnout.core.switch import ENDED
from turnout.events import subjects
from turnout.projections.audit import seconds, size, who
from turnout.projections.fleet import WorkerView
from turnout.projections.switches import SwitchView
from turnout.workers.cli.terminal import DONE, TIMEOUT, Duration, Terminal, common, rows, table
from turnout.workers.cli.words import exit_code, left_s, phase_style, phase_text
from turnout.workers.client import ModelSwitcher, SwitchOperation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from rich.console import RenderableType

    from turnout.workers.client import Client, Following

#: Between two pictures of a running switch, seconds.
_FRAME_S = 0.1


@click.command()
@click.argument("model")
@click.argument("version")
@click.option("--strategy", default="", type=click.Choice(["", *sorted(STRATEGIES)]), show_choices=False,
              metavar="NAME", help=f"{', '.join(sorted(STRATEGIES))}. Default: as configured.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Stay until it has ended, and show how far it is.")
@click.option("--dry-run", is_flag=True, help="Say what it would do, and do nothing.")
@click.option("--bake", type=Duration(), help="How long the old version stays warm at full traffic.")
@click.option("--drain", type=Duration(), help="How long its last requests may still run.")
@click.option("--deadline", type=Duration(), help="By when the target must carry all traffic.")
@click.option("--timeout", type=Duration(), help="With --wait: how long to stay; the switch goes on.")
@click.option("--reason", default="", help="Why, for the log.")
@common
def switch(
    io: Terminal,
    model: str,
    version: str,
    strategy: str,
    wait: bool,
    dry_run: bool,
    bake: float | None,
    drain: float | None,
    deadline: float | None,
    timeout: float | None,
    reason: str,
) -> None:
    """Send the traffic of MODEL to VERSION: load it, prove it, cut over, watch it, let the old one drain.

    With --wait the exit code tells the end: 0 completed, 1 failed, 3 rolled back or aborted, 4 held, 5 still running.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout needs --wait; for the switch itself there is --deadline")

    async def work(client: Client) -> int:
        switcher = ModelSwitcher(client)
        if dry_run:
            body = StartSwitch(model, version, strategy, {}, reason, bake, drain, deadline)
            plan = await client.send("switch.plan", body)
            if isinstance(plan, Plan):
                _show_plan(io, plan)
            return DONE
        operation = await switcher.switch_model(
            model,
            version,
            strategy=strategy,
            reason=reason,
            bake_s=bake,
            drain_s=drain,
            max_transition_time_s=deadline,
        )
        return await _asked(io, client, operation, wait, timeout)

    io.run(work)


@click.command()
@click.argument("model")
@click.option("--wait", is_flag=True, help="Stay until it has ended, and show how far it is.")
@click.option("--timeout", type=Duration(), help="With --wait: how long to stay.")
@click.option("--reason", default="", help="Why, for the log.")
@common
def undo(io: Terminal, model: str, wait: bool, timeout: float | None, reason: str) -> None:
    """Take MODEL back: roll its running switch back, else return to the last known good version. Without a bake.

    Where that version is warm, this needs no load. Exit codes with --wait as for switch; a running switch that was
    rolled back as asked counts as done.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout needs --wait")

    async def work(client: Client) -> int:
        operation = await ModelSwitcher(client).undo(model, reason=reason)
        return await _asked(io, client, operation, wait, timeout, back_was_asked=True)

    io.run(work)


@click.command()
@click.argument("switch")
@common
def status(io: Terminal, switch: str) -> None:
    """Show how far SWITCH is, or how it ended."""

    async def work(client: Client) -> int:
        view = await client.switch(switch)
        if io.json:
            io.emit(view)
        else:
            _show(io, view, client.clock.now())
        return DONE

    io.run(work)


@click.command()
@click.argument("switch")
@click.option("--reason", default="", help="Why, for the log.")
@common
def abort(io: Terminal, switch: str, reason: str) -> None:
    """End SWITCH. What has moved goes back to the version that served before."""

    async def work(client: Client) -> int:
        await ModelSwitcher(client).abort_switch(switch, reason=reason)
        view = await client.switch(switch)
        if io.json:
            io.emit({"status": "accepted", "switch": switch, "phase": view.phase})
            return DONE
        io.say(f"{switch} is aborted" if view.phase == "aborted" else f"{switch} goes back to {view.source}")
        if view.phase not in ENDED:
            io.next(f"turnout status {switch}")
        return DONE

    io.run(work)


async def _asked(
    io: Terminal,
    client: Client,
    operation: SwitchOperation,
    wait: bool,
    timeout_s: float | None,
    *,
    back_was_asked: bool = False,
) -> int:
    """A switch is in the log: say so, or stay to its end."""
    if not wait:
        view = await operation.status()
        if io.json:
            io.emit({"status": "accepted", **_builtins(view)})
        else:
            io.say(_headline(view))
            io.next(f"turnout status {operation.id}, or turnout get {view.model} --watch")
        return DONE
    try:
        async with asyncio.timeout(timeout_s):
            view = await _stay(io, client, operation.id, ended=ENDED | {"paused"})
    except TimeoutError:
        view = await operation.status()
        if io.json:
            io.emit({"status": "timeout", **_builtins(view)})
        else:
            io.err.print(Text(f"still {phase_text(view.phase)} after {seconds(timeout_s or 0)}: it goes on", "yellow"))
            io.next(f"turnout status {operation.id}")
        return TIMEOUT
    if io.json:
        io.emit({"status": view.phase, **_builtins(view)})
    else:
        _last_line(io, view)
    return exit_code(view, back_was_asked=back_was_asked)


async def _stay(io: Terminal, client: Client, id: str, ended: frozenset[str]) -> SwitchView:
    """Follow a switch to its end; finished stages stay on the screen, the running one moves."""
    key = subjects.view_key("switch", id)
    moving = io.out.is_terminal and not io.json
    said = 0
    async with client.follow(key, "worker.*") as following:
        with Live(console=io.out, auto_refresh=False, transient=True) as live:
            spinner = Spinner("dots")
            while True:
                view = following.views.get(key)
                if isinstance(view, SwitchView):
                    if not said:
                        io.say(_headline(view))
                    stages = list(_stages(view))
                    for name, took, detail in stages[max(0, said - 1) :]:
                        io.say(Text.assemble(f"  {name:<9}", f"{took:>8}", (f"   {detail}" if detail else "", "dim")))
                    said = len(stages) + 1
                    if view.phase in ended:
                        return view
                    if moving:
                        spinner.update(text=_now(view, following, client.clock.now()))
                        live.update(spinner, refresh=True)
                await following.moved(_FRAME_S if moving else None)


def _stages(view: SwitchView) -> Iterator[tuple[str, str, str]]:
    """The stages that are behind a switch: name, time, detail."""
    where = ", ".join(view.instances)
    if view.ready_s is not None:
        yield "ready", seconds(view.ready_s), f"{where} was warm" if view.warm else f"{where} loaded and proven"
    if view.cutover_s is not None:
        yield "cut over", seconds(view.cutover_s), f"every gateway sends to {view.target}"
    if view.bake_until is not None and view.phase in ("draining", "completed"):
        yield "baked", "", f"{view.source} stayed warm"
    if view.phase == "completed" and view.source:
        yield "drained", seconds(view.drain_s or 0.0), f"the last request on {view.source} has ended"


def _now(view: SwitchView, following: Following, now: datetime) -> Text:
    """The running stage in one line."""
    line = Text(phase_text(view.phase), "cyan")
    age_s = (now - view.requested_at).total_seconds() if view.requested_at else 0.0
    match view.phase:
        case "requested" | "loading":
            stage = next(iter(_loading(view, following)), "")
            line.append(f"  {age_s:.0f} s" + (f"  {stage}" if stage else ""), "default")
        case "baking":
            line.append(f"  {left_s(view.bake_until, now)} s left; {view.source} stays warm", "default")
        case "draining":
            line.append(f"  the last requests of {view.source} run to their end", "default")
        case _:
            line.append(f"  {age_s:.0f} s", "default")
    return line


def _loading(view: SwitchView, following: Following) -> Iterator[str]:
    for worker in following.views.values():
        if isinstance(worker, WorkerView):
            for id in view.instances:
                if one := worker.instances.get(id):
                    detail = f": {one.detail}" if one.detail else ""
                    yield f"{id} on {worker.worker}, {one.stage or one.phase}{detail}"


def _headline(view: SwitchView) -> Text:
    way = f"{view.source} → {view.target}" if view.source else f"→ {view.target}"
    kind = "undo" if view.undo else view.strategy
    return Text.assemble((view.switch, "bold"), f"  {view.model} {way} ({kind})")


def _last_line(io: Terminal, view: SwitchView) -> None:
    if view.phase == "completed":
        io.say(Text(f"{view.model} serves {view.target}", "green"))
        return
    why = f": {view.reason}" if view.reason else ""
    at = f" in stage {view.stage}" if view.stage else ""
    target = io.out if view.phase in ("rolled_back", "aborted", "paused") else io.err
    target.print(Text(f"{phase_text(view.phase)}{at}{why}", phase_style(view.phase)))
    for line in view.log_tail[-15:]:
        target.print(Text(f"  | {line}", "dim"))
    if view.source:
        target.print(Text(f"{view.model} serves {view.source}"))
    target.print(Text(f"next: turnout log {view.switch}", "dim"))


def _show(io: Terminal, view: SwitchView, now: datetime) -> None:
    """All that is known of one switch."""
    io.out.print(_headline(view))
    lines: list[tuple[str, str | Text]] = [("phase", Text(phase_text(view.phase), phase_style(view.phase)))]
    if view.weight and view.phase not in ENDED:
        lines.append(("weight", f"{view.target} has {view.weight:g} %"))
    if view.phase == "baking":
        lines.append(("bake", f"{left_s(view.bake_until, now)} s left"))
    if view.reason:
        lines.append(("reason", view.reason))
    if view.stage:
        lines.append(("stage", view.stage))
    asked = f" at {view.requested_at.astimezone():%Y-%m-%d %H:%M:%S}" if view.requested_at else ""
    lines.append(("asked", f"by {who(view.actor)}{asked}"))
    lines.extend((name, f"{took}{'  ' if took and detail else ''}{detail}") for name, took, detail in _stages(view))
    made = table("", "")
    made.show_header = False
    io.show(rows(made, [(Text(f"  {name}", "dim"), value) for name, value in lines]))
    for line in view.log_tail[-15:]:
        io.out.print(Text(f"  | {line}", "dim"))


def _show_plan(io: Terminal, plan: Plan) -> None:
    if io.json:
        io.emit(plan)
        return
    way = f"{plan.source} → {plan.target}" if plan.source else f"→ {plan.target}"
    io.say(f"plan  {plan.model} {way} ({plan.strategy}), target {plan.tier}")
    made: RenderableType = rows(
        table("STEP", "SECONDS"),
        [(step.what, "not measured yet" if step.seconds is None else f"{step.seconds:g}") for step in plan.steps],
    )
    io.show(made)
    if plan.bytes:
        io.say(f"memory of {plan.target}: {size(plan.bytes)}")
    io.next(f"turnout switch {plan.model} {plan.target} --wait")


def _builtins(view: SwitchView) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(view)
    return made
