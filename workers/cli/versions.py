"""``versions``, ``compare``: the versions of one model, and two of them side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.text import Text

from turnout.events.units import size
from turnout.projections.audit import seconds, who
from turnout.projections.fleet import WorkerView
from turnout.workers.cli.page import document, grid
from turnout.workers.cli.terminal import DONE, FAILED, Terminal, common, rows, table
from turnout.workers.cli.words import ms_text, share_text
from turnout.workers.client import DynamicModelRegistry, ModelVersionManager
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from turnout.events.model import Inspection
    from turnout.projections.comparison import Comparison, Difference, Side
    from turnout.projections.registry import ModelView, VersionView
    from turnout.workers.client import Client

_STYLES = {"rejected": "bold red", "checking": "yellow", "active": "bold green", "known good": "green"}
_LAYER = re.compile(r"(.*\.)(\d+)")


@click.command()
@click.argument("model")
@click.option("--history", is_flag=True, help="Tell what happened to the versions, also to those that are gone.")
@common
def versions(io: Terminal, model: str, history: bool) -> None:
    """List the versions of MODEL: what they are, who registered them, and what is known of them."""

    async def work(client: Client) -> int:
        manager = _manager(client)
        if history:
            entries = await manager.get_history(model)
            if io.json:
                io.emit({"model": model, "history": entries})
                return DONE
            for entry in entries:
                io.say(Text.assemble((f"{entry.time.astimezone():%Y-%m-%d %H:%M:%S}  ", "dim"), entry.sentence))
            return DONE
        view = await client.model(model)
        counts = _instances(view, await client.views("worker.*"))
        if io.json:
            io.emit({"model": model, "versions": [_told(view, one, counts) for one in view.versions.values()]})
            return DONE
        if not view.versions:
            io.say(f"{model} has no versions")
            io.next(f"turnout register {model} VERSION --engine fake")
            return DONE
        heads = ("VERSION", "STATE", "SIZE", "CONTENT", "PARENT", "TAGS", "WHO", "WHEN", "LOADS IN", "INSTANCES", "WHY")
        io.show(rows(table(*heads), [_line(view, one, counts) for one in view.versions.values()]))
        return DONE

    io.run(work)


def _manager(client: Client) -> ModelVersionManager:
    return ModelVersionManager(DynamicModelRegistry(BaseRegistry(), client), client)


def _instances(view: ModelView, found: dict[str, Any]) -> dict[str, int]:
    """Version → instances that are loaded or on their way, on live workers."""
    counts: dict[str, int] = {}
    for worker in found.values():
        if isinstance(worker, WorkerView) and worker.state == "live":
            for one in worker.instances.values():
                if one.model == view.model and one.phase != "draining":
                    counts[one.version] = counts.get(one.version, 0) + 1
    return counts


def _told(view: ModelView, one: VersionView, counts: dict[str, int]) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(one)
    known = {"active": one.version == view.active, "known_good": one.version in view.known_good}
    return {**told, **known, "instances": counts.get(one.version, 0)}


def _state(view: ModelView, one: VersionView) -> str:
    if one.state != "validated":
        return one.state
    if one.version == view.active:
        return "active"
    return "known good" if one.version in view.known_good else "validated"


def _line(view: ModelView, one: VersionView, counts: dict[str, int]) -> list[str | Text]:
    state, seen = _state(view, one), one.inspection
    return [
        one.version,
        Text(state, _STYLES.get(state, "")),
        _size(seen),
        seen.digest[:12] if seen else "-",
        one.parent or "-",
        ", ".join(one.tags) or "-",
        who(one.registered_by),
        f"{one.registered_at.astimezone():%Y-%m-%d %H:%M}",
        seconds(one.load_s) if one.loads else "-",
        str(counts.get(one.version, 0)),
        one.reason or one.note or "-",
    ]


def _size(seen: Inspection | None) -> str:
    """What makes the version: an adapter's bytes, or those of its weights."""
    if seen is None:
        return "-"
    bytes_ = seen.adapter_bytes or seen.weight_bytes
    return size(bytes_) if bytes_ else "-"


@click.command()
@click.argument("model")
@click.argument("first")
@click.argument("second")
@click.option("--html", type=click.Path(dir_okay=False, writable=True, path_type=Path), metavar="FILE",
              help="Write a page, in one file.")  # fmt: skip
