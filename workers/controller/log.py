"""The controller's copy of the log: the world (for decisions) and the views (for readers), kept by one tail.

Knows the store's port, not who leads.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from turnout.core.world import World
from turnout.events.store import Unavailable
from turnout.projections.views import Views

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.events.envelope import Recorded
    from turnout.events.store import EventStore, Tail


class Log:
    """Follows the store from the first event on.

    Attributes:
        world: may be ahead of the tail by this process's own writes.
        views: exactly the log up to ``sequence``.
        sequence: how far the tail has come.
    """

    def __init__(self, store: EventStore, replaced: Callable[[Exception], None]) -> None:
        self.store = store
        self.world = World()
        self.views = Views()
        self.sequence = 0
        self._replaced = replaced
        self._tail: Tail | None = None
        self._moved = asyncio.Event()
        self._watchers: list[Callable[[], None]] = []
        self._told = False

    async def follow(self) -> None:
        """Start the tail and wait until everything that is stored now has been folded.

        Raises:
            Unavailable: the store does not answer.
        """
        self._tail = await self.store.tail(0, self._deliver, self._replaced)
        await self.catch_up()

    async def close(self) -> None:
        """Stop following."""
        if self._tail is not None:
            await self._tail.close()

    def watch(self, moved: Callable[[], None]) -> None:
        """Call ``moved`` after new events were folded; many events may share one call."""
        self._watchers.append(moved)

    def own(self, recorded: tuple[Recorded, ...]) -> None:
        """Fold this process's own writes into the world at once; the tail brings them again, for the views."""
        for one in recorded:
            self.world.apply(one)
        self._tell_soon()

    def reread(self, history: tuple[Recorded, ...]) -> None:
        """Fold one subject's whole history, as the store has it now."""
        self.world.reread(history, self.sequence)
        self._tell_soon()

    async def catch_up(self, timeout_s: float = 30.0) -> None:
        """Wait until the tail has folded all that is stored at this moment.

        Raises:
            Unavailable: the store does not answer, or the tail is that far behind.
        """
        last = await self.store.last_sequence()
        try:
            async with asyncio.timeout(timeout_s):
                while self.sequence < last:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            raise Unavailable(f"the log is at {last}, this controller has only read up to {self.sequence}") from None

    def _deliver(self, recorded: Recorded) -> None:
        self.sequence = recorded.sequence
        self.world.apply(recorded)
        self.views.apply(recorded)
        self._tell_soon()

    def _tell_soon(self) -> None:
        if not self._told:
            self._told = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._told = False
        self.views.settle()
        self._moved.set()
        for moved in self._watchers:
            moved()
