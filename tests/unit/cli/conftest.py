"""A control plane in memory for the command line: a real decider loop on a real log, no NATS, no process."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from turnout.core.config import ModelSwitchingConfig
from turnout.core.handling import Defaults
from turnout.events.memory import MemoryStore
from turnout.workers import client
from turnout.workers.cli import cli
from turnout.workers.client import Client
from turnout.workers.clock import SystemClock
from turnout.workers.controller.activity import QUESTION, Activity
from turnout.workers.controller.commands import Commands
from turnout.workers.controller.health import QUESTIONS, HealthMonitor
from turnout.workers.controller.log import Log
from turnout.workers.ports import Checkpoint, Request, ViewEntry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from turnout.events.envelope import Recorded
    from turnout.events.health import HealthEvent

Turnout = Callable[..., Result]


class _Closed:
    async def close(self) -> None:
        pass


class LocalPlane:
    """What wiring.ControlPlane is, on a store in memory."""

    def __init__(self, store: MemoryStore) -> None:
        self.clock = SystemClock()
        self.store = store
        self.reader = self
        self._log = Log(store, lambda _: None)
        self._commands = Commands(self._log, self.clock, ModelSwitchingConfig(), Defaults())
        self._activity = Activity(self.clock)
        self.health = HealthMonitor(self._log.world, self.clock, ModelSwitchingConfig(), lambda: None, lambda _: {})

    async def start(self) -> None:
        await self._log.follow()

    async def ask(self, role: str, verb: str, request: Request, timeout_s: float) -> bytes:
        if verb == QUESTION:
            return msgspec.json.encode(self._activity.answer(self._log.world))
        if verb in QUESTIONS:
            return msgspec.json.encode(self.health.answer(verb, request.body))
        return msgspec.json.encode(await self._commands.handle(role, verb, request))

    async def log_page(self, after: int) -> tuple[tuple[Recorded, ...], int]:
        return tuple(self.store.log[after:]), 0

    async def snapshot(self, keys: tuple[str, ...]) -> tuple[Mapping[str, ViewEntry], Checkpoint | None]:
        views = self._log.views
        kinds = {key.partition(".")[0] for key in keys}
        entries = {
            key: ViewEntry(key, value, views.sequence)
            for key, value in views.everything().items()
            if key in keys or (f"{key.partition('.')[0]}.*" in keys and key.partition(".")[0] in kinds)
        }
        return entries, Checkpoint(views.sequence, views.log, 1)

    async def watch(self, keys: tuple[str, ...], changed: Callable[[Mapping[str, ViewEntry], int], None]) -> _Closed:
        entries, checkpoint = await self.snapshot(keys)
        changed(entries, checkpoint.sequence if checkpoint else 0)
        return _Closed()


@pytest.fixture
def store() -> MemoryStore:
    """The log behind ``turnout``."""
    return MemoryStore()


@pytest.fixture
def tell(store: MemoryStore) -> Callable[..., dict[str, Any]]:
    """Send a command of any role, as a worker or gateway would: ``tell("worker", "worker.join", {…})``."""
    import asyncio

    def send(role: str, verb: str, body: dict[str, object]) -> dict[str, Any]:
        async def go() -> bytes:
            plane = LocalPlane(store)
            await plane.start()
            return await plane.ask(
                role, verb, Request(plane.clock.id(), "t", msgspec.Raw(json.dumps(body).encode())), 1
            )

        answer: dict[str, Any] = json.loads(asyncio.run(go()))
        return answer

    return send


@pytest.fixture
def samples() -> list[HealthEvent]:
    """What the controllers have heard from gateways; empty, for a test to fill."""
    return []


@pytest.fixture
def turnout(store: MemoryStore, samples: list[HealthEvent], monkeypatch: pytest.MonkeyPatch) -> Turnout:
    """Run the command line: ``turnout("models", "--json")``."""

    @asynccontextmanager
    async def connect(url: str = "", *, actor: str = "") -> AsyncGenerator[Client]:
        plane = LocalPlane(store)
        await plane.start()
        for event in samples:
            plane.health.heard(event)
        yield Client(plane, actor or "alice")

    monkeypatch.setattr(client, "connect", connect)

    def run(*args: str) -> Result:
        return CliRunner().invoke(cli, args, prog_name="turnout")

    return run
