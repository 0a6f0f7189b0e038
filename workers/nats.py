"""The control plane on NATS: the connection, the streams, and the adapters of workers/ports.py.

Knows NATS and nothing of what commands, views and events mean. What stands here about the server and its client was
measured with nats-server 2.15.1 and nats-py 2.16.0, with kill -9, freezes and lost leaders.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import msgspec
import nats.errors
import structlog

from turnout.core.decider import Answer, Failed, Rejected
from turnout.events import health, jsapi, subjects
from turnout.events.store import Conflict, StoreFull, Unavailable
from turnout.workers.embedded import FLOOR, dotted, parse_version
from turnout.workers.ports import Checkpoint, Grant, Request, ViewEntry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime

    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from turnout.events.health import HealthEvent
    from turnout.workers.clock import Clock

log = structlog.get_logger()

CONNECT_S = 3.0
ANSWER_S = 2.0
#: Layout of everything that turnout stores in NATS; streams carry it. A server with another one is refused.
LAYOUT = "1"
LAYOUT_KEY = "turnout_layout"
#: Atomic batch without storing the commit needs 4; older servers lack it.
API_LEVEL = 4
QUEUE = "turnout"
CHECKPOINT_KEY = "_ckpt"
#: How often a reader looks at its connection, and how often it compares its checkpoint with the stored one.
WATCH_S = 0.1
COMPARE_S = 15.0
#: A holder stops acting this long before the server lets the lease go.
LEASE_MARGIN_S = 0.5
#: Header of a checkpoint that is not the end of a commit: the commit has more keys than one batch takes.
MORE_HEADER = "Turnout-More"
_OPERATION = "KV-Operation"
_REMOVED = "DEL"


class Incompatible(Exception):
    """The server, or what it holds, is not for this turnout; the message says what to do."""


# --- connection --------------------------------------------------------------------------------------------------


class Connection:
    """One connection to NATS that comes back by itself.

    Attributes:
        nc: the nats-py client, for JetStreamStore.
        slow: how many messages were dropped because this process was too slow; a reader of views starts anew then.
    """

    def __init__(self, url: str, clock: Clock, away_s: float, away: Callable[[str], None] | None) -> None:
        self.nc = jsapi.Client()
        self.slow = 0
        self.server = _public(url)
        self._clock = clock
        self._away_s = away_s
        self._away = away
        self._closing = False
        self._watch: asyncio.Task[None] | None = None
        self._last_error = ""
        self._away_since: float | None = None
        self._told = False

    @property
    def connected(self) -> bool:
        """Is there a connection now?"""
        return self.nc.is_connected

    @property
    def disturbances(self) -> tuple[int, int]:
        """Changes whenever core messages may have been lost."""
        return (self.nc.stats["reconnects"], self.slow)

    async def close(self) -> None:
        """Close for good."""
        self._closing = True
        if self._watch is not None:
            self._watch.cancel()
        await self.nc.close()

    async def open(self, url: str, name: str) -> None:
        """Connect; used by :func:`connect`."""
        try:
            async with asyncio.timeout(CONNECT_S):
                await self.nc.connect(
                    servers=url.split(","),
                    name=name,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.25,  # type: ignore[arg-type]  # annotated int, used as seconds
                    connect_timeout=1,
                    ping_interval=2,
                    max_outstanding_pings=2,  # a frozen server is noticed after about 6 s
                    pending_size=0,  # nothing is kept back to be written after a reconnect: the caller decides again
                    error_cb=self._error,
                    disconnected_cb=self._disconnected,
                    reconnected_cb=self._reconnected,
                    closed_cb=self._closed,
                )
        except (TimeoutError, OSError, nats.errors.Error) as e:
            self._closing = True
            with contextlib.suppress(nats.errors.Error, OSError):
                await self.nc.close()
            hint = "check the user and password in the address, and that it is a nats-server"
            raise Unavailable(_unreachable(self.server, self._last_error or str(e), hint)) from e
        self._watch = asyncio.get_running_loop().create_task(self._watch_connection())

    async def _watch_connection(self) -> None:
        """Say once for each outage that it lasts too long: nats-py itself would try for ever, in silence."""
        while True:
            await asyncio.sleep(self._away_s / 10)
            if self.nc.is_connected:
                self._away_since = None
                continue
            now = self._clock.monotonic()
            if self._away_since is None:
                self._away_since = now
                self._told = False
            if not self._told and now - self._away_since > self._away_s:
                self._told = True
                self._tell(f"no connection to NATS at {self.server} for {self._away_s:g} s: {self._last_error}")

    def _tell(self, reason: str) -> None:
        log.error("nats_away", server=self.server, reason=reason)
        if self._away is not None:
            self._away(reason)

    async def _error(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, nats.errors.SlowConsumerError):
            self.slow += 1
            log.warning("nats_slow_consumer", subject=error.subject)
        elif isinstance(error, nats.errors.Error | OSError | TimeoutError):
            if text != self._last_error and not self._closing:  # one line for each kind of trouble, not one per try
                log.warning("nats_error", server=self.server, error=text)
            self._last_error = text
        else:
            log.error("nats_callback_failed", exc_info=error)  # a bug of ours: loud

    async def _disconnected(self) -> None:
        if not self._closing:
            log.warning("nats_disconnected", server=self.server)

    async def _reconnected(self) -> None:
        self._last_error = ""
        self._away_since = None
        log.info("nats_reconnected", server=self.server)

    async def _closed(self) -> None:
        if not self._closing:
            self._tell(f"NATS at {self.server} ended the connection for good: {self.nc.last_error}")


async def connect(
    url: str,
    name: str,
    clock: Clock,
    *,
    away_s: float = 30.0,
    away: Callable[[str], None] | None = None,
) -> Connection:
    """Connect to NATS; the connection then comes back by itself after every outage.

    Args:
        url: one address or several with commas, ``nats://user:password@host:port``.
        name: of this process, as the server's tools show it.
        clock: for the watchdog.
        away_s: seconds without a connection after which ``away`` is called, once for each outage.
        away: gets the reason. Also called where the server ended the connection for good: only a new process, or a
            new connection, helps then.

    Raises:
        Unavailable: no server answers, or it lets us not in; the message says what to do.
    """
    connection = Connection(url, clock, away_s, away)
    if not await _any_listens(url):
        hint = "check the address (--nats) and that the server runs; `turnout up` brings its own"
        raise Unavailable(_unreachable(connection.server, "nothing listens there", hint))
    await connection.open(url, name)
    return connection


async def _any_listens(url: str) -> bool:
    """Probe before nats-py does: its first failing try waits, and prints."""
    for one in url.split(","):
        parts = urlsplit(one if "//" in one else f"nats://{one}")
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                _, writer = await asyncio.open_connection(parts.hostname or "127.0.0.1", parts.port or 4222)
                writer.close()
                return True
    return False


def _public(url: str) -> str:
    """The address without user and password, for messages."""
    return ",".join(one.rpartition("@")[2].removeprefix("nats://") for one in url.split(","))


def _unreachable(server: str, why: str, hint: str) -> str:
    return f"cannot connect to NATS at {server}: {why}; {hint}"


# --- streams -----------------------------------------------------------------------------------------------------

_MINUTE_NS = 60_000_000_000
_DAY_NS = 24 * 60 * _MINUTE_NS

STREAMS: tuple[dict[str, Any], ...] = (
    {
        "name": "EVENTS",
        "subjects": [f"{subjects.EVENTS}.>"],
        "retention": "limits",
        "storage": "file",
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "discard": "new",  # a full log refuses writes, it does not forget
        "deny_delete": True,
        "deny_purge": True,
        "allow_direct": True,
        "allow_atomic": True,
        "duplicate_window": 2 * _MINUTE_NS,
    },
    {
        "name": "KV_VIEWS",
        "subjects": [f"{subjects.VIEWS}.>"],
        "retention": "limits",
        "storage": "file",
        "max_msgs_per_subject": 1,
        "discard": "new",
        "deny_delete": True,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "allow_atomic": True,
        "republish": {"src": f"{subjects.VIEWS}.>", "dest": f"{subjects.LIVE_VIEWS}.>"},
    },
    {
        "name": "KV_LEASES",
        "subjects": [f"{subjects.LEASES}.>"],
        "retention": "limits",
        "storage": "file",
        "max_msgs_per_subject": 1,
        "discard": "new",
        "deny_delete": True,
        "allow_rollup_hdrs": True,
        "allow_msg_ttl": True,
        "allow_direct": True,
    },
    {
        "name": "HEALTH",
        "subjects": [f"{subjects.HEALTH}.>"],
        "retention": "limits",
        "storage": "file",
        "max_age": 7 * _DAY_NS,
        "max_msgs": 200_000,  # some 300 MB; a limit in bytes would be reserved, and a small disk refuses that
        "discard": "old",  # evidence grows old; what a verdict was made from stands in the verdict
        "allow_direct": True,
        "duplicate_window": 2 * _MINUTE_NS,
    },
)

#: What an operator may set as the site needs it.
_FREE = frozenset({"num_replicas", "max_bytes"})


async def ensure_streams(nc: jsapi.Client, replicas: int = 1, timeout_s: float = 5.0) -> int:
    """Make the streams that are missing, and check those that exist; returns how many replicas the event log has.

    Raises:
        Incompatible: the server is too old, or holds something else under one of the names.
        Unavailable: no answer.
    """
    await check_server(nc, timeout_s)
    found = {settings["name"]: await _stream(nc, settings["name"], timeout_s) for settings in STREAMS}
    if found["EVENTS"] is None and any(info["state"]["messages"] for info in found.values() if info is not None):
        raise Incompatible(
            "the event log (stream EVENTS) is missing, but what was made from it is there: restore the log from a "
            "backup, or use an empty store folder or another NATS account"
        )
    for settings in STREAMS:
        name = settings["name"]
        info = found[name] or await _create_stream(nc, settings, replicas, timeout_s)
        _check_stream(settings, info["config"])
        found[name] = info
    return int(found["EVENTS"]["config"]["num_replicas"]) if found["EVENTS"] is not None else replicas


async def check_server(nc: jsapi.Client, timeout_s: float = 5.0) -> None:
    """Is the server new enough, with JetStream on?

    Raises:
        Incompatible: it is not.
        Unavailable: no answer.
    """
    version = parse_version(repr(nc.connected_server_version).strip("<>").rpartition("v")[2])
    if version < FLOOR:
        raise Incompatible(
            f"nats-server {dotted(version)} is too old: turnout needs {dotted(FLOOR)} or newer; upgrade it"
        )
    try:
        info = await jsapi.api(nc, "INFO", None, timeout_s)
    except jsapi.Refused as e:
        raise Incompatible(f"JetStream is off for this account ({e.text}): see deploy/nats/server.conf") from e
    level = int(info.get("api", {}).get("level", 0))
    if level < API_LEVEL:
        raise Incompatible(
            f"nats-server has JetStream API level {level}; turnout needs {API_LEVEL}: upgrade every server"
        )


async def _stream(nc: jsapi.Client, name: str, timeout_s: float) -> dict[str, Any] | None:
    """The server's account of a stream, None where there is no such stream."""
    try:
        return await jsapi.api(nc, f"STREAM.INFO.{name}", None, timeout_s)
    except jsapi.Refused as e:
        if e.code == jsapi.STREAM_NOT_FOUND:
            return None
        raise Unavailable(f"stream {name} gives no account of itself: {e}") from e


