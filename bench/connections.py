"""What open connections cost one gateway process in memory: idle ones, and ones with a running stream.

The figure is resident memory of the process's own (RssAnon) for each 1 000 connections, from the second batch on: the
first warms what stays allocated anyway. An idle connection has had one request answered, as a client's pool keeps it.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import load
import processes
import report
import system

from turnout.workers.client import connect

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

UPSTREAM = str(report.ROOT / "bench" / "upstream.py")
_CONFIGURATION = """
[worker.policy]
commands = ["{python} {upstream}"]
[models.chat]
[models.chat.versions.v1]
engine = "openai"
command = {command}
"""
#: Between two chunks of a stream: streams are open at the same time, the load stays small.
PAUSE_US = 2_000_000


def run(quick: bool) -> report.Outcome:
    """Open batches and look at the gateway's memory after each."""
    batch, batches = (200, 3) if quick else (1_000, 4)
    system.many_files()
    configuration = _CONFIGURATION.format(
        python=sys.executable,
        upstream=UPSTREAM,
        command=system.command(sys.executable, UPSTREAM, "--socket", "{socket}"),
    )
    found: dict[str, list[int]] = {}
    for kind, open_one in (("idle", _idle), ("streaming", _streaming)):
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as name,
            system.Turnout(Path(name) / "turnout", configuration) as turnout,
        ):
            asyncio.run(_served(turnout.nats))
            found[kind] = _sizes(turnout, batch, batches, open_one)
    mib = {kind: (sizes[-1] - sizes[1]) / (len(sizes) - 2) / batch * 1000 / 2**20 for kind, sizes in found.items()}
    return report.Outcome(
        figures={"batch": batch, "bytes_after_each_batch": found, "mib_per_1000": mib},
        tables=[
            report.Table(
                "Memory of one gateway process",
                ["connections", "MiB for each 1,000", "MiB before any", f"MiB with {batch * batches:,}"],
                [
                    [kind, f"{mib[kind]:.1f}", f"{sizes[0] / 2**20:.1f}", f"{sizes[-1] / 2**20:.1f}"]
                    for kind, sizes in found.items()
                ],
                ["Resident anonymous memory; a streaming connection has its own connection to the engine."],
            )
        ],
    )


async def _served(nats: str) -> None:
    async with connect(nats, actor="bench") as client:
        while not (await client.model("chat")).active:  # noqa: ASYNC110  a view, looked at now and then
            await asyncio.sleep(0.05)


def _sizes(turnout: system.Turnout, batch: int, batches: int, open_one: Callable[[int], socket.socket]) -> list[int]:
    """The gateway's memory before the first batch and after each."""
    gateway = turnout.gateway_pid()
    sizes = [processes.resident_bytes(gateway)]
    held: list[socket.socket] = []
    for _ in range(batches):
        held += [open_one(turnout.port) for _ in range(batch)]
        time.sleep(PAUSE_US / 1e6 + 0.5)  # every stream gets a chunk
        sizes.append(processes.resident_bytes(gateway))
    for one in held:
        one.close()
    return sizes


def _idle(port: int) -> socket.socket:
    connection = load.connect(port)
    connection.sendall(load.request(load.body()))
    data = b""
    while not load.answered(data):
        data += _received(connection)
    return connection


def _streaming(port: int) -> socket.socket:
    connection = load.connect(port)
    connection.sendall(load.request(load.body(chunks=1_000, pause_us=PAUSE_US)))
    data = b""
    while b"data: " not in data:
        data += _received(connection)
    if not data.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(data[:200].decode(errors="replace"))
    return connection


def _received(connection: socket.socket) -> bytes:
    got = connection.recv(65536)
    if not got:
        raise ConnectionError("the gateway closed the connection")
    return got


if __name__ == "__main__":
    raise SystemExit(report.main("connections", run))
