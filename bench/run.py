"""All benches, or those named: ``python bench/run.py [--quick] [--list] [gateway switches fold …]``.

Each runs in a process of its own, one after the other, prints its tables and keeps bench/results/<name>.json; at the
end docs/benchmarks.md gets the tables. With ``--quick`` they are short trials that are printed and not kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import report

BENCHES = {
    "gateway": "a gateway's latency and rate beside nginx, vllm-router and no proxy",
    "collection": "what collecting evidence costs a gateway",
    "instructions": "instructions of a gateway's own code, with collecting evidence and without",
    "switches": "cutover and what clients notice of switches under load",
    "chaos": "switches under load while processes are killed",
    "fold": "events folded in a second",
    "replay": "events read back through JetStream in a second, and latency of an append",
    "rules": "what rules cost for each request",
    "judging": "how often the judge is wrong, and how soon it is right",
    "scenarios": "what a bad candidate costs before it is gone, and how fast the control loop is",
    "tiers": "each way to make a version ready side by side, and what a cold load costs what serves",
    "waiting": "what a load on demand and a switch on one place cost who waits for it",
    "connections": "memory of a gateway for each 1,000 connections",
    "up": "from turnout up to the first completion",
}


def main() -> int:
    """Run them; 1 where one could not be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all where none is named")
    parser.add_argument("--quick", action="store_true", help="short trials; nothing is kept")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHES):
        parser.error(f"there is no bench {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    if options.list:
        for name, what in BENCHES.items():
            print(f"{name:13} {what}")
        return 0
    broken: list[str] = []
    for name in options.names or BENCHES:
        argv = [sys.executable, str(report.ROOT / "bench" / f"{name}.py"), *(["--quick"] if options.quick else [])]
        if subprocess.run(argv, env=report.environment(), check=False).returncode:
            broken.append(name)
    if broken:
        print(f"could not be run: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
