"""How durations are written on the command line."""

from __future__ import annotations

import click
import pytest

from turnout.workers.cli.terminal import Duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("30s", 30), ("500ms", 0.5), ("5m", 300), ("5min", 300), ("1h", 3600), ("1h30m", 5400), ("0", 0)],
)
def test_a_duration_is_seconds(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 m", "-3s", "1h30", "s", "5d", "1.2.3s", "1e3"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no duration"):
        Duration().convert(text, None, None)
