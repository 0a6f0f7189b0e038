"""Streaming clients and what happened to each of their requests. Knows no cluster and no event.

A client of its own instead of the openai package's: the volume must cost little beside the system under test, and what
comes over the wire is judged byte by byte, down to how it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turnout.workers.clock import Clock

#: A request that has not ended by then hangs: above every time limit that the gateways are given here.
HANGS_S = 40.0


class Broken(Exception):
    """The answer is not what HTTP and OpenAI's protocol ask for."""


class Answer(msgspec.Struct, frozen=True):
    """One HTTP answer, whole. Header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Reply(msgspec.Struct, frozen=True):
    """What happened to one request.

    Attributes:
        sent: monotonic seconds, before the first byte left.
        ended: monotonic seconds, after the last byte came.
        gateway: URL it was sent to.
        model: the served name it asked for.
        status: of the answer, 0 where none came.
        version: what the gateway says answered.
        revision: the route revision it went by.
        outcome: ``ok``; ``refused``: an error answer, whole and in OpenAI's shape; ``cut``: a stream that was ended by
            an error event; ``failed``: everything else, a silent end and no answer at all among it.
        reason: why it is not ok: the error's code, or what was wrong.
        text: what the model said.
        retry_after: the header, where there was one.
    """

    sent: float
    ended: float
    gateway: str
    model: str
    status: int = 0
    version: str = ""
    revision: int = 0
    outcome: str = "ok"
    reason: str = ""
    text: str = ""
    retry_after: str = ""


class Traffic:
    """Clients in an open loop: a new request every ``1 / rate`` seconds, whatever happened to the others.

    Args:
        urls: gateways, asked in turn.
        model: the served name.
        rate: requests a second.
        clock: for the times.
        tokens: of each answer.
        plain_each: of so many requests one is not streamed; 0 for none.
    """

    def __init__(
        self, urls: Sequence[str], model: str, rate: float, clock: Clock, *, tokens: int = 12, plain_each: int = 5
    ) -> None:
        self.urls = list(urls)
        self.replies: list[Reply] = []
        self.sent = 0
        self.ok = 0
        self._model = model
        self._rate = rate
        self._clock = clock
        self._tokens = tokens
        self._plain_each = plain_each
        self._running: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send."""
        self._loop = asyncio.create_task(self._send())

    async def stop(self) -> None:
        """Send nothing more, and wait for every answer."""
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
            self._loop = None
        while self._running:
            await asyncio.gather(*self._running)

    def send_now(self, count: int, *, tokens: int) -> None:
        """Send so many streaming requests at once, beside the loop."""
        for _ in range(count):
            self._begin(stream=True, tokens=tokens)

    @property
    def running(self) -> int:
        """Requests without an end yet."""
        return len(self._running)

    async def _send(self) -> None:
        start = self._clock.monotonic()
        number = 0
        while True:
            number += 1
            self._begin(stream=not self._plain_each or number % self._plain_each != 0, tokens=self._tokens)
            await asyncio.sleep(max(0.0, start + number / self._rate - self._clock.monotonic()))

    def _begin(self, *, stream: bool, tokens: int) -> None:
        url = self.urls[self.sent % len(self.urls)]
        self.sent += 1
        task = asyncio.create_task(self._ask(url, stream, tokens))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _ask(self, url: str, stream: bool, tokens: int) -> None:
        reply = await ask(url, self._model, self._clock, stream=stream, tokens=tokens)
        self.ok += reply.outcome == "ok"
        self.replies.append(reply)


