"""A worker with real engine processes: load, prove, crash, hang, quiet, stop, and a restart in between."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import turnout
from turnout.events.model import EngineSpec
from turnout.workers.clock import SystemClock
from turnout.workers.inference import process, quiet
from turnout.workers.inference.engines.fake import FakeEngine
from turnout.workers.inference.engines.openai import OpenAIEngine
from turnout.workers.inference.host import HostRunner
from turnout.workers.inference.process import RunFolder
from turnout.workers.inference.runner import Failure, Loaded, Order
from turnout.workers.inference.settings import WorkerSettings

pytestmark = pytest.mark.process

Until = Callable[[Callable[[], object]], Awaitable[None]]
Make = Callable[..., HostRunner]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path; whatever runs from it at the end is killed, and the test fails."""
    with tempfile.TemporaryDirectory(prefix="tw-") as path:
        run = Path(path) / "run"
        yield run
        left = list(RunFolder(run).unrecorded())
        for _, leader in left:
            process.kill_session(leader.pid, leader.started)
        assert not left, "engines were left running"


@pytest.fixture
def make(folder: Path) -> Make:
    def runner(**settings: object) -> HostRunner:
        checks = settings.pop("health_check_s", None)
        assert checks is None or isinstance(checks, float)
        base = {"id": "w1", "run_folder": str(folder), "quiet_s": 0.2, "probe_timeout_s": 5.0}
        made = msgspec.convert({**base, **settings}, WorkerSettings)
        engines = {e.kind: e for e in (FakeEngine(), OpenAIEngine())}
        return HostRunner(made, engines, SystemClock(), checks)

    return runner


def untold(stage: str, detail: str) -> None:
    """Progress that the test does not look at."""


def order(*args: str, instance: str = "i-1", version: str = "v1") -> Order:
    return Order(instance, "chat", version, EngineSpec("fake", args=args), 7)


async def load(host: HostRunner, wanted: Order) -> Loaded:
    loaded = await host.load(wanted, untold)
    assert isinstance(loaded, Loaded), loaded
    return loaded


def leader(folder: Path, instance: str = "i-1") -> int:
    return next(r.pid for r in RunFolder(folder).records() if r.instance == instance)


def environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


def test_a_version_is_loaded_and_proven(runner: asyncio.Runner, make: Make) -> None:
    async def test() -> None:
        host = make()
        said: list[tuple[str, str]] = []
        loaded = await host.load(order(version="v2"), lambda stage, detail: said.append((stage, detail)))
        assert isinstance(loaded, Loaded)
        assert loaded.fingerprint == "v2"
        assert loaded.address.startswith("unix:")
        assert loaded.bytes > 1 << 20
        assert said[0] == ("starting", "")
        assert said[-1] == ("proving", "")
        await host.stop("i-1")

    runner.run(test())


def test_a_load_that_outgrows_its_estimate_is_stopped_and_the_engine_that_serves_is_not_touched(
    runner: asyncio.Runner, make: Make, folder: Path
) -> None:
    async def test() -> None:
        host = make(memory="300MiB")
        await load(host, order(instance="serving"))
        spec = EngineSpec("fake", args=("--memory=400", "--load-seconds=0.5"))
        greedy = await host.load(Order("greedy", "chat", "v2", spec, 7, bytes=64 << 20), untold)
        assert isinstance(greedy, Failure), greedy
        assert greedy.stage == "loading"
        assert "admitted with 64 MiB" in greedy.reason
        assert "[memory_over_estimate]" in greedy.reason
        assert [r.instance for r in RunFolder(folder).records()] == ["serving"], "nothing is left of it"
        assert await host.prove("serving") == ""
        usage = await host.usage("serving")
        assert usage is not None
        assert usage.bytes > 1 << 20
        await host.stop("serving")

    runner.run(test())


def test_a_worker_offers_a_share_of_its_hosts_memory_or_what_it_is_told(make: Make, runner: asyncio.Runner) -> None:
    async def test() -> None:
        whole = make(memory="100%").memory.memory_bytes
        assert make(memory="50%").memory.memory_bytes == whole // 2
        assert make(memory="1.5GiB").memory.memory_bytes == 3 << 29

    runner.run(test())


def test_an_engine_may_listen_on_tcp(runner: asyncio.Runner, make: Make, until: Until) -> None:
    async def test() -> None:
        host = make(unix=False)
        loaded = await load(host, order())
        assert loaded.address.startswith("http://127.0.0.1:")
        _, writer = await asyncio.open_connection("127.0.0.1", int(loaded.address.rpartition(":")[2]))
        await until(lambda: quiet.connections(loaded.address) == 1)
        writer.close()
        assert await host.wait_quiet("i-1", lambda _: None) is None
        await host.stop("i-1")

    runner.run(test())


