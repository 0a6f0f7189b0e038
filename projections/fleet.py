"""Views ``worker.<id>`` (with the instances it shall run) and ``gateway.<id>``. No decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turnout.events.gateway import GatewayJoined, GatewayLeft, GatewayLost, RouteApplied
from turnout.events.instance import (
    InstanceDraining,
    InstanceFailed,
    InstanceLoading,
    InstanceMeasured,
    InstanceProbed,
    InstanceProbeRequested,
    InstanceReady,
    InstanceRequested,
    InstanceSleepRequested,
    InstanceSlept,
    InstanceStopped,
    InstanceWakeRequested,
    InstanceWoken,
    TierFailed,
)
from turnout.events.model import (
    UNSEEN,
    EngineSpec,
    Inspection,
    VersionDeregistered,
    VersionRegistered,
    VersionRejected,
    VersionUnseen,
    VersionValidated,
)
from turnout.events.worker import KeptEngine, SpareReleased, WorkerJoined, WorkerKeeps, WorkerLeft, WorkerLost
from turnout.projections.fold import Fold

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


#: Views of gateways that are gone which are kept, the newest: each gateway process has an id of its own.
GONE_MOST = 100
#: Failed ways that are remembered of one version on one worker.
STRUCK_MOST = 16


class InstanceView(msgspec.Struct):
    """One instance that has not ended.

    Attributes:
        phase: requested, loading, ready, draining; sleeping or waking where its worker is asked for that; asleep.
        probe: cause of a golden probe that its worker is asked for and has not answered; empty for none.
        tier: how it was made ready the last time; empty before that.
        level: of the sleep that was asked for last; ``slept``: how often it was.
        served: name that its requests must carry upstream; empty for the model's own.
        inspection: what the version's files said when they were looked at; None where it has none.
        bytes: host memory as measured, until then as estimated; ``estimate``: what it was admitted with.
        into: the engine of its worker that it is expected to be put into, or to share; empty for a new one.
        base: the engine of its worker that it shares.
        struck: ways to make its version ready that have failed on this worker before: tier and source, as in the event
            ``TierFailed``, the newest last.
    """

    instance: str
    model: str
    version: str
    engine: EngineSpec
    phase: str = "requested"
    stage: str = ""
    detail: str = ""
    address: str = ""
    load_s: float = 0.0
    bytes: int = 0
    device: str = ""
    device_bytes: int = 0
    estimate: int = 0
    priority: int = 0
    cause: str = ""
    reason: str = ""
    forced_by: str = ""
    probe: str = ""
    tier: str = ""
    level: int = 0
    slept: int = 0
    served: str = ""
    inspection: Inspection | None = None
    into: str = ""
    base: str = ""
    struck: tuple[tuple[str, str], ...] = ()


class CheckView(msgspec.Struct, frozen=True):
    """A version whose files nobody has looked at yet. ``settings``: digest of ``engine``."""

    model: str
    version: str
    engine: EngineSpec
    settings: str
    trust_architecture: bool = False


class WorkerView(msgspec.Struct):
    """One worker and what it shall run: the worker makes the world agree with ``instances``.

    ``state``: live, lost or left. ``inspect``: ``model@version`` → files that it shall look at, if it can see them.
    Memory as in ``WorkerJoined``. ``kept``: engines that run there and are no instance's, those that it shall end among
    them (``released``).
    """

    worker: str
    host: str = ""
    engines: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    capacity: int = 0
    memory_bytes: int = 0
    device_bytes: dict[str, int] = {}
    domain: str = ""
    state: str = "live"
    instances: dict[str, InstanceView] = {}
    inspect: dict[str, CheckView] = {}
    kept: tuple[KeptEngine, ...] = ()
    released: tuple[str, ...] = ()

    def charged(self) -> tuple[KeptEngine, ...]:
        """Those of ``kept`` that take room beside the instances."""
        loading = {one.into for one in self.instances.values() if one.phase in ("requested", "loading")}
        return tuple(
            engine
            for engine in self.kept
            if engine.is_charged(
                self.instances[engine.instance].phase if engine.instance in self.instances else "",
                claimed=engine.name in loading,
            )
        )


class GatewayView(msgspec.Struct):
    """One gateway process. ``state``: live, lost or left; ``applied``: model → revision."""

    gateway: str
    address: str = ""
    state: str = "live"
    applied: dict[str, int] = {}


class Workers(Fold):
    """Fold of the worker and instance events, and of what is known of the versions' files."""

    kind = "worker"

    def __init__(self) -> None:
        super().__init__(
            {
                InstanceRequested: self._instance_requested,
                InstanceLoading: self._instance_loading,
                InstanceReady: self._instance_ready,
                InstanceMeasured: self._instance_measured,
                InstanceProbeRequested: self._probe_requested,
                InstanceProbed: self._probed,
                InstanceSleepRequested: self._sleep_requested,
                InstanceSlept: self._slept,
                InstanceWakeRequested: self._wake_requested,
                InstanceWoken: self._woken,
                InstanceDraining: self._instance_draining,
                InstanceStopped: self._instance_ended,
                InstanceFailed: self._instance_ended,
                TierFailed: self._tier_failed,
                WorkerJoined: self._worker_joined,
                WorkerLost: self._worker_lost,
                WorkerLeft: self._worker_left,
                WorkerKeeps: self._worker_keeps,
                SpareReleased: self._spare_released,
                VersionRegistered: self._version_registered,
                VersionValidated: self._version_validated,
                VersionRejected: self._version_rejected,
                VersionUnseen: self._version_unseen,
                VersionDeregistered: self._version_deregistered,
            }
        )
        self.workers: dict[str, WorkerView] = {}
        self._home: dict[str, str] = {}
        self._checks: dict[str, CheckView] = {}
        #: Rejected for want of somebody who sees the files: a worker that joins looks again.
        self._unseen: dict[str, CheckView] = {}
        self._inspections: dict[str, Inspection] = {}
        #: ``model@version`` → worker → as in ``InstanceView.struck``.
        self._struck: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {}

    def view(self, id: str) -> WorkerView | None:
        """The view of one worker."""
        return self.workers.get(id)

    def _instance_requested(self, event: InstanceRequested, recorded: Recorded) -> None:
        self._home[event.instance] = event.worker
        self._worker(event.worker).instances[event.instance] = InstanceView(
            event.instance,
            event.model,
            event.version,
            event.engine,
            inspection=self._inspections.get(_name(event.model, event.version)),
            estimate=event.bytes,
            bytes=event.bytes,
            device=event.device,
            device_bytes=event.device_bytes,
            priority=event.priority,
            cause=event.cause,
            struck=self._struck.get(_name(event.model, event.version), {}).get(event.worker, ()),
            into=event.into,
        )

    def _instance_loading(self, event: InstanceLoading, recorded: Recorded) -> None:
        view = self._instance(event.instance)
        view.phase = "loading"
        view.stage = event.stage
        view.detail = event.detail

    def _instance_ready(self, event: InstanceReady, recorded: Recorded) -> None:
        view = self._instance(event.instance)
        view.phase = "ready"
        view.stage = view.detail = ""
        view.address = event.address
        view.load_s = event.load_s
        view.bytes = event.bytes or view.bytes
        view.device_bytes = event.device_bytes or (0 if event.base else view.device_bytes)
        view.tier = event.tier
        view.served = event.served
        view.base = event.base

    def _instance_measured(self, event: InstanceMeasured, recorded: Recorded) -> None:
        view = self._instance(event.instance)
        view.bytes = event.bytes
        view.device_bytes = event.device_bytes

    def _sleep_requested(self, event: InstanceSleepRequested, recorded: Recorded) -> None:
        view = self._instance(event.instance)
        view.phase = "sleeping"
        view.level = event.level
        view.slept += 1
        view.reason = event.reason

    def _slept(self, event: InstanceSlept, recorded: Recorded) -> None:
        view = self._instance(event.instance)
        view.phase = "asleep"
        view.bytes = event.bytes
        view.device_bytes = event.device_bytes

    def _wake_requested(self, event: InstanceWakeRequested, recorded: Recorded) -> None:
        view = self._instance(event.instance)
        view.phase = "waking"
        view.bytes = max(event.bytes, view.bytes)
        view.device_bytes = max(event.device_bytes, view.device_bytes)

    def _woken(self, event: InstanceWoken, recorded: Recorded) -> None:
        view = self._instance(event.instance)
        view.phase = "ready"
        view.reason = ""
        view.tier = "wake"
        view.address = event.address or view.address
        view.bytes = event.bytes
        view.device_bytes = event.device_bytes

    def _probe_requested(self, event: InstanceProbeRequested, recorded: Recorded) -> None:
        self._instance(event.instance).probe = event.cause

    def _probed(self, event: InstanceProbed, recorded: Recorded) -> None:
        view = self._instance(event.instance)
        if view.probe == event.cause:
            view.probe = ""

    def _instance_draining(self, event: InstanceDraining, recorded: Recorded) -> None:
        view = self._instance(event.instance)
        view.phase = "draining"
        view.reason = event.reason
        view.forced_by = event.forced_by

    def _tier_failed(self, event: TierFailed, recorded: Recorded) -> None:
        view, worker = self._instance(event.instance), self._home.get(event.instance, "")
        failed = (event.tier, event.source)
        if failed not in view.struck:
            view.struck = (*view.struck, failed)[-STRUCK_MOST:]
            self._struck.setdefault(_name(view.model, view.version), {})[worker] = view.struck

    def _instance_ended(self, event: InstanceStopped | InstanceFailed, recorded: Recorded) -> None:
        self._worker(self._home.pop(event.instance, "")).instances.pop(event.instance, None)

    def _worker_joined(self, event: WorkerJoined, recorded: Recorded) -> None:
        home = self._worker(event.worker)
        home.host = event.host
        home.engines = event.engines
        home.devices = event.devices
        home.capacity = event.capacity
        home.memory_bytes = event.memory_bytes
        home.device_bytes = event.device_bytes
        home.domain = event.domain
        home.kept = event.kept
        home.released = ()
        home.state = "live"
        checks = {**self._checks, **self._unseen}
        home.inspect = {name: check for name, check in checks.items() if check.engine.kind in home.engines}

    def _worker_lost(self, event: WorkerLost, recorded: Recorded) -> None:
        self._worker(event.worker).state = "lost"

    def _worker_left(self, event: WorkerLeft, recorded: Recorded) -> None:
        self._worker(event.worker).state = "left"

    def _worker_keeps(self, event: WorkerKeeps, recorded: Recorded) -> None:
        home = self._worker(event.worker)
        home.kept = event.kept
        names = {engine.name for engine in event.kept}
        home.released = tuple(name for name in home.released if name in names)

    def _spare_released(self, event: SpareReleased, recorded: Recorded) -> None:
        home = self._worker(event.worker)
        home.released = (*home.released, event.name)

    def _version_registered(self, event: VersionRegistered, recorded: Recorded) -> None:
        engine = event.engine
        if not engine.path and not engine.adapter:
            return
        name = _name(event.model, event.version)
        self._inspections.pop(name, None)
        self._unseen.pop(name, None)
        check = CheckView(event.model, event.version, engine, event.digest, event.trust_architecture)
        self._checks[name] = check
        for id, home in self.workers.items():
            if engine.kind in home.engines:
                home.inspect[name] = check
                self.changed.add(id)

    def _version_validated(self, event: VersionValidated, recorded: Recorded) -> None:
        self._inspections[_name(event.model, event.version)] = event.inspection
        self._checked(event.model, event.version)

    def _version_rejected(self, event: VersionRejected, recorded: Recorded) -> None:
        check = self._checks.get(_name(event.model, event.version))
        self._checked(event.model, event.version)
        if check is not None and event.code in UNSEEN:
            self._unseen[_name(event.model, event.version)] = check

    def _version_unseen(self, event: VersionUnseen, recorded: Recorded) -> None:
        self._worker(event.worker).inspect.pop(_name(event.model, event.version), None)

    def _version_deregistered(self, event: VersionDeregistered, recorded: Recorded) -> None:
        self._struck.pop(_name(event.model, event.version), None)
        self._inspections.pop(_name(event.model, event.version), None)
        self._checked(event.model, event.version)

    def _checked(self, model: str, version: str) -> None:
        """Nobody need look any more."""
        name = _name(model, version)
        known = (self._checks.pop(name, None), self._unseen.pop(name, None))
        if known == (None, None):
            return
        for id, home in self.workers.items():
            if home.inspect.pop(name, None) is not None:
                self.changed.add(id)

    def _worker(self, worker: str) -> WorkerView:
        self.changed.add(worker)
        view = self.workers.get(worker)
        if view is None:
            view = self.workers[worker] = WorkerView(worker)
        return view

    def _instance(self, instance: str) -> InstanceView:
        worker = self._worker(self._home.get(instance, ""))
        if instance not in worker.instances:  # an order that no log has; still no error
            worker.instances[instance] = InstanceView(instance, "", "", EngineSpec("unknown"))
        return worker.instances[instance]


