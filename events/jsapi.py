"""Calls to JetStream over a nats-py connection: publish with an ack, atomic batch, direct get, API request.

Knows the server's protocol and its error codes; knows nothing of events, views or leases. nats-py's own JetStream
layer is not used where it hides what is needed here: batches, direct get of many, the error code of a refused publish.
Protocol: ADR-31 (direct get), ADR-50 (batch) of github.com/nats-io/nats-architecture-and-design.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import nats.aio.client
import nats.errors
from nats.aio.msg import Msg
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

from turnout.events.store import Unavailable

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from nats.aio.subscription import Subscription

EXPECTED_HEADER = "Nats-Expected-Last-Subject-Sequence"
STATUS_HEADER = "Status"
DESCRIPTION_HEADER = "Description"

#: Messages in one atomic batch, and keys in one direct get of many. Limits of the server.
BATCH_LIMIT = 1000
MULTI_LIMIT = 1024

#: The subject has moved on, or is being written to right now (nats-server errors.json).
CONFLICTS = frozenset({10071, 10158, 10164, 10201})
NOT_FOUND = 10037
STREAM_NOT_FOUND = 10059
#: No room: the stream's own limit, or the server's or account's storage.
FULL = frozenset({10023, 10028, 10047, 10077})

_DISCONNECTED = "not connected to NATS: check that the server runs and is reachable; the client keeps trying"


#: What a raw subscription gets: subject, reply subject, header block, body.
Raw = Callable[[bytes, bytes, bytes, bytes], None]

_HMSG = b"HMSG "
_CRLF = b"\r\n"


class _Parser(Parser):
    """nats-py's parser with a short way for whole messages of raw subscriptions.

    Its own way (two regular expressions, a table of headers, a queue and a task) takes two thirds of the time of a
    replay. Everything else, and whatever is cut by the end of a read, is left to it.
    """

    def __init__(self, nc: Client) -> None:
        super().__init__(nc)  # pyright: ignore[reportUnknownMemberType]
        self.raw: dict[int, Raw] = {}

    async def parse(self, data: bytes = b"") -> None:
        if self.raw and self.state == AWAITING_CONTROL_LINE:
            if self.buf:
                data = bytes(self.buf) + data
                self.buf = bytearray()
            at = 0
            while data.startswith(_HMSG, at):
                end = data.find(_CRLF, at)
                words = data[at:end].split(b" ") if end > 0 else []
                if len(words) != 6:  # HMSG <subject> <sid> <reply> <header bytes> <all bytes>
                    break
                take = self.raw.get(int(words[2]))
                head = end + 2
                body, after = head + int(words[4]), head + int(words[5])
                if take is None or len(data) < after + 2:
                    break
                take(words[1], words[3], data[head:body], data[body:after])
                at = after + 2
            data = data[at:]
        await super().parse(data)


class Client(nats.aio.client.Client):
    """nats-py, and subscriptions that skip its slow parts.

    Leans on three inner names of nats-py 2.16 (``_ps``, ``_process_msg``, and ``_id`` of a subscription); where they
    change, tests/conformance fails.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ps: _Parser = _Parser(self)  # pyright: ignore[reportIncompatibleVariableOverride]

    async def subscribe_raw(self, subject: str, take: Raw) -> Subscription:
        """Subscribe with a plain function, called inside the read loop: it must be short, and must not raise."""
        subscription = await self.subscribe(subject, cb=_never)  # pyright: ignore[reportUnknownMemberType]
        self._ps.raw[subscription._id] = take  # pyright: ignore[reportPrivateUsage]
        return subscription

    async def unsubscribe_raw(self, subscription: Subscription) -> None:
        """End a raw subscription: ``take`` is not called again."""
        await subscription.unsubscribe()
        self._ps.raw.pop(subscription._id, None)  # pyright: ignore[reportPrivateUsage]

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        take = self._ps.raw.get(sid)
        if take is None:
            await super()._process_msg(sid, subject, reply, data, headers)  # type: ignore[arg-type]  # may be None
        else:
            take(subject, reply, headers or b"", data)


async def _never(message: Msg) -> None:
    raise AssertionError(f"{message.subject} came by the queue: this nats-py is too new for turnout")


class Refused(Exception):
    """JetStream answered with an error.

    Attributes:
        code: the server's error code, e.g. 10071; 0 where it gave none.
        text: what the server wrote.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} (JetStream error {code})")
        self.code = code
        self.text = text


class Message(msgspec.Struct, frozen=True):
    """One message to publish."""

    subject: str
    body: bytes
    headers: dict[str, str]


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    seq: int = 0
    error: _Error | None = None


_acks = msgspec.json.Decoder(_Ack)


@contextlib.contextmanager
def _heeding_cancellation() -> Generator[None]:
    """Raise a cancellation that ``asyncio.wait_for`` has swallowed.

    Before Python 3.12 it does so where the answer and the cancellation come in the same turn of the loop; a task that
    works in a loop would then never end.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


