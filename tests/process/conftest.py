"""``turnout up`` in a folder of its own, and the command line beside it: real processes, the fake engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec
import pytest

from turnout.workers.inference import client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Longest wait for anything, and for a whole demonstration; only ends a test that fails.
WAIT_S = 60.0
DEMO_S = 180.0

_SOURCE = str(Path(__file__).resolve().parents[2] / "src")


class Played(Protocol):
    """What a demonstration's scenario reports."""

    @property
    def as_planned(self) -> bool: ...


R = TypeVar("R", bound=Played)


class Recalled(Protocol):
    """Asks an engine a long prompt: log probability of what follows it, and how many of its tokens were cached."""

    async def __call__(self, address: str, model: str) -> tuple[float, int]: ...


class Up:
    """One folder, and what runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: dict[str, Any] = {}
        self.process: subprocess.Popen[str] | None = None
        self._env = {**os.environ, "PYTHONPATH": _SOURCE, "TERM": "xterm-256color"}
        self._env = {k: v for k, v in self._env.items() if not k.startswith("TURNOUT_")}

    def start(self, *args: str) -> dict[str, Any]:
        """Start ``turnout up`` and wait until it says that it is ready, or what is wrong."""
        self.close()
        with (self.folder / "up.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "turnout.workers.cli", "up", "--json", *(args or ("--port", "0"))],
                cwd=self.folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        self.said = json.loads(self.process.stdout.readline())
        return self.said

    def close(self) -> None:
        """Let go of the pipe of one that has ended."""
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self, number: int = signal.SIGINT) -> int:
        """End it by a signal; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run a command here."""
        return subprocess.run(
            [sys.executable, "-m", "turnout.workers.cli", *args],
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    def json(self, *args: str) -> dict[str, Any]:
        """Run a command that must succeed; its JSON."""
        done = self(*args, "--json")
        assert done.returncode == 0, done
        made: dict[str, Any] = json.loads(done.stdout)
        return made

    def open(self, *args: str) -> subprocess.Popen[str]:
        """Start a command and let it run."""
        return subprocess.Popen(
            [sys.executable, "-m", "turnout.workers.cli", *args],
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def play(self, report: type[R], *words: str) -> R:
        """Run ``turnout demo --scenario NAME``; its one JSON object."""
        demo = self.open("demo", "--scenario", *words, "--json")
        try:
            out, err = demo.communicate(timeout=DEMO_S)
        except subprocess.TimeoutExpired:
            demo.send_signal(signal.SIGINT)  # it stops what it has started
            out, err = demo.communicate(timeout=DEMO_S)
        assert out.count("\n") == 1, (out, err)
        assert '"scenario"' in out, (out, err)
        said = msgspec.json.decode(out, type=report)
        assert (demo.returncode == 0) == said.as_planned, said
        return said

    def running(self) -> dict[str, Any]:
        """What ``turnout up`` says of itself."""
        made: dict[str, Any] = json.loads((self.folder / ".turnout" / "up.json").read_bytes())
        return made

    def version(self, model: str = "chat") -> str:
        """The version that answers a completion; empty where none does."""
        request = urllib.request.Request(
            f"{self.said['gateway']}/v1/completions",
            json.dumps({"model": model, "prompt": "Say hello."}).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                json.loads(answer.read())
                return str(answer.headers["x-turnout-version"])
        except urllib.error.HTTPError as e:
            e.close()
            return ""
        except OSError:
            return ""

    def pids(self) -> dict[int, str]:
        """Every process that was started in the folder: id → command line."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if (entry / "cwd").readlink() == self.folder:
                        found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
                except OSError:
                    continue
        return found

    def write(self, text: str) -> None:
        """Write turnout.toml."""
        (self.folder / "turnout.toml").write_text(text)


@pytest.fixture
def up() -> Iterator[Up]:
    """A folder for ``turnout up``. What is left of it at the end is ended, and is an error."""
    with tempfile.TemporaryDirectory(prefix="turnout-") as folder:
        one = Up(Path(folder).resolve())
        try:
            yield one
        finally:
            if one.process is not None and one.process.poll() is None:
                one.process.send_signal(signal.SIGINT)
                try:
                    one.process.wait(WAIT_S)
                except subprocess.TimeoutExpired:
                    one.process.kill()
                    one.process.wait()
            one.close()
            left = one.pids()
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        assert left == {}


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], object]], None]:
    """``eventually(lambda: condition)``: wait for it, bounded."""
    import threading

    from turnout.workers.clock import SystemClock

    def wait(condition: Callable[[], object]) -> None:
        clock = SystemClock()
        end = clock.monotonic() + WAIT_S
        pause = threading.Event()
        while not condition():
            assert clock.monotonic() < end, "it did not come true"
            pause.wait(0.02)

    return wait


@pytest.fixture(scope="session")
def recalled() -> Recalled:
    """As the protocol says."""

    async def ask(address: str, model: str) -> tuple[float, int]:
        body = msgspec.json.encode({"model": model, "prompt": "track " * 1000, "max_tokens": 1, "logprobs": 1})
        said = json.loads((await client.ask(address, "/v1/completions", method="POST", body=body, timeout_s=10)).body)
        details = said["usage"].get("prompt_tokens_details", {})
        return said["choices"][0]["logprobs"]["token_logprobs"][0], details.get("cached_tokens", 0)

    return ask
