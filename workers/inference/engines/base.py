"""The engine port: from a version's engine settings to what has to be started, asked and watched. Pure.

An engine kind plans, it starts nothing. Knows no process, no store and no policy: what a worker may run is decided in
policy.py before a plan is made.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

import msgspec

from turnout.events.model import Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turnout.events.model import EngineSpec

#: Stages of a load, in their order.
STAGES = ("starting", "loading", "warming", "proving")

COMPLETIONS = Probe(
    "/v1/completions", {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "logprobs": 1}
)
CHAT = Probe(
    "/v1/chat/completions",
    {
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
    },
)


#: Added to a model's name where an engine serves adapters of it: no client asks for the bare base.
BASE = "@base"


class Refusal(msgspec.Struct, frozen=True):
    """Why a worker does not start an engine. ``stage`` is what the failure is reported under."""

    code: str
    reason: str
    hint: str
    stage: str = "policy"

    @property
    def sentence(self) -> str:
        """Reason, hint and code in one line, for the report."""
        return f"{self.reason}; {self.hint} [{self.code}]"


class Site(msgspec.Struct, frozen=True):
    """Where an instance may live: a Unix socket's path and a free TCP port; the engine takes one of them.

    Attributes:
        socket: path, short enough for the kernel (107 bytes).
        host: address of this host that gateways reach.
        port: free a moment ago.
        unix: the worker's choice for engines that can do both.
        weights: false for an engine that is started ahead, and gets its weights later.
    """

    socket: str
    port: int
    host: str = "127.0.0.1"
    unix: bool = True
    weights: bool = True

    def address(self, *, unix: bool) -> str:
        """As gateways write it: ``unix:/path`` or ``http://host:port``."""
        return f"unix:{self.socket}" if unix else f"http://{self.host}:{self.port}"


class Sign(msgspec.Struct, frozen=True):
    """A line of the engine's log that tells how far a load has come.

    Attributes:
        pattern: regular expression, searched in the line.
        stage: the stage that the line stands for.
    """

    pattern: str
    stage: str


class Launch(msgspec.Struct, frozen=True):
    """What it takes to run and prove one instance.

    Attributes:
        argv: the process; empty where the server runs already and is not ours to start or stop.
        address: where gateways reach it.
        model: the name that requests carry.
        env: variables that the engine gets, whatever the worker's environment says.
        env_default: variables that the engine gets where the worker's environment does not have them.
        probes: golden requests; the next one is tried where a path is not found.
        fingerprint: what answers must call themselves; empty where the engine can't be told.
        logprobs: whether an answer without log probabilities is a failure.
        counts: whether ``/metrics`` tells running and waiting requests under vLLM's names.
        signs: lines of the log that tell the progress.
        grace_s: seconds between SIGTERM and SIGKILL.
        fills: other weights can be put into it while it runs (see control.py); its socket is private then.
        empty: it was started without weights.
        weights: what to fill it with; a folder, for the fake engine any word.
        sleeps: it can be put to sleep (see control.py); its socket is private then.
        adapters: flags by which it takes adapters; empty where it takes none.
    """

    argv: tuple[str, ...]
    address: str
    model: str
    env: dict[str, str] = {}
    env_default: dict[str, str] = {}
    probes: tuple[Probe, ...] = (COMPLETIONS, CHAT)
    fingerprint: str = ""
    logprobs: bool = False
    counts: bool = False
    signs: tuple[Sign, ...] = ()
    grace_s: float = 5.0
    fills: bool = False
    empty: bool = False
    weights: str = ""
    adapters: tuple[str, ...] = ()
    sleeps: bool = False


#: Flag of vLLM, and of the fake engine, without which it can't be put to sleep.
SLEEP_FLAG = "--enable-sleep-mode"


def unshared() -> Refusal:
    """Adapters come and go by operation endpoints, which know no key: only a private socket may have them."""
    return Refusal(
        "adapter_needs_socket",
        "this worker's engines listen on TCP, where anybody could load and unload adapters",
        "let the worker's owner set `unix = true`, or merge the adapter into its base",
        "starting",
    )


class Engine(Protocol):
    """One kind of engine."""

    @property
    def kind(self) -> str:
        """The word in ``EngineSpec.kind``."""
        ...

    def plan(self, spec: EngineSpec, model: str, version: str, site: Site) -> Launch | Refusal:
        """How to run this version here. ``spec`` has passed the worker's policy: its path is absolute."""
        ...


def own_probe(spec: EngineSpec, default: tuple[Probe, ...]) -> tuple[Probe, ...]:
    """The version's own probe where it has one; what it leaves out is the engine kind's."""
    probe = spec.probe
    if not probe.path and not probe.body:
        return tuple(msgspec.structs.replace(p, expect=probe.expect) for p in default)
    path = probe.path or default[0].path
    same = next((p for p in default if p.path == path), Probe())
    return (Probe(path, probe.body or same.body, probe.expect),)


# Every failure of a child process of vLLM ends with the same lines; what really happened stands above them.
_HIDES = re.compile(
    r"root cause|Engine core initialization failed|Failed core proc|failed due to an exception in a background process"
)
#: ``(Worker pid=1) INFO 11-23 23:05:31 [a.py:1]`` (vLLM), ``INFO:     `` (uvicorn), ``INFO:name:`` (Python's logging),
#: and a time before the level (others).
_PREFIX = re.compile(
    r"^(?:\([^)]*\)\s*)?(?:\[?\d{4}-\d\d-\d\d[T ][\d:.,]+Z?\]?\s+(?:-\s+)?)?"
    r"\[?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b\]?(?::(?:[\w.]+:)?)?"
    r"\s*(?:\d\d-\d\d \d\d:\d\d:\d\d\s+)?(?:\[[^\]]*\]\s?)?"
)
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)(?:: .*)?$")
_ERROR = re.compile(r"\berror: |^FATAL\b|Segmentation fault|Killed")


def cause(lines: Sequence[str]) -> str:
    """The line of a failed engine's log that names the cause; empty where none does.

    vLLM's last lines are the same for every failure of a child process (a recorded one stands in the tests).
    The cause is the first exception that is named; where there is none, the first line marked as an error.
    """
    error = ""
    for n, line in enumerate(lines):
        prefix = _PREFIX.match(line)
        level, text = (prefix[1], line[prefix.end() :].rstrip()) if prefix else ("", line.rstrip())
        if level in ("DEBUG", "INFO", "WARNING") or not text or _HIDES.search(text):
            continue
        if _EXCEPTION.match(text):
            return _with_detail(text, lines[n + 1 : n + 3])
        marked = level in ("ERROR", "CRITICAL") or _ERROR.search(text)
        if marked and not error and not text.startswith(("Traceback", " ")):
            error = text
    return error


def _with_detail(text: str, after: Sequence[str]) -> str:
    """A pydantic error names its field and reason on the lines below it."""
    if "validation error" not in text:
        return text
    detail = (_PREFIX.sub("", line).strip() for line in after)
    return " ".join((text, *(d for d in detail if d)))
