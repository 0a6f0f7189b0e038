"""Counts of one step by arm: requests, units, users, the run of dead answers. Knows no evidence and no decision."""

from __future__ import annotations

import math
from datetime import datetime  # noqa: TC003  part of public signatures

import msgspec

from turnout.core.judging.users import Users  # noqa: TC001  part of public signatures
from turnout.events.health import (
    INFRASTRUCTURE,
    HealthEvent,
    HealthSampled,
    Histogram,
    ProbeFailed,
    ProbePassed,
    ShadowSampled,
)

#: Outcomes that say nothing about the version: the client's doing, or the drain's.
NOT_JUDGED = ("bad_request", "client_gone", "drained")
#: Errors of one user that count against the ceiling while two versions are compared.
USER_MOST = 5

_KEYS_KEPT = 16_384  # more than an hour of windows
_BIN_MOST = 400  # 1e16 ms: no clock measures more


class Arm:
    """What one version did in the step.

    Attributes:
        requests: answered or failed; without those that say nothing about the version.
        errors: of them.
        units: that the split assigned.
        unit_errors: units with an error, each once for all gateways and revisions.
        anonymous: units without a sticky key.
        signs: sign → requests.
        total_ms: to the last byte.

    Args:
        users_of: the step's users, of both arms.
    """

    def __init__(self, users_of: Users) -> None:
        self.requests = 0
        self.errors = 0
        self.units = 0
        self.unit_errors = 0
        self.anonymous = 0
        self.signs: dict[str, int] = {}
        self.total_ms: Histogram = {}
        self._users_of = users_of
        self._users: dict[tuple[str, int], int] = {}
        self._failed: dict[str, int] = {}

    @property
    def users(self) -> int:
        """Distinct sticky users, at least: one user may be seen by each gateway, and again after each revision."""
        return max(self._users.values(), default=0)

    @property
    def failed_users(self) -> int:
        """Sticky users with an error."""
        return len(self._failed)

    @property
    def worst_user(self) -> int:
        """Errors of the one with the most."""
        return max(self._failed.values(), default=0)

    def take(self, sample: HealthSampled) -> Counted:
        """Count one window."""
        errors = sample.errors
        requests = sample.requests - sum([sample.outcomes.get(outcome, 0) for outcome in NOT_JUDGED])
        forgiven = 0
        for user, count in sample.bad_users.items():
            before = self._failed.get(user, 0)
            self._failed[user] = before + count
            forgiven += count - max(0, min(USER_MOST - before, count))
        again = {what: self._users_of.again(what, cells) for what, cells in sample.showed.items()}
        unit_errors = max(0, sample.unit_errors - again.get("error", 0))
        unit_signs = {sign: max(0, count - again.get(sign, 0)) for sign, count in sample.unit_signs.items()}
        self.requests += requests
        self.errors += errors
        self.units += sample.assigned
        self.unit_errors += unit_errors
        self.anonymous += sample.assigned - sample.users
        if sample.users:
            where = (sample.gateway, sample.revision)
            self._users[where] = self._users.get(where, 0) + sample.users
        _add(self.signs, sample.signs)
        for bin, count in sample.total_ms.items():
            self.total_ms[bin] = self.total_ms.get(bin, 0) + count
        return Counted(sample, requests, errors, unit_errors, unit_signs, min(forgiven, errors))

    def take_copies(self, sample: ShadowSampled) -> int:
        """Count one window of copies; returns how many failed."""
        failed = sample.only_copy_failed + sample.both_failed
        self.requests += sample.copies
        self.errors += failed
        _add(self.signs, sample.signs)
        for bin, count in sample.copy_ms.items():
            self.total_ms[bin] = self.total_ms.get(bin, 0) + count
        return failed


class Counted(msgspec.Struct, frozen=True, gc=False):
    """One window, counted.

    Attributes:
        sample: as it came.
        requests: that say something about the version.
        errors: of them.
        unit_errors: units whose first error of the step this is.
        unit_signs: sign → units that show it for the first time in the step.
        forgiven: errors of users that had their share of them already.
    """

    sample: HealthSampled
    requests: int
    errors: int
    unit_errors: int
    unit_signs: dict[str, int]
    forgiven: int


