"""A switch's report as one HTML page with its plots in it: no script, nothing from a network, light and dark.

Draws a fixed ``Report``; knows no terminal and no log. Whatever comes from outside is escaped.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from turnout.core.health import wilson
from turnout.projections.audit import seconds, who
from turnout.workers.cli.story import effects, periods, summary
from turnout.workers.cli.words import (
    e_text,
    effect_text,
    evidence_share,
    figure_text,
    figure_unit,
    impact_cells,
    ms_text,
    phase_text,
    share_text,
    toml,
    value_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from turnout.events.switch import Figure, VerdictReached
    from turnout.workers.story import Report

_STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --card: #ffffff; --ink: #1d1d1b; --faint: #6d6d68; --line: #dddcd6;
  --source: #7a7f8a; --target: #1769c4; --good: #1c7d43; --bad: #c0312b; --warning: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --ground: #161718; --card: #1e2022; --ink: #ebebe6; --faint: #a2a29b;
  --line: #3a3c3f; --source: #9aa1ad; --target: #63a9f7; --good: #57bd7f; --bad: #f2766f; --warning: #e0b04c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.2rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
p { margin: .3rem 0; }
.badge { padding: .1rem .6rem; border-radius: 1rem; border: 1px solid currentColor; font-weight: 600; }
.faint, .detail { color: var(--faint); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.warning { color: var(--warning); }
figure, pre { margin: .6rem 0; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; overflow-x: auto; }
figcaption { color: var(--faint); font-size: .85rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: .8rem; }
.panels figure { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th { text-align: left; color: var(--faint); font-weight: 500; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 12px; }
svg .name { fill: var(--ink); }
.grid { stroke: var(--line); }
.source { fill: var(--source); stroke: var(--source); }
.target { fill: var(--target); stroke: var(--target); }
.all { fill: var(--ink); stroke: var(--ink); }
.path { fill: none; stroke: var(--target); stroke-width: 2; }
.area { fill: var(--target); opacity: .12; }
.needed { stroke: var(--ink); stroke-dasharray: 4 3; }
.harm, .mark-bad { fill: var(--bad); }
.noharm, .mark-good { fill: var(--good); }
.mark-warning { fill: var(--warning); }
.rest { fill: var(--line); }
"""
_TONES = {"completed": "good", "concluded": "good", "failed": "bad", "rolled_back": "warning", "aborted": "warning"}
_DECISIONS = {"pass": "good", "fail": "bad"}
#: A bar that is over what is needed ends here, as a part of it.
_OVER = 1.12


