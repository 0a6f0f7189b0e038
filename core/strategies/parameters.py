"""Parameters of the strategies, in Argo Rollouts' words, read into levels. Knows no switch, no evidence and no file.

Names are written as in Argo (``setWeight``, ``onInconclusive``). What can't be meant is told in one sentence for each
problem, naming the field; places in a list are counted from 0, as in the policy's own path.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import cast

import msgspec

from turnout.core.judging.judgement import JudgeSettings

#: Names of the comparisons that may be chosen with ``judge.compare``; those of ``Figure``.
COMPARISONS = (
    "errors",
    "error_ceiling",
    "first_byte",
    "first_byte_p95",
    "token_time",
    "empty",
    "repetition",
    "length_stop",
    "tokens",
    "sample_ratio",
    "dead",
    "probes",
    "latency_ceiling",
    "shadow_errors",
)

_LONGEST_S = 30 * 86400.0
_MOST_STEPS = 100
_SMALLEST_WEIGHT = 0.01  # one of the 10,000 buckets of the split
_UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|min|m|h|)")
_DURATION = 'give a time like "90s", "10m" or "1h30m", or a number of seconds'

_JUDGE = (
    "mode",
    "errorCeiling",
    "latencyCeilingMs",
    "errorMargin",
    "latencyMargin",
    "latencyTolerance",
    "minRequests",
    "minUsers",
    "minSeconds",
    "deadRun",
    "alphaRollback",
    "alphaPromote",
    "compare",
)
_COMMON = ("shadow", "judge", "onInconclusive", "stepDeadline")
#: The parameters of each strategy.
WORDS: dict[str, tuple[str, ...]] = {
    "immediate": _COMMON,
    "gradual": ("steps", *_COMMON),
    "canary": ("steps", *_COMMON),
    "ab": ("split", "until", "pick", *_COMMON),
}


class Level(msgspec.Struct, frozen=True):
    """One level of traffic below 100 percent.

    Attributes:
        weight: percent that the target gets.
        pause_s: the shortest time here; None where an operator must promote.
        judged: left only on a pass, or as ``onInconclusive`` says.
        mirror: percent of the requests that the target gets copies of.
        copies: answered copies that are needed before it is left.
    """

    weight: float
    pause_s: float | None = 0.0
    judged: bool = False
    mirror: float = 0.0
    copies: int = 0


class Trial(msgspec.Struct, frozen=True):
    """When an experiment ends, whichever comes first, and whether its winner is taken.

    ``samples``: requests of both versions; None where they don't end it. ``decision``: evidence does.
    """

    samples: int | None
    duration_s: float
    decision: bool
    winner: bool

    @property
    def shortest_s(self) -> float:
        """The time that it takes at least: none, where evidence or a count of requests may end it."""
        return self.duration_s if self.samples is None and not self.decision else 0.0


class Parameters(msgspec.Struct, frozen=True):
    """What a strategy goes by.

    Attributes:
        levels: in order, without the last one of 100 percent.
        judge: how the switch is judged.
        on_inconclusive: hold, abort or promote.
        step_deadline_s: how long a level may wait for evidence after its pause.
        trial: of an experiment, which stays at its last level; else None.
    """

    levels: tuple[Level, ...] = ()
    judge: JudgeSettings = JudgeSettings()
    on_inconclusive: str = "hold"
    step_deadline_s: float = 1800.0
    trial: Trial | None = None

    @property
    def shortest_s(self) -> float:
        """The time that the levels take when all goes well; what an operator waits is not in it."""
        total = 0.0 if self.trial is None else self.trial.shortest_s
        for level in self._climbed:
            total += max(level.pause_s or 0.0, self.judge.min_seconds if level.judged else 0.0)
        return total

    @property
    def longest_s(self) -> float:
        """The time that they may take; what an operator waits is not in it."""
        total = 0.0 if self.trial is None else self.trial.duration_s
        for level in self._climbed:
            total += (level.pause_s or 0.0) + (self.step_deadline_s if level.judged or level.copies else 0.0)
        return total

    @property
    def _climbed(self) -> tuple[Level, ...]:
        """The levels that are left by the rules of levels."""
        return self.levels if self.trial is None else self.levels[:-1]


def read(
    strategy: str, raw: dict[str, object], steps: tuple[Level, ...] = (), *, judged: bool = False
) -> Parameters | tuple[str, ...]:
    """The parameters of a strategy of ``WORDS``, or what can't be meant in them.

    Args:
        strategy: its name.
        raw: as they were given.
        steps: the levels where none are given.
        judged: no level is left without a pass, whether it has an analysis or not.
    """
    reader = Reader()
    _foreign(reader, strategy, raw)
    judge = _judge(reader, raw)
    deadline_s = reader.seconds(raw, "stepDeadline", "", 1800.0)
    on_inconclusive = reader.choice(raw, "onInconclusive", "", ("hold", "abort", "promote"))
    trial = None
    if strategy == "ab":
        levels, trial = _experiment(reader, raw, judge)
    else:
        given = "steps" in raw and "steps" in WORDS[strategy]
        levels = _steps(reader, raw["steps"], strategy) if given else steps
    if judged:
        levels = tuple(msgspec.structs.replace(level, judged=True) for level in levels)
    if judge.mode != "on":
        levels = tuple(_unjudged(level, judge.min_seconds) for level in levels)
    for level in levels if trial is None else ():
        if level.judged and judge.min_seconds > (level.pause_s or 0.0) + deadline_s:
            reader.problems.append(
                f"stepDeadline is {spoken(deadline_s)}, and judge.minSeconds is {spoken(judge.min_seconds)}: "
                "no step could ever pass, give it more time or ask for less"
            )
            break
    if "shadow" in raw:
        levels = (_shadow(reader, raw["shadow"], judge), *levels)
    elif strategy in ("immediate", "ab"):
        reader.problems.extend(
            f"{word} has no meaning here: {strategy} waits for evidence only in a shadow step, and there is none"
            for word in ("onInconclusive", "stepDeadline")
            if word in raw
        )
    if reader.problems:
        return tuple(reader.problems)
    return Parameters(levels, judge, on_inconclusive, deadline_s, trial)


def _foreign(reader: Reader, strategy: str, raw: dict[str, object]) -> None:
    """Words that the strategy does not have, though perhaps another one."""
    for word in raw:
        if word in WORDS[strategy]:
            continue
        others = [name for name, words in WORDS.items() if word in words]
        if others:
            reader.problems.append(f"{word} is no parameter of {strategy}: it belongs to {' and '.join(others)}")
        else:
            reader.problems.append(f"{word} is no parameter of {strategy}{nearest(word, WORDS[strategy])}")


def _unjudged(level: Level, least_s: float) -> Level:
    """Where nobody judges, a level that would have been judged is a pause, at least as long as a pass would take."""
    if not level.judged:
        return level
    pause_s = None if level.pause_s is None else max(level.pause_s, least_s)
    return msgspec.structs.replace(level, pause_s=pause_s, judged=False)


def _steps(reader: Reader, given: object, strategy: str) -> tuple[Level, ...]:
    if not isinstance(given, list | tuple):
        reader.problems.append(f"steps is {shown(given)}: give a list like [{{setWeight = 5}}, {{analysis = {{}}}}]")
        return ()
    steps = cast("list[object]", given)
    if not steps:
        reader.problems.append("steps is empty: give at least one setWeight, or leave steps out for the default")
        return ()
    if len(steps) > _MOST_STEPS:
        reader.problems.append(f"steps has {len(steps)} entries: give at most {_MOST_STEPS}")
        return ()
    levels: list[Level] = []
    for number, one in enumerate(steps):
        _step(reader, f"steps[{number}]", one, levels)
    if strategy == "canary" and levels and levels[0].weight == 100:
        reader.problems.append("steps has no level below 100: a canary needs one, or use the strategy immediate")
    return tuple(level for level in levels if level.weight < 100)


def _step(reader: Reader, where: str, given: object, levels: list[Level]) -> None:
    """One entry of ``steps``: a new level, or something more about the newest one."""
    step = reader.table(given, where)
    if step is None or not reader.known(step, where, ("setWeight", "pause", "analysis")):
        return
    if len(step) != 1:
        has = " and ".join(step) or "nothing"
        reader.problems.append(f"{where} has {has}: give each step exactly one of setWeight, pause and analysis")
        return
    if "setWeight" in step:
        before = levels[-1].weight if levels else 0.0
        what = "give a percentage above 0, up to 100"
        weight = reader.number(step, "setWeight", where, 0.0, _SMALLEST_WEIGHT, 100.0, what)
        if not weight:
            levels.append(Level(before))  # said already; what follows belongs to it
            return
        if weight <= before:
            reader.problems.append(
                f"{where}.setWeight is {weight:g}, after {before:g}: a rollout never takes weight back in steps, "
                "give more than the step before"
            )
        levels.append(Level(max(weight, before)))
        return
    word = next(iter(step))
    if not levels:
        reader.problems.append(f"{where} is {word}, before any traffic: begin with setWeight")
        return
    level = levels[-1]
    if level.weight == 100:
        reader.problems.append(f"{where} is {word}, after setWeight 100: watch the target at full traffic with bake")
        return
    table = reader.table(step[word], f"{where}.{word}")
    if table is None:
        return
    if word == "analysis":
        if reader.known(table, f"{where}.analysis", ()):
            levels[-1] = msgspec.structs.replace(level, judged=True)
    elif reader.known(table, f"{where}.pause", ("duration",)):
        pause_s = reader.seconds(table, "duration", f"{where}.pause", 0.0) if table else None
        waits = level.pause_s is None or pause_s is None
        levels[-1] = msgspec.structs.replace(
            level, pause_s=None if waits else (level.pause_s or 0.0) + (pause_s or 0.0)
        )


def _shadow(reader: Reader, given: object, judge: JudgeSettings) -> Level:
    shadow = reader.table(given, "shadow") or {}
    reader.known(shadow, "shadow", ("percent", "duration", "minCopies"))
    percent = reader.number(
        shadow, "percent", "shadow", 10.0, _SMALLEST_WEIGHT, 100.0, "give a percentage above 0, up to 100"
    )
    duration_s = reader.seconds(shadow, "duration", "shadow", 600.0)
    copies = reader.whole(shadow, "minCopies", "shadow", 50, 1)
    if judge.mode == "none":
        if "minCopies" in shadow:
            reader.problems.append(
                'shadow.minCopies needs a judge that counts them: set judge.mode to "observe" or "on"'
            )
        copies = 0
    return Level(0.0, duration_s, mirror=percent, copies=copies)


def _experiment(reader: Reader, raw: dict[str, object], judge: JudgeSettings) -> tuple[tuple[Level, ...], Trial]:
    what = "give a percentage above 0 and below 100"
    split = reader.number(raw, "split", "", 50.0, _SMALLEST_WEIGHT, 100.0 - _SMALLEST_WEIGHT, what)
    winner = reader.choice(raw, "pick", "", ("none", "winner")) == "winner"
    if winner and judge.mode != "on":
        reader.problems.append(
            f'pick is "winner", and judge.mode is {judge.mode!r}: only a judge can tell, set it to "on"'
        )
    until = reader.table(raw["until"], "until") if "until" in raw else None
    if until is None:
        counted = judge.mode != "none"
        trial = Trial(10_000 if counted else None, 86400.0, judge.mode == "on", winner)
        return (Level(split, trial.shortest_s, judged=trial.decision),), trial
    reader.known(until, "until", ("samples", "duration", "decision"))
    decision = until.get("decision", False)
    if not isinstance(decision, bool):
        reader.problems.append(f"until.decision is {shown(decision)}: give true or false")
        decision = False
    if not decision and "samples" not in until and "duration" not in until:
        reader.problems.append(
            "until names no end, and the experiment would never stop: give samples, duration or decision"
        )
    if decision and judge.mode != "on":
        reader.problems.append(
            f'until.decision is true, and judge.mode is {judge.mode!r}: nobody decides, set it to "on"'
        )
    samples = reader.whole(until, "samples", "until", 10_000, 1) if "samples" in until else None
    if samples is not None and judge.mode == "none":
        reader.problems.append('until.samples needs a judge that counts them: set judge.mode to "observe" or "on"')
    duration_s = reader.seconds(until, "duration", "until", 86400.0)
    trial = Trial(samples, duration_s, decision, winner)
    return (Level(split, trial.shortest_s, judged=decision),), trial


def _judge(reader: Reader, raw: dict[str, object]) -> JudgeSettings:
    if "judge" not in raw:
        return JudgeSettings()
    given, default = reader.table(raw["judge"], "judge"), JudgeSettings()
    if given is None:
        return default
    reader.known(given, "judge", _JUDGE)
    share, tiny, ratio = "give a share above 0, up to", 1e-9, "give a ratio above 1, like 1.2"
    compare = given.get("compare", [])
    if not isinstance(compare, list | tuple):
        reader.problems.append(f'judge.compare is {shown(compare)}: give a list of names like ["errors"]')
        compare = []
    for name in cast("list[object]", compare):
        if name not in COMPARISONS:
            reader.problems.append(f"judge.compare has {shown(name)}{nearest(str(name), COMPARISONS)}")
    ceiling_ms = "latencyCeilingMs"
    return JudgeSettings(
        mode=reader.choice(given, "mode", "judge", ("on", "observe", "none")),
        alpha_rollback=reader.number(
            given, "alphaRollback", "judge", default.alpha_rollback, tiny, 0.5, f"{share} 0.5"
        ),
        alpha_promote=reader.number(given, "alphaPromote", "judge", default.alpha_promote, tiny, 0.5, f"{share} 0.5"),
        error_ceiling=(
            reader.number(given, "errorCeiling", "judge", 1.0, tiny, 1.0, f"{share} 1")
            if "errorCeiling" in given
            else None
        ),
        latency_ceiling_ms=(
            reader.number(given, ceiling_ms, "judge", 1.0, tiny, 1e9, "give milliseconds above 0")
            if ceiling_ms in given
            else None
        ),
        error_margin=reader.number(given, "errorMargin", "judge", default.error_margin, 1.001, 1e3, ratio),
        latency_margin=reader.number(given, "latencyMargin", "judge", default.latency_margin, 1.001, 1e3, ratio),
        latency_tolerance=reader.number(given, "latencyTolerance", "judge", default.latency_tolerance, 1.0, 1e3, ratio),
        min_requests=reader.whole(given, "minRequests", "judge", default.min_requests, 1),
        min_users=reader.whole(given, "minUsers", "judge", default.min_users, 0),
        min_seconds=reader.seconds(given, "minSeconds", "judge", default.min_seconds),
        dead_run=reader.whole(given, "deadRun", "judge", default.dead_run, 1),
        compare=tuple(str(name) for name in cast("list[object]", compare)),
    )


class Reader:
    """Takes values out of tables; what is wrong goes to ``problems``, and the default is taken instead."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def table(self, value: object, where: str) -> dict[str, object] | None:
        """The table, or None where it is none."""
        if isinstance(value, dict):
            return cast("dict[str, object]", value)
        self.problems.append(f"{where} is {shown(value)}: give a table, {{}} for an empty one")
        return None

    def known(self, table: dict[str, object], where: str, words: tuple[str, ...]) -> bool:
        """Whether the table has only these keys."""
        strange = [key for key in table if key not in words]
        self.problems.extend(f"{where} has no key {key!r}{nearest(key, words)}" for key in strange)
        return not strange

    def number(
        self, table: dict[str, object], key: str, where: str, default: float, low: float, high: float, wanted: str
    ) -> float:
        """A finite number from ``low`` to ``high``."""
        if key not in table:
            return default
        value = _finite(table[key])
        if value is None or not low <= value <= high:
            self._wrong(where, key, table[key], wanted)
            return default
        return value

    def whole(self, table: dict[str, object], key: str, where: str, default: int, low: int) -> int:
        """A whole number of at least ``low``."""
        value = table.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= 10**9:
            return value
        self._wrong(where, key, value, f"give a whole number, {low} or more")
        return default

    def seconds(self, table: dict[str, object], key: str, where: str, default: float, *, zero: bool = False) -> float:
        """A duration in seconds; ``zero``: nothing is a duration, too."""
        if key not in table:
            return default
        value = duration_s(table[key])
        if value is None:
            self._wrong(where, key, table[key], _DURATION)
        elif value < 0 or (value == 0 and not zero):
            self._wrong(where, key, table[key], "give a time of 0 or more" if zero else "give a time above 0")
        elif value > _LONGEST_S:
            self._wrong(where, key, table[key], "give at most 30 days (720h)")
        else:
            return value
        return default

    def choice(self, table: dict[str, object], key: str, where: str, words: tuple[str, ...]) -> str:
        """One of the words; the first is the default."""
        value = table.get(key, words[0])
        if isinstance(value, str) and value in words:
            return value
        self._wrong(where, key, value, f"choose one of {', '.join(words)}")
        return words[0]

    def _wrong(self, where: str, key: str, value: object, wanted: str) -> None:
        self.problems.append(f"{where}{'.' if where else ''}{key} is {shown(value)}: {wanted}")


