"""Shadow copies: a request that a version answers for nobody, beside the answer that the client gets.

A copy begins after its primary's first byte, over connections of its own, within a bound of its own and without a
queue: where there is no room it is dropped and counted. Nothing here is ever waited for, and nothing raises into the
request that was copied. Knows no client and no split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from turnout.core.split import BUCKETS, Spread
from turnout.workers.gateway.reading import Reading, readable
from turnout.workers.gateway.request import is_form, with_model
from turnout.workers.gateway.upstream import Pool

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from turnout.events.route import Endpoint, Mirror
    from turnout.projections.routing import RouteView
    from turnout.workers.gateway.answer import Shape
    from turnout.workers.gateway.health import ShadowTally
    from turnout.workers.gateway.request import Head, Request
    from turnout.workers.gateway.settings import GatewaySettings
    from turnout.workers.gateway.upstream import UpstreamConnection

#: Copies at once, over all models of a gateway.
MOST = 16
#: Larger requests are not copied.
BODY_MOST_BYTES = 1024 * 1024
#: Seconds from a copy's start to its last byte.
LIMIT_S = 60.0
#: Not asked twice: each call leaves something behind at the engine.
_LEAVES_SOMETHING = (b"/v1/videos", b"/v1/responses/", b"/v1/audio/voices")


class Copy:
    """One copy on its way, and its primary's end: the two make a pair when both have ended."""

    __slots__ = (
        "_body",
        "_connection",
        "_copies",
        "_ended",
        "_head",
        "_id",
        "_limit",
        "_outcome",
        "_primary",
        "_reading",
        "_seconds",
        "_shape",
        "_signs",
        "_started",
        "address",
        "tally",
    )

    def __init__(self, copies: Copies, tally: ShadowTally, endpoint: Endpoint, request: Request) -> None:
        self._copies = copies
        self.tally = tally
        self.address = endpoint.address
        self._head: Head = request.head
        self._id = request.id + b"-copy"
        self._body = request.body
        if endpoint.served:
            self._body = with_model(request.head.content_type, request.body, endpoint.served)
        self._connection: UpstreamConnection | None = None
        self._limit: asyncio.TimerHandle | None = None
        self._reading: Reading | None = None
        self._shape: Shape | None = None
        self._started = 0.0
        self._ended = False
        self._outcome = ""
        self._seconds = 0.0
        self._signs: tuple[str, ...] = ()
        self._primary: tuple[str, float] | None = None

    def start(self) -> None:
        """Send it."""
        copies = self._copies
        self._started = copies.monotonic()
        self._limit = copies.loop.call_later(LIMIT_S, self._end, "timeout")
        connection = copies.pool.take(self.address)
        if connection is None:
            copies.pool.connect(self.address, self)
        else:
            self.connected(connection)

    def primary_ended(self, outcome: str, seconds: float) -> None:
        """The request that this is a copy of has ended."""
        self._primary = (outcome, seconds)
        self._pair()

    def cancel(self) -> None:
        """Give it up: nothing is counted, and the engine is rid of it at once."""
        if not self._ended:
            self._close()
            self.tally.running -= 1

    # Exchange: what the connection tells

    def connected(self, connection: UpstreamConnection) -> None:
        """Send the request on it."""
        if self._ended:
            connection.transport.abort()
            return
        self._connection = connection
        connection.send(self, self._head, self._id, self._body)

    def connect_failed(self, reason: str) -> None:
        """There is nobody."""
        self._end("refused")

    def upstream_answer(self, shape: Shape, data: bytes, at: int) -> None:
        """The answer begins."""
        if self._ended:
            return
        self._body = b""
        self._shape = shape
        if shape.status < 400 and (shape.stream or (readable(self._head.path) and self.tally.looks.take())):
            self._reading = Reading(shape.stream)
        self.upstream_data(data, self._connection is not None and self._connection.complete)

    def upstream_data(self, data: bytes, last: bool) -> None:
        """A part of the answer."""
        if self._ended:
            return
        if self._reading is not None:
            self._reading.add(data)
        if last:
            self._complete()

    def upstream_lost(self, reason: str) -> None:
        """The connection is gone: in order only where that is what ends the answer."""
        connection, self._connection = self._connection, None
        shape = self._shape
        if shape is None:
            if connection is not None and connection.uses > 1 and not connection.heard:
                # A kept connection that the engine closed meanwhile says nothing about it.
                self._copies.pool.connect(self.address, self)
            else:
                self._end("refused")
        elif not reason and not (shape.chunked or shape.sized):
            self._complete()
        else:
            self._end("cut")

    def _complete(self) -> None:
        """The last byte is there."""
        status = self._shape.status if self._shape is not None else 0
        if status >= 400:
            self._end("http_error" if status == 429 or status >= 500 else "bad_request")
        elif self._reading is None:
            self._end("ok")
        else:
            seen = self._reading.seen(self._head.path)
            self._end(seen.outcome, seen.signs)

    def _end(self, outcome: str, signs: tuple[str, ...] = ()) -> None:
        if self._ended:
            return
        self._outcome, self._signs = outcome, signs
        self._seconds = self._copies.monotonic() - self._started
        self._close()
        self._pair()

    def _close(self) -> None:
        """Give connection, timer and room back."""
        self._ended = True
        connection, self._connection = self._connection, None
        if connection is not None:
            if connection.complete:
                self._copies.pool.give_back(connection, self._started + self._seconds)
            else:
                connection.discard()
        if self._limit is not None:
            self._limit.cancel()
        self._reading, self._body = None, b""
        self._copies.running.discard(self)

    def _pair(self) -> None:
        if self._outcome and self._primary is not None:
            outcome, seconds = self._primary
            self.tally.paired(self._outcome, outcome, self._seconds, seconds, self._signs)
            self.tally.running -= 1


