"""The event store on NATS JetStream: appends with an expected sequence, reads of one subject, the gap-free tail.

With events/jsapi.py the one place of this folder that touches the world. Knows nothing of what events mean, nor of how
the connection was made (workers/nats.py). An event is stored with three headers: its type, its envelope, and the
sequence that the server checks; more would slow every replay, because the client reads headers line by line.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import nats.errors
import structlog

from turnout.events import jsapi, subjects
from turnout.events.codec import Damaged, decode, record
from turnout.events.envelope import ENVELOPE_HEADER, TYPE_HEADER, Recorded
from turnout.events.store import Conflict, LogReplaced, StoreFull, Unavailable, check_appends

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from turnout.events.codec import Context
    from turnout.events.store import Append

log = structlog.get_logger()

STREAM = "EVENTS"
PULL_BATCH = 4000
HEARTBEAT_S = 1.0
#: How often the tail looks at its connection and its silence.
WATCH_S = 0.1
#: Heartbeats that may be missing before the tail takes its consumer for dead.
SILENT_HEARTBEATS = 2.5
#: How long an abandoned consumer lives on the server. A stream has room for 1000.
CONSUMER_IDLE_S = 30.0


_TYPE = f"\r\n{TYPE_HEADER}:".encode()
_ENVELOPE = f"\r\n{ENVELOPE_HEADER}:".encode()
#: The two headers in the order in which ``append`` writes them.
_AS_WRITTEN = re.compile(_TYPE + rb" ([^\r]*)" + _ENVELOPE + rb" ([^\r]*)\r\n")


class JetStreamStore:
    """An :class:`~turnout.events.store.EventStore` on one JetStream stream.

    Args:
        nc: a connection that reconnects for ever and buffers nothing while it is away.
        stream: name of the stream.
        replicas: of the stream. With more than one, ``read`` asks the stream's leader as well, because any replica
            may answer a direct get.
        timeout_s: for one answer of the server.
    """

    def __init__(self, nc: jsapi.Client, stream: str = STREAM, *, replicas: int = 1, timeout_s: float = 2.0) -> None:
        self._nc = nc
        self._stream = stream
        self._replicas = replicas
        self._timeout_s = timeout_s

    async def append(self, appends: Sequence[Append], context: Context) -> tuple[Recorded, ...]:
        """Store all events or none. See the port."""
        check_appends(appends)
        messages: list[jsapi.Message] = []
        recorded: list[Recorded] = []
        for a in appends:
            position = a.expected
            headers = {jsapi.EXPECTED_HEADER: str(a.expected.sequence)}  # on the first message of its subject only
            for event in a.events:
                name, envelope, body = record(a.subject, event, context, len(messages), position)
                headers |= {TYPE_HEADER: name, ENVELOPE_HEADER: envelope.decode()}
                messages.append(jsapi.Message(a.subject, body, headers))
                recorded.append(decode(a.subject, 0, name, envelope, body))
                position, headers = recorded[-1].position, {}
        last = await self._store(messages)
        first = last - len(messages) + 1
        return tuple(msgspec.structs.replace(r, sequence=first + n) for n, r in enumerate(recorded))

    async def _store(self, messages: list[jsapi.Message]) -> int:
        try:
            if len(messages) == 1:  # a batch of one costs several times a plain publish
                return await jsapi.publish(self._nc, messages[0], self._timeout_s)
            return await jsapi.publish_batch(self._nc, messages, self._timeout_s)
        except jsapi.Refused as e:
            if e.code in jsapi.CONFLICTS:
                raise Conflict(e.text) from e
            if e.code in jsapi.FULL:
                raise StoreFull(
                    f"the event log has no room ({e.text}): free disk space or raise the limit of stream {self._stream}"
                    ", and restart a nats-server that met a full disk (turnout up does that itself)"
                ) from e
            raise Unavailable(f"the event log refused a write: {e}") from e

    async def read(self, subject: str) -> tuple[Recorded, ...]:
        """All events of one subject, oldest first. As new as the newest append."""
        found: list[Recorded] = []
        try:
            newest = await self._newest(subject) if self._replicas > 1 else None
            pending = 1
            while pending:
                query = {
                    "seq": found[-1].sequence + 1 if found else 1,
                    "next_by_subj": subject,
                    "batch": jsapi.BATCH_LIMIT,
                }
                got = await jsapi.direct_get(self._nc, self._stream, query, self._timeout_s)
                found += [_got(message) for message in got.messages]
                pending = got.pending
            if newest is not None:
                await self._complete(subject, found, newest)
        except jsapi.Refused as e:
            raise Unavailable(f"the event log cannot be read: {e}") from e
        return tuple(found)

    async def _newest(self, subject: str) -> int:
        """Sequence of a subject's newest event, from the stream's leader; 0 where there is none."""
        try:
            answer = await jsapi.api(
                self._nc, f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": subject}, self._timeout_s
            )
        except jsapi.Refused as e:
            if e.code == jsapi.NOT_FOUND:
                return 0
            raise
        return int(answer["message"]["seq"])

    async def _complete(self, subject: str, found: list[Recorded], newest: int) -> None:
        """Take from the leader, one by one, what a replica that lags did not have yet."""
        while (found[-1].sequence if found else 0) < newest:
            after = found[-1].sequence + 1 if found else 1
            query = {"seq": after, "next_by_subj": subject}
            answer = await jsapi.api(self._nc, f"STREAM.MSG.GET.{self._stream}", query, self._timeout_s)
            found.append(_leader_message(answer["message"]))

    async def last_sequence(self) -> int:
        """Sequence of the newest event of the log, 0 where it is empty."""
        try:
            info = await jsapi.api(self._nc, f"STREAM.INFO.{self._stream}", None, self._timeout_s)
        except jsapi.Refused as e:
            raise Unavailable(f"the event log gives no account of itself: {e}") from e
        return int(info["state"]["last_seq"])

    async def page(self, after: int) -> tuple[tuple[Recorded, ...], int]:
        """The next events above ``after``, and how many there are behind them. See the port."""
        query = {"seq": after + 1, "next_by_subj": f"{subjects.EVENTS}.>", "batch": jsapi.BATCH_LIMIT}
        try:
            got = await jsapi.direct_get(self._nc, self._stream, query, self._timeout_s)
        except jsapi.Refused as e:
            raise Unavailable(f"the event log cannot be read: {e}") from e
        events = tuple(_got(message) for message in got.messages)
        for expected, one in enumerate(events, after + 1):
            if one.sequence != expected:
                raise _hole(self._stream, expected, one.sequence)
        return events, got.pending

    async def tail(self, after: int, deliver: Callable[[Recorded], None], lost: Callable[[Exception], None]) -> Tail:
        """Deliver every event above ``after``, once, in order, for ever. See the port.

        Returns as soon as the tail has begun; it keeps trying while the server is away.
        """
        return Tail(self._nc, self._stream, after, deliver, lost, self._timeout_s)


def _hole(stream: str, missing: int, then: int) -> Damaged:
    """Nothing is ever deleted from the log, so the files of its stream were changed or have lost something."""
    gone = f"events {missing} to {then - 1} are gone" if then else "some events are gone"
    return Damaged(f"stream {stream} is damaged: {gone}; restore the store folder from a backup")


def _got(message: Msg) -> Recorded:
    headers = message.headers or {}
    subject, sequence = headers["Nats-Subject"], int(headers["Nats-Sequence"])
    name, envelope = headers.get(TYPE_HEADER, ""), headers.get(ENVELOPE_HEADER, "")
    return decode(subject, sequence, name, envelope.encode(), message.data)


def _decode(subject: str, sequence: int, block: bytes, body: bytes) -> Recorded:
    """Read an event with its header block as it came: one search instead of a table of all headers."""
    found = _AS_WRITTEN.search(block)
    name, envelope = found.groups() if found else (_header(block, _TYPE), _header(block, _ENVELOPE))
    return decode(subject, sequence, name.decode(), envelope, body)


def _header(block: bytes, name: bytes) -> bytes:
    """Value of one header, empty where it is missing (then the event is reported as damaged)."""
    start = block.find(name)
    if start < 0:
        return b""
    start += len(name)
    return block[start : block.find(b"\r\n", start)].strip()


def _leader_message(message: dict[str, Any]) -> Recorded:
    """The JSON form of a message: base64 body and header block."""
    block = msgspec.convert(message.get("hdrs", ""), bytes)
    body = msgspec.convert(message.get("data", ""), bytes)
    return _decode(message["subject"], message["seq"], block, body)


class Tail:
    """A running delivery of one stream, by its own pull consumers, one after the other.

    Source of the recipe: measured with kill -9, freezes and leader loss; nats-py's ordered consumers stay silent for
    up to 18 s after a restart, and lose messages for good when they overflow. Here the pull size bounds what is under
    way, so nothing can overflow, and each event must have the number after the one before: the log has no holes.
    """

    def __init__(
        self,
        nc: jsapi.Client,
        stream: str,
        after: int,
        deliver: Callable[[Recorded], None],
        lost: Callable[[Exception], None],
        timeout_s: float,
    ) -> None:
        self._nc = nc
        self._stream = stream
        self._next = after + 1
        self._deliver = deliver
        self._lost = lost
        self._timeout_s = timeout_s
        self._created: str | None = None
        self._consumer: _Consumer | None = None
        self._ended = False
        self._fresh = True
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop; nothing is delivered after it returns."""
        self._ended = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        complained = False
        while not self._ended:
            try:
                await self._check()
                self._fresh = True
                self._consumer = _Consumer(self._nc, self._stream, self._take)
                await self._consumer.open(self._next, self._timeout_s)
                complained = False
                await self._consumer.watch()
            except (LogReplaced, Damaged) as e:
                self._end(e)
            except (Unavailable, jsapi.Refused) as e:
                if not complained:  # once for each outage
                    log.warning("tail_waits", stream=self._stream, next=self._next, reason=str(e))
                complained = True
            except Exception as e:  # noqa: BLE001  a bug here must not end in silence
                self._end(e)
            finally:
                if self._consumer is not None:
                    await self._consumer.close()
                    self._consumer = None
            if not self._ended:
                await asyncio.sleep(WATCH_S)

    async def _check(self) -> None:
        """Is it still the log that was read? A consumer would skip re-used sequences silently."""
        info = await jsapi.api(self._nc, f"STREAM.INFO.{self._stream}", None, self._timeout_s)
        created, state = str(info["created"]), info["state"]
        if self._created is not None and created != self._created:
            raise LogReplaced(f"stream {self._stream} was made anew at {created}; the one read before is gone")
        self._created = created
        if state["last_seq"] < self._next - 1:
            raise LogReplaced(
                f"stream {self._stream} ends at {state['last_seq']}, but was read up to {self._next - 1} before"
            )
        if state["messages"] != state["last_seq"]:
            raise _hole(self._stream, self._next, state["first_seq"] if state["first_seq"] > self._next else 0)

    def _take(self, sequence: int, subject: bytes, block: bytes, body: bytes) -> bool:
        """Deliver one event; False where it is not the next one."""
        if sequence != self._next or self._ended:
            if sequence > self._next and self._fresh:  # not lost on the way: a new consumer begins with what there is
                self._end(_hole(self._stream, self._next, sequence))
            return False
        try:
            self._deliver(_decode(subject.decode(), sequence, block, body))
        except Exception as e:  # noqa: BLE001  it must not go on with the next event, nor end the connection
            self._end(e)
            return False
        self._next = sequence + 1
        self._fresh = False
        return True

    def _end(self, why: Exception) -> None:
        if not self._ended:
            self._ended = True
            self._lost(why)


