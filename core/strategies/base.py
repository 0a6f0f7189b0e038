"""The strategy's shape: (operation, evidence) → next action with its reason. Knows no saga, no route and no formula."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

import msgspec

from turnout.core.judging.judgement import Judgement, JudgeSettings


class Operation(msgspec.Struct, frozen=True):
    """What a strategy may know of its switch.

    Attributes:
        switch: its id.
        source: version that has the rest of the traffic; empty at a model's first switch.
        target: version that shall get all of it.
        step: number of the newest applied step, 0 before the first.
        weight: percent that the target has.
        since: UTC, when every gateway had applied the newest step (pauses not counted); None before the first.
        parameters: the strategy's own, checked when the switch was asked for.
        promoted: number of the newest step that an operator has promoted past; 0 for none.
        full: an operator has asked for everything at once, without further steps, pauses and analysis.
    """

    switch: str
    source: str
    target: str
    step: int
    weight: float
    since: datetime | None
    parameters: dict[str, object]
    promoted: int = 0
    full: bool = False


class Evidence(msgspec.Struct, frozen=True):
    """What is known at the moment of the question. ``now``: UTC. ``judgement``: of this step; None where nothing is."""

    now: datetime
    judgement: Judgement | None = None


class SetWeight(msgspec.Struct, frozen=True):
    """Start the next step: the target gets ``weight`` percent, and copies of ``mirror`` percent of the requests."""

    weight: float
    reason: str
    mirror: float = 0.0


class Wait(msgspec.Struct, frozen=True):
    """Stay at this step.

    ``until``: UTC, when to ask again at the latest; None where only evidence or an operator moves it. ``reason`` says
    what is waited for.
    """

    reason: str
    until: datetime | None = None


class Hold(msgspec.Struct, frozen=True):
    """Stay until an operator decides: evidence or time has run out without an answer, or the policy says so.

    ``cause``: ``pause`` (the policy asked for one), ``inconclusive`` or ``invalid``.
    """

    reason: str
    cause: str = "pause"


class Finish(msgspec.Struct, frozen=True):
    """The target has all the traffic and the strategy asks for nothing more: bake, then drain the source."""

    reason: str


class GoBack(msgspec.Struct, frozen=True):
    """Give the source everything back.

    ``cause``: ``verdict`` (evidence of harm), ``inconclusive`` (the policy aborts then), ``deadline``, or ``concluded``
    (an experiment has ended and the source stays; nothing went wrong).
    """

    reason: str
    cause: str = "verdict"


Action = SetWeight | Wait | Hold | Finish | GoBack


class Stage(msgspec.Struct, frozen=True):
    """One traffic level of a plan, for people: ``switch --dry-run`` and ``get --watch`` show it.

    ``pause_s``: the shortest time at this level, None where an operator must promote. ``judged``: leaves it only on a
    pass.
    """

    weight: float
    pause_s: float | None = 0.0
    judged: bool = False
    mirror: float = 0.0


def judged_steps(stages: tuple[Stage, ...]) -> int:
    """How many steps share the error budget of a switch: levels with traffic or copies; the last is the bake's, too."""
    return max(1, sum(1 for stage in stages if stage.weight or stage.mirror))


class SwitchingStrategy(Protocol):
    """Asked whenever the newest step is applied; answers the same for the same question."""

    @property
    def name(self) -> str:
        """The name that operators give."""
        ...

    def problems(self, parameters: dict[str, object]) -> tuple[str, ...]:
        """What can't be meant in the parameters, one sentence each, naming the field."""
        ...

    def stages(self, parameters: dict[str, object]) -> tuple[Stage, ...]:
        """The traffic levels that it plans, in order."""
        ...

    def judging(self, parameters: dict[str, object]) -> JudgeSettings:
        """How the switch is judged."""
        ...

    def waits_s(self, parameters: dict[str, object]) -> tuple[float, float]:
        """Seconds that its levels take at least and at most; the time that an operator takes is in neither."""
        ...

    def describe(self, parameters: dict[str, object]) -> tuple[str, ...]:
        """The plan for people: one line for each of ``stages``, then what evidence does."""
        ...

    def execute_switch(self, operation: Operation, evidence: Evidence) -> Action:
        """The next action."""
        ...