def page(report: Report, now: datetime) -> str:
    """The whole page. ``now``: UTC, the end of the time axis of a switch that runs."""
    way = f"{report.source} → {report.target}" if report.source else f"→ {report.target}"
    how = ("undo" if report.undo else report.strategy) + (f", policy {report.policy}" if report.policy else "")
    asked = f"{report.asked_at.astimezone():%A, %Y-%m-%d %H:%M:%S %Z}" if report.asked_at is not None else ""
    parts = [
        f'<p class="faint">{escape(f"{report.switch} ({how}), asked for by {who(report.actor)} {asked}")}</p>',
        f'<p><span class="badge {_TONES.get(report.outcome, "")}">{escape(phase_text(report.outcome))}</span>'
        f"{escape(summary(report, now))}</p>",
        *(f"<p>{escape(line)}</p>" for line in effects(report)),
        "<h2>Share of the traffic</h2>",
        _share_plot(report, now),
        *_steps(report),
        *_impact(report),
        *_arms(report),
        *_verdicts(report),
        *_moments(report),
        *_asked(report),
    ]
    return document(f"{report.model} {way}", parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A page of its own from finished pieces of HTML, with the title as its heading."""
    head = escape(title)
    body = "\n".join((f"<h1>{head}</h1>", *(part for part in parts if part)))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{head}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _steps(report: Report) -> list[str]:
    if not report.steps:
        return []
    lines = [
        [
            str(step.step),
            f"{step.weight:g} %" + (f", copies of {step.mirror:g} %" if step.mirror else ""),
            f"{step.at.astimezone():%H:%M:%S}",
            _applied(step.applied_s, step.gateways),
            "-" if step.lasted_s is None else seconds(step.lasted_s),
            step.reason,
        ]
        for step in report.steps
    ]
    return ["<h2>Steps</h2>", grid(("Step", "Weight", "Started", "Applied in", "Lasted", "Why"), lines)]


def _applied(applied_s: float | None, gateways: tuple[str, ...]) -> str:
    return "-" if applied_s is None else f"{seconds(applied_s)} by {_count(len(gateways), 'gateway')}"


def _verdicts(report: Report) -> list[str]:
    parts: list[str] = []
    for verdict in report.verdicts:
        tone = _DECISIONS.get(verdict.decision, "warning")
        parts.append(
            f"<h3>Step {verdict.step}: <span class={tone!r}>{escape(verdict.decision)}</span></h3>"
            f"<p>{escape(verdict.reason)}</p>"
            f'<p class="faint">{escape(_counted(report, verdict))}</p>'
        )
        if verdict.figures:
            parts.append(_evidence_plot(verdict.figures))
            parts.append(_figures(report, verdict.figures))
    return ["<h2>Verdicts</h2>", *parts] if parts else []


def _counted(report: Report, verdict: VerdictReached) -> str:
    users = f" by {verdict.target_users} users" if verdict.target_users else ""
    rule = f"; rule: {verdict.rule}" if verdict.rule else ""
    return (
        f"{verdict.source_errors} of {verdict.source_requests} requests on {report.source or 'no source'} failed, "
        f"{verdict.target_errors} of {verdict.target_requests} on {report.target}{users}; "
        f"{_count(verdict.samples, 'sample')} of {_count(verdict.gateways, 'gateway')} "
        f"in {seconds(verdict.seconds)}{rule}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _figures(report: Report, figures: Iterable[Figure]) -> str:
    lines = [
        [
            figure_text(figure.name),
            value_text(figure.name, figure.source),
            value_text(figure.name, figure.target),
            effect_text(figure),
            f"{e_text(figure.e)} of {e_text(figure.e_needed)}",
            "" if figure.e_good is None else f"{e_text(figure.e_good)} of {e_text(figure.e_good_needed)}",
        ]
        for figure in figures
    ]
    heads = ("Figure", report.source or "source", report.target, "Ratio", "Harm, e-value", "No harm, e-value")
    return grid(heads, lines)


def _moments(report: Report) -> list[str]:
    lines = [
        f'<tr><td class="faint">{moment.at.astimezone():%H:%M:%S}</td>'
        f"<td>{'<b>' if moment.person else ''}{escape(who(moment.actor))}{'</b>' if moment.person else ''}</td>"
        f'<td class="{moment.tone}">{escape(moment.sentence)}</td></tr>'
        for moment in report.moments
    ]
    head = "<tr><th>Time</th><th>Who</th><th>What</th></tr>"
    return ["<h2>What happened</h2>", f'<div class="wide"><table>{head}{"".join(lines)}</table></div>'] if lines else []


def _asked(report: Report) -> list[str]:
    if not report.parameters:
        return []
    return ["<h2>Parameters</h2>", f"<pre>{escape(toml(report.parameters))}</pre>"]


def grid(heads: tuple[str, ...], lines: list[list[str]]) -> str:
    """A table."""
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _share_plot(report: Report, now: datetime) -> str:
    """The target's percentage over the time since the switch was asked for, with the verdicts on it."""
    if report.asked_at is None or not report.shares:
        return ""
    began, end = report.asked_at, report.ended_at or now
    whole_s = max(1e-3, (end - began).total_seconds())
    left, right, top, bottom = 46.0, 884.0, 14.0, 190.0

    def across(at: datetime) -> float:
        return left + (right - left) * min(1.0, max(0.0, (at - began).total_seconds() / whole_s))

    def down(weight: float) -> float:
        return bottom - (bottom - top) * weight / 100

    drawn = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{down(w):.1f}" y2="{down(w):.1f}"/>'
        f'<text x="{left - 8}" y="{down(w) + 4:.1f}" text-anchor="end">{w} %</text>'
        for w in (0, 25, 50, 75, 100)
    ]
    for tick_s in _ticks(whole_s):
        x = left + (right - left) * tick_s / whole_s
        said = seconds(tick_s) if tick_s else "0"
        drawn.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(said)}</text>')
    points: list[tuple[float, float]] = []
    for share in report.shares:
        if points:
            points.append((across(share.at), points[-1][1]))
        points.append((across(share.at), down(share.weight)))
    points.append((across(end), points[-1][1]))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn.append(f'<polygon class="area" points="{left},{bottom} {line} {across(end):.1f},{bottom}"/>')
    drawn.append(f'<polyline class="path" points="{line}"/>')
    for verdict in report.verdicts:
        held = [share.weight for share in report.shares if share.at <= verdict.at]
        tone = _DECISIONS.get(verdict.decision, "warning")
        said = escape(f"step {verdict.step}: {verdict.decision}: {verdict.reason}")
        drawn.append(
            f'<circle class="mark-{tone}" cx="{across(verdict.at):.1f}" cy="{down(held[-1] if held else 0):.1f}" r="5">'
            f"<title>{said}</title></circle>"
        )
    what = f"Percent of the requests that {report.target} gets; dots are verdicts"
    return _figure("0 0 900 220", what, drawn, f"{what}. Time since the switch was asked for.")


