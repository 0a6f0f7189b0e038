"""Everything that decisions read: all aggregates, folded from the log. The saga functions are pure over it.

``World.apply`` takes recorded events in the log's order and skips what it has seen, so that a controller may feed it
its own writes at once and the same events again from the tail. Knows no store.

What is over (ended switches and instances, processes that are gone, resolved alerts) is forgotten when ``OVER_MOST``
others have ended after it. Nothing owed depends on it, and who writes to it all the same meets a conflict, reads its
subject from the store and hands it to ``reread``. So memory is bounded by what is live, not by the log's length.
"""

# the table of indexes stands below the class whose methods it names
# pyright: reportPrivateUsage=false

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
from turnout.events.instance import (
    InstanceFailed,
    InstanceMeasured,
    InstanceReady,
    InstanceSleepRequested,
    InstanceSlept,
    InstanceStopped,
    InstanceWoken,
    TierFailed,
)
from turnout.events.model import ActiveVersionChanged, VersionDeregistered, VersionRegistered
from turnout.events.switch import SwitchCompleted
from turnout.events.worker import WorkerKeeps

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

#: So many of what is over are remembered at least, and at most twice as many.
OVER_MOST = 5_000
#: So many commands of sagas, gateways and workers are remembered at least, and at most twice as many. These make a
#: command again only from what the log says, moments later; an operator's command id is remembered for ever.
COMMANDS_MOST = 50_000
_OPERATORS = "ops"

#: Ways to make a version ready.
TIERS = ("adapter", "wake", "spare", "cold")

#: An instance that served this long was sound: its failure starts the back-off anew.
SOUND_S = 60.0
#: Switches of each model that are remembered.
TURNS_MOST = 100
#: Lost gateways and workers that are remembered: each process that is killed leaves one behind.
LOST_MOST = 100


class Done(msgspec.Struct, frozen=True, gc=False):
    """What a command has written: its first event's subject, first and last sequence, how many, and which switch."""

    subject: str
    first: int
    sequence: int
    events: int
    switch: str


class _Writing(msgspec.Struct, gc=False):
    """What the newest command has written so far: its events stand side by side in the log, so it is noted once."""

    command: str = ""
    actor: str = ""
    subject: str = ""
    first: int = 0
    sequence: int = 0
    events: int = 0
    switch: str = ""


class Failures(msgspec.Struct, frozen=True, gc=False):
    """Failed loads of one version in a row; of the last one when it was (UTC), in which stage, and why."""

    count: int
    last: datetime
    stage: str = ""
    reason: str = ""


class Load(msgspec.Struct, frozen=True, gc=False):
    """What the newest load of a version took."""

    seconds: float
    bytes: int


class Turn(msgspec.Struct, frozen=True, gc=False):
    """A version became the active one of its model, at this time (UTC)."""

    version: str
    at: datetime


class Size(msgspec.Struct, frozen=True, gc=False):
    """Memory that an instance was measured to hold."""

    bytes: int
    device_bytes: int = 0