def _check_stream(settings: dict[str, Any], config: dict[str, Any]) -> None:
    name = settings["name"]
    metadata: dict[str, str] = config.get("metadata") or {}
    layout = metadata.get(LAYOUT_KEY)
    if layout != LAYOUT:
        whose = f"has layout {layout}" if layout else "was not made by turnout"
        raise Incompatible(
            f"stream {name} on this server {whose}; this turnout needs layout {LAYOUT}: "
            "use the turnout version that made it, or another NATS account, or an empty store folder"
        )
    for key, value in settings.items():
        if key not in _FREE and not _same(config.get(key), value):
            raise Incompatible(
                f"stream {name} has {key} = {config.get(key)!r}, turnout needs {value!r}: "
                f"set it back (`nats stream edit {name}`), or use another NATS account or an empty store folder"
            )


def _same(found: object, wanted: object) -> bool:
    """The server leaves out what is at its default."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        inner = cast("dict[str, object]", found)
        return all(_same(inner.get(k), v) for k, v in cast("dict[str, object]", wanted).items())
    return found == wanted or (found is None and not wanted)


async def _create_stream(nc: jsapi.Client, settings: dict[str, Any], replicas: int, timeout_s: float) -> dict[str, Any]:
    name = settings["name"]
    body = {**settings, "num_replicas": replicas, "metadata": {LAYOUT_KEY: LAYOUT}}
    try:
        info = await jsapi.api(nc, f"STREAM.CREATE.{name}", body, timeout_s)
    except jsapi.Refused as e:
        raise Unavailable(f"stream {name} cannot be made: {e}") from e
    except Unavailable as e:
        raise Unavailable(
            f"stream {name} is missing and could not be made ({e}): where this account may not make streams, start the "
            "first controller with the account that may (deploy/nats)"
        ) from e
    log.info("stream_made", stream=name, replicas=replicas)
    return info


# --- commands ----------------------------------------------------------------------------------------------------


_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


class _Subscribed:
    """One subscription, and the work that its messages started."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.subscription: Subscription | None = None
        self.closed = False

    async def close(self) -> None:
        """Stop; what was begun is finished."""
        self.closed = True
        if self.subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self.subscription.unsubscribe()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class NatsBus:
    """:class:`~turnout.workers.ports.Bus`: request and reply, one answerer of the queue group for each command."""

    def __init__(self, connection: Connection) -> None:
        self._nc = connection.nc

    async def ask(self, role: str, verb: str, request: Request, timeout_s: float = 5.0) -> Answer:
        """Send a command and wait for its answer. See the port."""
        try:
            data = await jsapi.request(self._nc, subjects.command(role, verb), msgspec.json.encode(request), timeout_s)
        except Unavailable as e:
            raise Unavailable(
                f"no controller answered {verb} ({e}): check that one runs, then send it again with the same id"
            ) from e
        try:
            return _answers.decode(data)
        except msgspec.MsgspecError as e:
            raise Unavailable(f"the answer to {verb} cannot be read ({e}): do both sides run the same turnout?") from e

    async def serve(self, handler: Callable[[str, str, Request], Awaitable[bytes]]) -> _Subscribed:
        """Answer all commands; several may be in the handler at once. See the port."""
        served = _Subscribed()

        async def take(message: Msg) -> None:
            if not served.closed:
                task = asyncio.get_running_loop().create_task(self._answer(message, handler))
                served.tasks.add(task)
                task.add_done_callback(served.tasks.discard)

        served.subscription = await _subscribe(self._nc, f"{subjects.COMMANDS}.>", take, QUEUE)
        return served

    async def _answer(self, message: Msg, handler: Callable[[str, str, Request], Awaitable[bytes]]) -> None:
        role, verb = subjects.parse_command(message.subject)
        try:
            request = msgspec.json.decode(message.data, type=Request)
        except msgspec.MsgspecError as e:
            hint = 'send {"id": "…", "actor": "…", "body": {…}}; docs/protocol.md has examples'
            answer = msgspec.json.encode(Rejected("request_invalid", f"{verb}: {e}", hint))
        else:
            try:
                answer = await handler(role, verb, request)
            except Exception:  # the asker must hear of a bug, and the next command must still be answered
                log.exception("command_failed", role=role, verb=verb, command=request.id)
                answer = msgspec.json.encode(
                    Failed("bug", f"turnout failed on {verb}", "see the controller's log, and report it")
                )
        if message.reply:
            try:
                # never message.respond(): it copies the asker's headers, which a stream would obey
                await self._nc.publish(message.reply, answer)
            except (nats.errors.Error, OSError) as e:
                log.warning("answer_lost", verb=verb, reason=str(e))  # the asker asks again with the same id


