"""Judge: folds the samples of one step of a switch into a judgement. Pure: same events in the same order, same bytes.

What decides, in this order: a dead target, failing probes, evidence of harm; then evidence that can't be read, and a
split that is not what the route says; then enough evidence of no harm for a pass. Everything else holds, and says what
is missing. Knows no strategy and no clock.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import msgspec

from turnout.core.judging.comparison import SPLIT_NEEDED, Comparison
from turnout.core.judging.judgement import Decision, Judgement, JudgeSettings
from turnout.core.judging.kernels import Evidence, log_sum_exp
from turnout.core.judging.sentences import e_value, harmed, passed, split_broken
from turnout.core.judging.tally import Dead, Probes, Windows, unreadable
from turnout.events.health import HealthEvent, HealthSampled, ProbeFailed, ProbePassed, ShadowSampled
from turnout.events.switch import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Samples in a row that can't be read.
UNREADABLE_MOST = 4
#: Probes of one instance in a row that are more than a hiccup.
PROBES_MOST = 3

#: Every e-value that is told is a finite number: JSON has no infinity, and it would become null.
E_MOST = 1e300

#: Parts of the one error budget, by how the target is judged.
WEIGHTS: dict[str, dict[str, float]] = {
    "compared": {
        "errors": 0.25,
        "first_byte": 0.30,
        "first_byte_p95": 0.10,
        "token_time": 0.08,
        "empty": 0.06,
        "repetition": 0.05,
        "length_stop": 0.03,
        "error_ceiling": 0.10,
        "latency_ceiling": 0.03,
    },
    "shadow": {
        "shadow_errors": 0.35,
        "empty": 0.15,
        "repetition": 0.15,
        "error_ceiling": 0.25,
        "latency_ceiling": 0.10,
    },
    "alone": {"first_byte_p95": 0.25, "error_ceiling": 0.50, "latency_ceiling": 0.25},
}
#: The restarted forms must reach so many times what the plain ones need (docs/judging.md says what that costs).
CHANGE_COMPARED = 1000.0
CHANGE_CEILING = 100.0
#: Above this e-value a figure leans towards harm too much for a pass; errors may not lean at all.
LEANS = 3.0

_CEILINGS = frozenset(("error_ceiling", "latency_ceiling"))


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be judged: one step of a switch, or its bake.

    Attributes:
        settings: how; ceilings that are None there are none.
        source: version that has the rest of the traffic; empty where there is none.
        target: version that shall get all of it.
        step: number of the step, for the judgement. The target warms up in the first.
        steps: judged steps of the switch, the bake included: they share ``alpha_rollback``.
        first_revision: route revision of the step; samples of lower ones are not of this step.
        comparative: false where the target has all the traffic: held to ceilings and to what the source did before.
        instances: of the target, whose probes count; all of them where it is empty.
    """

    settings: JudgeSettings
    source: str
    target: str
    step: int
    steps: int = 1
    first_revision: int
    comparative: bool = True
    instances: tuple[str, ...] = ()


class _Line(msgspec.Struct, frozen=True, gc=False):
    """A signal that may decide, and its part of the budget. ``compared``: with a source, not with a ceiling."""

    name: str
    weight: float
    harm: Evidence
    compared: bool


class _Harm(msgspec.Struct, frozen=True, gc=False):
    """Enough evidence: of which figure most, how much, and how it came to be."""

    name: str
    log_e: float
    log_needed: float
    how: Literal["alone", "together", "changed"]


