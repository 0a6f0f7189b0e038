"""One request's way to an engine and back: send, send again elsewhere, pass the answer on, end it honestly.

The rule for a second try: nothing of the answer has reached the client, and the first try is over for certain (no
connection, a broken one, or an engine that said it is dead). The engine may have begun to work on the request before
its connection broke; running an inference twice is safe, it changes nothing but the engine's own load. Knows no
routes and no HTTP parsing.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Protocol

import httptools

from turnout.workers.gateway.errors import Refusal, stream_error
from turnout.workers.gateway.reading import Reading, readable, stream_outcome, whole_outcome
from turnout.workers.gateway.request import with_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.workers.gateway.answer import Shape
    from turnout.workers.gateway.context import GatewayContext
    from turnout.workers.gateway.health import Tally
    from turnout.workers.gateway.mirror import Copy
    from turnout.workers.gateway.reading import Seen
    from turnout.workers.gateway.request import Request
    from turnout.workers.gateway.settings import TimeLimits
    from turnout.workers.gateway.transition import Choice, Slot
    from turnout.workers.gateway.upstream import UpstreamConnection

#: An answer with status 500 or 503 is held back up to this size, to see whether the engine says that it is dead.
HELD_MOST_BYTES = 64 * 1024

_DOUBTFUL = frozenset((500, 503))
# What vLLM says in a 500 when it will not serve again: its engine process has died, or it was asked to stop.
_DEAD = (b"EngineCore encountered an issue", b"cannot schedule new futures after shutdown")

#: A body that asks for a stream; only looked for where there is no answer yet to tell.
_ASKS_STREAM = re.compile(rb'"stream"\s*:\s*true')
#: Where the end of an answer begins that holds its finish reason.
_FINISH_FROM = -512
#: Reads of a stream that are looked at when it has ended: the last events, [DONE] and the last chunk.
TAIL_READS = 8

CONNECTING, SENT, HOLDING, STREAMING, DONE = range(5)


class Client(Protocol):
    """The connection that the answer goes to."""

    @property
    def paused(self) -> bool:
        """It has more to send than it may hold."""
        ...

    def write(self, data: bytes) -> None:
        """Send."""
        ...

    def answer_ended(self, keep: bool) -> None:
        """The answer is complete; ``keep`` the connection for the next request, or close it when all is sent."""
        ...

    def answer_broken(self) -> None:
        """The answer can't be completed: close so that the client can't take it for complete."""
        ...

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error; nothing of an answer was sent before."""
        ...


