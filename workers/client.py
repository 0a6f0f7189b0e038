"""The typed Python client: commands out, views in. Keeps no truth of its own; the CLI is built on it.

A command is sent until it is answered, always with the same id, so it takes effect once. A refusal is raised as
:class:`CommandRejected` with the answer's code, reason and hint; where nobody answers in time it is ``Unavailable``.
Knows the ports, no transport.
"""

from __future__ import annotations

import asyncio
import getpass
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from turnout.core.decider import Accepted, Failed, Rejected
from turnout.core.handling import (
    AdvanceSwitch,
    ContinueSwitch,
    HoldSwitch,
    Plan,
    RetrySwitch,
    StartSwitch,
    StopSwitch,
    Told,
    UndoModel,
)
from turnout.core.model import DeregisterVersion, RegisterVersion, SetPolicy, SetServing, unknown_model
from turnout.core.switch import ENDED, SwitchState, unknown_switch
from turnout.core.switch import evolve as evolve_switch
from turnout.core.switch import initial as no_switch
from turnout.events import subjects
from turnout.events.store import Damaged, StoreFull, Unavailable
from turnout.events.switch import SwitchEvent
from turnout.projections.alerts import AlertView
from turnout.projections.audit import Audit, Entry
from turnout.projections.comparison import Comparing, Comparison, Side
from turnout.projections.fleet import GatewayView, WorkerView
from turnout.projections.registry import ModelView, VersionView
from turnout.projections.routing import RouteView
from turnout.projections.switches import Switches, SwitchView
from turnout.workers.answers import CommandRejected, ControllerBug
from turnout.workers.controller.activity import QUESTION, AskUses, UsesReport
from turnout.workers.controller.health import AskEvidence, AskHealth, EvidenceReport, HealthReport
from turnout.workers.loaded import Loaded, loaded
from turnout.workers.ports import Request
from turnout.workers.story import Report, Story

__all__ = [
    "Client",
    "CommandRejected",
    "ControllerBug",
    "DynamicModelRegistry",
    "Following",
    "HealthMonitor",
    "ModelSwitcher",
    "ModelVersionManager",
    "Plane",
    "SwitchOperation",
    "connect",
    "held",
]

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from turnout.core.health import SwitchImpact, VersionHealth
    from turnout.events.envelope import Recorded
    from turnout.events.model import EngineSpec, Serving
    from turnout.events.store import EventStore
    from turnout.workers.clock import Clock
    from turnout.workers.ports import Checkpoint, Closeable, ViewEntry, ViewReader
    from turnout.workers.registry import BaseRegistry

#: Seconds that a command is retried for, where the caller names no deadline.
DEADLINE_S = 10.0
#: Seconds that a registration waits until a worker has read the version's files: some 100 GB.
INSPECTED_S = 600.0
#: For one answer, seconds; a controller that restarts is found again by the next try.
_ANSWER_S = 2.0
_RETRY_S = 0.1
#: How often a followed log is looked at while no controller projects, seconds.
_POLL_LOG_S = 2.0

_TYPES: dict[str, type[Any]] = {
    "model": ModelView,
    "route": RouteView,
    "switch": SwitchView,
    "worker": WorkerView,
    "gateway": GatewayView,
    "alert": AlertView,
}
_decoders = {kind: msgspec.json.Decoder(type) for kind, type in _TYPES.items()}
_Answer = Accepted | Rejected | Failed | Told | HealthReport | EvidenceReport | UsesReport
_answers: msgspec.json.Decoder[_Answer] = msgspec.json.Decoder(_Answer)

V = TypeVar("V")


class Plane(Protocol):
    """What a client needs of the control plane; workers/wiring.py has the real one."""

    @property
    def clock(self) -> Clock:
        """Time and ids."""
        ...

    @property
    def reader(self) -> ViewReader:
        """The views."""
        ...

    @property
    def store(self) -> EventStore:
        """The log, to be read."""
        ...

    async def log_page(self, after: int) -> tuple[tuple[Recorded, ...], int]:
        """The next events above sequence ``after``, and how many are left behind them. Raises Unavailable."""
        ...

    async def ask(self, role: str, verb: str, request: Request, timeout_s: float) -> bytes:
        """Send a command once; the JSON of its answer. Raises Unavailable."""
        ...


