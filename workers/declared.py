"""Brings what turnout.toml declares into the log: versions, policies, and which version a model serves at first.

The log decides afterwards: a version that was switched since is not switched back by a restart. Knows the controller's
commands and its fold, no transport.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import structlog

from turnout.core.decider import Accepted, Failed, Rejected
from turnout.core.handling import StartSwitch, Told
from turnout.core.model import DeregisterVersion, RegisterVersion, SetPolicy, SetServing
from turnout.events.model import Serving
from turnout.workers.ports import Request

if TYPE_CHECKING:
    from turnout.workers.clock import Clock
    from turnout.workers.controller.controller import Controller
    from turnout.workers.settings import Settings

log = structlog.get_logger()

ACTOR = "config"
#: Refusals that another worker, or the end of something, may overcome.
_LATER = ("no_capacity", "no_memory")
#: Between two tries of what failed for want of a worker or of the store, seconds.
_RETRY_S = 0.5


class Declared:
    """Does it once for each start of a controller that leads."""

    def __init__(self, controller: Controller, settings: Settings, clock: Clock) -> None:
        self._controller = controller
        self._settings = settings
        self._clock = clock
        self._moved = asyncio.Event()
        controller.log.watch(self._moved.set)

    async def run(self) -> None:
        """Register and switch; returns when there is nothing more to do."""
        await self._controller.leading.wait()
        engines = self._settings.engines()
        for (model, version), engine in engines.items():
            one = self._settings.models[model].versions[version]
            known = self._controller.log.world.state("model", model).versions
            about = (one.note, one.tags, one.metrics, one.parent, one.trust_architecture)
            replicas = None if version in known else one.replicas  # later an operator's word holds
            body = RegisterVersion(model, version, engine, *about, replicas)
            await self._ask("version.register", body)
        for model, declared in self._settings.models.items():
            for name, policy in declared.policies.items():
                await self._ask("model.policy", SetPolicy(model, name, policy))
        if not self._settings.switching.enable_dynamic_registry:
            for model, state in sorted(self._controller.log.world.models.items()):
                for version in state.versions:
                    if (model, version) not in engines:
                        await self._ask("version.deregister", DeregisterVersion(model, version))
        for model, declared in self._settings.models.items():
            serving = declared.serving
            known = self._controller.log.world.state("model", model).serving
            if isinstance(serving, Serving) and serving.on_demand and serving != known:
                await self._ask("model.serving", SetServing(model, serving, declared.first))
        await asyncio.gather(*(self._serve(model, one.first) for model, one in self._settings.models.items()))

    async def _serve(self, model: str, version: str) -> None:
        """Switch to the declared version where the model serves none."""
        while True:
            state = self._controller.log.world.models.get(model)
            if state is None or state.active or state.switch:
                if state is not None and state.active and state.active != version:
                    log.info("declared_version_not_active", model=model, declared=version, active=state.active)
                return
            answer = await self._ask("switch.start", StartSwitch(model, version, reason="declared in turnout.toml"))
            if not isinstance(answer, Rejected) or answer.code not in _LATER:
                return
            await self._wait()  # for a worker

    async def _ask(self, verb: str, body: msgspec.Struct) -> Accepted | Rejected | Told:
        request = Request(self._clock.id("c-"), ACTOR, msgspec.Raw(msgspec.json.encode(body)))
        while True:
            answer = await self._controller.commands.handle("ops", verb, request)
            if isinstance(answer, Failed):
                log.warning("declared_waits", verb=verb, reason=answer.reason)
                await self._wait()
                continue
            if isinstance(answer, Rejected) and answer.code not in _LATER:
                log.error("declared_refused", verb=verb, code=answer.code, reason=answer.reason, hint=answer.hint)
            return answer

    async def _wait(self) -> None:
        self._moved.clear()
        try:
            async with asyncio.timeout(_RETRY_S):
                await self._moved.wait()
        except TimeoutError:
            pass
