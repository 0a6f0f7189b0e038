"""One engine as processes of this host: start, log, exit, end, and taking over one that an earlier worker started.

Every engine is the leader of its own session and process group, so that all its children end with it. What is needed to
find it again stands in a file. Knows no engine kind and no control plane.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from turnout.events import subjects
from turnout.workers.inference.engines.base import Launch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turnout.workers.clock import Clock

#: Longest path that fits sockaddr_un, its final NUL left out (unix(7)).
SUN_PATH_BYTES = 107
#: Added to the name of a socket that nobody shall connect to any more.
SHUT = ".shut"
LOG_LINES = 200
_TAIL_BYTES = 1 << 18
LOG_LIMIT_BYTES = 64 << 20
_TICK_S = 0.02
_GONE_S = 30.0
#: Names the instance in the environment of its processes, so that one is found even where its file was never written.
MARK = "TURNOUT_INSTANCE"
_SECRET_PREFIXES = ("TURNOUT_", "NATS_")


class Record(msgspec.Struct, frozen=True):
    """What is kept of a running engine.

    Attributes:
        instance: its id.
        pid: leader of its session and process group.
        started: start time of that process in clock ticks since boot; with the boot id it tells a reused pid.
        boot: the kernel's boot id.
        launch: how it is asked and proven.
        sequence: how far the log had come when it was asked for.
        proven: it has passed its proof.
        load_s: seconds to the first healthy answer.
        probe_s: seconds of the proof.
        bytes: memory of the group after the proof.
        fingerprint: what it called itself.
        bound: the address that its socket was bound to, where that is another one than it is reached at.
        shape: what it keeps when other weights are put into it; empty where none may be.
        source: model and version that it holds.
        role: ``spare`` where it waits for weights, ``filling`` while they come and while it falls asleep or wakes,
            ``asleep``, ``base`` of adapters, ``adapter`` in another one's engine, else empty.
        base: of an adapter: name of the engine that it shares.
        tier: how it was made ready.
        level: of its sleep, while it sleeps; ``slept``: how often it was asked to.
        fit: what versions that may use it have in common, as the control plane foretells it (``core.fit``).
        device: the accelerator that it runs on.
    """

    instance: str
    pid: int
    started: int
    boot: str
    launch: Launch
    sequence: int = 0
    proven: bool = False
    load_s: float = 0.0
    probe_s: float = 0.0
    bytes: int = 0
    fingerprint: str = ""
    bound: str = ""
    shape: str = ""
    source: str = ""
    role: str = ""
    tier: str = "cold"
    base: str = ""
    level: int = 0
    slept: int = 0
    fit: str = ""
    device: str = ""


class Member(msgspec.Struct, frozen=True, gc=False):
    """One process, as ``/proc/<pid>/stat`` tells it. ``ticks``: user and system time used, in clock ticks."""

    pid: int
    state: str
    group: int
    session: int
    ticks: int
    started: int


def boot_id() -> str:
    """Changes with every start of the kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def look(pid: int) -> Member | None:
    """One process; None where it is gone. Fields as numbered in proc(5)."""
    try:
        text = (Path("/proc") / str(pid) / "stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold blanks and brackets
    return Member(pid, fields[0], int(fields[2]), int(fields[3]), int(fields[11]) + int(fields[12]), int(fields[19]))


def processes() -> Iterator[Member]:
    """All processes that this one may see."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            found = look(int(entry))
            if found is not None:
                yield found


def members(leader: int) -> tuple[Member, ...]:
    """Living processes of a leader's group or session."""
    return tuple(m for m in processes() if leader in (m.group, m.session) and m.state not in "ZX")


def memory_bytes(leader: int) -> int:
    """Resident memory of the group; pages that several of its processes share count once (PSS)."""
    total = 0
    for member in members(leader):
        folder = Path("/proc") / str(member.pid)
        try:
            rollup = (folder / "smaps_rollup").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total


def cpu_s(leader: int) -> float:
    """Seconds of processor time that the group's living processes have used."""
    return sum(m.ticks for m in members(leader)) / os.sysconf("SC_CLK_TCK")


def kill_session(leader: int, started: int | None) -> None:
    """SIGKILL every process of a leader's group or session.

    Args:
        leader: its pid.
        started: start time of the leader, as it was; None where it is known to be gone (its number can't have been
            given to another process as long as one of the group lives).
    """
    me = look(leader)
    if me is not None and me.started != started:
        return
    for member in members(leader):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(member.pid, signal.SIGKILL)


async def wait_gone(leader: int, clock: Clock) -> None:
    """Until a killed group has left; at most half a minute, as what hangs in the kernel can't be killed."""
    deadline = clock.monotonic() + _GONE_S
    while members(leader) and clock.monotonic() < deadline:  # noqa: ASYNC110  /proc tells no event
        await asyncio.sleep(_TICK_S)


class RunFolder:
    """Where a worker keeps its engines' files: ``<instance>.json``, ``<instance>.log`` and their sockets.

    Only the worker's user may enter it: an engine's operation endpoints know no key, the socket's folder is the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        _make_private(self.path)
        self.sockets = self.path
        if len(os.fsencode(self.path)) > SUN_PATH_BYTES - 32:
            name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]
            self.sockets = Path(tempfile.gettempdir()) / f"turnout-{os.getuid()}-{name}"
            _make_private(self.sockets)

    def socket(self, instance: str, start: str) -> str:
        """Path of the socket of one start of the instance, short enough for the kernel.

        ``start`` is new each time (6 characters): a late word of a dead worker about an earlier start names another
        address, and is not taken for the engine that loads now (invariant 9).
        """
        return str(self.sockets / f"{self._socket_name(instance)}.{start}.sock")

    def _socket_name(self, instance: str) -> str:
        name = subjects.token(instance)
        return name if len(name) <= 16 else hashlib.sha256(name.encode()).hexdigest()[:16]

    def log(self, instance: str) -> Path:
        """The file that takes the engine's output."""
        return self.path / f"{subjects.token(instance)}.log"

    def golden(self, model: str, version: str) -> Path:
        """The file that keeps a version's golden answers."""
        return self.path / "golden" / f"{subjects.token(model)}.{subjects.token(version)}.json"

    def hand_over(self, old: str, record: Record) -> None:
        """The engine of ``old`` is another instance's from now on: its log and its socket go with it."""
        with contextlib.suppress(FileNotFoundError):
            self.log(old).rename(self.log(record.instance))
        self.write(record)
        self._state(old).unlink(missing_ok=True)

    def _state(self, instance: str) -> Path:
        return self.path / f"{subjects.token(instance)}.json"

    def write(self, record: Record) -> None:
        """Keep it; the file is whole or not there."""
        target = self._state(record.instance)
        fresh = target.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(record))
        fresh.replace(target)

    def forget(self, instance: str) -> None:
        """The engine is gone: its log stays until the next worker starts, for whoever looks for the cause."""
        self._state(instance).unlink(missing_ok=True)
        for path in self.sockets.glob(f"{self._socket_name(instance)}.??????.sock*"):
            path.unlink(missing_ok=True)

    def records(self) -> tuple[Record, ...]:
        """What an earlier worker has left. A damaged file is not a record; its engine is found by its mark."""
        found: list[Record] = []
        for path in sorted(self.path.glob("*.json")):
            with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
                found.append(msgspec.json.decode(path.read_bytes(), type=Record))
        return tuple(found)

    @property
    def mark(self) -> str:
        """What the mark of this folder's engines begins with."""
        return f"{self.path}|"

    def unrecorded(self) -> Iterator[tuple[str, Member]]:
        """Instances whose leader carries this folder's mark: the worker may have died before it wrote the file."""
        needle = f"{MARK}={self.mark}".encode()
        for member in processes():
            if member.session != member.pid or member.state in "ZX":
                continue
            try:
                environment = (Path("/proc") / str(member.pid) / "environ").read_bytes()
            except OSError:
                continue
            for variable in environment.split(b"\0"):
                if variable.startswith(needle):
                    yield variable[len(needle) :].decode(), member

    def sweep_logs(self, keep: set[str]) -> None:
        """Remove logs of engines that are gone."""
        names = {self.log(instance).name for instance in keep}
        for path in self.path.glob("*.log"):
            if path.name not in names:
                path.unlink(missing_ok=True)


