"""Given, when, then: for tests of deciders, sagas and strategies, turnout's own and yours. Knows no test runner.

>>> from turnout.core import route
>>> from turnout.events.route import RouteChanged, Split
>>> v1 = (Split("v1", 100.0, ()),)
>>> _ = (
...     given(route)
...     .when(route.ChangeRoute("chat", 1, v1, "sw-1", 600.0, "sw-1"))
...     .then(RouteChanged("chat", 1, v1, "sw-1", 600.0, "sw-1"))
... )
>>> _ = (
...     given(route, RouteChanged("chat", 1, v1, "sw-1", 600.0, "sw-1"))
...     .when(route.ChangeRoute("chat", 7, (), "sw-1", 600.0, "sw-1"))
...     .then_rejected("revision_stale")
... )

A strategy of your own is asked without any switch around it:

>>> from turnout.core.strategies import ImmediateSwitch
>>> asked(ImmediateSwitch(), weight=0.0)
SetWeight(weight=100.0, reason='all at once', mirror=0.0)

A saga is asked what it owes in a world that has seen some events; each command may be carried out in it:

>>> from turnout.events.gateway import GatewayJoined
>>> world = given_world(GatewayJoined("g1", "http://127.0.0.1:8000"))
>>> sorted(world.live_gateways)
['g1']
"""
# ruff: noqa: S101  an assertion is what a test says its findings with

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from turnout.core.decider import Rejected
from turnout.core.sagas.owed import decide
from turnout.core.strategies.base import Evidence, Operation
from turnout.core.world import World
from turnout.events import subjects
from turnout.events.alert import AlertEvent
from turnout.events.codec import Context, decode, record
from turnout.events.envelope import START as NO_POSITION
from turnout.events.gateway import GatewayEvent
from turnout.events.instance import InstanceEvent
from turnout.events.model import ModelEvent
from turnout.events.route import RouteChanged
from turnout.events.switch import SwitchEvent
from turnout.events.worker import WorkerEvent

if TYPE_CHECKING:
    from turnout.core.decider import Decider
    from turnout.core.sagas.owed import Owed
    from turnout.core.strategies.base import Action, SwitchingStrategy
    from turnout.events.envelope import Position, Recorded

#: The time of a world's first event (UTC).
START = datetime(2026, 1, 1, tzinfo=UTC)


# --- deciders ----------------------------------------------------------------------------------------------------


def given(decider: Decider[Any, Any, Any] | Any, *events: object) -> Given:
    """A decider (a module or object with ``initial``, ``evolve`` and ``decide``) after these events."""
    state = decider.initial
    for event in events:
        state = decider.evolve(state, event)
    return Given(decider, state)


class Given:
    """A state that a command can meet."""

    def __init__(self, decider: Any, state: Any) -> None:
        self.decider = decider
        self.state = state

    def when(self, command: object) -> Decided:
        """Decide on a command."""
        return Decided(self, self.decider.decide(self.state, command))


class Decided:
    """What was decided, to be judged."""

    def __init__(self, before: Given, decision: tuple[object, ...] | Rejected) -> None:
        self._before = before
        self.decision = decision

    def then(self, *events: object) -> Given:
        """Exactly these events. Returns the state after them, for a next command."""
        assert not isinstance(self.decision, Rejected), f"rejected: {self.decision}"
        assert self.decision == events, f"decided {self.decision}"
        state = self._before.state
        for event in events:
            state = self._before.decider.evolve(state, event)
        return Given(self._before.decider, state)

    def then_nothing(self) -> Given:
        """No event: what the command wants is true already."""
        return self.then()

    def then_rejected(self, code: str) -> Rejected:
        """Refused with this code, and with a reason and a hint."""
        assert isinstance(self.decision, Rejected), f"decided {self.decision}"
        assert self.decision.code == code, f"rejected with {self.decision}"
        assert self.decision.reason, "a rejection says why"
        assert self.decision.hint, "a rejection says what to do next"
        return self.decision


# --- strategies --------------------------------------------------------------------------------------------------


def asked(
    strategy: SwitchingStrategy,
    *,
    weight: float,
    step: int = 0,
    source: str = "v1",
    target: str = "v2",
    since_s: float | None = None,
    **parameters: object,
) -> Action:
    """The strategy's next action.

    Args:
        strategy: which is asked.
        weight: percent that the target has.
        step: number of the newest applied step.
        source: version that has the rest.
        target: version that shall get all.
        since_s: seconds since the newest step started; None before the first.
        parameters: the strategy's own.
    """
    since = None if since_s is None else START - timedelta(seconds=since_s)
    operation = Operation("sw-1", source, target, step, weight, since, parameters)
    return strategy.execute_switch(operation, Evidence(START))


# --- sagas -------------------------------------------------------------------------------------------------------


class WorldBuilder:
    """Makes recorded events out of bare ones, each second one command, and folds them into ``world``.

    Attributes:
        world: what the events so far make.
        now: time of the newest event (UTC).
        log: every recorded event, oldest first.
    """

    def __init__(self) -> None:
        self.world = World()
        self.now: datetime = START
        self.log: list[Recorded] = []
        self._positions: dict[str, Position] = {}
        self._commands = 0

    def happens(self, *events: object, command: str = "", after_s: float = 1.0) -> Self:
        """These events happen together, ``after_s`` seconds after the last ones."""
        self.now += timedelta(seconds=after_s)
        self._commands += 1
        context = Context(command or f"command-{self._commands}", "test", "", "", self.now)
        for n, event in enumerate(events):
            recorded = self._record(event, context, n)
            self.log.append(recorded)
            self.world.apply(recorded)
        return self

    def carry_out(self, owed: Owed) -> tuple[object, ...]:
        """Decide what a saga owes and let it happen. Returns the events; none where a decider refused."""
        decided = decide(self.world, owed.writes)
        if isinstance(decided, Rejected):
            return ()
        events = tuple(event for made in decided.values() for event in made)
        self.happens(*events, command=owed.id, after_s=0.0)
        return events

    def _record(self, event: object, context: Context, n: int) -> Recorded:
        subject = subject_of(event)
        parts = record(subject, event, context, n, self._positions.get(subject, NO_POSITION))
        recorded = decode(subject, len(self.log) + 1, *parts)
        self._positions[subject] = recorded.position
        return recorded


def given_world(*events: object) -> World:
    """A world that has seen these events, one a second from :data:`START` on."""
    builder = WorldBuilder()
    for event in events:
        builder.happens(event)
    return builder.world


def subject_of(event: object) -> str:
    """The subject that an event belongs to: its aggregate's kind, and the id that the event begins with.

    Raises:
        TypeError: it is no event of turnout.
    """
    match event:
        case RouteChanged(model):
            return subjects.event("route", model)
        case _:
            for aggregate, union in _UNIONS:
                if isinstance(event, union):
                    return subjects.event(aggregate, getattr(event, aggregate))
            raise TypeError(f"{type(event).__name__} is no event of turnout")


_UNIONS: tuple[tuple[str, Any], ...] = (
    ("alert", AlertEvent),
    ("model", ModelEvent),
    ("switch", SwitchEvent),
    ("instance", InstanceEvent),
    ("worker", WorkerEvent),
    ("gateway", GatewayEvent),
)
