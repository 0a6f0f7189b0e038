"""Rules in the simulation: which are set, what requests look like, and where each must go, told without CEL.

The oracle reads an applied revision as a person would: the first rule that applies and whose target has an instance
decides. It shares no code with ``core.rules`` or the gateway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from turnout.core.rules import Facts
from turnout.events.route import Rule

if TYPE_CHECKING:
    import random  # noqa: TID251  seeded: a run is named by its seed
    from collections.abc import Callable

    from turnout.projections.routing import RouteView

#: Expressions, and what they mean.
MEANINGS: dict[str, Callable[[Facts], bool]] = {
    "tokens < 100": lambda facts: facts.tokens < 100,
    "tools && !stream": lambda facts: facts.tools and not facts.stream,
    "headers['x-team'] == 'beta'": lambda facts: facts.headers.get("x-team", "") == "beta",
    "'image' in modality": lambda facts: "image" in facts.modality,
}


def draw_facts(rng: random.Random) -> Facts:
    """A request."""
    return Facts(
        path="/v1/chat/completions",
        modality=rng.choice((["text"], ["text", "image"])),
        tokens=rng.choice((10, 99, 100, 5000)),
        tools=rng.random() < 0.3,
        stream=rng.random() < 0.5,
        headers={"x-team": rng.choice(("beta", "alpha"))} if rng.random() < 0.5 else {},
    )


def draw_rules(rng: random.Random, models: list[str], versions: tuple[str, ...]) -> tuple[Rule, ...]:
    """None to three rules, some of them for versions or models that may not be there."""
    made: list[Rule] = []
    for number in range(rng.choice((0, 1, 2, 3))):
        name, when = f"r{number}", rng.choice(sorted(MEANINGS))
        match rng.choice(("version", "model", "candidate", "candidate")):
            case "version":
                made.append(Rule(name, when, version=rng.choice(versions)))
            case "model":
                made.append(Rule(name, when, model=rng.choice(models)))
            case _:
                made.append(Rule(name, when, candidate=True))
    return tuple(made)


def allowed(routes: Callable[[str], RouteView | None], model: str, facts: Facts) -> set[tuple[str, str]]:
    """(model, version) where a request for the model may go; empty where nothing that it may go to has an instance.

    Args:
        routes: the applied revision of a model.
        model: that the client named.
        facts: of its request.
    """
    view = routes(model)
    if view is None:
        return set()
    rule = next((r for r in view.rules if MEANINGS[r.when](facts) and _target(routes, view, r)), None)
    if rule is not None and not rule.candidate:
        return _target(routes, view, rule)
    if rule is None and any(r.candidate for r in view.rules):
        stayed = {(model, s.version) for s in view.splits if s.weight and s.endpoints and s.version != view.candidate}
        if view.candidate and stayed:
            return stayed
    return _split(view)


def _target(routes: Callable[[str], RouteView | None], view: RouteView, rule: Rule) -> set[tuple[str, str]]:
    if rule.version:
        return {(view.model, s.version) for s in view.splits if s.version == rule.version and s.endpoints}
    if rule.model:
        other = routes(rule.model)
        return set() if other is None else _split(other)
    return _split(view)


def _split(view: RouteView) -> set[tuple[str, str]]:
    """What has a share and an instance; where nothing has both, every version in the route that has an instance."""
    here = [split for split in view.splits if split.endpoints]
    return {(view.model, s.version) for s in [s for s in here if s.weight] or here}
