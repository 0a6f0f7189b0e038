"""The app of the management API: its resources, its schema, its page, behind its door. Knows no server and no NATS."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from litestar import Controller, Litestar, MediaType, Request, Response, get
from litestar.di import NamedDependency, Provide
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme
from litestar.params import HeaderParameter, QueryParameter
from litestar.response import ServerSentEvent, ServerSentEventMessage
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from turnout.events.store import Unavailable
from turnout.events.version import VERSION
from turnout.workers.admin import problems
from turnout.workers.admin.asked import Desk, asked
from turnout.workers.admin.cache import Cache, Residence
from turnout.workers.admin.door import Door
from turnout.workers.admin.fleet import Alerts, Gateways, Instances, Workers
from turnout.workers.admin.journal import Journal, Page
from turnout.workers.admin.models import ModelPolicies, ModelRules, Models, Versions
from turnout.workers.admin.schema import Bodies
from turnout.workers.admin.switches import Switches
from turnout.workers.client import DynamicModelRegistry, ModelVersionManager
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from turnout.workers.admin.settings import AdminSettings
    from turnout.workers.client import Client

_READS = problems.spec(400, 401, 404, 408, 500, 503)

Model = Annotated[str, QueryParameter(description="Only what concerns this model.")]
SwitchOf = Annotated[str, QueryParameter(description="Only what belongs to this switch.")]
AfterSequence = Annotated[int, QueryParameter(ge=0, le=2**53, description="Only events above this sequence.")]


class Log(Controller):
    """``/v1/log``."""

    path = "/v1/log"
    tags = ("log",)

    @get("/", summary="Read the log", responses=_READS)
    async def read_log(
        self,
        journal: NamedDependency[Journal],
        model: Model = "",
        switch: SwitchOf = "",
        after: AfterSequence = 0,
        limit: Annotated[int, QueryParameter(ge=1, le=1000, description="Events on one page.")] = 100,
    ) -> Page:
        """Events in their order, each with its plain sentence. A page may be empty and still have a `next`."""
        return await journal.page(after, limit, model, switch)

    @get("/stream", summary="Follow the log", media_type="text/event-stream", responses=_READS)
    async def follow_log(
        self,
        journal: NamedDependency[Journal],
        model: Model = "",
        switch: SwitchOf = "",
        after: AfterSequence = 0,
        last_event_id: Annotated[
            str | None,
            HeaderParameter(name="Last-Event-ID", pattern=r"^\d{1,15}$", description="Wins over `after`."),
        ] = None,
    ) -> ServerSentEvent:
        """Events as they come (SSE): `id` is the sequence, `event` the type, `data` the event as in a page."""
        since = after if last_event_id is None else int(last_event_id)
        return ServerSentEvent(_events(journal, since, model, switch))


async def _events(journal: Journal, after: int, model: str, switch: str) -> AsyncGenerator[ServerSentEventMessage]:
    try:
        async for line in journal.follow(after, model, switch):
            if line is None:
                yield ServerSentEventMessage(data=None, comment="nothing new")
            else:
                data = msgspec.json.encode(line).decode()
                yield ServerSentEventMessage(data=data, event=line.type, id=str(line.sequence))
    except Unavailable:  # the client comes again with Last-Event-ID
        yield ServerSentEventMessage(data=None, comment="the log can't be read now: connect again")


class Health(msgspec.Struct, frozen=True):
    """How this process is. ``connected``: to NATS; without it nothing but this can be answered."""

    status: str
    connected: bool
    version: str


class Own(Controller):
    """What the process tells of itself, without a token."""

    path = "/"
    tags = ("process",)

    @get("/healthz", summary="Ask how this process is", security=[{}], responses=problems.spec(500, 503))
    async def healthz(self, connected: NamedDependency[Callable[[], bool]]) -> Response[Health]:
        """200 where it can answer, 503 where it has no connection to NATS."""
        if connected():
            return Response(Health("ok", True, VERSION))
        return Response(Health("cut_off", False, VERSION), status_code=503, headers={"retry-after": "1"})

    @get("/metrics", include_in_schema=False, media_type=MediaType.TEXT)
    async def metrics(self, metrics: NamedDependency[CollectorRegistry]) -> str:
        """Prometheus metrics of this process."""
        return generate_latest(metrics).decode()

    @get("/openapi.json", include_in_schema=False, media_type=MediaType.JSON)
    async def schema(self, request: Request[Any, Any, Any], bodies: NamedDependency[Bodies]) -> dict[str, Any]:
        """The API's description, OpenAPI 3.1."""
        return bodies.describe(request.app)

    @get("/", include_in_schema=False, media_type=MediaType.HTML)
    async def page(self) -> Response[str]:
        """The page to try it: one file, nothing from a network."""
        text = resources.files("turnout.workers.admin").joinpath("page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return Response(text, headers={"content-security-policy": f"{policy}; frame-ancestors 'none'"})


class _Connected:
    def __init__(self, connected: NamedDependency[Callable[[], bool]]) -> None:
        self._connected = connected

    def collect(self) -> Iterator[Metric]:
        name, help = "turnout_admin_control_plane_connected", "1 while there is a connection to NATS."
        yield GaugeMetricFamily(name, help, value=float(self._connected()))


def build(client: Client, token: str, settings: AdminSettings, connected: Callable[[], bool]) -> Door:
    """The app behind its door.

    Args:
        client: of the control plane; all requests share it, so that each reads what another has changed.
        token: that every request must carry.
        settings: limits.
        connected: whether there is a connection to NATS.
    """
    bodies = Bodies()
    versions = ModelVersionManager(DynamicModelRegistry(BaseRegistry(), client), client)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Connected(connected))
    shared: dict[str, Any] = {
        "client": client,
        "desk": Desk(client),
        "journal": Journal(client),
        "bodies": bodies,
        "versions": versions,
        "connected": connected,
        "metrics": registry,
    }
    app = Litestar(
        [
            Models,
            Versions,
            ModelPolicies,
            ModelRules,
            Residence,
            Cache,
            Switches,
            Workers,
            Instances,
            Gateways,
            Alerts,
            Log,
            Own,
        ],
        dependencies={
            "asked": Provide(asked),
            **{key: Provide(_Give(one), sync_to_thread=False) for key, one in shared.items()},
        },
        exception_handlers={Exception: problems.answer},
        request_max_body_size=settings.max_body_bytes,
        openapi_config=OpenAPIConfig(
            title="turnout",
            version=VERSION,
            description="Switch the model behind a served name while requests are running: the management API.",
            use_handler_docstrings=True,
            security=[{"token": []}],
            components=Components(security_schemes={"token": SecurityScheme(type="http", scheme="bearer")}),
            render_plugins=(),
            path="/-",
        ),
        logging_config=None,
        plugins=[bodies],
    )
    return Door(app, token, settings, client.clock, registry)


class _Give:
    """A dependency that is there already."""

    def __init__(self, one: Any) -> None:
        self._one = one

    def __call__(self) -> Any:
        return self._one
