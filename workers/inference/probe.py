"""The golden probe: a request through an engine's real API, and what its answer proves. Knows no process.

``/health`` says only that a server listens: vLLM answers 200 there while it is paused, asleep, hung, or serving NaN
weights. So an instance is ready when a real answer is sane: status, fingerprint, finite log probabilities, not empty,
not one piece repeated, and the version's own expected text where it has one.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, cast

import msgspec

from turnout.workers.inference import client

if TYPE_CHECKING:
    from turnout.events.model import Probe
    from turnout.workers.inference.engines.base import Launch

#: vLLM writes minus infinity as this; a token that was chosen greedily can't have it.
_MINUS_INFINITY = -9999.0
#: An answer that is one piece said this often (or more) is looping.
LOOP_TIMES = 4


class Verdict(msgspec.Struct, frozen=True):
    """What a probe has shown.

    Attributes:
        ok: the instance may get traffic.
        reason: one sentence, empty where it may.
        fingerprint: what the answer calls itself.
        answered: there was an answer at all, be it a wrong one.
        absent: the path or the model is not known there; another probe may fit.
        later: the server asks to come back (429, 503).
    """

    ok: bool
    reason: str = ""
    fingerprint: str = ""
    answered: bool = True
    absent: bool = False
    later: bool = False


def looping(text: str) -> bool:
    """Whether the text is one piece said at least ``LOOP_TIMES`` times, the last perhaps not to its end."""
    text = text.strip()
    return any(
        said[period:] == said[:-period]
        for said in (text, text + " ")  # words repeat with the blank after them
        for period in range(1, len(said) // LOOP_TIMES + 1)
    )


def judge(reply: client.Reply, expect: str, fingerprint: str, *, logprobs: bool) -> Verdict:
    """Say what an answer proves.

    Args:
        reply: the engine's answer.
        expect: text that it must contain; empty for any.
        fingerprint: what it must call itself; empty for anything.
        logprobs: whether a completion without log probabilities is a failure.
    """
    if reply.status != 200:
        return Verdict(
            False,
            f"status {reply.status}: {_excerpt(reply.body)}",
            absent=reply.status == 404,
            later=reply.status in (429, 503),
        )
    kind = reply.headers.get("content-type", "")
    if "event-stream" in kind:
        return Verdict(False, "the answer is a stream: leave `stream` out of the version's probe")
    if "json" not in kind:
        return _judge_bytes(reply.body, expect)
    try:
        data: object = msgspec.json.decode(reply.body)
    except msgspec.DecodeError as e:
        return Verdict(False, f"the answer is not valid JSON ({e}); NaN in it would be a sign of broken weights")
    if not isinstance(data, dict):
        return Verdict(False, f"the answer is not a JSON object: {_excerpt(reply.body)}")
    answer = cast("dict[str, Any]", data)
    said = str(answer.get("system_fingerprint") or "")
    try:
        reason = _fault(answer, expect, logprobs=logprobs)
    except (TypeError, ValueError, KeyError, AttributeError):  # fields of other types than OpenAI's
        reason = f"the answer does not have OpenAI's shape: {_excerpt(reply.body)}"
    if not reason and fingerprint and "choices" in answer and said != fingerprint:
        reason = f"the engine calls itself {said or 'nothing'}, not {fingerprint}"
    return Verdict(not reason, reason, said)


def _judge_bytes(body: bytes, expect: str) -> Verdict:
    """Sound, pictures and plain text: something must be there."""
    if not body:
        return Verdict(False, "the answer is empty")
    if expect and expect.encode() not in body:
        return Verdict(False, f"the answer does not contain {expect!r}")
    return Verdict(True)


def _fault(answer: dict[str, Any], expect: str, *, logprobs: bool) -> str:
    if answer.get("error"):
        return f"the engine answered with an error: {_excerpt(msgspec.json.encode(answer))}"
    if answer.get("object") == "list" and "data" in answer:
        return _fault_in_vectors(answer["data"])
    choices = answer.get("choices")
    if isinstance(choices, list) and choices:
        return _fault_in_choice(cast("dict[str, Any]", choices[0]), expect, logprobs=logprobs)
    return _fault_in_text(_text(answer), expect)


def _fault_in_choice(choice: dict[str, Any], expect: str, *, logprobs: bool) -> str:
    if choice.get("finish_reason") == "abort":
        return "the engine aborted the request (finish_reason abort)"
    message = cast("dict[str, Any]", choice.get("message") or {})
    text = choice.get("text") or message.get("content") or message.get("reasoning_content") or message.get("reasoning")
    fault = _fault_in_text(str(text or ""), expect)
    if fault:
        return fault
    values = _logprobs(choice)
    if values is None:
        return "the answer has no log probabilities, so NaN weights could not be seen" if logprobs else ""
    bad = [v for v in values if not math.isfinite(v) or v <= _MINUS_INFINITY]
    return f"a log probability is {bad[0]}" if bad else ""


def _fault_in_text(text: str, expect: str) -> str:
    if not text.strip():
        return "the answer is empty"
    if expect:
        return "" if expect in text else f"the answer does not contain {expect!r}"
    return "the answer repeats one piece over and over" if looping(text) else ""


def _fault_in_vectors(data: object) -> str:
    """Embeddings: numbers, all finite, not all zero."""
    rows = cast("list[dict[str, Any]]", data) if isinstance(data, list) else []
    if not rows:
        return "the answer is empty"
    for row in rows:
        vector = row.get("embedding")
        if isinstance(vector, str):  # base64
            return "" if vector else "the answer is empty"
        numbers = cast("list[float]", vector or [])
        if not any(numbers):
            return "the embedding is empty or zero"
        if not all(math.isfinite(n) for n in numbers):
            return "the embedding is not finite"
    return ""


def _logprobs(choice: dict[str, Any]) -> list[float] | None:
    """Log probabilities of the answer's tokens, in either of OpenAI's two shapes."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return None
    shape = cast("dict[str, Any]", found)
    if isinstance(shape.get("token_logprobs"), list):
        return [float(v) for v in shape["token_logprobs"] if v is not None]
    if isinstance(shape.get("content"), list):
        return [float(item["logprob"]) for item in shape["content"]]
    return None