class Windows:
    """Which samples were read, how many could not be, and how long each gateway has been seen for."""

    def __init__(self) -> None:
        self.read = 0
        self.unreadable_row = 0
        self.unreadable_why = ""
        self._keys: dict[tuple[object, ...], None] = {}
        self._spans: dict[str, tuple[datetime, datetime]] = {}

    @property
    def gateways(self) -> int:
        """How many were heard of."""
        return len(self._spans)

    @property
    def seconds(self) -> float:
        """From first to newest sample, each gateway by its own clock; the longest."""
        spans = [(last - first).total_seconds() for first, last in self._spans.values()]
        return max(0.0, *spans, 0.0)

    def repeated(self, sample: HealthSampled | ShadowSampled) -> bool:
        """Whether the sample was here before. A gateway that starts again counts its windows from 1 again."""
        key = (sample.gateway, sample.version, sample.window, sample.started)
        if key in self._keys:
            return True
        self._keys[key] = None
        if len(self._keys) > _KEYS_KEPT:
            del self._keys[next(iter(self._keys))]
        return False

    def readable(self, sample: HealthSampled | ShadowSampled) -> bool:
        """Whether the sample can be meant; where it can, its time counts."""
        if why := unreadable(sample):
            self.unreadable_row += 1
            self.unreadable_why = f"{why} (window {sample.window} of {sample.version} by {sample.gateway})"
            return False
        self.unreadable_row = 0
        self.read += 1
        span = self._spans.get(sample.gateway)
        first, last = span or (sample.started, sample.ended)
        self._spans[sample.gateway] = (min(first, sample.started), max(last, sample.ended))
        return True


class Dead:
    """Infrastructure errors in a row, all gateways together, without an answer between them."""

    def __init__(self) -> None:
        self._runs: dict[str, int] = {}

    @property
    def run(self) -> int:
        """How many there are now."""
        return sum(self._runs.values())

    def take(self, sample: HealthSampled) -> None:
        """One window of the target. A run that began before the step counts from the step on."""
        refused = sum([count for outcome, count in sample.outcomes.items() if outcome in INFRASTRUCTURE])
        before = self._runs.get(sample.gateway, 0)
        if sample.run < before + refused or (not sample.run and sample.outcomes.get("ok")):  # it answered somebody
            self._runs.clear()
            before = 0
        self._runs[sample.gateway] = min(sample.run, before + refused)


class Probes:
    """Golden questions that instances of the target failed in a row.

    Args:
        instances: whose probes count; all of the target's where it is empty.
    """

    def __init__(self, instances: tuple[str, ...]) -> None:
        self._instances = instances
        self._rows: dict[str, ProbeFailed] = {}

    @property
    def worst(self) -> ProbeFailed | None:
        """The newest failure of the instance with the longest row."""
        return max(self._rows.values(), key=lambda probe: (probe.row, probe.instance), default=None)

    def take(self, event: ProbePassed | ProbeFailed) -> None:
        """One probe of the target."""
        if self._instances and event.instance not in self._instances:
            return
        if isinstance(event, ProbeFailed):
            self._rows[event.instance] = event
        else:
            self._rows.pop(event.instance, None)


def unreadable(event: HealthEvent) -> str:
    """Why a sample can't be meant; empty where it can."""
    if isinstance(event, ProbePassed | ProbeFailed):
        return ""
    if isinstance(event, ShadowSampled):
        counts = (event.copies, event.dropped, event.both_ok, event.both_failed)
        alone = (event.only_copy_failed, event.only_primary_failed)
        return _odd_counts((*counts, *alone), event.signs) or _odd_histograms((event.copy_ms, event.primary_ms))
    if not (math.isfinite(event.share) and 0.0 <= event.share <= 1.0):
        return f"its share is {event.share}"
    single = (event.requests, event.assigned, event.unit_errors, event.users, event.run)
    tables = (event.outcomes, event.signs, event.unit_signs, event.bad_users)
    if odd := _odd_counts(single, *tables):
        return odd
    if event.users > event.assigned:
        return f"{event.users} of {event.assigned} units are users"
    if sum(event.outcomes.values()) > event.requests:
        return f"{sum(event.outcomes.values())} of {event.requests} requests have ended"
    for answers in event.answers.values():
        if odd := _odd_answers(answers):
            return odd
    return _odd_histograms((*event.first_ms.values(), event.token_ms, event.total_ms, event.tokens))


def _odd_counts(single: tuple[int, ...], *tables: dict[str, int]) -> str:
    if min(single) < 0 or any(min(table.values()) < 0 for table in tables if table):
        return "a count is negative"
    return ""


def _odd_answers(answers: dict[int, list[int]]) -> str:
    for bins in answers.values():
        if not bins:
            return "a user has no answer"
        if min(bins) < 0 or max(bins) > _BIN_MOST:
            return "a user has an answer in a bin that can't be"
    return ""


def _odd_histograms(histograms: tuple[Histogram, ...]) -> str:
    for histogram in histograms:
        if histogram and (min(histogram.values()) < 0 or min(histogram) < 0 or max(histogram) > _BIN_MOST):
            return "a histogram has a bin or a count that can't be"
    return ""


def _add(into: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        into[name] = into.get(name, 0) + count
