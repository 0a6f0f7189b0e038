"""How phases and outcomes are called and coloured, one place for all commands."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from turnout.workers.cli.terminal import BACK, DONE, FAILED, HELD

if TYPE_CHECKING:
    from datetime import datetime

    from turnout.projections.switches import SwitchView

_WORDS = {"stepping": "cutting over", "stepped": "cut over"}
_STYLES = {"completed": "green", "failed": "bold red", "rolled_back": "yellow", "aborted": "yellow"}
_CODES = {"completed": DONE, "failed": FAILED, "rolled_back": BACK, "aborted": BACK, "paused": HELD}


def phase_text(phase: str) -> str:
    """A phase or outcome in words: ``rolled_back`` is ``rolled back``."""
    return _WORDS.get(phase, phase.replace("_", " "))


def phase_style(phase: str) -> str:
    """Its colour."""
    return _STYLES.get(phase, "cyan")


def exit_code(view: SwitchView, *, back_was_asked: bool = False) -> int:
    """What ``--wait`` ends with. ``back_was_asked``: an undo, for which going back is the success."""
    if back_was_asked and not view.undo and view.phase in ("rolled_back", "aborted"):
        return DONE
    return _CODES.get(view.phase, FAILED)


def left_s(until: datetime | None, now: datetime) -> int:
    """Whole seconds until then, not below 0."""
    return max(0, math.ceil((until - now).total_seconds())) if until is not None else 0
