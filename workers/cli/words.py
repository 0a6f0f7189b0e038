"""How phases, outcomes and figures are called, written and coloured, one place for all commands. Knows no command."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from rich.text import Text

from turnout.core.strategies import STRATEGIES
from turnout.core.switch import ENDED
from turnout.workers.cli.terminal import BACK, DONE, FAILED, HELD, rows, table

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from rich.table import Table

    from turnout.core.health import Numbers
    from turnout.core.strategies.base import Stage
    from turnout.events.switch import Figure
    from turnout.projections.switches import SwitchView

_WORDS = {"stepping": "cutting over", "stepped": "cut over"}
_STYLES = {
    "completed": "green",
    "concluded": "green",
    "failed": "bold red",
    "rolled_back": "yellow",
    "aborted": "yellow",
    "paused": "magenta",
    "holding": "yellow",
}
_CODES = {"completed": DONE, "concluded": DONE, "failed": FAILED, "rolled_back": BACK, "aborted": BACK, "paused": HELD}
_DECISIONS = {"pass": "green", "fail": "bold red", "inconclusive": "magenta", "invalid": "magenta"}
_PAUSES = {
    "operator": "by an operator",
    "pause": "by its own plan",
    "inconclusive": "the evidence says neither yes nor no",
    "invalid": "the comparison is broken",
}
#: Figures by the unit of their values; all others are shares.
_MS = frozenset(("first_byte", "first_byte_p95", "token_time", "latency_ceiling"))
_COUNTS = frozenset(("tokens", "dead", "probes"))


def phase_text(phase: str) -> str:
    """A phase or outcome in words: ``rolled_back`` is ``rolled back``."""
    return _WORDS.get(phase, phase.replace("_", " "))


def phase_style(phase: str) -> str:
    """Its colour."""
    return _STYLES.get(phase, "cyan")


def decision_style(decision: str) -> str:
    """The colour of a verdict's decision."""
    return _DECISIONS.get(decision, "default")


def exit_code(view: SwitchView, *, back_was_asked: bool = False) -> int:
    """What ``--wait`` ends with. ``back_was_asked``: an undo, for which going back is the success."""
    if back_was_asked and not view.undo and view.phase in ("rolled_back", "aborted"):
        return DONE
    return _CODES.get(view.phase, FAILED)


def left_s(until: datetime | None, now: datetime) -> int:
    """Whole seconds until then, not below 0."""
    return max(0, math.ceil((until - now).total_seconds())) if until is not None else 0


def stages_of(view: SwitchView) -> tuple[Stage, ...]:
    """The traffic levels that a switch plans; none where this turnout does not know its strategy, or none serves."""
    strategy = STRATEGIES.get(view.strategy)
    if strategy is None or not view.source or strategy.problems(view.parameters):
        return ()
    return strategy.stages(view.parameters)


def step_text(view: SwitchView) -> str:
    """Where a running switch is: ``step 2 of 4 (25 %)``."""
    if not view.step or view.phase in ENDED:
        return ""
    count = max(len(stages_of(view)), view.step)
    of = f" of {count}" if count > 1 else ""
    copies = f", copies of {view.mirror:g} %" if view.mirror else ""
    return f"step {view.step}{of} ({view.weight:g} %{copies})"


def bar(share: float, width: int) -> str:
    """A share from 0 to 1 as a bar; what is above 0 shows."""
    share = min(1.0, max(0.0, share))
    full = round(share * width)
    if share > 0:
        full = max(1, full)
    if share < 1:
        full = min(width - 1, full)
    return "█" * full + "░" * (width - full)


def evidence_share(e: float, needed: float) -> float:
    """How far an e-value is on its way from 1 to what is needed, by its logarithm: as many requests each part."""
    if e >= needed:
        return 1.0
    return math.log(e) / math.log(needed) if e > 1 and needed > 1 else 0.0


def meter(e: float, needed: float, width: int, style: str) -> Text:
    """An e-value on its way to what is needed."""
    share = evidence_share(e, needed)
    return Text(bar(share, width), f"bold {style}" if share >= 1 else style if share else "dim")


