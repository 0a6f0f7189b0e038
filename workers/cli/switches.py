"""``switch``, ``status``, ``promote``, ``pause``, ``resume``, ``abort``, ``retry``, ``undo``: led by an operator.

Where a command takes SWITCH, the name of a model means the switch that runs on it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from turnout.core.strategies import STRATEGIES
from turnout.core.switch import ENDED
from turnout.events import subjects
from turnout.projections.audit import seconds, who
from turnout.projections.fleet import WorkerView
from turnout.projections.switches import SwitchView
from turnout.workers.cli.plans import show_plan
from turnout.workers.cli.policies import Setting, TableFile, joined, parsed
from turnout.workers.cli.terminal import DONE, TIMEOUT, Duration, Terminal, common, rows, table
from turnout.workers.cli.words import (
    decision_style,
    exit_code,
    left_s,
    paused_text,
    phase_style,
    phase_text,
    step_text,
)
from turnout.workers.client import ModelSwitcher, SwitchOperation, held

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from turnout.workers.client import Client, Following

#: Between two pictures of a running switch, seconds.
_FRAME_S = 0.1

_reason = click.option("--reason", default="", help="Why, for the log.")
_wait = click.option("--wait", is_flag=True, help="Stay until it has ended or needs a decision.")
_timeout = click.option("--timeout", type=Duration(), help="With --wait: how long to stay; the switch goes on.")


@click.command()
@click.argument("model")
@click.argument("version")
@click.option("--strategy", default="", type=click.Choice(["", *sorted(STRATEGIES)]), show_choices=False,
              metavar="NAME", help=f"{', '.join(sorted(STRATEGIES))}. Default: as configured.")  # fmt: skip
@click.option("--param", "params", multiple=True, type=Setting(), metavar="KEY=VALUE",
              help="A parameter of the strategy, as TOML; may be given several times.")  # fmt: skip
@click.option("--policy", default="", metavar="NAME", help="Strategy and parameters of a policy of the model.")
@click.option("--policy-file", type=TableFile(), metavar="FILE", help="The same from a file that is not set.")
@_wait
@click.option("--dry-run", is_flag=True, help="Say what it would do and what it could find, and do nothing.")
@click.option("--bake", type=Duration(), help="How long the old version stays warm at full traffic.")
@click.option("--drain", type=Duration(), help="How long its last requests may still run.")
@click.option("--deadline", type=Duration(), help="By when the target must carry all traffic.")
@click.option("--hold/--no-hold", default=None, help="Where there is no place for both versions, let requests wait "
              "while one makes room for the other. --dry-run tells how long.")  # fmt: skip
@_timeout
@_reason
@common
def switch(
    io: Terminal,
    model: str,
    version: str,
    strategy: str,
    params: tuple[dict[str, Any], ...],
    policy: str,
    policy_file: dict[str, Any] | None,
    wait: bool,
    dry_run: bool,
    bake: float | None,
    drain: float | None,
    deadline: float | None,
    hold: bool | None,
    timeout: float | None,
    reason: str,
) -> None:
    """Send the traffic of MODEL to VERSION: load it, prove it, give it traffic, watch it, let the old one drain.

    With --wait the exit code tells the end: 0 completed, 1 failed, 3 rolled back or aborted, 4 held until somebody
    decides, 5 still running.

    \b
    turnout switch chat v2 --wait
    turnout switch chat v2 --strategy canary --dry-run
    turnout switch chat v2 --strategy gradual --param "steps=[{setWeight = 10}, {pause = {duration = '5m'}}]"
    turnout switch chat v2 --strategy ab --param split=20 --param until.duration=2h --param pick=winner
    """  # noqa: D301  click reads the backspace
    if timeout is not None and not wait:
        raise click.UsageError("--timeout needs --wait; for the switch itself there is --deadline")
    if policy and (policy_file is not None or strategy or params):
        raise click.UsageError("--policy names strategy and parameters: it goes with none of --strategy, --param, "
                               "--policy-file")  # fmt: skip

    async def work(client: Client) -> int:
        switcher = ModelSwitcher(client)
        settings: dict[str, Any] = {
            "strategy": strategy,
            "parameters": joined(params),
            "bake_s": bake,
            "drain_s": drain,
            "max_transition_time_s": deadline,
            "policy": policy,
            "hold": hold,
        }
        if policy_file is not None:
            brought = parsed(joined((policy_file, {"strategy": strategy} if strategy else {}, *params)))
            settings["strategy"], settings["parameters"] = brought.strategy, brought.parameters
            settings["bake_s"] = brought.bake_s if bake is None else bake
            settings["drain_s"] = brought.drain_s if drain is None else drain
            settings["hold"] = brought.hold if hold is None else hold
            settings["max_transition_time_s"] = brought.max_transition_time_s if deadline is None else deadline
        if dry_run:
            await show_plan(io, client, await switcher.plan_switch(model, version, **settings))
            return DONE
        operation = await switcher.switch_model(model, version, **settings, reason=reason)
        return await _asked(io, client, operation, wait, timeout)

    io.run(work)


@click.command()
@click.argument("model")
@click.option("--to", default="", metavar="VERSION", help="Only if it goes to this one.")
@click.option("--hold", is_flag=True, help="As for switch: let requests wait where there is no place for both.")
@_wait
@_timeout
@_reason
@common
def undo(io: Terminal, model: str, to: str, hold: bool, wait: bool, timeout: float | None, reason: str) -> None:
    """Take MODEL back: roll its running switch back, else return to the last known good version. Without a bake.

    Where that version is warm, this needs no load. Exit codes with --wait as for switch; a running switch that was
    rolled back as asked counts as done. Within 10 seconds after MODEL went back, only an undo with --to goes further.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout needs --wait")

    async def work(client: Client) -> int:
        operation = await ModelSwitcher(client).undo(model, to=to, reason=reason, hold=hold)
        return await _asked(io, client, operation, wait, timeout, back_was_asked=True)

    io.run(work)