async def _subscribe(
    nc: jsapi.Client, subject: str, take: Callable[[Msg], Awaitable[None]], queue: str = ""
) -> Subscription:
    """Subscribe; when it returns the server knows, so that what others send from now on arrives."""
    try:
        made = await nc.subscribe(subject, queue=queue, cb=take)  # pyright: ignore[reportUnknownMemberType]
    except (nats.errors.Error, OSError) as e:
        raise Unavailable(f"cannot subscribe {subject}: {e}") from e
    if nc.is_connected:  # else it is sent with the reconnect
        with contextlib.suppress(nats.errors.Error, OSError):
            await nc.flush(round(ANSWER_S))
    return made


# --- signs of life -----------------------------------------------------------------------------------------------


class NatsBeats:
    """:class:`~turnout.workers.ports.Beats` as plain messages."""

    def __init__(self, connection: Connection) -> None:
        self._nc = connection.nc

    async def publish(self, kind: str, id: str, body: bytes) -> None:
        """Say that it lives. Never raises."""
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._nc.publish(subjects.beat(kind, id), body)

    async def listen(self, heard: Callable[[str, str, bytes], None]) -> _Subscribed:
        """Hear every beat. See the port."""
        served = _Subscribed()

        async def take(message: Msg) -> None:
            if not served.closed:
                kind, id = subjects.parse_beat(message.subject)
                heard(kind, id, message.data)

        served.subscription = await _subscribe(self._nc, f"{subjects.BEATS}.*.*", take)
        return served


