"""The simulated control plane: store, bus, beats, views and lease with delays, loss, partitions, crashes and outages.

One :class:`Network` is the NATS of a run. Each simulated process gets its own :class:`Process`, and adapters of
workers/ports.py that are bound to it: a dead process does nothing more (its cleanup code runs without any effect, as
after kill -9), a cut-off one hears and says nothing.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from turnout.core.decider import Answer
from turnout.events.memory import MemoryStore
from turnout.events.store import Conflict, StoreFull, Unavailable
from turnout.workers.ports import Checkpoint, Grant, Request, ViewEntry

if TYPE_CHECKING:
    import random  # noqa: TID251  seeded: a run is named by its seed
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

    from turnout.events.codec import Context
    from turnout.events.envelope import Recorded
    from turnout.events.health import HealthEvent
    from turnout.events.store import Append

START = datetime(2026, 1, 1, tzinfo=UTC)
LEASE_TTL_S = 2.0
#: A write that its sender has given up may still be stored this much later.
LATE_S_MAX = 0.4

_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


class Faults(msgspec.Struct):
    """How bad the network is. Probabilities for each operation; all 0 once the faults stop."""

    lost_request: float = 0.0
    lost_answer: float = 0.0
    duplicate: float = 0.0
    slow: float = 0.0
    crash_at_op: float = 0.0
    lost_view: float = 0.0
    lost_beat: float = 0.0


class Process:
    """One operating-system process of the simulation: its clock, its connection, and its death."""

    def __init__(self, net: Network, name: str, kind: str) -> None:
        self.net = net
        self.name = name
        self.kind = kind
        self.alive = True
        self.cut = False
        self.ended: Callable[[], None] = _nothing
        self._tasks: set[asyncio.Task[Any]] = set()
        rng = net.rng
        self._wall_offset = rng.uniform(-net.skew_s, net.skew_s)
        self._mono_offset = rng.uniform(0, 10_000)
        self._ids = 0

    # the Clock of workers/clock.py

    def now(self) -> datetime:
        """UTC, a little off, differently in each process."""
        return START + timedelta(seconds=round(self.net.loop.time() + self._wall_offset, 6))

    def monotonic(self) -> float:
        """Seconds; no two processes agree on where they begin."""
        return self.net.loop.time() + self._mono_offset

    def id(self, prefix: str = "") -> str:
        """A new id."""
        self._ids += 1
        return f"{prefix}{self.name}-{self._ids}"

    def jitter(self) -> float:
        """A number in [0, 1)."""
        return self.net.rng.random()

    # life

    @property
    def connected(self) -> bool:
        """Whether anything gets through."""
        return self.alive and not self.cut and not self.net.down

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something that dies with the process. What it raises ends the process, and is remembered."""
        task = self.net.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def crash(self) -> None:
        """Kill -9, now."""
        if not self.alive:
            return
        self.alive = False
        self.net.trace("crash", self.name)
        for task in tuple(self._tasks):
            task.cancel()
        self.ended()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None or not self.alive:
            return
        if not isinstance(error, Unavailable):  # those end a process that could not start; whoever runs it starts again
            self.net.bugs.append(error)
        self.crash()

    async def op(self, *, before: bool) -> None:
        """Where a process may die: just before or just after anything that it does to the world."""
        net = self.net
        if self.alive and net.faults.crash_at_op and self.kind in net.mortal and net.chance(net.faults.crash_at_op):
            net.trace("crash at op", self.name, "before" if before else "after")
            net.loop.call_soon(self.crash)
            await net.never()
        if not self.alive:
            await net.never()

    async def send(self, timeout_s: float, what: str) -> None:
        """The way to the server.

        Raises:
            Unavailable: it did not get there.
        """
        await self.op(before=True)
        await asyncio.sleep(self.net.delay())
        if not self.alive:
            await self.net.never()
        if not self.connected or self.net.chance(self.net.faults.lost_request):
            await self.no_answer(timeout_s, what)

    async def receive(self, timeout_s: float, what: str) -> None:
        """The way back.

        Raises:
            Unavailable: the server did it, but its answer did not arrive.
        """
        if self.net.rng.random() < 0.3:  # else both ways are in the delay of the first
            await asyncio.sleep(self.net.delay())
        await self.op(before=False)
        if not self.connected or self.net.chance(self.net.faults.lost_answer):
            await self.no_answer(timeout_s, what)

    async def no_answer(self, timeout_s: float, what: str) -> None:
        await asyncio.sleep(timeout_s)
        if not self.alive:
            await self.net.never()
        raise Unavailable(f"{what}: no answer within {timeout_s:g} s")


