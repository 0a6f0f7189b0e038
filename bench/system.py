"""A whole turnout as a user runs it: ``turnout up`` in a folder of its own, found through what it says about itself."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from processes import Process
from report import ROOT

from turnout.workers import running

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Self

CLI = (sys.executable, "-m", "turnout.workers.cli")
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "src")}


class Turnout:
    """A running ``turnout up``. Use it as a context manager."""

    def __init__(
        self, folder: Path, configuration: str, *, core: int | None = None, arguments: Sequence[str] = ()
    ) -> None:
        folder.mkdir()
        (folder / "turnout.toml").write_text(configuration)
        self.folder = folder
        kept = folder / ".turnout"
        argv = (*CLI, "up", "--folder", str(kept), "--port", "0", *arguments)
        self.process = Process(argv, folder / "log", core=core, env=ENVIRONMENT, cwd=folder)
        try:
            self.process.wait_for(lambda: bool((found := running.find(kept)) and found.gateway), "turnout up")
        except BaseException:
            self.process.stop()
            raise
        found = running.find(kept)
        assert found is not None
        self.nats = found.nats
        self.port = int(found.gateway.rpartition(":")[2])
        self.processes = dict(found.processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop(grace_s=30.0)

    def gateway_pid(self) -> int:
        """Process id of the only gateway."""
        pids = [pid for name, pid in self.processes.items() if name.startswith("gateway")]
        if len(pids) != 1:
            raise RuntimeError(f"expected one gateway among {self.processes}")
        return pids[0]


def command(*words: str) -> str:
    """A command line as TOML, e.g. for ``command`` of an openai version."""
    return "[" + ", ".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' for word in words) + "]"


def many_files() -> None:
    """Let this process and its children open as many files as the system allows: one for each connection."""
    import resource  # Linux only, as is the bench

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def pinned(core: int) -> None:
    """Move this process to one core."""
    os.sched_setaffinity(0, {core})
