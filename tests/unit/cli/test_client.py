"""The typed client: what its classes answer, what they raise, and that a lost answer does nothing twice."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from tests.unit.cli.conftest import LocalPlane
from tests.unit.cli.tale import STEPS, canary_held, serving

import turnout
from turnout.core.decider import Failed
from turnout.events.model import EngineSpec
from turnout.events.store import Unavailable
from turnout.workers.client import (
    Client,
    CommandRejected,
    ControllerBug,
    DynamicModelRegistry,
    HealthMonitor,
    ModelSwitcher,
    ModelVersionManager,
    SwitchOperation,
)
from turnout.workers.registry import BaseRegistry, Engine, architecture, find_engines

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from turnout.events.memory import MemoryStore
    from turnout.workers.ports import Request

FAKE = EngineSpec("fake")
WORKER = b'{"worker": "w1", "host": "h", "engines": ["fake"], "devices": [], "capacity": 4}'


@asynccontextmanager
async def connected(store: MemoryStore) -> AsyncGenerator[Client]:
    plane = LocalPlane(store)
    await plane.start()
    yield Client(plane, "alice")


class FlakyPlane(LocalPlane):
    """Loses the answer of the first commands, or answers that the store is away."""

    def __init__(self, store: MemoryStore, lost: int, failures: tuple[bytes, ...] = ()) -> None:
        super().__init__(store)
        self.ids: list[str] = []
        self._lost = lost
        self._failures = list(failures)

    async def ask(self, role: str, verb: str, request: Request, timeout_s: float) -> bytes:
        self.ids.append(request.id)
        if self._failures:
            return self._failures.pop(0)
        answer = await super().ask(role, verb, request, timeout_s)
        if self._lost:
            self._lost -= 1
            raise Unavailable("the answer was lost")
        return answer


def test_a_version_is_registered_read_and_taken_away(store: MemoryStore, runner: asyncio.Runner) -> None:
    async def story() -> None:
        async with connected(store) as client:
            registry = DynamicModelRegistry(BaseRegistry(), client)
            versions = ModelVersionManager(registry, client)
            made = await versions.create_version("chat", "v1", FAKE, note="first", actor="bob")
            assert (made.version, made.engine, made.registered_by, made.note) == ("v1", FAKE, "ops:bob", "first")
            assert await versions.get_version("chat", "v1") == made
            assert await registry.get_active_model("chat") is None
            await registry.deregister_model("chat", "v1")
            with pytest.raises(CommandRejected, match="version_unknown"):
                await versions.get_version("chat", "v1")

    runner.run(story())


def test_a_refusal_is_raised_with_code_reason_and_hint(store: MemoryStore, runner: asyncio.Runner) -> None:
    async def story() -> None:
        async with connected(store) as client:
            with pytest.raises(CommandRejected) as caught:
                await DynamicModelRegistry(BaseRegistry(), client).get_active_model("chat")
            assert caught.value.answer.code == "model_unknown"
            with pytest.raises(CommandRejected, match="switch_unknown"):
                await ModelSwitcher(client).get_switch_status("sw-1")

    runner.run(story())


def test_a_switch_is_asked_for_watched_and_aborted(store: MemoryStore, runner: asyncio.Runner) -> None:
    async def story() -> None:
        async with connected(store) as client:
            registry, switcher = DynamicModelRegistry(BaseRegistry(), client), ModelSwitcher(client)
            await registry.register_model("chat", "v1", FAKE)
            await _join(store)
            operation = await registry.switch_model("chat", "v1", reason="try", bake_s=5)
            view = await operation.status()
            assert (view.model, view.target, view.reason, view.phase) == ("chat", "v1", "try", "requested")
            with pytest.raises(TimeoutError):
                await operation.wait(0.02)
            await switcher.abort_switch(operation.id, reason="no")
            ended = await operation.wait(5)
            assert (ended.phase, ended.reason) == ("aborted", "no")

    async def _join(store: MemoryStore) -> None:
        async with connected(store) as other:
            import msgspec

            from turnout.workers.ports import Request

            await other._plane.ask(  # pyright: ignore[reportPrivateUsage]
                "worker", "worker.join", Request("j", "w1", msgspec.Raw(WORKER)), 1
            )

    runner.run(story())


def test_a_wait_comes_back_where_a_person_must_decide(store: MemoryStore, runner: asyncio.Runner) -> None:
    canary_held(store)

    async def story() -> None:
        async with connected(store) as client:
            operation = SwitchOperation(client, "sw-1")
            with pytest.raises(TimeoutError):
                await operation.wait(0.02)
            assert (await operation.wait(5, stop_at_hold=True)).phase == "paused"
            # a pause that ends by itself is no hold
            switcher = ModelSwitcher(client)
            await switcher.promote("sw-1", 1)
            await switcher.pause("sw-1", 3600.0, reason="lunch")
            with pytest.raises(TimeoutError):
                await operation.wait(0.02, stop_at_hold=True)
            await switcher.resume("sw-1")
            assert (await operation.status()).phase == "stepped"

    runner.run(story())


def test_policies_are_set_and_followed(store: MemoryStore, runner: asyncio.Runner) -> None:
    serving(store)
    policy: dict[str, object] = {"strategy": "canary", **STEPS}

    async def story() -> None:
        async with connected(store) as client:
            switcher = ModelSwitcher(client)
            assert await switcher.set_policy("chat", "careful", policy)
            assert not await switcher.set_policy("chat", "careful", policy)
            assert await switcher.get_policies("chat") == {"careful": policy}
            plan = await switcher.plan_switch("chat", "v2", policy="careful")
            assert [stage.weight for stage in plan.stages] == [5, 50, 100]
            view = await (await switcher.switch_model("chat", "v2", policy="careful")).status()
            assert (view.strategy, view.policy, view.parameters) == ("canary", "careful", STEPS)
            assert await switcher.remove_policy("chat", "careful")
            assert await switcher.get_policies("chat") == {}

    runner.run(story())


def test_health_evidence_and_impact_are_asked_for(store: MemoryStore, runner: asyncio.Runner) -> None:
    canary_held(store)

    async def story() -> None:
        async with connected(store) as client:
            monitor = HealthMonitor(client)
            report = await monitor.check_model_health("chat")
            assert [one.version for one in report.versions] == ["v1", "v2"]
            judgement = (await monitor.check_evidence("sw-1")).judgement
            assert judgement is not None
            assert judgement.step == 1
            impact = await monitor.monitor_switch_impact("sw-1")
            assert impact is not None
            assert impact.during.requests == 0
            with pytest.raises(CommandRejected, match="model_unknown"):
                await monitor.check_model_health("chit")

    runner.run(story())


def test_a_lost_answer_is_asked_for_again_with_the_same_id(store: MemoryStore, runner: asyncio.Runner) -> None:
    async def story() -> None:
        plane = FlakyPlane(store, lost=2)
        await plane.start()
        client = Client(plane, "alice")
        await DynamicModelRegistry(BaseRegistry(), client).register_model("chat", "v1", FAKE)
        assert len(plane.ids) == 3
        assert len(set(plane.ids)) == 1

    runner.run(story())
    assert [r.type for r in store.log] == ["ModelRegistered", "VersionRegistered"]


def test_an_infrastructure_error_is_retried_and_then_raised_as_such(store: MemoryStore, runner: asyncio.Runner) -> None:
    failed = json.dumps({"status": "error", "code": "store_full", "reason": "the disk is full", "hint": "h"}).encode()

    async def story() -> None:
        plane = FlakyPlane(store, lost=0, failures=(failed,) * 100)
        await plane.start()
        from turnout.core.model import RegisterVersion

        with pytest.raises(Unavailable, match="the disk is full"):
            await Client(plane, "a").send("version.register", RegisterVersion("chat", "v1", FAKE), deadline_s=0.3)
        assert len(plane.ids) > 1

    runner.run(story())


def test_a_bug_of_the_controller_is_loud_and_not_retried(store: MemoryStore, runner: asyncio.Runner) -> None:
    import msgspec

    bug = msgspec.json.encode(Failed("bug", "turnout failed to decide", "report it"))

    async def story() -> None:
        plane = FlakyPlane(store, lost=0, failures=(bug,))
        await plane.start()
        from turnout.core.model import RegisterVersion

        with pytest.raises(ControllerBug, match="report it"):
            await Client(plane, "a").send("version.register", RegisterVersion("chat", "v1", FAKE))
        assert len(plane.ids) == 1

    runner.run(story())


def test_an_architecture_that_the_engine_does_not_name_is_refused(
    store: MemoryStore, runner: asyncio.Runner, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalML"]}')
    engine = EngineSpec("vllm", str(tmp_path))
    base = BaseRegistry({}, (Engine("vllm", "", frozenset(("LlamaForCausalLM", "GPT2LMHeadModel"))),))

    async def story() -> None:
        async with connected(store) as client:
            registry = DynamicModelRegistry(base, client)
            with pytest.raises(CommandRejected) as caught:
                await registry.register_model("chat", "v1", engine)
            assert caught.value.answer.code == "architecture_unknown"
            assert "the nearest that it names: LlamaForCausalLM" in caught.value.answer.reason
            await registry.register_model("chat", "v1", engine, trust_architecture=True)

    runner.run(story())


def test_what_can_not_be_judged_here_is_not_refused(tmp_path: Path) -> None:
    base = BaseRegistry({}, (Engine("vllm", "", frozenset(("LlamaForCausalLM",))),))
    assert base.problem(EngineSpec("vllm", "/not/here")) is None
    assert base.problem(EngineSpec("fake")) is None
    assert BaseRegistry().problem(EngineSpec("vllm", str(tmp_path))) is None
    for text in ("", "[]", '{"architectures": []}', '{"architectures": [3]}', "{"):
        (tmp_path / "config.json").write_text(text)
        assert architecture(tmp_path) == ""
        assert base.problem(EngineSpec("vllm", str(tmp_path))) is None


def test_the_names_of_an_engine_are_read_without_importing_it(tmp_path: Path) -> None:
    models = tmp_path / "lib" / "python3.11" / "site-packages" / "vllm" / "model_executor" / "models"
    models.mkdir(parents=True)
    (models / "registry.py").write_text(
        "raise SystemExit('imported')\n"
        '_TEXT = {"LlamaForCausalLM": ("llama", "Llama"), "GPT2LMHeadModel": ("gpt2", "GPT2")}\n'
        '_ALL: dict = {**_TEXT, "BertModel": ("bert", "Bert")}\n'
    )
    python = tmp_path / "bin" / "python"
    (engine,) = find_engines(str(python))
    assert engine.package == "vllm"
    assert engine.architectures == {"LlamaForCausalLM", "GPT2LMHeadModel", "BertModel"}
    (models / "registry.py").write_text("not python at all (")
    assert find_engines(str(python)) == ()


def test_an_interpreter_without_engines_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        assert name

    monkeypatch.setattr("importlib.util.find_spec", nothing)
    assert find_engines() == ()


def test_all_public_names_are_there_and_nothing_else() -> None:
    for name in turnout.__all__:
        assert getattr(turnout, name) is not None
    assert dir(turnout) == sorted(turnout.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        turnout.nothing  # noqa: B018


def test_importing_turnout_costs_nothing() -> None:
    import subprocess
    import sys

    code = "import sys, turnout; print(sorted(m for m in sys.modules if m.startswith(('turnout.', 'nats', 'rich'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
