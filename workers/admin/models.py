"""Models and what stands under them: versions, policies, rules, route, health. Thin over the client.

What may change carries an ETag: the sequence of the model's newest event. Knows no HTTP server.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Controller, Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.params import JSONBody, PathParameter

from turnout.core import rules as core
from turnout.core.decider import Accepted, Rejected
from turnout.core.handling import UndoModel
from turnout.core.health import VersionHealth
from turnout.core.model import DeregisterVersion, RegisterVersion, SetPolicy, SetRules, SetServing
from turnout.events import subjects
from turnout.events.model import EngineSpec, Probe, Serving
from turnout.events.route import Rule
from turnout.projections.comparison import Comparison
from turnout.projections.registry import ModelView, VersionView
from turnout.projections.routing import RouteView
from turnout.workers.admin import problems
from turnout.workers.admin.asked import After, Commands, Control, Items, Limit, Told, etag, page
from turnout.workers.admin.door import name
from turnout.workers.answers import CommandRejected
from turnout.workers.client import HealthMonitor, ModelVersionManager
from turnout.workers.controller.health import HealthReport
from turnout.workers.ruling import Ruling

_READS = problems.spec(400, 401, 404, 408, 500, 503)
_CHANGES = problems.spec(400, 401, 404, 408, 409, 412, 413, 422, 500, 503)

_READS_OR_NOT_NOW = problems.spec(400, 401, 404, 408, 409, 500, 503)
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
    replicas: int | None = None


class Reason(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why, for the log."""

    reason: str = ""


class Undo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why, for the log. ``hold``: where there is no place for both versions, requests may wait.

    ``to``: the version that you want back; without, an undo is refused where the model has just gone back.
    """

    reason: str = ""
    hold: bool = False
    to: str = ""


class Policies(msgspec.Struct, frozen=True):
    """Name → policy as it was given."""

    policies: dict[str, dict[str, Any]]


class Rules(msgspec.Struct, frozen=True):
    """Rules in the order in which gateways ask them."""

    rules: tuple[Rule, ...]


class NewRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rules of a model from now on, in the order in which gateways ask them."""

    rules: tuple[NewRule, ...]


class NewServing(Serving, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """As ``Serving``; a key that there isn't is refused."""


class ServedLike(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is served from now on. ``version``: what it loads on demand where it serves none yet."""

    serving: NewServing
    version: str = ""


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request to ask the rules about.

    Attributes:
        request: its JSON body; the model is the path's.
        headers: of it.
        path: where it would be sent to.
        rules: to be asked instead of those that are set; every target of them counts as ready.
    """

    request: dict[str, Any]
    headers: dict[str, str] = {}
    path: str = "/v1/chat/completions"
    rules: tuple[NewRule, ...] | None = None


class Verdict(msgspec.Struct, frozen=True):
    """``rule``: the one that decides, None where the split does. ``goes_to``: in words. ``facts``: what rules saw."""

    rule: str | None
    goes_to: str
    rules: tuple[core.Told, ...]
    facts: core.Facts


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

    @get("/{model:str}/serving", summary="Read how it is served", responses=_READS)
    async def read_serving(self, client: Control, model: ModelName) -> Response[Serving]:
        """Always loaded, or on demand; what is left out is as the schema says."""
        view = await client.model(name(model))
        return Response(view.serving, headers=etag(view.sequence))

    @put("/{model:str}/serving", summary="Set how it is served", responses=_CHANGES)
    async def set_serving(self, desk: Commands, asked: Told, model: ModelName, data: JSONBody[ServedLike]) -> Accepted:
        """Load it only when a request asks for it, and unload it when nobody uses it any more; or keep it loaded."""
        return await desk.send(asked, "model.serving", SetServing(name(model), data.serving, data.version))

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
        answer = await desk.send(asked, "model.undo", UndoModel(name(model), data.reason, data.hold, data.to))
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

    @get("/{version:str}/health", summary="Read how it does", responses=_READS_OR_NOT_NOW)
    async def read_version_health(self, client: Control, model: ModelName, version: VersionName) -> VersionHealth:
        """Its status with reasons and numbers; 409 where it is neither loaded nor routed."""
        return await HealthMonitor(client).check_version_health(name(model), name(version))

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

    @post("/test", summary="Try its rules", status_code=200, responses=_CHANGES)
    async def test_rules(self, client: Control, model: ModelName, data: JSONBody[Trial]) -> Verdict:
        """Which rule decides about a request, and why. Nothing is sent."""
        view = await client.model(name(model))
        if data.rules is not None and (found := core.problems(data.rules)):
            hint = "correct them; docs/rules.md has every name and field"
            raise CommandRejected(Rejected("rules_invalid", "; ".join(found), hint))
        known = await client.views("route.*") if data.rules is None else {}
        made = Ruling(
            view.model,
            view.rules if data.rules is None else data.rules,
            data.path,
            {key.lower(): value for key, value in data.headers.items()},
            msgspec.json.encode({**data.request, "model": view.model}),
            {key: route for key, route in known.items() if isinstance(route, RouteView)},
        )
        return Verdict(made.decided.name if made.decided else None, made.goes, made.told, made.facts)
