"""docs/protocol.md is true: its examples are executed, in their order, by a program that has nothing but nats-py.

A nats-server and a controller are real; the document's worker, gateway and operator are played from its JSON blocks:
``command`` and ``question`` are asked, ``sample`` is published, and ``answer``, ``event`` and ``view`` must come true.
"""

# nats-py is typed in part
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import subprocess
import sys
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

import msgspec
import nats
import pytest
from nats.errors import TimeoutError as NoMessage
from nats.js.errors import NotFoundError

from turnout.core.handling import VERBS
from turnout.events import codec, health, subjects
from turnout.events.envelope import Envelope
from turnout.projections.alerts import AlertView
from turnout.projections.fleet import GatewayView, WorkerView
from turnout.projections.registry import ModelView
from turnout.projections.routing import RouteView
from turnout.projections.switches import SwitchView
from turnout.workers.controller.activity import QUESTION, AskUses, UsesReport
from turnout.workers.controller.health import QUESTIONS, AskEvidence, AskHealth, EvidenceReport, HealthReport
from turnout.workers.ports import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from datetime import timedelta

    from nats.aio.client import Client

    from turnout.workers.clock import SystemClock
    from turnout.workers.embedded import EmbeddedServer

pytestmark = [pytest.mark.process, pytest.mark.nats]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
WAIT_S = 30.0
#: What differs from run to run, and what the judge's formulas give; it must have the same type.
VARIES = frozenset(
    (
        *(
            "sequence",
            "time",
            "at",
            "deadline",
            "until",
            "registered_at",
            "checked_at",
            "requested_at",
            "idle_since",
            "ended_at",
            "bake_until",
        ),
        *("raised_at", "resolved_at"),
        *("seconds", "ready_s", "cutover_s", "drain_s", "log", "epoch"),
        *("e", "e_needed", "e_good", "e_good_needed", "low", "high"),
    )
)
VIEWS: dict[str, type[Any]] = {
    "model": ModelView,
    "route": RouteView,
    "switch": SwitchView,
    "worker": WorkerView,
    "gateway": GatewayView,
    "alert": AlertView,
    "_ckpt": Checkpoint,
}
#: Question → its body and its answer.
ASKED: dict[str, tuple[type[Any], type[Any]]] = {
    "health.get": (AskHealth, HealthReport),
    "switch.evidence": (AskEvidence, EvidenceReport),
    QUESTION: (AskUses, UsesReport),
}


class Block(NamedTuple):
    """A fenced block: its kind, what follows the kind on the fence, its text, and its line in the document."""

    kind: str
    rest: tuple[str, ...]
    text: str
    line: int

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def blocks(language: str = "json") -> Iterator[Block]:
    for found in re.finditer(rf"^```{language}(?: (\w+)((?: [^\s]+)*))?\n(.*?)^```$", DOCUMENT, re.M | re.S):
        line = DOCUMENT.count("\n", 0, found.start()) + 1
        yield Block(found[1] or "", tuple((found[2] or "").split()), found[3], line)


def same(example: Any, real: Any, key: str = "") -> bool:
    """Whether the real thing is the example, but for what varies."""
    if key in VARIES:
        number = isinstance(example, int | float) and isinstance(real, int | float)
        return number or isinstance(real, type(example))
    match example, real:
        case {}, {}:
            told, found = cast("dict[str, Any]", example), cast("dict[str, Any]", real)
            return told.keys() == found.keys() and all(same(told[k], found[k], k) for k in told)
        case [*told_items], [*found_items]:
            return len(told_items) == len(found_items) and all(map(same, told_items, found_items))
        case float(), float():
            return math.isclose(example, real, rel_tol=1e-9)
        case _:
            return bool(example == real)