class Following:
    """A copy of some views that stays true while it is open.

    Attributes:
        views: key → view, e.g. ``switch.sw-1`` → SwitchView.
        sequence: the log's sequence that they stand for.
    """

    def __init__(self) -> None:
        self.views: dict[str, Any] = {}
        self.sequence = 0
        self._moved = asyncio.Event()

    async def moved(self, timeout_s: float | None = None) -> bool:
        """Wait for the next change. False where none came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()
        except TimeoutError:
            return False
        self._moved.clear()
        return True

    def take(self, entries: Mapping[str, ViewEntry], sequence: int) -> None:
        """What a watch calls."""
        for key, entry in entries.items():
            if entry.value:
                self.views[key] = _decode(key, entry.value)
            else:
                self.views.pop(key, None)
        self.sequence = sequence
        self._moved.set()


class Client:
    """Commands and views over one connection. Reads see what this client's own commands have changed.

    Args:
        plane: the connection.
        actor: who asks, for the log; empty for the operating system's user.
    """

    def __init__(self, plane: Plane, actor: str = "") -> None:
        self._plane = plane
        self.actor = actor or _user()
        self._written = 0

    @property
    def clock(self) -> Clock:
        """The clock of this process."""
        return self._plane.clock

    @property
    def store(self) -> EventStore:
        """The log, to be read."""
        return self._plane.store

    async def send(
        self,
        verb: str,
        body: msgspec.Struct,
        *,
        actor: str = "",
        id: str = "",
        if_sequence: int | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Accepted | Told | HealthReport | EvidenceReport | UsesReport:
        """Send a command or a question of role ``ops`` until it is answered.

        Args:
            verb: e.g. ``switch.start``.
            body: its struct.
            actor: who asks, where it is not this client's actor.
            id: of the command; empty makes one.
            if_sequence: refuse it where what it changes has a newer event, e.g. ``ModelView.sequence``.
            deadline_s: seconds after which the last reason for having no answer is raised.

        Raises:
            CommandRejected: refused.
            Unavailable: no answer in time; the command may have taken effect.
            StoreFull: the same, because there is no room to store it.
            ControllerBug: a fault of the controller.
        """
        clock = self._plane.clock
        raw_body = msgspec.Raw(msgspec.json.encode(body))
        request = Request(id or clock.id("c-"), actor or self.actor, raw_body, if_sequence)
        end = clock.monotonic() + deadline_s
        while True:
            left_s = end - clock.monotonic()
            try:
                raw = await self._plane.ask("ops", verb, request, max(0.1, min(_ANSWER_S, left_s)))
            except Unavailable as e:
                trouble: Unavailable = e
            else:
                answer = _answers.decode(raw)
                if isinstance(answer, Rejected):
                    raise CommandRejected(answer)
                if isinstance(answer, Accepted):
                    self._written = max(self._written, answer.sequence)
                if not isinstance(answer, Failed):
                    return answer
                if answer.code == "bug":
                    raise ControllerBug(answer)
                trouble = StoreFull(answer.reason) if answer.code == StoreFull.code else Unavailable(answer.reason)
            if clock.monotonic() + _RETRY_S >= end:
                raise trouble
            await asyncio.sleep(_RETRY_S)

    async def models(self) -> dict[str, ModelView]:
        """All registered models by name."""
        found = await self.views("model.*")
        return {view.model: view for view in found.values()}

    async def model(self, name: str) -> ModelView:
        """One model.

        Raises:
            CommandRejected: there is none of this name.
        """
        view = (await self.views(_key("model", name))).get(_key("model", name))
        if not isinstance(view, ModelView):
            raise CommandRejected(unknown_model(name))
        return view

    async def inspected(self, model: str, version: str, *, timeout_s: float) -> VersionView:
        """A version once a worker has looked at its files; as it is by then where none can, or none has in time.

        Raises:
            CommandRejected: model or version is unknown.
            Unavailable: the views can't be read.
        """
        end = self._plane.clock.monotonic() + timeout_s
        found = version_of(await self.model(model), version)
        async with self.follow(_key("model", model), "worker.*") as following:
            while True:
                view = following.views.get(_key("model", model))
                if isinstance(view, ModelView) and following.sequence >= self._written:
                    found = version_of(view, version)
                    workers = [one for one in following.views.values() if isinstance(one, WorkerView)]
                    asked = any(one.state == "live" and f"{model}@{version}" in one.inspect for one in workers)
                    if found.state != "checking" or not asked:
                        return found
                left_s = end - self._plane.clock.monotonic()
                if left_s <= 0 or not await following.moved(left_s):
                    return found

    async def switch(self, id: str) -> SwitchView:
        """One switch.

        Raises:
            CommandRejected: there is none of this id.
        """
        view = (await self.views(_key("switch", id))).get(_key("switch", id)) if id else None
        if not isinstance(view, SwitchView):
            view = await self._ended_long_ago(id)
        if view is None:
            raise CommandRejected(unknown_switch(id))
        return view

    async def _ended_long_ago(self, id: str) -> SwitchView | None:
        """A switch whose view is not kept any more, from its own events; None where there is none of this id."""
        fold = Switches()
        for recorded in await self._plane.store.read(subjects.event("switch", id)) if id else ():
            fold.apply(recorded)
        return fold.view(id)

    async def find_switch(self, name: str, *, ended: bool = False) -> SwitchView:
        """A switch by its id, or the one that runs on the model of this name.

        Args:
            name: id of a switch, or name of a model.
            ended: where none runs on the model, take the newest that has ended.

        Raises:
            CommandRejected: there is none.
        """
        switch_key, model_key = _key("switch", name), _key("model", name)
        found = await self.views(switch_key, model_key)
        if isinstance(switch := found.get(switch_key), SwitchView):
            return switch
        if not isinstance(model := found.get(model_key), ModelView):
            if (old := await self._ended_long_ago(name)) is not None:
                return old
            raise CommandRejected(
                Rejected(
                    "switch_unknown",
                    f"there is no switch and no model {name!r}",
                    "list the models with: turnout models",
                )
            )
        if id := model.switch or (model.last_switch if ended else ""):
            return await self.switch(id)
        last = f"; the newest was {model.last_switch}, {model.last_outcome}" if model.last_switch else ""
        raise CommandRejected(
            Rejected(
                "no_switch_runs",
                f"no switch runs on {name}{last}",
                f"start one: turnout switch {name} VERSION",
            )
        )

    async def switch_state(self, id: str) -> SwitchState:
        """One switch as deciders see it, from its own events: also when its step was applied, and what was promoted.

        Raises:
            Unavailable: the log can't be read.
        """
        state = no_switch
        for recorded in await self._plane.store.read(subjects.event("switch", id)):
            if isinstance(recorded.event, SwitchEvent):  # else a newer turnout's: no fold knows it
                state = evolve_switch(state, recorded.event)
        return state

    async def views(self, *keys: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """Views by key, as new as this client's last command.

        Args:
            keys: patterns, e.g. ``model.*``.
            deadline_s: seconds until the views must have come that far.

        Raises:
            Unavailable: they can't be read, or are behind because no controller leads.
        """
        clock = self._plane.clock
        end = clock.monotonic() + deadline_s
        while True:
            entries, checkpoint = await self._plane.reader.snapshot(keys)
            if self._written <= (checkpoint.sequence if checkpoint else 0):
                return {key: _decode(key, entry.value) for key, entry in entries.items() if entry.value}
            if clock.monotonic() >= end:
                raise Unavailable("the views are behind the log: check that a controller runs (turnout controller)")
            await asyncio.sleep(0.01)

    async def raw_views(self, *keys: str) -> tuple[dict[str, bytes], Checkpoint | None]:
        """Views as they are stored, and the checkpoint that they stand for.

        Raises:
            Unavailable: they can't be read.
        """
        entries, checkpoint = await self._plane.reader.snapshot(keys)
        return {key: entry.value for key, entry in entries.items() if entry.value}, checkpoint

    async def log_page(self, after: int) -> tuple[tuple[Recorded, ...], int]:
        """The next events above sequence ``after``, and how many are left behind them.

        Raises:
            Unavailable: it can't be read.
            Damaged: an event can't be read.
        """
        return await self._plane.log_page(after)

    async def log(self, *, follow: bool = False) -> AsyncGenerator[Recorded]:
        """The event log from its start; to what is stored now, or on and on.

        Needs no right but to read the log and, to follow it, the views.

        Raises:
            Unavailable: it can't be read.
            Damaged: an event can't be read.
        """
        after, left = 0, 1
        while left:
            records, left = await self._plane.log_page(after)
            for recorded in records:
                yield recorded
                after = recorded.sequence
        if not follow:
            return
        async with self.follow() as following:  # no key: the checkpoint moves with every event
            while True:
                records, left = await self._plane.log_page(after)
                for recorded in records:
                    yield recorded
                    after = recorded.sequence
                if not left:
                    await following.moved(_POLL_LOG_S)

    @asynccontextmanager
    async def follow(self, *keys: str) -> AsyncGenerator[Following]:
        """Follow views while the block runs.

        Raises:
            Unavailable: they can't be read.
        """
        following = Following()
        watch: Closeable = await self._plane.reader.watch(keys, following.take)
        try:
            yield following
        finally:
            await watch.close()


@asynccontextmanager
async def connect(url: str = "", *, actor: str = "") -> AsyncGenerator[Client]:
    """Connect to turnout's control plane while the block runs.

    Args:
        url: of NATS; empty for the ``turnout up`` of the current folder, else the server on this machine.
        actor: who asks, for the log; empty for the operating system's user.

    Raises:
        Unavailable: NATS can't be reached.
    """
    from turnout.workers import wiring

    async with wiring.control_plane(url) as plane:
        yield Client(plane, actor)


def version_of(model: ModelView, version: str) -> VersionView:
    """One version of a model.

    Raises:
        CommandRejected: there is none of this name.
    """
    view = model.versions.get(version)
    if view is None:
        known = ", ".join(model.versions) or "none"
        raise CommandRejected(
            Rejected(
                "version_unknown",
                f"{model.model} has no version {version!r} (registered: {known})",
                f"register it first: turnout register {model.model} {version} --engine …",
            )
        )
    return view


def held(view: SwitchView) -> bool:
    """Whether a switch stands still until a person decides; a pause that ends by itself is none."""
    return view.phase == "paused" and view.paused_until is None


class SwitchOperation:
    """One switch that was asked for. ``id`` is the switch id."""

    def __init__(self, client: Client, id: str) -> None:
        self._client = client
        self.id = id

    async def status(self) -> SwitchView:
        """How far it is."""
        return await self._client.switch(self.id)

    async def abort(self, *, reason: str = "", actor: str = "") -> None:
        """End it; what has moved goes back.

        Raises:
            CommandRejected: it has ended already, or there is nothing to go back to.
        """
        await self._client.send("switch.abort", StopSwitch(self.id, reason), actor=actor)

    async def promote(
        self, step: int | None, *, full: bool = False, reason: str = "", actor: str = "", id: str = ""
    ) -> None:
        """Let it past a step.

        Args:
            step: the one that its author saw: given twice, it counts once. None where nobody looked: then it is refused
                within moments of another promotion.
            full: past every further step, pause and analysis; needs a reason.
            reason: why, for the log.
            actor: who asks, where it is not the client's actor.
            id: of the command.

        Raises:
            CommandRejected: it has ended, has left that step by itself, or can't be promoted now.
        """
        body = AdvanceSwitch(self.id, step, full, reason)
        await self._client.send("switch.promote", body, actor=actor, id=id)

    async def pause(self, seconds: float | None = None, *, reason: str = "", actor: str = "") -> None:
        """Let it stand still at its step; ``seconds``: go on by itself after them.

        Raises:
            CommandRejected: it has ended, or goes back already.
        """
        await self._client.send("switch.pause", HoldSwitch(self.id, reason, seconds), actor=actor)

    async def resume(self, *, reason: str = "", actor: str = "") -> None:
        """Let it go on after ``pause``.

        Raises:
            CommandRejected: it waits for something else.
        """
        await self._client.send("switch.resume", ContinueSwitch(self.id, reason), actor=actor)

    async def wait(self, timeout_s: float | None = None, *, stop_at_hold: bool = False) -> SwitchView:
        """Wait for its end, whatever it is: look at ``phase``.

        Args:
            timeout_s: how long at most.
            stop_at_hold: come back also where it stands still until a person decides (phase ``paused``).

        Raises:
            TimeoutError: it runs on.
        """
        async with asyncio.timeout(timeout_s):
            async for view in self.progress():
                if view.phase in ENDED or (stop_at_hold and held(view)):
                    return view
        raise AssertionError("a switch's progress goes on to its end")

    async def progress(self) -> AsyncIterator[SwitchView]:
        """The switch as it is, then after every change, to its end."""
        key = _key("switch", self.id)
        async with self._client.follow(key) as following:
            while True:
                view = following.views.get(key)
                if isinstance(view, SwitchView):
                    yield view
                    if view.phase in ENDED:
                        return
                await following.moved()


class ModelSwitcher:
    """Switches models."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def switch_model(
        self,
        model: str,
        version: str,
        *,
        strategy: str = "",
        parameters: dict[str, object] | None = None,
        reason: str = "",
        bake_s: float | None = None,
        drain_s: float | None = None,
        max_transition_time_s: float | None = None,
        policy: str = "",
        hold: bool | None = None,
        actor: str = "",
        id: str = "",
    ) -> SwitchOperation:
        """Ask for a version. Returns when the switch is in the log, not when it is done: see ``wait``.

        Args:
            model: the served name.
            version: the target.
            strategy: empty for the configured default.
            parameters: the strategy's own.
            reason: why, for the log.
            bake_s: seconds that the old version stays warm; None for the configured default.
            drain_s: seconds that its last requests may run; None for the configured default.
            max_transition_time_s: seconds until the target must carry all traffic; None for the configured default and
                what the strategy plans to wait.
            policy: name of one of the model's policies, instead of strategy and parameters.
            hold: where there is no place for both versions, requests may wait while one makes room for the other; None
                for what the policy says.
            actor: who asks, where it is not the client's actor.
            id: of the command: the same id asks for the same switch again.

        Raises:
            CommandRejected: it can't be done; the reason says why.
        """
        body = StartSwitch(
            model, version, strategy, parameters or {}, reason, bake_s, drain_s, max_transition_time_s, policy, hold
        )
        return self._operation(await self._client.send("switch.start", body, actor=actor, id=id))

    async def plan_switch(
        self,
        model: str,
        version: str,
        *,
        strategy: str = "",
        parameters: dict[str, object] | None = None,
        bake_s: float | None = None,
        drain_s: float | None = None,
        max_transition_time_s: float | None = None,
        policy: str = "",
        hold: bool | None = None,
    ) -> Plan:
        """What a switch would do, without doing it. Arguments as for :meth:`switch_model`.

        Raises:
            CommandRejected: it could not be done.
        """
        body = StartSwitch(
            model, version, strategy, parameters or {}, "", bake_s, drain_s, max_transition_time_s, policy, hold
        )
        answer = await self._client.send("switch.plan", body)
        if not isinstance(answer, Plan):
            raise TypeError(f"switch.plan was answered with {type(answer).__name__}")
        return answer

    async def promote(
        self, switch: str, step: int | None, *, full: bool = False, reason: str = "", actor: str = "", id: str = ""
    ) -> SwitchOperation:
        """Let a switch past a step. As :meth:`SwitchOperation.promote`."""
        operation = SwitchOperation(self._client, switch)
        await operation.promote(step, full=full, reason=reason, actor=actor, id=id)
        return operation

    async def pause(
        self, switch: str, seconds: float | None = None, *, reason: str = "", actor: str = ""
    ) -> SwitchOperation:
        """Let a switch stand still. As :meth:`SwitchOperation.pause`."""
        operation = SwitchOperation(self._client, switch)
        await operation.pause(seconds, reason=reason, actor=actor)
        return operation

    async def resume(self, switch: str, *, reason: str = "", actor: str = "") -> SwitchOperation:
        """Let a paused switch go on. As :meth:`SwitchOperation.resume`."""
        operation = SwitchOperation(self._client, switch)
        await operation.resume(reason=reason, actor=actor)
        return operation

    async def retry(self, switch: str, *, reason: str = "", actor: str = "", id: str = "") -> SwitchOperation:
        """Ask again for what an ended switch was asked for: a new switch, with evidence of its own.

        Raises:
            CommandRejected: it still runs, or can't be done now.
        """
        return self._operation(await self._client.send("switch.retry", RetrySwitch(switch, reason), actor=actor, id=id))

    async def set_policy(self, model: str, name: str, policy: dict[str, object], *, actor: str = "") -> bool:
        """Name a way to switch, for later switches of the model. False where it is set like this already.

        Raises:
            CommandRejected: the policy can't be meant; the reason names each field.
        """
        answer = await self._client.send("model.policy", SetPolicy(model, name, policy), actor=actor)
        return isinstance(answer, Accepted) and bool(answer.events)

    async def remove_policy(self, model: str, name: str, *, actor: str = "") -> bool:
        """Take a name away; switches that follow it keep what they began with. False where there is none.

        Raises:
            CommandRejected: the model is unknown.
        """
        return await self.set_policy(model, name, {}, actor=actor)

    async def get_policies(self, model: str) -> dict[str, dict[str, object]]:
        """Name → policy as it was given.

        Raises:
            CommandRejected: the model is unknown.
        """
        return (await self._client.model(model)).policies

    async def undo(
        self, model: str, *, to: str = "", reason: str = "", hold: bool = False, actor: str = "", id: str = ""
    ) -> SwitchOperation:
        """Roll the running switch back, or return to the last known good version.

        Args:
            model: the served name.
            to: the version that is wanted back, where its author knows; else it is refused where the model has just
                gone back, because it may be the same wish, given twice.
            reason: why, for the log.
            hold: where there is no place for both versions, requests may wait.
            actor: who asks, where it is not the client's actor.
            id: of the command.

        Raises:
            CommandRejected: there is nothing to go back to, it would go elsewhere, or the model has just gone back.
        """
        body = UndoModel(model, reason, hold, to)
        return self._operation(await self._client.send("model.undo", body, actor=actor, id=id))

    async def get_switch_status(self, switch: str) -> SwitchView:
        """How far a switch is, or how it ended.

        Raises:
            CommandRejected: there is none of this id.
        """
        return await self._client.switch(switch)

    async def get_switch_report(self, switch: str) -> Report:
        """Everything about one switch, from the log; and what clients noticed, where a controller knows it still.

        Raises:
            CommandRejected: there is none of this id.
            Unavailable: the log can't be read.
            Damaged: the log does not hold what the views say.
        """
        view = await self._client.switch(switch)
        story = Story(view.switch)
        async for recorded in self._client.log():
            story.take(recorded)
        made = story.report
        if made is None:
            raise Damaged(f"the log does not hold the beginning of {view.switch}")
        with suppress(Unavailable, CommandRejected, ControllerBug):  # the log's part is told all the same
            made.impact = await HealthMonitor(self._client).monitor_switch_impact(view.switch)
        return made

    async def abort_switch(self, switch: str, *, reason: str = "", actor: str = "") -> SwitchOperation:
        """End a running switch; what has moved goes back to the source. Returns when it is in the log.

        Raises:
            CommandRejected: it has ended already, or there is nothing to go back to.
        """
        operation = SwitchOperation(self._client, switch)
        await operation.abort(reason=reason, actor=actor)
        return operation

    def _operation(self, answer: object) -> SwitchOperation:
        if not isinstance(answer, Accepted) or not answer.ids:
            raise TypeError(f"the command was answered without a switch: {answer}")
        return SwitchOperation(self._client, answer.ids[0])


