"""A gateway that samples two versions, for tests of the judge. Time is simulated: a quarter of a second a window."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from turnout.core.judging.judge import Judge, Question
from turnout.core.judging.judgement import Judgement, JudgeSettings
from turnout.events.health import HealthEvent, HealthSampled, Histogram, ProbeFailed, ProbePassed, bin_of

if TYPE_CHECKING:
    from collections.abc import Iterable

START = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = JudgeSettings(error_ceiling=0.05, latency_ceiling_ms=5000.0)
QUESTION = Question(settings=SETTINGS, source="v1", target="v2", step=2, first_revision=5)


def judged(events: Iterable[HealthEvent], question: Question = QUESTION) -> Judgement:
    judge = Judge(question)
    for event in events:
        judge.take(event)
    return judge.judgement()


def settled(*, compare: tuple[str, ...] = (), **changes: object) -> Question:
    """A question in which a pass lacks nothing but evidence."""
    settings = msgspec.structs.replace(SETTINGS, min_requests=1, min_users=0, min_seconds=0.0, compare=compare)
    return msgspec.structs.replace(QUESTION, settings=settings, **changes)


class Gateway:
    """Samples in the order in which it sends them. ``share``: of the target."""

    def __init__(self, name: str = "g1", share: float = 0.1, revision: int = 5, clock: datetime = START) -> None:
        self.name = name
        self.share = share
        self.revision = revision
        self.clock = clock
        self.sent: list[HealthEvent] = []
        self._windows: dict[str, int] = {}
        self._runs: dict[str, int] = {}

    def window(self, *samples: HealthSampled, seconds: float = 0.25) -> list[HealthEvent]:
        """End a window of both versions."""
        started, self.clock = self.clock, self.clock + timedelta(seconds=seconds)
        made = [msgspec.structs.replace(sample, started=started, ended=self.clock) for sample in samples]
        self.sent += made
        return list(made)

    def of(
        self,
        version: str,
        ok: int = 0,
        *,
        refused: int = 0,
        failed: int = 0,
        signs: dict[str, int] | None = None,
        users: int = 0,
        bad_users: dict[str, int] | None = None,
        unit_errors: int | None = None,
        first_ms: float = 0.0,
        total_ms: float = 0.0,
        **changes: object,
    ) -> HealthSampled:
        """One version's sample; without ``users`` every request is a unit."""
        number = self._windows[version] = self._windows.get(version, 0) + 1
        self._runs[version] = 0 if ok or failed else self._runs.get(version, 0) + refused
        requests = ok + refused + failed
        outcomes = {"ok": ok, "refused": refused, "http_error": failed}
        sample = HealthSampled(
            gateway=self.name,
            model="chat",
            version=version,
            window=number,
            revision=self.revision,
            share=self.share if version == "v2" else 1.0 - self.share,
            started=START,
            ended=START,
            requests=requests,
            outcomes={outcome: count for outcome, count in outcomes.items() if count},
            signs=signs or {},
            assigned=users or requests,
            unit_errors=refused + failed if unit_errors is None else unit_errors,
            unit_signs=signs or {},
            users=users,
            bad_users=bad_users or {},
            run=self._runs[version],
            first_ms={"stream/4k": spread(first_ms, ok, number)} if first_ms and ok else {},
            total_ms=spread(total_ms, ok, number) if total_ms and ok else {},
        )
        return msgspec.structs.replace(sample, **changes)


def spread(middle_ms: float, count: int, number: int = 0) -> Histogram:
    """Values around a median; ``number``: of the window, so that few values in each are spread all the same."""
    made: Histogram = {}
    for n in range(number * count, (number + 1) * count):
        bin = bin_of(middle_ms) + (n % 7) * 3 - 9
        made[bin] = made.get(bin, 0) + 1
    return made


def probe_failed(row: int, instance: str = "i2", version: str = "v2") -> ProbeFailed:
    return ProbeFailed(instance, "chat", version, row, row, "the answer is empty", START)


def probe_passed(instance: str = "i2", version: str = "v2") -> ProbePassed:
    return ProbePassed(instance, "chat", version, 9, 0.1, START)