@click.command()
@click.argument("switch")
@_wait
@_timeout
@_reason
@common
def retry(io: Terminal, switch: str, wait: bool, timeout: float | None, reason: str) -> None:
    """Try the version of SWITCH again, as it was asked for, with fresh evidence. SWITCH must have ended."""
    if timeout is not None and not wait:
        raise click.UsageError("--timeout needs --wait")

    async def work(client: Client) -> int:
        view = await client.find_switch(switch, ended=True)
        operation = await ModelSwitcher(client).retry(view.switch, reason=reason)
        return await _asked(io, client, operation, wait, timeout)

    io.run(work)


@click.command()
@click.argument("switch")
@common
def status(io: Terminal, switch: str) -> None:
    """Show how far SWITCH is, or how it ended."""

    async def work(client: Client) -> int:
        view = await client.find_switch(switch, ended=True)
        if io.json:
            io.emit(view)
        else:
            _show(io, view, client.clock.now())
        return DONE

    io.run(work)


@click.command()
@click.argument("switch")
@click.option("--step", type=click.IntRange(1), help="The step that you have seen: given twice, it counts once.")
@click.option("--full", is_flag=True, help="Past every further step, pause and analysis. Needs --reason.")
@_reason
@common
def promote(io: Terminal, switch: str, step: int | None, full: bool, reason: str) -> None:
    """Let SWITCH past its step, whatever it waits for.

    Without --step, a second promotion within 10 seconds is refused: it may be the first one, given twice.
    """

    async def work(client: Client) -> int:
        view = await client.find_switch(switch, ended=True)
        operation = await ModelSwitcher(client).promote(view.switch, step, full=full, reason=reason)
        one = "past its step" if step is None else f"past step {step}"
        return await _led(io, operation, "promoted " + ("past every further step, pause and analysis" if full else one))

    io.run(work)


@click.command()
@click.argument("switch")
@click.option("--for", "for_", type=Duration(), metavar="DURATION", help="Go on by itself after this time.")
@_reason
@common
def pause(io: Terminal, switch: str, for_: float | None, reason: str) -> None:
    """Let SWITCH stand still at its step. Evidence of harm rolls it back all the same."""

    async def work(client: Client) -> int:
        view = await client.find_switch(switch, ended=True)
        operation = await ModelSwitcher(client).pause(view.switch, for_, reason=reason)
        return await _led(io, operation, "paused" if for_ is None else f"paused for {seconds(for_)}")

    io.run(work)


@click.command()
@click.argument("switch")
@_reason
@common
def resume(io: Terminal, switch: str, reason: str) -> None:
    """Let SWITCH go on after turnout pause."""

    async def work(client: Client) -> int:
        view = await client.find_switch(switch, ended=True)
        return await _led(io, await ModelSwitcher(client).resume(view.switch, reason=reason), "goes on")

    io.run(work)


