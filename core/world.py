"""Everything that decisions read: all aggregates, folded from the log. The saga functions are pure over it.

``World.apply`` takes recorded events in the log's order and skips what it has seen, so that a controller may feed it
its own writes at once and the same events again from the tail. Knows no store.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from turnout.core import gateway, instance, model, route, switch, worker
from turnout.events import subjects
from turnout.events.envelope import START, Position, Recorded, Unknown
from turnout.events.gateway import RouteApplied, VersionDrained
from turnout.events.instance import InstanceFailed, InstanceReady
from turnout.events.route import RouteChanged

if TYPE_CHECKING:
    from types import ModuleType

DECIDERS: dict[str, ModuleType] = {
    "model": model,
    "switch": switch,
    "route": route,
    "instance": instance,
    "worker": worker,
    "gateway": gateway,
}

#: The bulk of what gateways report. A repeated report is no news to the decider: it needs no memory of command ids.
_ONLY_GROWS = frozenset((RouteApplied, VersionDrained))

#: An instance that served this long was sound: its failure starts the back-off anew.
SOUND_S = 60.0


class Done(msgspec.Struct, frozen=True, gc=False):
    """What a command has written: its first event's subject, first and last sequence, how many, and which switch."""

    subject: str
    first: int
    sequence: int
    events: int
    switch: str


class Failures(msgspec.Struct, frozen=True, gc=False):
    """Failed loads of one version in a row, and when the last one was (UTC)."""

    count: int
    last: datetime


class Load(msgspec.Struct, frozen=True, gc=False):
    """What the newest load of a version took."""

    seconds: float
    bytes: int


class World:
    """The fold. Read its dicts, never write them; ``apply`` is the only way to change them."""

    def __init__(self) -> None:
        self.models: dict[str, model.ModelState] = {}
        self.switches: dict[str, switch.SwitchState] = {}
        self.routes: dict[str, route.RouteState] = {}
        self.instances: dict[str, instance.InstanceState] = {}
        self.workers: dict[str, worker.WorkerState] = {}
        self.gateways: dict[str, gateway.GatewayState] = {}
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
        self.requested_instances = 0
        self._ready_at: dict[str, datetime] = {}
        self._last: dict[str, Recorded] = {}
        self._done: dict[str, Done] = {}
        self._states: dict[str, dict[str, Any]] = {
            "model": self.models,
            "switch": self.switches,
            "route": self.routes,
            "instance": self.instances,
            "worker": self.workers,
            "gateway": self.gateways,
        }

    def state(self, aggregate: str, id: str) -> Any:
        """State of one aggregate, its ``initial`` where it has no events."""
        return self._states[aggregate].get(id, DECIDERS[aggregate].initial)

    def position(self, subject: str) -> Position:
        """Where the subject's history ends, as far as this fold has come."""
        last = self._last.get(subject)
        return START if last is None else last.position

    def last_event(self, subject: str) -> str:
        """Id of the subject's newest event, empty where it has none."""
        last = self._last.get(subject)
        return "" if last is None else last.envelope.id

    def done(self, command: str) -> Done | None:
        """What the command has written, None where it has not taken effect."""
        return self._done.get(command)

    def apply(self, recorded: Recorded) -> bool:
        """Fold one event. False where its subject has come this far already."""
        subject = recorded.subject
        last = self._last.get(subject)
        if last is not None and recorded.sequence <= last.sequence:
            return False
        self._last[subject] = recorded
        self.sequence = max(self.sequence, recorded.sequence)
        envelope = recorded.envelope
        self.epoch = max(self.epoch, envelope.epoch)
        aggregate, id = subjects.parse_event(subject)
        if type(recorded.event) not in _ONLY_GROWS:
            self._done[envelope.command] = self._done_with(recorded, id if aggregate == "switch" else "")
        event = recorded.event
        if type(event) is Unknown:
            return True
        states = self._states.get(aggregate)
        if states is None:
            return True
        decider = DECIDERS[aggregate]
        before = states.get(id, decider.initial)
        after = states[id] = decider.evolve(before, event)
        self._index(aggregate, id, before, after, recorded)
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

    def _done_with(self, recorded: Recorded, switch_id: str) -> Done:
        """What the event's command has written with it. Its events may come in any order: each subject has its own."""
        sequence = recorded.sequence
        done = self._done.get(recorded.envelope.command)
        if done is None:
            return Done(recorded.subject, sequence, sequence, 1, switch_id)
        subject, first = (recorded.subject, sequence) if sequence < done.first else (done.subject, done.first)
        return Done(subject, first, max(sequence, done.sequence), done.events + 1, switch_id or done.switch)

    def _index(self, aggregate: str, id: str, before: Any, after: Any, recorded: Recorded) -> None:
        """Keep what is derived from several events or from their times."""
        match aggregate:
            case "gateway":
                (self.live_gateways.add if after.live else self.live_gateways.discard)(id)
            case "switch":
                (self.running.discard if after.phase in switch.ENDED else self.running.add)(id)
            case "route":
                self._index_route(before, recorded)
            case "instance":
                self._index_instance(id, before, after, recorded)
            case _:
                pass

    def _index_route(self, before: route.RouteState, recorded: Recorded) -> None:
        event = recorded.event
        if not isinstance(event, RouteChanged) or event.revision <= before.revision:
            return
        was = {e.instance for s in before.splits for e in s.endpoints}
        now = {e.instance for s in event.splits for e in s.endpoints}
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
