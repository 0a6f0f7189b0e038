"""What the house promises about itself: each invariant has tests of its name, decisions are short, versions agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from turnout.events.version import VERSION

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("folder", ["tests/sim", "tests/process"])
def test_every_invariant_of_the_architecture_has_a_test_of_its_name(folder: str) -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    numbers = set(re.findall(r"^\| (\d) \|", page, re.MULTILINE))
    sources = "\n".join(file.read_text() for file in (ROOT / folder).rglob("test_*.py"))

    tested = set(re.findall(r"def test_invariant_(\d)_", sources))

    assert numbers == set("123456789")
    assert tested == numbers


@pytest.mark.parametrize("file", sorted((ROOT / "docs/decisions").glob("*.md")), ids=lambda file: file.stem)
def test_a_decision_is_half_a_page_of_context_decision_and_consequences(file: Path) -> None:
    text = file.read_text()

    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert len(text.splitlines()) <= 40


def test_the_changelog_names_the_version_of_the_package() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert newest is not None
    assert newest[1] == VERSION