class Network:
    """What all processes share."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random, skew_s: float = 0.0) -> None:
        self.loop = loop
        self.rng = rng
        self.skew_s = skew_s
        self.faults = Faults()
        self.mortal: frozenset[str] = frozenset()
        self.down = False
        self.full = False
        #: The store has no leader: commands get through, writes do not.
        self.stalled = False
        self.bugs: list[BaseException] = []
        self.log = SharedLog(self)
        self.bucket = Bucket(self)
        self.servers: list[_Server] = []
        self.listeners: list[_Listener] = []
        self.readers: list[_NewsReader] = []
        self.health: list[tuple[datetime, HealthEvent]] = []
        self.followers: list[_Following] = []
        self.lease_holder = ""
        self.lease_epoch = 0
        self.lease_until = 0.0
        self._lease_sequence = 0
        self.traces: list[tuple[object, ...]] | None = None
        self.answered: Callable[[Request, bytes], None] = lambda request, raw: None

    def chance(self, probability: float) -> bool:
        """Draw."""
        return probability > 0 and self.rng.random() < probability

    def delay(self) -> float:
        """One way through the network, seconds."""
        if self.chance(self.faults.slow):
            return self.rng.uniform(0.02, 0.35)
        return self.rng.uniform(0.0002, 0.004)

    async def never(self) -> None:
        """Wait for good: what a dead process does."""
        await self.loop.create_future()

    def trace(self, *what: object) -> None:
        """Remember what happened, where a trace is wanted."""
        if self.traces is not None:
            self.traces.append((round(self.loop.time(), 4), *what))

    def lease(self, holder: str, renewing: int | None) -> int | None:
        """The lease's server side: the epoch where ``holder`` has it now, None where somebody else has."""
        now = self.loop.time()
        held = now < self.lease_until
        if renewing is not None:
            if not held or self.lease_holder != holder or self.lease_epoch != renewing:
                return None
        elif not held or self.lease_holder != holder:
            if held:
                return None
            self._lease_sequence += 1
            self.lease_epoch = self._lease_sequence
        self.lease_holder, self.lease_until = holder, now + LEASE_TTL_S
        return self.lease_epoch


# --- the event store ---------------------------------------------------------------------------------------------


