"""How a model is served: always loaded, or on demand. The words of turnout.toml, and what can't be meant by them.

The words are those that Ollama's users know (``keep_alive``: ``"10m"``, seconds, 0 for at once, -1 for never). Knows no
model and no file.
"""

from __future__ import annotations

import math

from turnout.core.strategies.parameters import duration_s, nearest, shown
from turnout.events.model import Serving

#: Word → field of ``Serving``, of those that are durations.
_TIMES = {"keep_alive": "keep_alive_s", "max_wait": "max_wait_s", "residency": "residency_s"}
WORDS = ("on_demand", "keep_alive", "queue", "max_wait", "residency")
_NEVER = -1.0


def parse(raw: dict[str, object]) -> Serving | tuple[str, ...]:
    """How to serve, from a table with some of WORDS; or what is wrong, one sentence each, naming the word."""
    found = [f"{word} is no such word{nearest(word, WORDS)}" for word in raw if word not in WORDS]
    on_demand, queue = raw.get("on_demand", False), raw.get("queue", Serving().queue)
    if not isinstance(on_demand, bool):
        found.append(f"on_demand is {shown(on_demand)}: give true or false")
    if not isinstance(queue, int) or isinstance(queue, bool):
        found.append(f"queue is {shown(queue)}: give the number of requests that may wait")
    times: dict[str, float] = {}
    for word, field in _TIMES.items():
        if word in raw:
            value = _seconds(raw[word])
            if value is None:
                never = ", 0 (at once) or -1 (never)" if word == "keep_alive" else ""
                found.append(f'{word} is {shown(raw[word])}: give a time, e.g. "10m"{never}')
            else:
                times[field] = value
    if not on_demand and len(raw) > ("on_demand" in raw):
        words = ", ".join(word for word in raw if word != "on_demand")
        found.append(f"{words} without on_demand = true: a model that is always loaded waits for nobody; add it")
    if found:
        return tuple(found)
    serving = Serving(on_demand=bool(on_demand), queue=int(str(queue)), **times)
    return problems(serving) or serving


def problems(serving: Serving) -> tuple[str, ...]:
    """What can't be meant, one sentence each, naming the word."""
    found: list[str] = []
    alive = serving.keep_alive_s
    if alive != _NEVER and not 0 <= alive < 1e9:
        found.append(f"keep_alive is {alive:g} s: give a time, 0 (unload at once) or -1 (never)")
    if serving.queue < 1:
        found.append(f"queue is {serving.queue}: give the number of requests that may wait, 1 or more")
    if not (math.isfinite(serving.max_wait_s) and serving.max_wait_s > 0):
        found.append(f"max_wait is {serving.max_wait_s:g} s: give a time above 0")
    if not 0 <= serving.residency_s < 1e9:
        found.append(f"residency is {serving.residency_s:g} s: give a time of 0 or more")
    elif serving.residency_s >= serving.max_wait_s:
        found.append(
            f"residency is {serving.residency_s:g} s and max_wait {serving.max_wait_s:g} s: who waits for a place "
            "would be refused before one is free; give a longer max_wait"
        )
    return tuple(found)


def _seconds(value: object) -> float | None:
    if value in (-1, "-1"):
        return _NEVER
    return duration_s(value)