_Take = Callable[[int, bytes, bytes, bytes], bool]


class _Consumer:
    """One pull consumer, from its creation until anything at all looks wrong with it."""

    def __init__(self, nc: jsapi.Client, stream: str, take: _Take) -> None:
        self._nc = nc
        self._stream = stream
        self._take = take
        self._name = jsapi.unique(nc)
        self._inbox = nc.new_inbox()
        self._answers: Subscription | None = None
        self._asking: asyncio.Task[None] | None = None
        self._asked = 0
        self._heard = True
        self._broken = False
        self._reconnects = nc.stats["reconnects"]

    async def open(self, start: int, timeout_s: float) -> None:
        """Create it on the server and ask for the first messages.

        Raises:
            Unavailable: no clear answer.
            Refused: the server would not.
        """
        config = {
            "name": self._name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": start,
            "ack_policy": "none",
            "replay_policy": "instant",
            "mem_storage": True,
            "num_replicas": 1,
            "max_deliver": -1,
            "inactive_threshold": int(CONSUMER_IDLE_S * 1e9),
        }
        try:
            self._answers = await self._nc.subscribe_raw(self._inbox, self._receive)
        except (nats.errors.Error, OSError) as e:
            raise Unavailable(f"the connection to NATS went away ({e})") from e
        body = {"stream_name": self._stream, "action": "create", "config": config}
        await jsapi.api(self._nc, f"CONSUMER.CREATE.{self._stream}.{self._name}", body, timeout_s)
        await self._ask()

    async def watch(self) -> None:
        """Return when the consumer must be replaced."""
        quiet_s = 0.0
        while not self._broken and self._nc.stats["reconnects"] == self._reconnects:
            await asyncio.sleep(WATCH_S)
            quiet_s = 0.0 if self._heard else quiet_s + WATCH_S
            self._heard = False
            if quiet_s > SILENT_HEARTBEATS * HEARTBEAT_S:
                log.warning("tail_silent", stream=self._stream, consumer=self._name)
                return

    async def close(self) -> None:
        """Stop receiving. The server forgets the consumer at once, or after its idle time."""
        self._broken = True
        if self._asking is not None:
            self._asking.cancel()
        if self._answers is None or self._nc.is_closed:
            return
        try:
            await self._nc.unsubscribe_raw(self._answers)
            # the server takes no request without a reply subject; nobody waits for this one's answer
            gone = f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._name}"
            await self._nc.publish(gone, reply=self._nc.new_inbox())
        except (nats.errors.Error, OSError):
            return  # not connected: nothing is received, and the server's idle time does the rest

    def _receive(self, subject: bytes, reply: bytes, block: bytes, body: bytes) -> None:
        self._heard = True
        if self._broken:
            return
        if reply.startswith(b"$JS.ACK."):
            # $JS.ACK.….<delivered>.<stream seq>.<consumer seq>.<time>.<pending>: counted from the end, the same in v2
            if not self._take(int(reply.rsplit(b".", 4)[1]), subject, block, body):
                self._broken = True
                return
            self._asked -= 1
        elif not self._go_on(block):
            self._broken = True
            return
        if self._asked <= PULL_BATCH // 2 and (self._asking is None or self._asking.done()):
            self._asking = asyncio.get_running_loop().create_task(self._ask())

    def _go_on(self, block: bytes) -> bool:
        """Take a message of the server itself, ``NATS/1.0 <status> <text>``; False where the consumer is no more."""
        status, _, text = block[len(b"NATS/1.0") : block.find(b"\r\n")].strip().partition(b" ")
        if status == b"100":  # heartbeat
            return True
        if status in {b"404", b"408"} or (status == b"409" and text.startswith(b"Batch Completed")):
            unused = _header(block, b"\r\nNats-Pending-Messages:")
            self._asked = max(0, self._asked - int(unused or PULL_BATCH))
            return True
        return False

    async def _ask(self) -> None:
        more = PULL_BATCH - self._asked
        query = {"batch": more, "expires": int(CONSUMER_IDLE_S * 1e9), "idle_heartbeat": int(HEARTBEAT_S * 1e9)}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._name}"
        try:
            self._asked += more
            await self._nc.publish(subject, msgspec.json.encode(query), reply=self._inbox)
        except (nats.errors.Error, OSError):
            self._broken = True
