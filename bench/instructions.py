"""Instructions of a gateway's own code for a request and for a streamed chunk, with health collection and without it.

valgrind counts them, so the figures are the same on a busy machine. Event loop and kernel are not in them (see
bench/dry.py); each is the difference of a long and a short run, so that starting Python is not in them either.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import report

#: Requests or chunks of the short run and of the long one.
SHORT, LONG = 6_400, 19_200
_ROUTES = {"one version serves": (), "two versions are compared": ("--compared",)}
_COUNTED = re.compile(r"Collected : (\d+)")


def run(quick: bool) -> report.Outcome:
    """Count on both routes; ``quick`` counts one."""
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed (Debian: apt-get install valgrind)")
    subprocess.run(_argv("--requests", 1), check=True, env=report.environment())  # compiles what is not compiled yet
    found: dict[str, tuple[int, int]] = {}
    for route, flags in _ROUTES.items():
        if not (quick and flags):
            found[route] = _of("--requests", *flags), _of("--requests", *flags, "--uncounted")
    chunk = _of("--chunks")
    rows = [
        [f"a request, {route}", f"{on:,}", f"{off:,}", f"{on - off:,}", f"{100 * (on - off) / off:.1f} %"]
        for route, (on, off) in found.items()
    ]
    rows.append(["a chunk of a stream", f"{chunk:,}", "", "", ""])
    return report.Outcome(
        figures={
            "request_instructions": {r: {"with": on, "without": off} for r, (on, off) in found.items()},
            "chunk_instructions": chunk,
        },
        tables=[
            report.Table(
                "Instructions of the gateway's own code",
                ["for", "with collection", "without", "collection", "of it"],
                rows,
                [f"valgrind --tool=callgrind: the difference of {LONG:,} and {SHORT:,} of them."],
            )
        ],
    )


def _of(what: str, *flags: str) -> int:
    """Instructions for one more of it."""
    return round((_collected(what, LONG, *flags) - _collected(what, SHORT, *flags)) / (LONG - SHORT))


def _argv(what: str, count: int, *flags: str) -> list[str]:
    return [sys.executable, str(report.ROOT / "bench" / "dry.py"), what, str(count), *flags]


def _collected(what: str, count: int, *flags: str) -> int:
    argv = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *_argv(what, count, *flags)]
    environment = {**report.environment(), "PYTHONHASHSEED": "0"}
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    counted = _COUNTED.search(done.stderr)
    if counted is None:
        raise RuntimeError(f"valgrind has not said what it counted: {done.stderr[-500:]}")
    return int(counted[1])


if __name__ == "__main__":
    raise SystemExit(report.main("instructions", run))
