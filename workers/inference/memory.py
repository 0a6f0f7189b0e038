"""Memory of the host, of its accelerators and of engines: measured here, decided elsewhere.

Knows no event and no command.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from turnout.events.units import size
from turnout.workers.inference import process
from turnout.workers.inference.runner import HostMemory, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = structlog.get_logger()

#: A load may exceed its estimate by this share and by this much before it is stopped.
OVER_SHARE = 0.25
OVER_BYTES = 128 << 20
#: Below this share of the host's memory, at most this much, a load is stopped whatever its estimate was.
FLOOR_SHARE = 0.03
FLOOR_BYTES = 1 << 30

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(?:%|([kmgt]?)(?:i?b)?)", re.IGNORECASE)


def amount(text: str, whole: int) -> int | None:
    """``80%`` of the whole, or a size such as ``16GiB``, in bytes; None where the text is neither."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        return None
    number = float(found[1])
    if text.strip().endswith("%"):
        return int(whole * number / 100) if 0 < number <= 100 else None
    return int(number * _UNITS[(found[2] or "").lower()]) or None


class MemoryManager:
    """What engines may use of this host, what they do use, and whether a load must be stopped.

    Args:
        memory: share or size of the host's memory that engines may use.
        devices: accelerators by name, e.g. ``cuda:0``; names without an accelerator behind them have no memory.
        device_memory: share or size of each accelerator's memory that engines may use.
    """

    def __init__(self, memory: str, devices: Sequence[str], device_memory: str) -> None:
        self.host_bytes = host_bytes()
        self._accelerators = accelerators() if any(name.startswith("cuda") for name in devices) else None
        sizes = {} if self._accelerators is None else self._accelerators.sizes()
        self.offer = HostMemory(
            amount(memory, self.host_bytes) or 0,
            {name: amount(device_memory, sizes[name]) or 0 for name in devices if name in sizes},
        )

    def usage(self, leader: int) -> Usage:
        """What an engine's process group holds now. Reads /proc: call it in a thread where the loop must not wait.

        Its device bytes are 0 where the driver can't tell, as in a container that does not see the host's processes.
        """
        held = 0
        if self.offer.device_bytes and self._accelerators is not None:
            pids = {member.pid for member in process.members(leader)}
            try:
                held = sum(used for pid, used in self._accelerators.used().items() if pid in pids)
            except DriverSilent as e:
                log.warning("device_memory_unknown", reason=str(e))
        return Usage(process.memory_bytes(leader), held)

    def objection(self, leader: int, estimate: int, beside: int) -> str:
        """Why the load of an engine must be stopped before it starves the others; empty where it may go on.

        Estimates can be wrong: a load that outgrows its own goes on as long as all engines stay within their bound.

        Args:
            leader: of its process group.
            estimate: host bytes that it was admitted with; 0 where nothing was known.
            beside: host bytes that the other engines hold.
        """
        used = process.memory_bytes(leader)
        limit = estimate + max(int(estimate * OVER_SHARE), OVER_BYTES)
        bound = self.offer.memory_bytes
        if estimate and used > limit and bound and used + beside > bound:
            return (
                f"it holds {size(used)} of memory and was admitted with {size(estimate)}, and all engines together hold"
                f" {size(used + beside)} of {size(bound)}: stopped before it takes what the others need"
                " [memory_over_estimate]"
            )
        floor, free = min(int(self.host_bytes * FLOOR_SHARE), FLOOR_BYTES), available_bytes()
        if free < floor and used > OVER_BYTES:
            return (
                f"the host has {size(free)} of memory left (floor {size(floor)}), and this load holds {size(used)}:"
                " stopped before the serving engines are killed [memory_floor]"
            )
        return ""


def host_bytes() -> int:
    """Memory of this host, or of the control group that this process is confined to."""
    total = _meminfo("MemTotal")
    limits = [
        int(text)
        for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
        if (text := _read(file).strip()).isdecimal()
    ]
    return min([total, *limits])


def available_bytes() -> int:
    """Memory that a process could still get without swapping, as the kernel and the control group estimate it."""
    free = _meminfo("MemAvailable")
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdecimal() and used.isdecimal():
        cached = re.search(r"^inactive_file (\d+)", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
        free = min(free, int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return free


class Accelerators(Protocol):
    """What a driver tells of the accelerators of this host."""

    def sizes(self) -> dict[str, int]:
        """``cuda:<index>`` → its memory in bytes."""
        ...

    def used(self) -> dict[int, int]:
        """Process → bytes that it holds on all of them together."""
        ...


class Nvml:
    """NVIDIA accelerators by the driver's library (package ``nvidia-ml-py``).

    Raises:
        ImportError: the package is not there.
        DriverSilent: the driver does not answer.
    """

    def __init__(self) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._ask(self._nvml.nvmlInit)

    def sizes(self) -> dict[str, int]:
        """See the protocol."""
        nvml = self._nvml
        return {f"cuda:{n}": int(self._ask(nvml.nvmlDeviceGetMemoryInfo, one).total) for n, one in self._handles()}

    def used(self) -> dict[int, int]:
        """See the protocol. A process of which the driver can't tell the memory is left out."""
        held: dict[int, int] = {}
        for _, one in self._handles():
            for running in self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, one):
                if running.usedGpuMemory is not None:
                    held[int(running.pid)] = held.get(int(running.pid), 0) + int(running.usedGpuMemory)
        return held

    def _handles(self) -> list[tuple[int, Any]]:
        nvml = self._nvml
        count = int(self._ask(nvml.nvmlDeviceGetCount))
        return [(number, self._ask(nvml.nvmlDeviceGetHandleByIndex, number)) for number in range(count)]

    def _ask(self, question: Callable[..., Any], *about: object) -> Any:
        try:
            return question(*about)
        except self._nvml.NVMLError as e:
            raise DriverSilent(f"NVML: {e}") from e


class DriverTool:
    """The same by the driver's own tool, for where the library's package is not installed."""

    def sizes(self) -> dict[str, int]:
        """See the protocol."""
        return {f"cuda:{index}": mib << 20 for index, mib in self._ask("--query-gpu=index,memory.total")}

    def used(self) -> dict[int, int]:
        """See the protocol."""
        held: dict[int, int] = {}
        for pid, mib in self._ask("--query-compute-apps=pid,used_memory"):
            held[pid] = held.get(pid, 0) + (mib << 20)
        return held

    @staticmethod
    def _ask(question: str) -> list[tuple[int, int]]:
        tool = shutil.which("nvidia-smi")
        if tool is None:
            raise DriverSilent("there is no nvidia-smi")
        try:
            answer = subprocess.run(  # noqa: S603  no word of it comes from outside
                [tool, question, "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=10.0,
                check=True,
            ).stdout
        except (OSError, subprocess.SubprocessError) as e:
            raise DriverSilent(f"nvidia-smi: {e}") from e
        pairs = [[word.strip() for word in line.split(",")] for line in answer.splitlines()]
        return [(int(p[0]), int(p[1])) for p in pairs if len(p) == 2 and p[0].isdecimal() and p[1].isdecimal()]


class DriverSilent(Exception):
    """The driver of the accelerators does not answer."""


def accelerators() -> Accelerators | None:
    """Who tells of this host's accelerators; None where there are none, or nobody can tell."""
    for way in (Nvml, DriverTool):
        try:
            found = way()
            if found.sizes():
                return found
        except (ImportError, DriverSilent) as e:
            log.info("accelerators_unknown", by=way.__name__, reason=str(e))
    return None


def _meminfo(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
