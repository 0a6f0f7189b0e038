"""Proof that nobody uses an engine: no open connection to its socket, read from the kernel's tables (Linux).

An engine is stopped only after such a proof (or by force), because a gateway that is cut off from the control plane may
still be using it. The kernel's tables name every connection, whoever made it and whatever the engine says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from turnout.workers.inference import client

if TYPE_CHECKING:
    from collections.abc import Iterable

# States in /proc/net/unix: 2 connecting (waits to be accepted), 3 connected. A client's end carries no path, so what
# carries the listener's path and one of these states is one connection.
_UNIX_OPEN = frozenset(("02", "03"))
# States in /proc/net/tcp: established, SYN received, close wait (the client has sent all, and may still be reading).
_TCP_OPEN = frozenset(("01", "03", "08"))


def unix_connections(table: Iterable[str], path: str) -> int:
    """Connections to the listener at ``path``, from the lines of ``/proc/net/unix``."""
    count = 0
    for line in table:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7].rstrip("\n") == path and fields[5] in _UNIX_OPEN:
            count += 1
    return count


def tcp_connections(table: Iterable[str], port: int) -> int:
    """Connections to a local port, from the lines of ``/proc/net/tcp`` or ``tcp6``."""
    ending = f":{port:04X}"
    count = 0
    for line in table:
        fields = line.split(maxsplit=4)
        if len(fields) > 3 and fields[1].endswith(ending) and fields[3] in _TCP_OPEN:
            count += 1
    return count


def connections(address: str) -> int:
    """Open connections to an engine of this host, by its address as gateways write it."""
    to = client.target(address)
    if to.socket:
        return unix_connections(_table("unix"), to.socket)
    return tcp_connections(_table("tcp"), to.port) + tcp_connections(_table("tcp6"), to.port)


def _table(name: str) -> list[str]:
    path = Path("/proc/net") / name
    try:
        return path.read_text("utf-8", "replace").splitlines()[1:]
    except FileNotFoundError:  # no IPv6 in this kernel
        return []


REQUESTS = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_ADAPTERS = re.compile(r'(?:running|waiting)_lora_adapters="([^"]*)"')
TOKENS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


def total(metrics: str, names: tuple[str, ...]) -> float:
    """Sum of the named series, from the text of ``/metrics``.

    Raises:
        ValueError: a value is not a number.
    """
    found = 0.0
    for line in metrics.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in names:
            found += float(line.rpartition("}")[2].split()[-1])
    return found


async def running(address: str, timeout_s: float) -> float | None:
    """Requests that the engine itself counts as running or waiting; None where it does not answer."""
    return await _ask(address, REQUESTS, timeout_s)


async def adapters(address: str, timeout_s: float) -> frozenset[str]:
    """Names of the adapters that the engine runs or holds requests for; none where it does not answer."""
    try:
        reply = await client.ask(address, "/metrics", timeout_s=timeout_s)
        text = reply.body.decode("utf-8", "replace")
        if reply.status != 200 or not total(text, REQUESTS):
            return frozenset()
    except (client.Unreachable, ValueError):
        return frozenset()
    # One series for each set of names there ever was; its value is the time of its newest sight.
    seen = [line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{")]
    newest = max(seen, key=lambda line: float(line.rpartition("}")[2].split()[0]), default="")
    said = _ADAPTERS.findall(newest)
    return frozenset(name for names in said for name in names.split(",") if name)


async def tokens(address: str, timeout_s: float) -> float:
    """Tokens that the engine has read and written; 0 where it does not answer."""
    return await _ask(address, TOKENS, timeout_s) or 0.0


async def _ask(address: str, names: tuple[str, ...], timeout_s: float) -> float | None:
    try:
        reply = await client.ask(address, "/metrics", timeout_s=timeout_s)
        return total(reply.body.decode("utf-8", "replace"), names) if reply.status == 200 else None
    except (client.Unreachable, ValueError):
        return None