class _Subject(msgspec.Struct, gc=False):
    """Where one subject stands, and what its events need: looked up once, not for each event."""

    newest: Recorded
    aggregate: str
    id: str
    evolve: Callable[[Any, Any], Any] | None
    index: Callable[[World, str, Any, Any, Recorded], None] | None
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
        #: Ready and sleeping instances that no route names → since when (UTC).
        self.idle_since: dict[str, datetime] = {}
        #: (model, version) → failed loads in a row.
        self.failures: dict[tuple[str, str], Failures] = {}
        #: (model, version) → what its newest load took.
        self.loads: dict[tuple[str, str], Load] = {}
        #: (model, version, tier) → seconds that its newest load in that way took.
        self.took: dict[tuple[str, str, str], float] = {}
        #: (worker, model, version) → memory that its newest instance there was measured to hold.
        self.sizes: dict[tuple[str, str, str], Size] = {}
        #: (worker, model, version) → memory that its newest instance there held still when it slept.
        self.rests: dict[tuple[str, str, str], Size] = {}
        #: (worker, model, version) → tier and source of ways that have failed for it there: they are not tried again.
        self.struck: dict[tuple[str, str, str], frozenset[tuple[str, str]]] = {}
        #: (worker, fit) → memory that a base of such adapters was measured to hold there.
        self.bases: dict[tuple[str, str], Size] = {}
        #: (model, version) → how often it became the active one.
        self.uses: dict[tuple[str, str], int] = {}
        #: Model → its newest changes of the active version, oldest first.
        self.turns: dict[str, tuple[Turn, ...]] = {}
        #: (model, version) → when it was registered last (UTC).
        self.registered: dict[tuple[str, str], datetime] = {}
        #: (model, version) → when it left its route last (UTC), and when its newest instance ended.
        self.used: dict[tuple[str, str], datetime] = {}
        self.gone: dict[tuple[str, str], datetime] = {}
        #: Instances that have been in a route, of those that have not ended.
        self.served: set[str] = set()
        #: (model, version) → seconds that its newest instance took to stop or to fall asleep, from its last request on.
        self.stops: dict[tuple[str, str], float] = {}
        #: Model → seconds that the requests took to end which ran when a version left its route last.
        self.drains: dict[str, float] = {}
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
        #: Instance → when it was asked to sleep last (UTC).
        self._to_sleep: dict[str, datetime] = {}
        self._last: dict[str, _Subject] = {}
        #: Operators' commands; others', of this generation and the one before.
        self._writing = _Writing()
        self._asked: dict[str, Done] = {}
        self._done: dict[str, Done] = {}
        self._done_before: dict[str, Done] = {}
        #: Subjects that are over, of this generation and the one before, in the order in which they ended.
        self._over: dict[str, None] = {}
        self._over_before: dict[str, None] = {}
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

    def changed_at(self, subject: str) -> datetime | None:
        """When the subject's newest event was written (UTC), None where it has none (or it is over and forgotten)."""
        known = self._last.get(subject)
        return None if known is None else known.newest.envelope.time

    def done(self, command: str) -> Done | None:
        """What the command has written, None where it has not taken effect (or long ago, and was no operator's)."""
        if command == self._writing.command:
            self._noted()
        return self._asked.get(command) or self._done.get(command) or self._done_before.get(command)

    def apply(self, recorded: Recorded) -> bool:
        """Fold one event. False where its subject has come this far already."""
        subject, sequence = recorded.subject, recorded.sequence
        known = self._last.get(subject)
        if known is None:
            known = self._last[subject] = self._first_of(recorded)
        elif sequence <= known.newest.sequence:
            return False
        known.newest = recorded
        if sequence > self.sequence:
            self.sequence = sequence
        event = recorded.event
        evolve = known.evolve
        if type(event) in _ONLY_GROWS and evolve is not None:
            known.state = known.states[known.id] = evolve(known.state, event)
            return True
        self._note(known, recorded)
        if evolve is None or type(event) is Unknown:
            return True
        before = known.state
        after = evolve(before, event)
        if after is not before:
            known.state = known.states[known.id] = after
            if known.index is not None:
                known.index(self, known.id, before, after, recorded)
        elif known.id not in known.states:
            known.states[known.id] = after
        return True

    def reread(self, history: tuple[Recorded, ...], seen: int) -> None:
        """Take one subject's whole history, oldest first, of which everything up to ``seen`` was folded before.

        Where the subject is not known, that was forgotten: then its state is taken back, and nothing is counted again.
        """
        old = [one for one in history if one.sequence <= seen]
        if old and old[0].subject not in self._last:
            known = self._first_of(old[0])
            for one in old:
                if known.evolve is not None and type(one.event) is not Unknown:
                    known.state = known.states[known.id] = known.evolve(known.state, one.event)
            known.newest = old[-1]
            self._last[known.newest.subject] = known
            self._end(known.newest)
        for one in history:
            self.apply(one)

    def _note(self, known: _Subject, recorded: Recorded) -> None:
        """Remember what the event's command has written, and the highest epoch."""
        envelope = recorded.envelope
        if envelope.epoch > self.epoch:
            self.epoch = envelope.epoch
        command, sequence, writing = envelope.command, recorded.sequence, self._writing
        if command != writing.command:
            self._noted()
            writing = self._writing = _Writing(command, envelope.actor)
        if not writing.events or sequence < writing.first:  # a batch may come in any order: each subject has its own
            writing.subject, writing.first = recorded.subject, sequence
        if sequence > writing.sequence:
            writing.sequence = sequence
        writing.events += 1
        if known.aggregate == "switch":
            writing.switch = known.id

    def _noted(self) -> None:
        """Keep what the newest command has written, together with what it is known to have written before."""
        new = self._writing
        if not new.events:
            return
        command, kept = new.command, self._asked if new.actor.startswith(_OPERATORS) else self._done
        done = self._asked.get(command) or self._done.get(command) or self._done_before.get(command)
        subject, first, sequence, events, switch_id = new.subject, new.first, new.sequence, new.events, new.switch
        if done is not None:
            if done.first < first:
                subject, first = done.subject, done.first
            sequence, events, switch_id = max(sequence, done.sequence), events + done.events, switch_id or done.switch
        kept[command] = Done(subject, first, sequence, events, switch_id)
        self._writing = _Writing()
        if len(self._done) >= COMMANDS_MOST:
            self._done_before, self._done = self._done, {}

    def _end(self, newest: Recorded) -> None:
        """The subject is over with this event; those that were long ago are forgotten."""
        self._over[newest.subject] = None
        if len(self._over) >= OVER_MOST:
            for subject in self._over_before:
                if subject not in self._over:
                    self._forget(subject)
            self._over_before, self._over = self._over, {}

    def _forget(self, subject: str) -> None:
        """Drop what is known of it, if it is over still and nobody tells of it."""
        known = self._last.get(subject)
        if known is None or not self._is_over(known):
            return
        del self._last[subject]
        known.states.pop(known.id, None)
        if known.aggregate == "alert":
            self.raisings.pop(known.id, None)

    def _is_over(self, known: _Subject) -> bool:
        state = known.state
        match known.aggregate:
            case "switch":
                newest = self.ended.get(state.model)
                return state.phase in switch.ENDED and (newest is None or newest.subject != known.newest.subject)
            case "instance":
                return state.phase in instance.ENDED
            case "worker" | "gateway":
                return not state.live and (known.aggregate, known.id) not in self.lost
            case "alert":
                return not state.raised
            case _:
                return False

    def ready(self, model: str, version: str) -> tuple[instance.InstanceState, ...]:
        """Proven instances of a version that were not asked to stop, oldest id first."""
        return self.instances_of(model, version, "ready")

    def last_used(self, model: str, version: str) -> datetime | None:
        """When a version was registered, left its route, or lost its newest instance: the newest of these (UTC)."""
        key = (model, version)
        times = [time for book in (self.registered, self.used, self.gone) if (time := book.get(key)) is not None]
        return max(times, default=None)

    def ready_at(self, instance: str) -> datetime | None:
        """When the instance was proven first, or woken last (UTC)."""
        return self._ready_at.get(instance)

    def makes_room(self, one: instance.InstanceState) -> bool:
        """Whether the instance was given up for another model: it leaves, also where its own is asked for again."""
        left_at = self.state("model", one.model).left_at
        since = self._ready_at.get(one.instance)
        return left_at is not None and since is not None and since <= left_at

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
            return _Subject(recorded, aggregate, id, None, None, None, {})
        states, index = self._states[aggregate], _INDEXES[aggregate]
        return _Subject(recorded, aggregate, id, decider.evolve, index, decider.initial, states)

    # What is derived from several events or from their times

    def _index_model(self, id: str, before: model.ModelState, after: model.ModelState, recorded: Recorded) -> None:
        if type(recorded.event) is VersionDeregistered:
            key = (id, recorded.event.version)
            self.failures.pop(key, None)
            self.registered.pop(key, None)
            self.loads.pop(key, None)
            self.uses.pop(key, None)
            self.used.pop(key, None)
            self.gone.pop(key, None)
            for tier in TIERS:
                self.took.pop((*key, tier), None)
            for worker in self.workers:
                self.sizes.pop((worker, *key), None)
                self.struck.pop((worker, *key), None)
                self.rests.pop((worker, *key), None)
        elif type(recorded.event) is VersionRegistered:
            self.registered[id, recorded.event.version] = recorded.envelope.time
        elif type(recorded.event) is ActiveVersionChanged:
            key = (id, after.active)
            self.uses[key] = self.uses.get(key, 0) + 1
            if after.active and after.active != before.active:
                turn = Turn(after.active, recorded.envelope.time)
                self.turns[id] = (*self.turns.get(id, ()), turn)[-TURNS_MOST:]

    def _index_switch(self, id: str, before: Any, after: switch.SwitchState, recorded: Recorded) -> None:
        if after.phase in switch.ENDED:
            self.running.discard(id)
            self.ended[after.model] = recorded
            self._end(recorded)
        else:
            self.running.add(id)
        if type(recorded.event) is SwitchCompleted and after.source and not after.alone:
            self.drains[after.model] = recorded.event.drain_s

    def _index_gateway(
        self, id: str, before: gateway.GatewayState, after: gateway.GatewayState, recorded: Recorded
    ) -> None:
        if after.live != before.live:
            (self.live_gateways.add if after.live else self.live_gateways.discard)(id)
        self._index_loss("gateway", id, after, recorded)
        self.joined.pop(id, None)
        if after.live:
            self.joined[id] = recorded.envelope.time

    def _index_worker(self, id: str, before: Any, after: worker.WorkerState, recorded: Recorded) -> None:
        self._index_loss("worker", id, after, recorded)
        if type(recorded.event) is WorkerKeeps:
            for engine in after.kept:
                of = self.instances.get(engine.instance)  # one that is being started has not grown to its size yet
                grown = engine.is_charged("" if of is None else of.phase, claimed=False)
                if engine.role == "base" and engine.fit and engine.bytes and grown:
                    self.bases[id, engine.fit] = Size(engine.bytes, engine.device_bytes)

    def _index_alert(self, id: str, before: Any, after: alert.AlertState, recorded: Recorded) -> None:
        if type(recorded.event) is AlertRaised:
            self.raisings[id] = recorded
        if after.raised:
            self.raised.add(id)
        else:
            self.raised.discard(id)
            self._end(recorded)

    def _index_loss(self, kind: str, id: str, after: gateway.GatewayState | worker.WorkerState, one: Recorded) -> None:
        self.lost.pop((kind, id), None)
        if not after.live:
            if not after.left:
                self.lost[kind, id] = one
                if len(self.lost) > LOST_MOST:
                    self._end(self.lost.pop(next(iter(self.lost))))
            self._end(one)

    def _index_route(self, id: str, before: route.RouteState, after: route.RouteState, recorded: Recorded) -> None:
        was = [e.instance for part in before.parts for e in part.endpoints]
        now = [e.instance for part in after.parts for e in part.endpoints]
        if was == now:
            return
        for one in now:
            self.idle_since.pop(one, None)
            self.served.add(one)
        for one in was:
            if one not in now and one in self.alive:
                self.idle_since[one] = recorded.envelope.time
        for version in {part.version for part in before.parts} - {part.version for part in after.parts}:
            self.used[id, version] = recorded.envelope.time

    def _index_instance(
        self, id: str, before: instance.InstanceState, after: instance.InstanceState, recorded: Recorded
    ) -> None:
        time = recorded.envelope.time
        key = (after.model, after.version)
        if before.phase == "unknown":
            self.requested_instances += 1
        if before.phase == "ready" and after.phase in ("draining", "sleeping"):
            held = self.state("switch", self.state("model", after.model).switch)
            if held.phase == "holding" and held.source == after.version and (since := self.idle_since.get(id)):
                self.drains[after.model] = (time - since).total_seconds()
        if after.phase in instance.ENDED:
            self.alive.discard(id)
            self.served.discard(id)
            self._to_sleep.pop(id, None)
            self.idle_since.pop(id, None)
            self.gone[key] = time
            self._end(recorded)
        else:
            self.alive.add(id)
        match recorded.event:
            case InstanceReady(_, _, load_s, _, size):
                self._ready_at.setdefault(id, time)
                if not self.state("route", after.model).names(id):
                    self.idle_since.setdefault(id, time)
                self.loads[key] = Load(load_s, size)
                self.took[(*key, after.tier)] = load_s
                if size and after.tier != "adapter" and not after.base:  # an adapter shares its base's engine
                    self.sizes[after.worker, after.model, after.version] = Size(size, after.device_bytes)
            case InstanceWoken(_, seconds, _, size, device_size):
                self.took[(*key, after.tier)] = seconds
                self._ready_at[id] = time
                if not self.state("route", after.model).names(id):
                    self.idle_since[id] = time
                if size:
                    self.sizes[after.worker, after.model, after.version] = Size(size, device_size)
            case InstanceSleepRequested():
                self._to_sleep[id] = time
            case InstanceSlept(_, _, _, size, device_size):
                self.stops[key] = (time - self._to_sleep.get(id, time)).total_seconds()
                self.rests[after.worker, after.model, after.version] = Size(size, device_size)
            case InstanceMeasured(_, size, device_size):
                self.sizes[after.worker, after.model, after.version] = Size(size, device_size)
            case InstanceFailed(_, stage) if stage in instance.SLUMBER:
                self._ready_at.pop(id, None)  # it says nothing of a load
            case TierFailed(_, tier, source):
                home = (after.worker, *key)
                self.struck[home] = self.struck.get(home, frozenset()) | {(tier, source)}
            case InstanceFailed() as failed:
                ready = self._ready_at.pop(id, None)
                sound = ready is not None and (time - ready).total_seconds() >= SOUND_S
                count = 0 if sound or key not in self.failures else self.failures[key].count
                self.failures[key] = Failures(count + 1, time, failed.stage, failed.reason)
            case InstanceStopped(_, seconds):
                self._ready_at.pop(id, None)
                self.stops[key] = seconds
            case _:
                pass


_INDEXES: dict[str, Callable[[World, str, Any, Any, Recorded], None]] = {
    "model": World._index_model,
    "switch": World._index_switch,
    "route": World._index_route,
    "instance": World._index_instance,
    "worker": World._index_worker,
    "gateway": World._index_gateway,
    "alert": World._index_alert,
}
