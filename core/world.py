"""Everything that decisions read: all aggregates, folded from the log. The saga functions are pure over it.

``World.apply`` takes recorded events in the log's order and skips what it has seen, so that a controller may feed it
its own writes at once and the same events again from the tail. Knows no store.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from turnout.core import alert, gateway, instance, model, route, switch, worker
from turnout.events import subjects
from turnout.events.alert import AlertRaised
from turnout.events.envelope import START, Position, Recorded, Unknown
from turnout.events.gateway import RouteApplied, VersionDrained
from turnout.events.instance import InstanceFailed, InstanceReady

if TYPE_CHECKING:
    from types import ModuleType

DECIDERS: dict[str, ModuleType] = {
    "model": model,
    "switch": switch,
    "route": route,
    "instance": instance,
    "worker": worker,
    "gateway": gateway,
    "alert": alert,
}

#: The bulk of what gateways report. A repeated report is no news to the decider: it needs no memory of command ids.
#: Nothing else is derived from them.
_ONLY_GROWS = frozenset((RouteApplied, VersionDrained))

#: An instance that served this long was sound: its failure starts the back-off anew.
SOUND_S = 60.0
#: Lost gateways and workers that are remembered: each process that is killed leaves one behind.
LOST_MOST = 100


class Done(msgspec.Struct, frozen=True, gc=False):
    """What a command has written: its first event's subject, first and last sequence, how many, and which switch."""

    subject: str
    first: int
    sequence: int
    events: int
    switch: str


def _with(done: Done, recorded: Recorded, switch_id: str) -> Done:
    """What a command has written, with one more event; they may come in any order: each subject has its own."""
    sequence = recorded.sequence
    subject, first = (recorded.subject, sequence) if sequence < done.first else (done.subject, done.first)
    return Done(subject, first, max(sequence, done.sequence), done.events + 1, switch_id or done.switch)


class Failures(msgspec.Struct, frozen=True, gc=False):
    """Failed loads of one version in a row, and when the last one was (UTC)."""

    count: int
    last: datetime


class Load(msgspec.Struct, frozen=True, gc=False):
    """What the newest load of a version took."""

    seconds: float
    bytes: int


class _Subject(msgspec.Struct, gc=False):
    """Where one subject stands, and what its events need: looked up once, not for each event."""

    newest: Recorded
    aggregate: str
    id: str
    evolve: Callable[[Any, Any], Any] | None
    state: Any
    states: dict[str, Any]


