"""Supervises processes of one machine, for ``turnout up`` and ``turnout gateway --processes``: start, watch, restart.

Each child has a process group of its own, gets SIGTERM when this process ends however it ends, says on its stdout that
it is ready, and logs to a file. Knows no NATS and prints nothing: it tells its owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    from turnout.workers.clock import Clock

log = structlog.get_logger()

#: Between the end of a child and its next start, seconds: doubled each time, from the first again once it lived long.
_BACK_OFF_S = 0.2
_BACK_OFF_S_MAX = 5.0
_SOUND_S = 10.0
#: How long a child may take to end after SIGTERM. Gateways let their requests end.
STOP_S = 40.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
#: A log file is begun anew when it is larger.
_LOG_BYTES = 16 * 1024 * 1024


class ChildFailed(Exception):
    """A child ended before it was ready; the message is its own."""

    def __init__(self, name: str, code: str, reason: str, hint: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.code, self.reason, self.hint = code, reason, hint


class Told(msgspec.Struct, frozen=True):
    """Something that the owner may show. ``level``: info, warning or error."""

    name: str
    level: str
    text: str


class Home:
    """What all children of one supervisor share: where their logs lie, the clock, and who is told of them."""

    def __init__(self, logs: Path, clock: Clock, tell: Callable[[Told], None]) -> None:
        self.logs = logs
        self.clock = clock
        self.tell = tell


class Child:
    """One supervised process.

    Attributes:
        name: e.g. ``gateway``; also of its log file.
        said: what it said of itself when it became ready.
        ready: set once it was ready for the first time.
        needed: whether nothing is up without it. Another one is started after the others, and is not waited for.
        failed: one that is not needed could not start, and is not tried again.
        on_change: called each time it is ready, and where it has failed.
        pid: of the running process, 0 where none runs.
    """

    def __init__(
        self,
        name: str,
        args: Sequence[str],
        env: Mapping[str, str],
        home: Home,
        stop_signal: signal.Signals = signal.SIGTERM,
        *,
        needed: bool = True,
    ) -> None:
        self.name = name
        self.needed = needed
        self.failed = False
        self.said: dict[str, Any] = {}
        self.ready = asyncio.Event()
        self.on_change: Callable[[], None] = self.ready.set
        self._args = (sys.executable, "-m", "turnout.workers.cli", *args, "--json")
        self._env = {**os.environ, **env}
        self._file = home.logs / f"{name}.log"
        self._clock = home.clock
        self._tell = home.tell
        self._process: asyncio.subprocess.Process | None = None
        self._failure: dict[str, str] = {}
        self._last_line = ""
        self._stop_signal = stop_signal
        self._stopping = False

    @property
    def pid(self) -> int:
        """Process id, 0 where none runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    async def run(self) -> None:
        """Keep it running until ``stop``.

        Raises:
            ChildFailed: it ended before it was ever ready, and is needed.
        """
        try:
            await self._keep_running()
        except ChildFailed as e:
            if self.needed:
                raise
            self.failed = True
            self._tell(Told(self.name, "error", f"{e.reason}; {e.hint}. Everything else runs without it"))
            self.on_change()

    async def _keep_running(self) -> None:
        pause_s = _BACK_OFF_S
        while not self._stopping:
            begun = self._clock.monotonic()
            code = await self._run_once()
            if self._stopping:
                return
            if not self.ready.is_set():
                raise ChildFailed(
                    self.name,
                    self._failure.get("code", "child_failed"),
                    self._failure.get("reason", f"{self.name} ended at its start: {self._last_line or _how(code)}"),
                    self._failure.get("hint", f"its log is {self._file}"),
                )
            pause_s = _BACK_OFF_S if self._clock.monotonic() - begun > _SOUND_S else min(pause_s * 2, _BACK_OFF_S_MAX)
            why = self._failure.get("reason", _how(code))
            self._tell(Told(self.name, "warning", f"{self.name} ended ({why}); it is started again"))
            await asyncio.sleep(pause_s)

    async def stop(self) -> None:
        """Ask it to end by its signal, and wait; kill its group where it does not."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(self._stop_signal)
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            self._tell(Told(self.name, "warning", f"{self.name} did not stop within {STOP_S:g} s: killed"))
            self.kill()
            await process.wait()

    def kill(self) -> None:
        """End its process group at once."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _run_once(self) -> int:
        self._failure, self._last_line = {}, ""
        self._process = process = await asyncio.create_subprocess_exec(
            *self._args,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._env,
            process_group=0,
            preexec_fn=_die_with_parent,  # one prctl call, nothing that could deadlock
        )
        await asyncio.gather(self._read_out(process), self._read_err(process))
        return await process.wait()

    async def _read_out(self, process: asyncio.subprocess.Process) -> None:
        """What it says of itself: that it is ready, or why it can't be."""
        async for line in _lines(process.stdout):
            with contextlib.suppress(msgspec.DecodeError):
                said: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
                if said.get("status") == "ready":
                    self.said = said
                    self.ready.set()
                    self.on_change()
                elif said.get("status") in ("error", "rejected"):
                    self._failure = {key: str(value) for key, value in said.items()}

    async def _read_err(self, process: asyncio.subprocess.Process) -> None:
        """Its log: all to the file, and what is worth a look to the owner."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if self._file.exists() and self._file.stat().st_size > _LOG_BYTES:
            self._file.replace(self._file.with_suffix(".log.1"))
        with self._file.open("ab") as file:
            async for line in _lines(process.stderr):
                file.write(line)
                file.flush()
                try:
                    entry: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
                except msgspec.DecodeError:  # not one of our lines, e.g. of a traceback
                    self._last_line = line.decode(errors="replace").strip() or self._last_line
                    continue
                if entry.get("level") in ("error", "critical"):
                    self._tell(Told(self.name, str(entry["level"]), _entry_text(entry)))


class Supervisor:
    """Several children at once. ``stop_order``: names (or their beginnings) in the order in which they are stopped."""

    def __init__(self, children: Sequence[Child], stop_order: Sequence[str] = ()) -> None:
        self.children = tuple(children)
        #: Set whenever a child has become ready, also again, and where one that is not needed has failed.
        self.changed = asyncio.Event()
        for child in self.children:
            child.on_change = self.changed.set
        self._stop_order = tuple(stop_order)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start all that are needed, return when they are ready; the others are started then.

        Raises:
            ChildFailed: one ended before it was ready; the others may be running.
        """
        self._tasks = [asyncio.create_task(child.run()) for child in self.children if child.needed]
        waiting = asyncio.create_task(self._all_ready())
        try:
            watched: list[asyncio.Future[Any]] = [waiting, *self._tasks]
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks:
                if task.done():
                    task.result()
            await waiting
            self._tasks += [asyncio.create_task(child.run()) for child in self.children if not child.needed]
        finally:
            waiting.cancel()

    async def _all_ready(self) -> None:
        for child in self.children:
            if child.needed:
                await child.ready.wait()

    async def stop(self) -> None:
        """Stop all, group by group."""
        left = list(self.children)
        for beginning in (*self._stop_order, ""):
            group = [child for child in left if child.name.startswith(beginning)]
            left = [child for child in left if child not in group]
            await asyncio.gather(*(child.stop() for child in group))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def kill(self) -> None:
        """End all at once."""
        for child in self.children:
            child.kill()


