"""How many events one core folds in a second: each projection alone, all views together, and the controller's world.

The log is made by the real deciders (bench/history.py) and decoded before the clock starts. Time is the processor's
time of this process, so that what else runs on the machine disturbs less. Everything that disturbs only makes a pass
slower, and on a shared machine no pass is undisturbed from its beginning to its end: so the figure is the sum, over
pieces of ``PIECE`` events, of the least time that the piece took in any pass. What a fold does in every pass (growing
dicts, collecting garbage) is in it. Whole passes stand beside it, all of them in the JSON file.
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING

import history
import report

from turnout.core.world import World
from turnout.projections.fleet import Gateways, Workers
from turnout.projections.registry import Registry
from turnout.projections.routing import Routing
from turnout.projections.switches import Switches
from turnout.projections.views import Views

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.events.envelope import Recorded

GOAL = 1_000_000.0
PIECE = 500
FOLDS: dict[str, type] = {
    "routing": Routing,
    "registry": Registry,
    "switches": Switches,
    "workers": Workers,
    "gateways": Gateways,
    "views (all of them)": Views,
    "world (for decisions)": World,
}


class _Nothing:
    """The floor: a call for each event that does nothing."""

    def apply(self, recorded: Recorded) -> None:
        pass


def run(quick: bool) -> report.Outcome:
    """Fold one log by every fold, in turn, several times."""
    events, passes = (20_000, 5) if quick else (300_000, 9)
    log = history.play(events)
    gc.collect()
    gc.freeze()  # the log itself is not what a fold has to pay for
    folds: dict[str, type] = {"(an empty call)": _Nothing, **FOLDS}
    pieces = [log[n : n + PIECE] for n in range(0, len(log), PIECE)]
    times: dict[str, list[list[float]]] = {name: [] for name in folds}
    for _ in range(passes):
        for name, fold in folds.items():
            times[name].append(_pass(fold, pieces))
    speeds = {name: [len(log) / sum(one) for one in made] for name, made in times.items()}
    best = {name: len(log) / sum(min(piece) for piece in zip(*made, strict=True)) for name, made in times.items()}
    share = history.mix(log)
    views, routing = best["views (all of them)"], best["routing"]
    return report.Outcome(
        figures={
            "events": len(log),
            "mix": share,
            "events_per_s_undisturbed": best,
            "events_per_s_median": {name: report.median(values) for name, values in speeds.items()},
            "events_per_s": speeds,
        },
        tables=[
            report.Table(
                f"Fold of {len(log):,} decoded events on one core",
                ["fold", "events/s, undisturbed", "ns per event", "events/s, best pass", "events/s, median pass"],
                [
                    [
                        name,
                        f"{best[name]:,.0f}",
                        f"{1e9 / best[name]:.0f}",
                        f"{max(speeds[name]):,.0f}",
                        f"{report.median(speeds[name]):,.0f}",
                    ]
                    for name in folds
                ],
                ["The log: " + ", ".join(f"{name} {100 * part:.0f} %" for name, part in share.items() if part >= 0.01)],
            )
        ],
        goals=[
            report.Goal("fold of the routes", "≥ 1 M events/s", f"{routing / 1e6:.2f} M", routing >= GOAL),
            report.Goal("fold of all views", "≥ 1 M events/s", f"{views / 1e6:.2f} M", views >= GOAL),
        ],
    )


def _pass(fold: type, pieces: list[list[Recorded]]) -> list[float]:
    """Seconds of each piece, in one pass over all of them."""
    gc.collect()
    apply: Callable[[Recorded], object] = fold().apply
    seconds: list[float] = []
    for piece in pieces:
        start = time.process_time()
        for recorded in piece:
            apply(recorded)
        seconds.append(time.process_time() - start)
    return seconds


if __name__ == "__main__":
    raise SystemExit(report.main("fold", run))