@click.command()
@click.argument("switch")
@_reason
@common
def abort(io: Terminal, switch: str, reason: str) -> None:
    """End SWITCH. What has moved goes back to the version that served before."""

    async def work(client: Client) -> int:
        id = (await client.find_switch(switch, ended=True)).switch
        await ModelSwitcher(client).abort_switch(id, reason=reason)
        view = await client.switch(id)
        if io.json:
            io.emit({"status": "accepted", "switch": id, "phase": view.phase})
            return DONE
        io.say(f"{id} is aborted" if view.phase == "aborted" else f"{id} goes back to {view.source}")
        if view.phase not in ENDED:
            io.next(f"turnout status {id}")
        return DONE

    io.run(work)


async def _led(io: Terminal, operation: SwitchOperation, what: str) -> int:
    """An operator has led a switch on, or stopped it: say where it is now."""
    view = await operation.status()
    if io.json:
        io.emit({"status": "accepted", **_builtins(view)})
        return DONE
    io.say(f"{operation.id} {what}")
    io.next(f"turnout get {view.model} --watch")
    return DONE


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
            view = await _stay(io, client, operation.id)
    except TimeoutError:
        view = await operation.status()
        if io.json:
            io.emit({"status": "timeout", **_builtins(view)})
        else:
            io.err.print(Text(f"still {phase_text(view.phase)} after {seconds(timeout_s or 0)}: it goes on", "yellow"))
            io.next(f"turnout status {operation.id}")
        return TIMEOUT
    if io.json:
        io.emit({"status": "held" if view.phase == "paused" else view.phase, **_builtins(view)})
    else:
        _last_line(io, view)
    return exit_code(view, back_was_asked=back_was_asked)


async def _stay(io: Terminal, client: Client, id: str) -> SwitchView:
    """Follow a switch to its end or to a hold; what is behind it stays on the screen, the running stage moves."""
    key = subjects.view_key("switch", id)
    moving = io.out.is_terminal and not io.json
    said: set[str] = set()
    async with client.follow(key, "worker.*") as following:
        with Live(console=io.out, auto_refresh=False, transient=True) as live:
            spinner = Spinner("dots")
            while True:
                view = following.views.get(key)
                if isinstance(view, SwitchView):
                    if not said:
                        io.say(_headline(view))
                        said.add("")
                    for name, took, detail in _behind(view):
                        line = f"{name} {detail}"
                        if line not in said:
                            said.add(line)
                            io.say(_line(name, took, detail))
                    if view.phase in ENDED or held(view):
                        return view
                    if moving:
                        spinner.update(text=_now(view, following, client.clock.now()))
                        live.update(spinner, refresh=True)
                await following.moved(_FRAME_S if moving else None)


def _line(name: str, took: str, detail: str) -> Text:
    return Text.assemble(f"  {name:<9}", f"{took:>8}", (f"   {detail}" if detail else "", "dim"))


def _behind(view: SwitchView) -> Iterator[tuple[str, str, str]]:
    """What is behind a switch, as far as its newest view tells: name, time, detail."""
    where = ", ".join(view.instances)
    if view.ready_s is not None:
        yield "ready", seconds(view.ready_s), f"{where} was warm" if view.warm else f"{where} loaded and proven"
    if view.verdict is not None:
        yield "verdict", "", f"{view.verdict.decision} on step {view.verdict.step}: {view.verdict.reason}"
    if view.cutover_s is not None and view.phase not in ("stepping", "rolling_back", "rolled_back", "aborted"):
        if view.weight >= 100 or view.phase == "completed":
            yield "cut over", seconds(view.cutover_s), f"every gateway sends to {view.target}"
        elif view.weight or view.mirror:
            copies = f"copies of {view.mirror:g} % go to {view.target}"
            share = f"{view.target} has {view.weight:g} %"
            yield f"step {view.step}", seconds(view.cutover_s), copies if view.mirror else share
    if view.pause_s is not None:
        yield "held", seconds(view.pause_s), "requests waited, and went on"
    if view.bake_until is not None and view.phase in ("draining", "completed"):
        yield "baked", "", f"{view.source} stayed warm"
    if view.phase == "completed" and view.source and view.pause_s is None:
        yield "drained", seconds(view.drain_s or 0.0), f"the last request on {view.source} has ended"


