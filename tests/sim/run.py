"""Run the simulation over many seeds: ``make sim SEEDS=1000``. Exit code 1 where an invariant broke."""
# ruff: noqa: T201  what a person at a terminal reads

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from pathlib import Path

import structlog

if __package__ in (None, ""):
    root = str(Path(__file__).resolve().parents[2])
    sys.path[:0] = [root, f"{root}/src"]

from tests.sim.simulation import run_seed


def silence() -> None:
    """The simulated processes' logs would drown everything else."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[_drop])


def _drop(*_: object) -> structlog.typing.EventDict:
    raise structlog.DropEvent


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many runs")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--trace", action="store_true", help="print everything that happens, where a run fails")
    parser.add_argument("--most", type=int, default=10, help="stop after so many failures")
    args = parser.parse_args()
    silence()
    gc.set_threshold(200_000, 20, 50)  # a run makes many objects and soon drops them all
    seeds = range(args.start, args.start + args.seeds) if args.seed is None else range(args.seed, args.seed + 1)
    failed: list[int] = []
    n = 0
    totals: dict[str, int] = {}
    began = time.perf_counter()  # noqa: TID251  how long the whole takes, for the person who waits
    for n, seed in enumerate(seeds, 1):
        try:
            summary = run_seed(seed, trace=args.trace).summary(seed)
        except Exception as e:  # noqa: BLE001  whatever it is, it is a finding with a seed
            failed.append(seed)
            if args.trace:
                for line in getattr(e, "simulation").net.traces:  # noqa: B009  run_seed notes it there
                    print(*line)
            traceback.print_exception(e)
            if len(failed) >= args.most:
                break
            continue
        for name, count in (*summary.counts.items(), *summary.outcomes.items(), ("events", summary.events)):
            totals[name] = totals.get(name, 0) + count
        if n % 100 == 0:
            print(f"{n} runs, {len(failed)} failed", flush=True)
    seconds = time.perf_counter() - began  # noqa: TID251
    print(f"{n} runs, {len(failed)} failed {failed or ''} in {seconds:.1f} s ({n / seconds:.1f} runs/s)")
    print(", ".join(f"{name} {count}" for name, count in totals.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