def duration_s(value: object) -> float | None:
    """``90s``, ``10m``, ``1h30m`` or a number of seconds → seconds; None where it is neither."""
    if not isinstance(value, str):
        return _finite(value)
    sign, text = (-1.0, value[1:]) if value.startswith("-") else (1.0, value)
    parts = _PART.findall(text)
    whole = "".join(number + unit for number, unit in parts)
    if not parts or whole != text or (len(parts) > 1 and any(not unit for _, unit in parts)):
        return None
    return sign * sum(float(number) * _UNITS_S[unit] for number, unit in parts)


def spoken(seconds: float) -> str:
    """A duration as people write it: ``90 s``, ``10 min``, ``1 h 30 min``."""
    if seconds < 120 or seconds % 60:
        return f"{seconds:.10g} s"
    hours, minutes = divmod(int(seconds // 60), 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours} h" + (f" {minutes} min" if minutes else "")


def nearest(word: str, known: tuple[str, ...]) -> str:
    """``; did you mean 'x'?``, or what there is."""
    near = difflib.get_close_matches(word.lower(), [k.lower() for k in known], n=1, cutoff=0.6)
    if near:
        return f"; did you mean {next(k for k in known if k.lower() == near[0])!r}?"
    return f"; known: {', '.join(known)}" if known else "; it takes none"


def shown(value: object) -> str:
    """A value as it would be written, cut to a readable length."""
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = f"{value:g}" if isinstance(value, float) else repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "a number too long to write"
    return text if len(text) <= 60 else text[:57] + "..."


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None