# --- news of routes ----------------------------------------------------------------------------------------------


class NatsRouteNews:
    """:class:`~turnout.workers.ports.RouteNews` as plain messages, heard inside the connection's read loop."""

    def __init__(self, connection: Connection) -> None:
        self._nc = connection.nc

    async def tell(self, model: str, view: bytes) -> None:
        """Send one. See the port."""
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._nc.publish(subjects.route_news(model), view)

    async def listen(self, heard: Callable[[bytes], None]) -> _Heard:
        """Hear every route. See the port."""

        def take(subject: bytes, reply: bytes, block: bytes, body: bytes) -> None:
            heard(body)

        try:
            return _Heard(self._nc, await self._nc.subscribe_raw(f"{subjects.ROUTE_NEWS}.*", take))
        except (nats.errors.Error, OSError) as e:
            raise Unavailable(f"cannot listen to news of routes: {e}") from e


class _Heard:
    """A raw subscription that can be ended."""

    def __init__(self, nc: jsapi.Client, subscription: Subscription) -> None:
        self._nc = nc
        self._subscription = subscription

    async def close(self) -> None:
        """Stop; nothing is called back after it returns."""
        if not self._nc.is_closed:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._nc.unsubscribe_raw(self._subscription)


# --- health samples ----------------------------------------------------------------------------------------------

_HEALTH_STREAM = "HEALTH"
_PULL = 500
_PULL_S = 30.0
_HEARTBEAT_S = 1.0
_SILENT_HEARTBEATS = 2.5
_MESSAGE_ID = "Nats-Msg-Id"


class NatsHealthWriter:
    """:class:`~turnout.workers.ports.HealthWriter`: stored by the stream, without asking whether it was."""

    def __init__(self, connection: Connection) -> None:
        self._nc = connection.nc
        self.dropped = 0

    async def publish(self, event: HealthEvent) -> None:
        """Send one. See the port."""
        subject = subjects.health(event.model, event.version)
        try:
            if not self._nc.is_connected:
                raise nats.errors.ConnectionClosedError
            await self._nc.publish(subject, health.encode(event), headers={_MESSAGE_ID: _message_id(event)})
        except (nats.errors.Error, OSError) as e:
            self.dropped += 1
            if self.dropped == 1 or self.dropped % 1000 == 0:
                log.warning("sample_dropped", subject=subject, dropped=self.dropped, reason=str(e))


def _message_id(event: HealthEvent) -> str:
    """The same sample sent twice is stored once."""
    if isinstance(event, health.HealthSampled | health.ShadowSampled):
        return f"{event.gateway}.{event.model}.{event.version}.{event.window}"
    return f"{event.instance}.{type(event).__name__}.{event.number}.{event.at.timestamp()}"