def _text(answer: dict[str, Any]) -> str:
    """Text of the other endpoints: transcriptions, responses."""
    text = answer.get("text")
    if isinstance(text, str):
        return text
    parts: list[str] = []
    for item in cast("list[dict[str, Any]]", answer.get("output") or []):
        content = item.get("content")
        parts += [str(c.get("text", "")) for c in cast("list[dict[str, Any]]", content or [])]
    return "".join(parts) or (msgspec.json.encode(answer["data"]).decode() if answer.get("data") else "")


def _excerpt(body: bytes) -> str:
    """What an error says, on one line. Its text is the engine's; a probe's prompt is no user's."""
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(msgspec.MsgspecError):
        text = msgspec.json.decode(body, type=_ErrorBody).error.message or text
    return " ".join(text[:300].split())


class _Error(msgspec.Struct, frozen=True):
    message: str = ""


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Error = _Error()


def body(probe: Probe, model: str) -> bytes:
    """The JSON to post; the version's own ``model`` wins over the served name."""
    return msgspec.json.encode({"model": model, **probe.body})


async def prove(launch: Launch, timeout_s: float) -> Verdict:
    """Ask the golden question; where its path is not known, the next one.

    Never raises: no answer is a verdict with ``answered`` false.
    """
    verdict = Verdict(False, "the version has no probe", answered=False)
    for probe in launch.probes:
        try:
            reply = await client.ask(
                launch.address, probe.path, method="POST", body=body(probe, launch.model), timeout_s=timeout_s
            )
        except client.Unreachable as e:
            return Verdict(False, str(e), answered=False)
        logprobs = launch.logprobs and "logprobs" in probe.body
        verdict = judge(reply, probe.expect, launch.fingerprint, logprobs=logprobs)
        if not verdict.absent:
            break
    return verdict