class _Shadow:
    """One mirror of an applied revision: who gets copies, and how often."""

    __slots__ = ("_copies", "_endpoints", "_percent", "_spread", "_tally", "_turn")

    def __init__(self, copies: Copies, mirror: Mirror, tally: ShadowTally, seed: float) -> None:
        self._copies = copies
        self._endpoints: tuple[Endpoint, ...] = mirror.endpoints
        self._percent = mirror.percent
        self._spread = Spread(seed)
        self._tally = tally
        self._turn = 0

    def copy(self, request: Request) -> Copy | None:
        """A copy that was sent; None where its turn has not come or there is no room."""
        if self._spread.bucket() >= self._percent * BUCKETS / 100 or not self._endpoints:
            return None
        copies = self._copies
        if len(copies.running) >= MOST:
            self._tally.dropped()
            return None
        self._turn += 1
        copy = Copy(copies, self._tally, self._endpoints[self._turn % len(self._endpoints)], request)
        copies.running.add(copy)
        self._tally.running += 1
        copy.start()
        return copy


class Copies:
    """All copies of a gateway.

    Args:
        settings: for the connections.
        loop: runs the connections and time limits.
        monotonic: seconds.
        seed: in [0, 1), so that several gateways do not copy in step.
    """

    def __init__(
        self, settings: GatewaySettings, loop: asyncio.AbstractEventLoop, monotonic: Callable[[], float], seed: float
    ) -> None:
        self.loop = loop
        self.monotonic = monotonic
        self.pool = Pool(settings, loop)
        self.running: set[Copy] = set()
        self._seed = seed
        self._shadows: dict[str, tuple[_Shadow, ...]] = {}
        self._addresses: dict[str, frozenset[str]] = {}

    def apply(self, route: RouteView, tallies: tuple[ShadowTally, ...]) -> None:
        """A revision was applied: copies to engines that it does not mirror to are given up at once."""
        before = self._addresses.pop(route.model, frozenset[str]())
        self._shadows.pop(route.model, None)
        if route.mirrors:
            self._shadows[route.model] = tuple(
                _Shadow(self, mirror, tally, self._seed) for mirror, tally in zip(route.mirrors, tallies, strict=True)
            )
            self._addresses[route.model] = frozenset(
                endpoint.address for mirror in route.mirrors for endpoint in mirror.endpoints
            )
        if before or route.mirrors:
            here = frozenset[str]().union(*self._addresses.values())
            for copy in tuple(self.running):
                if copy.address not in here:
                    copy.cancel()
            self.pool.keep(here)

    def copy(self, model: str, request: Request) -> tuple[Copy, ...]:
        """Send the copies that a request shall have; called when its primary has sent the first byte."""
        shadows = self._shadows.get(model)
        head = request.head
        if (
            not shadows
            or not request.body
            or len(request.body) >= BODY_MOST_BYTES
            or head.method != b"POST"
            or is_form(head.content_type)
            or head.path.startswith(_LEAVES_SOMETHING)
        ):
            return ()
        return tuple(copy for shadow in shadows if (copy := shadow.copy(request)) is not None)

    def sweep(self, now: float) -> None:
        """Close what has been unused for too long."""
        self.pool.sweep(now)

    async def close(self) -> None:
        """Give all copies up."""
        for copy in tuple(self.running):
            copy.cancel()
        self._shadows.clear()
        await self.pool.close()