class Judge:
    """The judge of one step.

    Args:
        question: what is to be judged.
    """

    def __init__(self, question: Question) -> None:
        self._question = question
        self._beside = question.comparative and bool(question.source)
        self._windows = Windows()
        self._dead = Dead()
        self._probes = Probes(question.instances)
        self._comparison = Comparison(question.settings, question.target, beside=self._beside, warm=question.step > 1)

    def take(self, event: HealthEvent) -> None:
        """Read one event, in the order of arrival."""
        question = self._question
        if isinstance(event, ProbePassed | ProbeFailed):
            if event.version == question.target:
                self._probes.take(event)
            return
        mine = event.version == question.target
        if not mine and (event.version != question.source or not question.source):
            return
        if not mine and not self._beside:
            self._take_record(event)
        elif event.revision >= question.first_revision and not self._windows.repeated(event):
            self._take_window(event, mine)

    def _take_window(self, event: HealthSampled | ShadowSampled, mine: bool) -> None:
        if not self._windows.readable(event):
            return
        if isinstance(event, HealthSampled):
            self._comparison.take(event)
            if mine:
                self._dead.take(event)
        elif mine:
            self._comparison.take_copies(event)

    def _take_record(self, event: HealthSampled | ShadowSampled) -> None:
        """What the source did before the target had all the traffic: a measure, no part of this step."""
        if isinstance(event, HealthSampled) and not self._windows.repeated(event) and not unreadable(event):
            self._comparison.take_record(event)

    # What is decided

    def decision(self) -> Decision:
        """What the evidence says now, without the receipt."""
        probe = self._probes.worst
        if self._dead.run >= self._question.settings.dead_run or (probe is not None and probe.row >= PROBES_MOST):
            return Decision.FAIL
        if self._harmed() is not None:
            return Decision.FAIL
        if self._windows.unreadable_row >= UNREADABLE_MOST:
            return Decision.ERROR
        if self._comparison.split_broken:
            return Decision.INVALID
        return Decision.PASS if next(self._missing(), None) is None else Decision.HOLD

    def judgement(self) -> Judgement:
        """What the evidence says now, with everything that it was made from."""
        decision = self.decision()
        rule, reason, metric = self._why(decision)
        target, source = self._comparison.target, self._comparison.source
        return Judgement(
            decision=decision,
            rule=rule,
            reason=reason,
            metric=metric,
            step=self._question.step,
            source_requests=source.requests,
            target_requests=target.requests,
            source_errors=source.errors,
            target_errors=target.errors,
            target_users=self._comparison.target_users,
            seconds=self._windows.seconds,
            missing=", ".join(self._missing()) if decision is Decision.HOLD else "",
            figures=tuple(self._figures()),
            samples=self._windows.read,
            gateways=self._windows.gateways,
        )

    def _harmed(self) -> _Harm | None:
        """Enough evidence of harm, of one figure or of all together; None where there is not."""
        broken = self._comparison.split_broken
        lines = [line for line in self._lines() if not (line.compared and broken)]
        if not lines:
            return None
        needed = math.log(self._needed)
        logs = [math.log(line.weight) + line.harm.log_e for line in lines]
        most = max(logs)
        worst = lines[logs.index(most)]
        if most >= needed:
            return _Harm(worst.name, worst.harm.log_e, needed - math.log(worst.weight), "alone")
        if (total := log_sum_exp(logs)) >= needed:
            return _Harm(worst.name, total, needed, "together")
        return self._changed(lines, needed)

    def _changed(self, lines: list[_Line], needed: float) -> _Harm | None:
        """Harm that began late, after a good time: the restarted forms see it."""
        groups = [([line], CHANGE_CEILING) for line in lines if not line.compared]
        groups.append(([line for line in lines if line.compared], CHANGE_COMPARED))
        for group, times in groups:
            if not group:
                continue
            whole = sum([line.weight for line in group])
            logs = [math.log(line.weight / whole) + line.harm.log_change for line in group]
            if (total := log_sum_exp(logs)) >= needed + math.log(times):
                return _Harm(group[logs.index(max(logs))].name, total, needed + math.log(times), "changed")
        return None

    @property
    def _needed(self) -> float:
        return self._question.steps / self._question.settings.alpha_rollback

    def _decides(self, name: str) -> bool:
        return not self._question.settings.compare or name in self._question.settings.compare

    def _lines(self) -> list[_Line]:
        mode, harm = self._comparison.mode, self._comparison.harm()
        weights = {name: weight for name, weight in WEIGHTS[mode].items() if name in harm and self._decides(name)}
        whole = sum(weights.values())
        return [
            _Line(name, weight / whole, harm[name], mode != "alone" and name not in _CEILINGS)
            for name, weight in weights.items()
        ]

    # What a pass needs

    @property
    def _asked(self) -> tuple[str, ...]:
        """Figures that must show that there is no harm."""
        if self._comparison.mode == "compared":
            asked = tuple(name for name in ("errors", "first_byte") if self._decides(name))
            if asked:
                return asked
        ceiling = self._comparison.error_ceiling and self._decides("error_ceiling")
        return ("error_ceiling",) if ceiling else ()

    def _missing(self) -> Iterator[str]:
        """What a pass lacks, in words with numbers."""
        settings, target = self._question.settings, self._comparison.target
        seconds = self._windows.seconds
        if target.requests < settings.min_requests:
            yield f"{target.requests:,} of {settings.min_requests:,} requests"
        users = self._comparison.target_users + target.anonymous
        if self._comparison.sticky and users < settings.min_users:
            yield f"{users:,} of {settings.min_users:,} users"
        if seconds < settings.min_seconds:
            yield f"{seconds:.0f} of {settings.min_seconds:g} s"
        needed = 1.0 / settings.alpha_promote
        for name in self._asked:
            if (log_e := self._comparison.log_good(name)) < math.log(needed):
                yield f"{self._claim(name)} (e {e_value(log_e)} of {needed:.3g})"
        for line in self._lines():
            if line.harm.log_e > (1e-9 if line.name == "errors" else math.log(LEANS)):
                yield f"{line.name} leans towards harm (e {e_value(line.harm.log_e)})"

    def _claim(self, name: str) -> str:
        settings, source = self._question.settings, self._question.source
        match name:
            case "errors":
                return f"evidence that it fails less than {settings.error_margin:g} times as often as {source}"
            case "first_byte":
                return f"evidence that its first byte takes less than {settings.latency_margin:g} times as long"
            case _:
                return f"evidence that less than {settings.error_ceiling or 0.0:.3g} of its requests fail"

    # For people

    def _why(self, decision: Decision) -> tuple[str, str, str]:
        """Rule, reason and metric of a decision."""
        question, comparison = self._question, self._comparison
        match decision:
            case Decision.FAIL:
                rule, reason, metric = self._why_failed()
                return rule, reason + self._single_user(), metric
            case Decision.ERROR:
                row = self._windows.unreadable_row
                reason = f"{row} samples in a row can't be read, the newest because {self._windows.unreadable_why}"
                return f"unreadable: {row} in a row", reason, ""
            case Decision.INVALID:
                e = e_value(comparison.split.harm.log_e)
                rule = f"sample_ratio: e {e}, {SPLIT_NEEDED:,.0f} needed"
                return rule, split_broken(question.target, comparison), "sample_ratio"
            case Decision.PASS:
                asked = ", ".join(self._asked)
                rule = f"no harm in {asked}" if asked else "no harm"
                return rule, passed(question.source, question.target, comparison), ""
            case Decision.HOLD:
                return "", f"neither harm nor its absence is shown yet: {', '.join(self._missing())}", ""

    def _why_failed(self) -> tuple[str, str, str]:
        question, target = self._question, self._question.target
        if (run := self._dead.run) >= question.settings.dead_run:
            return f"dead: {run} refused in a row", f"{target} is dead: {run} requests in a row were refused", "dead"
        probe = self._probes.worst
        if probe is not None and probe.row >= PROBES_MOST:
            reason = f"{target} failed {probe.row} probes in a row on {probe.instance}: {probe.reason}"
            return f"probes: {probe.row} failed in a row", reason, "probes"
        found = self._harmed()
        if found is None:
            return "", "", ""
        e, needed = e_value(found.log_e), e_value(found.log_needed)
        said = harmed(found.name, question.source, target, question.settings, self._comparison)
        said += f" (e = {e}, needed {needed})"
        match found.how:
            case "alone":
                return f"{found.name}: e {e}, {needed} needed", said, found.name
            case "together":
                said = f"all signs together speak against {target}, most of all: {said}"
                return f"all together: e {e}, {needed} needed", said, found.name
            case "changed":
                return f"{found.name} since a change: {e}, {needed} needed", f"lately worse: {said}", found.name

    def _single_user(self) -> str:
        errors, most = self._comparison.target.errors, self._comparison.target.worst_user
        if errors < 2 or most < 0.8 * errors:
            return ""
        return f"; single user: {most:,} of the {errors:,} failures are one user's"

    def _figures(self) -> list[Figure]:
        """All comparisons that have something to show, or that a pass waits for."""
        comparison, settings, asked = self._comparison, self._question.settings, self._asked
        weights = {line.name: line.weight for line in self._lines()}
        figures: list[Figure] = []
        for name, evidence in (comparison.harm() | comparison.shown()).items():
            source, target = comparison.values(name)
            if source is None and target is None and name not in asked:
                continue
            low, high = comparison.limits(name)
            figure = Figure(
                name=name,
                source=source,
                target=target,
                e=_exp(evidence.log_e),
                e_needed=SPLIT_NEEDED if name == "sample_ratio" else self._needed / weights.get(name, 1.0),
                e_good=_exp(comparison.log_good(name)) if name in asked else None,
                e_good_needed=1.0 / settings.alpha_promote,
                low=low,
                high=high,
            )
            figures.append(figure)
        if run := self._dead.run:
            figures.append(Figure("dead", None, run, run, settings.dead_run))
        if (probe := self._probes.worst) is not None:
            figures.append(Figure("probes", None, probe.row, probe.row, PROBES_MOST))
        return figures


def _exp(log_e: float) -> float:
    """The e-value, E_MOST at most."""
    return E_MOST if log_e >= math.log(E_MOST) else math.exp(log_e)
