"""ABTestSwitch: both versions side by side until enough is known, then a report; the source stays."""

from __future__ import annotations

from datetime import timedelta

from turnout.core.judging.judgement import Decision
from turnout.core.strategies.base import Action, Evidence, GoBack, Operation, Wait
from turnout.core.strategies.levels import Levels, acting, at_level, climb, level_of
from turnout.core.strategies.parameters import Parameters, Trial, read, spoken


class ABTestSwitch(Levels):
    """A fixed, sticky split that ends at a count of requests, a time or a decision, whichever comes first.

    The target gets all traffic only where the policy asks for the winner and the evidence says that the target is not
    worse, or where an operator promotes it.
    """

    name = "ab"

    def read(self, parameters: dict[str, object]) -> Parameters | tuple[str, ...]:
        """Split, end, shadow and judge."""
        return read(self.name, parameters)

    def at_level(self, parameters: Parameters, operation: Operation, evidence: Evidence) -> Action:
        """A shadow is left as everywhere; the split is left when the experiment has ended."""
        if level_of(parameters, operation).mirror or parameters.trial is None:
            return at_level(parameters, operation, evidence)
        trial, judgement = parameters.trial, acting(parameters, evidence)
        ended = _ended(parameters, trial, operation, evidence)
        if not ended:
            until = (operation.since or evidence.now) + timedelta(seconds=trial.duration_s)
            return Wait(_awaited(parameters, trial, evidence), until)
        passed = judgement is not None and judgement.decision is Decision.PASS
        if not trial.winner:
            return GoBack(f"{ended}; {operation.source} stays, pick is none", "concluded")
        if passed:
            return climb(parameters, operation, f"{ended}; {operation.target} is not worse and pick is winner")
        missing = "" if judgement is None else judgement.missing or judgement.reason
        unproven = f"nothing shows that {operation.target} is not worse" + (f" ({missing})" if missing else "")
        return GoBack(f"{ended}; {operation.source} stays, {unproven}", "concluded")


def _ended(parameters: Parameters, trial: Trial, operation: Operation, evidence: Evidence) -> str:
    """Why the experiment is over; empty while it runs."""
    judgement = acting(parameters, evidence)
    if trial.decision and judgement is not None and judgement.decision is Decision.PASS:
        return f"the evidence decided: {judgement.reason or 'it passes'}"
    requests = _requests(parameters, evidence)
    if trial.samples is not None and requests >= trial.samples:
        return f"{requests:,} of {trial.samples:,} requests were answered"
    if operation.since is not None and evidence.now >= operation.since + timedelta(seconds=trial.duration_s):
        return f"{spoken(trial.duration_s)} are over"
    return ""


def _awaited(parameters: Parameters, trial: Trial, evidence: Evidence) -> str:
    """What would end the experiment."""
    ends = [f"{spoken(trial.duration_s)} from its start"]
    if trial.samples is not None:
        ends.insert(0, f"{_requests(parameters, evidence):,} of {trial.samples:,} requests")
    if trial.decision:
        ends.append("a decision")
    return "the experiment runs until the first of: " + ", ".join(ends)


def _requests(parameters: Parameters, evidence: Evidence) -> int:
    judgement = evidence.judgement
    if judgement is None or parameters.judge.mode == "none":
        return 0
    return judgement.source_requests + judgement.target_requests
