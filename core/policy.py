"""Policies: a strategy with its parameters and times under one name, as one flat table. Knows no model and no file.

The table is the same in TOML and JSON: ``strategy``, the strategy's own words beside it, and ``bake``, ``drain``,
``maxTransitionTime``, ``hold``.
"""

from __future__ import annotations

import msgspec

from turnout.core.strategies import STRATEGIES
from turnout.core.strategies.parameters import WORDS, Reader, nearest, shown, spoken

#: The only strategy that does without the old version.
HOLDABLE = "immediate"
_TIMES = ("bake", "drain", "maxTransitionTime")
_OWN = ("hold", *_TIMES)


class Policy(msgspec.Struct, frozen=True):
    """A way to switch.

    Attributes:
        strategy: its name.
        parameters: the strategy's own.
        bake_s, drain_s, max_transition_time_s: None where the policy does not say.
        hold: requests may wait where there is no place for both versions; None where the policy does not say.
        shortest_s: the time that its levels take when all goes well.
        longest_s: the time that they may take; None where a level waits for an operator.
    """

    strategy: str
    parameters: dict[str, object]
    bake_s: float | None = None
    drain_s: float | None = None
    max_transition_time_s: float | None = None
    shortest_s: float = 0.0
    longest_s: float | None = None
    hold: bool | None = None


def parse(raw: dict[str, object]) -> Policy | tuple[str, ...]:
    """The policy, or what can't be meant in the table, one sentence each, naming the field."""
    strategy, choices = raw.get("strategy", ""), ", ".join(STRATEGIES)
    if not strategy:
        return (f"strategy is missing: choose one of {choices}",)
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        near = nearest(strategy, tuple(STRATEGIES)) if isinstance(strategy, str) else f"; choose one of {choices}"
        return (f"strategy is {shown(strategy)}, and there is no such strategy{near}",)
    parameters = {word: value for word, value in raw.items() if word not in ("strategy", *_OWN)}
    reader = Reader()
    for word in tuple(parameters):
        if not any(word in words for words in WORDS.values()):
            reader.problems.append(f"{word} is no word of a policy{nearest(word, (*WORDS[strategy], *_OWN))}")
            del parameters[word]
    bake_s, drain_s, limit = (
        reader.seconds(raw, word, "", 0.0, zero=word != "maxTransitionTime") if word in raw else None for word in _TIMES
    )
    hold = raw.get("hold")
    held = hold if isinstance(hold, bool) else None
    if hold is not None and not isinstance(hold, bool):
        reader.problems.append(f"hold is {shown(hold)}: give true or false")
    elif hold and strategy != HOLDABLE:
        reader.problems.append(no_hold(strategy))
    problems = (*reader.problems, *STRATEGIES[strategy].problems(parameters))
    if problems:
        return problems
    shortest, longest = waits_s(strategy, parameters)
    if limit is not None and limit < shortest:
        return (
            f"maxTransitionTime is {spoken(limit)}, and the steps take at least {spoken(shortest)}: "
            "give more time, or shorter steps",
        )
    waits = any(stage.pause_s is None for stage in STRATEGIES[strategy].stages(parameters))
    return Policy(
        strategy,
        parameters,
        bake_s,
        drain_s,
        limit,
        shortest,
        None if waits else longest,
        held,
    )


def no_hold(strategy: str) -> str:
    """Why a strategy can't go with ``hold``."""
    return f"hold is true, and {strategy} needs both versions at the same time: use {HOLDABLE}, or leave hold out"


def waits_s(strategy: str, parameters: dict[str, object]) -> tuple[float, float]:
    """Seconds that the levels take at least and at most; the time that an operator takes is in neither.

    A switch that stands still for an operator is not late, so both are finite for every strategy of ``STRATEGIES``.
    """
    return STRATEGIES[strategy].waits_s(parameters)


def describe(strategy: str, parameters: dict[str, object]) -> tuple[str, ...]:
    """The plan for people: one line for each of the strategy's stages, then what evidence does."""
    return STRATEGIES[strategy].describe(parameters)