def _make_private(path: Path) -> None:
    """Make the folder with mode 0700, and refuse one that belongs to somebody else.

    Raises:
        PermissionError: another user owns it, or it is a link.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user or is a link: choose another run folder")
    if stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(0o700)


def free_port(host: str) -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.bind((host, 0))
        return int(s.getsockname()[1])


class Log:
    """The file that takes an engine's output, read from its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def new_lines(self) -> list[str]:
        """Whole lines since the last call. A progress bar's carriage returns end lines as well."""
        try:
            with self.path.open("rb") as f:
                f.seek(0, os.SEEK_END)
                if f.tell() < self._read:
                    self._read = 0  # cut by `limit`
                f.seek(self._read)
                data = f.read(_TAIL_BYTES)
        except FileNotFoundError:
            return []
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        self._read += end
        return data[:end].decode("utf-8", "replace").splitlines()

    def tail(self) -> list[str]:
        """Lines at the end, at most 256 KiB of them: the cause of a failure may stand far above its last line."""
        try:
            with self.path.open("rb") as f:
                size = f.seek(0, os.SEEK_END)
                f.seek(max(0, size - _TAIL_BYTES))
                data = f.read()
        except FileNotFoundError:
            return []
        return [line for line in data.decode("utf-8", "replace").splitlines() if line.strip()]

    def limit(self) -> None:
        """Cut a log that has grown too large. The engine appends, so it goes on at the new beginning."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_size > LOG_LIMIT_BYTES:
                os.truncate(self.path, 0)


class EngineProcess:
    """A running engine: its record, its log, and its end."""

    def __init__(self, record: Record, log: Log, child: subprocess.Popen[bytes] | None) -> None:
        self.record = record
        self.log = log
        self._child = child
        self._pidfd = os.pidfd_open(record.pid)
        self._exited = asyncio.Event()
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._on_exit)

    @staticmethod
    def start(instance: str, launch: Launch, folder: RunFolder, sequence: int = 0) -> EngineProcess:
        """Start the engine in a session of its own, its output to the log file.

        Raises:
            OSError: the executable can't be run.
        """
        env = {k: v for k, v in os.environ.items() if not k.startswith(_SECRET_PREFIXES)}
        env = {**launch.env_default, **env, **launch.env, "PYTHONUNBUFFERED": "1", MARK: folder.mark + instance}
        log = folder.log(instance)
        with log.open("ab", buffering=0) as out:
            log.chmod(0o600)
            os.truncate(log, 0)
            child = subprocess.Popen(  # noqa: S603  policy.py has admitted it
                launch.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )
        me = look(child.pid)
        record = Record(instance, child.pid, me.started if me else 0, boot_id(), launch, sequence)
        folder.write(record)
        return EngineProcess(record, Log(log), child)

    @staticmethod
    def adopt(record: Record, folder: RunFolder) -> EngineProcess | None:
        """Take over an engine that an earlier worker started; None where it is not running any more."""
        me = look(record.pid)
        if me is None or me.state in "ZX" or me.started != record.started or record.boot != boot_id():
            return None
        try:
            return EngineProcess(record, Log(folder.log(record.instance)), None)
        except ProcessLookupError:
            return None

    def hand_over(self, record: Record, folder: RunFolder) -> None:
        """It belongs to another instance from now on."""
        old = self.record.instance
        self.record = record
        folder.hand_over(old, record)
        self.log.path = folder.log(record.instance)

    @property
    def pid(self) -> int:
        """Leader of the group."""
        return self.record.pid

    @property
    def exited(self) -> bool:
        """The leader is gone."""
        return self._exited.is_set()

    async def wait(self) -> None:
        """Until the leader is gone."""
        await self._exited.wait()

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._exited.set()

    def signal(self, number: int) -> None:
        """Send a signal to every process of the group and the session.

        The leader's pid can't have been given to others: it is our unreaped child, or its start time is compared.
        """
        me = look(self.pid)
        if me is not None and me.started != self.record.started:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
        for member in members(self.pid):
            if member.group != self.pid:  # has left the group, not the session
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, number)

    async def end(self, grace_s: float, clock: Clock) -> int | None:
        """Stop the engine: SIGTERM, up to ``grace_s`` seconds, SIGKILL to the group in any case.

        Returns the leader's exit code, negative for a signal; None where it is not our child.
        """
        if self._ended:
            return self._child.returncode if self._child else None
        if grace_s > 0 and not self.exited:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)  # a stopped process would not hear it
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.wait()
        self.signal(signal.SIGKILL)
        await wait_gone(self.pid, clock)
        return self._reap()

    def release(self) -> None:
        """Let go of an engine that runs on without this worker."""
        if not self._ended:
            self._ended = True
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            if self._child is not None:
                self._child.returncode = 0  # it is not waited for any more; silences the warning of a running child

    def _reap(self) -> int | None:
        self._ended = True
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        return self._child.wait() if self._child is not None else None
