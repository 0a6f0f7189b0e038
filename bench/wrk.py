"""The load generator wrk (https://github.com/wg/wrk): cheaper than any in Python, so that the load is not the limit."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import load
import msgspec

if TYPE_CHECKING:
    from pathlib import Path

_SCRIPT = """
wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.body = [==[{body}]==]
{headers}
function done(summary, latency, requests)
    local e = summary.errors
    io.write(string.format('\\n{{"requests":%d,"seconds":%f,"failed":%d,"p50_s":%f,"p99_s":%f}}\\n', summary.requests,
        summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout,
        latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
"""


class Flow(msgspec.Struct):
    """What one run has seen."""

    requests: int
    seconds: float
    failed: int
    p50_s: float
    p99_s: float


def installed() -> bool:
    """Whether there is a wrk."""
    return shutil.which("wrk") is not None


def write_script(path: Path, content: bytes) -> None:
    """The script that sends this body with the headers of an OpenAI client."""
    headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in load.HEADERS.items())
    path.write_text(_SCRIPT.format(body=content.decode(), headers=headers))


def run(port: int, script: Path, connections: int, seconds: int, core: int) -> Flow:
    """Closed loops on so many connections, one thread."""
    argv = ["taskset", "-c", str(core), "wrk", "-t1", f"-c{connections}", f"-d{seconds}", "-s", str(script)]
    argv.append(f"http://127.0.0.1:{port}")
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return msgspec.json.decode(said.splitlines()[-1], type=Flow)
