"""The only module that names the adapters to NATS: makes the control plane of a process from an address."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from turnout.events import jsapi, subjects
from turnout.events.jetstream import JetStreamStore
from turnout.events.store import Unavailable
from turnout.workers import running
from turnout.workers.clock import SystemClock
from turnout.workers.nats import (
    Incompatible,
    NatsBeats,
    NatsBus,
    NatsHealthReader,
    NatsHealthWriter,
    NatsLease,
    NatsRouteNews,
    NatsViewReader,
    NatsViewWriter,
    connect,
    ensure_streams,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from turnout.events.envelope import Recorded
    from turnout.workers.clock import Clock
    from turnout.workers.nats import Connection
    from turnout.workers.ports import Request

__all__ = ["ControlPlane", "Incompatible", "control_plane", "nats_url"]

#: Where NATS is where nothing is said.
DEFAULT_NATS = "nats://127.0.0.1:4222"
#: Whole seconds that a leader's lease lasts: on one server, and where the streams have replicas.
_LEASE_S = 2
_LEASE_REPLICATED_S = 15


class ControlPlane:
    """One connection to NATS and everything that a process asks of it."""

    def __init__(self, connection: Connection, clock: Clock) -> None:
        self.connection = connection
        self.clock = clock
        self.replicas = 1
        self.store = JetStreamStore(connection.nc)
        self.bus = NatsBus(connection)
        self.beats = NatsBeats(connection)
        self.reader = NatsViewReader(connection, clock)
        self.writer = NatsViewWriter(connection)
        self.news = NatsRouteNews(connection)
        self.health_writer = NatsHealthWriter(connection)
        self.health_reader = NatsHealthReader(connection)

    async def prepare(self, replicas: int) -> None:
        """Make the streams that are missing, with so many replicas, and check those that exist.

        Raises:
            Unavailable: no answer.
            Incompatible: the server, or what it holds, is not for this turnout.
        """
        self.replicas = await ensure_streams(self.connection.nc, replicas)
        self.store = JetStreamStore(self.connection.nc, replicas=self.replicas)

    def lease(self, role: str) -> NatsLease:
        """The leadership of a role."""
        return NatsLease(self.connection, role, self.clock, _LEASE_S if self.replicas == 1 else _LEASE_REPLICATED_S)

    async def log_page(self, after: int) -> tuple[tuple[Recorded, ...], int]:
        """The next events above sequence ``after``, and how many are left behind them.

        Raises:
            Unavailable: no answer.
            Damaged: an event can't be read.
        """
        return await self.store.page(after)

    async def ask(self, role: str, verb: str, request: Request, timeout_s: float) -> bytes:
        """Send a command once; the JSON of its answer.

        Raises:
            Unavailable: nobody answered.
        """
        try:
            subject = subjects.command(role, verb)
            return await jsapi.request(self.connection.nc, subject, msgspec.json.encode(request), timeout_s)
        except Unavailable as e:
            where = self.connection.server
            raise Unavailable(f"no controller answers at {where}; start one: turnout up, or turnout controller") from e


def nats_url(named: str = "") -> str:
    """The address that was named, else that of this folder's ``turnout up``, else the usual one."""
    if named:
        return named
    up = running.find()
    return up.nats if up is not None else DEFAULT_NATS


@asynccontextmanager
async def control_plane(
    url: str = "",
    name: str = "turnout client",
    *,
    clock: Clock | None = None,
    away_s: float = 30.0,
    away: Callable[[str], None] | None = None,
) -> AsyncGenerator[ControlPlane]:
    """The control plane, while the block runs.

    Args:
        url: of NATS; empty as in :func:`nats_url`.
        name: of this process, as the server's tools show it.
        clock: of this process; a new one where there is none yet.
        away_s: seconds without a connection after which ``away`` is called.
        away: gets the reason, once for each outage.

    Raises:
        Unavailable: NATS can't be reached.
    """
    clock = clock or SystemClock()
    connection = await connect(nats_url(url), name, clock, away_s=away_s, away=away)
    try:
        yield ControlPlane(connection, clock)
    finally:
        await connection.close()
