"""What all strategies share: levels of traffic, left by time, evidence or an operator. Knows no strategy's defaults.

What comes first wins: evidence of harm, then all traffic reached, then an operator's promotion, then a comparison that
is broken, then the level's pause, its evidence and its deadline. Nothing here takes weight back but ``GoBack``.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from turnout.core.judging.judgement import Decision, Judgement, JudgeSettings
from turnout.core.strategies.base import Action, Evidence, Finish, GoBack, Hold, Operation, SetWeight, Stage, Wait
from turnout.core.strategies.parameters import Level, Parameters, Trial, spoken


class Levels:
    """A strategy that climbs levels. Those of ``turnout.core.strategies`` say what their parameters mean."""

    name = ""

    def read(self, parameters: dict[str, object]) -> Parameters | tuple[str, ...]:
        """The parameters, or what can't be meant in them."""
        raise NotImplementedError

    def problems(self, parameters: dict[str, object]) -> tuple[str, ...]:
        """What can't be meant in the parameters, one sentence each, naming the field."""
        read = self.read(parameters)
        return read if isinstance(read, tuple) else ()

    def stages(self, parameters: dict[str, object]) -> tuple[Stage, ...]:
        """The traffic levels that it plans, in order; none where the parameters can't be read."""
        read = self.read(parameters)
        if isinstance(read, tuple):
            return ()
        planned = [Stage(level.weight, level.pause_s, level.judged, level.mirror) for level in read.levels]
        ends = read.trial is not None and not read.trial.winner
        return tuple(planned) if ends else (*planned, Stage(100.0))

    def judging(self, parameters: dict[str, object]) -> JudgeSettings:
        """How the switch is judged; the safe defaults where the parameters can't be read."""
        read = self.read(parameters)
        return JudgeSettings() if isinstance(read, tuple) else read.judge

    def waits_s(self, parameters: dict[str, object]) -> tuple[float, float]:
        """Seconds that its levels take at least and at most; the time that an operator takes is in neither."""
        read = self.read(parameters)
        return (0.0, 0.0) if isinstance(read, tuple) else (read.shortest_s, read.longest_s)

    def describe(self, parameters: dict[str, object]) -> tuple[str, ...]:
        """The plan for people: one line for each of ``stages``, then what evidence does."""
        read = self.read(parameters)
        return read if isinstance(read, tuple) else described(read)

    def execute_switch(self, operation: Operation, evidence: Evidence) -> Action:
        """The next action."""
        read = self.read(operation.parameters)
        if not isinstance(read, tuple):
            return overruled(read, operation, evidence) or self.at_level(read, operation, evidence)
        if operation.weight >= 100:  # a log that a stricter turnout reads: no traffic moves on a guess
            return Finish("all traffic is on the target")
        return Hold(f"its parameters can't be read any more: {read[0]}", "invalid")

    def at_level(self, parameters: Parameters, operation: Operation, evidence: Evidence) -> Action:
        """The next action where nothing overrules the level."""
        return at_level(parameters, operation, evidence)


def acting(parameters: Parameters, evidence: Evidence) -> Judgement | None:
    """The judgement where it may decide."""
    return evidence.judgement if parameters.judge.mode == "on" else None


def overruled(parameters: Parameters, operation: Operation, evidence: Evidence) -> Action | None:
    """What is done whatever the level says; None where the level decides."""
    judgement = acting(parameters, evidence)
    decision = None if judgement is None or operation.step <= 0 else judgement.decision
    reason = "" if judgement is None else judgement.reason
    if decision is Decision.FAIL and operation.source:
        return GoBack(reason or f"evidence of harm by {operation.target}")
    if operation.weight >= 100:
        return Finish("all traffic is on the target")
    if not operation.source:
        return SetWeight(100.0, "nothing serves yet: no steps to take")
    if operation.full:
        return SetWeight(100.0, "an operator promoted it in full")
    if operation.step <= 0:
        return climb(parameters, operation, "the first step" if parameters.levels else "all at once")
    if operation.promoted >= operation.step:
        return climb(parameters, operation, f"an operator promoted it past step {operation.step}")
    if decision is Decision.INVALID:
        return Hold(reason or "the two versions can't be compared", "invalid")
    return None


def climb(parameters: Parameters, operation: Operation, reason: str) -> SetWeight:
    """The next level that has more traffic than now; 100 percent after the last."""
    for level in parameters.levels[max(operation.step, 0) :]:
        if level.weight > operation.weight or operation.step <= 0:
            return SetWeight(level.weight, reason, level.mirror)
    return SetWeight(100.0, reason)


def level_of(parameters: Parameters, operation: Operation) -> Level:
    """Where the switch is now. Without any level, it is on the way to 100 percent."""
    reached = parameters.levels[: operation.step]
    return reached[-1] if reached else Level(operation.weight)


