"""The live view of one model: weights, the step, the evidence and what comes next. Drawn from fixed data, so testable.

On a terminal one picture is redrawn in place; in a pipe every change is printed once, with ``--json`` on one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from turnout.core.health import HealthStatus
from turnout.core.switch import ENDED
from turnout.events.store import Unavailable
from turnout.projections.audit import seconds, who
from turnout.workers.answers import CommandRejected, ControllerBug
from turnout.workers.cli.health import STYLES
from turnout.workers.cli.pictures import Picture, keys, outlook, picture, waits
from turnout.workers.cli.terminal import DONE, Terminal, rows
from turnout.workers.cli.words import (
    bar,
    decision_style,
    figures_table,
    left_s,
    ms_text,
    phase_style,
    phase_text,
    share_text,
    step_text,
)
from turnout.workers.client import HealthMonitor
from turnout.workers.controller.health import HealthReport

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from rich.console import RenderableType

    from turnout.core.health import VersionHealth
    from turnout.core.judging.judgement import Judgement
    from turnout.projections.switches import SwitchView
    from turnout.workers.client import Client

#: How often evidence and health are asked for, and the countdown is drawn, seconds.
_EVERY_S = 1.0
#: For these answers: a picture without them is better than none.
_ANSWER_S = 0.9
#: Cells of a version's share.
_BAR = 20
#: Columns from which on the evidence has wide bars.
_WIDE = 96


class Seen(msgspec.Struct, frozen=True):
    """A picture, and how its versions do; ``trouble`` says why nobody could be asked."""

    picture: Picture
    health: HealthReport | None = None
    trouble: str = ""


async def complete(client: Client, seen: Picture, *, health: bool = False) -> Seen:
    """Add what views don't hold: evidence, what comes next, and with ``health`` how the versions do."""
    monitor = HealthMonitor(client)
    judgement, coming, report, trouble = None, None, None, ""
    try:
        if seen.switch is not None and seen.switch.phase not in ENDED:
            state = await client.switch_state(seen.switch.switch)
            coming = outlook(state, None, client.clock.now())
            judgement = (await monitor.check_evidence(state.switch, deadline_s=_ANSWER_S)).judgement
            coming = outlook(state, judgement, client.clock.now())
        if health:
            report = await monitor.check_model_health(seen.model.model, deadline_s=_ANSWER_S)
    except (Unavailable, CommandRejected, ControllerBug) as e:
        trouble = str(e)
    return Seen(msgspec.structs.replace(seen, evidence=judgement, outlook=coming), report, trouble)


async def watch_model(
    io: Terminal, client: Client, model: str, tree: Callable[[Picture, datetime], RenderableType]
) -> int:
    """Show every change until the process is interrupted, or the model is gone. ``tree``: how it looks in a pipe."""
    clock, drawn = client.clock, io.out.is_terminal and not io.json
    said, asked_at = b"", -_EVERY_S
    full: Seen | None = None
    async with client.follow(*keys(model)) as following:
        with Live(console=io.out, auto_refresh=False, transient=False) as live:
            while True:
                seen = picture(model, following.views)
                if seen is None:
                    return DONE  # deregistered with its last version
                if full is None or clock.monotonic() - asked_at >= _EVERY_S or _moved(full.picture, seen):
                    full = await complete(client, seen, health=drawn)
                    asked_at = clock.monotonic()
                else:
                    kept = full.picture
                    full = Seen(
                        msgspec.structs.replace(seen, evidence=kept.evidence, outlook=kept.outlook),
                        full.health,
                        full.trouble,
                    )
                if drawn:
                    live.update(screen(full, clock.now(), io.out.width), refresh=True)
                else:
                    raw = msgspec.json.encode(full.picture)
                    if raw != said and io.json:
                        io.emit(full.picture)
                    elif raw != said:
                        io.show(tree(full.picture, clock.now()))
                    said = raw
                await following.moved(_EVERY_S)


def _moved(before: Picture, now: Picture) -> bool:
    """Whether the switch has, so that what was asked about it is of the past."""
    return before.switch != now.switch


def screen(seen: Seen, now: datetime, width: int) -> RenderableType:
    """The live view, on a terminal of so many columns."""
    one = seen.picture
    head = Text.assemble(
        (one.model.model, "bold"),
        f"  serves {one.model.active}" if one.model.active else "  serves nothing yet",
        (f"   revision {one.route.revision}" if one.route is not None else "", "dim"),
        (f"   {now.astimezone():%H:%M:%S}", "dim"),
    )
    parts: list[RenderableType] = [head, _versions(seen)]
    if one.switch is not None:
        parts += ["", *_switch(one, one.switch, now)]
        if one.evidence is not None:
            parts += ["", *_evidence(one.evidence, one.switch, 10 if width >= _WIDE else 6)]
        if one.switch.verdict is not None:
            verdict = one.switch.verdict
            parts += [
                "",
                Text.assemble(
                    "last verdict  ",
                    (verdict.decision, decision_style(verdict.decision)),
                    f" on step {verdict.step}: {verdict.reason}",
                ),
            ]
    elif one.model.last_switch:
        outcome = one.model.last_outcome
        parts += [
            "",
            Text.assemble("last switch  ", one.model.last_switch, "  ", (phase_text(outcome), phase_style(outcome))),
        ]
    parts += ["", _gateways(one)]
    if seen.trouble:
        parts.append(Text(f"neither evidence nor health: {seen.trouble}", "yellow"))
    return Group(*parts)


