"""``register``, ``deregister``, ``models``: what exists and what it serves."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.text import Text

from turnout.core.decider import Accepted
from turnout.core.model import ENGINE_KINDS, DeregisterVersion, RegisterVersion
from turnout.events import subjects
from turnout.events.model import EngineSpec, Probe
from turnout.projections.registry import ModelView
from turnout.projections.routing import RouteView
from turnout.projections.switches import SwitchView
from turnout.workers.answers import CommandRejected
from turnout.workers.cli.terminal import DONE, Terminal, common, rows, table
from turnout.workers.cli.words import phase_text
from turnout.workers.registry import BaseRegistry, find_engines

if TYPE_CHECKING:
    from turnout.projections.registry import VersionView
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
    """Add VERSION of MODEL. A version never changes: new settings are a new version.

    \b
    turnout register chat v1 --engine fake
    turnout register chat v2 --engine vllm --source models/chat-v2 --arg=--max-model-len=4096
    turnout register chat v3 --engine openai --url http://127.0.0.1:8000
    """  # noqa: D301  click reads the backspace
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


def _builtins(struct: VersionView) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(struct)
    return made
