"""Requests that wait: what a load on demand and a switch on one place cost their clients, and what was foretold of it.

Each run is ``turnout demo --scenario NAME --json``: a turnout of its own with real processes, fake engines and
streaming clients; ``sleep`` beside them, where an engine is woken instead of loaded.

    python bench/waiting.py [--quick]
"""

from __future__ import annotations

from typing import Any

import report
from scenarios import play

SCENARIOS = ("on-demand", "hold", "sleep")
RUNS = 3


def run(quick: bool) -> report.Outcome:
    """So many runs of each scenario; where it is quick, one."""
    found = {name: [play(name) for _ in range(1 if quick else RUNS)] for name in SCENARIOS}
    everything = [one for made in found.values() for one in made]
    broken = sum(one["failed"] + one["cut"] for one in everything)
    planned = sum(one["as_planned"] for one in everything)
    requests = sum(one["requests"] for one in everything)
    return report.Outcome(
        figures={name: [{key: one.get(key) for key in _KEYS} for one in made] for name, made in found.items()},
        tables=[
            report.Table(
                f"Each scenario {len(found['hold'])} times: all values, in the order of the runs",
                [
                    "scenario",
                    "tier",
                    "ready (s)",
                    "requests that waited",
                    "longest wait (s)",
                    "pause foretold (s)",
                    "pause (s)",
                    "failed, cut",
                ],
                [_row(name, made) for name, made in found.items()],
            )
        ],
        goals=[
            report.Goal(
                "scenarios that end as planned", "all", f"{planned} of {len(everything)}", planned == len(everything)
            ),
            report.Goal("failed / cut requests", "0", f"{broken} of {requests:,}", not broken),
        ],
    )


_KEYS = ("outcome", "tier", "ready_s", "held", "longest_wait_s", "pause_s", "failed", "cut", "requests")


def _row(name: str, made: list[dict[str, Any]]) -> list[str]:
    def all_of(values: list[Any]) -> str:
        return "" if all(value is None for value in values) else ", ".join(f"{value}" for value in values)

    pauses: list[dict[str, Any]] = [one.get("pause_s") or {} for one in made]
    return [
        name,
        ", ".join(dict.fromkeys(one["tier"] for one in made)),
        all_of([one["ready_s"] for one in made]),
        all_of([one.get("held") for one in made]),
        all_of([one.get("longest_wait_s") for one in made]),
        all_of([pause.get("foretold") for pause in pauses]),
        all_of([pause.get("measured") for pause in pauses]),
        all_of([one["failed"] + one["cut"] for one in made]),
    ]


if __name__ == "__main__":
    raise SystemExit(report.main("waiting", run))