class HealthMonitor:
    """How versions do, as the controllers measure it. Asking writes nothing."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def check_model_health(self, model: str, *, deadline_s: float = DEADLINE_S) -> HealthReport:
        """Status of each version of a model that is loaded or routed, with reasons and numbers.

        Raises:
            CommandRejected: the model is unknown.
        """
        answer = await self._client.send("health.get", AskHealth(model), deadline_s=deadline_s)
        if not isinstance(answer, HealthReport):
            raise TypeError(f"health.get was answered with {type(answer).__name__}")
        return answer

    async def check_version_health(self, model: str, version: str, *, deadline_s: float = DEADLINE_S) -> VersionHealth:
        """Status of one version, with reasons and numbers.

        Raises:
            CommandRejected: model or version is unknown, or the version is neither loaded nor routed.
        """
        report = await self.check_model_health(model, deadline_s=deadline_s)
        found = next((one for one in report.versions if one.version == version), None)
        if found is None:
            version_of(await self._client.model(model), version)
            raise CommandRejected(
                Rejected(
                    "version_not_loaded",
                    f"{model} {version} is neither loaded nor routed: nothing is known of how it does",
                    f"load it first: turnout preload {model} {version}",
                )
            )
        return found

    async def check_evidence(self, switch: str, *, deadline_s: float = DEADLINE_S) -> EvidenceReport:
        """What the judge sees of a running switch now, and what clients noticed of it.

        Raises:
            CommandRejected: the switch is unknown.
        """
        answer = await self._client.send("switch.evidence", AskEvidence(switch), deadline_s=deadline_s)
        if not isinstance(answer, EvidenceReport):
            raise TypeError(f"switch.evidence was answered with {type(answer).__name__}")
        return answer

    async def monitor_switch_impact(self, switch: str) -> SwitchImpact | None:
        """What clients noticed: before the switch, while it ran, after it. None where the samples are gone.

        Raises:
            CommandRejected: the switch is unknown.
        """
        return (await self.check_evidence(switch)).impact


class DynamicModelRegistry:
    """Registers versions of models while turnout runs.

    Args:
        base_registry: the static registry: what turnout.toml declares and what the engines support; new versions are
            checked against it.
        client: the connection.
    """

    def __init__(self, base_registry: BaseRegistry, client: Client) -> None:
        self._base = base_registry
        self._client = client

    async def register_model(
        self,
        model: str,
        version: str,
        engine: EngineSpec,
        *,
        note: str = "",
        tags: tuple[str, ...] = (),
        metrics: Mapping[str, float] | None = None,
        parent: str = "",
        actor: str = "",
        trust_architecture: bool = False,
        replicas: int | None = None,
    ) -> VersionView:
        """Add an immutable version; the first one makes the model. A worker looks at its files afterwards.

        Args:
            model: the served name.
            version: its name under the model.
            engine: how it is run.
            note: why, for the log.
            tags: words to find it by.
            metrics: what was measured before, e.g. ``{"accuracy": 0.71}``.
            parent: version that it was made from.
            actor: who asks, where it is not the client's actor.
            trust_architecture: what the engine does not name, or looks incomplete, is tried all the same.
            replicas: its instances while it serves; None for one, or what was set before.

        Raises:
            CommandRejected: the settings can't be meant, or the name is taken by other settings.
        """
        if not trust_architecture and (problem := self._base.problem(engine)):
            raise CommandRejected(problem)
        told = dict(metrics or {})
        body = RegisterVersion(model, version, engine, note, tags, told, parent, trust_architecture, replicas)
        await self._client.send("version.register", body, actor=actor)
        return version_of(await self._client.model(model), version)

    async def deregister_model(self, model: str, version: str, *, actor: str = "") -> None:
        """Take a version away that nothing uses. True already where there is none of this name.

        Raises:
            CommandRejected: it is in use, or the model is unknown.
        """
        await self._client.send("version.deregister", DeregisterVersion(model, version), actor=actor)

    async def set_serving(self, model: str, serving: Serving, *, version: str = "", actor: str = "") -> bool:
        """Say whether a model is always loaded or on demand. False where it is served like this already.

        Args:
            model: the served name.
            serving: see ``turnout.events.model.Serving``.
            version: what a model loads on demand that serves none yet; empty for its first one.
            actor: who asks, where it is not the client's actor.

        Raises:
            CommandRejected: the model is unknown, or the settings can't be meant.
        """
        answer = await self._client.send("model.serving", SetServing(model, serving, version), actor=actor)
        return isinstance(answer, Accepted) and bool(answer.events)

    async def get_uses(self) -> UsesReport:
        """Who uses the models that are loaded on demand."""
        answer = await self._client.send(QUESTION, AskUses())
        if not isinstance(answer, UsesReport):
            raise TypeError(f"{QUESTION} was answered with {type(answer).__name__}")
        return answer

    async def get_loaded(self) -> list[Loaded]:
        """What is loaded, where and until when; then the models on demand that are at zero. In the order of names."""
        found = await self._client.views("worker.*", "model.*", "route.*")
        return loaded(found, (await self.get_uses()).models, self._client.clock.now())

    async def get_active_model(self, model: str) -> VersionView | None:
        """The version that the model serves when no switch runs; None where it serves none yet.

        Raises:
            CommandRejected: the model is unknown.
        """
        view = await self._client.model(model)
        return view.versions.get(view.active)

    async def switch_model(self, model: str, version: str, **settings: Any) -> SwitchOperation:
        """As :meth:`ModelSwitcher.switch_model`."""
        return await ModelSwitcher(self._client).switch_model(model, version, **settings)


class ModelVersionManager:
    """The versions of models: made, read, compared, returned to."""

    def __init__(self, registry: DynamicModelRegistry, client: Client) -> None:
        self._registry = registry
        self._client = client

    async def create_version(
        self, model: str, version: str, engine: EngineSpec, *, wait_s: float = INSPECTED_S, **about: Any
    ) -> VersionView:
        """Register a version, and wait until a worker has looked at its files.

        Args:
            model: the served name.
            version: its name under the model.
            engine: how it is run.
            wait_s: seconds to wait at most; 0 for not at all. What no live worker can look at is not waited for.
            **about: as for :meth:`DynamicModelRegistry.register_model`.

        Raises:
            CommandRejected: the settings can't be meant, the name is taken, or the files can't be served.
        """
        view = await self._registry.register_model(model, version, engine, **about)
        if wait_s > 0:
            view = await self._client.inspected(model, version, timeout_s=wait_s)
        if view.state == "rejected":
            raise CommandRejected(Rejected(view.code, view.reason, view.hint))
        return view

    async def get_version(self, model: str, version: str) -> VersionView:
        """One version as it was registered.

        Raises:
            CommandRejected: model or version is unknown.
        """
        return version_of(await self._client.model(model), version)

    async def get_history(self, model: str, version: str = "") -> tuple[Entry, ...]:
        """What happened to a model's versions (or to one of them), oldest first, also to those that are gone.

        Raises:
            CommandRejected: the model is unknown.
            Unavailable: the log can't be read.
        """
        audit = Audit()
        found = [
            audit.entry(recorded)
            for recorded in await self._client.store.read(subjects.event("model", model))
            if not version or getattr(recorded.event, "version", "") == version
        ]
        if not found and not version:
            raise CommandRejected(unknown_model(model))
        return tuple(entry for entry in found if entry.type.startswith(("Version", "Active", "KnownGood")))

    async def compare_versions(self, model: str, first: str, second: str) -> Comparison:
        """Two versions side by side, from the log and from what the controllers measure now. Writes nothing.

        Raises:
            CommandRejected: model or version is unknown, or the two are one.
            Unavailable: the log can't be read.
        """
        view = await self._client.model(model)
        for version in (first, second):
            version_of(view, version)
        if first == second:
            raise CommandRejected(
                Rejected("versions_equal", f"{first} is one version", "name two different versions of the model")
            )
        comparing = Comparing(model, first, second)
        async for recorded in self._client.log():
            comparing.take(recorded)
        made = comparing.comparison()
        if made is None:
            raise Unavailable("the log does not hold what the views say; check it: turnout verify")
        try:
            report = await HealthMonitor(self._client).check_model_health(model, deadline_s=_ANSWER_S)
        except Unavailable:
            return made  # what is measured now is the smaller part
        health = {one.version: one for one in report.versions}
        sides = [_with_health(side, health.get(side.version)) for side in (made.first, made.second)]
        return msgspec.structs.replace(made, first=sides[0], second=sides[1])

    async def rollback_to_version(
        self, model: str, version: str, *, reason: str = "", actor: str = ""
    ) -> SwitchOperation:
        """Go back to a version at once, without a bake.

        Where an undo goes to it anyway, this is the undo: what is left behind is then not known to be good any more.

        Raises:
            CommandRejected: it can't be done.
        """
        view = await self._client.model(model)
        running = await self._client.switch(view.switch) if view.switch else None
        back = running.source if running else next((v for v in reversed(view.known_good) if v != view.active), "")
        switcher = ModelSwitcher(self._client)
        if back == version:
            return await switcher.undo(model, to=version, reason=reason, actor=actor)
        return await switcher.switch_model(
            model, version, strategy="immediate", bake_s=0.0, reason=reason or f"rollback to {version}", actor=actor
        )


def _with_health(side: Side, health: VersionHealth | None) -> Side:
    if health is None:
        return side
    numbers = health.numbers
    return msgspec.structs.replace(
        side,
        health=str(health.status),
        requests=numbers.requests,
        error_rate=numbers.error_rate,
        first_p95_ms=numbers.first_p95_ms,
        p95_ms=numbers.p95_ms,
    )


def _key(kind: str, id: str) -> str:
    return subjects.view_key(kind, id)


def _decode(key: str, value: bytes) -> Any:
    kind, _ = subjects.parse_view_key(key)
    decoder = _decoders.get(kind)
    return msgspec.json.decode(value) if decoder is None else decoder.decode(value)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under an id without a name
        return ""
