"""An asyncio event loop with simulated time: when everything waits, the clock jumps to the next timer.

No real time, no sockets, no threads. With a seeded source of randomness beside it, a run is the same every time.
"""

from __future__ import annotations

import asyncio
import heapq
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import deque
    from contextvars import Context


#: Rounds without any passing of time after which something is taken to run in circles.
SPIN = 100_000


class Stuck(Exception):
    """Everything waits and no timer will ever wake anything, or something runs in circles while no time passes."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs until the main task is done; ``time()`` is seconds since the start of the simulation."""

    _ready: deque[asyncio.Handle]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._made = 0
        self._rounds = 0

    def time(self) -> float:
        """Simulated seconds."""
        return self._now

    def call_at(  # type: ignore[override]  # the callback's arguments are checked where they are given
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call at a time; timers of the same time in the order in which they were made."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._made += 1
        heapq.heappush(self._timers, (when, self._made, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def _run_once(self) -> None:
        """Everything that is ready; where nothing is, the clock jumps to the next timer."""
        ready = self._ready
        while not ready:
            if not self._timers:
                raise Stuck("everything waits for something that no timer will bring")
            when, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled():
                if when > self._now:
                    self._now = when
                    self._rounds = 0
                ready.append(timer)
        self._rounds += 1
        if self._rounds > SPIN:
            raise Stuck(f"{SPIN} rounds at {self._now} s; next is {ready[0]!r}")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _write_to_self(self) -> None:
        """No other thread can wake this loop."""