@pytest.fixture
def controller(nats_server: EmbeddedServer, tmp_path: Path) -> Iterator[str]:
    """A controller on a nats-server of this test; the address."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TURNOUT_")} | {"PYTHONPATH": str(ROOT / "src")}
    with (tmp_path / "controller.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "turnout.workers.cli", "controller", "--nats", nats_server.url, "--json"],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        try:
            assert json.loads(process.stdout.readline())["status"] == "ready"
            yield nats_server.url
        finally:
            process.terminate()
            process.wait(WAIT_S)
            process.stdout.close()


def test_the_story_of_a_switch_happens_as_it_is_told(
    controller: str, runner: asyncio.Runner, clock: SystemClock
) -> None:
    runner.run(_play(controller, clock))


async def _play(url: str, clock: SystemClock) -> None:
    nc = await nats.connect(url)
    beating = asyncio.create_task(_beat(nc))
    events: list[tuple[str, str, Any]] = []
    tail = await nc.jetstream().subscribe("turnout.evt.>", ordered_consumer=True)
    answer: Any = None
    question: Block | None = None
    late: timedelta | None = None
    try:
        for block in blocks():
            if block.kind != "sample":
                late = None
            match block.kind:
                case "command":
                    question = None
                    asked = msgspec.json.encode(block.json)
                    answer = json.loads((await nc.request(block.rest[0], asked, timeout=WAIT_S)).data)
                    again = json.loads((await nc.request(block.rest[0], asked, timeout=WAIT_S)).data)
                    if ".gw." in block.rest[0]:
                        answer_again = {**again, "sequence": answer["sequence"], "events": answer["events"]}
                    else:
                        answer_again = again
                    assert answer_again == answer, f"line {block.line}: sent twice"
                case "question":
                    question = block
                case "sample":
                    late = late or clock.now() - _ended(block)
                    await _publish(block, late, nc)
                case "answer" if question is not None:  # what it tells of may be on its way
                    told: list[Any] = []
                    await _until(block, partial(_answers, block, question, nc, told), told)
                case "answer":
                    assert same(block.json, answer), f"line {block.line}: {answer}"
                case "event":
                    await _until(block, partial(_happened, block, events, tail), events)
                case "view":
                    seen: list[Any] = []
                    await _until(block, partial(_shows, block, nc, seen), seen)
                case _:
                    continue
    finally:
        beating.cancel()
        await nc.close()


async def _beat(nc: Client) -> None:
    while True:
        for subject in ("turnout.beat.worker.w1", "turnout.beat.gateway.g1"):
            await nc.publish(subject, b"{}")
        await asyncio.sleep(1)


async def _until(block: Block, true: Callable[[], Awaitable[bool]], found: list[Any]) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while not await true():  # noqa: ASYNC110  what is waited for is in another process
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"line {block.line}: {block.rest} did not come; found: {found[-5:]}") from None


async def _happened(block: Block, events: list[tuple[str, str, Any]], tail: Any) -> bool:
    with contextlib.suppress(NoMessage):
        while True:
            message = await tail.next_msg(timeout=0.05)
            events.append((message.subject, message.headers["Turnout-Type"], json.loads(message.data)))
    subject, name = block.rest
    return any(s == subject and t == name and same(block.json, body) for s, t, body in events)


async def _answers(block: Block, question: Block, nc: Client, told: list[Any]) -> bool:
    asked = msgspec.json.encode(question.json)
    told[:] = [json.loads((await nc.request(question.rest[0], asked, timeout=WAIT_S)).data)]
    return same(block.json, told[0])


def _ended(block: Block) -> datetime:
    sample = health.decode(block.text.encode())
    return sample.ended if isinstance(sample, health.HealthSampled | health.ShadowSampled) else sample.at


async def _publish(block: Block, late: timedelta, nc: Client) -> None:
    """As it stands there, but now: what is old says nothing about a version."""
    times = {key: datetime.fromisoformat(block.json[key]) for key in ("started", "ended", "at") if key in block.json}
    moved = block.json | {key: (time + late).isoformat() for key, time in times.items()}
    stored = await nc.jetstream().publish(block.rest[0], msgspec.json.encode(moved))
    assert stored.stream == "HEALTH", f"line {block.line}"


async def _shows(block: Block, nc: Client, seen: list[Any]) -> bool:
    (key,) = block.rest
    with contextlib.suppress(NotFoundError):
        entry = await (await nc.jetstream().key_value("VIEWS")).get(key)
        seen[:] = [json.loads(entry.value or b"null")]
        return same(block.json, seen[0])
    return False


def test_each_command_of_each_role_is_in_the_document() -> None:
    told = {block.rest[0] for block in blocks() if block.kind == "command"}
    real = {f"turnout.cmd.{role}.{verb}" for role, verb in VERBS}
    assert told == real
    for (role, verb), (body, _) in VERBS.items():
        row = _row(f"turnout.cmd.{role}.{verb}")
        if "as `switch.start`" not in row:
            assert all(f"`{field}`" in row for field in body.__struct_fields__), row


def test_each_question_is_in_the_document_with_its_fields_and_those_of_its_answer() -> None:
    assert ASKED.keys() == {*QUESTIONS, QUESTION}
    told = list(blocks())
    pairs = {a.rest[0]: (a, b) for a, b in pairwise(told) if a.kind == "question"}
    assert pairs.keys() == {f"turnout.cmd.ops.{verb}" for verb in ASKED}
    for verb, (asked, answered) in ASKED.items():
        question, answer = pairs[f"turnout.cmd.ops.{verb}"]
        assert all(f"`{field}`" in _row(question.rest[0]) for field in asked.__struct_fields__)
        assert question.json["body"].keys() == set(asked.__struct_fields__), f"line {question.line}"
        report = msgspec.json.decode(answer.text, type=answered)
        assert msgspec.to_builtins(report).keys() == answer.json.keys(), f"line {answer.line}"


def test_each_kind_of_sample_is_in_the_document_with_all_its_fields_and_words() -> None:
    told: dict[type[Any], set[str]] = {}
    for block in blocks():
        if block.kind == "sample":
            sample = health.decode(block.text.encode())
            assert block.rest == (subjects.health(sample.model, sample.version), block.json["type"]), block.line
            assert block.json.keys() <= msgspec.to_builtins(sample).keys(), f"line {block.line}"
            told.setdefault(type(sample), set()).update(block.json)
    fields = {kind: {"type", *kind.__struct_fields__} for kind in get_args(health.HealthEvent)}
    assert told == fields
    assert all(f"`{word}`" in DOCUMENT for word in (*health.OUTCOMES, *health.SIGNS))


def _row(subject: str) -> str:
    return next(line for line in DOCUMENT.splitlines() if line.startswith(f"| `{subject}` |"))


def test_each_event_type_is_in_the_document_with_all_its_fields() -> None:
    told = {block.rest[-1]: block for block in blocks() if block.kind in ("event", "shape")}
    assert set(told) == set(codec.TYPES)
    for name, block in told.items():
        event = msgspec.json.decode(block.text, type=codec.TYPES[name])
        assert msgspec.to_builtins(event).keys() == block.json.keys(), f"line {block.line}"


def test_each_kind_of_view_is_in_the_document_with_all_its_fields() -> None:
    told = {block.rest[0].partition(".")[0]: block for block in blocks() if block.kind == "view"}
    assert told.keys() == VIEWS.keys()
    for kind, block in told.items():
        view = msgspec.json.decode(block.text, type=VIEWS[kind])
        assert msgspec.to_builtins(view).keys() == block.json.keys(), f"line {block.line}"


def test_the_envelope_in_the_document_is_the_one_that_is_stored() -> None:
    (block,) = (block for block in blocks() if block.kind == "envelope")
    assert tuple(block.json) == Envelope.__struct_fields__
    assert msgspec.json.decode(block.text, type=Envelope).actor == "worker:w1"


def test_the_documents_programs_run(controller: str, tmp_path: Path) -> None:
    # the last one registers a model; the audit and the dashboard then have something to tell
    said: list[str] = []
    audit, dashboard, command = blocks("python")
    for n, block in enumerate((command, audit, dashboard)):
        script = tmp_path / f"{n}.py"
        script.write_text(block.text)
        env = {"PATH": os.environ["PATH"], "NATS_URL": controller}
        done = subprocess.run(
            [sys.executable, script], env=env, capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert done.returncode == 0, f"line {block.line}: {done.stderr}"
        said.append(done.stdout)
    assert said[0] == "accepted\n"
    assert "VersionRegistered" in said[1]
    assert said[2] == "code serves \n"