@common
def compare(io: Terminal, model: str, first: str, second: str, html: Path | None) -> None:
    """Set versions FIRST and SECOND of MODEL side by side: what they are, which layers differ, how they load and do."""

    async def work(client: Client) -> int:
        made = await _manager(client).compare_versions(model, first, second)
        if html is not None:
            try:
                _write(html, page(made))
            except OSError as e:
                io.fail("file_not_written", f"{html} can't be written: {e.strerror}", "choose another place")
                return FAILED
        if io.json:
            io.emit(made)
        elif html is not None:
            io.say(f"wrote {html}")
        else:
            _show(io, made)
        return DONE

    io.run(work)


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _show(io: Terminal, made: Comparison) -> None:
    io.show(rows(table(made.model, made.first.version, made.second.version), lines(made)))
    for what, differences in _settings(made):
        io.say("")
        io.show(rows(table(what, made.first.version, made.second.version), [_cells(one) for one in differences]))
    io.say("")
    for line in (*weights(made), *ways(made)):
        io.say(line)


def page(made: Comparison) -> str:
    """The comparison as one page: no script, nothing from a network."""
    title = f"{made.model}: {made.first.version} and {made.second.version}"
    heads = ("", made.first.version, made.second.version)
    parts = [grid(heads, lines(made))]
    for what, differences in _settings(made):
        parts += [_head(what), grid(heads, [_cells(one) for one in differences])]
    parts += [_head("Weights"), *_paragraphs(weights(made))]
    parts += [_head(f"From {made.first.version} to {made.second.version}"), *_paragraphs(ways(made))]
    return document(title, parts)


def _head(text: str) -> str:
    from html import escape

    return f"<h2>{escape(text)}</h2>"


def _paragraphs(texts: Iterable[str]) -> list[str]:
    from html import escape

    return [f"<p>{escape(text)}</p>" for text in texts]


def _settings(made: Comparison) -> list[tuple[str, tuple[Difference, ...]]]:
    """The tables of settings that differ, each with its heading."""
    named = (("engine", made.engine), ("config.json", made.config), ("sampling defaults", made.sampling))
    return [(what, differences) for what, differences in named if differences]


def _cells(one: Difference) -> list[str]:
    return [one.name, one.first or "-", one.second or "-"]


def lines(made: Comparison) -> list[list[str]]:
    """The table: a name and both sides; what neither side knows is left out."""
    found = [[name, *(text(side) for side in (made.first, made.second))] for name, text in _ROWS]
    metrics = sorted(made.first.metrics.keys() | made.second.metrics.keys())
    found += [[f"metric {name}", *(_metric(side, name) for side in (made.first, made.second))] for name in metrics]
    for name, same in (("tokenizer", made.tokenizer), ("chat template", made.template)):
        if same is not None:
            found.append([name, "the same" if same else "differs", "the same" if same else "differs"])
    return [line for line in found if line[1:] != ["-", "-"]]


def _metric(side: Side, name: str) -> str:
    return f"{side.metrics[name]:g}" if name in side.metrics else "-"


def _seen(text: str, side: Side) -> str:
    """A figure of the inspection; a dash where there is none."""
    seen = side.inspection
    value = getattr(seen, text) if seen is not None else 0
    return size(value) if value else "-"


def _weights_of(side: Side) -> str:
    seen = side.inspection
    if seen is None or not seen.weight_bytes:
        return "-"
    adapter = f", adapter of rank {seen.adapter_rank}, {size(seen.adapter_bytes)}" if seen.adapter_rank else ""
    return f"{size(seen.weight_bytes)}, {seen.tensors} tensors, {seen.dtype}{adapter}"


def _loads(side: Side) -> str:
    if not side.loads or side.load_s is None:
        return "-"
    if side.loads == 1:
        return f"once, in {seconds(side.load_s)}"
    return f"{side.loads} times, the newest in {seconds(side.load_s)}"


def _failures(side: Side) -> str:
    if not side.failures:
        return "-"
    return f"once: {side.failure}" if side.failures == 1 else f"{side.failures} times, the newest: {side.failure}"


