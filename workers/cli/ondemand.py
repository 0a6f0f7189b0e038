"""``ps`` and ``on-demand``: what is loaded until when, and which models are loaded only while somebody uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec
from rich.text import Text

from turnout.core.serving import WORDS, parse
from turnout.events.units import size
from turnout.projections.audit import seconds
from turnout.workers.cli.terminal import DONE, Terminal, common, rows, table
from turnout.workers.client import DynamicModelRegistry
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from datetime import datetime

    from turnout.events.model import Serving
    from turnout.workers.client import Client
    from turnout.workers.loaded import Loaded

#: An hour or more is told in hours.
_HOUR_S = 3600.0


@click.command()
@common
def ps(io: Terminal) -> None:
    """List what is loaded: where, how large, in which phase, and until when it is kept."""

    async def work(client: Client) -> int:
        lines = await DynamicModelRegistry(BaseRegistry(), client).get_loaded()
        if io.json:
            io.emit({"instances": lines})
            return DONE
        if not lines:
            io.say("nothing is loaded")
            io.next("turnout register MODEL VERSION --engine fake")
            return DONE
        made = table("MODEL", "VERSION", "WORKER", "TIER", "SIZE", "STATE", "IN FLIGHT", "UNTIL")
        io.show(rows(made, [_line(one, client.clock.now()) for one in lines]))
        return DONE

    io.run(work)


def _line(one: Loaded, now: datetime) -> list[str | Text]:
    styles = {"ready": "green", "zero": "dim", "asleep": "blue", "draining": "yellow"}
    state = f"{one.phase} (level {one.level})" if one.level else one.phase
    kept = one.kept
    if one.kept_until is not None:
        left_s = max(0.0, (one.kept_until - now).total_seconds())
        kept = f"in {left_s / _HOUR_S:.1f} h" if left_s >= _HOUR_S else f"in {seconds(left_s)}"
    return [
        one.model,
        one.version,
        one.worker or "-",
        one.tier or "-",
        size(one.bytes) if one.bytes else "-",
        Text(state, styles.get(one.phase, "cyan")),
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