class NatsHealthReader:
    """:class:`~turnout.workers.ports.HealthReader`: pull consumers of its own, one after the other."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def follow(self, since: datetime, heard: Callable[[HealthEvent], None]) -> _HealthTail:
        """Deliver what was stored since then, then what comes. See the port."""
        return _HealthTail(self._connection, since, heard)


class _HealthTail:
    """One reader of the samples.

    The recipe of the event log's tail (events/jetstream.py), for a stream with an age limit: numbers may be missing
    between two messages of the stream, never between two of a consumer. Anything odd ends the consumer, and the next
    one begins behind the last message that was heard.
    """

    def __init__(self, connection: Connection, since: datetime, heard: Callable[[HealthEvent], None]) -> None:
        self._connection = connection
        self._nc = connection.nc
        self._since = since
        self._heard = heard
        self._next = 0  # stream sequence to go on with; 0 before the first message
        self._created = ""
        self._consumer = ""
        self._delivered = 0  # of this consumer
        self._asked = 0
        self._signs = 0
        self._over = True
        self._more = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop; nothing is called back after it returns."""
        self._over = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        complained = False
        while True:
            try:
                await self._check()
                await self._consume()
                complained = False
            except (Unavailable, jsapi.Refused, nats.errors.Error, OSError) as e:
                if not complained:  # once for each outage
                    log.warning("samples_wait", reason=str(e))
                complained = True
            await asyncio.sleep(WATCH_S)

    async def _check(self) -> None:
        """A stream that was made anew counts from 1 again: what it has is all new."""
        info = await jsapi.api(self._nc, f"STREAM.INFO.{_HEALTH_STREAM}", None, ANSWER_S)
        created, last = str(info["created"]), int(info["state"]["last_seq"])
        if (self._created and created != self._created) or last < self._next - 1:
            log.warning("samples_begin_anew", created=created, last=last, heard=self._next - 1)
            self._next = 1
        self._created = created

    async def _consume(self) -> None:
        """Hear by one consumer until it must be replaced."""
        self._consumer = jsapi.unique(self._nc)
        self._delivered = self._asked = self._signs = 0
        self._over = False
        disturbances = self._connection.disturbances
        inbox = self._nc.new_inbox()
        answers = await self._nc.subscribe_raw(inbox, self._receive)
        try:
            await self._create()
            quiet_s, signs = 0.0, 0
            while not self._over and self._connection.disturbances == disturbances:
                if self._asked <= _PULL // 2:
                    await self._ask(inbox)
                self._more.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(WATCH_S):
                        await self._more.wait()
                quiet_s, signs = (0.0 if self._signs != signs else quiet_s + WATCH_S), self._signs
                if quiet_s > _SILENT_HEARTBEATS * _HEARTBEAT_S:
                    log.warning("samples_silent", consumer=self._consumer)
                    return
        finally:
            self._over = True
            if not self._nc.is_closed:
                with contextlib.suppress(nats.errors.Error, OSError):
                    await self._nc.unsubscribe_raw(answers)
                    # the server takes no request without a reply subject; nobody waits for this one's answer
                    gone = f"$JS.API.CONSUMER.DELETE.{_HEALTH_STREAM}.{self._consumer}"
                    await self._nc.publish(gone, reply=self._nc.new_inbox())

    async def _create(self) -> None:
        start: dict[str, object] = {"deliver_policy": "by_start_sequence", "opt_start_seq": self._next}
        if not self._next:
            start = {"deliver_policy": "by_start_time", "opt_start_time": self._since.isoformat()}
        config = {
            "name": self._consumer,
            **start,
            "ack_policy": "none",
            "replay_policy": "instant",
            "mem_storage": True,
            "num_replicas": 1,
            "max_deliver": -1,
            "inactive_threshold": int(_PULL_S * 1e9),
        }
        body = {"stream_name": _HEALTH_STREAM, "action": "create", "config": config}
        await jsapi.api(self._nc, f"CONSUMER.CREATE.{_HEALTH_STREAM}.{self._consumer}", body, ANSWER_S)

    async def _ask(self, inbox: str) -> None:
        more = _PULL - self._asked
        query = {"batch": more, "expires": int(_PULL_S * 1e9), "idle_heartbeat": int(_HEARTBEAT_S * 1e9)}
        self._asked += more
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{_HEALTH_STREAM}.{self._consumer}"
        await self._nc.publish(subject, msgspec.json.encode(query), reply=inbox)

    def _receive(self, subject: bytes, reply: bytes, block: bytes, body: bytes) -> None:
        self._signs += 1
        if self._over:
            return
        if reply.startswith(b"$JS.ACK."):
            # $JS.ACK.….<delivered>.<stream seq>.<consumer seq>.<time>.<pending>: counted from the end
            _, sequence, delivered, _, _ = reply.rsplit(b".", 4)
            if int(delivered) != self._delivered + 1:
                self._end()
                return
            self._delivered += 1
            self._asked -= 1
            self._deliver(int(sequence), subject, body)
            if self._asked <= _PULL // 2:
                self._more.set()
        elif not self._go_on(block):
            self._end()

    def _deliver(self, sequence: int, subject: bytes, body: bytes) -> None:
        self._next = sequence + 1
        try:
            event = health.decode(body)
        except msgspec.MsgspecError as e:
            log.warning("sample_unreadable", subject=subject.decode(), sequence=sequence, reason=str(e))
            return
        try:
            self._heard(event)
        except Exception:  # a bug of whoever hears must not end the connection's reading
            log.exception("sample_unheard", subject=subject.decode(), sequence=sequence)

    def _go_on(self, block: bytes) -> bool:
        """Take a message of the server itself, ``NATS/1.0 <status> <text>``; False where the consumer is no more."""
        status, _, text = block[len(b"NATS/1.0") : block.find(b"\r\n")].strip().partition(b" ")
        if status == b"100":  # heartbeat
            return True
        if status in {b"404", b"408"} or (status == b"409" and text.startswith(b"Batch Completed")):
            self._asked = 0
            self._more.set()
            return True
        return False

    def _end(self) -> None:
        self._over = True
        self._more.set()


