"""``get``: one model as a tree, or as a live view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.text import Text
from rich.tree import Tree

from turnout.events.units import size
from turnout.projections.audit import seconds, who
from turnout.workers.cli.pictures import keys, picture, waits
from turnout.workers.cli.terminal import DONE, FAILED, Terminal, common
from turnout.workers.cli.watch import complete, watch_model
from turnout.workers.cli.words import left_s, phase_text, step_text

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import RenderableType

    from turnout.events.model import EngineSpec
    from turnout.projections.switches import SwitchView
    from turnout.workers.cli.pictures import Picture
    from turnout.workers.client import Client


@click.command()
@click.argument("model")
@click.option("--watch", is_flag=True, help="Stay, and show every change: weights, evidence, what comes next.")
@common
def get(io: Terminal, model: str, watch: bool) -> None:
    """Show MODEL: its versions and their share, instances, gateways, and the running switch with what it waits for."""

    async def work(client: Client) -> int:
        await client.model(model)  # or its refusal
        if watch:
            return await watch_model(io, client, model, tree)
        seen = picture(model, await client.views(*keys(model)))
        if seen is None:
            return FAILED
        seen = (await complete(client, seen)).picture
        if io.json:
            io.emit(seen)
        else:
            io.show(tree(seen, client.clock.now()))
        return DONE

    io.run(work)


def tree(seen: Picture, now: datetime) -> RenderableType:
    """The model as a tree."""
    view, route = seen.model, seen.route
    head = Text.assemble((view.model, "bold"), "  ", f"serves {view.active}" if view.active else "serves nothing yet")
    if route is not None and route.revision:
        head.append(f"  (revision {route.revision})", "dim")
    made = Tree(head, guide_style="dim")
    for name, version in view.versions.items():
        branch = made.add(_version_line(name, version.engine, seen))
        for one in seen.instances:
            if one["version"] == name:
                branch.add(_instance_line(one))
    if seen.switch is not None:
        _add_switch(made, seen, seen.switch, now)
    elif view.last_switch:
        made.add(Text.assemble("last switch  ", view.last_switch, "  ", phase_text(view.last_outcome)))
    if view.policies:
        made.add(Text(f"policies  {', '.join(sorted(view.policies))}"))
    if view.rules:
        made.add(Text(f"rules  {', '.join(rule.name for rule in view.rules)}"))
    fresh = route.revision if route is not None else 0
    gateways = made.add("gateways" if seen.gateways else Text("no gateway is live", "yellow"))
    for gateway in seen.gateways:
        behind = gateway["revision"] < fresh
        state = f"waits for revision {fresh}" if behind else f"routes by revision {gateway['revision']}"
        gateways.add(
            Text.assemble(gateway["gateway"], "  ", gateway["address"], "  ", (state, "yellow" if behind else "dim"))
        )
    return made


def _version_line(name: str, engine: EngineSpec, seen: Picture) -> Text:
    split = next((s for s in seen.route.splits if s.version == name), None) if seen.route else None
    line = Text.assemble((name, "bold"), "  ", engine.kind)
    if engine.path or engine.url:
        line.append(f"  {engine.path or engine.url}", "dim")
    if split is not None:
        line.append(f"  {split.weight:g} %", "green" if split.weight else "dim")
    if name == seen.model.active:
        line.append("  active", "green")
    if name in seen.model.known_good:
        line.append("  known good", "dim")
    return line


def _instance_line(one: dict[str, Any]) -> Text:
    styles = {"ready": "green", "draining": "yellow"}
    state = one["stage"] or one["phase"]  # a stage is a part of the phase "loading"
    line = Text.assemble(one["instance"], "  ", (state, styles.get(state, "cyan")))
    if one["detail"]:
        line.append(f" ({one['detail']})", "dim")
    line.append(f"  on {one['worker']}")
    if one["worker_state"] != "live":
        line.append(f" ({one['worker_state']})", "red")
    if one["bytes"]:
        line.append(f"  {size(one['bytes'])}", "dim")
    if one["address"]:
        line.append(f"  {one['address']}", "dim")
    if one["reason"]:
        line.append(f"  {one['reason']}", "dim")
    return line


def _add_switch(made: Tree, seen: Picture, switch: SwitchView, now: datetime) -> None:
    head = Text.assemble(
        "switch ", (switch.switch, "bold"), f"  to {switch.target}  ", (phase_text(switch.phase), "yellow")
    )
    if switch.reason:
        head.append(f"  {switch.reason}", "dim")
    branch = made.add(head)
    policy = f", policy {switch.policy}" if switch.policy else ""
    branch.add(Text(f"by {who(switch.actor)}, {switch.strategy}{policy}", "dim"))
    if step := step_text(switch):
        branch.add(Text(step))
    if switch.verdict is not None:
        branch.add(Text(f"verdict on step {switch.verdict.step}: {switch.verdict.decision}: {switch.verdict.reason}"))
    for wait in waits(seen, switch, now):
        branch.add(Text(wait))
    if seen.outlook is not None:
        coming = seen.outlook
        at = "" if coming.at is None else f" (decided in {seconds(left_s(coming.at, now))} at the latest)"
        branch.add(Text(f"next: {coming.what}{at}"))
