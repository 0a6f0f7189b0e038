"""``turnout demo``: runs workers/demo.py and shows what it measured, what the log says, and what to try next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from turnout.events.model import EngineSpec
from turnout.projections.audit import Audit
from turnout.workers import running
from turnout.workers.cli.audit import Lines
from turnout.workers.cli.doctor import nvidia_gpus
from turnout.workers.cli.terminal import DONE, FAILED, Duration, Terminal, common, rows, table

if TYPE_CHECKING:
    from turnout.workers.demo import Latency, Outcome, Script

#: Small enough for any machine; the models are made by `make setup-vllm`.
_VLLM_ARGS = ("--enforce-eager", "--max-model-len=1024")
_MODELS = Path(".models")
_FAKE_ARGS = ("--first-token-ms=20", "--token-ms=10", "--tokens=20", "--load-seconds=1")


@click.command()
@click.option("--engine", type=click.Choice(("vllm", "fake")), default="vllm", show_default=True)
@click.option(
    "--switches", type=click.IntRange(1), default=2, show_default=True, help="Back and forth; the last undoes."
)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests each second.")
@click.option("--seconds", type=Duration(), help="Load before, between and after the switches, together.")
@common
def demo(io: Terminal, engine: str, switches: int, rate: float | None, seconds: float | None) -> None:
    """Watch a switch and an undo under load.

    Starts everything on this machine with its own NATS server, keeps streaming OpenAI clients busy, switches from one
    version to another and back, and shows what the clients saw. Touches nothing that runs already.
    """
    folder = Path(running.FOLDER).resolve() / "demo"

    async def work() -> int:
        from turnout.workers.demo import DemoError, run

        try:
            script = _script(engine, switches, rate, seconds)
            with io.out.status("starting") if io.out.is_terminal and not io.json else _Quiet() as status:

                def progress(text: str) -> None:
                    if io.out.is_terminal and not io.json:
                        status.update(text)
                    else:
                        io.say(text)

                outcome = await run(script, folder, progress)
        except DemoError as e:
            io.fail("demo_failed", str(e), "turnout doctor says what this machine has")
            return FAILED
        return _show(io, outcome)

    io.run_process(work)


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
