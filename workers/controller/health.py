"""HealthMonitor: follows the health samples, keeps a judge for each running switch, and says how versions do.

Every controller follows: the leader's sagas ask it for judgements, and any controller may be asked how a model does.
What it holds can be read again from the stream, so a controller that takes over judges as the one before it did. Knows
the ports only.
"""

from __future__ import annotations

from collections import deque
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from turnout.core import health
from turnout.core.decider import Rejected
from turnout.core.judging.judge import Judge, Question
from turnout.core.judging.judgement import Decision, Judgement
from turnout.core.model import unknown_model
from turnout.core.strategies import STRATEGIES
from turnout.core.strategies.base import judged_steps
from turnout.core.switch import ENDED, SwitchState, unknown_switch
from turnout.events import subjects
from turnout.events.health import ProbeFailed, ProbePassed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from turnout.core.config import ModelSwitchingConfig
    from turnout.core.world import World
    from turnout.events.health import HealthEvent
    from turnout.workers.clock import Clock
    from turnout.workers.ports import Closeable, HealthReader

#: How far back a controller reads at its start, where no running switch is older.
LOOK_BACK = timedelta(minutes=15)
#: What can be asked of any controller; nothing is written.
QUESTIONS = frozenset(("health.get", "switch.evidence"))
#: Seconds between two looks for what is over a ceiling.
LOOK_S = 1.0
#: How much of what the source did before a switch is a measure of what is usual.
RECORD = timedelta(minutes=2)
#: Samples kept of one model; older ones are forgotten, except by the judges that have taken them.
KEPT = 20_000


class AskHealth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``health.get``: how do the versions of a model do?"""

    model: str


class AskEvidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``switch.evidence``: what does the judge see of a running switch?"""

    switch: str


class HealthReport(msgspec.Struct, frozen=True, tag="health", tag_field="status"):
    """The answer to ``health.get``. ``at``: UTC."""

    model: str
    at: datetime
    versions: tuple[health.VersionHealth, ...]


class EvidenceReport(msgspec.Struct, frozen=True, tag="evidence", tag_field="status"):
    """The answer to ``switch.evidence``; ``judgement`` is None where nothing is judged (now)."""

    switch: str
    at: datetime
    judgement: Judgement | None
    impact: health.SwitchImpact | None


class _Desk:
    """The judge of one switch's newest step."""

    __slots__ = ("_judgement", "judge", "step")

    def __init__(self, judge: Judge, step: int) -> None:
        self.judge = judge
        self.step = step
        self._judgement: Judgement | None = None

    def take(self, event: HealthEvent) -> None:
        self.judge.take(event)
        self._judgement = None

    def judgement(self) -> Judgement:
        if self._judgement is None:
            self._judgement = self.judge.judgement()
        return self._judgement


