"""Switches under load while processes are killed: nothing may fail but what a killed process itself had in its hands.

``turnout up`` with two gateway processes and two fake-engine versions, switched back and forth without a bake while
streaming clients and a prober never rest. Every few seconds one process is ended by SIGKILL, each kind in turn: NATS
server, controller, worker, a gateway, the engine of the version that serves nothing. ``turnout up`` starts it again.

A killed gateway takes the requests that run through it along; nobody can save those. They are counted apart, by their
times: sent before that process was gone (the kernel takes some milliseconds to end it, and accepts connections for it
until then), ended within a second of the kill. Every other kill must hurt no request at all.

    python bench/chaos.py [--quick] [--switches 1000]
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import busy
import msgspec
import processes
import report
import switches
import system

from turnout.events.chain import verify_chain
from turnout.events.store import Unavailable
from turnout.workers import running
from turnout.workers.client import CommandRejected, ModelSwitcher, connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from busy import Asked

    from turnout.events.envelope import Recorded
    from turnout.workers.client import Client

STREAMING = 12
TOKENS = 20
#: Seconds between two kills: longer than the slowest process takes to be back.
EVERY_S = 4.0
#: A killed process is gone after this, and the requests that it had are over.
_DYING_NS, _OVER_NS = 100_000_000, 1_000_000_000
_PATIENCE_S = 120.0
_ARGS = '["--first-token-ms=10", "--token-ms=5", "--tokens=20"]'
_CONFIGURATION = f"""
[models.chat]
active = "v1"
[models.chat.versions.v1]
engine = "fake"
args = {_ARGS}
[models.chat.versions.v2]
engine = "fake"
args = {_ARGS}
"""
KINDS = ("nats", "controller", "worker", "gateway", "engine")


class Kill(msgspec.Struct):
    """A process that was killed, and when (CLOCK_MONOTONIC, nanoseconds)."""

    kind: str
    at_ns: int


def run(quick: bool, wanted: int = 0) -> report.Outcome:
    """Switch so many times (default: 200 where it is quick, else 1,000)."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        with system.Turnout(folder / "turnout", _CONFIGURATION, arguments=("--processes", "2")) as turnout:
            return asyncio.run(_drive(turnout, folder / "seen", wanted or (200 if quick else 1000)))


async def _drive(turnout: system.Turnout, path: Path, wanted: int) -> report.Outcome:
    async with connect(turnout.nats, actor="bench") as client:
        await switches.serve_both(client)
        kills: list[Kill] = []
        done: list[tuple[str, switches.Switch]] = []
        between = asyncio.Lock()  # an engine is killed while it serves nothing: between two switches
        with busy.Busy(turnout.port, STREAMING, TOKENS, path) as clients:
            killer = asyncio.create_task(_kill_each_in_turn(turnout, client, kills, between))
            phases: Counter[str] = Counter()
            active, other = "v1", "v2"
            for _ in range(wanted):
                async with between:
                    id, one, phase = await _switch(client, other)
                phases[phase] += 1
                if phase == "completed":
                    done.append((id, one))
                    active, other = other, active
            killer.cancel()
            await asyncio.gather(killer, return_exceptions=True)
            await asyncio.sleep(1.0)
            seen = await asyncio.to_thread(clients.stop)
        log = await switches.whole_log(client)
    switches.note_times(log, dict(done))
    return _outcome([one for _, one in done], phases, kills, seen, log)


async def _switch(client: Client, target: str) -> tuple[str, switches.Switch, str]:
    """As an operator would: asked again with the same id until it is answered, waited for whatever dies meanwhile."""
    asked_ns = time.monotonic_ns()
    command = f"chaos-{asked_ns}"
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            operation = await ModelSwitcher(client).switch_model("chat", target, bake_s=0.0, reason="chaos", id=command)
            answered_ns = time.monotonic_ns()
            view = await operation.wait(deadline - time.monotonic())
            return operation.id, switches.Switch(target, asked_ns, answered_ns), view.phase
        except Unavailable:
            if time.monotonic() > deadline:
                raise
        except CommandRejected as e:
            # The version that serves is being restored, or the switch before this one is just being closed.
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)
            command = f"chaos-{asked_ns}-{e.answer.code}-{time.monotonic_ns()}"


async def _kill_each_in_turn(turnout: system.Turnout, client: Client, kills: list[Kill], between: asyncio.Lock) -> None:
    gateways = itertools.cycle(("gateway-1", "gateway-2"))
    for kind in itertools.cycle(KINDS):
        await asyncio.sleep(EVERY_S)
        if kind == "engine":
            async with between:
                kills.append(_kill(kind, await _idle_engine(turnout, client)))
            continue
        name = next(gateways) if kind == "gateway" else kind
        kills.append(_kill(kind, await _pid(turnout, name)))


def _kill(kind: str, pid: int) -> Kill:
    at_ns = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    return Kill(kind, at_ns)


async def _pid(turnout: system.Turnout, name: str) -> int:
    """Of a process that is up, together with all others: one kill at a time."""
    while True:
        found = running.find(turnout.folder / ".turnout")
        if found is not None and all(found.processes.values()):
            return found.processes[name]
        await asyncio.sleep(0.05)


