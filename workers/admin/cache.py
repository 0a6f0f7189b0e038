"""What is loaded where, and what shall be: the cache, pins, preloads, replicas. Thin over the client.

Knows no HTTP server.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Controller, delete, get, post, put
from litestar.params import JSONBody, QueryParameter

from turnout.core.decider import Accepted
from turnout.core.handling import AskCache, EvictVersion, PlaceVersion, Placing, PreloadVersion
from turnout.core.holdings import Holdings
from turnout.core.residence import PinVersion, SetReplicas, UnpinVersion
from turnout.workers.admin import problems
from turnout.workers.admin.asked import After, Commands, Control, Items, Limit, Told, page
from turnout.workers.admin.door import name
from turnout.workers.admin.models import ModelName, Reason, VersionName
from turnout.workers.client import DynamicModelRegistry
from turnout.workers.loaded import Loaded
from turnout.workers.registry import BaseRegistry

_READS = problems.spec(400, 401, 404, 408, 500, 503)
_CHANGES = problems.spec(400, 401, 404, 408, 409, 412, 413, 422, 500, 503)


class Preload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``priority``: it makes room only at the cost of idle instances with a lower one; what has served has 0."""

    priority: int = 0


class Replicas(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many instances while the version serves."""

    replicas: int


class Cache(Controller):
    """``/v1/cache`` and ``/v1/loaded``."""

    path = "/v1"
    tags = ("cache",)

    @get("/cache", summary="Read the cache", responses=_READS)
    async def read_cache(self, client: Control) -> Holdings:
        """What each worker holds: phase, tier, bytes, idle since, pin, and why it stays or would go."""
        answer = await client.send("cache.show", AskCache())
        if not isinstance(answer, Holdings):
            raise TypeError(f"cache.show was answered with {type(answer).__name__}")
        return answer

    @get("/loaded", summary="List what is loaded", responses=_READS)
    async def list_loaded(
        self,
        client: Control,
        model: Annotated[str | None, QueryParameter(description="Only what belongs to this model.")] = None,
        after: After = None,
        limit: Limit = 100,
    ) -> Items[Loaded]:
        """As `turnout ps`: each instance with its size, requests and until when it is kept; then models at zero."""
        lines = await DynamicModelRegistry(BaseRegistry(), client).get_loaded()
        found = {f"{one.model} {one.version} {one.instance}": one for one in lines if model in (None, one.model)}
        return page(found, after, limit)


class Residence(Controller):
    """What of a version shall be loaded, under ``/v1/models/{model}/versions/{version}``."""

    path = "/v1/models/{model:str}/versions/{version:str}"
    tags = ("cache",)

    @put("/pin", summary="Pin a version", responses=_CHANGES)
    async def pin(
        self, desk: Commands, asked: Told, model: ModelName, version: VersionName, data: JSONBody[Reason]
    ) -> Accepted:
        """Keep its loaded instances, whatever the cache says. Does not load it."""
        return await desk.send(asked, "version.pin", PinVersion(name(model), name(version), data.reason))

    @delete("/pin", summary="Unpin a version", status_code=200, responses=_CHANGES)
    async def unpin(self, desk: Commands, asked: Told, model: ModelName, version: VersionName) -> Accepted:
        """Let the cache decide again. True already where it is not pinned."""
        return await desk.send(asked, "version.unpin", UnpinVersion(name(model), name(version)))

    @post("/preload", summary="Preload a version", status_code=202, responses=_CHANGES)
    async def preload(
        self, desk: Commands, asked: Told, model: ModelName, version: VersionName, data: JSONBody[Preload]
    ) -> Accepted:
        """Load it once there is room, so that a switch to it finds it warm. What it waits for: `/v1/cache`."""
        return await desk.send(asked, "version.preload", PreloadVersion(name(model), name(version), data.priority))

    @post("/evict", summary="Evict a version", status_code=202, responses=_CHANGES)
    async def evict(
        self, desk: Commands, asked: Told, model: ModelName, version: VersionName, data: JSONBody[Reason]
    ) -> Accepted:
        """Stop its idle instances now, and forget a wish to preload it."""
        return await desk.send(asked, "version.evict", EvictVersion(name(model), name(version), data.reason))

    @put("/replicas", summary="Set its replicas", responses=_CHANGES)
    async def set_replicas(
        self, desk: Commands, asked: Told, model: ModelName, version: VersionName, data: JSONBody[Replicas]
    ) -> Accepted:
        """Keep so many instances while it serves, spread over failure domains."""
        return await desk.send(asked, "version.replicas", SetReplicas(name(model), name(version), data.replicas))

    @get("/placing", summary="Ask where it fits", responses=problems.spec(400, 401, 404, 408, 409, 422, 500, 503))
    async def read_placing(self, client: Control, model: ModelName, version: VersionName) -> Placing:
        """What each worker can offer it now, at whose cost, or why not. Nothing is loaded."""
        answer = await client.send("version.place", PlaceVersion(name(model), name(version)))
        if not isinstance(answer, Placing):
            raise TypeError(f"version.place was answered with {type(answer).__name__}")
        return answer