def _versions(seen: Seen) -> RenderableType:
    """One line for each version: its share as a bar, what runs on it, and how it does."""
    one = seen.picture
    weights = {split.version: split.weight for split in one.route.splits} if one.route is not None else {}
    mirrored = {mirror.version: mirror.percent for mirror in one.route.mirrors} if one.route is not None else {}
    health = {version.version: version for version in seen.health.versions} if seen.health is not None else {}
    target = one.switch.target if one.switch is not None else ""
    lines: list[list[str | Text]] = []
    for name in one.model.versions:
        loaded = [i for i in one.instances if i["version"] == name]
        if name not in weights and name not in mirrored and not loaded and name not in (one.model.active, target):
            continue
        share = weights.get(name, 0.0)
        role = "active" if name == one.model.active else "target" if name == target else ""
        style = "cyan" if name == target else "green"
        lines.append(
            [
                Text(f"  {name}", "bold"),
                Text(role, "dim"),
                Text(bar(share / 100, _BAR), style if share else "dim"),
                Text(f"{share:5.4g} %" + (f", copies of {mirrored[name]:g} %" if name in mirrored else "")),
                _running(health.get(name)),
                _status(health.get(name), loaded),
                *_numbers(health.get(name)),
            ]
        )
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for number in range(8):
        # on a narrow terminal the numbers at the end are cut, never the share
        needed = max((len(line[number]) for line in lines), default=0) if number < 6 else None
        made.add_column(no_wrap=True, min_width=needed)
    return rows(made, lines)


def _running(health: VersionHealth | None) -> str:
    return f"{health.in_flight} in flight" if health is not None and health.instances else ""


def _status(health: VersionHealth | None, loaded: list[dict[str, object]]) -> Text:
    if health is not None and health.instances:
        return Text(health.status, STYLES[health.status])
    waiting = next((str(i["stage"] or i["phase"]) for i in loaded if i["phase"] != "ready"), "")
    return Text(waiting or (HealthStatus.UNKNOWN if loaded else "not loaded"), "cyan" if waiting else "dim")


def _numbers(health: VersionHealth | None) -> tuple[str, str]:
    if health is None or not health.numbers.requests:
        return "", ""
    counted = health.numbers
    return f"{counted.requests} requests, {share_text(counted.error_rate)} failed", f"p95 {ms_text(counted.p95_ms)}"


def _switch(one: Picture, switch: SwitchView, now: datetime) -> list[RenderableType]:
    way = f"{switch.source} → {switch.target}" if switch.source else f"→ {switch.target}"
    policy = f", policy {switch.policy}" if switch.policy else ""
    age_s = max(0, int((now - switch.requested_at).total_seconds())) if switch.requested_at is not None else 0
    head = Text.assemble(
        "switch ",
        (switch.switch, "bold"),
        f"  {way} ({'undo' if switch.undo else switch.strategy}{policy})  ",
        (phase_text(switch.phase), phase_style(switch.phase)),
        (f"  {step_text(switch)}", "bold"),
        (f"  since {seconds(age_s)}, by {who(switch.actor)}", "dim"),
    )
    parts: list[RenderableType] = [head, *(Text(f"  {wait}") for wait in waits(one, switch, now))]
    if one.outlook is not None:
        when = f"in {seconds(left_s(one.outlook.at, now))} at the latest: " if one.outlook.at is not None else ""
        known = one.evidence is not None and one.evidence.missing == one.outlook.what  # said below, with the figures
        parts.append(
            Text.assemble("  next  ", (when, "bold"), "as soon as the evidence passes" if known else one.outlook.what)
        )
    return parts


def _evidence(judged: Judgement, switch: SwitchView, cells: int) -> list[RenderableType]:
    """What the judge sees, and how far it is from a decision."""
    counted = (
        f"  {judged.source_requests} requests on {switch.source or 'no source'}, {judged.target_requests} on "
        f"{switch.target}" + (f" by {judged.target_users} users" if judged.target_users else "")
    )
    parts: list[RenderableType] = []
    if judged.figures:
        parts.append(figures_table(judged.figures, switch.source, switch.target, cells))
    parts.append(Text(counted, "dim"))
    if judged.missing:
        parts.append(Text.assemble("  missing for a pass: ", (judged.missing, "bold")))
    elif judged.reason:
        parts.append(Text.assemble("  ", (judged.decision, decision_style(judged.decision)), f": {judged.reason}"))
    return parts


def _gateways(one: Picture) -> Text:
    if not one.gateways:
        return Text("no gateway is live", "yellow")
    fresh = one.route.revision if one.route is not None else 0
    line = Text("gateways  ")
    for number, gateway in enumerate(one.gateways):
        behind = gateway["revision"] < fresh
        line.append(", " if number else "").append(str(gateway["gateway"]))
        line.append(
            f" waits for revision {fresh}" if behind else f" at {gateway['revision']}", "yellow" if behind else "dim"
        )
    return line
