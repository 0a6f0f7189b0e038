"""What a judge says, and what it was asked: the words between judge, strategy and log. Knows no formula."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from turnout.events.switch import Figure


class Decision(StrEnum):
    """What the evidence says at one moment."""

    FAIL = "fail"  # evidence of harm: roll back
    PASS = "pass"  # noqa: S105  evidence of no harm, and enough of it: go on
    HOLD = "hold"  # neither yet
    INVALID = "invalid"  # the comparison itself is broken (sample ratio): freeze, and tell
    ERROR = "error"  # the evidence can't be read: hold, never pass, never fail


class Judgement(msgspec.Struct, frozen=True):
    """The decision and everything that it was made from: a receipt.

    Attributes:
        decision: what the evidence says.
        rule: the rule that decided, e.g. ``dead: 5 refused in a row``; empty while it holds.
        reason: one sentence for people, with the numbers.
        metric: name of the figure that weighed most; empty where none did.
        step: of the switch; in the bake the last step's number.
        source_requests, target_requests: counted in this step.
        source_errors, target_errors: likewise.
        target_users: distinct sticky users of the target in this step.
        seconds: from the first to the newest sample of the step, by the samples' own times.
        missing: what is missing for a pass, in words with numbers; empty where nothing is.
        figures: all comparisons.
        samples: how many windows were read; ``gateways`` from how many gateways.
    """

    decision: Decision
    rule: str = ""
    reason: str = ""
    metric: str = ""
    step: int = 0
    source_requests: int = 0
    target_requests: int = 0
    source_errors: int = 0
    target_errors: int = 0
    target_users: int = 0
    seconds: float = 0.0
    missing: str = ""
    figures: tuple[Figure, ...] = ()
    samples: int = 0
    gateways: int = 0


class JudgeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a switch is judged; every default is safe. Frozen with the switch.

    Attributes:
        mode: ``on``; ``observe`` (measured and shown, never decides); ``none`` (a rollout without a judge must be
            asked for).
        alpha_rollback: chance of rolling a good version back, over the whole switch.
        alpha_promote: chance of promoting a version that is worse than the margin, for each metric.
        error_ceiling: share of requests that may fail, whatever the source does; None for the alert threshold's.
        latency_ceiling_ms: p95 to the last byte; None for the alert threshold's.
        error_margin: promotion needs evidence that the target's error rate is below so many times the source's.
        latency_margin: the same for the time to the first byte.
        latency_tolerance: rollback by latency needs evidence that it is above so many times the source's.
        min_requests, min_users, min_seconds: exposure of the target in each step before a pass; users only where
            requests are sticky. A rollback needs none.
        dead_run: infrastructure errors in a row, without an answer between them, that are a dead version.
        compare: which comparisons may decide; empty for all. A dead target, failing probes and a broken split always
            do.
    """

    mode: str = "on"
    alpha_rollback: float = 0.01
    alpha_promote: float = 0.05
    error_ceiling: float | None = None
    latency_ceiling_ms: float | None = None
    error_margin: float = 3.0
    latency_margin: float = 1.2
    latency_tolerance: float = 1.1
    min_requests: int = 50
    min_users: int = 20
    min_seconds: float = 60.0
    dead_run: int = 5
    compare: tuple[str, ...] = ()