class World:
    """The fold. Read its dicts, never write them; ``apply`` is the only way to change them."""

    def __init__(self) -> None:
        self.models: dict[str, model.ModelState] = {}
        self.switches: dict[str, switch.SwitchState] = {}
        self.routes: dict[str, route.RouteState] = {}
        self.instances: dict[str, instance.InstanceState] = {}
        self.workers: dict[str, worker.WorkerState] = {}
        self.gateways: dict[str, gateway.GatewayState] = {}
        self.alerts: dict[str, alert.AlertState] = {}
        self.sequence = 0
        self.epoch = 0
        #: Instances that have not ended, by id.
        self.alive: set[str] = set()
        #: Switches that have not ended, by id.
        self.running: set[str] = set()
        #: Live gateways, by id.
        self.live_gateways: set[str] = set()
        #: Ready instances that no route names → since when (UTC).
        self.idle_since: dict[str, datetime] = {}
        #: (model, version) → failed loads in a row.
        self.failures: dict[tuple[str, str], Failures] = {}
        #: (model, version) → what its newest load took.
        self.loads: dict[tuple[str, str], Load] = {}
        #: Model → the event that ended its newest switch.
        self.ended: dict[str, Recorded] = {}
        #: (``gateway`` or ``worker``, id) → the event that it was lost by, of the newest LOST_MOST that are lost still.
        self.lost: dict[tuple[str, str], Recorded] = {}
        #: Live gateway → when it joined (UTC).
        self.joined: dict[str, datetime] = {}
        #: Alert → the event that raised it last; and those that are raised now.
        self.raisings: dict[str, Recorded] = {}
        self.raised: set[str] = set()
        self.requested_instances = 0
        self._ready_at: dict[str, datetime] = {}
        self._last: dict[str, _Subject] = {}
        self._done: dict[str, Done] = {}
        self._states: dict[str, dict[str, Any]] = {
            "model": self.models,
            "switch": self.switches,
            "route": self.routes,
            "instance": self.instances,
            "worker": self.workers,
            "gateway": self.gateways,
            "alert": self.alerts,
        }

    def state(self, aggregate: str, id: str) -> Any:
        """State of one aggregate, its ``initial`` where it has no events."""
        return self._states[aggregate].get(id, DECIDERS[aggregate].initial)

    def position(self, subject: str) -> Position:
        """Where the subject's history ends, as far as this fold has come."""
        known = self._last.get(subject)
        return START if known is None else known.newest.position

    def last_event(self, subject: str) -> str:
        """Id of the subject's newest event, empty where it has none."""
        known = self._last.get(subject)
        return "" if known is None else known.newest.envelope.id

    def done(self, command: str) -> Done | None:
        """What the command has written, None where it has not taken effect."""
        return self._done.get(command)

    def apply(self, recorded: Recorded) -> bool:
        """Fold one event. False where its subject has come this far already."""
        known = self._last.get(recorded.subject)
        if known is None:
            known = self._last[recorded.subject] = self._first_of(recorded)
        elif recorded.sequence <= known.newest.sequence:
            return False
        known.newest = recorded
        if recorded.sequence > self.sequence:
            self.sequence = recorded.sequence
        if recorded.envelope.epoch > self.epoch:
            self.epoch = recorded.envelope.epoch
        event = recorded.event
        quiet = type(event) in _ONLY_GROWS
        if not quiet:
            switch_id = known.id if known.aggregate == "switch" else ""
            command = recorded.envelope.command
            done = self._done.get(command)
            self._done[command] = (
                Done(recorded.subject, recorded.sequence, recorded.sequence, 1, switch_id)
                if done is None
                else _with(done, recorded, switch_id)
            )
        if known.evolve is None or type(event) is Unknown:
            return True
        before = known.state
        after = known.state = known.states[known.id] = known.evolve(before, event)
        if not quiet and after is not before:
            self._index(known.aggregate, known.id, before, after, recorded)
        return True

    def ready(self, model: str, version: str) -> tuple[instance.InstanceState, ...]:
        """Proven instances of a version that were not asked to stop, oldest id first."""
        return self.instances_of(model, version, "ready")

    def instances_of(self, model: str, version: str, *phases: str) -> tuple[instance.InstanceState, ...]:
        """Instances of a version in one of the phases."""
        found = [self.instances[i] for i in self.alive]
        return tuple(
            sorted(
                (i for i in found if i.model == model and i.version == version and i.phase in phases),
                key=lambda i: i.instance,
            )
        )

    def _first_of(self, recorded: Recorded) -> _Subject:
        """The subject that begins with this event."""
        aggregate, id = subjects.parse_event(recorded.subject)
        decider = DECIDERS.get(aggregate)
        if decider is None:
            return _Subject(recorded, aggregate, id, None, None, {})
        return _Subject(recorded, aggregate, id, decider.evolve, decider.initial, self._states[aggregate])

    def _index(self, aggregate: str, id: str, before: Any, after: Any, recorded: Recorded) -> None:
        """Keep what is derived from several events or from their times."""
        match aggregate:
            case "gateway":
                if after.live != before.live:
                    (self.live_gateways.add if after.live else self.live_gateways.discard)(id)
                self._index_loss(aggregate, id, after, recorded)
            case "worker":
                self._index_loss(aggregate, id, after, recorded)
            case "switch":
                (self.running.discard if after.phase in switch.ENDED else self.running.add)(id)
                if after.phase in switch.ENDED:
                    self.ended[after.model] = recorded
            case "alert":
                (self.raised.add if after.raised else self.raised.discard)(id)
                if type(recorded.event) is AlertRaised:
                    self.raisings[id] = recorded
            case "route":
                self._index_route(before, after, recorded)
            case "instance":
                self._index_instance(id, before, after, recorded)
            case _:
                pass

    def _index_loss(self, kind: str, id: str, after: gateway.GatewayState | worker.WorkerState, one: Recorded) -> None:
        self.lost.pop((kind, id), None)
        if not after.live and not after.left:
            self.lost[kind, id] = one
            if len(self.lost) > LOST_MOST:
                self.lost.pop(next(iter(self.lost)))
        if kind == "gateway":
            self.joined.pop(id, None)
            if after.live:
                self.joined[id] = one.envelope.time

    def _index_route(self, before: route.RouteState, after: route.RouteState, recorded: Recorded) -> None:
        was = {e.instance for part in before.parts for e in part.endpoints}
        now = {e.instance for part in after.parts for e in part.endpoints}
        for id in now:
            self.idle_since.pop(id, None)
        for id in was - now:
            if id in self.alive:
                self.idle_since[id] = recorded.envelope.time

    def _index_instance(
        self, id: str, before: instance.InstanceState, after: instance.InstanceState, recorded: Recorded
    ) -> None:
        time = recorded.envelope.time
        key = (after.model, after.version)
        if before.phase == "unknown":
            self.requested_instances += 1
        if after.phase in instance.ENDED:
            self.alive.discard(id)
            self.idle_since.pop(id, None)
        else:
            self.alive.add(id)
        match recorded.event:
            case InstanceReady(_, _, load_s, _, size):
                self._ready_at.setdefault(id, time)
                if not self.state("route", after.model).names(id):
                    self.idle_since.setdefault(id, time)
                self.loads[key] = Load(load_s, size)
            case InstanceFailed():
                ready = self._ready_at.pop(id, None)
                sound = ready is not None and (time - ready).total_seconds() >= SOUND_S
                count = 0 if sound or key not in self.failures else self.failures[key].count
                self.failures[key] = Failures(count + 1, time)
            case _:
                pass
