"""The strategy's shape: (operation, evidence) → next action with its reason. Knows no saga and no route."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

import msgspec


class Operation(msgspec.Struct, frozen=True):
    """What a strategy may know of its switch.

    Attributes:
        switch: its id.
        source: version that has the rest of the traffic; empty at a model's first switch.
        target: version that shall get all of it.
        step: number of the newest applied step, 0 before the first.
        weight: percent that the target has.
        since: UTC, when the newest step started; None before the first.
        parameters: the strategy's own, checked when the switch was asked for.
    """

    switch: str
    source: str
    target: str
    step: int
    weight: float
    since: datetime | None
    parameters: dict[str, object]


class Evidence(msgspec.Struct, frozen=True):
    """What is known at the moment of the question. ``now``: UTC."""

    now: datetime


class SetWeight(msgspec.Struct, frozen=True):
    """Start the next step: the target gets ``weight`` percent."""

    weight: float
    reason: str


class Finish(msgspec.Struct, frozen=True):
    """The target has all the traffic and the strategy asks for nothing more: bake, then drain the source."""

    reason: str


Action = SetWeight | Finish


class SwitchingStrategy(Protocol):
    """Asked whenever the newest step is applied; answers the same for the same question."""

    @property
    def name(self) -> str:
        """The name that operators give."""
        ...

    def problems(self, parameters: dict[str, object]) -> tuple[str, ...]:
        """What can't be meant in the parameters, one sentence each."""
        ...

    def execute_switch(self, operation: Operation, evidence: Evidence) -> Action:
        """The next action."""
        ...
