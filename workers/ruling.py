"""What a model's rules make of one request, for people: which rule decides and why. Nothing is sent. No terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turnout.core import rules as core
from turnout.core.split import choose
from turnout.events import subjects
from turnout.workers.gateway import request as requests
from turnout.workers.gateway.rules import facts_of

if TYPE_CHECKING:
    from turnout.core.rules import Facts, Told
    from turnout.events.route import Rule
    from turnout.projections.routing import RouteView


class Ruling:
    """One request and what becomes of it.

    Attributes:
        facts: what the rules may ask of it.
        told: what becomes of each rule.
        decided: the rule that decides, None where the split does.
        goes: where the request goes, in words.
    """

    facts: Facts
    told: tuple[Told, ...]
    decided: Rule | None
    goes: str

    def __init__(
        self,
        model: str,
        rules: tuple[Rule, ...],
        path: str,
        headers: dict[str, str],
        body: bytes,
        routes: dict[str, RouteView],
    ) -> None:
        """Ask the rules. ``routes``: what is routed now; without any every target counts as ready."""
        self._model = model
        self._routes = routes
        asked = core.Rules(model, rules)
        self.facts = facts_of(asked, path.encode(), headers, b"application/json", body)
        routing = requests.from_json(body)
        named = routing.key if isinstance(routing, requests.Routing) else b""
        key = named or headers.get("authorization", "").encode()
        self.told = asked.explain(self.facts, key, self._usable if routes else None)
        by = next((told.rule for told in self.told if told.outcome == "decides"), "")
        self.decided = next((rule for rule in rules if rule.name == by), None)
        self.goes = self._goes(asked, key)

    def _usable(self, rule: Rule) -> bool:
        route = self._route(rule.model or self._model)
        if rule.candidate:
            return True
        if route is None:
            return False
        waits = bool(rule.model) and route.hold is not None  # the request waits for it
        return waits or any(s.endpoints for s in route.splits if rule.version in ("", s.version))

    def _route(self, model: str) -> RouteView | None:
        return self._routes.get(subjects.view_key("route", model))

    def _goes(self, asked: core.Rules, key: bytes) -> str:
        rule, route = self.decided, self._route(self._model)
        if rule is not None and not rule.candidate:
            return core.target(rule)
        weighted = [split for split in route.splits if split.weight > 0] if route is not None else []
        if route is None or not weighted:
            return "the model's split"
        others = [split for split in weighted if split.version != route.candidate]
        if rule is None and asked.restricted and route.candidate and others:
            source = max(others, key=lambda split: (split.weight, split.version))
            return f"version {source.version}: only requests of a candidate rule take part in the switch"
        if len(weighted) == 1:
            return f"version {weighted[0].version}, which has all the traffic"
        shares = ", ".join(f"{split.version} {split.weight:g} %" for split in weighted)
        if key:
            return f"version {choose(route.splits, route.salt, key)} by its sticky key ({shares})"
        return f"one of {shares} by turns: it has no sticky key"