_ROWS: tuple[tuple[str, Callable[[Side], str]], ...] = (
    ("state", lambda s: f"{s.state}: {s.reason}" if s.reason else s.state),
    ("registered", lambda s: f"{s.registered_at.astimezone():%Y-%m-%d %H:%M} by {who(s.registered_by)}"),
    ("why", lambda s: s.note or "-"),
    ("parent", lambda s: s.parent or "-"),
    ("tags", lambda s: ", ".join(s.tags) or "-"),
    ("content", lambda s: s.inspection.digest[:16] if s.inspection else "-"),
    ("architecture", lambda s: (s.inspection.architecture if s.inspection else "") or "-"),
    ("weights", _weights_of),
    ("KV cache for one token", lambda s: f"{s.inspection.kv_token_bytes:,} bytes"
     if s.inspection and s.inspection.kv_token_bytes else "-"),
    ("host memory, estimated", lambda s: _seen("host_bytes", s)),
    ("host memory, measured", lambda s: size(s.bytes) if s.bytes else "-"),
    ("loaded", _loads),
    ("failed", _failures),
    ("newest verdict", lambda s: f"{s.verdict}: {s.verdict_reason}" if s.verdict else "-"),
    ("health now", lambda s: s.health or "-"),
    ("requests, newest minutes", lambda s: "-" if s.requests is None else f"{s.requests:,}"),
    ("errors", lambda s: "-" if s.error_rate is None else share_text(s.error_rate)),
    ("first byte, p95", lambda s: "-" if s.first_p95_ms is None else ms_text(s.first_p95_ms)),
    ("whole answer, p95", lambda s: "-" if s.p95_ms is None else ms_text(s.p95_ms)),
)  # fmt: skip


def weights(made: Comparison) -> list[str]:
    """Which layers differ, in sentences."""
    found = made.layers
    if bool(made.first.engine.adapter) != bool(made.second.engine.adapter):
        return [_one_adapter(made)]
    if found is None:
        return ["weights: what is in them is not known of both versions"]
    if not found.changed and not found.only_first and not found.only_second:
        return ["weights: the same in every layer"]
    told: list[str] = []
    if found.changed:
        told.append(f"weights: {len(found.changed)} of {len(found.changed) + len(found.same)} parts differ")
        told.append(f"  changed: {', '.join(ranges(found.changed))}")
    if found.changed and found.same:
        told.append(f"  the same: {', '.join(ranges(found.same))}")
    for side, names in ((made.first, found.only_first), (made.second, found.only_second)):
        if names:
            told.append(f"  only in {side.version}: {', '.join(ranges(names))}")
    return told


def _one_adapter(made: Comparison) -> str:
    """Of a version with an adapter and one without."""
    tuned, plain = (made.first, made.second) if made.first.engine.adapter else (made.second, made.first)
    if tuned.inspection is None or plain.inspection is None:
        return f"weights: {tuned.version} is an adapter, and what is in the files is not known of both versions"
    rank = f"an adapter of rank {tuned.inspection.adapter_rank}"
    if tuned.inspection.base_digest == plain.inspection.digest:
        return f"weights: {tuned.version} adds {rank} to those of {plain.version}"
    return f"weights: {tuned.version} adds {rank} to others than those of {plain.version}"


def ways(made: Comparison) -> list[str]:
    """How an engine of the first becomes one of the second, in sentences."""
    pair = f"{made.first.version} → {made.second.version}"
    return [f"{pair} by {way.tier}: {'yes' if way.possible else 'no'}, {way.why}" for way in made.ways]


def ranges(names: Iterable[str]) -> list[str]:
    """Layers that follow each other as one: ``model.layers.0-29``. At most a dozen, then how many more."""
    stacks: dict[str, list[int]] = {}
    found: list[str] = []
    for name in names:
        layer = _LAYER.fullmatch(name)
        if layer:
            stacks.setdefault(layer[1], []).append(int(layer[2]))
        else:
            found.append(name)
    for stack, numbers in stacks.items():
        numbers.sort()
        start = before = numbers[0]
        for n in (*numbers[1:], None):
            if n is None or n != before + 1:
                found.append(f"{stack}{start}" if start == before else f"{stack}{start}-{before}")
                start = before if n is None else n
            before = before if n is None else n
    more = [f"and {len(found) - 12} more"] if len(found) > 12 else []
    return found[:12] + more