async def ask(url: str, model: str, clock: Clock, *, stream: bool = True, tokens: int = 12) -> Reply:
    """Send one chat request and judge its answer."""
    sent = clock.monotonic()
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": stream}
    ).encode()
    reply = Reply(sent, sent, url, model)
    answer: Answer | None = None
    try:
        async with asyncio.timeout(HANGS_S):
            answer = await exchange(url, "POST", "/v1/chat/completions", body)
        said = {"text": _said(answer, stream)} if answer.status == 200 else _refusal(answer)
    except TimeoutError:
        said = {"outcome": "failed", "reason": f"hangs: no end within {HANGS_S:g} s"}
    except EndedByEvent as e:
        said = {"outcome": "cut", "reason": e.code}
    except (OSError, EOFError, Broken, ValueError, LookupError, TypeError) as e:
        said = {"outcome": "failed", "reason": f"{type(e).__name__}: {e}"}
        if isinstance(e, Unfinished):
            answer = e.answer
    headers = answer.headers if answer is not None else {}
    return msgspec.structs.replace(
        reply,
        ended=clock.monotonic(),
        status=answer.status if answer is not None else 0,
        version=headers.get("x-turnout-version", ""),
        revision=int(headers.get("x-turnout-revision", "0")),
        retry_after=headers.get("retry-after", ""),
        **said,
    )


class EndedByEvent(Exception):
    """A stream that the gateway has ended with an error event."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Unfinished(Broken):
    """The connection closed before the answer's end; ``answer`` has what came."""

    def __init__(self, what: str, answer: Answer) -> None:
        super().__init__(what)
        self.answer = answer


def _said(answer: Answer, stream: bool) -> str:
    """The text of an answer with status 200."""
    if not stream:
        return str(json.loads(answer.body)["choices"][0]["message"]["content"])
    lines = answer.body.replace(b"\r\n", b"\n").split(b"\n")
    said = b"\n".join(line for line in lines if not line.startswith(b":"))  # what waits is kept open with comments
    events = [e for e in said.split(b"\n\n") if e.strip()]
    words: list[str] = []
    finish = ""
    for event in events:
        data = event.removeprefix(b"data: ")
        if data == b"[DONE]":
            break
        chunk: dict[str, Any] = json.loads(data)
        if "error" in chunk:
            raise EndedByEvent(chunk["error"]["code"])
        for choice in chunk["choices"]:
            words.append(choice["delta"].get("content") or "")
            finish = choice["finish_reason"] or finish
    if events[-1:] != [b"data: [DONE]"] or finish not in ("stop", "length"):
        raise Broken(f"the stream ended silently after {''.join(words)!r} (finish reason {finish!r})")
    return "".join(words)


def _refusal(answer: Answer) -> dict[str, str]:
    error = json.loads(answer.body)["error"]
    if not error["message"] or not error["type"]:
        raise Broken(f"an error without words: {error}")
    return {"outcome": "refused", "reason": error["code"]}


async def get(url: str, path: str) -> Answer:
    """One GET request."""
    async with asyncio.timeout(HANGS_S):
        return await exchange(url, "GET", path)


async def exchange(url: str, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> Answer:
    """One request on a connection of its own, and the whole answer.

    Raises:
        OSError, EOFError: no connection, or no answer.
        Unfinished: it broke off.
    """
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        head = f"{method} {path} HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: close\r\n"
        if body:
            head += f"content-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines[1:] if line)}
        status = int(lines[0].split()[1])
        rest = bytearray()
        try:
            while data := await reader.read(65536):
                rest += data
        except OSError as e:
            raise Unfinished(f"broken off: {e}", Answer(status, headers, bytes(rest))) from e
        return Answer(status, headers, _content(Answer(status, headers, bytes(rest))))
    finally:
        writer.transport.abort()


def _content(raw: Answer) -> bytes:
    if raw.headers.get("transfer-encoding", "").lower() != "chunked":
        length = int(raw.headers.get("content-length", "0"))
        if len(raw.body) != length:
            raise Unfinished(f"{len(raw.body)} bytes of {length} came", raw)
        return raw.body
    content, at = bytearray(), 0
    while True:
        line = raw.body.find(b"\r\n", at)
        if line < 0:
            raise Unfinished(f"the connection closed inside the answer, after {bytes(content[-40:])!r}", raw)
        size = int(raw.body[at:line], 16)
        start, end = line + 2, line + 2 + size
        if raw.body[end : end + 2] != b"\r\n":
            raise Unfinished("the connection closed inside a chunk", raw)
        content += raw.body[start:end]
        if size == 0:
            return bytes(content)
        at = end + 2
