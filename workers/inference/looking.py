"""Looks at the files of versions beside the worker's loop: one at a time, in a thread that stands back for engines.

Joins the worker's port ``Look`` and the blocking inspector; knows no command but the report that it fills in.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from turnout.workers.inference.engines.base import Refusal
from turnout.workers.inference.engines.vllm import default_python, find_vllm
from turnout.workers.inference.inspector import Hashes, Host, Inspector
from turnout.workers.registry import find_engines

if TYPE_CHECKING:
    from turnout.core.model import ReportInspected
    from turnout.projections.fleet import CheckView
    from turnout.workers.inference.settings import WorkerSettings

_NICE = 10


class Looking:
    """The inspector of one worker, and the thread that it works in. ``stop`` it with the worker."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._python = settings.vllm_python
        self._hashes = Hashes(Path(settings.run_folder) / "hashes.json")
        self._thread = ThreadPoolExecutor(1, "inspect", _stand_back)
        self.inspector = Inspector(settings.policy, self._hashes, self._host)

    async def look(self, check: CheckView, report: ReportInspected) -> ReportInspected:
        """See the port."""

        def inspect() -> ReportInspected:
            found = self.inspector.inspect(check.engine, check.model, check.version, trusted=check.trust_architecture)
            if isinstance(found, Refusal):
                return msgspec.structs.replace(report, code=found.code, reason=found.reason, hint=found.hint)
            return msgspec.structs.replace(report, inspection=found.inspection, contents=found.contents)

        return await asyncio.get_running_loop().run_in_executor(self._thread, inspect)

    def stop(self) -> None:
        """Give up what is being read."""
        self._hashes.stop()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _host(self) -> Host:
        install = find_vllm(self._python)
        named = (engine.architectures for engine in find_engines(self._python or default_python()))
        return Host(cpu=install is None or install.cpu, architectures=frozenset[str]().union(*named))


def _stand_back() -> None:
    """Lower the priority of this thread alone: reading a version must not slow down those that serve."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
