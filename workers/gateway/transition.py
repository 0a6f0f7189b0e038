"""TransitionManager and RequestTracker: which version a request goes to, and when a version has left this gateway.

Pure bookkeeping between two requests: no asyncio, no I/O, no clock (``now`` is seconds on any monotonic clock). The
server, the simulation and the tests drive the same two classes. Every method returns what has to be acknowledged;
nothing is remembered that was returned.

The rules:

- A revision is applied whole or not at all, and never a lower one than was applied before.
- Choosing and counting are one call: no revision can slip in between.
- A version that is absent from the applied revision *drains*: it gets no new request, its running ones go on to their
  last byte, and when none is left that is reported once. A version that comes back stops draining.
- Going back is applying a revision; there is no second road.
- A rule chooses before the split; what it can't choose now is left to the next one, and to the split in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from turnout.core.affinity import Affinity
from turnout.core.rules import Rules
from turnout.core.split import BUCKETS, SplitTable, Spread

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from turnout.core.rules import Facts
    from turnout.events.route import Rule
    from turnout.projections.routing import RouteView
    from turnout.workers.gateway.metrics import VersionNumbers

#: Connection failures in a row that take an instance out.
EJECT_AFTER = 3
#: Seconds of the first ejection; each further failure doubles it up to the limit.
EJECT_FIRST_S = 1.0
EJECT_MOST_S = 30.0
#: Of so many instances all are looked at for the least busy one, of more than that two.
FEW = 4
#: A request goes where its prompt's beginning is known unless that instance has so many times its share in flight.
AFFINITY_MOST = 1.25


class Slot:
    """One instance of a version, as this gateway sees it. ``ejected_until`` in seconds of the caller's clock."""

    __slots__ = ("address", "ejected_until", "failures", "in_flight", "instance", "served")

    def __init__(self, instance: str, address: str, served: str = "") -> None:
        self.instance = instance
        self.address = address
        self.served = served  # name that its requests must carry; empty for the model's own
        self.in_flight = 0
        self.failures = 0
        self.ejected_until = 0.0


class Lane:
    """One version of a model while this gateway has anything to do with it.

    Attributes:
        requests: what is in flight, to the last byte.
        left: revision that the version left the route with; 0 while it is in the route.
        deadline: when its requests must have ended, once it has left.
        ended: requests that were ended because the deadline had passed.
        numbers: where the gateway counts what the version does; nothing here looks at them.
    """

    __slots__ = ("deadline", "ended", "left", "model", "numbers", "requests", "slots", "version")

    def __init__(self, model: str, version: str) -> None:
        self.model = model
        self.version = version
        self.requests: set[Tracked] = set()
        self.slots: dict[tuple[str, str], Slot] = {}
        self.left = 0
        self.deadline = 0.0
        self.ended = 0
        self.numbers: VersionNumbers | None = None


class Choice:
    """Where one request goes. Made once for each instance and revision, not for each request.

    ``stamp`` is the answer's header lines that tell the client which version and revision answered, and the ``rule``
    that chose it; the request's id follows it.
    """

    __slots__ = ("instance", "lane", "revision", "slot", "stamp")

    def __init__(self, lane: Lane, slot: Slot, revision: int, rule: str = "") -> None:
        self.lane = lane
        self.slot = slot
        self.instance = slot.instance
        self.revision = revision
        by = f"\r\nx-turnout-rule: {rule}" if rule else ""
        self.stamp = (
            f"\r\nx-turnout-version: {lane.version}\r\nx-turnout-revision: {revision}{by}\r\nx-request-id: "
        ).encode("latin-1", "replace")

    @property
    def model(self) -> str:
        """The served name."""
        return self.lane.model

    @property
    def version(self) -> str:
        """The version that answers."""
        return self.lane.version

    @property
    def address(self) -> str:
        """Where the instance listens."""
        return self.slot.address


class NoRoute(msgspec.Struct, frozen=True):
    """Why a request goes nowhere. ``code``: model_not_found, version_not_found or no_ready_instance.

    ``model``: the one that a rule has sent it to, for whose instance it may wait; empty for its own.
    """

    code: str
    model: str = ""


