"""The ten scenarios, again and again: what a bad candidate costs before it is gone, and how fast the control loop is.

Each run is ``turnout demo --scenario NAME --json``: a turnout of its own with real processes, fake engines and
streaming clients. *Control loop* is from the end of the newest sample that the verdict could know to the last gateway's
acknowledgement of the way back.

    python bench/scenarios.py [--quick] [--runs 3]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

import msgspec
import report

from turnout.workers.scenarios import SCENARIOS

#: Seconds for one scenario, on a machine with little to give.
_LIMIT_S = 300.0
LOOP_GOAL_S = 2.0
#: What is taken of the object that a scenario prints.
_KEYS = ("canary_requests_until_rollback", "seconds", "control_loop_s", "failed", "cut", "errors")


def run(quick: bool, runs: int) -> report.Outcome:
    """So many runs of each scenario; where it is quick, one."""
    found = {name: [play(name) for _ in range(1 if quick else runs)] for name in SCENARIOS}
    everything = [one for made in found.values() for one in made]
    loops = [float(one["control_loop_s"]) for one in everything if one["control_loop_s"] is not None]
    broken = sum(one["failed"] + one["cut"] for one in everything)
    planned = sum(one["as_planned"] for one in everything)
    requests = sum(one["requests"] for one in everything)
    return report.Outcome(
        figures={
            name: [{key: one[key] for key in (*_KEYS, "outcome")} for one in made] for name, made in found.items()
        },
        tables=[
            report.Table(
                f"Each scenario {len(next(iter(found.values())))} times: all values, in the order of the runs",
                [
                    "scenario",
                    "ends",
                    "candidate's requests until rollback",
                    "seconds",
                    "control loop (s)",
                    "failed, cut",
                    "engine's errors seen by clients",
                ],
                [_row(name, made) for name, made in found.items()],
            )
        ],
        goals=[
            report.Goal(
                "scenarios that end as planned", "all", f"{planned} of {len(everything)}", planned == len(everything)
            ),
            report.Goal("failed / cut requests", "0", f"{broken} of {requests:,}", not broken),
            report.Goal(
                "newest sample → verdict → last gateway's acknowledgement",
                f"< {LOOP_GOAL_S:g} s",
                f"{max(loops):.3f} s at most",
                max(loops) < LOOP_GOAL_S,
            ),
        ],
    )


def play(name: str) -> dict[str, Any]:
    """What ``turnout demo --scenario NAME --json`` prints at its end."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        argv = [sys.executable, "-m", "turnout.workers.cli", "demo", "--scenario", name, "--json"]
        made = subprocess.run(
            argv, cwd=folder, env=report.environment(), capture_output=True, timeout=_LIMIT_S, check=False
        )
    if not made.stdout:
        raise RuntimeError(f"{name} could not be played: {made.stderr.decode(errors='replace')[-400:]}")
    told: dict[str, Any] = msgspec.json.decode(made.stdout)
    return told


def _row(name: str, made: list[dict[str, Any]]) -> list[str]:
    def all_of(key: str) -> str:
        values = [one[key] for one in made]
        return "" if all(value is None for value in values) else ", ".join(f"{value}" for value in values)

    broken = ", ".join(f"{one['failed'] + one['cut']}" for one in made)
    ends = ", ".join(dict.fromkeys(str(one["outcome"]).replace("_", " ") for one in made))
    return [
        name,
        ends,
        all_of("canary_requests_until_rollback"),
        all_of("seconds"),
        all_of("control_loop_s"),
        broken,
        all_of("errors"),
    ]


if __name__ == "__main__":
    wanted = 3
    if "--runs" in sys.argv:
        at = sys.argv.index("--runs")
        wanted = int(sys.argv[at + 1])
        del sys.argv[at : at + 2]
    raise SystemExit(report.main("scenarios", lambda quick: run(quick, wanted)))
