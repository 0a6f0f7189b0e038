"""Facts of one switch, from the request to its end. Names here are storage format."""

from __future__ import annotations

from datetime import datetime

import msgspec

from turnout.events.route import Hold


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
        policy: name of the model's policy that gave strategy and parameters; empty where the command gave them.
        hold: where there is no place for both versions, requests may wait within these bounds while one makes room for
            the other; None: such a switch is not begun.
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
    policy: str = ""
    hold: Hold | None = None


class HoldStarted(msgspec.Struct, frozen=True, gc=False):
    """There is no place for both: new requests wait, ``version`` finishes what it has and leaves, the target comes.

    From here to ``HoldReleased`` no version can take all traffic at once: whoever allowed the hold has waived that.

    Attributes:
        switch: id of the switch.
        version: the one that leaves, its source.
        revision: of the route without any version, by which gateways let requests wait.
        allowed_by: name of the policy that allows it; empty where the command does.
        expected_s: the pause as measured loads and stops foretell it; None where the target was never loaded.
        at: UTC.
    """

    switch: str
    version: str
    revision: int
    allowed_by: str
    expected_s: float | None
    at: datetime


class HoldReleased(msgspec.Struct, frozen=True, gc=False):
    """The requests that waited go on to ``version``, ``seconds`` after the first of them had to wait."""

    switch: str
    version: str
    seconds: float


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
    """Traffic level number ``step``: the target gets ``weight`` percent from route revision ``revision`` on.

    ``mirror``: percent of the requests that are copied to the target; their answers reach nobody.
    """

    switch: str
    step: int
    weight: float
    revision: int
    reason: str
    at: datetime
    mirror: float = 0.0


class StepApplied(msgspec.Struct, frozen=True, gc=False):
    """All live gateways (named) route by the step's revision or a later one. ``seconds`` since the step started."""

    switch: str
    step: int
    revision: int
    gateways: tuple[str, ...]
    seconds: float


class Figure(msgspec.Struct, frozen=True, gc=False):
    """One measured comparison.

    Attributes:
        name: ``errors``, ``error_ceiling``, ``first_byte``, ``first_byte_p95``, ``token_time``, ``empty``,
            ``repetition``, ``length_stop``, ``tokens``, ``sample_ratio``, ``dead``, ``probes``, ``latency_ceiling``,
            ``shadow_errors``.
        source: the source's value (a share, ms, tokens); None where there is none.
        target: the target's.
        e: evidence of harm so far in this step (1 at the start; e-value). A number in any case, 1e300 at most.
        e_needed: from there on it is enough.
        e_good: evidence of no harm, like ``e``; None where the metric is not asked for promotion.
        e_good_needed: from there on it is enough.
        low, high: confidence limits of target/source, None where they make no sense yet.
    """

    name: str
    source: float | None = None
    target: float | None = None
    e: float = 1.0
    e_needed: float = 100.0
    e_good: float | None = None
    e_good_needed: float = 20.0
    low: float | None = None
    high: float | None = None


class VerdictReached(msgspec.Struct, frozen=True):
    """The judge decided: the receipt has everything that the decision was made from.

    Attributes:
        decision: ``fail`` (rolled back in the same batch), ``pass`` (the strategy may go on), ``inconclusive`` (time is
            up without an answer) or ``invalid`` (the comparison itself is broken).
        rule: what decided; ``reason`` is one sentence for people; ``metric`` the figure that weighed most.
        seconds: from the step's first sample to its newest.
        samples: windows read, from so many ``gateways``.
    """

    switch: str
    step: int
    decision: str
    rule: str
    reason: str
    metric: str
    source_requests: int
    target_requests: int
    source_errors: int
    target_errors: int
    target_users: int
    seconds: float
    figures: tuple[Figure, ...]
    samples: int
    gateways: int
    at: datetime


class SwitchPaused(msgspec.Struct, frozen=True, gc=False):
    """The switch stays at its step until somebody or ``until`` (UTC) moves it on.

    ``cause``: ``operator``, ``pause`` (the policy's), ``inconclusive`` or ``invalid``.
    """

    switch: str
    cause: str
    reason: str
    at: datetime
    until: datetime | None = None


class SwitchResumed(msgspec.Struct, frozen=True, gc=False):
    """It goes on. The time it stood still is not counted."""

    switch: str
    reason: str
    at: datetime


class SwitchPromoted(msgspec.Struct, frozen=True, gc=False):
    """An operator let it past step ``step``; ``full``: past every further step, pause and analysis."""

    switch: str
    step: int
    full: bool
    reason: str
    at: datetime


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
    """The target loses everything from route revision ``revision`` on.

    Attributes:
        cause: ``abort`` or ``undo`` (an operator), ``deadline``, ``failure`` (no instance left), ``verdict``,
            ``inconclusive``, or ``concluded`` (an experiment has ended and the source stays).
        to: the version that gets it, where that is not the source: the source had no ready instance, and this was the
            newest version that is known to be good and had one. Empty for the source.
    """

    switch: str
    revision: int
    cause: str
    reason: str
    at: datetime
    to: str = ""


class RolledBack(msgspec.Struct, frozen=True, gc=False):
    """All live gateways (named) route by the rollback's revision. The end of a switch that went wrong or was undone.

    ``proof``: the instance of the version that went back to work which answered its golden probe since then; empty
    where none did in time, and an alert says so.
    """

    switch: str
    gateways: tuple[str, ...]
    seconds: float
    proof: str = ""


class SwitchAborted(msgspec.Struct, frozen=True, gc=False):
    """An operator ended the switch; where traffic had moved, it is back on the source."""

    switch: str
    reason: str


class SwitchConcluded(msgspec.Struct, frozen=True, gc=False):
    """An experiment ended as planned and the source stays: nothing went wrong. ``kept`` has all the traffic."""

    switch: str
    kept: str
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
    | VerdictReached
    | SwitchPaused
    | SwitchResumed
    | SwitchPromoted
    | BakeStarted
    | DrainStarted
    | SwitchCompleted
    | RollbackStarted
    | HoldStarted
    | HoldReleased
    | RolledBack
    | SwitchAborted
    | SwitchConcluded
    | SwitchFailed
)
