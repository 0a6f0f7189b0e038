"""From nothing to the first answer: how long after its start ``turnout up`` answers a completion (fake engine)."""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path

import load
import report
import system
from processes import Process, free_port

_CONFIGURATION = """
[models.chat]
[models.chat.versions.v1]
engine = "fake"
"""
GOAL_S = 3.0
_TIMEOUT_S = 60.0


def run(quick: bool) -> report.Outcome:
    """Start it several times, each time in a new folder."""
    seconds = [_first_answer_s() for _ in range(2 if quick else 9)]
    middle = report.median(seconds)
    return report.Outcome(
        figures={"seconds": seconds, "median_s": middle},
        tables=[
            report.Table(
                "turnout up → first completion (embedded NATS, controller, worker, one gateway, fake engine)",
                ["starts", "median (s)", "fastest", "slowest"],
                [[str(len(seconds)), f"{middle:.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}"]],
            )
        ],
        goals=[report.Goal("turnout up → first completion", "≤ 3 s", f"{middle:.2f} s", middle <= GOAL_S)],
    )


def _first_answer_s() -> float:
    port = free_port()
    message = load.request(load.body(max_tokens=1))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "turnout.toml").write_text(_CONFIGURATION)
        begin = time.monotonic()
        argv = (*system.CLI, "up", "--port", str(port))
        with Process(argv, folder / "log", env=system.ENVIRONMENT, cwd=folder) as process:
            process.wait_for(lambda: _answers(port, message), "turnout up", _TIMEOUT_S)
            return time.monotonic() - begin


def _answers(port: int, message: bytes) -> bool:
    """Whether a completion is answered with 200 now."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S) as connection:
            connection.sendall(message)
            data = b""
            while got := connection.recv(65536):
                data += got
                if load.answered(data):
                    return True
    except (OSError, ValueError):
        pass
    return False


if __name__ == "__main__":
    raise SystemExit(report.main("up", run))
