"""Loading without harm: a starting engine gets what the others leave, until it is proven. Linux; knows no engine.

An engine leads a session of its own, so that what is set for its session is its own. Only what can be taken back is
done: a process without the right to raise its priority again keeps the usual one, and reads its files last.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
from pathlib import Path

from turnout.workers.inference import process

#: Of a load that somebody waits for, and of one that nobody waits for yet.
LOADING, AHEAD = 5, 19
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS = 1
_IO_USUAL, _IO_IDLE = 0, 3 << 13  # class in the upper bits, see ioprio_set(2)


def lower(leader: int, nice: int) -> None:
    """Take a starting engine behind the others; the processes that it starts inherit it."""
    _set(leader, nice if _may_raise() else 0, _IO_IDLE)


def restore(leader: int) -> None:
    """Give all its processes and threads the usual priority."""
    _set(leader, 0, _IO_USUAL)


def _may_raise() -> bool:
    """Whether this process may give a lower nice value back (setpriority(2): root, or RLIMIT_NICE of 20 and more)."""
    return os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20


def _set(leader: int, nice: int, io: int) -> None:
    if os.geteuid() == 0:  # others may write it once in 0.1 s only, and might not get it back
        # Where the kernel groups processes by session (sched(7), autogroup), nice counts inside a session alone.
        with contextlib.suppress(OSError):
            (Path("/proc") / str(leader) / "autogroup").write_text(str(nice))
    for member in process.members(leader):
        try:
            threads = [int(name) for name in os.listdir(Path("/proc") / str(member.pid) / "task")]
        except OSError:
            continue
        for thread in threads:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.getpriority(os.PRIO_PROCESS, thread) != nice:
                    os.setpriority(os.PRIO_PROCESS, thread, nice)
            _set_io(thread, io)


def _set_io(thread: int, io: int) -> None:
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None, use_errno=True).syscall(number, _IOPRIO_WHO_PROCESS, thread, io)