UNKNOWN_MODEL = NoRoute("model_not_found")
UNKNOWN_VERSION = NoRoute("version_not_found")
NOTHING_READY = NoRoute("no_ready_instance")


class Tracked(Protocol):
    """A running request: anything that can be hashed and says where it goes."""

    choice: Choice


class Ticket:
    """The smallest running request."""

    __slots__ = ("choice",)

    def __init__(self, choice: Choice) -> None:
        self.choice: Choice = choice


class Drained(msgspec.Struct, frozen=True):
    """To be acknowledged: nothing of the version is in flight, and ``revision`` (applied here) does not name it."""

    model: str
    version: str
    revision: int
    ended: int = 0


class Transition(msgspec.Struct, frozen=True):
    """A revision was applied, to be acknowledged, and then what it drained at once.

    ``draining`` names the versions whose requests are still running.
    """

    model: str
    revision: int
    drained: tuple[Drained, ...] = ()
    draining: tuple[str, ...] = ()


class RequestTracker:
    """Counts what is in flight for each version and instance, from the choice to the last byte."""

    def __init__(self) -> None:
        self.lanes: dict[tuple[str, str], Lane] = {}

    def begin(self, request: Tracked) -> None:
        """The request is on its way to its choice."""
        choice = request.choice
        choice.lane.requests.add(request)
        choice.slot.in_flight += 1

    def end(self, request: Tracked) -> bool:
        """The request has nothing more to do there. True where it was the last one of a version that has left."""
        choice = request.choice
        lane = choice.lane
        lane.requests.remove(request)
        choice.slot.in_flight -= 1
        return lane.left > 0 and not lane.requests

    def in_flight(self, model: str | None = None, version: str | None = None) -> int:
        """Requests in flight, of all or of one model or version."""
        return sum(
            len(lane.requests)
            for lane in self.lanes.values()
            if (model is None or lane.model == model) and (version is None or lane.version == version)
        )

    def by_version(self) -> dict[str, dict[str, int]]:
        """Model → version → requests in flight; what has none is left out."""
        made: dict[str, dict[str, int]] = {}
        for lane in self.lanes.values():
            if lane.requests:
                made.setdefault(lane.model, {})[lane.version] = len(lane.requests)
        return made

    def running(self) -> Iterator[Tracked]:
        """Every request in flight. Take a copy before any of them is ended."""
        for lane in self.lanes.values():
            yield from lane.requests

    def lane(self, model: str, version: str) -> Lane:
        """The lane of a version, made where there is none."""
        lane = self.lanes.get((model, version))
        if lane is None:
            lane = self.lanes[model, version] = Lane(model, version)
        return lane


class _Table:
    """One applied revision, compiled for lookups."""

    __slots__ = ("affinity", "choices", "revision", "ruled", "single", "source", "split", "view", "weighted")

    def __init__(self, view: RouteView, lanes: dict[str, Lane], affine: bool) -> None:
        self.view = view
        self.revision = view.revision
        self.choices: dict[str, tuple[Choice, ...]] = {}
        for split in view.splits:
            lane = lanes[split.version]
            made: list[Choice] = []
            for endpoint in split.endpoints:
                key = (endpoint.instance, endpoint.address)
                slot = lane.slots.get(key)
                if slot is None:
                    slot = lane.slots[key] = Slot(endpoint.instance, endpoint.address, endpoint.served)
                made.append(Choice(lane, slot, view.revision))
            self.choices[split.version] = tuple(made)
            lane.slots = {
                key: slot
                for key, slot in lane.slots.items()
                if slot.in_flight or any(choice.slot is slot for choice in made)
            }
        weighted = [split for split in view.splits if split.weight > 0]
        #: By falling weight: where a request goes when its own version can't take it.
        self.weighted = tuple(split.version for split in sorted(view.splits, key=lambda s: (-s.weight, s.version)))
        self.split = SplitTable(weighted, view.salt) if len(weighted) > 1 else None
        #: The only version with a weight; its choices are taken without a hash.
        self.single = self.choices[weighted[0].version] if len(weighted) == 1 else None
        others = [split for split in weighted if split.version != view.candidate]
        #: The version that keeps its requests while rules restrict who takes part in a switch; empty where none runs.
        self.source = max(others, key=lambda s: (s.weight, s.version)).version if view.candidate and others else ""
        #: By version, where its prompts are to stay together and there is more than one instance.
        self.affinity = {
            version: Affinity([choice.instance for choice in made])
            for version, made in self.choices.items()
            if affine and len(made) > 1
        }
        #: Choices as a rule made them, by the rule's name.
        self.ruled: dict[tuple[Choice, str], Choice] = {}

    def by_rule(self, choice: Choice, rule: str) -> Choice:
        """The choice with the rule's name in its stamp."""
        made = self.ruled.get((choice, rule))
        if made is None:
            made = self.ruled[choice, rule] = Choice(choice.lane, choice.slot, choice.revision, rule)
        return made


