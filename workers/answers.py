"""Answers of the controller that are raised on the asker's side. Knows no connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turnout.core.decider import Failed, Rejected


class CommandRejected(Exception):
    """turnout refused the command; nothing has changed. ``answer`` has code, reason and hint."""

    def __init__(self, answer: Rejected) -> None:
        super().__init__(f"{answer.reason}; {answer.hint} [{answer.code}]")
        self.answer = answer


class ControllerBug(Exception):
    """The controller failed on a command by its own fault; nothing was written. ``answer`` says more."""

    def __init__(self, answer: Failed) -> None:
        super().__init__(f"{answer.reason}; {answer.hint}")
        self.answer = answer