class HealthMonitor:
    """What this controller knows of how versions do.

    Args:
        world: read only.
        clock: of this process.
        config: thresholds.
        moved: called after new evidence has come.
        in_flight: of a model: version → requests that have not ended, as the gateways say.
    """

    def __init__(
        self,
        world: World,
        clock: Clock,
        config: ModelSwitchingConfig,
        moved: Callable[[], None],
        in_flight: Callable[[str], Mapping[str, int]],
    ) -> None:
        self._world = world
        self._clock = clock
        self._config = config
        self._moved = moved
        self._in_flight = in_flight
        self._recent: dict[str, deque[HealthEvent]] = {}
        self._desks: dict[str, _Desk] = {}
        self._found: tuple[health.Finding, ...] = ()
        self._look_at = 0.0

    async def follow(self, reader: HealthReader) -> Closeable:
        """Read what matters still, then follow.

        Raises:
            Unavailable: the store does not answer.
        """
        since = self._clock.now() - LOOK_BACK
        asked = [self._switch(id).requested_at for id in self._world.running]
        return await reader.follow(min([since, *(at for at in asked if at is not None)]), self.heard)

    def heard(self, event: HealthEvent) -> None:
        """A sample or a probe, in the stream's order."""
        recent = self._recent.get(event.model)
        if recent is None:
            recent = self._recent[event.model] = deque(maxlen=KEPT)
        recent.append(event)
        for id, desk in tuple(self._desks.items()):
            state = self._switch(id)
            if state.phase in ENDED:
                del self._desks[id]
            elif state.model == event.model:
                desk.take(event)
        self._moved()

    def judgement(self, switch: str) -> Judgement | None:
        """Of the switch's newest step; None before its first."""
        state = self._switch(switch)
        if state.phase in ENDED or state.phase == "unknown" or not state.step:
            self._desks.pop(switch, None)
            return None
        desk = self._desks.get(switch)
        if desk is None or desk.step != state.step:
            judge, known = Judge(self._question(state)), self._of_step(state)
            if not known:
                return judge.judgement()  # nothing of this step has been measured yet: that, too, is a judgement
            desk = self._desks[switch] = _Desk(judge, state.step)
            for event in known:
                desk.take(event)
        return desk.judgement()

    def _of_step(self, state: SwitchState) -> list[HealthEvent]:
        """What a judge of the step must have read, oldest first; nothing before the first sample of the step.

        Besides the step's own samples those of the source, from RECORD before the switch on: what it did while it had
        all the traffic is a measure.
        """
        known: list[HealthEvent] = []
        begun = False
        oldest = None if state.requested_at is None else state.requested_at - RECORD
        for event in reversed(self._recent.get(state.model, ())):
            if isinstance(event, ProbePassed | ProbeFailed):
                if state.requested_at is None or event.at >= state.requested_at:
                    known.append(event)
                continue
            if oldest is not None and event.ended < oldest:
                break
            begun = begun or (event.revision >= state.revision and event.version in (state.source, state.target))
            if event.revision >= state.revision or event.version == state.source:
                known.append(event)
        return known[::-1] if begun else []

    def check_model_health(self, model: str) -> tuple[health.VersionHealth, ...]:
        """How the versions do that a route names or that are loaded."""
        route = self._world.state("route", model)
        versions = {part.version: len(part.endpoints) for part in route.parts}
        for instance in self._world.alive:
            one = self._world.instances[instance]
            if one.model == model and one.phase == "ready":
                versions.setdefault(one.version, len(self._world.ready(model, one.version)))
        return health.check_model_health(
            self._recent.get(model, ()),
            model=model,
            versions=versions,
            thresholds=self._config.alert_thresholds,
            now=self._clock.now(),
            in_flight=self._in_flight(model),
        )

    def monitor_switch_impact(self, switch: str) -> health.SwitchImpact | None:
        """What clients noticed of a switch, as far as samples are kept.

        None where it is not known: no sample is kept of the time of a switch that has ended.
        """
        state = self._switch(switch)
        if state.requested_at is None:
            return None
        # nothing is written to a switch after its end
        ended = self._world.changed_at(subjects.event("switch", switch)) if state.phase in ENDED else None
        made = health.monitor_switch_impact(
            self._recent.get(state.model, ()),
            switch=switch,
            model=state.model,
            began=state.requested_at,
            ended=ended,
            now=self._clock.now(),
        )
        measured = made.before.requests + made.during.requests + made.after.requests
        return made if measured or ended is None else None

    def findings(self) -> tuple[health.Finding, ...]:
        """What is over a ceiling, or can't be judged; looked at once a second, as it reads minutes of samples."""
        now = self._clock.monotonic()
        if now < self._look_at:
            return self._found
        self._look_at = now + LOOK_S
        found: list[health.Finding] = []
        for model in sorted(self._recent):
            found.extend(health.findings(model, self.check_model_health(model), self._config.alert_thresholds))
        for id in sorted(self._world.running):
            judgement = self.judgement(id)
            if judgement is not None and judgement.decision is Decision.ERROR:
                state = self._switch(id)
                why = f"the evidence of switch {id} can't be read: {judgement.reason}"
                found.append(health.Finding(state.model, state.target, "judging_error", why))
        self._found = tuple(found)
        return self._found

    def answer(self, verb: str, body: bytes) -> HealthReport | EvidenceReport | Rejected:
        """Answer a question; ``verb`` is one of QUESTIONS."""
        try:
            if verb == "health.get":
                model = msgspec.json.decode(body, type=AskHealth).model
                if not self._world.state("model", model).model:
                    return unknown_model(model)
                return HealthReport(model, self._clock.now(), self.check_model_health(model))
            switch = msgspec.json.decode(body, type=AskEvidence).switch
        except msgspec.MsgspecError as e:
            return Rejected("request_invalid", f"{verb}: {e}", "see docs/protocol.md for the fields of the question")
        if self._switch(switch).phase == "unknown":
            return unknown_switch(switch)
        return EvidenceReport(switch, self._clock.now(), self.judgement(switch), self.monitor_switch_impact(switch))

    def _switch(self, id: str) -> SwitchState:
        state: SwitchState = self._world.state("switch", id)
        return state

    def _question(self, state: SwitchState) -> Question:
        strategy = STRATEGIES[state.strategy]
        thresholds = self._config.alert_thresholds
        settings = strategy.judging(state.parameters)
        return Question(
            settings=msgspec.structs.replace(
                settings,
                error_ceiling=settings.error_ceiling or thresholds.get("error_rate"),
                latency_ceiling_ms=settings.latency_ceiling_ms or thresholds.get("latency_p95"),
            ),
            source=state.source,
            target=state.target,
            step=state.step,
            steps=judged_steps(strategy.stages(state.parameters)),
            first_revision=state.revision,
            comparative=bool(state.source) and state.weight < 100,
            instances=tuple(one.instance for one in self._world.ready(state.model, state.target)),
        )