class SharedLog:
    """The stored log. ``appended`` hears every batch in the moment in which it is stored."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.store = MemoryStore()
        self.appended: Callable[[tuple[Recorded, ...]], None] = lambda _: None
        self.tails: list[SimTail] = []

    @property
    def records(self) -> list[Recorded]:
        """All events."""
        return self.store.log

    def append(self, appends: Sequence[Append], context: Context) -> tuple[Recorded, ...]:
        """Store at once, or raise Conflict."""
        try:
            self.store.append(appends, context).send(None)
        except StopIteration as stored:
            batch: tuple[Recorded, ...] = stored.value
        else:
            raise AssertionError("the memory store waits for nothing")
        self.net.trace("append", context.command, *(r.event for r in batch))
        self.appended(batch)
        for tail in tuple(self.tails):
            tail.more()
        return batch


class SimTail:
    """Delivers to one process, in order, a few events at a time, never while it is cut off."""

    def __init__(self, process: Process, log: SharedLog, after: int, deliver: Callable[[Recorded], None]) -> None:
        self._process = process
        self._log = log
        self._next = after
        self._deliver = deliver
        self._scheduled = False
        self._open = True
        log.tails.append(self)

    def more(self) -> None:
        """There may be more to deliver."""
        if not self._scheduled and self._open:
            self._scheduled = True
            net = self._process.net
            net.loop.call_later(net.delay(), self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        if not self._open or not self._process.alive:
            self._drop()
            return
        records = self._log.records
        if not self._process.connected:  # goes on where it stopped, as soon as it is connected again
            self._scheduled = True
            self._process.net.loop.call_later(0.1, self._pump)
            return
        # A batch is stored at once, but its messages may arrive one by one.
        count = len(records) - self._next if self._process.net.chance(0.7) else 1
        for _ in range(min(count, 200, len(records) - self._next)):
            recorded = records[self._next]
            self._next += 1
            try:
                self._deliver(recorded)
            except Exception as e:  # noqa: BLE001  a fold that raises is a finding
                self._process.net.bugs.append(e)
                self._drop()
                return
        if self._next < len(records):
            self.more()

    def _drop(self) -> None:
        self._open = False
        if self in self._log.tails:
            self._log.tails.remove(self)

    async def close(self) -> None:
        """Stop."""
        self._drop()


class SimStore:
    """One process's :class:`~turnout.events.store.EventStore`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._log = process.net.log

    async def append(self, appends: Sequence[Append], context: Context) -> tuple[Recorded, ...]:
        process, net = self._process, self._process.net
        await process.op(before=True)
        await asyncio.sleep(net.delay())
        if not process.alive:
            await net.never()
        if net.full and process.connected:
            raise StoreFull("no room")
        if not process.connected or net.stalled or net.chance(net.faults.lost_request):
            if (
                process.connected and not net.stalled and net.chance(0.5)
            ):  # it is on its way still, and arrives after the sender's time-out
                net.loop.call_later(1.0 + net.rng.uniform(-0.5, LATE_S_MAX), self._late, tuple(appends), context)
            await process.no_answer(1.0, "append")
        batch = self._log.append(appends, context)
        await process.receive(1.0, "append")
        return batch

    def _late(self, appends: tuple[Append, ...], context: Context) -> None:
        if self._process.net.down or self._process.net.stalled:
            return
        try:
            self._log.append(appends, context)
        except Conflict:
            self._process.net.trace("late write refused", context.command)

    async def read(self, subject: str) -> tuple[Recorded, ...]:
        await self._process.send(1.0, "read")
        records = await self._log.store.read(subject)
        await self._process.receive(1.0, "read")
        return records

    async def last_sequence(self) -> int:
        await self._process.send(1.0, "last_sequence")
        last = len(self._log.records)
        await self._process.receive(1.0, "last_sequence")
        return last

    async def page(self, after: int) -> tuple[tuple[Recorded, ...], int]:
        await self._process.send(1.0, "page")
        page = await self._log.store.page(after)
        await self._process.receive(1.0, "page")
        return page

    async def tail(self, after: int, deliver: Callable[[Recorded], None], lost: Callable[[Exception], None]) -> SimTail:
        await self._process.send(1.0, "tail")
        tail = SimTail(self._process, self._log, after, deliver)
        tail.more()
        return tail


# --- commands ----------------------------------------------------------------------------------------------------


class _Server:
    def __init__(
        self, process: Process, handler: Callable[[str, str, Request], Awaitable[bytes]], servers: list[_Server]
    ) -> None:
        self.process = process
        self.handler = handler
        self._servers = servers
        servers.append(self)

    async def close(self) -> None:
        if self in self._servers:
            self._servers.remove(self)