class PortTaken(Exception):
    """Somebody else listens on the port."""


def reserve(host: str, port: int) -> socket.socket:
    """Hold a port for children that share it: bound, never listening. Port 0 takes a free one.

    Raises:
        PortTaken: the port or address can't be used; the message says what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as alone:  # would fail where another group shares the port
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((host, port))
        held = socket.socket(family, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
    except (OSError, OverflowError) as e:
        raise PortTaken(f"port {port} on {host} can't be used: {getattr(e, 'strerror', None) or e}") from e
    return held


async def _lines(stream: asyncio.StreamReader | None) -> AsyncIterator[bytes]:
    """Lines of a pipe, however long; one that does not end is cut."""
    if stream is None:
        return
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as e:
            if e.partial:
                yield e.partial + b"\n"
            return
        except asyncio.LimitOverrunError as e:
            line = await stream.read(e.consumed or 1)
        yield line


def _entry_text(entry: dict[str, Any]) -> str:
    """A log line as words: ``engine_failed  instance=i2 reason=…``."""
    hidden = ("level", "timestamp", "event", "process", "exception")
    rest = " ".join(f"{key}={value}" for key, value in entry.items() if key not in hidden)
    last = str(entry.get("exception", "")).strip().rpartition("\n")[2]
    return "  ".join(part for part in (str(entry.get("event", "")), rest, last) if part)


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _die_with_parent() -> None:
    """In the child: SIGTERM when the parent ends, however it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
