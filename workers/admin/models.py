"""Models and what stands under them: versions, policies, rules, route, health. Thin over the client.

What may change carries an ETag: the sequence of the model's newest event. Knows no HTTP server.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Controller, Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.params import JSONBody, PathParameter

from turnout.core.decider import Accepted
from turnout.core.handling import UndoModel
from turnout.core.model import DeregisterVersion, RegisterVersion, SetPolicy, SetRules
from turnout.events import subjects
from turnout.events.model import EngineSpec, Probe
from turnout.events.route import Rule
from turnout.projections.comparison import Comparison
from turnout.projections.registry import ModelView, VersionView
from turnout.projections.routing import RouteView
from turnout.workers.admin import problems
from turnout.workers.admin.asked import After, Commands, Control, Items, Limit, Told, etag, page
from turnout.workers.admin.door import name
from turnout.workers.client import HealthMonitor, ModelVersionManager
from turnout.workers.controller.health import HealthReport

_READS = problems.spec(400, 401, 404, 408, 500, 503)
_CHANGES = problems.spec(400, 401, 404, 408, 409, 412, 413, 422, 500, 503)

_COMPARES = problems.spec(400, 401, 404, 408, 422, 500, 503)

ModelName = Annotated[str, PathParameter(description="A served name; a slash in it is written %2F.")]
VersionName = Annotated[str, PathParameter(description="Name of one of its versions.")]
PolicyName = Annotated[str, PathParameter(description="Name of one of its policies.")]


class NewProbe(Probe, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """As ``Probe``; a key that there isn't is refused."""


