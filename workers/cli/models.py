"""``register``, ``deregister``, ``models``, ``get``: what exists and what it serves."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from turnout.core.decider import Accepted
from turnout.core.model import ENGINE_KINDS, DeregisterVersion, RegisterVersion
from turnout.events import subjects
from turnout.events.model import EngineSpec, Probe
from turnout.projections.audit import size
from turnout.projections.fleet import GatewayView, InstanceView, WorkerView
from turnout.projections.registry import ModelView
from turnout.projections.routing import RouteView
from turnout.projections.switches import SwitchView
from turnout.workers.answers import CommandRejected
from turnout.workers.cli.terminal import DONE, FAILED, Terminal, common, rows, table
from turnout.workers.cli.words import left_s, phase_text
from turnout.workers.registry import BaseRegistry, find_engines

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import RenderableType

    from turnout.workers.client import Client


def _probe(path: str, body: str, expect: str) -> Probe:
    if not body:
        return Probe(path, {}, expect)
    try:
        decoded: Any = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.MsgspecError as e:
        raise click.BadParameter(f"is no JSON object: {e}", param_hint="--probe-body") from e
    return Probe(path, decoded, expect)


def _source(source: str) -> str:
    """A path of this machine in full; what is not here (a name, a path of the worker's host) as it is."""
    here = Path(source).expanduser()
    return os.path.abspath(here) if source and (here.exists() or source[0] in ".~") else source


@click.command()
@click.argument("model")
@click.argument("version")
@click.option("--engine", required=True, type=click.Choice(ENGINE_KINDS), help="What runs it.")
@click.option("--source", metavar="PATH", default="", help="Folder of the weights, as the worker's host sees it.")
@click.option("--url", default="", help="openai: address of a server that runs already.")
@click.option("--command", default="", help="openai: a server to start; {socket}, {port} and {model} are filled in.")
@click.option("--arg", "args", multiple=True, metavar="ARG", help="A further flag for the engine, e.g. --arg=--seed=1.")
@click.option("--note", default="", help="For the log, e.g. what is new.")
@click.option("--probe-path", default="", metavar="PATH", help="Where the golden request goes, e.g. /v1/embeddings.")
@click.option("--probe-body", default="", metavar="JSON", help="The golden request.")
@click.option("--expect", default="", metavar="TEXT", help="What the golden answer must contain.")
@click.option("--vllm-python", default="", metavar="PATH", help="Interpreter whose vLLM names the architectures.")
@click.option("--no-check", is_flag=True, help="Register a vllm version whose architecture is not known.")
@common
def register(
    io: Terminal,
    model: str,
    version: str,
    engine: str,
    source: str,
    url: str,
    command: str,
    args: tuple[str, ...],
    note: str,
    probe_path: str,
    probe_body: str,
    expect: str,
    vllm_python: str,
    no_check: bool,
) -> None:
    r"""Add VERSION of MODEL. A version never changes: new settings are a new version.

    \b
    turnout register chat v1 --engine fake
    turnout register chat v2 --engine vllm --source models/chat-v2 --arg=--max-model-len=4096
    turnout register chat v3 --engine openai --url http://127.0.0.1:8000
    """
    try:
        words = tuple(shlex.split(command))
    except ValueError as e:
        raise click.BadParameter(f"has an open quote: {command}", param_hint="--command") from e
    spec = EngineSpec(engine, _source(source), url, words, args, _probe(probe_path, probe_body, expect))

    async def work(client: Client) -> int:
        problem = None if no_check else BaseRegistry({}, find_engines(vllm_python)).problem(spec)
        if problem:
            raise CommandRejected(problem)
        answer = await client.send("version.register", RegisterVersion(model, version, spec, note))
        view = await client.model(model)
        new = isinstance(answer, Accepted) and bool(answer.events)
        if io.json:
            io.emit({"status": "accepted", "model": model, "new": new, **_builtins(view.versions[version])})
            return DONE
        if new:
            io.say(f"registered {model} {version} ({engine})")
        else:
            io.say(f"{model} {version} is registered already with these settings")
        if view.active != version:
            io.next(f"turnout switch {model} {version} --wait")
        return DONE

    io.run(work)


@click.command()
@click.argument("model")
@click.argument("version")
@common
def deregister(io: Terminal, model: str, version: str) -> None:
    """Take VERSION of MODEL away. It must not serve."""

    async def work(client: Client) -> int:
        answer = await client.send("version.deregister", DeregisterVersion(model, version))
        gone = isinstance(answer, Accepted) and bool(answer.events)
        if io.json:
            io.emit({"status": "accepted", "model": model, "version": version, "new": gone})
        else:
            io.say(f"deregistered {model} {version}" if gone else f"{model} has no version {version}: nothing to do")
        return DONE

    io.run(work)


@click.command()
@common
def models(io: Terminal) -> None:
    """List the models and what they serve."""

    async def work(client: Client) -> int:
        found = await client.views("model.*", "route.*", "switch.*")
        known = sorted((v for v in found.values() if isinstance(v, ModelView)), key=lambda v: v.model)
        if io.json:
            io.emit({"models": known})
            return DONE
        if not known:
            io.say("no models are registered")
            io.next("turnout register MODEL VERSION --engine fake")
            return DONE
        made = table("MODEL", "SERVES", "VERSIONS", "KNOWN GOOD", "SWITCH")
        io.show(rows(made, [_line(view, found) for view in known]))
        return DONE

    io.run(work)


def _line(view: ModelView, found: dict[str, Any]) -> list[str | Text]:
    route = found.get(subjects.view_key("route", view.model))
    serves: str | Text = view.active or "-"
    if view.active and not (isinstance(route, RouteView) and any(s.endpoints for s in route.splits)):
        serves = Text(f"{view.active} (no instance)", style="red")
    running = found.get(subjects.view_key("switch", view.switch)) if view.switch else None
    switch: str | Text = "-"
    if isinstance(running, SwitchView):
        switch = Text(f"{running.switch} to {running.target}: {phase_text(running.phase)}", style="yellow")
    return [view.model, serves, ", ".join(view.versions) or "-", ", ".join(view.known_good) or "-", switch]


class Picture(msgspec.Struct, frozen=True):
    """Everything about one model, also as JSON."""

    model: ModelView
    route: RouteView | None
    switch: SwitchView | None
    instances: list[dict[str, Any]]
    gateways: list[dict[str, Any]]


def picture(name: str, found: dict[str, Any]) -> Picture | None:
    """Put the views of one model together; None where it is not registered."""
    view = found.get(subjects.view_key("model", name))
    if not isinstance(view, ModelView):
        return None
    switch = found.get(subjects.view_key("switch", view.switch)) if view.switch else None
    instances = [
        {"worker": worker.worker, "worker_state": worker.state, **_builtins(one)}
        for worker in found.values()
        if isinstance(worker, WorkerView)
        for one in worker.instances.values()
        if one.model == name
    ]
    gateways = [
        {"gateway": g.gateway, "address": g.address, "state": g.state, "revision": g.applied.get(name, 0)}
        for g in found.values()
        if isinstance(g, GatewayView) and g.state == "live"
    ]
    return Picture(view, found.get(subjects.view_key("route", name)), switch, instances, gateways)


@click.command()
@click.argument("model")
@click.option("--watch", is_flag=True, help="Stay, and show every change.")
@common
def get(io: Terminal, model: str, watch: bool) -> None:
    """Show MODEL: its versions and their share, instances, gateways, and the running switch with what it waits for."""

    async def work(client: Client) -> int:
        if watch:
            return await _watch(io, client, model)
        await client.model(model)  # or its refusal
        seen = picture(model, await client.views(*_keys(model)))
        if seen is None:
            return FAILED
        if io.json:
            io.emit(seen)
        else:
            io.show(tree(seen, client.clock.now()))
        return DONE

    io.run(work)


def _keys(model: str) -> tuple[str, ...]:
    return subjects.view_key("model", model), subjects.view_key("route", model), "switch.*", "worker.*", "gateway.*"


async def _watch(io: Terminal, client: Client, model: str) -> int:
    await client.model(model)
    async with client.follow(*_keys(model)) as following:
        with Live(console=io.out, auto_refresh=False, transient=False) as live:
            said = b""
            while True:
                seen = picture(model, following.views)
                if seen is None:
                    return DONE  # deregistered with its last version
                raw = msgspec.json.encode(seen)
                if io.json and raw != said:
                    io.emit(seen)
                elif io.out.is_terminal:
                    live.update(tree(seen, client.clock.now()), refresh=True)
                elif raw != said and not io.json:
                    io.show(tree(seen, client.clock.now()))
                said = raw
                await following.moved(1.0)


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
    branch.add(Text(f"by {switch.actor.partition(':')[2] or switch.actor}, {switch.strategy}", "dim"))
    for wait in waits(seen, switch, now):
        branch.add(Text(wait))


def waits(seen: Picture, switch: SwitchView, now: datetime) -> list[str]:
    """What a running switch waits for, as far as the views can tell."""
    match switch.phase:
        case "requested" | "loading":
            found = [i for i in seen.instances if i["instance"] in switch.instances and i["phase"] != "ready"]
            return [f"waits for {i['instance']} on {i['worker']}: {i['stage'] or i['phase']}" for i in found] or [
                f"waits for an instance of {switch.target}"
            ]
        case "stepping" | "rolling_back":
            fresh = seen.route.revision if seen.route else 0
            behind = [g["gateway"] for g in seen.gateways if g["revision"] < fresh]
            return [f"waits for gateway {', '.join(behind)}"] if behind else []
        case "baking":
            return [f"bakes for {left_s(switch.bake_until, now)} s more; {switch.source} stays warm"]
        case "draining":
            return [f"waits for the last requests of {switch.source}"]
        case _:
            return []


def _builtins(struct: InstanceView | msgspec.Struct) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(struct)
    return made