def e_text(e: float) -> str:
    """An e-value with the digits that matter."""
    if math.isinf(e) or e >= 1e6:
        return f"{e:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{e:,.0f}" if e >= 100 else f"{e:.2g}"


def value_text(name: str, value: float | None) -> str:
    """The value of a figure with its unit."""
    if value is None:
        return "-"
    if name in _MS:
        return ms_text(value)
    return f"{value:.3g}" if name in _COUNTS else share_text(value)


def ms_text(value: float | None) -> str:
    """Milliseconds."""
    return "-" if value is None else f"{value:.0f} ms" if value >= 10 or not value else f"{value:.1f} ms"


def figure_text(name: str) -> str:
    """A figure's name in words: ``first_byte`` is ``first byte``."""
    return name.replace("_", " ")


def figure_unit(name: str) -> str:
    """``ms``, ``count`` or ``share``."""
    return "ms" if name in _MS else "count" if name in _COUNTS else "share"


def share_text(share: float | None) -> str:
    """A share as percent: ``0.25 %``, ``12 %``."""
    if share is None:
        return "-"
    percent = share * 100
    return (
        f"{percent:.0f} %"
        if percent >= 10 or percent == 0
        else f"{percent:.1f} %"
        if percent >= 1
        else (f"{percent:.2g} %")
    )


def effect_text(figure: Figure) -> str:
    """How many times the source's value the target's is, by its limits; empty where there are none yet."""
    if figure.low is None or figure.high is None:
        return ""
    return f"{_times(figure.low)} to {_times(figure.high)}"


def _times(ratio: float) -> str:
    return "∞" if math.isinf(ratio) else f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}"


def figures_table(figures: Iterable[Figure], source: str, target: str, cells: int) -> Table:
    """What was measured of two versions, and how far each e-value is; its bars have so many cells."""
    made = table("  FIGURE", source or "SOURCE", target, "RATIO", "HARM", "", "NO HARM", "")
    lines: list[list[str | Text]] = [
        [
            f"  {figure_text(figure.name)}",
            value_text(figure.name, figure.source),
            value_text(figure.name, figure.target),
            effect_text(figure),
            meter(figure.e, figure.e_needed, cells, "red"),
            f"{e_text(figure.e)} of {e_text(figure.e_needed)}",
            "" if figure.e_good is None else meter(figure.e_good, figure.e_good_needed, cells, "green"),
            "" if figure.e_good is None else f"{e_text(figure.e_good)} of {e_text(figure.e_good_needed)}",
        ]
        for figure in figures
    ]
    return rows(made, lines)


def impact_cells(counted: Numbers) -> list[str]:
    """What clients noticed in one period: requests, failed, p50 and p95 to the first byte, p95 to the last."""
    share = share_text(counted.error_rate)
    if counted.low is not None and counted.high is not None:
        share += f" ({share_text(counted.low)} to {share_text(counted.high)})"
    return [
        f"{counted.requests:,}",
        share,
        ms_text(counted.first_p50_ms),
        ms_text(counted.first_p95_ms) + limits_text(counted.first_p95_limits_ms),
        ms_text(counted.p95_ms) + limits_text(counted.p95_limits_ms),
    ]


def limits_text(limits: tuple[float, float] | None) -> str:
    """Limits in milliseconds, in brackets; nothing where there are none."""
    return "" if limits is None else f" ({ms_text(limits[0])} to {ms_text(limits[1])})"


def paused_text(cause: str) -> str:
    """Why a switch stands still."""
    return _PAUSES.get(cause, cause)


def toml(table: dict[str, Any]) -> str:
    """A policy as TOML, one line for each key."""
    return "\n".join(f"{key} = {_toml_value(value)}" for key, value in table.items())


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        table = cast("dict[str, object]", value)
        return "{" + ", ".join(f"{key} = {_toml_value(one)}" for key, one in table.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(one) for one in cast("list[object]", value)) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
