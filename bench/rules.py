"""What rules cost for each request in the gateway: reading the facts, asking every rule, choosing.

The functions that a gateway calls, in this process, on requests that all differ: users, texts, some headers. No rule
applies to most of them, so every rule is asked. Beside it, the choice of a model without rules. Time is the processor's
time of this process; the figure is the median of several passes, all of which stand in the JSON file.

    python bench/rules.py [--quick]
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING

import msgspec
import report

from turnout.events.route import Endpoint, Rule, Split
from turnout.projections.routing import RouteView
from turnout.workers.gateway.request import read_head
from turnout.workers.gateway.rules import facts_of
from turnout.workers.gateway.transition import RequestTracker, TransitionManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.workers.gateway.request import Head

    Asked = tuple[Head, bytes, bytes]

GOAL_US = 20.0
TEN = (
    "'image' in modality",
    "'audio' in modality || 'video' in modality",
    "tokens > 8000",
    "tokens < 5 && messages == 1",
    "tools && max_tokens > 4000",
    "headers['x-team'] == 'beta'",
    "user.startsWith('test-')",
    "metadata.tier == 'gold' && stream",
    "path == '/v1/embeddings'",
    "'x-canary' in headers && !tools",
)
PATTERN = "user.matches('^(test|staging)-[0-9]+$')"
CONNECTIONS = 16


def run(quick: bool) -> report.Outcome:
    """Measure each set of rules in turn, and again."""
    count, passes = (500, 3) if quick else (2000, 15)
    short, long = requests(count, 60), requests(count // 10, 6000)
    images = requests(count // 10, 60, image_bytes=200_000)
    cases: dict[str, tuple[tuple[str, ...], list[Asked]]] = {
        "no rules": ((), short),
        "1 rule": (TEN[:1], short),
        "10 rules": (TEN, short),
        "50 rules": (TEN * 5, short),
        "10 rules and a regular expression": ((*TEN, PATTERN), short),
        "10 rules, prompts of 36 kB": (TEN, long),
        "10 rules, prompts with a picture of 200 kB": (TEN[1:], images),
    }
    made = {name: (chooser(whens), asked) for name, (whens, asked) in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(passes):
        for name, (choose, asked) in made.items():
            times[name].append(_pass(choose, asked))
    median = {name: report.median(values) for name, values in times.items()}
    cost = {name: value - median["no rules"] for name, value in median.items()}
    return report.Outcome(
        figures={"requests": count, "us_per_request": times, "us_per_request_median": median},
        tables=[
            report.Table(
                "Choosing for one request, µs on one core",
                ["model", "median", "best pass", "more than without rules"],
                [[name, f"{median[name]:.1f}", f"{min(times[name]):.1f}", f"{cost[name]:.1f}"] for name in cases],
                [f"Chats of 6 messages with a user, over {CONNECTIONS} connections with 14 headers each."],
            )
        ],
        goals=[
            report.Goal(
                "10 rules for one request",
                f"< {GOAL_US:g} µs",
                f"{cost['10 rules']:.1f} µs",
                cost["10 rules"] < GOAL_US,
            )
        ],
    )


def chooser(whens: tuple[str, ...]) -> Callable[[Asked], object]:
    """What a gateway does to choose for a request to a model with these rules."""
    manager = TransitionManager(RequestTracker())
    splits = tuple(Split(v, 50.0, (Endpoint(f"{v}-a", f"unix:/run/{v}"),)) for v in ("v1", "v2"))
    rules = tuple(Rule(f"r{n}", when, version="v2") for n, when in enumerate(whens))
    manager.begin_transition(RouteView("chat", 1, splits, "sw-1", 30.0, rules=rules), 0.0)
    if not whens:
        return lambda asked: manager.handle_request_routing("chat", asked[2])
    compiled = manager.ruled["chat"]

    def choose(asked: Asked) -> object:
        head, body, key = asked
        facts = facts_of(compiled, head.path, head.values(compiled.headers), head.content_type, body)
        return manager.handle_ruled_request("chat", facts, key)

    return choose


def requests(count: int, words: int, image_bytes: int = 0) -> list[Asked]:
    """Heads, bodies and keys as they come from many users over a few connections."""
    heads = [_head(n) for n in range(CONNECTIONS)]
    made: list[Asked] = []
    for n in range(count):
        messages: list[object] = [
            {"role": "user" if m % 2 == 0 else "assistant", "content": f"{n} " + "plain " * (words // 6)}
            for m in range(6)
        ]
        if image_bytes:
            url = {"url": "data:image/png;base64," + "A" * image_bytes}
            messages.append({"role": "user", "content": [{"type": "image_url", "image_url": url}]})
        body = {
            "model": "chat",
            "messages": messages,
            "stream": n % 2 == 0,
            "max_tokens": 100 + n % 7,
            "user": f"user-{n}",
            "metadata": {"tier": "silver" if n % 3 else "bronze"},
        }
        made.append((heads[n % CONNECTIONS], msgspec.json.encode(body), b'"user-%d"' % n))
    return made


def _head(number: int) -> Head:
    """As the openai package sends it."""
    lines = [
        *("host: gateway", "accept: application/json", "accept-encoding: gzip, deflate", "connection: keep-alive"),
        *("content-type: application/json", "user-agent: OpenAI/Python 3.54.0", "x-stainless-lang: python"),
        *("x-stainless-package-version: 3.54.0", "x-stainless-os: Linux", "x-stainless-arch: x64"),
        *("x-stainless-runtime: CPython", "authorization: Bearer sk-0", f"x-team: team-{number}", "content-length: 9"),
    ]
    return read_head("\r\n".join(("POST /v1/chat/completions HTTP/1.1", *lines, "", "")).encode())


def _pass(choose: Callable[[Asked], object], asked: list[Asked]) -> float:
    """µs for each request."""
    gc.collect()
    start = time.process_time()
    for one in asked:
        choose(one)
    return (time.process_time() - start) / len(asked) * 1e6


if __name__ == "__main__":
    raise SystemExit(report.main("rules", run))
