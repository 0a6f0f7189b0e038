"""Holding: requests that wait because their model has no instance now, in bounded queues, first come first served.

Pure bookkeeping, as TransitionManager is: no asyncio, no I/O, no clock (``now`` is seconds on any monotonic clock). A
route says whether requests wait and within which bounds (``events.route.Hold``); a revision with an instance lets all
go on, the end of their time, a failed load or a stopping gateway refuses them. Nothing here is asked for a request
whose model has an instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from turnout.workers.gateway.errors import Refusal
from turnout.workers.gateway.metrics import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from turnout.events.route import Hold
    from turnout.projections.routing import RouteView

#: Between two signs of life to a client whose request waits, seconds: proxies give up after 30 or more.
TELL_S = 5.0
#: Between two requests to load the same model, seconds.
ASK_S = 2.0
#: What a refused client is told to wait, seconds.
RETRY_S = 5


class Waiter(Protocol):
    """A request that may wait. Hashed by identity."""

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        ...

    def go_on(self) -> None:
        """The model has an instance: send it."""
        ...

    def give_up(self, refusal: Refusal) -> None:
        """It has waited in vain."""
        ...

    def still_waits(self, seconds: float) -> None:
        """It has waited so long already."""
        ...


class _Place:
    """Since when a request waits, and when its client was told last."""

    __slots__ = ("since", "told")

    def __init__(self, now: float) -> None:
        self.since = self.told = now


class _Queue:
    """Who waits for one model, in the order of arrival."""

    __slots__ = ("asked", "hold", "ready", "revision", "waiters")

    def __init__(self) -> None:
        self.hold: Hold | None = None
        self.ready = False
        self.revision = 0
        self.asked = float("-inf")
        self.waiters: dict[Waiter, _Place] = {}


class Holding:
    """All queues of one gateway process.

    Args:
        most_bytes: bodies of all that wait together.
        tell_s: between two signs of life to a client whose request waits.

    Attributes:
        ask: called with a model and its revision where a request waits for a model that is loaded on demand.
        waited: model → seconds that its requests have waited, whatever became of them.
        refused: (model, reason) → requests that could not wait, or waited in vain.
    """

    def __init__(self, most_bytes: int, tell_s: float = TELL_S) -> None:
        self.ask: Callable[[str, int], None] = _nobody
        self.waited: dict[str, Histogram] = {}
        self.refused: dict[tuple[str, str], int] = {}
        self.tell_s = tell_s
        self._most_bytes = most_bytes
        self._bytes = 0
        self._queues: dict[str, _Queue] = {}

    def applied(self, route: RouteView) -> None:
        """A revision has been applied: let go on, or refuse, who need not wait any more."""
        model, hold = route.model, route.hold
        queue = self._queues.get(model)
        if queue is None:
            if hold is None:
                return
            queue = self._queues[model] = _Queue()
        before, queue.hold, queue.revision = queue.hold, hold, route.revision
        queue.ready = any(split.endpoints for split in route.splits)
        queue.asked = float("-inf")
        if queue.ready:
            for waiter in tuple(queue.waiters):
                if waiter in queue.waiters:
                    waiter.go_on()
        elif hold is None:
            self._refuse_all(queue, model, "not_held", f"{model} has no instance, and requests do not wait for one")
        elif before is not None and hold.failed > before.failed:
            self._refuse_all(queue, model, "load_failed", f"{model} could not be loaded: {hold.reason}")
        if hold is None and not queue.waiters:
            del self._queues[model]

    def waits(self, model: str) -> bool:
        """Whether a request for the model has to wait, and may."""
        queue = self._queues.get(model)
        return queue is not None and not queue.ready and queue.hold is not None

    def wait(self, model: str, waiter: Waiter, now: float) -> Refusal | None:
        """Put a request at the end of its model's queue; or why it can't wait. Ask ``waits`` before."""
        queue = self._queues[model]
        hold = queue.hold
        if hold is None or len(queue.waiters) >= hold.queue:
            return self._refusal(model, "queue_full", f"{len(queue.waiters)} requests wait for {model} already")
        if self._bytes + waiter.size > self._most_bytes:
            return self._refusal(model, "queue_full", f"the requests that wait hold {self._bytes} bytes already")
        queue.waiters[waiter] = _Place(now)
        self._bytes += waiter.size
        self._ask(model, queue, hold, now)
        return None

    def leave(self, model: str, waiter: Waiter, now: float) -> None:
        """A request waits no longer: it goes on, is refused, or its client has gone."""
        queue = self._queues.get(model)
        place = None if queue is None else queue.waiters.pop(waiter, None)
        if place is not None:
            self._bytes -= waiter.size
            if model not in self.waited:
                self.waited[model] = Histogram()
            self.waited[model].observe(now - place.since)

    def sweep(self, now: float) -> None:
        """Refuse whose time is up, tell the others that they still wait, and ask again for what is loaded on demand."""
        for model, queue in tuple(self._queues.items()):
            hold = queue.hold
            if hold is None or not queue.waiters:
                continue
            for waiter, place in tuple(queue.waiters.items()):
                if now - place.since >= hold.wait_s:
                    why = f"{model} was not ready within {hold.wait_s:g} s"
                    waiter.give_up(self._refusal(model, "load_timeout", why))
                elif now - place.told >= self.tell_s:
                    place.told = now
                    waiter.still_waits(now - place.since)
            if queue.waiters:
                self._ask(model, queue, hold, now)

    def refuse(self, model: str, reason: str) -> None:
        """Nobody will load the model: say so to all who wait for it."""
        if queue := self._queues.get(model):
            self._refuse_all(queue, model, "load_refused", reason)

    def close(self) -> None:
        """The gateway stops."""
        for model, queue in self._queues.items():
            self._refuse_all(queue, model, "gateway_stopping", "the gateway had to stop while the request waited")

    def counts(self) -> Iterator[tuple[str, int]]:
        """(model, requests that wait now)."""
        for model, queue in self._queues.items():
            yield model, len(queue.waiters)

    def on_demand(self) -> Iterator[str]:
        """Models that are loaded on demand and have an instance: what they do decides when they are let go."""
        for model, queue in self._queues.items():
            if queue.ready and queue.hold is not None and queue.hold.wake:
                yield model

    def _ask(self, model: str, queue: _Queue, hold: Hold, now: float) -> None:
        if hold.wake and now - queue.asked >= ASK_S:
            queue.asked = now
            self.ask(model, queue.revision)

    def _refuse_all(self, queue: _Queue, model: str, code: str, why: str) -> None:
        for waiter in tuple(queue.waiters):
            waiter.give_up(self._refusal(model, code, why))

    def _refusal(self, model: str, code: str, why: str) -> Refusal:
        self.refused[model, code] = self.refused.get((model, code), 0) + 1
        return Refusal(503, code, f"{why}: try again in a few seconds", retry_after=RETRY_S)


def _nobody(_: str, __: int) -> None:
    """Nobody asked to hear it."""
