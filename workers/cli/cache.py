"""``cache``, ``workers``, ``preload``, ``pin``, ``unpin``, ``evict``, ``replicas``, ``place``: what is loaded where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from turnout.core.decider import Accepted
from turnout.core.handling import AskCache, EvictVersion, PlaceVersion, Placing, PreloadVersion
from turnout.core.holdings import Holdings
from turnout.core.residence import PRIORITY_MOST, REPLICAS_MOST, PinVersion, SetReplicas, UnpinVersion
from turnout.events.units import size
from turnout.projections.fleet import WorkerView
from turnout.workers.cli.terminal import DONE, FAILED, Terminal, common, rows, table

if TYPE_CHECKING:
    from datetime import datetime

    import msgspec

    from turnout.core.holdings import Held, HeldEngine
    from turnout.events.worker import KeptEngine
    from turnout.projections.fleet import InstanceView
    from turnout.workers.client import Client

_VERDICTS = {"fits": "green", "soon": "green", "evicts": "yellow", "full": "red"}


@click.command()
@common
def cache(io: Terminal) -> None:
    """Show what each worker has loaded, who would make room next and why, and which preloads wait for what."""

    async def work(client: Client) -> int:
        held = await client.send("cache.show", AskCache())
        if not isinstance(held, Holdings):
            return FAILED
        if io.json:
            io.emit(held)
            return DONE
        now = client.clock.now()
        made = table("WORKER", "MODEL", "VERSION", "INSTANCE", "PHASE", "SIZE", "IDLE", "PIN", "WHY")
        lines: list[list[str | Text]] = []
        for one in held.workers:
            lines += [[one.worker, *_line(entry, now)] for entry in one.instances]
            lines += [[one.worker, *_engine_line(engine)] for engine in one.engines]
        if lines:
            io.show(rows(made, lines))
        for one in held.workers:
            memory = f"{size(one.bytes)} of {size(one.memory_bytes)}" if one.memory_bytes else size(one.bytes)
            io.say(f"{one.worker}: {one.places} of {one.capacity} places, {memory} of memory taken", "dim")
            if one.memory_bytes and one.bytes > one.memory_bytes:
                io.say(
                    f"{one.worker} holds more than its memory: what is idle leaves, what is pinned or in use stays. "
                    "Unpin something, or give it more ([worker] memory)",
                    "yellow",
                )
        for wish in held.waiting:
            io.say(
                f"to be preloaded: {wish.model} {wish.version} (priority {wish.priority}), waits for {wish.waits_for}"
            )
        if not held.workers:
            io.say("no worker is live")
            io.next("turnout worker")
        return DONE

    io.run(work)


def _line(one: Held, now: datetime) -> list[str | Text]:
    style = {"ready": "green", "draining": "yellow"}.get(one.phase, "cyan")
    idle = "-" if one.idle_since is None else f"{max(0.0, (now - one.idle_since).total_seconds()):.0f} s"
    phase = f"{one.phase} ({one.tier})" if one.tier else one.phase
    pin = "pinned" if one.pinned else "-"
    return [one.model, one.version, one.instance, Text(phase, style=style), _memory(one), idle, pin, one.why]


def _engine_line(one: HeldEngine) -> list[str | Text]:
    holds = one.holds or "nothing yet"
    return ["-", "-", one.name, Text(one.role, style="cyan"), _memory(one), "-", "-", f"holds {holds}; {one.why}"]


def _memory(one: Held | HeldEngine) -> str:
    return size(one.bytes) + (f" + {size(one.device_bytes)} on {one.device}" if one.device_bytes else "")


@click.command()
@common
def workers(io: Terminal) -> None:
    """List the workers: devices, memory, places, failure domain, engines."""

    async def work(client: Client) -> int:
        found = await client.views("worker.*")
        known = sorted((v for v in found.values() if isinstance(v, WorkerView)), key=lambda v: v.worker)
        known = [view for view in known if view.worker]
        if io.json:
            io.emit({"workers": [_worker(view) for view in known]})
            return DONE
        if not known:
            io.say("no worker has joined")
            io.next("turnout worker")
            return DONE
        made = table("WORKER", "STATE", "HOST", "DOMAIN", "DEVICES", "PLACES", "MEMORY", "ENGINES")
        io.show(rows(made, [_worker_line(view) for view in known]))
        return DONE

    io.run(work)


def _worker(view: WorkerView) -> dict[str, Any]:
    beside = view.charged()
    held: list[InstanceView | KeptEngine] = [*view.instances.values(), *beside]
    used = sum(one.bytes for one in held)
    on_devices = {name: sum(one.device_bytes for one in held if one.device == name) for name in view.device_bytes}
    places = sum(one.phase != "asleep" and not one.base for one in view.instances.values()) + len(beside)
    return {
        "worker": view.worker,
        "state": view.state,
        "host": view.host,
        "domain": view.domain,
        "devices": view.devices,
        "engines": view.engines,
        "capacity": view.capacity,
        "instances": len(view.instances),
        "spares": sum(engine.role == "spare" for engine in beside),
        "bases": sum(engine.role == "base" for engine in beside),
        "places": places,
        "memory_bytes": view.memory_bytes,
        "used_bytes": used,
        "free_bytes": view.memory_bytes - used if view.memory_bytes else None,
        "device_bytes": view.device_bytes,
        "used_device_bytes": on_devices,
    }


def _worker_line(view: WorkerView) -> list[str | Text]:
    told = _worker(view)
    memory = size(told["used_bytes"]) + (f" of {size(view.memory_bytes)}" if view.memory_bytes else "")
    devices = [
        f"{name} {size(told['used_device_bytes'][name])} of {size(view.device_bytes[name])}"
        if name in view.device_bytes
        else name
        for name in view.devices
    ]
    state = Text(view.state, style="green" if view.state == "live" else "red")
    places = f"{told['places']} of {view.capacity}"
    domain = view.domain or "-"
    return [view.worker, state, view.host, domain, ", ".join(devices) or "-", places, memory, ", ".join(view.engines)]


def _tell(io: Terminal, verb: str, body: msgspec.Struct, done: str, already: str, hint: str = "") -> None:
    """Send a command, and say whether it changed something."""

    async def work(client: Client) -> int:
        answer = await client.send(verb, body)
        new = isinstance(answer, Accepted) and bool(answer.events)
        if io.json:
            io.emit({"status": "accepted", **{f: getattr(body, f) for f in body.__struct_fields__}, "new": new})
            return DONE
        io.say(done if new else already)
        if new and hint:
            io.next(hint)
        return DONE

    io.run(work)


@click.command()
@click.argument("model")
@click.argument("version")
@click.option(
    "--priority",
    type=click.IntRange(-PRIORITY_MOST, PRIORITY_MOST),
    default=0,
    show_default=True,
    help="It makes room only at the cost of idle instances with a lower one; what has served has 0.",
)
@common
def preload(io: Terminal, model: str, version: str, priority: int) -> None:
    """Load VERSION of MODEL once there is room, so that a switch to it finds it warm."""
    _tell(
        io,
        "version.preload",
        PreloadVersion(model, version, priority),
        f"{model} {version} is loaded once there is room",
        f"{model} {version} is loaded, or asked for, already",
        "turnout cache",
    )


@click.command()
@click.argument("model")
@click.argument("version")
@click.option("--reason", default="", help="Why, for the log.")
@common
def pin(io: Terminal, model: str, version: str, reason: str) -> None:
    """Keep the loaded instances of VERSION of MODEL, whatever the cache says. Does not load it."""
    _tell(
        io,
        "version.pin",
        PinVersion(model, version, reason),
        f"pinned {model} {version}",
        f"{model} {version} is pinned already",
        f"turnout unpin {model} {version}  # when it may go",
    )


@click.command()
@click.argument("model")
@click.argument("version")
@common
def unpin(io: Terminal, model: str, version: str) -> None:
    """Let the cache decide about VERSION of MODEL again."""
    _tell(
        io,
        "version.unpin",
        UnpinVersion(model, version),
        f"unpinned {model} {version}",
        f"{model} {version} is not pinned",
    )


@click.command()
@click.argument("model")
@click.argument("version")
@click.option("--reason", default="", help="Why, for the log.")
@common
def evict(io: Terminal, model: str, version: str, reason: str) -> None:
    """Stop the idle instances of VERSION of MODEL now, and forget a wish to preload it."""
    _tell(
        io,
        "version.evict",
        EvictVersion(model, version, reason),
        f"{model} {version} leaves the cache",
        f"{model} {version} has no idle instance: nothing to do",
    )


@click.command()
@click.argument("model")
@click.argument("version")
@click.argument("number", type=click.IntRange(1, REPLICAS_MOST))
@common
def replicas(io: Terminal, model: str, version: str, number: int) -> None:
    """Keep NUMBER instances of VERSION of MODEL while it serves, spread over failure domains."""
    _tell(
        io,
        "version.replicas",
        SetReplicas(model, version, number),
        f"{model} {version} has {number} instances while it serves",
        f"{model} {version} has {number} instances already while it serves",
        f"turnout place {model} {version} --dry-run",
    )


@click.command()
@click.argument("model")
@click.argument("version")
@click.option("--dry-run", is_flag=True, help="Only say where it would go; without it, it is preloaded there.")
@common
def place(io: Terminal, model: str, version: str, dry_run: bool) -> None:
    """Say per worker whether VERSION of MODEL fits, at whose cost, or why not, with the numbers."""

    async def work(client: Client) -> int:
        placing = await client.send("version.place", PlaceVersion(model, version))
        if not isinstance(placing, Placing):
            return FAILED
        if not dry_run:
            await client.send("version.preload", PreloadVersion(model, version))
        if io.json:
            io.emit(placing)
            return DONE
        if placing.loaded:
            io.say(f"{model} {version} is loaded on {', '.join(placing.loaded)} ({placing.replicas} wanted)")
        if not placing.offers:
            io.say("no worker is live")
            return DONE
        made = table("WORKER", "VERDICT", "TIER", "WHY")
        offers = placing.offers
        io.show(rows(made, [[o.worker, Text(o.verdict, style=_VERDICTS[o.verdict]), o.tier, o.why] for o in offers]))
        if placing.missing:
            chosen = ", ".join(placing.chosen) or "none"
            io.say(f"chosen: {chosen} ({len(placing.chosen)} of {placing.missing} that it lacks)")
        return DONE

    io.run(work)
