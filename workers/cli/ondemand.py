"""``ps`` and ``on-demand``: what is loaded until when, and which models are loaded only while somebody uses them."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.text import Text

from turnout.core.serving import WORDS, parse
from turnout.events import subjects
from turnout.events.units import size
from turnout.projections.audit import seconds
from turnout.projections.fleet import WorkerView
from turnout.projections.registry import ModelView
from turnout.projections.routing import RouteView
from turnout.workers.cli.terminal import DONE, Terminal, common, rows, table
from turnout.workers.client import DynamicModelRegistry
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from turnout.core.sagas.demand import Use
    from turnout.events.model import Serving
    from turnout.projections.fleet import InstanceView
    from turnout.workers.client import Client

#: An hour or more is told in hours.
_HOUR_S = 3600.0


class Loaded(msgspec.Struct, frozen=True):
    """One line of ``ps``: an instance, or a model at zero (without one).

    Attributes:
        model, version: what it is; ``worker`` where it is, empty at zero.
        phase: requested, loading (with its stage), ready or draining; ``zero`` for nothing loaded.
        bytes: resident, as measured when it was loaded; None where it is not known.
        load_s: how long it took to load; None where it is not known.
        in_flight: requests; None where the gateways have not said.
        kept_until: UTC; None where ``kept`` says why there is no such time.
        kept: ``for ever``, ``in use``, ``until``, ``leaving`` or ``asked for next``.
    """

    model: str
    version: str
    instance: str
    worker: str
    phase: str
    bytes: int | None
    load_s: float | None
    in_flight: int | None
    kept: str
    kept_until: datetime | None = None


@click.command()
@common
def ps(io: Terminal) -> None:
    """List what is loaded: where, how large, in which phase, and until when it is kept."""

    async def work(client: Client) -> int:
        found = await client.views("worker.*", "model.*", "route.*")
        uses = (await DynamicModelRegistry(BaseRegistry(), client).get_uses()).models
        lines = loaded(found, uses, client.clock.now())
        if io.json:
            io.emit({"instances": lines})
            return DONE
        if not lines:
            io.say("nothing is loaded")
            io.next("turnout register MODEL VERSION --engine fake")
            return DONE
        made = table("MODEL", "VERSION", "WORKER", "SIZE", "STATE", "IN FLIGHT", "UNTIL")
        io.show(rows(made, [_line(one, client.clock.now()) for one in lines]))
        return DONE

    io.run(work)


def loaded(found: dict[str, Any], uses: dict[str, Use], now: datetime) -> list[Loaded]:
    """Every instance that has not ended, then the models that are at zero."""
    models = {view.model: view for view in found.values() if isinstance(view, ModelView)}
    lines = [
        _instance(one, worker.worker, models.get(one.model), found, uses.get(one.model), now)
        for worker in found.values()
        if isinstance(worker, WorkerView)
        for one in worker.instances.values()
    ]
    here = {(line.model, line.version) for line in lines}
    for name, view in models.items():
        if view.serving.on_demand and view.active and (name, view.active) not in here:
            kept = "asked for" if view.wanted else "loaded when asked for"
            lines.append(Loaded(name, view.active, "", "", "zero", None, None, None, kept))
    return sorted(lines, key=lambda line: (line.model, line.version, line.instance))


def _instance(
    one: InstanceView, worker: str, view: ModelView | None, found: dict[str, Any], use: Use | None, now: datetime
) -> Loaded:
    route = found.get(subjects.view_key("route", one.model))
    splits = route.splits if isinstance(route, RouteView) else ()
    routed = any(endpoint.instance == one.instance for split in splits for endpoint in split.endpoints)
    kept, until = "for ever", None
    if one.phase == "draining":
        kept = "leaving"
    elif view is not None and one.phase == "ready" and not routed:
        kept = "while there is room"
    elif view is not None and view.serving.on_demand and one.version == view.active and one.phase == "ready":
        keep_s = view.serving.keep_alive_s
        if keep_s >= 0 and use is not None:
            kept = "in use" if use.in_flight else "until"
            until = None if use.in_flight else now + timedelta(seconds=max(0.0, keep_s - use.idle_s))
    phase = f"{one.phase} ({one.stage})" if one.stage else one.phase
    in_flight = use.in_flight if use is not None and routed else None
    return Loaded(
        one.model,
        one.version,
        one.instance,
        worker,
        phase,
        one.bytes or None,
        one.load_s or None,
        in_flight,
        kept,
        until,
    )


def _line(one: Loaded, now: datetime) -> list[str | Text]:
    styles = {"ready": "green", "zero": "dim", "draining": "yellow"}
    kept = one.kept
    if one.kept_until is not None:
        left_s = max(0.0, (one.kept_until - now).total_seconds())
        kept = f"in {left_s / _HOUR_S:.1f} h" if left_s >= _HOUR_S else f"in {seconds(left_s)}"
    return [
        one.model,
        one.version,
        one.worker or "-",
        size(one.bytes) if one.bytes else "-",
        Text(one.phase, styles.get(one.phase, "cyan")),
        "-" if one.in_flight is None else str(one.in_flight),
        kept,
    ]


@click.command("on-demand")
@click.argument("model")
@click.option("--off", is_flag=True, help="Always loaded again.")
@click.option("--version", default="", help="What to load where MODEL serves no version yet. Default: its first.")
@click.option("--keep-alive", metavar="TIME", help="After the last byte: 10m, 30s; 0 at once, -1 never. Default: 5m.")
@click.option("--queue", type=int, help="Requests that may wait in each gateway. Default: 64.")
@click.option("--max-wait", metavar="TIME", help="How long each of them waits at most. Default: 2m.")
@click.option("--residency", metavar="TIME", help="How long it stays although another model waits. Default: 5s.")
@common
def on_demand(io: Terminal, model: str, off: bool, version: str, **words: str | int | None) -> None:
    """Load MODEL only when a request asks for it, and unload it when nobody uses it any more."""

    async def work(client: Client) -> int:
        given: dict[str, object] = {word: words[word] for word in WORDS if words.get(word) is not None}
        serving = parse(given if off else {"on_demand": True, **given})
        if isinstance(serving, tuple):
            raise click.UsageError("; ".join(serving))
        new = await DynamicModelRegistry(BaseRegistry(), client).set_serving(model, serving, version=version)
        if io.json:
            io.emit({"status": "accepted", "model": model, "new": new, "serving": msgspec.to_builtins(serving)})
            return DONE
        io.say(_told(model, serving) if new else f"{model} is served like this already")
        io.next("turnout ps")
        return DONE

    io.run(work)


def _told(model: str, serving: Serving) -> str:
    if not serving.on_demand:
        return f"{model} is always loaded"
    if serving.keep_alive_s < 0:
        return f"{model} is loaded when a request asks for it, and kept"
    return (
        f"{model} is loaded when a request asks for it, and unloaded {seconds(serving.keep_alive_s)} after its last use"
    )
