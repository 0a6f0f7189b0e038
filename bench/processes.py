"""Processes of a bench: started in a group of their own, pinned to a core, counted, and killed by that group."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Host:
    """What else happens on the machine while something is measured.

    ``stolen``: share of the time that the hypervisor gave to others although this machine had work to do (the steal
    column of /proc/stat), over all cores, since the object was made.
    """

    def __init__(self) -> None:
        self._stolen, self._begin = _stolen_s(), time.monotonic()

    @property
    def stolen(self) -> float:
        """Stolen processor seconds for each second since the object was made."""
        return (_stolen_s() - self._stolen) / (time.monotonic() - self._begin)


def _stolen_s() -> float:
    return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) * _TICK_S


class Died(Exception):
    """A process ended, or did not come up in time; the message holds the end of what it printed."""


def cores() -> tuple[int, int]:
    """A core for what is measured and another for load and engine; not two threads of one core where there is a choice.

    Both are the same number on a machine with one core: its figures are of no use.
    """
    usable = sorted(os.sched_getaffinity(0))
    first = usable[0]
    siblings = _siblings(first)
    others = [core for core in usable[1:] if core not in siblings] or usable[1:] or [first]
    return first, others[0]


def _siblings(core: int) -> set[int]:
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    found: set[int] = set()
    if path.exists():
        for part in path.read_text().strip().split(","):
            low, _, high = part.partition("-")
            found.update(range(int(low), int(high or low) + 1))
    return found


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def accepts(address: int | str) -> bool:
    """Whether somebody listens on the port of 127.0.0.1, or on the socket's path."""
    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    with socket.socket(family) as s:
        s.settimeout(1)
        try:
            s.connect(("127.0.0.1", address) if isinstance(address, int) else address)
        except OSError:
            return False
        return True


class Process:
    """One started process (group). Use it as a context manager."""

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        core: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        pinned = ["taskset", "-c", str(core), *argv] if core is not None else list(argv)
        self.log = log
        with log.open("wb") as out:
            self._child = subprocess.Popen(
                pinned,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
        self.pid = self._child.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for(self, ready: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Wait until ``ready``.

        Raises:
            Died: the process has ended, or the time is up.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self._child.poll() is not None:
                raise Died(f"{what}: exit code {self._child.returncode}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise Died(f"{what}: not within {timeout_s:g} s\n{self.tail()}")
            time.sleep(0.01)

    def tail(self, lines: int = 20) -> str:
        """The last lines that it printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def pids(self) -> list[int]:
        """The process and all that descend from it."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))):
                children.setdefault(int(fields[1]), []).append(int(entry.name))
        found = [self.pid]
        for pid in found:
            found.extend(children.get(pid, ()))
        return found

    def cpu_s(self) -> float:
        """Processor time so far, of the process and its live descendants, seconds."""
        return sum(cpu_s(pid) for pid in self.pids())

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM to the group, SIGKILL to whatever is left of it and of its descendants after ``grace_s``."""
        family = self.pids()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(grace_s)
        for group in {self.pid, *(g for pid in family if (g := _group(pid)) in family)}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._child.wait()


def cpu_s(pid: int) -> float:
    """Processor time of one process's running threads so far, seconds, to the nanosecond; 0 where it has ended."""
    total_ns = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def resident_bytes(pid: int) -> int:
    """Memory of one process that is in RAM and its own (without files that it only maps)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def pin(pid: int, core: int) -> None:
    """Move a running process with all its threads to one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


def argv(pid: int) -> list[str]:
    """Command line of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on (proc(5), field 3); empty where the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0
