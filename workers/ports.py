"""What processes need of the control plane, as ports. Adapters: workers/nats.py; simulated ones in tests/sim.

Every method that can fail for want of the network raises ``Unavailable`` (events/store.py). Knows no transport.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime

    from turnout.core.decider import Answer
    from turnout.events.health import HealthEvent


class Request(msgspec.Struct, frozen=True):
    """A command as it travels: ``{"id": …, "actor": …, "body": {…}}``.

    ``id`` is made by whoever wants the command done, and stays the same however often it is sent. ``if_sequence``: the
    newest event that the sender knows of what the command changes first; it is refused where there is a newer one.
    """

    id: str
    actor: str
    body: msgspec.Raw = msgspec.Raw(b"{}")
    if_sequence: int | None = None


class ViewEntry(msgspec.Struct, frozen=True, gc=False):
    """One stored view: its key, its JSON, and its sequence in the bucket (grows with every write of any key).

    ``value`` is empty where the view was removed.
    """

    key: str
    value: bytes
    sequence: int


class Checkpoint(msgspec.Struct, frozen=True, gc=False):
    """How far the views have come: they are the fold of the log up to ``sequence``. Stored last in each commit.

    ``log`` is the digest of the log's first event, so that views of another log are never taken for this one's.
    ``epoch`` is the fencing number of the leader that wrote it.
    """

    sequence: int
    log: str
    epoch: int


class ModelUse(msgspec.Struct, frozen=True, gc=False):
    """What one gateway does with a model that is loaded on demand.

    Attributes:
        in_flight: requests whose last byte has not come.
        held: requests that wait for it to be loaded.
        idle_s: seconds since the last byte of the last request, or since the gateway could send any; 0 while in use.
        revision: of the route that it uses.
    """

    in_flight: int
    held: int
    idle_s: float
    revision: int


class Closeable(Protocol):
    """Something that runs until it is closed."""

    async def close(self) -> None:
        """Stop; nothing is called back after it returns."""
        ...


class Bus(Protocol):
    """Commands, asked and answered (request/reply on a queue group)."""

    async def ask(self, role: str, verb: str, request: Request, timeout_s: float = 5.0) -> Answer:
        """Send a command and wait for its answer. A missing answerer or a time-out raises Unavailable."""
        ...

    async def serve(self, handler: Callable[[str, str, Request], Awaitable[bytes]]) -> Closeable:
        """Answer all commands: the handler gets role, verb and request, and returns the JSON of the answer."""
        ...


class GatewayBeat(msgspec.Struct, frozen=True):
    """What a gateway says with each sign of life.

    Attributes:
        connected: whether the gateway itself hears the control plane.
        in_flight: model → version → requests that have not ended; where there are none, the version is left out.
        uses: what the gateway does with the models that are loaded on demand and have an instance.
    """

    connected: bool = True
    in_flight: dict[str, dict[str, int]] = {}
    uses: dict[str, ModelUse] = {}


class Beats(Protocol):
    """Signs of life, fire and forget."""

    async def publish(self, kind: str, id: str, body: bytes) -> None:
        """Say that worker or gateway ``id`` lives. Never raises: a lost beat is a missing beat."""
        ...

    async def listen(self, heard: Callable[[str, str, bytes], None]) -> Closeable:
        """Call ``heard(kind, id, body)`` for every beat."""
        ...


class ViewReader(Protocol):
    """Views, as gateways, workers and dashboards read them: a snapshot, then every change."""

    async def watch(self, keys: tuple[str, ...], changed: Callable[[Mapping[str, ViewEntry], int], None]) -> Closeable:
        """Keep the caller's copy of the keys true.

        Args:
            keys: key patterns, NATS wildcards allowed: ``route.*``, ``worker.w1``.
            changed: called with the entries that changed (all of one commit together) and the log sequence that the
                copy now stands for (the checkpoint's). First call: the whole snapshot. It is called again, with
                nothing or little changed, whenever the checkpoint moves.

        A lost message, a reconnect and a server restart end in a new snapshot, never in a missed change.
        """
        ...

    async def snapshot(self, keys: tuple[str, ...]) -> tuple[Mapping[str, ViewEntry], Checkpoint | None]:
        """The keys as they are now, and the checkpoint (None where nothing was ever projected)."""
        ...


class ViewWriter(Protocol):
    """Views, as the projector writes them."""

    async def checkpoint(self) -> tuple[Checkpoint | None, int]:
        """The stored checkpoint and its bucket sequence (0 where there is none)."""
        ...

    async def commit(self, views: Mapping[str, bytes | None], checkpoint: Checkpoint, expected: int) -> int:
        """Store views (None removes one) and the checkpoint atomically; returns the checkpoint's bucket sequence.

        Raises:
            Conflict: another projector has written since ``expected``.
        """
        ...


class RouteNews(Protocol):
    """New routes, told to gateways before they are stored as views. Fire and forget.

    Only what stands in the log is told, and each route has a revision: news that is lost, late or doubled does no harm,
    because the stored view follows and a gateway never applies a lower revision.
    """

    async def tell(self, model: str, view: bytes) -> None:
        """Send the JSON of a route's view. Never raises."""
        ...

    async def listen(self, heard: Callable[[bytes], None]) -> Closeable:
        """Call ``heard`` with every view that is told from now on. ``heard`` must be short, and must not raise."""
        ...


class Grant(msgspec.Struct, frozen=True, gc=False):
    """A held lease: the fencing epoch, and until when (on the local monotonic clock, seconds) it may be acted on."""

    epoch: int
    until: float


class Lease(Protocol):
    """Leadership with fencing."""

    async def acquire(self, holder: str) -> Grant | None:
        """Try once; None where somebody else holds it."""
        ...

    async def renew(self, holder: str, grant: Grant) -> Grant | None:
        """Extend. None where it is lost for certain; Unavailable where it is not known (act only until ``until``)."""
        ...

    async def release(self, holder: str, grant: Grant) -> None:
        """Let go early, so that another may lead at once."""
        ...


class HealthWriter(Protocol):
    """Health samples, as gateways and workers publish them: evidence, not facts."""

    @property
    def dropped(self) -> int:
        """Samples that were not sent, since the start."""
        ...

    async def publish(self, event: HealthEvent) -> None:
        """Send one, without waiting until it is stored. Never raises: what can't be sent is dropped and counted."""
        ...


class HealthReader(Protocol):
    """Health samples, as controllers read them."""

    async def follow(self, since: datetime, heard: Callable[[HealthEvent], None]) -> Closeable:
        """Call ``heard`` with every sample that was stored at ``since`` (UTC) or later, in the stream's order.

        Returns as soon as it has begun. A reconnect or a restart of the server loses and repeats nothing; what can't
        be read is logged and passed over.
        """
        ...
