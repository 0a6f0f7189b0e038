"""``health``: how the versions of a model do, and why that is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.text import Text

from turnout.core.health import WINDOW_S, HealthStatus
from turnout.projections.audit import seconds
from turnout.workers.cli.terminal import DONE, Terminal, common, rows, table
from turnout.workers.cli.words import ms_text, share_text
from turnout.workers.client import HealthMonitor

if TYPE_CHECKING:
    from rich.console import RenderableType

    from turnout.workers.client import Client
    from turnout.workers.controller.health import HealthReport

#: Colours of a status.
STYLES = {
    HealthStatus.HEALTHY: "green",
    HealthStatus.DEGRADED: "yellow",
    HealthStatus.UNHEALTHY: "bold red",
    HealthStatus.UNKNOWN: "dim",
}


@click.command()
@click.argument("model")
@common
def health(io: Terminal, model: str) -> None:
    """Show how the versions of MODEL do: requests, errors and latencies of the last minutes, probes, and a status."""

    async def work(client: Client) -> int:
        report = await HealthMonitor(client).check_model_health(model)
        if io.json:
            io.emit({"model": report.model, "at": report.at, "versions": report.versions})
            return DONE
        if not report.versions:
            io.say(f"no version of {model} is loaded or routed")
            io.next(f"turnout switch {model} VERSION --wait")
            return DONE
        io.show(health_table(report))
        for one in report.versions:
            for reason in one.reasons:
                io.say(Text.assemble((f"{one.version} is {one.status}: ", STYLES[one.status]), reason))
        return DONE

    io.run(work)


def health_table(report: HealthReport) -> RenderableType:
    """One line for each version."""
    made = table(
        "VERSION", "STATUS", f"REQUESTS IN {seconds(WINDOW_S)}".upper(), "ERRORS", "P50", "P95", "FIRST BYTE P95",
        "INSTANCES", "IN FLIGHT", "PROBE",
    )  # fmt: skip
    lines: list[list[str | Text]] = []
    for one in report.versions:
        counted = one.numbers
        limits = ""
        if counted.errors and counted.low is not None and counted.high is not None:
            limits = f" ({share_text(counted.low)} to {share_text(counted.high)})"
        lines.append(
            [
                one.version,
                Text(one.status, STYLES[one.status]),
                str(counted.requests),
                f"{counted.errors}{limits}",
                ms_text(counted.p50_ms),
                ms_text(counted.p95_ms),
                ms_text(counted.first_p95_ms),
                str(one.instances),
                str(one.in_flight),
                one.probe,
            ]
        )
    return rows(made, lines)