def at_level(parameters: Parameters, operation: Operation, evidence: Evidence) -> Action:
    """Stay for the pause, then for the evidence until its deadline, then for an operator where the pause has no end."""
    level = level_of(parameters, operation)
    pause_s = level.pause_s or 0.0
    since = operation.since or evidence.now
    paused_until = since + timedelta(seconds=pause_s)
    if evidence.now < paused_until:
        return Wait(f"step {operation.step} lasts {spoken(pause_s)} at least", paused_until)
    missing = _missing(parameters, level, operation, evidence)
    if missing and (inconclusive := _inconclusive(parameters, level, missing, paused_until, evidence)):
        return inconclusive
    if level.pause_s is None:
        return Hold(f"step {operation.step} lasts until an operator promotes it")
    reason = f"inconclusive, and onInconclusive is promote: {missing}" if missing else _why(parameters, level, evidence)
    return climb(parameters, operation, reason)


def _missing(parameters: Parameters, level: Level, operation: Operation, evidence: Evidence) -> str:
    """What keeps the switch at its level, with the numbers; empty where nothing does."""
    judgement = acting(parameters, evidence)
    if judgement is not None and judgement.decision is Decision.ERROR:
        return f"the evidence can't be read: {judgement.reason or 'nobody says why'}"
    copies = 0 if evidence.judgement is None else evidence.judgement.target_requests
    if copies < level.copies:
        return f"{copies} of {level.copies} copies answered by {operation.target}"
    if not level.judged or (judgement is not None and judgement.decision is Decision.PASS):
        return ""
    if judgement is None:
        return f"no evidence yet: 0 of {parameters.judge.min_requests} requests to {operation.target}"
    return judgement.missing or judgement.reason or "neither harm nor its absence is shown"


def _inconclusive(
    parameters: Parameters, level: Level, missing: str, paused_until: datetime, evidence: Evidence
) -> Action | None:
    """Wait for what is missing until the deadline; then what the policy says, None where it says to go on."""
    allowed_s = parameters.step_deadline_s if level.judged or level.copies else 0.0
    deadline = paused_until + timedelta(seconds=allowed_s)
    if evidence.now < deadline:
        return Wait(missing, deadline)
    reason = f"inconclusive after {spoken((level.pause_s or 0.0) + allowed_s)}: {missing}"
    judgement = acting(parameters, evidence)
    unreadable = judgement is not None and judgement.decision is Decision.ERROR
    match parameters.on_inconclusive:
        case "abort":
            return GoBack(reason, "inconclusive")
        case "promote" if not unreadable:
            return None
        case _:
            return Hold(reason, "inconclusive")


def _why(parameters: Parameters, level: Level, evidence: Evidence) -> str:
    """Why it may leave its level."""
    judgement = acting(parameters, evidence)
    if judgement is not None and level.judged:
        return judgement.reason or "the evidence passes"
    if level.mirror:
        return "the copies are answered" if level.copies else "the shadow's time is over"
    return f"its {spoken(level.pause_s)} are over" if level.pause_s else "no pause is asked for"


def described(parameters: Parameters) -> tuple[str, ...]:
    """The plan for people: a line for each stage, then the notes."""
    judge, waits = parameters.judge, spoken(parameters.step_deadline_s)
    lines = [_level_line(level) for level in parameters.levels]
    if parameters.trial is not None:
        lines[-1:] = _trial_lines(parameters.levels[-1], parameters.trial)
    else:
        lines.append("100 %" if lines else "100 % at once")
    if any(level.copies or (level.judged and parameters.trial is None) for level in parameters.levels):
        then = {
            "hold": "stays where it is until an operator decides",
            "abort": "goes back to the source",
            "promote": "goes on all the same",
        }[parameters.on_inconclusive]
        lines.append(f"without enough evidence {waits} after a level's pause, it {then}")
    match judge.mode:
        case "on":
            chance = f"{100 * judge.alpha_rollback:g} %"
            lines.append(f"evidence of harm rolls it back at any time (a good version in {chance} of switches at most)")
        case "observe":
            lines.append("evidence is shown and decides nothing (judge.mode is observe)")
        case _:
            lines.append("nobody judges it (judge.mode is none)")
    return tuple(lines)


def _level_line(level: Level) -> str:
    pause = f" for {spoken(level.pause_s)}" if level.pause_s else ""
    if level.mirror:
        enough = f", until {level.copies:,} are answered" if level.copies else ""
        return f"copies of {level.mirror:g} % of the requests{pause}{enough}; the answers reach nobody"
    until = ["the evidence passes"] if level.judged else []
    if level.pause_s is None:
        until.append("an operator promotes it")
    then = (", then" if pause else "") + " until " + " and ".join(until) if until else ""
    return f"{level.weight:g} %{pause}{then}"


def _trial_lines(level: Level, trial: Trial) -> tuple[str, ...]:
    ends = [f"{trial.samples:,} requests"] if trial.samples is not None else []
    ends += [spoken(trial.duration_s), *(["a decision"] if trial.decision else [])]
    first = f", whichever comes first: {', '.join(ends)}" if len(ends) > 1 else f" {ends[0]} are over"
    split, back = f"{level.weight:g} % until{first}", "the source has everything back"
    if trial.winner:
        return split, f"100 % if it is shown to be not worse, else {back}"
    return (f"{split}; then {back}",)