async def _idle_engine(turnout: system.Turnout, client: Client) -> int:
    """Engine of the version that has no traffic and gets none at this moment."""
    worker = await _pid(turnout, "worker")
    while True:
        try:
            view = await client.model("chat")
        except Unavailable:
            view = None
        if view is not None and not view.switch:
            for pid in _engines(turnout, worker):
                words = processes.argv(pid)
                if any(word.startswith("--version=") and word != f"--version={view.active}" for word in words):
                    return pid
        await asyncio.sleep(0.002)


def _engines(turnout: system.Turnout, worker: int) -> list[int]:
    """Fake engines of this turnout, adopted ones too: by the folder that their socket lies in."""
    mine = str(turnout.folder)
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != worker:
            words = processes.argv(int(entry.name))
            if any(word.endswith("engines.fake_server") for word in words) and any(mine in word for word in words):
                found.append(int(entry.name))
    return found


def _outcome(
    done: list[switches.Switch], phases: Counter[str], kills: list[Kill], seen: list[Asked], log: list[Recorded]
) -> report.Outcome:
    seen.sort(key=lambda asked: asked.sent_ns)
    gateways = [kill.at_ns for kill in kills if kill.kind == "gateway"]
    bad = [asked for asked in seen if asked.outcome != "ok"]
    taken = [a for a in bad if any(a.sent_ns < at + _DYING_NS and at <= a.ended_ns < at + _OVER_NS for at in gateways)]
    lost = [asked for asked in bad if asked not in taken]
    stale = switches.stale_answers(done, seen)
    chain = list(verify_chain(log))
    ids = Counter(recorded.envelope.id for recorded in log)
    twice = sum(count - 1 for count in ids.values())
    of_kind = Counter(kill.kind for kill in kills)
    if lost:
        print(*(_story(asked, kills) for asked in lost[:20]), sep="\n", file=sys.stderr)
    figures: dict[str, object] = {
        "switches": sum(phases.values()),
        "phases": dict(phases),
        "kills": dict(of_kind),
        "requests": len(seen),
        "failed": sum(asked.outcome == "failed" for asked in lost),
        "cut": sum(asked.outcome == "cut" for asked in lost),
        "stale": len(stale),
        "taken_by_killed_gateways": len(taken),
        "lost": [_story(asked, kills) for asked in lost[:20]],
        "events": len(log),
        "events_twice": twice,
        "breaks_of_the_chain": len(chain),
    }

    def hurt(kind: str) -> int:
        """Requests that were lost within the time that belongs to kills of this kind."""
        return sum(_after(asked, kills) == kind for asked in lost)

    goal = f"{figures['failed']} / {figures['cut']} / {len(stale)} of {len(seen):,}"
    return report.Outcome(
        figures=figures,
        tables=[
            report.Table(
                f"{sum(phases.values()):,} switches while a process is killed every {EVERY_S:g} s",
                ["killed", "times", "failed or cut after it", "taken along"],
                [[kind, str(of_kind[kind]), str(hurt(kind)), _taken(kind, taken)] for kind in KINDS],
                [
                    f"{len(seen):,} requests by {STREAMING} streaming clients and a prober. The switches ended as: "
                    + ", ".join(f"{phase} {count:,}" for phase, count in phases.most_common())
                    + f". The log: {len(log):,} events, {twice} of them twice, {len(chain)} breaks of the chain."
                ],
            )
        ],
        goals=[
            report.Goal(
                "failed / cut / stale over 1,000 switches with kill -9 of every kind",
                "0 / 0 / 0",
                goal,
                not (lost or stale) if sum(phases.values()) >= 1000 else None,
            ),
            report.Goal(
                "the log after it: events twice, breaks of the chain",
                "0, 0",
                f"{twice}, {len(chain)}",
                not (twice or chain),
            ),
        ],
    )


def _story(asked: Asked, kills: list[Kill]) -> dict[str, object]:
    before = [kill for kill in kills if kill.at_ns <= asked.ended_ns]
    at_ns, kind = (before[-1].at_ns, before[-1].kind) if before else (0, "")
    return {
        "killed": kind,
        "sent_s_after": (asked.sent_ns - at_ns) / 1e9,
        "ended_s_after": (asked.ended_ns - at_ns) / 1e9,
        "outcome": asked.outcome,
        "reason": asked.reason,
    }


def _after(asked: Asked, kills: list[Kill]) -> str:
    """Kind of the last kill before this request's end."""
    before = [kill for kill in kills if kill.at_ns <= asked.ended_ns]
    return before[-1].kind if before else ""


def _taken(kind: str, taken: list[Asked]) -> str:
    return str(len(taken)) if kind == "gateway" else ""


def _with_count(bench: Callable[[bool, int], report.Outcome]) -> int:
    wanted = 0
    if "--switches" in sys.argv:
        at = sys.argv.index("--switches")
        wanted = int(sys.argv[at + 1])
        del sys.argv[at : at + 2]
    return report.main("chaos", lambda quick: bench(quick, wanted))


if __name__ == "__main__":
    raise SystemExit(_with_count(run))
