"""``register``, ``deregister``, ``models``: what exists and what it serves."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.text import Text

from turnout.core.decider import Accepted, Rejected
from turnout.core.model import ENGINE_KINDS, DeregisterVersion, RegisterVersion
from turnout.core.residence import REPLICAS_MOST
from turnout.events import subjects
from turnout.events.model import EngineSpec, Probe
from turnout.events.units import size
from turnout.projections.registry import ModelView
from turnout.projections.routing import RouteView
from turnout.projections.switches import SwitchView
from turnout.workers.answers import CommandRejected
from turnout.workers.cli.terminal import DONE, Terminal, common, rows, table
from turnout.workers.cli.words import phase_text
from turnout.workers.client import INSPECTED_S

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def _metrics(given: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            found[name] = float(value)
        except ValueError as e:
            raise click.BadParameter(f"is no NAME=NUMBER: {one}", param_hint="--metric") from e
    return found


def _checked(view: VersionView) -> Iterator[str]:
    """What a worker has found in the files, in lines."""
    if view.state == "checking":
        yield "no worker has looked at its files yet; it is loaded once one has"
        return
    seen = view.inspection
    if seen is None:
        return
    what = [word for word in (seen.architecture, seen.dtype) if word]
    if seen.tensors:
        what.append(f"{seen.tensors} tensors, {size(seen.weight_bytes)}")
    if seen.adapter_rank:
        what.append(f"adapter of rank {seen.adapter_rank}, {size(seen.adapter_bytes)}")
    yield f"validated by {view.checked_by}: {', '.join((*what, f'content {seen.digest[:12]}'))}"
    if seen.host_bytes:
        cache = f", {size(seen.kv_bytes)} of it for the KV cache" if seen.kv_bytes else ""
        yield f"an engine of it will take about {size(seen.host_bytes)} of host memory{cache}"
    yield from (f"note: {warning}" for warning in seen.warnings)


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
@click.option("--adapter", metavar="PATH", default="", help="Folder of a LoRA adapter; --source is its base.")
@click.option("--note", default="", help="For the log, e.g. what is new.")
@click.option("--tag", "tags", multiple=True, metavar="WORD", help="A word to find it by. Repeatable.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=NUMBER", help="What was measured before. Repeatable.")
@click.option("--parent", default="", metavar="VERSION", help="Version that it was made from.")
@click.option("--probe-path", default="", metavar="PATH", help="Where the golden request goes, e.g. /v1/embeddings.")
@click.option("--probe-body", default="", metavar="JSON", help="The golden request.")
@click.option("--expect", default="", metavar="TEXT", help="What the golden answer must contain.")
@click.option("--trust-architecture", is_flag=True, help="Try what vLLM does not name, or what looks incomplete.")
@click.option(
    "--replicas",
    type=click.IntRange(1, REPLICAS_MOST),
    help="Instances while it serves, spread over failure domains. Default: 1; later: turnout replicas.",
)
@click.option("--no-wait", is_flag=True, help="Don't wait until a worker has looked at its files.")
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
    adapter: str,
    note: str,
    tags: tuple[str, ...],
    metrics: tuple[str, ...],
    parent: str,
    probe_path: str,
    probe_body: str,
    expect: str,
    trust_architecture: bool,
    replicas: int | None,
    no_wait: bool,
) -> None:
    """Add VERSION of MODEL. A version never changes: new settings are a new version.

    A worker then looks at its files, before anything is loaded: whether they are whole and can be served, and what they
    need. Exits with 1 where they can't.

    \b
    turnout register chat v1 --engine fake
    turnout register chat v2 --engine vllm --source models/chat-v2 --arg=--max-model-len=4096
    turnout register chat v3 --engine openai --url http://127.0.0.1:8000
    turnout register chat v4 --engine vllm --source models/chat-v2 --adapter models/tickets-lora --parent v2
    """  # noqa: D301  click reads the backspace
    try:
        words = tuple(shlex.split(command))
    except ValueError as e:
        raise click.BadParameter(f"has an open quote: {command}", param_hint="--command") from e
    probe = _probe(probe_path, probe_body, expect)
    spec = EngineSpec(engine, _source(source), url, words, args, probe, _source(adapter))
    body = RegisterVersion(model, version, spec, note, tags, _metrics(metrics), parent, trust_architecture, replicas)

    async def work(client: Client) -> int:
        answer = await client.send("version.register", body)
        new = isinstance(answer, Accepted) and bool(answer.events)
        if not io.json:
            done = f"registered {model} {version} ({engine})"
            io.say(done if new else f"{model} {version} is registered already with these settings")
        view = await client.inspected(model, version, timeout_s=0.0 if no_wait else INSPECTED_S)
        if view.state == "rejected":
            raise CommandRejected(Rejected(view.code, f"{version} can't be served: {view.reason}", view.hint))
        if io.json:
            io.emit({"status": "accepted", "model": model, "new": new, **_builtins(view)})
            return DONE
        for line in _checked(view):
            io.say(line)
        if (await client.model(model)).active != version:
            io.next(f"turnout switch {model} {version} --wait")
        return DONE

    io.run(work)


@click.command()
@click.argument("model")
@click.argument("version")
@click.option("--reason", default="", help="Why, for the log.")
@common
def deregister(io: Terminal, model: str, version: str, reason: str) -> None:
    """Take VERSION of MODEL away. It must not serve."""

    async def work(client: Client) -> int:
        answer = await client.send("version.deregister", DeregisterVersion(model, version, reason))
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
