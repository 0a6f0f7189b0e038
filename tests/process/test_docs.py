"""The examples of README and docs do what they say: every ``console`` and ``python`` block is run, beside one ``up``.

A block that can't be run says why, in a comment right before it: ``<!-- not run: why -->``. Ports and the path of the
command are the test's own; nothing else is changed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.process.conftest import Up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120.0
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>console|python)\n(?P<text>.*?)^```$", re.M | re.S
)
_COMMAND = re.compile(r"^\$ (.*(?:\n {4}.*)*)", re.M)

pytestmark = [pytest.mark.process, pytest.mark.nats]


class Block(msgspec.Struct, frozen=True):
    """One example. ``why`` it is not run; empty where it is."""

    file: str
    line: int
    kind: str
    text: str
    why: str


def blocks() -> list[Block]:
    """All examples, in the order in which a reader meets them."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        Block(
            str(file.relative_to(ROOT)),
            text.count("\n", 0, found.start("text")),
            found["kind"],
            found["text"],
            found["why"] or "",
        )
        for file in files
        for text in [file.read_text(encoding="utf-8")]
        for found in _BLOCK.finditer(text)
    ]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, eventually: Callable[[Callable[[], object]], None]
) -> Iterator[Path]:
    """A folder in which ``turnout up`` runs, and in which ``.venv/bin/turnout`` is this checkout's command."""
    made = tmp_path_factory.mktemp("docs")
    up = Up(made)
    command = made / ".venv" / "bin" / "turnout"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m turnout.workers.cli "$@"\n')
    command.chmod(0o755)
    said = up.start()
    try:
        assert said["status"] == "ready", said
        eventually(lambda: up.running()["processes"].get("admin"))  # the others do not wait for it
        yield made
    finally:
        up.stop(signal.SIGINT)
        up.close()


@pytest.mark.parametrize("block", [pytest.param(one, id=f"{one.file}:{one.line}") for one in blocks()])
def test_an_example_of_the_docs_runs(folder: Path, block: Block) -> None:
    if block.why:
        pytest.skip(block.why)
    said = msgspec.json.decode((folder / ".turnout" / "up.json").read_bytes())
    text = block.text
    for usual, here in (("http://127.0.0.1:8400", said["gateway"]), ("http://127.0.0.1:8401", said["admin"])):
        text = text.replace(usual, here)
    if block.kind == "console":
        commands = [command.replace("\n    ", "\n") for command in _COMMAND.findall(text)]
        assert commands, "a console block has lines that begin with '$ '"
        args = ["bash", "-euo", "pipefail", "-c", "\n".join(commands)]
    else:
        args = [sys.executable, "-c", text]
    done = subprocess.run(
        args,
        cwd=folder,
        env={**_environment(), "PYTHONPATH": str(ROOT / "src"), "NATS_URL": said["nats"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert "urn:turnout:problem" not in done.stdout, done.stdout


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TURNOUT_")}
