"""What must hold for every command and every order of events."""

from __future__ import annotations

import types
import typing
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.core import alert, gateway, instance, model, route, switch, worker
from turnout.core.config import WARM, CacheConfig, ModelSwitchingConfig
from turnout.core.decider import Rejected
from turnout.core.sagas import alerts, placement, warming
from turnout.core.sagas import switch as saga
from turnout.core.testing import WorldBuilder
from turnout.core.world import DECIDERS, World
from turnout.events import subjects
from turnout.events.codec import TYPES, Context, decode, record
from turnout.events.envelope import Position, Recorded
from turnout.projections.audit import Audit
from turnout.projections.views import Views

NOW = datetime(2026, 1, 1, tzinfo=UTC)
# Few names, so that events and commands meet; a strategy that exists, so that sagas go on.
NAMES = st.sampled_from(("a", "b", "immediate", "fake", ""))
COMMANDS: dict[str, Any] = {
    "model": model.ModelCommand,
    "switch": switch.SwitchCommand,
    "route": route.RouteCommand,
    "instance": instance.InstanceCommand,
    "worker": worker.WorkerCommand,
    "gateway": gateway.GatewayCommand,
    "alert": alert.AlertCommand,
}


def values(type_: Any) -> st.SearchStrategy[Any]:
    """Anything of a type that the structs use."""
    origin = typing.get_origin(type_)
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return structs(type_)
    if isinstance(type_, type) and issubclass(type_, StrEnum):
        return st.sampled_from(tuple(type_))
    if origin is tuple:
        return st.lists(values(get_args(type_)[0]), max_size=2).map(tuple)
    if origin is dict:
        inner = get_args(type_)[1]
        return st.dictionaries(NAMES, st.integers(0, 3) if inner is object else values(inner), max_size=2)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(t) for t in get_args(type_)])
    known: dict[Any, st.SearchStrategy[Any]] = {
        str: NAMES,
        int: st.integers(0, 4),
        float: st.sampled_from((0.0, 0.5, 50.0, 100.0)),
        bool: st.booleans(),
        object: st.integers(0, 3),
        datetime: st.integers(-100, 100).map(lambda s: NOW + timedelta(seconds=s)),
        types.NoneType: st.none(),
    }
    return known[type_]


def structs(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Any instance of a struct."""
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{name: values(hints[name]) for name in cls.__struct_fields__})


EVENTS = {name: structs(cls) for name, cls in TYPES.items()}
ALL_EVENTS = st.one_of([EVENTS[name] for name in sorted(EVENTS)])
LOGS = st.lists(st.tuples(ALL_EVENTS, st.sampled_from(("a", "b")), st.integers(0, 3)), max_size=30)


def events_of(aggregate: str) -> st.SearchStrategy[Any]:
    """Events of one aggregate."""
    hints = typing.get_type_hints(DECIDERS[aggregate].evolve)
    union = hints["event"]
    return st.one_of([structs(t) for t in (get_args(union) or (union,))])


def commands_of(aggregate: str) -> st.SearchStrategy[Any]:
    """Commands of one aggregate."""
    union = COMMANDS[aggregate]
    return st.one_of([structs(t) for t in (get_args(union) or (union,))]).filter(_has_id)


def _has_id(struct: msgspec.Struct) -> bool:
    """Nothing reaches a decider without the id of its aggregate."""
    return bool(getattr(struct, struct.__struct_fields__[0]))


@pytest.mark.parametrize("aggregate", sorted(DECIDERS))
@given(data=st.data())
@settings(max_examples=100)
def test_a_command_given_twice_changes_nothing_the_second_time(aggregate: str, data: st.DataObject) -> None:
    decider = DECIDERS[aggregate]
    state = decider.initial
    for event in data.draw(st.lists(events_of(aggregate), max_size=8)):
        state = decider.evolve(state, event)
    command = data.draw(commands_of(aggregate))
    decided = decider.decide(state, command)
    if not isinstance(decided, Rejected):
        for event in decided:
            state = decider.evolve(state, event)
    again = decider.decide(state, command)
    if isinstance(decided, Rejected):
        assert again == decided
    else:
        assert again == ()


@pytest.mark.parametrize("aggregate", sorted(DECIDERS))
@given(data=st.data())
@settings(max_examples=40)
def test_evolve_takes_any_event_in_any_order(aggregate: str, data: st.DataObject) -> None:
    decider = DECIDERS[aggregate]
    state = decider.initial
    for event in data.draw(st.lists(events_of(aggregate), max_size=20)):
        state = decider.evolve(state, event)
    assert type(state) is type(decider.initial)


def _recorded(log: list[tuple[Any, str, int]]) -> list[Recorded]:
    """A log in which everything stands on subjects of its kind, in any order, with gaps and repeated commands."""
    kinds = {name: kind for kind in DECIDERS for name in _names(kind)}
    records: list[Recorded] = []
    for n, (event, id, command) in enumerate(log, 1):
        name = type(event).__name__
        context = Context(f"c{command}", "test", "", "", NOW + timedelta(seconds=n))
        subject = subjects.event(kinds[name], id)
        records.append(decode(subject, n, *record(subject, event, context, 0, Position(0, ""))))
    return records


def _names(kind: str) -> list[str]:
    union = typing.get_type_hints(DECIDERS[kind].evolve)["event"]
    return [t.__name__ for t in (get_args(union) or (union,))]


@given(LOGS)
@settings(max_examples=60)
def test_the_world_takes_any_log_and_the_same_events_twice_change_nothing(log: list[tuple[Any, str, int]]) -> None:
    records = _recorded(log)
    world, twice = World(), World()
    for one in records:
        assert world.apply(one)
        assert twice.apply(one)
        assert not twice.apply(one)
    assert {k: v for k, v in vars(world).items() if k not in ("_states",)} == {
        k: v for k, v in vars(twice).items() if k not in ("_states",)
    }


@given(LOGS)
@settings(max_examples=60)
def test_every_projection_takes_any_log(log: list[tuple[Any, str, int]]) -> None:
    views, audit = Views(), Audit()
    stored: dict[str, bytes] = {}
    for one in _recorded(log):
        views.apply(one)
        views.settle()
        for key, value in views.take(0).items():
            if value is None:
                stored.pop(key, None)
            else:
                stored[key] = value
        assert audit.entry(one).sentence
    assert stored == views.everything()


@given(st.lists(ALL_EVENTS, max_size=30))
@settings(max_examples=60)
def test_no_saga_raises_whatever_has_happened_to_registered_models(events: list[Any]) -> None:
    builder = WorldBuilder()
    for event in events:
        if _has_id(event):
            builder.happens(event)
    world = builder.world
    for one in world.models.values():
        named = (one.active, one.target, *(rule.version for rule in one.rules))
        if any(v and v not in one.versions for v in named):
            return  # no decider writes these: what is active, a target or named by a rule is registered
    for running in world.switches.values():
        held = world.models.get(running.model)
        if held is None or running.target not in held.versions or running.strategy != "immediate":
            return
    for id in world.running:
        saga.agenda(world, id, builder.now)
    placement.agenda(world, ModelSwitchingConfig(), builder.now)
    warming.agenda(world, ModelSwitchingConfig(), builder.now, CacheConfig(warm=WARM))
    alerts.agenda(world, (), builder.now)
