"""Real OpenAI clients that keep a served name busy, and what happened to each of their requests.

For the demo and the tests of whole systems. A request is *failed* when no answer came or the answer was an error, *cut*
when a stream began and did not end as the protocol says (no finish reason, an error event, an abort), *stale* when the
old version answered it although it was sent after every gateway had acknowledged the new one. What an engine
did wrong is told from what turnout did. Knows nothing of events; who reads the log passes the times in.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turnout.workers.clock import Clock


#: Codes of the gateway's own error answers that say what the engine did: nothing at all, or half an answer.
_OF_THE_ENGINE = frozenset(("upstream_timeout", "upstream_broken"))
#: Codes of error events that are the gateway's own and no engine's fault.
_OF_TURNOUT = frozenset(("version_drained", "gateway_stopping"))


_VERSION = "x-turnout-version"


class Ask(msgspec.Struct, frozen=True):
    """What one client asks. ``user``: keeps it on one version; empty for nobody in particular."""

    prompt: str
    user: str = ""


class Answer(msgspec.Struct, frozen=True):
    """One request.

    Attributes:
        sent: UTC, before the first byte left.
        first_ms: until the first token; None where none came.
        total_ms: until the end.
        version: what the gateway said answered; empty where it said nothing.
        outcome: ``ok``, ``failed`` or ``cut``.
        reason: why it is not ok.
        text: the first words of the answer.
        by_engine: where it is not ok: the engine answered so, was silent, or broke off; else it was turnout.
        ask: what was asked.
    """

    sent: datetime
    first_ms: float | None
    total_ms: float
    version: str
    outcome: str
    reason: str = ""
    text: str = ""
    by_engine: bool = False
    ask: Ask = Ask("")

    @property
    def ended(self) -> datetime:
        """UTC, when the last byte was there."""
        return self.sent + timedelta(milliseconds=self.total_ms)


class Window(msgspec.Struct, frozen=True):
    """From ``start`` on every gateway routed to ``version``, until ``end``, when the next change began (UTC)."""

    version: str
    start: datetime
    end: datetime


class Clients:
    """Streaming chat clients in an open loop: a new request every ``1 / rate`` seconds, whatever the others do.

    Args:
        url: of the gateway.
        model: the served name.
        rate: requests a second.
        clock: for the times.
        prompt: what nobody in particular asks.
        max_tokens: of each answer.
        asks: asked in turn, again and again, instead of ``prompt``.
    """

    def __init__(
        self,
        url: str,
        model: str,
        rate: float,
        clock: Clock,
        *,
        prompt: str = "",
        max_tokens: int,
        asks: Sequence[Ask] = (),
    ) -> None:
        import openai

        self.answers: list[Answer] = []
        self._openai = openai
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600.0)
        # By one key for all, a gateway would take them for one and the same user.
        self._headers = {"Authorization": openai.omit}
        self._model = model
        self._rate = rate
        self._clock = clock
        self._asks = tuple(asks) or (Ask(prompt),)
        self._max_tokens = max_tokens
        self._running: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send."""
        self._loop = asyncio.create_task(self._send())

    async def stop(self) -> None:
        """Send nothing more and wait for every answer."""
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        while self._running:
            await asyncio.gather(*self._running)
        await self._client.close()

    async def _send(self) -> None:
        start = self._clock.monotonic()
        sent = 0
        while True:
            task = asyncio.create_task(self._ask(self._asks[sent % len(self._asks)]))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            sent += 1
            await asyncio.sleep(max(0.0, start + sent / self._rate - self._clock.monotonic()))

    async def _ask(self, ask: Ask) -> None:
        sent, began = self._clock.now(), self._clock.monotonic()
        first_ms: float | None = None
        version = reason = ""
        words: list[str] = []
        streams = finished = by_engine = False
        try:
            raw = await self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=[{"role": "user", "content": ask.prompt}],
                max_tokens=self._max_tokens,
                temperature=0,
                stream=True,
                user=ask.user or self._openai.omit,
                extra_headers=self._headers,
            )
            version, streams = raw.headers.get(_VERSION, ""), True
            async for chunk in raw.parse():
                for choice in chunk.choices:
                    if choice.delta.content:
                        words.append(choice.delta.content)
                        if first_ms is None:
                            first_ms = (self._clock.monotonic() - began) * 1000
                    if str(choice.finish_reason) == "abort":  # vLLM's own word, unknown to OpenAI's types
                        reason, by_engine = "the engine ended the stream with finish_reason abort", True
                    finished = finished or choice.finish_reason is not None
            if not finished:
                reason = "the stream ended without a finish reason"
        except self._openai.APIStatusError as e:
            reason, version = f"{type(e).__name__}: {e}", e.response.headers.get(_VERSION, "")
            by_engine = bool(version) or e.code in _OF_THE_ENGINE  # the gateway's own answers name no version
        except self._openai.APIConnectionError as e:
            reason = f"{type(e).__name__}: {e}"
        except self._openai.APIError as e:  # an error event in a stream
            reason, by_engine = f"{type(e).__name__}: {e}", e.code not in _OF_TURNOUT
        except self._openai.OpenAIError as e:
            reason = f"{type(e).__name__}: {e}"
        total_ms = (self._clock.monotonic() - began) * 1000
        outcome = "ok" if not reason else "cut" if streams else "failed"
        text = "".join(words)[:80]
        self.answers.append(Answer(sent, first_ms, total_ms, version, outcome, reason, text, by_engine, ask))


def stale(answers: Iterable[Answer], windows: Sequence[Window]) -> list[Answer]:
    """Answers of another version than the one that every gateway had acknowledged before the request was sent."""
    return [
        answer
        for answer in answers
        if answer.version
        and any(
            window.start < answer.sent < window.end
            and answer.sent + timedelta(milliseconds=answer.first_ms or answer.total_ms) < window.end
            and answer.version != window.version
            for window in windows
        )
    ]


def quantile(values: Iterable[float], q: float) -> float | None:
    """The q-quantile by the nearest rank; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None
