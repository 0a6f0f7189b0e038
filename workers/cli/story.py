"""The story of a switch in sentences, for ``report`` and its page. Knows neither terminal nor page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turnout.projections.audit import seconds, who
from turnout.workers.cli.words import e_text, effect_text, figure_text, share_text, value_text

if TYPE_CHECKING:
    from datetime import datetime

    from turnout.core.health import Numbers, SwitchImpact
    from turnout.workers.story import Report


def summary(made: Report, now: datetime) -> str:
    """Who asked, how long it took, why it ended."""
    took = ""
    if made.asked_at is not None:
        end = made.ended_at or now
        verb = "after" if made.ended_at is not None else "since"
        took = f" {verb} {seconds(max(0.0, (end - made.asked_at).total_seconds()))}"
    because = f": {made.ended_because}" if made.ended_because else ""
    serves = f"; {made.model} serves {made.serves}" if made.serves else ""
    asked = f"; asked by {who(made.actor)}" + (f" ({made.reason})" if made.reason else "")
    return f"{took}{because}{serves}{asked}"


def effects(made: Report) -> list[str]:
    """The effect with its interval, and the sample-ratio check, one sentence each."""
    if not made.verdicts:
        return ["no verdict was reached" + (" yet" if made.outcome == "running" else "")]
    lines = [
        f"effect on {figure_text(figure.name)}: {made.target} has {effect_text(figure)} times what "
        f"{made.source or 'the source'} has "
        f"({value_text(figure.name, figure.target)} to {value_text(figure.name, figure.source)})"
        for figure in made.effect
    ]
    ratio = made.sample_ratio
    if ratio is not None:
        kept = "was kept" if ratio.e < ratio.e_needed else "was NOT kept: the comparison is broken"
        lines.append(
            f"sample ratio: the split {kept} (planned {share_text(ratio.source)}, seen {share_text(ratio.target)}, "
            f"e = {e_text(ratio.e)} of {e_text(ratio.e_needed)})"
        )
    return lines


def periods(impact: SwitchImpact) -> list[tuple[str, Numbers]]:
    """Before, during and after the switch, those in which there was a request."""
    told = (("before", impact.before), ("during", impact.during), ("after", impact.after))
    return [(name, counted) for name, counted in told if counted.requests]