def test_a_crash_at_load_is_reported_with_stage_cause_and_exit_code(runner: asyncio.Runner, make: Make) -> None:
    async def test() -> None:
        failure = await make().load(order("--crash-at-load"), untold)
        assert isinstance(failure, Failure)
        assert (failure.stage, failure.exit_code) == ("loading", 1)
        assert "incomplete metadata" in failure.reason
        assert failure.log_tail[0].startswith("cause: safetensors: Error while deserializing header")
        assert failure.log_tail[-1].startswith("RuntimeError: Engine core initialization failed")

    runner.run(test())


def test_a_load_without_progress_fails(runner: asyncio.Runner, make: Make, folder: Path) -> None:
    async def test() -> None:
        failure = await make(load_timeout_s=0.6).load(order("--hang-at-load"), untold)
        assert isinstance(failure, Failure)
        assert failure.stage == "loading"
        assert "no progress within 0.6 s" in failure.reason
        assert not RunFolder(folder).records()

    runner.run(test())


@pytest.mark.parametrize("flag", ["--nan", "--empty", "--loop", "--error-rate=1", "--hang-after=0"])
def test_an_engine_that_answers_badly_is_never_ready(runner: asyncio.Runner, make: Make, flag: str) -> None:
    async def test() -> None:
        failure = await make(load_timeout_s=1.0).load(order(flag), untold)
        assert isinstance(failure, Failure)
        assert failure.stage == "proving"

    runner.run(test())


def test_garbage_is_caught_by_the_versions_own_expectation(runner: asyncio.Runner, make: Make) -> None:
    async def test() -> None:
        spec = msgspec.convert({"kind": "fake", "args": ["--garbage"], "probe": {"expect": "v1 says"}}, EngineSpec)
        failure = await make().load(Order("i-1", "chat", "v1", spec), untold)
        assert isinstance(failure, Failure)
        assert "does not contain 'v1 says'" in failure.reason

    runner.run(test())


def test_a_refusal_of_the_policy_is_a_failure_of_stage_policy(runner: asyncio.Runner, make: Make) -> None:
    async def test() -> None:
        failure = await make().load(order("--port", "80"), untold)
        assert isinstance(failure, Failure)
        assert failure.stage == "policy"
        assert "[flag_not_allowed]" in failure.reason

    runner.run(test())


def test_a_crash_while_serving_is_seen_at_once(runner: asyncio.Runner, make: Make, folder: Path) -> None:
    async def test() -> None:
        host = make()
        await load(host, order())
        watching = asyncio.create_task(host.watch("i-1"))
        os.kill(leader(folder), signal.SIGKILL)
        failure = await asyncio.wait_for(watching, 20)
        assert (failure.stage, failure.exit_code) == ("serving", -9)
        assert "signal 9" in failure.reason

    runner.run(test())


def test_an_exit_with_code_0_that_nobody_asked_for_is_a_failure(
    runner: asyncio.Runner, make: Make, folder: Path
) -> None:
    async def test() -> None:
        host = make()
        await load(host, order())
        watching = asyncio.create_task(host.watch("i-1"))
        os.kill(leader(folder), signal.SIGTERM)
        failure = await asyncio.wait_for(watching, 20)
        assert failure.exit_code == 0
        assert "nobody asked it to (exit code 0)" in failure.reason

    runner.run(test())


def test_a_frozen_engine_is_found_and_killed(runner: asyncio.Runner, make: Make, folder: Path) -> None:
    async def test() -> None:
        host = make(health_check_s=0.1, hang_after_s=0.6, probe_timeout_s=0.2)
        await load(host, order())
        pid = leader(folder)
        watching = asyncio.create_task(host.watch("i-1"))
        os.kill(pid, signal.SIGSTOP)
        failure = await asyncio.wait_for(watching, 30)
        assert failure.reason.startswith("hung: it has answered nothing")
        assert "no processor time" in failure.reason
        assert process.members(pid) == ()

    runner.run(test())


def test_an_engine_that_takes_requests_and_never_answers_is_found(runner: asyncio.Runner, make: Make) -> None:
    async def test() -> None:
        host = make(health_check_s=0.1, hang_after_s=0.6, probe_timeout_s=0.2)
        await load(host, order("--hang-after=1"))
        failure = await asyncio.wait_for(host.watch("i-1"), 30)
        assert failure.reason.startswith("hung")

    runner.run(test())