def _evidence_plot(figures: tuple[Figure, ...]) -> str:
    """How far each e-value is from what is needed: harm above, no harm below, the dashed line is enough."""
    left, right, row = 150.0, 690.0, 42.0
    enough = left + (right - left) / _OVER
    height = 24 + row * len(figures)
    drawn: list[str] = []
    for number, figure in enumerate(figures):
        y = 20 + row * number
        bars = [("harm", figure.e, figure.e_needed, y)]
        if figure.e_good is not None:
            bars.append(("noharm", figure.e_good, figure.e_good_needed, y + 16))
        middle = y + (18 if len(bars) > 1 else 10)
        name = escape(figure_text(figure.name))
        drawn.append(f'<text class="name" x="{left - 10}" y="{middle}" text-anchor="end">{name}</text>')
        for kind, e, needed, top in bars:
            share = _OVER if e > needed else evidence_share(e, needed)
            drawn.append(
                f'<rect class="rest" x="{left}" y="{top}" width="{right - left}" height="12" rx="2"/>'
                f'<rect class="{kind}" x="{left}" y="{top}" width="{(enough - left) * share:.1f}" height="12" rx="2"/>'
                f'<text x="{right + 10}" y="{top + 10}">{"harm" if kind == "harm" else "no harm"} '
                f"{e_text(e)} of {e_text(needed)}</text>"
            )
    drawn.append(f'<line class="needed" x1="{enough:.1f}" x2="{enough:.1f}" y1="14" y2="{height - 4}"/>')
    drawn.append(f'<text x="{enough:.1f}" y="10" text-anchor="middle">enough</text>')
    what = "Evidence of harm and of no harm, by the logarithm of the e-value"
    return _figure(f"0 0 900 {height:g}", what, drawn, what + "; from the dashed line on it decides.")


def _arms(report: Report) -> list[str]:
    """The two versions side by side at each verdict: failed requests, then everything in milliseconds."""
    panels: list[str] = []
    counted = [v for v in report.verdicts if v.source_requests or v.target_requests]
    if counted:
        pairs = [
            (
                f"step {verdict.step}",
                _interval(verdict.source_errors, verdict.source_requests),
                _interval(verdict.target_errors, verdict.target_requests),
            )
            for verdict in counted
        ]
        panels.append(_pair_plot("Failed requests, with 95 % intervals", pairs, share_text))
    names = dict.fromkeys(f.name for v in report.verdicts for f in v.figures if figure_unit(f.name) == "ms")
    for name in names:
        found = [(v.step, f) for v in report.verdicts for f in v.figures if f.name == name]
        measured = [(f"step {step}", _point(f.source), _point(f.target)) for step, f in found]
        if any(source or target for _, source, target in measured):
            panels.append(_pair_plot(f"{figure_text(name)}, ms", measured, ms_text))
    if not panels:
        return []
    which = escape(f"left, grey: {report.source or 'no source'}; right, blue: {report.target}")
    key = f'<p class="faint">{which}</p>'
    return ["<h2>The two versions at the verdicts</h2>", key, f'<div class="panels">{"".join(panels)}</div>']