class SimBus:
    """One process's :class:`~turnout.workers.ports.Bus`."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def serve(self, handler: Callable[[str, str, Request], Awaitable[bytes]]) -> _Server:
        await self._process.send(1.0, "subscribe")
        return _Server(self._process, handler, self._process.net.servers)

    async def ask(self, role: str, verb: str, request: Request, timeout_s: float = 5.0) -> Answer:
        process, net = self._process, self._process.net
        await process.send(timeout_s, verb)
        answered: asyncio.Future[bytes] = net.loop.create_future()
        if not self._hand_over(role, verb, request, answered):
            raise Unavailable(f"nobody answers {verb}")
        if net.chance(net.faults.duplicate):
            net.loop.call_later(net.rng.uniform(0, 3.0), self._hand_over, role, verb, request, net.loop.create_future())
        try:
            async with asyncio.timeout(timeout_s):
                raw = await answered
        except TimeoutError:
            raise Unavailable(f"{verb}: no answer within {timeout_s:g} s") from None
        await process.receive(timeout_s, verb)
        return _answers.decode(raw)

    def _hand_over(self, role: str, verb: str, request: Request, answered: asyncio.Future[bytes]) -> bool:
        net = self._process.net
        there = [s for s in net.servers if s.process.connected]
        if not there:
            return False
        server = net.rng.choice(there)
        server.process.spawn(self._serve(server, role, verb, request, answered))
        return True

    async def _serve(
        self, server: _Server, role: str, verb: str, request: Request, answered: asyncio.Future[bytes]
    ) -> None:
        await asyncio.sleep(self._process.net.delay())
        raw = await server.handler(role, verb, request)
        self._process.net.answered(request, raw)
        if server.process.connected and not answered.done():
            answered.set_result(raw)


# --- signs of life -----------------------------------------------------------------------------------------------


class _Listener:
    def __init__(self, process: Process, heard: Callable[[str, str, bytes], None]) -> None:
        self.process = process
        self.heard = heard
        process.net.listeners.append(self)

    async def close(self) -> None:
        if self in self.process.net.listeners:
            self.process.net.listeners.remove(self)


class SimBeats:
    """One process's :class:`~turnout.workers.ports.Beats`. Beats arrive at once or never."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def publish(self, kind: str, id: str, body: bytes) -> None:
        process, net = self._process, self._process.net
        await process.op(before=True)
        if process.connected and not net.chance(net.faults.lost_beat):
            for listener in tuple(net.listeners):
                if listener.process.connected:
                    listener.heard(kind, id, body)

    async def listen(self, heard: Callable[[str, str, bytes], None]) -> _Listener:
        await self._process.send(1.0, "subscribe")
        return _Listener(self._process, heard)


