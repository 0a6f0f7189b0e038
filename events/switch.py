"""Facts of one switch, from the request to its end. Names here are storage format."""

from __future__ import annotations

from datetime import datetime

import msgspec


class SwitchRequested(msgspec.Struct, frozen=True):
    """An operator asked for the target version.

    Attributes:
        switch: id of the switch; also the salt of its sticky split.
        model: the served name.
        target: the version to switch to.
        source: the active version when it was asked, empty where the model served none.
        strategy: name of the strategy.
        parameters: the strategy's parameters, frozen for this switch.
        undo: true where this switch returns to the last known good version.
        reason: why, in the operator's words.
        deadline: UTC; the target must carry all its traffic by then, or the switch fails or rolls back.
        bake_s: seconds the source stays warm at full traffic before it drains.
        drain_s: seconds a leaving version's requests may still run before the gateway ends them with an error event.
        at: UTC, when it was asked.
    """

    switch: str
    model: str
    target: str
    source: str
    strategy: str
    parameters: dict[str, object]
    undo: bool
    reason: str
    deadline: datetime
    bake_s: float
    drain_s: float
    at: datetime


class InstancesRequested(msgspec.Struct, frozen=True, gc=False):
    """No ready instance of the target existed: these were asked for."""

    switch: str
    instances: tuple[str, ...]


class TargetReady(msgspec.Struct, frozen=True, gc=False):
    """The target has proven instances. ``seconds`` since the request; ``warm`` where nothing had to be loaded."""

    switch: str
    instances: tuple[str, ...]
    seconds: float
    warm: bool


class StepStarted(msgspec.Struct, frozen=True, gc=False):
    """Traffic level number ``step``: the target gets ``weight`` percent from route revision ``revision`` on."""

    switch: str
    step: int
    weight: float
    revision: int
    reason: str
    at: datetime


class StepApplied(msgspec.Struct, frozen=True, gc=False):
    """All live gateways (named) route by the step's revision or a later one. ``seconds`` since the step started."""

    switch: str
    step: int
    revision: int
    gateways: tuple[str, ...]
    seconds: float


class BakeStarted(msgspec.Struct, frozen=True, gc=False):
    """The target has all the traffic; the source stays warm until ``until`` (UTC)."""

    switch: str
    until: datetime


class DrainStarted(msgspec.Struct, frozen=True, gc=False):
    """From route revision ``revision`` on no gateway sends to ``version``; its requests run to their end."""

    switch: str
    version: str
    revision: int
    at: datetime


class SwitchCompleted(msgspec.Struct, frozen=True, gc=False):
    """The target is the active version; the source has left. ``drain_s`` since the drain started."""

    switch: str
    drain_s: float


class RollbackStarted(msgspec.Struct, frozen=True, gc=False):
    """The source gets everything back from route revision ``revision`` on.

    ``cause`` is ``abort`` or ``undo`` (an operator), ``deadline`` or ``failure``.
    """

    switch: str
    revision: int
    cause: str
    reason: str
    at: datetime


class RolledBack(msgspec.Struct, frozen=True, gc=False):
    """All live gateways (named) route by the rollback's revision. The end of a switch that went wrong or was undone."""

    switch: str
    gateways: tuple[str, ...]
    seconds: float


class SwitchAborted(msgspec.Struct, frozen=True, gc=False):
    """An operator ended the switch; where traffic had moved, it is back on the source."""

    switch: str
    reason: str


class SwitchFailed(msgspec.Struct, frozen=True, gc=False):
    """The target never got traffic. ``stage`` says where it stopped, ``log_tail`` is the engine's own last lines."""

    switch: str
    stage: str
    reason: str
    log_tail: tuple[str, ...] = ()


SwitchEvent = (
    SwitchRequested
    | InstancesRequested
    | TargetReady
    | StepStarted
    | StepApplied
    | BakeStarted
    | DrainStarted
    | SwitchCompleted
    | RollbackStarted
    | RolledBack
    | SwitchAborted
    | SwitchFailed
)
