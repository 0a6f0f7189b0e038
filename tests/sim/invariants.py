"""The invariants of design section 9, each a named function that is asked after every step.

The checker sees what no process sees: the log in the moment of each write, every gateway's memory, every engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from tests.sim.ruling import allowed

from turnout.core.switch import ENDED, UNTOUCHED
from turnout.core.world import World
from turnout.events.chain import verify_chain
from turnout.events.gateway import RouteApplied
from turnout.events.instance import (
    InstanceDraining,
    InstanceReady,
    InstanceRequested,
    InstanceSleepRequested,
    InstanceWakeRequested,
    InstanceWoken,
)
from turnout.events.model import SwitchAdmitted
from turnout.events.route import RouteChanged
from turnout.projections.views import Views
from turnout.workers.gateway.transition import NoRoute

if TYPE_CHECKING:
    import asyncio

    from tests.sim.fleet import Fleet, Flight, SimEngine, SimPlane
    from tests.sim.network import Network

    from turnout.core.rules import Facts
    from turnout.events.envelope import Recorded
    from turnout.projections.routing import RouteView
    from turnout.workers.gateway.transition import Choice
    from turnout.workers.ports import Request


#: A write may be this old when it is stored.
DECIDED_S_MAX = 3.0


class Broken(AssertionError):
    """An invariant does not hold."""


class Checker:
    """Hooks into everything that moves."""

    def __init__(self, net: Network, fleet: Fleet) -> None:
        self.net = net
        self.fleet = fleet
        self.world = World()
        self.broken: list[str] = []
        #: Who waits for the log to move.
        self.watchers: list[asyncio.Future[None]] = []
        #: (model, version) and model of engines that fault injection has crashed or hung.
        self.wounded: set[tuple[str, str]] = set()
        #: Commands → the answer that their sender may rely on.
        self._answers: dict[str, bytes] = {}
        self._commands: dict[str, int] = {}
        self._epochs: dict[str, int] = {}
        self._proven: set[str] = set()
        #: Instances that were asked to sleep, and have not been proven awake since.
        self._slumbering: set[str] = set()
        self._names: dict[tuple[str, int], frozenset[str]] = {}
        self._batches = 0
        self._live: dict[str, float] = {}
        net.log.appended = self._appended
        net.answered = self._answered
        fleet.on_sent = self._sent
        fleet.on_stop = self._stopping
        fleet.on_sleep = self.invariant_2_an_engine_is_only_put_to_sleep_when_it_is_drained
        fleet.on_wake = self.invariant_9_a_wake_is_tried_once
        fleet.on_grown = self.invariant_4_engines_never_hold_more_than_the_memory
        fleet.on_failed = self._failed
        fleet.on_applied = self._applied
        fleet.on_chosen = self.a_request_goes_where_the_rules_of_its_revision_say

    def violation(self, number: int, what: str) -> None:
        """Remember that invariant ``number`` is broken."""
        self.net.trace("BROKEN", number, what)
        self.broken.append(f"invariant {number} at {self.net.loop.time():.3f} s: {what}")

    # hooks

    def _appended(self, batch: tuple[Recorded, ...]) -> None:
        self._batches += 1
        self.invariant_6_a_command_takes_effect_once(batch)
        self.invariant_7_no_deposed_leader_overwrites(batch)
        now = self.net.loop.time()
        for id in self.world.live_gateways ^ self._live.keys():
            if self._live.pop(id, None) is None:
                self._live[id] = now
        # Who joins again while a decision is on its way is for the worker's proof of quiet to find.
        before_live = frozenset(id for id, since in self._live.items() if now - since > DECIDED_S_MAX)
        for recorded in batch:
            self.invariant_3_one_switch_and_growing_revisions(recorded)
            match recorded.event:
                case InstanceRequested():
                    self.invariant_4_no_load_is_admitted_beyond_the_memory(recorded.event)
                case InstanceReady(instance):
                    self._proven.add(instance)
                case InstanceSleepRequested(instance):
                    self.invariant_2_no_live_gateway_uses_what_is_asked_to_stop(instance, before_live)
                    self._slumbering.add(instance)
                case InstanceWakeRequested():
                    self.invariant_4_no_wake_is_admitted_beyond_the_memory(recorded.event)
                case InstanceWoken(instance):
                    self._slumbering.discard(instance)
                case InstanceDraining(instance, _, forced_by) if not forced_by:
                    self.invariant_2_no_live_gateway_uses_what_is_asked_to_stop(instance, before_live)
                case RouteChanged(model, revision, splits):
                    self._names[model, revision] = frozenset(e.instance for s in splits for e in s.endpoints)
                    self.invariant_9_only_proven_instances_are_routed(model, revision)
                case RouteApplied(gateway, model, revision):
                    self.invariant_9_no_acknowledgement_of_what_was_not_done(gateway, model, revision)
                case _:
                    pass
            self.world.apply(recorded)
        self.invariant_4_the_source_can_serve_everything()
        watchers, self.watchers = self.watchers, []
        for moved in watchers:
            if not moved.done():
                moved.set_result(None)

    def _answered(self, request: Request, raw: bytes) -> None:
        """Invariant 6, the other half: who asks twice hears the same."""
        answer = msgspec.json.decode(raw)
        if answer["status"] != "accepted" or not answer["events"]:
            return
        known = self._answers.setdefault(request.id, raw)
        if known != raw:
            self.violation(6, f"command {request.id} was answered {known!r} and {raw!r}")

    def _sent(self, gateway: SimPlane, choice: Choice) -> None:
        self.invariant_1_only_proven_instances_get_requests(gateway, choice)

    def _stopping(self, engine: SimEngine) -> None:
        self.invariant_2_no_engine_is_stopped_under_a_gateway(engine)

    def _applied(self, gateway: SimPlane, view: RouteView, before: int) -> None:
        if view.revision < before:
            self.violation(3, f"{gateway.id} went from revision {before} of {view.model} to {view.revision}")

    def _failed(self, gateway: SimPlane, flight: Flight, code: str) -> None:
        self.invariant_8_requests_only_fail_with_their_engine(gateway, flight, code)

    # invariants

    def invariant_1_only_proven_instances_get_requests(self, gateway: SimPlane, choice: Choice) -> None:
        """A request is only sent to an instance that was proven ready and not yet stopped."""
        engine = self.fleet.engines.get(choice.address)
        if choice.instance not in self._proven or engine is None or not engine.proven:
            self.violation(1, f"{gateway.id} sent a request to {choice.instance}, which was never proven")
        elif engine.state in ("stopped", "turning", "asleep"):
            self.violation(1, f"{gateway.id} sent a request to {choice.instance}, which is {engine.state}, as asked")

    def invariant_2_no_live_gateway_uses_what_is_asked_to_stop(self, instance: str, live: frozenset[str]) -> None:
        """The controller's half: it asks no instance to stop that a live gateway may use."""
        if self.world.state("instance", instance).phase != "ready":
            return
        for gateway in self.fleet.gateways:
            if gateway.process.alive and gateway.id in live and (use := _use(gateway, instance)):
                self.violation(2, f"{instance} was asked to stop while the live {gateway.id} {use}")

    def invariant_2_no_engine_is_stopped_under_a_gateway(self, engine: SimEngine) -> None:
        """The worker's half: it stops no engine that any gateway may use, cut off or not."""
        if engine.state != "up" or not engine.proven:
            return
        for gateway in self.fleet.gateways:
            if gateway.process.alive and (use := _use(gateway, engine.instance)):
                self.violation(2, f"{engine.instance} was stopped while {gateway.id} {use}")

    def invariant_2_an_engine_is_only_put_to_sleep_when_it_is_drained(self, engine: SimEngine) -> None:
        """As for an engine that is stopped: some engines crash where they are put to sleep under a request."""
        if engine.flights:
            self.violation(2, f"{engine.instance} was put to sleep under {len(engine.flights)} requests")
        self.invariant_2_no_engine_is_stopped_under_a_gateway(engine)

    def invariant_3_one_switch_and_growing_revisions(self, recorded: Recorded) -> None:
        """One running switch per model; route revisions grow by one."""
        match recorded.event:
            case SwitchAdmitted(model, switch):
                held = self.world.state("model", model).switch
                running = [s for s in self.world.running if self.world.switches[s].model == model]
                if held or running:
                    self.violation(3, f"{switch} was admitted while {held or running} runs on {model}")
            case RouteChanged(model, revision):
                newest = self.world.state("route", model).revision
                if revision != newest + 1:
                    self.violation(3, f"revision {revision} of {model} came after {newest}")
            case _:
                pass

    def invariant_4_the_source_can_serve_everything(self) -> None:
        """Until the source drains, it has a ready instance that is really up (unless a fault took it)."""
        for id in self.world.running:
            switch = self.world.switches[id]
            if not switch.source or (switch.model, switch.source) in self.wounded:
                continue
            if switch.held_at is not None:  # whoever allowed the hold has waived it: the event says so
                continue
            if switch.phase not in UNTOUCHED and switch.phase not in ("stepping", "stepped", "baking"):
                continue
            ready = self.world.ready(switch.model, switch.source)
            if not any(e is not None and e.state == "up" for e in (self.fleet.engines.get(i.address) for i in ready)):
                self.violation(4, f"{switch.model} {switch.source} can't take over from {switch.target} ({id})")

    def invariant_4_no_load_is_admitted_beyond_the_memory(self, asked: InstanceRequested) -> None:
        """What a worker's engines hold and were admitted with never exceeds its memory: nobody is starved by a load."""
        worker = self.world.state("worker", asked.worker)
        if not worker.memory_bytes:
            return
        held = sum(one.bytes for one in map(self.world.instances.__getitem__, self.world.alive)
                   if one.worker == asked.worker)  # fmt: skip
        if held + asked.bytes > worker.memory_bytes:
            self.violation(4, f"{asked.instance} was admitted to {asked.worker} with {asked.bytes} bytes beside {held}")

    def invariant_4_no_wake_is_admitted_beyond_the_memory(self, asked: InstanceWakeRequested) -> None:
        """What sleeps is charged with what it holds still; to be woken, it is admitted with all that it will hold."""
        one = self.world.instances[asked.instance]
        worker = self.world.state("worker", one.worker)
        held = sum(other.bytes for other in map(self.world.instances.__getitem__, self.world.alive)
                   if other.worker == one.worker and other is not one)  # fmt: skip
        if worker.memory_bytes and held + max(asked.bytes, one.bytes) > worker.memory_bytes:
            self.violation(4, f"{one.instance} is to wake on {one.worker} with {asked.bytes} bytes beside {held}")

    def invariant_4_engines_never_hold_more_than_the_memory(self, engine: SimEngine) -> None:
        """Whatever the log says: what the host's engines really hold, awake and asleep, is within its bound."""
        host = engine.host
        held = sum(one.bytes for one in host.engines.values() if one.lives)
        held += sum(spare.bytes for spare, _ in host.spares.values())
        if host.memory_bytes and held > host.memory_bytes:
            self.violation(4, f"with {engine.instance} the engines of {host.name} hold {held} bytes")

    def invariant_5_views_are_a_fold(self) -> None:
        """Drop every view, rebuild: the same bytes as in the bucket."""
        views, world = Views(), World()
        for recorded in self.net.log.records:
            views.apply(recorded)
            world.apply(recorded)
        rebuilt = views.everything()
        stored = self.net.bucket.values()
        for key in sorted(rebuilt.keys() | stored.keys()):
            if rebuilt.get(key) != stored.get(key):
                self.violation(5, f"view {key} is {stored.get(key)!r}, rebuilt {rebuilt.get(key)!r}")
        if vars_of(world) != vars_of(self.world):
            self.violation(5, "the world folded at once differs from the one folded step by step")
        if problems := verify_chain(self.net.log.records):
            self.violation(5, f"the chain of digests is broken: {problems[0]}")

    def invariant_6_a_command_takes_effect_once(self, batch: tuple[Recorded, ...]) -> None:
        """All events of a command are written in one batch."""
        command = batch[0].envelope.command
        if command in self._commands:
            self.violation(6, f"command {command} took effect again: {[r.type for r in batch]}")
        self._commands[command] = self._batches

    def invariant_7_no_deposed_leader_overwrites(self, batch: tuple[Recorded, ...]) -> None:
        """On every subject the epoch of leaders' writes never goes back."""
        for recorded in batch:
            epoch = recorded.envelope.epoch
            if epoch and epoch < self._epochs.get(recorded.subject, 0):
                self.violation(7, f"epoch went back to {epoch} on {recorded.subject}")
            if epoch:
                self._epochs[recorded.subject] = epoch

    def invariant_7_every_switch_ends(self) -> None:
        """Once the faults stop, no saga hangs."""
        for id in sorted(self.world.running):
            switch = self.world.switches[id]
            self.violation(7, f"switch {id} ({switch.model} {switch.source} → {switch.target}) hangs in {switch.phase}")
        for name, model in self.world.models.items():
            if model.switch and self.world.state("switch", model.switch).phase in ENDED:
                self.violation(7, f"{name} is still held by {model.switch}, which has ended")

    def invariant_8_requests_only_fail_with_their_engine(self, gateway: SimPlane, flight: Flight, code: str) -> None:
        """A request fails only where a fault took every engine that it could go to, or the one under its stream."""
        self.net.trace("request failed", gateway.id, flight.model, code)
        if code == "stream_broken":
            if flight.hit is None or not flight.hit.faulted:
                self.violation(8, f"a stream of {flight.model} was cut at {gateway.id} without a fault")
            self.fleet.counts["excused"] += 1
            return
        view = gateway.manager.route(flight.model)
        engines = [self.fleet.engines.get(e.address) for s in (view.splits if view else ()) for e in s.endpoints]
        good = [e.instance for e in engines if e is not None and e.state == "up" and not e.faulted]
        wounded = any(model == flight.model for model, _ in self.wounded)
        if good or not wounded:
            self.violation(8, f"a request to {flight.model} failed at {gateway.id} ({code}); good engines: {good}")
        self.fleet.counts["excused"] += 1

    def invariant_8_everything_serves_again(self) -> None:
        """Once the faults have stopped, every gateway routes every active version to an engine that is up."""
        for what in self.unserved():
            self.violation(8, what)

    def unserved(self) -> list[str]:
        """Where a request would find nothing, although its model has an active version."""
        found: list[str] = []
        for gateway in self.fleet.gateways:
            for name, model in self.world.models.items():
                if not gateway.serving or not model.active:
                    continue
                view = gateway.manager.route(name)
                splits = [s for s in (view.splits if view else ()) if s.version == model.active and s.weight == 100]
                engines = [self.fleet.engines.get(e.address) for s in splits for e in s.endpoints]
                if not any(e is not None and e.state == "up" for e in engines):
                    found.append(f"{gateway.id} has no engine for {name} {model.active}: {view}")
        return found

    def invariant_9_only_proven_instances_are_routed(self, model: str, revision: int) -> None:
        """No route names what was never proven, or not since it slept."""
        for instance in self._names[model, revision] - self._proven:
            self.violation(9, f"revision {revision} of {model} names {instance}, which was never proven")
        for instance in self._names[model, revision] & self._slumbering:
            self.violation(9, f"revision {revision} of {model} names {instance}, which was asked to sleep")

    def invariant_9_a_wake_is_tried_once(self, engine: SimEngine) -> None:
        """One that failed, or whose worker died over it, has left an engine of which nothing is known."""
        if engine.wakes > 1:
            self.violation(9, f"{engine.instance} is woken again although its wake was tried before")

    def invariant_9_no_acknowledgement_of_what_was_not_done(self, gateway: str, model: str, revision: int) -> None:
        """Where the log says that a gateway applied a revision, it did."""
        for one in self.fleet.gateways:
            if one.id == gateway and one.manager.applied().get(model, 0) < revision:
                self.violation(9, f"the log says that {gateway} applied revision {revision} of {model}; it did not")

    def a_request_goes_where_the_rules_of_its_revision_say(
        self, gateway: SimPlane, model: str, facts: Facts, choice: Choice | NoRoute
    ) -> None:
        """On every applied revision the first rule that applies and can be followed decides; else the split."""
        view = gateway.manager.route(model)
        if view is None or not view.rules:
            return
        where = allowed(gateway.manager.route, model, facts)
        went = None if isinstance(choice, NoRoute) else (choice.model, choice.version)
        if (went is None) != (not where) or (went is not None and went not in where):
            self.broken.append(
                f"rules at {self.net.loop.time():.3f} s: {gateway.id} sent {facts} to {went} by revision "
                f"{view.revision} of {model}, whose rules allow {where}: {view.rules}"
            )
        self.fleet.counts["ruled"] += 1


def _use(gateway: SimPlane, instance: str) -> str:
    for flight in gateway.tracker.running():
        if flight.choice.instance == instance:
            return "has a request in flight on it"
    if gateway.stopped:
        return ""
    for model in gateway.manager.models():
        view = gateway.manager.route(model)
        if view is not None and any(e.instance == instance for s in view.splits for e in s.endpoints):
            return f"routes to it by revision {view.revision}"
    return ""


def vars_of(world: World) -> dict[str, object]:
    """What a world knows, to compare two of them."""
    return {name: value for name, value in vars(world).items() if name not in ("_last", "_states")}
