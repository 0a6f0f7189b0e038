"""Tier ``cold``: a new engine process. Always applies; every other tier falls back to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turnout.workers.inference import courtesy
from turnout.workers.inference.runner import Failure, Loaded
from turnout.workers.inference.starting import LoadFailed, Running

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.workers.inference.starting import Planned, Starter


class Cold:
    """Starts, waits until it listens, proves."""

    name = "cold"

    def __init__(self, starter: Starter, running: dict[str, Running]) -> None:
        """``running``: the worker's engines by instance; what is started is put there at once."""
        self._starter = starter
        self._running = running

    def unfit(self, planned: Planned) -> str:
        """Adapters share an engine."""
        return "it is an adapter" if planned.spec.adapter else ""

    def source(self, planned: Planned) -> str:
        """Nothing."""
        return ""

    async def load(self, planned: Planned, progress: Callable[[str, str], None]) -> Loaded | Failure:
        """See the protocol."""
        began = self._starter.clock.monotonic()
        started = self._starter.start(planned.order.instance, planned, courtesy.LOADING)
        if isinstance(started, Failure):
            return started
        self._running[planned.order.instance] = started
        return await self.go_on(planned, started, progress, began)

    async def go_on(
        self, planned: Planned, running: Running, progress: Callable[[str, str], None], began: float
    ) -> Loaded | Failure:
        """Wait for one that was started, and prove it. ``began``: monotonic seconds."""
        starter, instance = self._starter, planned.order.instance
        progress("starting", "")
        try:
            await starter.wait_listening(running, progress)
            load_s = starter.clock.monotonic() - began
            progress("proving", "")
            verdict = await starter.prove(running, planned.order)
        except LoadFailed as e:
            self._running.pop(instance, None)
            return await starter.fail(instance, running, e.stage, e.reason)
        return await starter.proven(running, verdict, load_s, starter.clock.monotonic() - began - load_s)
