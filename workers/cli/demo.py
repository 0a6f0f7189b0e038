"""``turnout demo``: runs workers/demo.py, or a scenario of workers/scenarios.py, and shows what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
import msgspec

from turnout.events.model import EngineSpec
from turnout.events.units import size
from turnout.projections.audit import Audit
from turnout.workers import running
from turnout.workers.cli import report as reports
from turnout.workers.cli.audit import Lines
from turnout.workers.cli.doctor import nvidia_gpus
from turnout.workers.cli.terminal import DONE, FAILED, Duration, Terminal, common, rows, table
from turnout.workers.story import Story

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from turnout.workers import memory_scenarios, scenarios, tier_scenarios, waiting_scenarios
    from turnout.workers.demo import Latency, Outcome, Progress, Script

T = TypeVar("T")

#: Small enough for any machine; the models are made by `make setup-vllm`.
_VLLM_ARGS = ("--enforce-eager", "--max-model-len=1024")
_MODELS = Path(".models")
_FAKE_ARGS = ("--first-token-ms=20", "--token-ms=10", "--tokens=20", "--load-seconds=1")


#: Those of workers/scenarios.py, which is imported only where one is played.
SCENARIO_NAMES = (
    *("canary-good", "canary-dead", "canary-errors", "canary-slow", "canary-garbage", "canary-hung"),
    *("ab", "gradual", "shadow", "rules"),
)
#: Those of workers/tier_scenarios.py.
TIER_SCENARIO_NAMES = ("warm", "spare", "lora", "sleep")


#: Those of workers/memory_scenarios.py.
MEMORY_NAMES = ("evict", "two-workers", "many-versions")
#: Those of workers/waiting_scenarios.py.
WAITING_NAMES = ("on-demand", "hold")


@click.command()
@click.option("--engine", type=click.Choice(("vllm", "fake")), default=None, help="Default: vllm.")
@click.option(
    "--scenario",
    type=click.Choice((*SCENARIO_NAMES, *TIER_SCENARIO_NAMES, *MEMORY_NAMES, *WAITING_NAMES)),
    default=None,
    help="Play a rollout with the fake engine instead; ends with one JSON object (docs/scenarios.md).",
)
@click.option("--switches", type=click.IntRange(1), default=None, help="Back and forth; the last undoes. Default: 2.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests each second.")
@click.option("--seconds", type=Duration(), help="Load before, between and after the switches, together.")
@common
def demo(
    io: Terminal,
    engine: str | None,
    scenario: str | None,
    switches: int | None,
    rate: float | None,
    seconds: float | None,
) -> None:
    """Watch a switch and an undo under load, or a scenario: a rollout of a good or a bad candidate.

    Starts everything on this machine with its own NATS server, keeps streaming OpenAI clients busy, switches from one
    version to another and back, and shows what the clients saw. Touches nothing that runs already.
    """
    folder = Path(running.FOLDER).resolve() / "demo"
    if scenario is not None:
        if engine == "vllm" or switches is not None or (seconds is not None and scenario != "many-versions"):
            raise click.UsageError("a scenario runs with the fake engine, and for as long as its rollout takes")
        if scenario in MEMORY_NAMES:
            io.run_process(lambda: _play_memory(io, scenario, rate or 10.0, seconds or 30.0, folder))
        if scenario in WAITING_NAMES:
            io.run_process(lambda: _play_waiting(io, scenario, rate or 10.0, folder))
        play = _play_tier if scenario in TIER_SCENARIO_NAMES else _play
        io.run_process(lambda: play(io, scenario, rate, folder))

    async def work() -> int:
        from turnout.workers.demo import run

        return await _told(
            io,
            lambda progress: run(_script(engine or "vllm", switches or 2, rate, seconds), folder, progress),
            lambda outcome: _show(io, outcome),
        )

    io.run_process(work)


async def _play(io: Terminal, name: str, rate: float | None, folder: Path) -> int:
    from turnout.workers.scenarios import SCENARIOS, play

    scenario = SCENARIOS[name]
    if rate is not None:
        scenario = msgspec.structs.replace(scenario, rate=rate)
    io.say(scenario.about, "bold")
    return await _told(
        io, lambda progress: play(scenario, folder, progress), lambda outcome: _show_scenario(io, outcome)
    )


async def _play_tier(io: Terminal, name: str, rate: float | None, folder: Path) -> int:
    from turnout.workers.tier_scenarios import TIER_SCENARIOS, play

    scenario = TIER_SCENARIOS[name]
    io.say(scenario.about, "bold")
    return await _told(
        io, lambda progress: play(scenario, rate or 20.0, folder, progress), lambda outcome: _show_tier(io, outcome)
    )


def _show_tier(io: Terminal, outcome: tier_scenarios.TierOutcome) -> int:
    made = outcome.report
    audit, lines = Audit(), Lines(io)
    for recorded in outcome.log:
        entry = audit.entry(recorded)
        if entry.tone != "detail" and not io.json:
            lines.add(entry, recorded)
    io.say("")
    io.say(
        f"ready in {_seconds(made.ready_s)} by the {made.tier} tier; a new engine took {_seconds(made.cold_s)}", "bold"
    )
    io.say(f"{made.requests} requests: {made.failed} failed and {made.cut} were cut", "red" if made.failed else "")
    io.emit(made)
    return DONE if made.as_planned else FAILED


async def _play_memory(io: Terminal, name: str, rate: float, seconds: float, folder: Path) -> int:
    from turnout.workers import memory_scenarios

    io.say(memory_scenarios.SCENARIOS[name], "bold")
    return await _told(
        io,
        lambda progress: memory_scenarios.play(name, folder, progress, rate, seconds),
        lambda report: _show_memory(io, report),
    )


def _show_memory(io: Terminal, made: memory_scenarios.MemoryReport) -> int:
    io.say(
        f"{made.requests} requests: {made.failed} failed, {made.cut} cut; {made.switches} switches among "
        f"{made.versions} versions; at most {size(made.peak_bytes)} of {size(made.memory_bytes)} charged",
        "" if made.as_planned else "red",
    )
    if made.refused:
        io.say(f"refused: {made.refused}")
    for reason in made.reasons:
        io.say(f"not ok: {reason}", "red")
    io.emit(made)
    return DONE if made.as_planned else FAILED


async def _play_waiting(io: Terminal, name: str, rate: float, folder: Path) -> int:
    from turnout.workers import waiting_scenarios

    io.say(waiting_scenarios.SCENARIOS[name], "bold")
    return await _told(
        io,
        lambda progress: waiting_scenarios.play(name, folder, progress, rate),
        lambda report: _show_waiting(io, report),
    )


def _show_waiting(io: Terminal, made: waiting_scenarios.WaitingReport) -> int:
    io.say(
        f"{made.requests} requests: {made.failed} failed, {made.cut} cut; {made.held} waited for the last load, "
        f"at most {_seconds(made.longest_wait_s)}",
        "" if made.as_planned else "red",
    )
    if made.pause_s is not None:
        io.say(f"the pause took {_seconds(made.pause_s.measured)}, foretold were {_seconds(made.pause_s.foretold)}")
    for reason in made.reasons:
        io.say(f"not ok: {reason}", "red")
    io.emit(made)
    return DONE if made.as_planned else FAILED


async def _told(io: Terminal, work: Callable[[Progress], Awaitable[T]], show: Callable[[T], int]) -> int:
    """Do it and say what happens meanwhile, then show what came of it."""
    from turnout.workers.demo import DemoError

    try:
        with io.out.status("starting") if io.out.is_terminal and not io.json else _Quiet() as status:

            def progress(text: str) -> None:
                if io.out.is_terminal and not io.json:
                    status.update(text)
                else:
                    io.say(text)

            outcome = await work(progress)
    except DemoError as e:
        io.fail("demo_failed", str(e), "turnout doctor says what this machine has")
        return FAILED
    return show(outcome)


class _Quiet:
    """In the place of a spinner where there is no terminal."""

    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def update(self, text: str) -> None:
        """Nothing moves here."""


def _script(engine: str, switches: int, rate: float | None, seconds: float | None) -> Script:
    from turnout.workers.demo import DemoError, Script

    if engine == "fake":
        return Script(
            versions={v: EngineSpec("fake", args=(*_FAKE_ARGS, f"--seed={n}")) for n, v in enumerate(("v1", "v2"))},
            rate=rate or 20.0,
            seconds=seconds or 6.0,
            switches=switches,
            bake_s=0.5,
            patience_s=60.0,
            prompt="Say hello.",
            max_tokens=20,
        )
    folders = {v: (_MODELS / f"smollm2-{v}").resolve() for v in ("v1", "v2")}
    missing = [str(f) for f in folders.values() if not (f / "config.json").exists()]
    if missing:
        raise DemoError(f"the models are not there ({', '.join(missing)}); make them with: make setup-vllm")
    return Script(
        versions={v: EngineSpec("vllm", str(folder), args=_VLLM_ARGS) for v, folder in folders.items()},
        rate=rate or (5.0 if nvidia_gpus() else 0.2),  # two engines and their load on two cores are slow
        seconds=seconds or 60.0,
        switches=switches,
        bake_s=2.0,
        patience_s=1200.0,
        prompt="What is the capital of France?",
        max_tokens=12,
    )


def _show_scenario(io: Terminal, outcome: scenarios.Outcome) -> int:
    made = outcome.report
    story = Story(outcome.switch)
    for recorded in outcome.log:
        story.take(recorded)
    if story.report is not None and not io.json:
        io.say("")
        reports.show(io, story.report, outcome.log[-1].envelope.time)
        io.say("")
        io.say("What the clients saw", "bold")
        for text, good in _sentences(made):
            io.say(text, "" if good else "red")
        io.say("")
    io.emit(made)
    return DONE if made.as_planned else FAILED


def _sentences(made: scenarios.Report) -> list[tuple[str, bool]]:
    """What the clients saw, in words, each with whether it is as it should be."""
    lines = [
        (
            f"{made.requests} requests: {made.failed} failed and {made.cut} were cut by turnout, "
            f"{made.errors} met an error of an engine",
            not (made.failed or made.cut),
        )
    ]
    lines += [(f"{version} answered {count}", True) for version, count in made.versions.items()]
    if made.canary_requests_until_rollback is not None:
        loop = "" if made.control_loop_s is None else f", {made.control_loop_s:.2f} s after the sample that decided"
        lines.append((f"rolled back after {made.canary_requests_until_rollback} requests to the candidate{loop}", True))
    lines += [
        (f"of the {kind} prompts the candidate answered {share:.0%} while the traffic was split", True)
        for kind, share in made.shares.items()
        if share is not None
    ]
    if made.copies is not None:
        copies = made.copies
        lines.append(
            (
                f"{copies.answered} copies answered ({copies.failed} failed), {copies.dropped} dropped; clients waited "
                f"{_ms(copies.primary_p95_before_ms)} at p95 before, {_ms(copies.primary_p95_beside_ms)} beside them",
                True,
            )
        )
    lines += [(f"not ok: {reason}", False) for reason in made.reasons]
    return lines


def _show(io: Terminal, outcome: Outcome) -> int:
    report = outcome.report
    good = not (report.failed or report.cut or report.stale)
    if io.json:
        io.emit(report)
        return DONE if good else FAILED
    io.say("")
    io.say("What the log says", "bold")
    audit, lines = Audit(), Lines(io)
    for recorded in outcome.log:
        entry = audit.entry(recorded)
        if entry.tone != "detail":
            lines.add(entry, recorded)
    io.say("")
    io.say("What the clients saw", "bold")
    io.out.print(
        rows(
            table("requests", "failed", "cut", "stale", "switches", "ready", "cutover p50", "p99", "drain"),
            [
                [
                    str(report.requests),
                    str(report.failed),
                    str(report.cut),
                    str(report.stale),
                    str(report.switches),
                    _seconds(report.ready_s),
                    _ms(report.cutover_ms_p50),
                    _ms(report.cutover_ms_p99),
                    _seconds(report.drain_s),
                ]
            ],
        )
    )
    io.say("")
    io.out.print(
        rows(
            table("", "requests", "first token p50", "p95", "whole answer p50", "p95"),
            [_latency(name, latency) for name, latency in outcome.latency.items()],
        )
    )
    io.say("")
    for version, count in report.versions.items():
        io.say(f"{version} answered {count} times, e.g. {report.samples.get(version, '')!r}")
    for reason in report.reasons:
        io.say(f"not ok: {reason}", "red")
    io.say("")
    io.say("Try next", "bold")
    for line in (
        "turnout up                                      everything on this machine, to stay",
        "turnout register chat v1 --engine fake          a version",
        "turnout switch chat v1 --wait                   serve it",
        "turnout get chat --watch                        look at it while you switch",
    ):
        io.say(f"  {line}")
    return DONE if good else FAILED


def _latency(name: str, latency: Latency) -> list[str]:
    return [
        name,
        str(latency.requests),
        _ms(latency.first_p50_ms),
        _ms(latency.first_p95_ms),
        _ms(latency.p50_ms),
        _ms(latency.p95_ms),
    ]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
