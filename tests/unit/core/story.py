"""What several tests of the core begin with. Imported by path: see conftest.py."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Self, cast

from turnout.core.config import ModelSwitchingConfig
from turnout.core.sagas import placement
from turnout.core.sagas import switch as saga
from turnout.core.testing import START, WorldBuilder
from turnout.events.gateway import GatewayJoined, RouteApplied, VersionDrained
from turnout.events.instance import InstanceProbed, InstanceReady, InstanceRequested
from turnout.events.model import ActiveVersionChanged, EngineSpec, KnownGoodMarked, ModelRegistered, SwitchAdmitted
from turnout.events.model import VersionRegistered as Registered
from turnout.events.route import Endpoint, Hold, RouteChanged, Split
from turnout.events.switch import SwitchRequested
from turnout.events.worker import WorkerJoined

if TYPE_CHECKING:
    from turnout.core.judging.judgement import Judgement
    from turnout.core.sagas.owed import Agenda

FAKE = EngineSpec("fake")
CONFIG = ModelSwitchingConfig()
GATEWAYS = ("g1", "g2")


class Story(WorldBuilder):
    """A world with shorthand for what happens often."""

    def owes(self, switch: str = "sw-1", judgement: Judgement | None = None) -> Agenda:
        """What the switch owes now, by this evidence."""
        return saga.agenda(self.world, switch, self.now, judgement)

    def placement(self, config: ModelSwitchingConfig = CONFIG) -> Agenda:
        """What placement owes now."""
        return placement.agenda(self.world, config, self.now)

    def later(self, seconds: float) -> Self:
        """Time passes."""
        self.now += timedelta(seconds=seconds)
        return self

    def carry(self, switch: str = "sw-1", judgement: Judgement | None = None) -> tuple[object, ...]:
        """Carry out the one thing that the switch owes, by this evidence."""
        (owed,) = self.owes(switch, judgement).owed
        return self.carry_out(owed)

    def probed(self, instance: str, ok: bool = True) -> Self:
        """The worker has answered the newest probe that was asked for."""
        cause = self.world.instances[instance].probe
        self.happens(InstanceProbed(instance, cause, ok, 0.1, "" if ok else "no answer"))
        return self

    def carry_placement(self, config: ModelSwitchingConfig = CONFIG) -> list[object]:
        """Carry out everything that placement owes."""
        return [event for owed in self.placement(config).owed for event in self.carry_out(owed)]

    def ready(self, instance: str) -> Self:
        """A worker has proven the instance."""
        self.happens(InstanceReady(instance, f"unix:/run/{instance}", 1.0, 0.1, 1000, ""))
        return self

    def instance(self, instance: str, version: str, worker: str = "w1", model: str = "chat") -> Self:
        """An instance was asked for and is ready."""
        self.happens(InstanceRequested(instance, model, version, worker, FAKE, "restore"))
        return self.ready(instance)

    def applied(self, *gateways: str, model: str = "chat") -> Self:
        """These gateways (all, without names) route by the newest revision."""
        for gateway in gateways or GATEWAYS:
            self.happens(RouteApplied(gateway, model, self.world.routes[model].revision))
        return self

    def drained(self, version: str, *gateways: str, model: str = "chat") -> Self:
        """These gateways (all, without names) have nothing in flight on the version."""
        for gateway in gateways or GATEWAYS:
            self.happens(VersionDrained(gateway, model, version, self.world.routes[model].revision))
        return self

    def asked(self, target: str, *, source: str | None = None, **fields: object) -> Self:
        """Switch ``sw-1`` was asked for."""
        nothing: dict[str, object] = {}
        known: dict[str, object] = {
            "undo": False,
            "bake_s": 60.0,
            "drain_s": 600.0,
            "deadline_s": 300.0,
            "strategy": "immediate",
            "parameters": nothing,
            "hold": None,
        } | fields
        self.later(1.0)
        requested = SwitchRequested(
            switch="sw-1",
            model="chat",
            target=target,
            source=self.world.models["chat"].active if source is None else source,
            strategy=str(known["strategy"]),
            parameters=cast("dict[str, object]", known["parameters"]),
            undo=bool(known["undo"]),
            reason="",
            deadline=self.now + timedelta(seconds=float(str(known["deadline_s"]))),
            bake_s=float(str(known["bake_s"])),
            drain_s=float(str(known["drain_s"])),
            at=self.now,
            hold=cast("Hold | None", known["hold"]),
        )
        self.happens(SwitchAdmitted("chat", "sw-1", target), requested, after_s=0.0)
        return self


def registered(*versions: str, capacity: int = 4) -> Story:
    """One worker, two gateways, and a model with versions that nothing serves yet."""
    story = Story()
    story.happens(WorkerJoined("w1", "h1", ("fake",), (), capacity))
    for gateway in GATEWAYS:
        story.happens(GatewayJoined(gateway, f"http://{gateway}"))
    story.happens(ModelRegistered("chat"), *(Registered("chat", v, FAKE, "") for v in versions))
    return story


def serving(*versions: str, capacity: int = 4) -> Story:
    """The same, and the first version (``v1`` without names, beside ``v2``) is active on instance ``i1``."""
    versions = versions or ("v1", "v2")
    story = registered(*versions, capacity=capacity).instance("i1", versions[0])
    story.happens(ActiveVersionChanged("chat", versions[0], "", "sw-0"), KnownGoodMarked("chat", versions[0], "sw-0"))
    split = Split(versions[0], 100.0, (Endpoint("i1", "unix:/run/i1"),))
    story.happens(RouteChanged("chat", 1, (split,), "sw-0", 600.0, "sw-0"))
    return story.applied()


__all__ = ["CONFIG", "FAKE", "GATEWAYS", "START", "Story", "registered", "serving"]