class TransitionManager:
    """The applied revisions, and the choice for each request.

    Args:
        tracker: what is in flight; shared with whoever ends requests.
        seed: in [0, 1), so that several gateways spread requests without a key differently.
        affine: models whose prompts that begin alike go to the same instance.

    Attributes:
        affine: the same.
        ruled: model → its rules, of the models that have some.
    """

    def __init__(self, tracker: RequestTracker, seed: float = 0.0, affine: Collection[str] = ()) -> None:
        self.tracker = tracker
        self.affine = frozenset(affine)
        self.ruled: dict[str, Rules] = {}
        self._tables: dict[str, _Table] = {}
        self._seed = seed
        self._spread = Spread(seed)
        self._second = Spread(seed)
        self._turn = 0

    def begin_transition(self, route: RouteView, now: float) -> Transition | None:
        """Apply a revision. None where it is not newer than what is applied: then nothing has changed.

        Revision 0 (registered, not routed yet) only makes the model known.
        """
        model = route.model
        old = self._tables.get(model)
        if old is not None and route.revision <= old.revision:
            return None
        here = {split.version for split in route.splits}
        lanes = {version: self.tracker.lane(model, version) for version in here}
        for lane in lanes.values():
            lane.left, lane.deadline, lane.ended = 0, 0.0, 0
        self._tables[model] = _Table(route, lanes, model in self.affine)
        self._take_rules(route)
        drained = self._let_go(route, old, here, now)
        draining = tuple(
            lane.version for lane in self.tracker.lanes.values() if lane.model == model and lane.left and lane.requests
        )
        return Transition(model, route.revision, drained, draining)

    def rollback_transition(self, route: RouteView, now: float) -> Transition | None:
        """Apply a revision that takes a version back out. A rollback is a revision like any other, and only that."""
        return self.begin_transition(route, now)

    def handle_request_routing(
        self, model: str, key: bytes = b"", now: float = 0.0, pin: str = "", prefix: bytes = b""
    ) -> Choice | NoRoute:
        """Choose where a request goes; ``RequestTracker.begin`` must follow before anything else happens.

        Args:
            model: the served name.
            key: the sticky key; empty for a choice by turns.
            now: seconds, for ejected instances.
            pin: the version that a tester asks for.
            prefix: how the prompt begins, for models whose prompts stay together.
        """
        table = self._tables.get(model)
        if table is None:
            return UNKNOWN_MODEL
        if pin:
            choices = table.choices.get(pin)
            if choices is None:
                return UNKNOWN_VERSION
        elif table.single is not None:
            choices = table.single
        elif table.split is not None:
            split = table.split
            version = split.version(key) if key else split.version_at(self._spread.bucket())
            choices = table.choices[version]
        else:
            return NOTHING_READY
        if len(choices) == 1:
            return choices[0]
        if not choices:
            return NOTHING_READY if pin else self._any(table, (), now)
        return self._near(table, choices, prefix, now) if prefix else self._least(choices, now)

    def handle_ruled_request(
        self, model: str, facts: Facts, key: bytes = b"", now: float = 0.0, prefix: bytes = b""
    ) -> tuple[Choice | NoRoute, bool]:
        """Choose for a model that has rules; else as ``handle_request_routing``.

        A rule's model is looked up in its own table and its own rules are not asked. A rule whose target has no
        instance now does not apply, but where requests wait for its model.

        Args:
            model: the served name; one that ``ruled`` has.
            facts: what the rules may ask of the request.
            key: the sticky key; empty for a choice by turns.
            now: seconds, for ejected instances.
            prefix: how the prompt begins, for models whose prompts stay together.

        Returns:
            The choice, and whether the model's split has made it.
        """
        rules, table = self.ruled[model], self._tables[model]
        rule = rules.choose(facts, key, lambda rule: self._takes(table, rule))
        if rule is not None and rule.model:
            choice = self.handle_request_routing(rule.model, key, now, prefix=prefix)
            table = self._tables[rule.model]
        elif rule is not None and rule.version:
            choice = self._near(table, table.choices[rule.version], prefix, now)
        elif rule is None and rules.restricted and table.source:
            choice = self.handle_request_routing(model, key, now, table.source, prefix)
            return self._any(table, (), now) if isinstance(choice, NoRoute) else choice, False
        else:
            choice = self.handle_request_routing(model, key, now, prefix=prefix)
        if rule is None:
            return choice, True
        if isinstance(choice, NoRoute):
            return NoRoute(choice.code, rule.model), False
        return table.by_rule(choice, rule.name), rule.candidate

    def rule_counts(self) -> Iterator[tuple[str, str, str, int]]:
        """(model, rule, outcome, requests) so far; the outcomes stand at ``core.rules.Rules``."""
        for model, rules in self.ruled.items():
            for (rule, outcome), count in rules.counts.items():
                yield model, rule, outcome, count

    def reroute(
        self, model: str, failed: Choice, tried: Collection[Slot], now: float, pinned: bool = False
    ) -> Choice | None:
        """Another instance for a request that its choice could not take, by the revision that is applied *now*.

        One of the same version, else of another version in the route, the heavier first; never one of ``tried``.
        """
        table = self._tables.get(model)
        if table is None:
            return None
        left = [choice for choice in table.choices.get(failed.version, ()) if choice.slot not in tried]
        if left:
            return self._least(tuple(left), now)
        if pinned:
            return None
        other = self._any(table, tried, now)
        return None if isinstance(other, NoRoute) else other

    def request_ended(self, request: Tracked, cut: bool = False) -> Drained | None:
        """End a request, and say what has drained with it.

        Args:
            request: one that was begun and not ended.
            cut: it was ended because its version's time to drain was up.
        """
        lane = request.choice.lane
        if cut:
            lane.ended += 1
        if self.tracker.end(request):
            return self.complete_transition(lane.model, lane.version)
        return None

    def complete_transition(self, model: str, version: str) -> Drained | None:
        """Forget a version that has left and has nothing in flight; what is returned is to be acknowledged, once."""
        lane = self.tracker.lanes.get((model, version))
        if lane is None or not lane.left or lane.requests:
            return None
        del self.tracker.lanes[model, version]
        return Drained(model, version, self._tables[model].revision, lane.ended)

    def overdue(self, now: float) -> tuple[Tracked, ...]:
        """Requests on versions whose time to drain is up: to be ended with an error event, never silently."""
        return tuple(
            request
            for lane in self.tracker.lanes.values()
            if lane.left and now >= lane.deadline
            for request in lane.requests
        )

    def connection_failed(self, choice: Choice, now: float) -> bool:
        """An instance did not take a connection or broke it. True where that takes it out for a while."""
        slot = choice.slot
        slot.failures += 1
        if slot.failures < EJECT_AFTER:
            return False
        slot.ejected_until = now + min(EJECT_MOST_S, EJECT_FIRST_S * 2 ** min(slot.failures - EJECT_AFTER, 10))
        return True

    def connection_worked(self, choice: Choice) -> None:
        """The instance answered: what failed before is forgotten."""
        choice.slot.failures = 0
        choice.slot.ejected_until = 0.0

    def models(self) -> tuple[str, ...]:
        """Every served name, whatever the state of its engines."""
        return tuple(self._tables)

    def route(self, model: str) -> RouteView | None:
        """The applied revision of a model."""
        table = self._tables.get(model)
        return None if table is None else table.view

    def applied(self) -> dict[str, int]:
        """Model → applied revision, of the models that have a route."""
        return {model: table.revision for model, table in self._tables.items() if table.revision}

    def leads_to(self, model: str) -> tuple[tuple[str, ...], ...]:
        """Where its traffic goes now: the addresses of each version that has a weight and an instance."""
        table = self._tables.get(model)
        splits = () if table is None else table.view.splits
        return tuple(tuple(e.address for e in split.endpoints) for split in splits if split.weight and split.endpoints)

    def addresses(self) -> frozenset[str]:
        """Where requests may be sent now. A connection to anywhere else must not be kept."""
        tables = self._tables.values()
        routed = (choice.address for table in tables for made in table.choices.values() for choice in made)
        copied = (e.address for table in tables for mirror in table.view.mirrors for e in mirror.endpoints)
        return frozenset((*routed, *copied))

    def _take_rules(self, route: RouteView) -> None:
        """Compile the revision's rules where they are new; what was counted under the same names goes on."""
        old = self.ruled.pop(route.model, None)
        if not route.rules:
            return
        if old is None or old.rules != route.rules:
            made = Rules(route.model, route.rules, self._seed)
            names = {rule.name for rule in route.rules}
            if old is not None:
                made.counts.update((one, count) for one, count in old.counts.items() if one[0] in names)
            old = made
        self.ruled[route.model] = old

    def _takes(self, table: _Table, rule: Rule) -> bool:
        """Whether a rule's target has an instance, or is a model that requests wait for."""
        if rule.version:
            return bool(table.choices.get(rule.version))
        other = self._tables.get(rule.model) if rule.model else table
        if other is None:
            return False
        return any(other.choices[split.version] for split in other.view.splits) or bool(rule.model and other.view.hold)

    def _let_go(self, route: RouteView, old: _Table | None, here: set[str], now: float) -> tuple[Drained, ...]:
        """Start to drain what the revision does not name; report what has nothing in flight."""
        before = set[str]() if old is None else set(old.choices)
        # Versions that came and went between two revisions that this gateway saw were never used here, but the
        # controller waits for a word on each.
        if old is not None:
            before.update(version for version, revision in route.left.items() if revision > old.revision)
        drained: list[Drained] = []
        for version in sorted(before - here):
            lane = self.tracker.lane(route.model, version)
            if not lane.left:
                lane.left, lane.deadline = route.revision, now + route.drain_s
            if (report := self.complete_transition(route.model, version)) is not None:
                drained.append(report)
        return tuple(drained)

    def _any(self, table: _Table, tried: Collection[Slot], now: float) -> Choice | NoRoute:
        for version in table.weighted:
            left = tuple(choice for choice in table.choices[version] if choice.slot not in tried)
            if left:
                return self._least(left, now)
        return NOTHING_READY

    def _near(self, table: _Table, choices: tuple[Choice, ...], prefix: bytes, now: float) -> Choice:
        """The instance that has seen prompts which begin like this, or its second, unless they have too much to do."""
        lane = choices[0].lane
        affinity = table.affinity.get(lane.version) if prefix else None
        if affinity is not None:
            most = AFFINITY_MOST * (len(lane.requests) + 1) / len(choices)
            for index in affinity.of(prefix):
                slot = choices[index].slot
                if slot.in_flight < most and slot.ejected_until <= now:
                    return choices[index]
        return self._least(choices, now)

    def _least(self, choices: tuple[Choice, ...], now: float) -> Choice:
        """The instance with the least in flight that is not ejected; in turn among equals; any if all are ejected.

        Of many instances two are looked at, which spreads the load nearly as well in the same time however many there
        are (Mitzenmacher, "The power of two choices in randomized load balancing", 1996).
        """
        self._turn += 1
        start, count = self._turn % len(choices), len(choices)
        if count > FEW:
            step = 1 + self._second.bucket() * (count - 1) // BUCKETS
            one, two = choices[start], choices[(start + step) % count]
            better = one if one.slot.in_flight <= two.slot.in_flight else two
            if better.slot.ejected_until <= now:
                return better
        best: Choice | None = None
        for offset in range(count):
            choice = choices[(start + offset) % count]
            slot = choice.slot
            if slot.ejected_until > now:
                continue
            if best is None or slot.in_flight < best.slot.in_flight:
                best = choice
        return min(choices, key=lambda choice: choice.slot.in_flight) if best is None else best
