"""Golden answers: what a version's engine said when it was new, and whether it says the same now. Knows no process.

A probe finds an engine that is mute or mad, not one that speaks well with the wrong weights. So the log probabilities
of a few fixed prompts are kept from a version's first proof, and every later engine of it here must give them again.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, cast

import msgspec

from turnout.workers.inference import client

if TYPE_CHECKING:
    from pathlib import Path

#: One token each is enough: each prompt's whole distribution depends on all weights.
PROMPTS = (
    "The capital of France is",
    "The sun rises in the",
    "Two plus two equals",
    "The opposite of hot is",
)
#: Long enough to fill a block of an engine's cache of prefixes (128 tokens on a CPU, 16 on a GPU).
_LONG = "A turnout moves a running train from one track to another, and nobody on board notices. " * 12
_LOGPROBS = 5
#: Largest difference of log probabilities, in nat. Measured: 0 on one machine; 0.41 with a stale output head.
TOLERANCE = 0.05


class Golden(msgspec.Struct, frozen=True):
    """For each prompt the log probabilities of its likeliest next tokens. ``identity``: of version and files."""

    identity: str
    answers: tuple[dict[str, float], ...]


async def ask(address: str, model: str, timeout_s: float) -> tuple[dict[str, float], ...] | None:
    """Ask all prompts in one request. None where the engine has no completions or gives no log probabilities.

    Raises:
        Unreachable: no answer.
        ValueError: the answer is an error, or a number in it is not finite.
    """
    body = {"model": model, "prompt": PROMPTS, "max_tokens": 1, "temperature": 0, "logprobs": _LOGPROBS}
    reply = await client.ask(
        address, "/v1/completions", method="POST", body=msgspec.json.encode(body), timeout_s=timeout_s
    )
    if reply.status == 404:
        return None
    if reply.status != 200:
        text = " ".join(reply.body[:200].decode("utf-8", "replace").split())
        raise ValueError(f"status {reply.status}: {text}")
    try:
        answer = cast("dict[str, Any]", msgspec.json.decode(reply.body))
        found = tuple(dict(c["logprobs"]["top_logprobs"][0]) for c in answer["choices"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return None
    if len(found) != len(PROMPTS):
        return None
    if not all(math.isfinite(value) for said in found for value in said.values()):
        raise ValueError("a log probability is not finite")
    return found


async def cached(address: str, model: str, timeout_s: float) -> int:
    """Tokens of a fixed long prompt that the engine took from its cache of prefixes instead of computing them.

    0 where it takes none, does not say, or can't take so long a prompt.

    Raises:
        Unreachable: no answer.
    """
    body = {"model": model, "prompt": _LONG, "max_tokens": 1, "temperature": 0}
    reply = await client.ask(
        address, "/v1/completions", method="POST", body=msgspec.json.encode(body), timeout_s=timeout_s
    )
    with contextlib.suppress(msgspec.MsgspecError):
        details = msgspec.json.decode(reply.body, type=_Answer).usage.prompt_tokens_details
        return details.cached_tokens if details else 0
    return 0


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    usage: _Usage


def difference(before: tuple[dict[str, float], ...], now: tuple[dict[str, float], ...]) -> str:
    """What differs beyond the tolerance; empty where nothing does. Tokens near the fifth place may come and go."""
    for prompt, was, said in zip(PROMPTS, before, now, strict=True):
        likeliest = max(was, key=lambda token: was[token])
        if likeliest not in said:
            return f"{prompt!r}: {likeliest!r} is not among the likeliest tokens any more"
        for token in was.keys() & said.keys():
            off = abs(was[token] - said[token])
            if off > TOLERANCE:
                return f"{prompt!r}: log probability of {token!r} is {said[token]:.3f}, and was {was[token]:.3f}"
    return ""


def read(path: Path, identity: str) -> Golden | None:
    """What was kept; None where there is nothing of this identity."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Golden)
    except (OSError, msgspec.MsgspecError):
        return None
    return kept if kept.identity == identity else None


def write(path: Path, golden: Golden) -> None:
    """Keep it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(golden))
    fresh.replace(path)