async def request(
    nc: Client, subject: str, body: bytes, timeout_s: float, headers: Mapping[str, str] | None = None
) -> bytes:
    """Ask and wait for the one answer.

    Raises:
        Unavailable: no clear answer; what was asked may have been done.
    """
    if not nc.is_connected:  # a request made now would stay in nats-py's table for ever
        raise Unavailable(_DISCONNECTED)
    try:
        with _heeding_cancellation():
            answer = await nc.request(subject, body, timeout=timeout_s, headers=dict(headers) if headers else None)
    except nats.errors.NoRespondersError as e:
        stored = subject.startswith("$JS.") or EXPECTED_HEADER in (headers or {})
        hint = ": JetStream is off, the stream is missing, or its leader is being elected" if stored else ""
        raise Unavailable(f"nobody answers on {subject}{hint}") from e
    except nats.errors.TimeoutError as e:
        raise Unavailable(f"NATS did not answer on {subject} within {timeout_s:g} s") from e
    except nats.errors.MaxPayloadError as e:
        raise ValueError(f"{len(body)} bytes for {subject} are more than the server's max_payload") from e
    except (nats.errors.Error, OSError) as e:
        raise Unavailable(f"{_DISCONNECTED} ({e})") from e
    return answer.data


async def publish(nc: Client, message: Message, timeout_s: float) -> int:
    """Store one message; returns its stream sequence.

    Raises:
        Refused: it is not stored.
        Unavailable: it may be stored.
    """
    return _sequence(await request(nc, message.subject, message.body, timeout_s, message.headers))


async def publish_batch(nc: Client, messages: Sequence[Message], timeout_s: float) -> int:
    """Store all messages or none; returns the sequence of the last one (they are contiguous).

    All messages of one batch must be for one stream. The batch headers are made here and nowhere else: a message that
    has a batch sequence without a batch id would be stored at once, as an ordinary message.

    Raises:
        Refused: none is stored.
        Unavailable: all may be stored, or none.
    """
    if len(messages) > BATCH_LIMIT:
        raise ValueError(f"{len(messages)} messages in one batch; the server takes {BATCH_LIMIT}")
    if not nc.is_connected:
        raise Unavailable(_DISCONNECTED)
    batch = unique(nc)
    last = len(messages)
    for n, message in enumerate(messages, 1):
        headers = {**message.headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(n)}
        if n == last:
            headers["Nats-Batch-Commit"] = "1"
            return _sequence(await request(nc, message.subject, message.body, timeout_s, headers))
        try:
            await nc.publish(message.subject, message.body, headers=headers)
        except nats.errors.MaxPayloadError as e:
            raise ValueError(f"{len(message.body)} bytes for {message.subject} are above max_payload") from e
        except (nats.errors.Error, OSError) as e:
            raise Unavailable(f"{_DISCONNECTED} ({e})") from e
    raise ValueError("an empty batch")


def unique(nc: Client) -> str:
    """A name that was never used before: for batches and consumers."""
    return nc.new_inbox().rpartition(".")[2]


def _sequence(answer: bytes) -> int:
    ack = _acks.decode(answer)
    if ack.error is not None:
        raise Refused(ack.error.err_code, ack.error.description)
    return ack.seq


async def api(nc: Client, what: str, body: Mapping[str, object] | None, timeout_s: float) -> dict[str, Any]:
    """Ask ``$JS.API.<what>``; returns the JSON of the answer.

    Raises:
        Refused: the server's answer is an error.
        Unavailable: no answer.
    """
    payload = msgspec.json.encode(body) if body is not None else b""
    answer: dict[str, Any] = msgspec.json.decode(await request(nc, f"$JS.API.{what}", payload, timeout_s))
    error = answer.get("error")
    if error is not None:
        raise Refused(error.get("err_code", 0), error.get("description", ""))
    return answer


class Got(msgspec.Struct):
    """What a direct get of many answered.

    Attributes:
        messages: in the server's order; subject and sequence are in the headers ``Nats-Subject``, ``Nats-Sequence``.
        up_to: stream sequence that the answer is as new as.
        pending: matching messages that did not fit into the answer.
    """

    messages: list[Msg]
    up_to: int = 0
    pending: int = 0


async def direct_get(nc: Client, stream: str, query: Mapping[str, object], timeout_s: float) -> Got:
    """Get many messages without a consumer. Any replica may answer, so it can be behind where there are several.

    Raises:
        Refused: the server's status, e.g. 413 for more than ``MULTI_LIMIT`` keys.
        Unavailable: no answer, or not a whole one.
    """
    if not nc.is_connected:
        raise Unavailable(_DISCONNECTED)
    got = Got([])
    done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def take(message: Msg) -> None:
        status = (message.headers or {}).get(STATUS_HEADER)
        if status is None:
            got.messages.append(message)
        elif not done.done():
            headers = message.headers or {}
            got.up_to = int(headers.get("Nats-UpTo-Sequence", 0))
            got.pending = int(headers.get("Nats-Num-Pending", 0))
            done.set_result(f"{status} {headers.get(DESCRIPTION_HEADER, '')}")

    inbox = nc.new_inbox()
    try:
        answers = await nc.subscribe(inbox, cb=take)  # pyright: ignore[reportUnknownMemberType]
        try:
            await nc.publish(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(query), reply=inbox)
            with _heeding_cancellation():
                status = await asyncio.wait_for(done, timeout_s)
        finally:
            if not nc.is_closed:
                await answers.unsubscribe()
    except (TimeoutError, nats.errors.Error, OSError) as e:
        raise Unavailable(f"no whole answer to a direct get of stream {stream} ({type(e).__name__} {e})") from e
    if status.startswith("503"):
        raise Unavailable(f"nothing answers a direct get of stream {stream}: it is missing, or has no leader now")
    if not status.startswith(("204", "404")):
        raise Refused(int(status[:3]), status)
    return got