def _now(view: SwitchView, following: Following, now: datetime) -> Text:
    """The running stage in one line."""
    line = Text(phase_text(view.phase), "cyan")
    age_s = (now - view.requested_at).total_seconds() if view.requested_at else 0.0
    match view.phase:
        case "requested" | "loading":
            stage = next(iter(_loading(view, following)), "")
            line.append(f"  {age_s:.0f} s" + (f"  {stage}" if stage else ""), "default")
        case "holding":
            stage = next(iter(_loading(view, following)), "") or f"{view.source} makes room"
            line.append(f"  {age_s:.0f} s  requests wait; {stage}", "default")
        case "baking":
            line.append(f"  {left_s(view.bake_until, now)} s left; {view.source} stays warm", "default")
        case "draining":
            line.append(f"  the last requests of {view.source} run to their end", "default")
        case "stepped":
            line = Text.assemble((step_text(view), "cyan"), f"  {age_s:.0f} s")
        case "paused":
            line.append(f"  {left_s(view.paused_until, now)} s left; {step_text(view)}", "default")
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
    policy = f", policy {view.policy}" if view.policy else ""
    return Text.assemble((view.switch, "bold"), f"  {view.model} {way} ({kind}{policy})")


def _last_line(io: Terminal, view: SwitchView) -> None:
    because = view.paused_because if view.phase == "paused" else view.reason
    why = f": {because}" if because else ""
    match view.phase:
        case "completed":
            io.say(Text(f"{view.model} serves {view.target}", "green"))
        case "concluded":
            io.say(Text(f"ended as planned{why}", "green"))
            io.say(f"{view.model} serves {view.back_to or view.source}")
            io.next(f"turnout report {view.switch}")
        case "paused":
            io.say(Text(f"held at {step_text(view) or 'its start'}{why}", phase_style(view.phase)))
            _decide(io, view)
        case _:
            at = f" in stage {view.stage}" if view.stage else ""
            target = io.out if view.phase in ("rolled_back", "aborted") else io.err
            target.print(Text(f"{phase_text(view.phase)}{at}{why}", phase_style(view.phase)))
            for line in view.log_tail[-15:]:
                target.print(Text(f"  | {line}", "dim"))
            if view.source:
                target.print(Text(f"{view.model} serves {view.back_to or view.source}"))
            judged = "report" if view.verdict is not None else "log"
            target.print(Text(f"next: turnout {judged} {view.switch}", "dim"))


def _show(io: Terminal, view: SwitchView, now: datetime) -> None:
    """All that is known of one switch."""
    io.out.print(_headline(view))
    lines: list[tuple[str, str | Text]] = [("phase", Text(phase_text(view.phase), phase_style(view.phase)))]
    if view.phase == "paused":
        until = "until somebody decides" if held(view) else f"for {left_s(view.paused_until, now)} s more"
        lines.append(("paused", f"{until} ({paused_text(view.paused)})"))
        if view.paused_because:
            lines.append(("because", view.paused_because))
    if step := step_text(view):
        lines.append(("step", step))
    if view.phase == "baking":
        lines.append(("bake", f"{left_s(view.bake_until, now)} s left"))
    if view.reason:
        lines.append(("reason", view.reason))
    if view.stage:
        lines.append(("stage", view.stage))
    asked = f" at {view.requested_at.astimezone():%Y-%m-%d %H:%M:%S}" if view.requested_at else ""
    lines.append(("asked", f"by {who(view.actor)}{asked}"))
    for name, took, detail in _behind(view):
        style = decision_style(view.verdict.decision) if name == "verdict" and view.verdict is not None else ""
        lines.append((name, Text(f"{took}{'  ' if took and detail else ''}{detail}", style)))
    made = table("", "")
    made.show_header = False
    io.show(rows(made, [(Text(f"  {name}", "dim"), value) for name, value in lines]))
    for line in view.log_tail[-15:]:
        io.out.print(Text(f"  | {line}", "dim"))
    if held(view):
        _decide(io, view)


def _decide(io: Terminal, view: SwitchView) -> None:
    """What an operator can do about a switch that stands still. A promotion names the step that is shown with it."""
    on = f"resume {view.switch}" if view.paused == "operator" else f"promote {view.switch} --step {view.step}"
    io.next(f"turnout {on}, or turnout abort {view.switch}")


def _builtins(view: SwitchView) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(view)
    return made