def test_a_wrong_answer_while_serving_is_noted_and_kills_nothing(
    runner: asyncio.Runner, make: Make, until: Until
) -> None:
    async def test() -> None:
        host = make(health_check_s=0.05)
        await load(host, order("--empty", "--sound-first=1"))
        watching = asyncio.create_task(host.watch("i-1"))
        await until(lambda: host.trouble("i-1") == "the answer is empty")
        assert not watching.done()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await host.stop("i-1")

    runner.run(test())


def test_an_engine_with_an_open_connection_is_not_quiet(
    runner: asyncio.Runner, make: Make, until: Until, folder: Path
) -> None:
    async def test() -> None:
        host = make()
        loaded = await load(host, order())
        path = loaded.address.removeprefix("unix:")
        _, writer = await asyncio.open_unix_connection(path)
        seen: list[str] = []
        waiting = asyncio.create_task(host.wait_quiet("i-1", seen.append))
        await until(lambda: len(seen) >= 3)
        assert not waiting.done()
        assert "1 connections are open" in seen
        writer.close()
        assert await asyncio.wait_for(waiting, 20) is None
        with pytest.raises(FileNotFoundError):  # nobody can come in any more
            await asyncio.open_unix_connection(path)
        assert process.members(leader(folder))
        await host.stop("i-1")

    runner.run(test())


