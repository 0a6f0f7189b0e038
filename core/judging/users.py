"""Sticky users of one step: a user counts once, whichever gateways saw it. Knows no evidence and no decision.

A user is known by the number of a cell, the same at every gateway. Two users in one cell are of one version and count
as one.
"""

from __future__ import annotations

from collections import deque
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turnout.events.health import HealthSampled, Histogram

#: What a user was answered in this time counts as a whole, once: the mean of several answers says more than the first.
#: It is a time and no number of answers, so that when a user counts does not depend on its version.
WHILE = timedelta(seconds=30)


class Answered:
    """What one user was answered, all in the stratum of the first answer.

    Attributes:
        is_target: whose answers they are.
        stratum: of all of them.
        count: how many.
        total, squares: of their bins.
    """

    __slots__ = ("count", "is_target", "squares", "stratum", "total")

    def __init__(self, stratum: str, is_target: bool) -> None:
        self.stratum = stratum
        self.is_target = is_target
        self.count = self.total = self.squares = 0

    def add(self, bins: list[int]) -> None:
        """More answers."""
        for bin in bins:
            self.count += 1
            self.total += bin
            self.squares += bin * bin


class Users:
    """Who was seen in the step.

    Args:
        target: name of the version that is judged.

    Attributes:
        of_target: users that the target has answered.
    """

    def __init__(self, target: str) -> None:
        self.of_target = 0
        self._target = target
        self._answered: dict[int, Answered] = {}
        self._showed: dict[str, set[int]] = {}
        self._waiting: dict[str, deque[tuple[datetime, Answered]]] = {}  # gateway → in the order of first answers

    def first_answers(self, sample: HealthSampled) -> dict[str, Histogram]:
        """Read one window.

        Returns:
            Stratum → first bytes of the users that were not seen before in this step, the first one of each.
        """
        found: dict[str, Histogram] = {}
        is_target = sample.version == self._target
        for stratum, answers in sample.answers.items():
            for cell, bins in answers.items():
                user = self._answered.get(cell)
                if user is None:
                    user = self._answered[cell] = Answered(stratum, is_target)
                    self.of_target += is_target
                    self._waiting.setdefault(sample.gateway, deque()).append((sample.ended + WHILE, user))
                    first = found.setdefault(stratum, {})
                    first[bins[0]] = first.get(bins[0], 0) + 1
                if user.stratum == stratum:
                    user.add(bins)
        return found

    def again(self, what: str, cells: Iterable[int]) -> int:
        """How many of those who show something have shown it before in this step."""
        before = self._showed.setdefault(what, set())
        again = 0
        for cell in cells:
            if cell in before:
                again += 1
            before.add(cell)
        return again

    def after_a_while(self, gateway: str, now: datetime) -> list[Answered]:
        """Users whose time is up, each of them once. Times are those of the gateway that saw the user first."""
        waiting, found = self._waiting.get(gateway), list[Answered]()
        while waiting and waiting[0][0] <= now:
            found.append(waiting.popleft()[1])
        return found