class SimNews:
    """One process's :class:`~turnout.workers.ports.RouteNews`: late, out of order, or never."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def tell(self, model: str, view: bytes) -> None:
        process, net = self._process, self._process.net
        await process.op(before=True)
        if not process.connected:
            return
        for reader in tuple(net.readers):
            if not net.chance(net.faults.lost_view):
                net.loop.call_later(net.delay(), reader.take, view)

    async def listen(self, heard: Callable[[bytes], None]) -> _NewsReader:
        await self._process.send(1.0, "subscribe")
        return _NewsReader(self._process, heard)


class _NewsReader:
    """One gateway that hears of routes."""

    def __init__(self, process: Process, heard: Callable[[bytes], None]) -> None:
        self._process = process
        self._heard = heard
        process.net.readers.append(self)

    def take(self, view: bytes) -> None:
        if self in self._process.net.readers and self._process.connected:
            self._heard(view)

    async def close(self) -> None:
        if self in self._process.net.readers:
            self._process.net.readers.remove(self)


# --- health ------------------------------------------------------------------------------------------------------


class _Following:
    """Delivers samples to one process, in order, never while it is cut off."""

    def __init__(self, process: Process, after: int, heard: Callable[[HealthEvent], None]) -> None:
        self._process = process
        self._next = after
        self._heard = heard
        self._scheduled = False
        process.net.followers.append(self)
        self.more()

    def more(self) -> None:
        """There may be more to deliver."""
        if not self._scheduled:
            self._scheduled = True
            self._process.net.loop.call_later(self._process.net.delay(), self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        net = self._process.net
        if not self._process.alive or self not in net.followers:
            return
        if not self._process.connected:
            self._scheduled = True
            net.loop.call_later(0.1, self._pump)
            return
        while self._next < len(net.health):
            self._next += 1
            self._heard(net.health[self._next - 1][1])

    async def close(self) -> None:
        """Stop."""
        if self in self._process.net.followers:
            self._process.net.followers.remove(self)


class SimHealth:
    """One process's HealthWriter and HealthReader. A sample of a process that is cut off is lost."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.dropped = 0

    async def publish(self, event: HealthEvent) -> None:
        net = self._process.net
        if not self._process.connected or net.full:
            self.dropped += 1
        else:
            net.health.append((self._process.now(), event))
            for follower in tuple(net.followers):
                follower.more()

    async def follow(self, since: datetime, heard: Callable[[HealthEvent], None]) -> _Following:
        await self._process.send(1.0, "follow")
        records = self._process.net.health
        after = next((n for n, (at, _) in enumerate(records) if at >= since), len(records))
        return _Following(self._process, after, heard)


# --- views -------------------------------------------------------------------------------------------------------


class Bucket:
    """The stored views. A commit is one atomic batch, refused where another one came first."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.entries: dict[str, ViewEntry] = {}
        self.checkpoint: Checkpoint | None = None
        self.revision = 0
        self.sequence = 0
        self.watches: list[_Watch] = []

    def commit(self, views: Mapping[str, bytes | None], checkpoint: Checkpoint, expected: int) -> int:
        if expected != self.revision:
            raise Conflict("another projector has written")
        for key, value in views.items():
            self.sequence += 1
            self.entries[key] = ViewEntry(key, value or b"", self.sequence)
        self.sequence += 1
        self.revision, self.checkpoint = self.sequence, checkpoint
        for watch in tuple(self.watches):
            watch.committed({key: self.entries[key] for key in views}, checkpoint.sequence)
        return self.revision

    def values(self) -> dict[str, bytes]:
        """Every stored view."""
        return {key: entry.value for key, entry in self.entries.items() if entry.value}

    def matching(self, keys: tuple[str, ...]) -> dict[str, ViewEntry]:
        return {key: entry for key, entry in self.entries.items() if entry.value and _matches(key, keys)}


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(key == p or (p.endswith(".*") and key.startswith(p[:-1])) for p in patterns)


class _Watch:
    """One reader's copy: commits in their order; a missed one is healed by a snapshot."""

    def __init__(
        self, process: Process, keys: tuple[str, ...], changed: Callable[[Mapping[str, ViewEntry], int], None]
    ) -> None:
        self._process = process
        self._keys = keys
        self._changed = changed
        self._held: dict[str, ViewEntry] = {}
        self._queue: list[tuple[dict[str, ViewEntry], int]] = []
        self._scheduled = False
        self._stale = False
        self._open = True
        process.net.bucket.watches.append(self)

    def begin(self) -> None:
        """The first snapshot, before ``watch`` returns."""
        bucket = self._process.net.bucket
        self._held = bucket.matching(self._keys)
        self._changed(dict(self._held), bucket.checkpoint.sequence if bucket.checkpoint else 0)

    def committed(self, entries: dict[str, ViewEntry], sequence: int) -> None:
        net = self._process.net
        if not self._process.connected or net.chance(net.faults.lost_view):
            self._stale = True
        else:
            self._queue.append(({k: e for k, e in entries.items() if _matches(k, self._keys)}, sequence))
        if not self._scheduled:
            self._scheduled = True
            net.loop.call_later(0.1 if self._stale else net.delay(), self._pump)

    async def close(self) -> None:
        self._open = False
        if self in self._process.net.bucket.watches:
            self._process.net.bucket.watches.remove(self)

    def _pump(self) -> None:
        process, net = self._process, self._process.net
        self._scheduled = False
        if not self._open or not process.alive:
            if self in net.bucket.watches:
                net.bucket.watches.remove(self)
            return
        if not process.connected:
            self._stale = True
            self._queue.clear()
            self._scheduled = True
            net.loop.call_later(0.1, self._pump)
            return
        if self._stale:
            self._snapshot()
            return
        queue, self._queue = self._queue, []
        for entries, sequence in queue:
            fresh = {k: e for k, e in entries.items() if k not in self._held or e.sequence > self._held[k].sequence}
            self._held.update(fresh)
            self._tell(fresh, sequence)

    def _snapshot(self) -> None:
        bucket = self._process.net.bucket
        self._stale = False
        self._queue.clear()
        now = bucket.matching(self._keys)
        changes = {k: e for k, e in now.items() if self._held.get(k) != e}
        for key in self._held.keys() - now.keys():
            changes[key] = ViewEntry(key, b"", bucket.revision)
        self._held = now
        self._tell(changes, bucket.checkpoint.sequence if bucket.checkpoint else 0)

    def _tell(self, changes: dict[str, ViewEntry], sequence: int) -> None:
        try:
            self._changed(changes, sequence)
        except Exception as e:  # noqa: BLE001  a reader that raises is a finding
            self._process.net.bugs.append(e)