def test_a_request_that_runs_on_without_a_connection_keeps_the_engine(
    runner: asyncio.Runner, make: Make, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    async def test() -> None:
        host = make()
        await load(host, order())
        counted = [2.0]

        async def running(address: str, timeout_s: float) -> float:
            return counted[0]

        monkeypatch.setattr(quiet, "running", running)
        seen: list[str] = []
        waiting = asyncio.create_task(host.wait_quiet("i-1", seen.append))
        await until(lambda: "the engine counts 2 requests" in seen)
        counted[0] = 0.0
        assert await asyncio.wait_for(waiting, 20) is None
        await host.stop("i-1")

    runner.run(test())


def test_whoever_comes_in_at_the_last_moment_opens_the_door_again(
    runner: asyncio.Runner, make: Make, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    async def test() -> None:
        host = make()
        loaded = await load(host, order())
        path = loaded.address.removeprefix("unix:")
        late: list[socket.socket] = []
        rename = os.rename

        def slowly(src: str, dst: str) -> None:
            if not late and dst.endswith(".shut"):
                late.append(socket.socket(socket.AF_UNIX))
                late[0].connect(path)
            rename(src, dst)

        monkeypatch.setattr(os, "rename", slowly)
        waiting = asyncio.create_task(host.wait_quiet("i-1", lambda _: None))
        await until(lambda: late and Path(path).exists())
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()
        assert not waiting.done()
        late[0].close()
        assert await asyncio.wait_for(waiting, 20) is None
        await host.stop("i-1")

    runner.run(test())


CHILDREN = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
other = subprocess.Popen(["sleep", "1000"], process_group=0)
from turnout.workers.inference.engines.fake_server import main
sys.stderr.write(f"children {child.pid} {other.pid}\\n")
main(sys.argv[1:])
"""


def test_nothing_of_an_engine_is_left_after_a_stop(
    runner: asyncio.Runner, make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(turnout.__file__).parent.parent))

    async def test() -> None:
        host = make(policy={"commands": [sys.executable]})
        spec = EngineSpec("openai", command=(sys.executable, "-c", CHILDREN, "--socket", "{socket}"))
        await load(host, Order("i-1", "chat", "v1", spec))
        pid = leader(folder)
        assert len(process.members(pid)) == 3  # one of them has left the group
        await host.stop("i-1")
        assert process.members(pid) == ()

    runner.run(test())
    assert [p.name for p in folder.iterdir()] == ["i-1.log"]


def test_invariant_9_every_start_of_an_instance_has_an_address_of_its_own(
    runner: asyncio.Runner, make: Make, folder: Path
) -> None:
    async def test() -> None:
        host = make()
        first = await load(host, order())
        await host.stop("i-1")
        second = await load(host, order())
        await host.stop("i-1")
        assert first.address != second.address

    runner.run(test())
    assert not list(folder.glob("*.sock*"))


def test_the_run_folder_is_private_and_its_sockets_fit_the_kernel(folder: Path) -> None:
    deep = folder / ("x" * 60) / ("y" * 60)
    run = RunFolder(deep)
    assert deep.stat().st_mode & 0o777 == 0o700
    assert len(run.socket("i-" + "z" * 80, "123456").encode()) <= process.SUN_PATH_BYTES
    assert run.sockets.stat().st_mode & 0o777 == 0o700
    run.sockets.rmdir()


def test_an_engine_does_not_get_the_workers_credentials(
    runner: asyncio.Runner, make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNOUT_NATS_URL", "nats://user:secret@host")

    async def test() -> None:
        host = make()
        await load(host, order())
        assert "secret" not in environment(leader(folder))
        await host.stop("i-1")

    runner.run(test())


def test_a_running_server_is_proven_and_never_touched(runner: asyncio.Runner, make: Make, folder: Path) -> None:
    async def test() -> None:
        host = make(unix=False)
        address = (await load(host, order(instance="i-0"))).address
        spec = EngineSpec("openai", url=address + "/v1")
        loaded = await load(host, Order("i-1", "chat", "v1", spec))
        assert loaded.address == address
        assert await host.wait_quiet("i-1", lambda _: None) is None
        await host.stop("i-1")
        assert process.members(leader(folder, "i-0"))
        await host.stop("i-0")

    runner.run(test())


ENGINES_OF_A_WORKER = """
import asyncio, sys
from turnout.events.model import EngineSpec
from turnout.workers.clock import SystemClock
from turnout.workers.inference.engines.fake import FakeEngine
from turnout.workers.inference.host import HostRunner
from turnout.workers.inference.runner import Order
from turnout.workers.inference.settings import WorkerSettings

async def main():
    host = HostRunner(WorkerSettings(id="w1", run_folder=sys.argv[1]), {"fake": FakeEngine()}, SystemClock(), None)
    await host.found()
    await host.load(Order("i-1", "chat", "v1", EngineSpec("fake"), 7), lambda *_: None)
    loading = asyncio.create_task(
        host.load(Order("i-2", "chat", "v2", EngineSpec("fake", args=("--load-seconds=2",)), 9), lambda *_: None)
    )
    await asyncio.sleep(0.1)
    print("up", flush=True)
    await loading
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def killed_worker(folder: Path) -> None:
    """A worker that has proven one engine and was loading another when it was killed."""
    env = {**os.environ, "PYTHONPATH": str(Path(turnout.__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", ENGINES_OF_A_WORKER, str(folder)], env=env, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdout
        while b"up" not in worker.stdout.readline():
            assert worker.poll() is None
        worker.kill()


@pytest.mark.usefixtures("killed_worker")
def test_a_restarted_worker_adopts_what_runs(runner: asyncio.Runner, make: Make, folder: Path) -> None:
    async def test() -> None:
        before = leader(folder)
        host = make()
        found = await host.found()
        assert found["i-1"].loaded is not None
        assert found["i-1"].loaded.fingerprint == "v1"
        assert found["i-1"].sequence == 7
        assert found["i-2"].loaded is None
        assert leader(folder) == before
        loaded = await load(host, order(instance="i-2", version="v2"))
        assert loaded.fingerprint == "v2"
        watching = asyncio.create_task(host.watch("i-1"))
        os.kill(before, signal.SIGKILL)
        failure = await asyncio.wait_for(watching, 20)  # seen although it is nobody's child here
        assert (failure.stage, failure.exit_code) == ("serving", None)
        await host.stop("i-2")

    runner.run(test())


@pytest.mark.usefixtures("killed_worker")
def test_an_engine_without_a_record_is_ended_by_the_next_worker(
    runner: asyncio.Runner, make: Make, folder: Path
) -> None:
    async def test() -> None:
        pid = leader(folder)
        (folder / "i-1.json").write_text("{ half a record")
        host = make()
        found = await host.found()
        assert set(found) == {"i-2"}
        assert process.members(pid) == ()
        await host.stop("i-2")

    runner.run(test())


@pytest.mark.usefixtures("killed_worker")
def test_a_record_of_a_dead_engine_adopts_nobody_elses_process(
    runner: asyncio.Runner, make: Make, folder: Path
) -> None:
    async def test() -> None:
        record = next(r for r in RunFolder(folder).records() if r.instance == "i-1")
        process.kill_session(record.pid, record.started)
        mine = os.getpid()
        RunFolder(folder).write(msgspec.structs.replace(record, pid=mine, started=1))
        host = make()
        assert set(await host.found()) == {"i-2"}
        await host.stop("i-2")

    runner.run(test())