class NewEngine(EngineSpec, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """As ``EngineSpec``; a key that there isn't is refused."""

    probe: NewProbe = NewProbe()


class NewRule(Rule, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """As ``Rule``; a key that there isn't is refused."""


class Registration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version to register: how it is run, and what is known of it. Fields as in the command."""

    engine: NewEngine
    note: str = ""
    tags: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    parent: str = ""
    trust_architecture: bool = False


class Reason(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why, for the log."""

    reason: str = ""


class Undo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why, for the log. ``hold``: where there is no place for both versions, requests may wait."""

    reason: str = ""
    hold: bool = False


class Policies(msgspec.Struct, frozen=True):
    """Name → policy as it was given."""

    policies: dict[str, dict[str, Any]]


class Rules(msgspec.Struct, frozen=True):
    """Rules in the order in which gateways ask them."""

    rules: tuple[Rule, ...]


class NewRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rules of a model from now on, in the order in which gateways ask them."""

    rules: tuple[NewRule, ...]


class Models(Controller):
    """``/v1/models``."""

    path = "/v1/models"
    tags = ("models",)

    @get("/", summary="List the models", responses=_READS)
    async def list_models(self, client: Control, after: After = None, limit: Limit = 100) -> Items[ModelView]:
        """All registered models, by name."""
        return page(await client.models(), after, limit)

    @get("/{model:str}", summary="Read a model", responses=_READS)
    async def read_model(self, client: Control, model: ModelName) -> Response[ModelView]:
        """Its versions, what it serves, what is known to be good, which switch runs, its policies and rules."""
        view = await client.model(name(model))
        return Response(view, headers=etag(view.sequence))

    @get("/{model:str}/health", summary="Read how its versions do", responses=_READS)
    async def read_health(self, client: Control, model: ModelName) -> HealthReport:
        """Status of each version that is loaded or routed, with reasons and numbers."""
        return await HealthMonitor(client).check_model_health(name(model))

    @get("/{model:str}/route", summary="Read its route", responses=_READS)
    async def read_route(self, client: Control, model: ModelName) -> Response[RouteView]:
        """What gateways apply: weights, endpoints, rules. Its ETag is the revision."""
        key = subjects.view_key("route", name(model))
        view = (await client.views(key)).get(key)
        if not isinstance(view, RouteView):
            await client.model(name(model))  # tells an unknown model from one that was never routed
            view = RouteView(name(model))
        return Response(view, headers=etag(view.revision))

    @post("/{model:str}/undo", summary="Go back to the last known good version", status_code=202, responses=_CHANGES)
    async def undo(
        self,
        desk: Commands,
        asked: Told,
        model: ModelName,
        data: JSONBody[Undo],
    ) -> Response[Accepted]:
        """Roll the running switch back, or start one to the version before. `ids` has the switch."""
        answer = await desk.send(asked, "model.undo", UndoModel(name(model), data.reason, data.hold))
        return Response(answer, headers={"location": f"/v1/switches/{answer.ids[0]}"} if answer.ids else {})


class Versions(Controller):
    """``/v1/models/{model}/versions``."""

    path = "/v1/models/{model:str}/versions"
    tags = ("versions",)

    @get("/", summary="List its versions", responses=_READS)
    async def list_versions(
        self, client: Control, model: ModelName, after: After = None, limit: Limit = 100
    ) -> Items[VersionView]:
        """All versions of the model, by name."""
        return page((await client.model(name(model))).versions, after, limit)

    @get("/{version:str}", summary="Read a version", responses=_READS)
    async def read_version(
        self,
        client: Control,
        versions: NamedDependency[ModelVersionManager],
        model: ModelName,
        version: VersionName,
    ) -> Response[VersionView]:
        """The version as it was registered. It never changes; its ETag is the model's, for deleting it."""
        view = await client.model(name(model))
        return Response(await versions.get_version(view.model, name(version)), headers=etag(view.sequence))

    @get("/{version:str}/compare/{other:str}", summary="Compare two versions", responses=_COMPARES)
    async def compare(
        self, versions: NamedDependency[ModelVersionManager], model: ModelName, version: VersionName, other: VersionName
    ) -> Comparison:
        """The two side by side: settings, files, load times, how they do."""
        return await versions.compare_versions(name(model), name(version), name(other))

    @put("/{version:str}", summary="Register a version", responses=_CHANGES)
    async def register(
        self,
        desk: Commands,
        asked: Told,
        model: ModelName,
        version: VersionName,
        data: JSONBody[Registration],
    ) -> Accepted:
        """Add an immutable version; the first one makes the model. True already where it is registered like this."""
        body = RegisterVersion(name(model), name(version), **msgspec.structs.asdict(data))
        return await desk.send(asked, "version.register", body)

    @delete("/{version:str}", summary="Deregister a version", status_code=200, responses=_CHANGES)
    async def deregister(self, desk: Commands, asked: Told, model: ModelName, version: VersionName) -> Accepted:
        """Take a version away that nothing uses. True already where there is none of this name."""
        return await desk.send(asked, "version.deregister", DeregisterVersion(name(model), name(version)))


class ModelPolicies(Controller):
    """``/v1/models/{model}/policies``."""

    path = "/v1/models/{model:str}/policies"
    tags = ("policies",)

    @get("/", summary="List its policies", responses=_READS)
    async def list_policies(self, client: Control, model: ModelName) -> Response[Policies]:
        """All named ways to switch the model."""
        view = await client.model(name(model))
        return Response(Policies(view.policies), headers=etag(view.sequence))

    @get("/{policy:str}", summary="Read a policy", responses=_READS)
    async def read_policy(self, client: Control, model: ModelName, policy: PolicyName) -> Response[dict[str, Any]]:
        """The policy as it was given."""
        view = await client.model(name(model))
        found = view.policies.get(name(policy))
        if found is None:
            known = ", ".join(sorted(view.policies)) or "none"
            reason = f"{view.model} has no policy {name(policy)!r} (set: {known})"
            raise problems.refusal(404, "policy_unknown", reason, "set it first with PUT")
        return Response(found, headers=etag(view.sequence))

    @put("/{policy:str}", summary="Set a policy", responses=_CHANGES)
    async def set_policy(
        self,
        desk: Commands,
        asked: Told,
        model: ModelName,
        policy: PolicyName,
        data: JSONBody[dict[str, Any]],
    ) -> Accepted:
        """Name a way to switch, in the words of docs/strategies.md. Running switches keep what they began with."""
        if not data:
            raise problems.refusal(422, "policy_invalid", "the policy is empty", "to take it away, send DELETE")
        return await desk.send(asked, "model.policy", SetPolicy(name(model), name(policy), data))

    @delete("/{policy:str}", summary="Remove a policy", status_code=200, responses=_CHANGES)
    async def remove_policy(self, desk: Commands, asked: Told, model: ModelName, policy: PolicyName) -> Accepted:
        """Take the name away. True already where there is none of this name."""
        return await desk.send(asked, "model.policy", SetPolicy(name(model), name(policy), {}))


class ModelRules(Controller):
    """``/v1/models/{model}/rules``."""

    path = "/v1/models/{model:str}/rules"
    tags = ("rules",)

    @get("/", summary="Read its rules", responses=_READS)
    async def read_rules(self, client: Control, model: ModelName) -> Response[Rules]:
        """The rules that choose a version by what a request is."""
        view = await client.model(name(model))
        return Response(Rules(view.rules), headers=etag(view.sequence))

    @put("/", summary="Set its rules", responses=_CHANGES)
    async def set_rules(
        self,
        desk: Commands,
        asked: Told,
        model: ModelName,
        data: JSONBody[NewRules],
    ) -> Accepted:
        """All rules of the model from now on; see docs/rules.md."""
        return await desk.send(asked, "model.rules", SetRules(name(model), data.rules))
