"""The client without asyncio: every method of the other one is there, waits, and answers and raises the same."""

from __future__ import annotations

import asyncio
import inspect
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.cli.conftest import LocalPlane

import turnout
from turnout import BaseRegistry, CommandRejected, EngineSpec, sync
from turnout.workers import client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from turnout.events.memory import MemoryStore

#: What each class must have at least: the methods that the design names, and those of the README.
METHODS: dict[str, set[str]] = {
    "Client": {"models", "model", "switch", "find_switch", "views", "log"},
    "DynamicModelRegistry": {"register_model", "deregister_model", "get_active_model", "get_loaded", "switch_model"},
    "HealthMonitor": {"check_model_health", "check_version_health", "check_evidence", "monitor_switch_impact"},
    "ModelSwitcher": {
        *("switch_model", "plan_switch", "get_switch_status", "get_switch_report"),
        *("abort_switch", "promote", "undo", "retry"),
    },
    "ModelVersionManager": {"create_version", "get_version", "rollback_to_version", "compare_versions"},
    "SwitchOperation": {"status", "wait", "progress", "abort", "promote", "pause", "resume"},
}
FAKE = EngineSpec("fake")


@pytest.fixture(autouse=True)
def local(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """``connect`` leads to a control plane in memory."""

    @asynccontextmanager
    async def connect(url: str = "", *, actor: str = "") -> AsyncGenerator[client.Client]:
        plane = LocalPlane(store)
        await plane.start()
        yield client.Client(plane, actor)

    monkeypatch.setattr(client, "connect", connect)


@pytest.mark.parametrize("name", [name for name in sync.__all__ if name != "connect"])
def test_each_class_has_the_methods_of_its_twin_with_the_same_arguments(name: str) -> None:
    there: Any = getattr(turnout, name)
    here: Any = getattr(sync, name)
    methods: set[str] = {key for key in dir(there) if not key.startswith("_")} & set(dir(here))
    assert METHODS[name] <= methods
    for key in methods:
        one: Any = inspect.getattr_static(there, key)
        if inspect.isfunction(one):
            assert list(inspect.signature(one).parameters) == list(inspect.signature(getattr(here, key)).parameters), (
                key
            )


def test_a_version_is_registered_and_a_switch_asked_for_without_asyncio() -> None:
    with sync.connect(actor="alice") as connected:
        registry = sync.DynamicModelRegistry(BaseRegistry(), connected)
        made = registry.register_model("chat", "v1", FAKE, note="first")
        assert (made.version, made.registered_by) == ("v1", "ops:alice")
        assert sync.ModelVersionManager(registry, connected).get_version("chat", "v1") == made
        assert list(connected.models()) == ["chat"]
        assert [one.type for one in connected.log()] == ["ModelRegistered", "VersionRegistered"]


def test_a_refusal_is_raised_here() -> None:
    with sync.connect() as connected, pytest.raises(CommandRejected, match="model_unknown"):
        sync.ModelSwitcher(connected).switch_model("nope", "v1")


def test_it_works_beside_a_running_loop_and_leaves_no_thread() -> None:
    async def program() -> list[str]:
        with sync.connect() as connected:
            return list(connected.models())

    assert asyncio.run(program()) == []
    assert "turnout client" not in [thread.name for thread in threading.enumerate()]
