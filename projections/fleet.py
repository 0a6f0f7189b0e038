"""Views ``worker.<id>`` (with the instances it shall run) and ``gateway.<id>``. No decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turnout.events.gateway import GatewayJoined, GatewayLeft, GatewayLost, RouteApplied
from turnout.events.instance import (
    InstanceDraining,
    InstanceFailed,
    InstanceLoading,
    InstanceReady,
    InstanceRequested,
    InstanceStopped,
)
from turnout.events.model import EngineSpec
from turnout.events.worker import WorkerJoined, WorkerLeft, WorkerLost

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


class InstanceView(msgspec.Struct):
    """One instance that has not ended. ``phase``: requested, loading, ready or draining."""

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
    reason: str = ""
    forced_by: str = ""


class WorkerView(msgspec.Struct):
    """One worker and what it shall run: the worker makes the world agree with ``instances``.

    ``state``: live, lost or left.
    """

    worker: str
    host: str = ""
    engines: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    capacity: int = 0
    state: str = "live"
    instances: dict[str, InstanceView] = {}


class GatewayView(msgspec.Struct):
    """One gateway process. ``state``: live, lost or left; ``applied``: model → revision."""

    gateway: str
    address: str = ""
    state: str = "live"
    applied: dict[str, int] = {}


class Workers:
    """Fold of the worker and instance events."""

    kind = "worker"

    def __init__(self) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.changed: set[str] = set()
        self._home: dict[str, str] = {}

    def apply(self, recorded: Recorded) -> None:
        """Take one event; others than its own are skipped."""
        match recorded.event:
            case InstanceRequested(instance, model, version, worker, engine):
                self._home[instance] = worker
                self._worker(worker).instances[instance] = InstanceView(instance, model, version, engine)
            case InstanceLoading(instance, stage, _, detail):
                view = self._instance(instance)
                view.phase, view.stage, view.detail = "loading", stage, detail
            case InstanceReady(instance, address, load_s, _, size):
                view = self._instance(instance)
                view.phase, view.stage, view.detail = "ready", "", ""
                view.address, view.load_s, view.bytes = address, load_s, size
            case InstanceDraining(instance, reason, forced_by):
                view = self._instance(instance)
                view.phase, view.reason, view.forced_by = "draining", reason, forced_by
            case InstanceStopped(instance) | InstanceFailed(instance):
                worker = self._home.pop(instance, "")
                self._worker(worker).instances.pop(instance, None)
                self.changed.add(worker)
            case WorkerJoined(worker, host, engines, devices, capacity):
                home = self._worker(worker)
                home.host, home.engines, home.devices, home.capacity = host, engines, devices, capacity
                home.state = "live"
            case WorkerLost(worker):
                self._worker(worker).state = "lost"
            case WorkerLeft(worker):
                self._worker(worker).state = "left"
            case _:
                return

    def view(self, id: str) -> WorkerView | None:
        """The view of one worker."""
        return self.workers.get(id)

    def _worker(self, worker: str) -> WorkerView:
        self.changed.add(worker)
        return self.workers.setdefault(worker, WorkerView(worker))

    def _instance(self, instance: str) -> InstanceView:
        worker = self._worker(self._home.get(instance, ""))
        if instance not in worker.instances:  # an order that no log has; still no error
            worker.instances[instance] = InstanceView(instance, "", "", EngineSpec("unknown"))
        return worker.instances[instance]


class Gateways:
    """Fold of the gateway events."""

    kind = "gateway"

    def __init__(self) -> None:
        self.gateways: dict[str, GatewayView] = {}
        self.changed: set[str] = set()

    def apply(self, recorded: Recorded) -> None:
        """Take one event; others than its own are skipped."""
        event = recorded.event
        match event:
            case RouteApplied(gateway, model, revision):
                applied = self._gateway(gateway).applied
                applied[model] = max(revision, applied.get(model, 0))
            case GatewayJoined(gateway, address):
                view = self._gateway(gateway)
                view.address, view.state = address, "live"
            case GatewayLost(gateway):
                self._gateway(gateway).state = "lost"
            case GatewayLeft(gateway):
                self._gateway(gateway).state = "left"
            case _:
                return

    def view(self, id: str) -> GatewayView | None:
        """The view of one gateway."""
        return self.gateways.get(id)

    def _gateway(self, gateway: str) -> GatewayView:
        self.changed.add(gateway)
        return self.gateways.setdefault(gateway, GatewayView(gateway))