def _impact(report: Report) -> list[str]:
    """Before, during and after: what clients noticed, as points with their intervals and as a table."""
    told = periods(report.impact) if report.impact is not None else []
    if not told:
        return []
    failed = [(name, [(_PERIOD, _interval(one.errors, one.requests))]) for name, one in told]
    first = [(name, [(_PERIOD, _limited(one.first_p95_ms, one.first_p95_limits_ms))]) for name, one in told]
    last = [(name, [(_PERIOD, _limited(one.p95_ms, one.p95_limits_ms))]) for name, one in told]
    panels = [_points_plot("Failed requests, with 95 % intervals", failed, share_text)]
    for title, points in (("p95 to the first byte, ms, with 95 % intervals", first),
                          ("p95 to the last byte, ms, with 95 % intervals", last)):  # fmt: skip
        if any(point for _, ((_, point),) in points):
            panels.append(_points_plot(title, points, ms_text))
    heads = ("Period", "Requests", "Failed", "First byte p50", "First byte p95", "Last byte p95")
    who_noticed = f"All versions of {report.model} together; before and after are as long as the switch, or 5 minutes."
    return [
        "<h2>What clients noticed</h2>",
        f'<p class="faint">{escape(who_noticed)}</p>',
        f'<div class="panels">{"".join(panels)}</div>',
        grid(heads, [[name, *impact_cells(one)] for name, one in told]),
    ]


_Point = tuple[float, float, float]
#: The colour of a point that is of no single version.
_PERIOD = "all"


def _interval(errors: int, requests: int) -> _Point | None:
    low, high = wilson(errors, requests)
    return None if low is None or high is None else (errors / requests, low, high)


def _point(value: float | None) -> _Point | None:
    return None if value is None else (value, value, value)


def _limited(value: float | None, limits: tuple[float, float] | None) -> _Point | None:
    return None if value is None else (value, *(limits or (value, value)))


def _pair_plot(title: str, pairs: list[tuple[str, _Point | None, _Point | None]], text: Callable[[float], str]) -> str:
    """Two points with their intervals for each verdict."""
    points = [(name, [("source", source), ("target", target)]) for name, source, target in pairs]
    return _points_plot(title, points, text)


def _points_plot(
    title: str, groups: list[tuple[str, list[tuple[str, _Point | None]]]], text: Callable[[float], str]
) -> str:
    """Points with their intervals, side by side in named groups; each has a colour."""
    left, right, top, bottom = 62.0, 420.0, 12.0, 160.0
    tops = [point[2] for _, points in groups for _, point in points if point is not None]
    most = _nice(max(tops, default=0.0))

    def down(value: float) -> float:
        return bottom - (bottom - top) * value / most

    drawn = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{down(v):.1f}" y2="{down(v):.1f}"/>'
        f'<text x="{left - 8}" y="{down(v) + 4:.1f}" text-anchor="end">{escape(text(v))}</text>'
        for v in (0.0, most / 2, most)
    ]
    for number, (name, points) in enumerate(groups):
        middle = left + (right - left) * (number + 0.5) / len(groups)
        drawn.append(f'<text x="{middle:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(name)}</text>')
        for place, (kind, point) in enumerate(points):
            x = middle + 18.0 * (place - (len(points) - 1) / 2)
            if point is not None:
                value, low, high = point
                drawn.append(
                    f'<line class="{kind}" stroke-width="2" x1="{x:.1f}" x2="{x:.1f}" y1="{down(low):.1f}" '
                    f'y2="{down(high):.1f}"/><circle class="{kind}" cx="{x:.1f}" cy="{down(value):.1f}" r="4">'
                    f"<title>{escape(text(value))}</title></circle>"
                )
    return _figure("0 0 430 186", title, drawn, title)


def _figure(box: str, label: str, drawn: list[str], caption: str) -> str:
    svg = f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _ticks(whole_s: float) -> list[float]:
    """About six round times from 0 on."""
    step = _nice(whole_s / 6)
    return [step * number for number in range(int(whole_s / step) + 1)]


def _nice(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, … at or above a value; 1 for nothing."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value * 0.999999)