# --- views -------------------------------------------------------------------------------------------------------


class _Snapshot(msgspec.Struct):
    """Some keys of the bucket as it was at its sequence ``at``; removed ones are there with an empty value.

    ``unfinished``: a commit that takes several batches was under way.
    """

    at: int
    entries: dict[str, ViewEntry]
    checkpoint: Checkpoint | None = None
    checkpoint_at: int = 0
    unfinished: bool = False


async def _take_snapshot(nc: jsapi.Client, keys: tuple[str, ...]) -> _Snapshot:
    filters = [subjects.view(key) for key in (*keys, CHECKPOINT_KEY)]
    try:
        got = await jsapi.direct_get(nc, "KV_VIEWS", {"multi_last": filters}, ANSWER_S)
    except jsapi.Refused as e:
        if not e.text.startswith("413"):
            raise Unavailable(f"the views cannot be read: {e.text}") from e
        got = await _page(nc, keys)
    snapshot = _Snapshot(got.up_to, {})
    for message in got.messages:
        headers = message.headers or {}
        entry = _entry(headers, message.data)
        if entry.key == CHECKPOINT_KEY:
            snapshot.checkpoint = msgspec.json.decode(entry.value, type=Checkpoint)
            snapshot.checkpoint_at = entry.sequence
            snapshot.unfinished = MORE_HEADER in headers
        else:
            snapshot.entries[entry.key] = entry
    return snapshot


async def _page(nc: jsapi.Client, keys: tuple[str, ...]) -> jsapi.Got:
    """All views in pages, for more keys than one answer takes.

    A key that is written while we read moves to the end of the bucket, so it is met again on a later page: what stands
    at the end is the bucket as it was at the last page. (``up_to_seq`` would hide such a key altogether.)
    """
    newest: dict[str, Msg] = {}
    start, pending = 1, 1
    while pending:
        query = {"seq": start, "next_by_subj": f"{subjects.VIEWS}.>", "batch": jsapi.BATCH_LIMIT}
        try:
            got = await jsapi.direct_get(nc, "KV_VIEWS", query, ANSWER_S)
        except jsapi.Refused as e:
            raise Unavailable(f"the views cannot be read: {e.text}") from e
        for message in got.messages:
            entry = _entry(message.headers or {}, b"")
            start = entry.sequence + 1
            if entry.key == CHECKPOINT_KEY or _matches(entry.key, keys):
                newest[entry.key] = message
        pending = got.pending
    return jsapi.Got(list(newest.values()), start - 1)  # the newest message of a bucket is always there


def _entry(headers: dict[str, str], value: bytes) -> ViewEntry:
    key = headers["Nats-Subject"].removeprefix(f"{subjects.VIEWS}.")
    gone = headers.get(_OPERATION) == _REMOVED
    return ViewEntry(key, b"" if gone else value, int(headers["Nats-Sequence"]))


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    """NATS wildcards: ``*`` is one token, ``>`` at the end one or more."""
    return any(_match(key.split("."), pattern.split(".")) for pattern in patterns)


def _match(key: list[str], pattern: list[str]) -> bool:
    if pattern[-1] == ">":
        key, pattern = key[: len(pattern)], [*pattern[:-1], "*"]
    return len(key) == len(pattern) and all(p in ("*", k) for k, p in zip(key, pattern, strict=True))