def _name(model: str, version: str) -> str:
    return f"{model}@{version}"  # no name holds an @


class Gateways(Fold):
    """Fold of the gateway events.

    Attributes:
        gateways: id → view, those that are live and the newest that are gone.
    """

    kind = "gateway"

    def __init__(self) -> None:
        super().__init__(
            {
                RouteApplied: self._route_applied,
                GatewayJoined: self._gateway_joined,
                GatewayLost: self._gateway_lost,
                GatewayLeft: self._gateway_left,
            }
        )
        self.gateways: dict[str, GatewayView] = {}
        #: Those that are gone, in the order in which they went.
        self._gone: dict[str, None] = {}

    def view(self, id: str) -> GatewayView | None:
        """The view of one gateway."""
        return self.gateways.get(id)

    def _route_applied(self, event: RouteApplied, recorded: Recorded) -> None:
        # spelled out, not by _gateway: a third of all events in a log are of this type
        gateway = event.gateway
        view = self.gateways.get(gateway)
        if view is None:  # a late report of one that is forgotten: as long as it does not join, it is gone
            return
        self.changed.add(gateway)
        applied = view.applied
        if event.revision > applied.get(event.model, 0):
            applied[event.model] = event.revision

    def _gateway_joined(self, event: GatewayJoined, recorded: Recorded) -> None:
        view = self.gateways.get(event.gateway)
        if view is None:
            view = self.gateways[event.gateway] = GatewayView(event.gateway)
        view.address = event.address
        view.state = "live"
        self._gone.pop(event.gateway, None)
        self.changed.add(event.gateway)

    def _gateway_lost(self, event: GatewayLost, recorded: Recorded) -> None:
        self._go(event.gateway, "lost")

    def _gateway_left(self, event: GatewayLeft, recorded: Recorded) -> None:
        self._go(event.gateway, "left")

    def _go(self, gateway: str, state: str) -> None:
        """It is gone; the one that went longest ago is forgotten. A lost one that comes back joins anew."""
        view = self.gateways.get(gateway)
        if view is None:
            return
        view.state = state
        self.changed.add(gateway)
        self._gone.pop(gateway, None)
        self._gone[gateway] = None
        if len(self._gone) > GONE_MOST:
            oldest = next(iter(self._gone))
            del self._gone[oldest], self.gateways[oldest]
            self.changed.add(oldest)