class Relay:
    """One request, from the choice of an instance to the last byte.

    Attributes:
        choice: where it is now.
        phase: CONNECTING, SENT (waiting for the answer's first byte), HOLDING (an answer that may mean a dead engine),
            STREAMING (the client has seen a part) or DONE.
        started: seconds, exact.
        sent_at: seconds (coarse) when it was sent to the current choice.
        active: seconds (coarse) when something last moved.
    """

    # What most requests never need stands here and not in __init__, which runs for each of them.
    _connection: UpstreamConnection | None = None
    _tried: tuple[Slot, ...] = ()
    _held = b""
    _shape: Shape | None = None
    _at = 0
    _tail: deque[bytes] | None = None
    _note: Callable[[bytes], None] | None = None
    _reading: Reading | None = None
    _copies: tuple[Copy, ...] = ()
    _status = 200
    _odd = _slow = _aborted = False
    _first_s = 0.0
    _tally: Tally | None
    _plain: _Plain | None = None
    _pass_on: Callable[[bytes], None]
    _delimited = False

    def __init__(self, ctx: GatewayContext, client: Client, request: Request, choice: Choice) -> None:
        """Take the choice; it counts as in flight from here on."""
        self._ctx = ctx
        self._client = client
        self._write = client.write
        self.request = request
        self.choice: Choice = choice
        self.phase = CONNECTING
        self.started = ctx.monotonic()
        self.active = ctx.now
        ctx.tracker.begin(self)
        # What becomes of the request is counted for the version that it was assigned to, whoever answers it.
        tally = self._tally = (choice.lane.numbers or ctx.numbers(choice)).tally
        if tally is not None:
            tally.begin(None if request.apart else request.key)

    def send(self, fresh: bool = False) -> None:
        """Send to the choice, over a kept connection if there is one and not a ``fresh`` one is asked for."""
        self.phase = CONNECTING
        address = self.choice.slot.address
        connection = None if fresh else self._ctx.pool.take(address)
        if connection is None:
            self.sent_at = self._ctx.now
            self._ctx.pool.connect(address, self)
        else:
            self.connected(connection)

    # Exchange: what the connection tells

    def connected(self, connection: UpstreamConnection) -> None:
        """Send the request on it."""
        if self.phase != CONNECTING:  # the client left while the connection was being opened
            connection.transport.abort()
            return
        self._connection = connection
        self.phase = SENT
        self.sent_at = self._ctx.now
        request = self.request
        served, body = self.choice.slot.served, request.body
        if served:
            body = with_model(request.head.content_type, body, served)
        connection.send(self, request.head, request.id, body)

    def connect_failed(self, reason: str) -> None:
        """Try elsewhere."""
        if self.phase == CONNECTING:
            self._failed("connect", reason)

    def upstream_answer(self, shape: Shape, data: bytes, at: int) -> None:
        """Pass the answer on, or hold one that another instance may still take."""
        connection = self._connection
        if connection is None:
            return
        if shape.ordinary and connection.complete and self._pass_whole(connection, data, at):
            return
        if shape.status in _DOUBTFUL or (shape.status == 404 and self.choice.slot.served):
            self._shape, self._at = shape, at
            self._hold(connection, shape, data)
        elif shape.stream and len(data) == at and not connection.complete:
            # Engines send the head of a stream at once, and its first token after the prefill: until then another
            # instance may still take the request, and the time to the first byte is the time to the first token.
            self._shape, self._at, self._held = shape, at, data
        else:
            self._begin(connection, shape, data, at)

    def upstream_data(self, data: bytes, last: bool) -> None:
        """Pass on, and only then look at it."""
        if self.phase == STREAMING:
            self._pass_on(data)
            self.active = self._ctx.now
            note = self._note
            if note is not None:
                note(data)
            if last and self._connection is not None:
                self._count_total()
                self._complete(self._connection)
        elif self._connection is not None and self._shape is not None:
            if self.phase == HOLDING:
                self._hold(self._connection, self._shape, self._held + data)
            else:
                self._begin(self._connection, self._shape, self._held + data, self._at)

    def upstream_lost(self, reason: str) -> None:
        """The connection is gone: before the first byte that is a failed try, after it the answer is broken."""
        if self.phase == STREAMING:
            if self._delimited and not reason:
                self._connection = None
                self._count_total()
                self._finish()
            else:
                self._break("cut", "upstream_broken", "the engine broke off its answer")
            return
        connection, self._connection = self._connection, None
        if self.phase in (SENT, HOLDING):
            if connection is not None and connection.uses > 1 and not connection.heard:
                # A kept connection that the engine closed while the request was on its way: says nothing about the
                # engine, so try it once more over a fresh one.
                self._ctx.numbers(self.choice).retries += 1
                self.send(fresh=True)
            else:
                self._failed("broken", reason or "the engine closed the connection without an answer")

    # What the client's side tells

    def client_gone(self) -> None:
        """The client left: so does its request at the engine."""
        if self.phase == DONE:
            return
        self._count("client_gone")
        self._ended("client_gone")
        self._drop_connection()
        self._end()

    def client_paused(self) -> None:
        """The client is slow: read no more from the engine than it takes."""
        if self._connection is not None:
            self._connection.transport.pause_reading()

    def client_resumed(self) -> None:
        """Go on."""
        self.active = self._ctx.now
        if self._connection is not None:
            self._connection.transport.resume_reading()

    # What the sweep tells

    def check(self, now: float, limits: TimeLimits) -> None:
        """End a request whose time is up: silence is the only sign of a hung engine, and of a client that has hung."""
        if self.phase == DONE:
            return
        if now - self.started > limits.total_s:
            self._time_up("total_timeout", f"the answer was not complete within {limits.total_s:g} s")
        elif self.phase == STREAMING:
            idle = now - self.active
            if self._client.paused:
                if idle > self._ctx.settings.stalled_s:
                    self._count("client_stalled")
                    self._ended("client_gone")
                    self._drop_connection()
                    self._end()
                    self._client.answer_broken()
            elif idle > limits.between_s:
                self._ctx.manager.connection_failed(self.choice, now)
                self._time_up("silent", f"the engine sent nothing for {limits.between_s:g} s")
        elif self.phase != CONNECTING and now - self.sent_at > limits.first_byte_s:
            self._ctx.manager.connection_failed(self.choice, now)
            self._time_up("first_byte_timeout", f"the engine sent nothing within {limits.first_byte_s:g} s")
        elif self._tally is not None and self._tally.looks is not None and not self._slow:
            self._check_pace(self._tally, now - self.started)

    def _check_pace(self, tally: Tally, seconds: float) -> None:
        """Say that the first byte is late when it is, not when it comes: of a hung engine it never does."""
        if 0 < tally.slow_s < seconds:
            self._slow = True
            body = self.request.body
            tally.slow(seconds, self._user, _ASKS_STREAM.search(body) is not None, len(body))

    def end_early(self, code: str, message: str, cut: bool) -> None:
        """End it with an error that the client can see; ``cut``: because its version's time to drain is up."""
        if self.phase == DONE:
            return
        if self.phase == STREAMING:
            self._break("drain_ended", code, message, cut)
            return
        self._count("drain_ended")
        self._ended("drained")
        self._drop_connection()
        self._end(cut)
        self._client.refuse(Refusal(503, code, message, retry_after=1))

    # The answer

    def _pass_whole(self, connection: UpstreamConnection, data: bytes, at: int) -> bool:
        """Pass an answer on that came whole and has nothing special; False where the request has.

        Most answers are like that. This does what ``_begin`` and ``_complete`` do, in a fraction of the time.
        """
        ctx = self._ctx
        request = self.request
        tally = self._tally
        choice = self.choice
        numbers = choice.lane.numbers or ctx.numbers(choice)
        if (
            not request.keep_alive
            or ctx.stopping
            or choice.slot.failures
            or not (numbers.tally is None if tally is None else self._needs_no_look(tally, data))
        ):
            return False
        self._write(b"".join((data[: at - 4], choice.stamp, request.id, data[at - 4 :])))
        seconds = ctx.monotonic() - self.started
        if tally is None:
            numbers.whole(seconds)
        else:
            tally.done((None if request.apart else request.key, seconds, len(request.body)))
            self._tally = None
        self._connection = None
        client = self._client
        if client.paused:
            connection.transport.resume_reading()
        ctx.pool.give_back(connection, ctx.now)
        self.phase = DONE
        if ctx.tracker.end(self):
            ctx.left(choice)
        client.answer_ended(True)
        return True

    def _hold(self, connection: UpstreamConnection, shape: Shape, data: bytes) -> None:
        """Wait for the rest of an answer that may be the engine's own trouble, then pass it on or try elsewhere."""
        self.phase = HOLDING
        self._held = data
        if connection.complete:
            # 404: a name that the gateway made of its route, for an adapter that has been unloaded since
            if shape.status in (404, 503) or any(sign in data for sign in _DEAD):
                other = self._other()
                if other is not None:
                    self._count("engine_dead")
                    self._ended("refused")
                    self._drop_connection()
                    self._move(other)
                    return
        elif len(data) <= HELD_MOST_BYTES:
            return
        self._begin(connection, shape, data, self._at)

    def _begin(self, connection: UpstreamConnection, shape: Shape, data: bytes, at: int) -> None:
        """Send the head with the gateway's own lines, and what came with it; then count, while it is on its way."""
        ctx, request, choice = self._ctx, self.request, self.choice
        complete = connection.complete
        end = b""
        if not (shape.sized or shape.chunked):
            self._delimited, request.keep_alive = True, False
        if not request.keep_alive or ctx.stopping:
            request.keep_alive, end = False, b"\r\nconnection: close"
        self.phase = STREAMING
        self.active = ctx.now
        head = data[: at - 4]
        if shape.chunked and request.head.http10:
            self._plain = _Plain(self._write)
            self._pass_on = self._plain.pass_on
            self._write(b"".join((shape.without_chunks(head), choice.stamp, request.id, end, b"\r\n\r\n")))
            self._pass_on(data)
        else:
            self._pass_on = self._write
            if not shape.plain:
                head = shape.passed_on(head)
            self._write(b"".join((head, choice.stamp, request.id, end, data[at - 4 :])))
        seconds = ctx.monotonic() - self.started
        numbers = choice.lane.numbers or ctx.numbers(choice)
        tally = self._tally
        well = complete and shape.status < 300
        if tally is not None and well and self._needs_no_look(tally, data):
            tally.done((None if request.apart else request.key, seconds, len(request.body)))
            self._tally = None
        else:
            if well:
                numbers.whole(seconds)
            else:
                numbers.began(shape.status, seconds, complete)
            if tally is not None:
                self._note_answer(tally, shape, data, seconds, complete)
            elif numbers.tally is not None:
                # the version it was assigned to has failed, but the one that answers is there
                numbers.tally.came_back()
        if choice.slot.failures:
            ctx.manager.connection_worked(choice)
        if shape.stream or self._reading is not None:
            self._note_reads(data)
        if complete:
            self._complete(connection)
        else:
            self._held = request.body = b""  # there is no second try any more

    def _note_reads(self, data: bytes) -> None:
        """Keep of what passes as much as is looked at in the end."""
        reading = self._reading
        if reading is not None:
            reading.add(data)
            self._note = reading.add
            if reading.stream:
                self._tail = reading.kept
        else:
            tail = self._tail = deque((data,), maxlen=TAIL_READS)
            self._note = tail.append

    def _needs_no_look(self, tally: Tally, data: bytes) -> bool:
        """Whether an answer that came whole is only to be counted: most are, also where versions are compared."""
        looks = tally.looks
        if looks is None:
            return True
        if looks.left >= 1.0 or self._slow or tally.shadows:
            return False
        return data.rfind(b'"abort"', _FINISH_FROM) < 0  # of both directions the one that costs a quarter

    def _note_answer(self, tally: Tally, shape: Shape, data: bytes, seconds: float, complete: bool) -> None:
        """Measure the answer's first byte, and see to it that the rest is looked at and copied where it shall be."""
        request, looks = self.request, tally.looks
        self._odd = True
        self._first_s = seconds
        if shape.status >= 400:
            self._status = shape.status
            tally.came_back()
            if complete:
                tally.took(seconds)
        else:
            tally.answered(seconds, None if self._slow else self._user, shape.stream, len(request.body), complete)
            if looks is not None:
                if (shape.stream or readable(request.head.path)) and looks.take():
                    self._reading = Reading(shape.stream)
                elif not shape.stream:
                    self._aborted = whole_outcome(data) != "ok"
        if tally.shadows:
            self._copies = self._ctx.copies.copy(self.choice.model, request)

    def _complete(self, connection: UpstreamConnection) -> None:
        """The engine has sent the last byte."""
        self._connection = None
        if self._client.paused:
            connection.transport.resume_reading()
        self._ctx.pool.give_back(connection, self._ctx.now)
        self._finish()

    def _finish(self) -> None:
        """The client has got, or will get from its buffer, the last byte."""
        if self._odd or self._tail is not None:
            self._judge()
        self.phase = DONE
        if self._ctx.tracker.end(self):
            self._ctx.left(self.choice)
        self._client.answer_ended(self.request.keep_alive)

    def _judge(self) -> None:
        """Say how an answer ended that needs a look: its status may have been 200 long before it went wrong."""
        outcome, seen = "ok", None
        if self._reading is not None:
            seen = self._reading.seen(self.request.head.path)
            outcome = seen.outcome
        elif self._tail is not None:
            outcome = stream_outcome(self.request.head.path, b"".join(self._tail))
        elif self._aborted:
            outcome = "aborted"
        if outcome != "ok":
            self._count("no_done" if outcome == "cut" else outcome)
        if self._status >= 400:
            outcome = "http_error" if self._status == 429 or self._status >= 500 else "bad_request"
        self._ended(outcome, seen)

    def _break(self, kind: str, code: str, message: str, cut: bool = False) -> None:
        """End an answer that the client has seen a part of: an error event where it is a stream, else a broken end."""
        self._count(kind)
        if kind == "drain_ended":
            self._ended("drained")
        else:
            self._ended_late("cut" if kind == "cut" else "timeout")
        connection = self._connection
        last = self._tail[-1] if self._tail else b""
        between = connection is not None and last.endswith(b"\r\n") and connection.between_chunks()
        self._drop_connection()
        self._end(cut)
        clean = self._delimited or self._plain is not None
        if self._tail is None or not (clean or between):
            # No place for an event: between two chunks only. The client sees that the answer is incomplete.
            self._client.answer_broken()
            return
        event = stream_error(self.request.head.path, code, message)
        if not last.endswith((b"\n\n", b"\n\n\r\n", b"\r\n\r\n")):
            event = b"\n\n" + event
        self._write(event if clean else b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
        self._client.answer_ended(keep=False)

    # Failed tries

    def _failed(self, kind: str, reason: str) -> None:
        """This try is over and the client has seen nothing."""
        self._count(kind)
        self._ended("refused")
        self._ctx.manager.connection_failed(self.choice, self._ctx.now)
        other = self._other()
        if other is not None:
            self._move(other)
            return
        self._count("no_instance")
        self._end()
        self._client.refuse(
            Refusal(
                503,
                "no_ready_instance",
                f"no instance of {self.choice.model} answered ({reason}): try again shortly",
                retry_after=1,
            )
        )

    def _other(self) -> Choice | None:
        """Another instance that was not tried yet."""
        self._tried = (*self._tried, self.choice.slot)
        pinned = bool(self.request.pin)
        return self._ctx.manager.reroute(self.choice.model, self.choice, self._tried, self._ctx.now, pinned)

    def _move(self, choice: Choice) -> None:
        ctx = self._ctx
        ctx.numbers(choice).retries += 1
        ctx.ended(self)
        self.choice = choice
        ctx.tracker.begin(self)
        self._held = b""
        self.send()

    def _time_up(self, kind: str, message: str) -> None:
        if self.phase == STREAMING:
            self._break(kind, "upstream_timeout", message)
            return
        self._count(kind)
        self._ended_late("timeout")
        self._drop_connection()
        self._end()
        self._client.refuse(Refusal(504, "upstream_timeout", message))

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.discard()

    def _count_total(self) -> None:
        seconds = self._ctx.monotonic() - self.started
        self._ctx.numbers(self.choice).total.observe(seconds)
        if self._tally is not None:
            self._tally.took(seconds)

    def _count(self, kind: str) -> None:
        self._ctx.numbers(self.choice).failed(kind)

    @property
    def _user(self) -> bytes | None:
        """Whom the request counts for where versions are compared; None where the split has not assigned it."""
        return None if self.request.apart else self.request.key

    def _ended(self, outcome: str, seen: Seen | None = None) -> None:
        """Say how it ended, once: what happens after a failed first try is nobody's."""
        tally, self._tally = self._tally, None
        if tally is None:
            return
        seconds = self._ctx.monotonic() - self.started
        if outcome != "ok":
            tally.ended(outcome, self._user)
        else:
            tally.went_well()
            if seen is not None:
                tally.saw(seen, self._user, seconds - self._first_s if self._tail is not None else 0.0)
        for copy in self._copies:
            copy.primary_ended(outcome, seconds)

    def _ended_late(self, outcome: str) -> None:
        """As ``_ended``, without a last byte; its time so far counts, as it would only have been longer."""
        if self._tally is not None:
            self._tally.took(self._ctx.monotonic() - self.started)
        self._ended(outcome)

    def _end(self, cut: bool = False) -> None:
        self.phase = DONE
        self._ctx.ended(self, cut)


class _Plain:
    """Takes the chunks off an answer for a client that speaks HTTP/1.0 and knows none."""

    __slots__ = ("_parser", "_parts", "_write")

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []

    def pass_on(self, data: bytes) -> None:
        """Send what the chunks hold. The connection's own parser has accepted the bytes before."""
        self._parser.feed_data(data)
        if self._parts:
            self._write(b"".join(self._parts))
            self._parts.clear()

    def on_body(self, body: bytes) -> None:
        """Content."""
        self._parts.append(body)
