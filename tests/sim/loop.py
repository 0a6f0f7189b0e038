"""An asyncio event loop with simulated time: when everything waits, the clock jumps to the next timer.

No real time, no sockets, no threads. With a seeded source of randomness beside it, a run is the same every time.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Stuck(Exception):
    """Everything waits, and no timer will ever wake anything."""


class _Jumps:
    """Stands where the loop has its selector: a wait is a jump of the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck("everything waits for something that no timer will bring")
        if timeout > 0:
            self.now += timeout
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs until the main task is done; ``time()`` is seconds since the start of the simulation."""

    def __init__(self) -> None:
        super().__init__()
        self._jumps = self._selector = _Jumps()

    def time(self) -> float:
        """Simulated seconds."""
        return self._jumps.now

    def _process_events(self, event_list: list[Any]) -> None:
        """There is nothing outside that could send one."""

    def _write_to_self(self) -> None:
        """No other thread can wake this loop."""