class SimViews:
    """One process's :class:`~turnout.workers.ports.ViewReader` and ``ViewWriter``."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._bucket = process.net.bucket

    async def watch(self, keys: tuple[str, ...], changed: Callable[[Mapping[str, ViewEntry], int], None]) -> _Watch:
        await self._process.send(1.0, "watch")
        watch = _Watch(self._process, keys, changed)
        watch.begin()
        return watch

    async def snapshot(self, keys: tuple[str, ...]) -> tuple[Mapping[str, ViewEntry], Checkpoint | None]:
        await self._process.send(1.0, "snapshot")
        taken = self._bucket.matching(keys), self._bucket.checkpoint
        await self._process.receive(1.0, "snapshot")
        return taken

    async def checkpoint(self) -> tuple[Checkpoint | None, int]:
        await self._process.send(1.0, "checkpoint")
        stored = self._bucket.checkpoint, self._bucket.revision
        await self._process.receive(1.0, "checkpoint")
        return stored

    async def commit(self, views: Mapping[str, bytes | None], checkpoint: Checkpoint, expected: int) -> int:
        await self._process.send(1.0, "commit")
        revision = self._bucket.commit(views, checkpoint, expected)
        await self._process.receive(1.0, "commit")
        return revision


class SimLease:
    """One process's :class:`~turnout.workers.ports.Lease`."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def acquire(self, holder: str) -> Grant | None:
        return await self._ask(holder, None)

    async def renew(self, holder: str, grant: Grant) -> Grant | None:
        return await self._ask(holder, grant.epoch)

    async def release(self, holder: str, grant: Grant) -> None:
        await self._process.send(0.5, "release")
        net = self._process.net
        if net.lease_holder == holder and net.lease_epoch == grant.epoch:
            net.lease_until = 0.0

    async def _ask(self, holder: str, epoch: int | None) -> Grant | None:
        start = self._process.monotonic()
        await self._process.send(0.5, "lease")
        granted = self._process.net.lease(holder, epoch)
        await self._process.receive(0.5, "lease")
        # half a second less than the server's, as the NATS adapter does
        return None if granted is None else Grant(granted, start + LEASE_TTL_S - 0.5)


def _nothing() -> None:
    """Nobody wants to hear of it."""
