"""Workers, instances, gateways and alerts. Thin over the client's commands and views. Knows no HTTP server."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Controller, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter

from turnout.core.alert import AcknowledgeAlert
from turnout.core.decider import Accepted
from turnout.core.handling import StopInstance
from turnout.events import subjects
from turnout.projections.alerts import AlertView
from turnout.projections.fleet import GatewayView, InstanceView, WorkerView
from turnout.workers.admin import problems
from turnout.workers.admin.asked import After, Commands, Control, Items, Limit, Told, page
from turnout.workers.admin.door import name
from turnout.workers.client import Client

_READS = problems.spec(400, 401, 404, 408, 500, 503)
_CHANGES = problems.spec(400, 401, 404, 408, 409, 412, 413, 422, 500, 503)

Id = Annotated[str, PathParameter(description="Its id.")]


class Placed(msgspec.Struct, frozen=True):
    """One instance, and the worker that runs it."""

    worker: str
    instance: InstanceView


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What you found or do, for the log."""

    note: str = ""


class Stop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``force``: also where gateways may have requests on it, and without the worker's proof of quiet."""

    force: bool = False
    reason: str = ""


class Workers(Controller):
    """``/v1/workers``."""

    path = "/v1/workers"
    tags = ("fleet",)

    @get("/", summary="List the workers", responses=_READS)
    async def list_workers(self, client: Control, after: After = None, limit: Limit = 100) -> Items[WorkerView]:
        """All workers by id, with the instances that each shall run."""
        return page(await _by_id(client, "worker"), after, limit)

    @get("/{worker:str}", summary="Read a worker", responses=_READS)
    async def read_worker(self, client: Control, worker: Id) -> WorkerView:
        """Its devices, engines and instances."""
        view: WorkerView = await _one(client, "worker", name(worker))
        return view


class Instances(Controller):
    """``/v1/instances``."""

    path = "/v1/instances"
    tags = ("fleet",)

    @get("/", summary="List the instances", responses=_READS)
    async def list_instances(
        self,
        client: Control,
        model: Annotated[str | None, QueryParameter(description="Only those of this model.")] = None,
        after: After = None,
        limit: Limit = 100,
    ) -> Items[Placed]:
        """All instances that have not ended, by id."""
        found = await _placed(client)
        return page({id: one for id, one in found.items() if model in (None, one.instance.model)}, after, limit)

    @get("/{instance:str}", summary="Read an instance", responses=_READS)
    async def read_instance(self, client: Control, instance: Id) -> Placed:
        """How far it is. One that has ended is in the log only."""
        found = (await _placed(client)).get(name(instance))
        if found is None:
            raise _unknown("instance", name(instance))
        return found

    @post("/{instance:str}/stop", summary="Stop an instance", status_code=202, responses=_CHANGES)
    async def stop(self, desk: Commands, asked: Told, instance: Id, data: JSONBody[Stop]) -> Accepted:
        """Ask its worker to stop it, whatever wants it warm. `force` needs a reason: requests on it may be cut."""
        return await desk.send(asked, "instance.stop", StopInstance(name(instance), data.force, data.reason))


class Gateways(Controller):
    """``/v1/gateways``."""

    path = "/v1/gateways"
    tags = ("fleet",)

    @get("/", summary="List the gateways", responses=_READS)
    async def list_gateways(self, client: Control, after: After = None, limit: Limit = 100) -> Items[GatewayView]:
        """All gateways by id, with the revisions that each has applied."""
        return page(await _by_id(client, "gateway"), after, limit)

    @get("/{gateway:str}", summary="Read a gateway", responses=_READS)
    async def read_gateway(self, client: Control, gateway: Id) -> GatewayView:
        """Its address, state and revisions."""
        view: GatewayView = await _one(client, "gateway", name(gateway))
        return view


class Alerts(Controller):
    """``/v1/alerts``."""

    path = "/v1/alerts"
    tags = ("alerts",)

    @get("/", summary="List the alerts", responses=_READS)
    async def list_alerts(
        self,
        client: Control,
        resolved: Annotated[bool, QueryParameter(description="The newest that are over, too.")] = False,
        after: After = None,
        limit: Limit = 100,
    ) -> Items[AlertView]:
        """What needs a person, by key."""
        found = await _by_id(client, "alert")
        return page({id: one for id, one in found.items() if resolved or one.state != "resolved"}, after, limit)

    @get("/{alert:str}", summary="Read an alert", responses=_READS)
    async def read_alert(self, client: Control, alert: Id) -> AlertView:
        """What it is, and what to do."""
        view: AlertView = await _one(client, "alert", name(alert))
        return view

    @post("/{alert:str}/acknowledge", summary="Acknowledge an alert", status_code=200, responses=_CHANGES)
    async def acknowledge(self, desk: Commands, asked: Told, alert: Id, data: JSONBody[Note]) -> Accepted:
        """Say that you have seen it."""
        return await desk.send(asked, "alert.acknowledge", AcknowledgeAlert(name(alert), data.note))


async def _by_id(client: Client, kind: str) -> dict[str, Any]:
    found = await client.views(f"{kind}.*")
    return {subjects.parse_view_key(key)[1]: view for key, view in found.items()}


async def _one(client: Client, kind: str, id: str) -> Any:
    key = subjects.view_key(kind, id)
    view = (await client.views(key)).get(key)
    if view is None:
        raise _unknown(kind, id)
    return view


async def _placed(client: Client) -> dict[str, Placed]:
    workers = await _by_id(client, "worker")
    return {id: Placed(worker, one) for worker, view in workers.items() for id, one in view.instances.items()}


def _unknown(kind: str, id: str) -> Exception:
    return problems.refusal(404, f"{kind}_unknown", f"there is no {kind} {id!r}", f"list them: GET /v1/{kind}s")
