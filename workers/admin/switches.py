"""Switches: asked for, planned, watched, led, ended. Thin over the client. Knows no HTTP server."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Controller, Response, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter

from turnout.core.decider import Accepted
from turnout.core.handling import AdvanceSwitch, ContinueSwitch, HoldSwitch, Plan, RetrySwitch, StartSwitch, StopSwitch
from turnout.core.switch import ENDED
from turnout.projections.switches import SwitchView
from turnout.workers.admin import problems
from turnout.workers.admin.asked import After, Commands, Control, Items, Limit, Told, page
from turnout.workers.admin.door import name
from turnout.workers.admin.models import Reason
from turnout.workers.client import HealthMonitor, ModelSwitcher
from turnout.workers.controller.health import EvidenceReport
from turnout.workers.story import Report

_READS = problems.spec(400, 401, 404, 408, 500, 503)
_CHANGES = problems.spec(400, 401, 404, 408, 409, 412, 413, 422, 500, 503)

SwitchId = Annotated[str, PathParameter(description="Id of a switch, e.g. sw-b9b292c850.")]


class Promotion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which step is let past: the one that was seen. ``full``: past all further steps, too; needs a reason."""

    step: int
    full: bool = False
    reason: str = ""


class Pause(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``seconds``: goes on by itself after them; without, until it is resumed."""

    reason: str = ""
    seconds: float | None = None


class Switches(Controller):
    """``/v1/switches``."""

    path = "/v1/switches"
    tags = ("switches",)

    @get("/", summary="List the switches", responses=_READS)
    async def list_switches(
        self,
        client: Control,
        model: Annotated[str | None, QueryParameter(description="Only those of this model.")] = None,
        running: Annotated[bool | None, QueryParameter(description="Only those that run (true) or have ended.")] = None,
        after: After = None,
        limit: Limit = 100,
    ) -> Items[SwitchView]:
        """Switches by id: all that run, and of each model the newest 100 that have ended."""
        views = (await client.views("switch.*")).values()
        found = {
            view.switch: view
            for view in views
            if model in (None, view.model) and running in (None, view.phase not in ENDED)
        }
        return page(found, after, limit)

    @post("/", summary="Start a switch", status_code=202, responses=_CHANGES)
    async def start(self, desk: Commands, asked: Told, data: JSONBody[StartSwitch]) -> Response[Accepted]:
        """Send a model's traffic to a version. Answers when it is in the log; `ids` and Location name the switch."""
        return _accepted(await desk.send(asked, "switch.start", data))

    @post("/plan", summary="Plan a switch", status_code=200, responses=_CHANGES)
    async def plan(self, client: Control, data: JSONBody[StartSwitch]) -> Plan:
        """What it would do, without doing it: tier, seconds, steps."""
        answer = await client.send("switch.plan", data)
        if not isinstance(answer, Plan):
            raise TypeError(f"switch.plan was answered with {type(answer).__name__}")
        return answer

    @get("/{switch:str}", summary="Read a switch", responses=_READS)
    async def read_switch(self, client: Control, switch: SwitchId) -> SwitchView:
        """How far it is, or how it ended."""
        return await client.switch(name(switch))

    @get("/{switch:str}/evidence", summary="Read its evidence", responses=_READS)
    async def read_evidence(self, client: Control, switch: SwitchId) -> EvidenceReport:
        """What the judge sees of it now, and what clients noticed of it."""
        return await HealthMonitor(client).check_evidence(name(switch))

    @get("/{switch:str}/report", summary="Read its report", responses=_READS)
    async def read_report(self, client: Control, switch: SwitchId) -> Report:
        """Its story from the log: each step, each verdict, who did what, how it ended; and what clients noticed."""
        return await ModelSwitcher(client).get_switch_report(name(switch))

    @post("/{switch:str}/promote", summary="Promote a switch", status_code=202, responses=_CHANGES)
    async def promote(
        self,
        desk: Commands,
        asked: Told,
        switch: SwitchId,
        data: JSONBody[Promotion],
    ) -> Response[Accepted]:
        """Let it past the step that you have seen. Given twice it counts once; a step that it has left is refused."""
        body = AdvanceSwitch(name(switch), data.step, data.full, data.reason)
        return _accepted(await desk.send(asked, "switch.promote", body))

    @post("/{switch:str}/pause", summary="Pause a switch", status_code=202, responses=_CHANGES)
    async def pause(
        self,
        desk: Commands,
        asked: Told,
        switch: SwitchId,
        data: JSONBody[Pause],
    ) -> Response[Accepted]:
        """Let it stand still at its next step's door."""
        return _accepted(await desk.send(asked, "switch.pause", HoldSwitch(name(switch), data.reason, data.seconds)))

    @post("/{switch:str}/resume", summary="Resume a switch", status_code=202, responses=_CHANGES)
    async def resume(
        self,
        desk: Commands,
        asked: Told,
        switch: SwitchId,
        data: JSONBody[Reason],
    ) -> Response[Accepted]:
        """Let a paused one go on."""
        return _accepted(await desk.send(asked, "switch.resume", ContinueSwitch(name(switch), data.reason)))

    @post("/{switch:str}/abort", summary="Abort a switch", status_code=202, responses=_CHANGES)
    async def abort(
        self,
        desk: Commands,
        asked: Told,
        switch: SwitchId,
        data: JSONBody[Reason],
    ) -> Response[Accepted]:
        """End it; what has moved goes back to the source."""
        return _accepted(await desk.send(asked, "switch.abort", StopSwitch(name(switch), data.reason)))

    @post("/{switch:str}/retry", summary="Retry a switch", status_code=202, responses=_CHANGES)
    async def retry(
        self,
        desk: Commands,
        asked: Told,
        switch: SwitchId,
        data: JSONBody[Reason],
    ) -> Response[Accepted]:
        """A new switch to the same version in the same way, with fresh evidence; `ids` and Location name it."""
        return _accepted(await desk.send(asked, "switch.retry", RetrySwitch(name(switch), data.reason)))


def _accepted(answer: Accepted) -> Response[Accepted]:
    return Response(answer, headers={"location": f"/v1/switches/{answer.ids[0]}"} if answer.ids else {})