class NatsViewReader:
    """:class:`~turnout.workers.ports.ViewReader`: a snapshot by direct get, then the bucket's republished writes."""

    def __init__(self, connection: Connection, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock

    async def watch(self, keys: tuple[str, ...], changed: Callable[[Mapping[str, ViewEntry], int], None]) -> _Watch:
        """Keep the caller's copy true. See the port."""
        watch = _Watch(self._connection, self._clock, keys, changed)
        await watch.start()
        return watch

    async def snapshot(self, keys: tuple[str, ...]) -> tuple[Mapping[str, ViewEntry], Checkpoint | None]:
        """The keys as they are now."""
        taken = await _take_snapshot(self._connection.nc, keys)
        return {key: entry for key, entry in taken.entries.items() if entry.value}, taken.checkpoint


class _Watch:
    """One reader's copy of some keys.

    Live messages are collected until the checkpoint that ends their commit, then taken over together. All keys of the
    bucket come by one subscription: several would be handled out of order, and so a sequence that is missing shows a
    lost message. That, a reconnect, a slow consumer and a stored checkpoint that is not ours lead to a new snapshot.
    """

    def __init__(
        self,
        connection: Connection,
        clock: Clock,
        keys: tuple[str, ...],
        changed: Callable[[Mapping[str, ViewEntry], int], None],
    ) -> None:
        self._connection = connection
        self._nc = connection.nc
        self._clock = clock
        self._keys = keys
        self._changed = changed
        self._held: dict[str, ViewEntry] = {}
        self._staged: dict[str, ViewEntry] = {}
        self._checkpoint: Checkpoint | None = None
        self._checkpoint_at = 0
        self._at: int = 0
        self._early: list[Msg] | None = []  # live messages that arrive while a snapshot is taken
        self._stale = True
        self._behind = 0
        self._disturbances = connection.disturbances
        self._live = _Subscribed()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribe, then take the first snapshot."""
        self._live.subscription = await _subscribe(self._nc, f"{subjects.LIVE_VIEWS}.>", self._take)
        try:
            await self._refresh()
        except Unavailable:
            await self._live.close()
            raise
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop; nothing is called back after it returns."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._live.close()

    async def _run(self) -> None:
        compare_at = self._clock.monotonic() + COMPARE_S
        complained = False
        while True:
            await asyncio.sleep(WATCH_S)
            if self._connection.disturbances != self._disturbances:
                self._stale = True
            due = self._clock.monotonic() >= compare_at
            if not self._connection.connected or not (self._stale or due):
                continue
            try:
                if due and not self._stale:
                    self._stale = (await _take_snapshot(self._nc, ())).checkpoint_at != self._checkpoint_at
                if self._stale:
                    await self._refresh()
                complained = False
            except Unavailable as e:
                if not complained:
                    log.warning("views_wait", reason=str(e))
                complained = True
                continue
            compare_at = self._clock.monotonic() + COMPARE_S

    async def _refresh(self) -> None:
        """Take a snapshot, and go on from it with the live messages that came meanwhile."""
        self._disturbances = self._connection.disturbances
        self._early = []
        try:
            snapshot = await _take_snapshot(self._nc, self._keys)
        except Unavailable:
            self._early = None
            self._stale = True
            raise
        early, self._early = self._early, None
        self._stale = self._outdated(snapshot) or (snapshot.unfinished and self._checkpoint is not None)
        if self._stale:
            return  # the next one follows soon; until then the old copy is the true one
        self._staged = {}
        self._at = snapshot.at
        self._replace(snapshot)
        for message in early:
            self._apply(message)

    def _outdated(self, snapshot: _Snapshot) -> bool:
        """Did a replica answer that lags? One such answer is passed over; a second one means that the bucket is new."""
        known = self._checkpoint is not None and snapshot.checkpoint_at < self._checkpoint_at
        if known and (snapshot.checkpoint is None or snapshot.checkpoint.log == self._log()):
            self._behind += 1
        else:
            self._behind = 0
        return self._behind == 1

    def _log(self) -> str:
        return self._checkpoint.log if self._checkpoint is not None else ""

    def _replace(self, snapshot: _Snapshot) -> None:
        first = self._checkpoint_at == 0 and not self._held
        changes = {k: e for k, e in snapshot.entries.items() if self._held.get(k) != e and (e.value or k in self._held)}
        for key in self._held.keys() - snapshot.entries.keys():
            changes[key] = ViewEntry(key, b"", snapshot.checkpoint_at)
        moved = snapshot.checkpoint_at != self._checkpoint_at
        self._held = snapshot.entries
        self._checkpoint, self._checkpoint_at = snapshot.checkpoint, snapshot.checkpoint_at
        if first or changes or moved:
            self._changed(changes, self._checkpoint.sequence if self._checkpoint is not None else 0)

    async def _take(self, message: Msg) -> None:
        if self._live.closed:
            return
        if self._early is not None:
            self._early.append(message)
        else:
            self._apply(message)

    def _apply(self, message: Msg) -> None:
        headers = message.headers or {}
        entry = _entry(headers, message.data)
        if entry.sequence <= self._at or self._stale:
            return
        if entry.sequence != self._at + 1:
            self._stale = True  # a snapshot follows, with this message in it
            return
        self._at = entry.sequence
        if entry.key == CHECKPOINT_KEY:
            self._checkpoint_at = entry.sequence
            if MORE_HEADER not in headers:
                self._commit(msgspec.json.decode(entry.value, type=Checkpoint))
        elif _matches(entry.key, self._keys):
            self._staged[entry.key] = entry

    def _commit(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        changes, self._staged = self._staged, {}
        self._held |= changes
        self._changed(changes, checkpoint.sequence)


class NatsViewWriter:
    """:class:`~turnout.workers.ports.ViewWriter`: one atomic batch for each commit, fenced by the checkpoint."""

    def __init__(self, connection: Connection, timeout_s: float = ANSWER_S) -> None:
        self._nc = connection.nc
        self._timeout_s = timeout_s

    async def checkpoint(self) -> tuple[Checkpoint | None, int]:
        """The stored checkpoint and its bucket sequence, from the bucket's leader."""
        found = await _last(self._nc, "KV_VIEWS", subjects.view(CHECKPOINT_KEY), self._timeout_s)
        if found is None:
            return None, 0
        return msgspec.json.decode(found.body, type=Checkpoint), found.sequence

    async def commit(self, views: Mapping[str, bytes | None], checkpoint: Checkpoint, expected: int) -> int:
        """Store views and checkpoint. See the port.

        More views than one batch takes are stored in several. Each of them is fenced; readers take them over together,
        at the last.
        """
        items = list(views.items())
        size = jsapi.BATCH_LIMIT - 1
        for start in range(0, max(len(items) - size, 0), size):
            stored, at = await self.checkpoint()
            if at != expected:
                raise Conflict(f"the views were written by another projector (at {at}, expected {expected})")
            before = stored or Checkpoint(0, checkpoint.log, checkpoint.epoch)
            expected = await self._write(items[start : start + size], before, expected, more=True)
        rest = items[((len(items) - 1) // size) * size :] if items else items
        return await self._write(rest, checkpoint, expected, more=False)

    async def _write(
        self, items: list[tuple[str, bytes | None]], checkpoint: Checkpoint, expected: int, *, more: bool
    ) -> int:
        messages = [
            jsapi.Message(subjects.view(key), value or b"", {} if value is not None else {_OPERATION: _REMOVED})
            for key, value in items
        ]
        headers = {jsapi.EXPECTED_HEADER: str(expected)} | ({MORE_HEADER: "1"} if more else {})
        last = jsapi.Message(subjects.view(CHECKPOINT_KEY), msgspec.json.encode(checkpoint), headers)
        try:
            if not messages:
                return await jsapi.publish(self._nc, last, self._timeout_s)
            return await jsapi.publish_batch(self._nc, [*messages, last], self._timeout_s)
        except jsapi.Refused as e:
            if e.code in jsapi.CONFLICTS:
                raise Conflict(f"the views were written by another projector: {e.text}") from e
            if e.code in jsapi.FULL:
                raise StoreFull(
                    f"the views have no room ({e.text}): free disk space; restart a nats-server that met a full disk"
                ) from e
            raise Unavailable(f"the views cannot be written: {e}") from e


class _Stored(msgspec.Struct):
    sequence: int
    body: bytes
    removed: bool


async def _last(nc: jsapi.Client, stream: str, subject: str, timeout_s: float) -> _Stored | None:
    """Newest message of a subject, from the stream's leader."""
    try:
        answer = await jsapi.api(nc, f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject}, timeout_s)
    except jsapi.Refused as e:
        if e.code == jsapi.NOT_FOUND:
            return None
        raise Unavailable(f"stream {stream} cannot be read: {e}") from e
    message = answer["message"]
    headers = msgspec.convert(message.get("hdrs", ""), bytes)
    body = msgspec.convert(message.get("data", ""), bytes)
    return _Stored(message["seq"], body, f"{_OPERATION}: {_REMOVED}".encode() in headers)


# --- lease -------------------------------------------------------------------------------------------------------


class _Holding(msgspec.Struct):
    holder: str
    epoch: int


class NatsLease:
    """:class:`~turnout.workers.ports.Lease`: one message with a time to live; its first sequence is the epoch.

    Only reduces contention: what keeps two leaders apart is the expected sequence of every write. One object serves
    one holder.

    Args:
        connection: to NATS.
        role: what is led, e.g. ``controller``.
        clock: its monotonic time bounds how long a grant may be acted on.
        ttl_s: whole seconds. 2 for one server; 15 where the stream has replicas, because a lost stream leader is
            replaced in up to 8 s.
        timeout_s: for one answer; well below ``ttl_s``.
    """

    def __init__(self, connection: Connection, role: str, clock: Clock, ttl_s: int = 2, timeout_s: float = 0.5) -> None:
        self._nc = connection.nc
        self._subject = subjects.lease(role)
        self._clock = clock
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._at = 0

    async def acquire(self, holder: str) -> Grant | None:
        """Try once. See the port."""
        found = await _last(self._nc, "KV_LEASES", self._subject, self._timeout_s)
        if found is None or found.removed:
            return await self._write(_Holding(holder, 0), found.sequence if found is not None else 0)
        holding = msgspec.json.decode(found.body, type=_Holding)
        if holding.holder != holder:
            return None
        # ours: an earlier try was stored although its answer was lost
        return await self._write(_Holding(holder, holding.epoch or found.sequence), found.sequence)

    async def renew(self, holder: str, grant: Grant) -> Grant | None:
        """Extend. See the port."""
        renewed = await self._write(_Holding(holder, grant.epoch), self._at)
        if renewed is not None:
            return renewed
        found = await _last(self._nc, "KV_LEASES", self._subject, self._timeout_s)
        if found is None or found.removed or msgspec.json.decode(found.body, type=_Holding).holder != holder:
            return None
        return await self._write(_Holding(holder, grant.epoch), found.sequence)  # the renewal before this was stored

    async def release(self, holder: str, grant: Grant) -> None:
        """Let go early: a marker that candidates take for free, and that the server forgets."""
        headers = {
            _OPERATION: _REMOVED,
            "Nats-Rollup": "sub",
            "Nats-TTL": "1s",
            jsapi.EXPECTED_HEADER: str(self._at),
        }
        try:
            await jsapi.publish(self._nc, jsapi.Message(self._subject, b"", headers), self._timeout_s)
        except jsapi.Refused as e:
            log.info("lease_gone_before_release", holder=holder, epoch=grant.epoch, reason=e.text)

    async def _write(self, holding: _Holding, expected: int) -> Grant | None:
        start = self._clock.monotonic()
        # a write without a time to live would make the lease permanent
        headers = {jsapi.EXPECTED_HEADER: str(expected), "Nats-TTL": f"{self._ttl_s}s"}
        try:
            self._at = await jsapi.publish(
                self._nc, jsapi.Message(self._subject, msgspec.json.encode(holding), headers), self._timeout_s
            )
        except jsapi.Refused as e:
            if e.code in jsapi.CONFLICTS:
                return None
            raise Unavailable(f"the lease cannot be written: {e}") from e
        return Grant(holding.epoch or self._at, start + self._ttl_s - LEASE_MARGIN_S)
