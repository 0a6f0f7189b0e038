"""Logs of whole switches, written by hand: what ``report``, ``get`` and ``status`` tell them as is then fixed."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self

from turnout.events import subjects
from turnout.events.codec import Context
from turnout.events.envelope import START
from turnout.events.gateway import GatewayJoined, RouteApplied
from turnout.events.instance import InstanceReady, InstanceRequested
from turnout.events.model import (
    ActiveVersionChanged,
    EngineSpec,
    KnownGoodMarked,
    ModelRegistered,
    SwitchAdmitted,
    SwitchClosed,
    VersionRegistered,
)
from turnout.events.route import Endpoint, RouteChanged, Split
from turnout.events.store import Append
from turnout.events.switch import (
    Figure,
    RollbackStarted,
    RolledBack,
    StepApplied,
    StepStarted,
    SwitchPaused,
    SwitchPromoted,
    SwitchRequested,
    TargetReady,
    VerdictReached,
)
from turnout.events.worker import WorkerJoined

if TYPE_CHECKING:
    from turnout.events.memory import MemoryStore

T0 = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
STEPS: dict[str, object] = {"steps": [{"setWeight": 5}, {"pause": {}}, {"setWeight": 50}]}
FIGURES = (
    Figure("errors", 0.0024, 0.78, 4210.0, 200.0, 0.01, 20.0, 14.5, 2100.0),
    Figure("first_byte", 41.0, 43.0, 1.3, 200.0, 6.2, 20.0, 0.81, 1.36),
    Figure("sample_ratio", 0.05, 0.0512, 0.4, 1000.0),
)


class Tale:
    """Writes events as they would have been stored; time passes only when ``later`` is called."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._count = 0
        self.now = T0

    def later(self, seconds: float) -> Self:
        """Time passes."""
        self.now += timedelta(seconds=seconds)
        return self

    def by(self, actor: str, aggregate: str, id: str, *events: object) -> Self:
        """Somebody's command has led to these events of one aggregate."""
        self._count += 1
        subject = subjects.event(aggregate, id)
        context = Context(f"c-{self._count}", actor, "", "", self.now)

        async def write() -> None:
            held = await self._store.read(subject)
            position = held[-1].position if held else START
            await self._store.append([Append(subject, position, events)], context)

        asyncio.run(write())
        return self

    def switch(self, *events: object, actor: str = "controller") -> Self:
        """Events of switch sw-1."""
        return self.by(actor, "switch", "sw-1", *events)

    def route(self, revision: int, cause: str, **weights: float) -> Self:
        """A route of chat, and gateway g1 that applies it."""
        splits = tuple(Split(v, w, (Endpoint(f"i-{v}", f"unix:/run/{v}.sock"),)) for v, w in weights.items())
        self.by("controller", "route", "chat", RouteChanged("chat", revision, splits, "sw-1", 600.0, cause))
        return self.by("gw:g1", "gateway", "g1", RouteApplied("g1", "chat", revision))


def serving(store: MemoryStore) -> Tale:
    """chat serves v1, and v2 is loaded."""
    tale = Tale(store)
    tale.by("ops:alice", "model", "chat", ModelRegistered("chat"), *_registered("v1"))
    tale.by("ops:alice", "model", "chat", *_registered("v2"))
    tale.by("worker:w1", "worker", "w1", WorkerJoined("w1", "h", ("fake",), (), 4))
    tale.by("gw:g1", "gateway", "g1", GatewayJoined("g1", "http://127.0.0.1:8080"))
    for version in ("v1", "v2"):
        requested = InstanceRequested(f"i-{version}", "chat", version, "w1", EngineSpec("fake"), "sw-0")
        ready = InstanceReady(f"i-{version}", f"unix:/run/{version}.sock", 0.5, 0.1, 2**20, "f")
        tale.by("controller", "instance", f"i-{version}", requested)
        tale.by("worker:w1", "instance", f"i-{version}", ready)
    tale.route(1, "sw-0", v1=100)
    tale.by("controller", "model", "chat", ActiveVersionChanged("chat", "v1", "", "sw-0"))
    return tale.by("controller", "model", "chat", KnownGoodMarked("chat", "v1", "sw-0"))


def canary_at_step_1(store: MemoryStore, parameters: dict[str, object] = STEPS) -> Tale:
    """alice has asked for v2 as a canary; every gateway gives it 5 %, since 4 s."""
    tale = serving(store)
    tale.by("ops:alice", "model", "chat", SwitchAdmitted("chat", "sw-1", "v2"))
    asked = SwitchRequested(
        "sw-1", "chat", "v2", "v1", "canary", parameters, False, "new weights", T0 + timedelta(hours=2), 60.0, 600.0, T0
    )
    tale.switch(asked, actor="ops:alice")
    tale.later(1).switch(TargetReady("sw-1", ("i-v2",), 1.0, True))
    tale.switch(StepStarted("sw-1", 1, 5.0, 2, "the first step", tale.now)).route(2, "sw-1", v1=95, v2=5)
    return tale.later(0.02).switch(StepApplied("sw-1", 1, 2, ("g1",), 0.02)).later(4)


def canary_held(store: MemoryStore) -> Tale:
    """It waits at step 1 for somebody to promote it."""
    tale = canary_at_step_1(store)
    why = "step 1 lasts until an operator promotes it"
    return tale.switch(SwitchPaused("sw-1", "pause", why, tale.now)).later(5)


def canary_rolled_back(store: MemoryStore) -> Tale:
    """bob has promoted it past step 1; at 50 % the judge has found errors."""
    tale = canary_held(store)
    tale.switch(SwitchPromoted("sw-1", 1, False, "looks fine", tale.now), actor="ops:bob")
    tale.switch(StepStarted("sw-1", 2, 50.0, 3, "an operator promoted it past step 1", tale.now))
    tale.route(3, "sw-1", v1=50, v2=50).later(0.03).switch(StepApplied("sw-1", 2, 3, ("g1",), 0.03)).later(8)
    why = "v2 failed 7 of 9 requests while v1 failed 1 of 412"
    verdict = VerdictReached("sw-1", 2, "fail", "errors", why, "errors", 412, 9, 1, 7, 0, 7.5, FIGURES, 12, 1, tale.now)
    tale.switch(verdict, RollbackStarted("sw-1", 4, "verdict", why, tale.now)).route(4, "sw-1", v1=100)
    tale.later(0.01).by("controller", "model", "chat", SwitchClosed("chat", "sw-1", "rolled_back"))
    return tale.switch(RolledBack("sw-1", ("g1",), 0.01))


def _registered(version: str) -> tuple[VersionRegistered, ...]:
    return (VersionRegistered("chat", version, EngineSpec("fake"), "d"),)
