"""The event store's figures (bench/store.py) beside their goals: replay through JetStream, latency of an append."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import report

GOAL = 90_000.0


def run(quick: bool) -> report.Outcome:
    """Run bench/store.py on a nats-server of its own."""
    events, appends = (20_000, 50) if quick else (300_000, 1_000)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        path = Path(name) / "store.json"
        argv = [sys.executable, str(report.ROOT / "bench" / "store.py"), "--events", str(events)]
        argv += ["--appends", str(appends), "--json", str(path)]
        subprocess.run(argv, env=report.environment(), check=True, stdout=subprocess.DEVNULL)
        found = json.loads(path.read_text())
    rates = found["replay_events_per_s"]
    return report.Outcome(
        figures=found,
        tables=[
            report.Table(
                f"Replay of {found['replay_events']:,} events through JetStream, decoded, one reader",
                ["", "events/s"],
                [
                    ["median of the runs", f"{rates['median']:,.0f}"],
                    ["slowest", f"{min(rates['all']):,.0f}"],
                    ["fastest", f"{max(rates['all']):,.0f}"],
                ],
                [f"{found['event_bytes']} bytes of envelope and body for each event."],
            ),
            report.Table(
                "Append, synced to disk before it is answered (ms)",
                ["", "p50", "p99"],
                [
                    [f"{count} events on {count} subjects", f"{ms['p50']:.2f}", f"{ms['p99']:.2f}"]
                    for count, ms in found["append_ms"].items()
                ],
            ),
        ],
        goals=[
            report.Goal(
                "replay through JetStream",
                "≥ 90 k events/s",
                f"{rates['median'] / 1e3:.0f} k",
                rates["median"] >= GOAL,
            )
        ],
    )


if __name__ == "__main__":
    raise SystemExit(report.main("replay", run))
