"""The management API on a control plane in memory: asked in-process, no socket, no NATS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.unit.cli.conftest import LocalPlane

from turnout.events.memory import MemoryStore
from turnout.workers.admin.app import build
from turnout.workers.admin.settings import AdminSettings
from turnout.workers.client import Client

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from turnout.workers.admin.door import Door

TOKEN = "token-of-these-tests"
FAKE: dict[str, Any] = {"engine": {"kind": "fake"}}


class Api:
    """Asks, with the token unless another header is given.

    Attributes:
        plane: behind the app; ``fails`` is raised at the next commands where it is set.
        connected: what the app is told of its connection.
    """

    def __init__(self, runner: asyncio.Runner, store: MemoryStore, settings: AdminSettings | None = None) -> None:
        self._runner = runner
        self.plane = LocalPlane(store)
        runner.run(self.plane.start())
        self.connected = True
        self.app: Door = build(Client(self.plane, "http"), TOKEN, settings or AdminSettings(), lambda: self.connected)

    def __call__(self, method: str, path: str, **more: Any) -> httpx.Response:
        """One request."""

        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            headers = {"authorization": f"Bearer {TOKEN}"} | more.pop("headers", {})
            async with httpx.AsyncClient(transport=transport, base_url="http://admin", timeout=30) as client:
                return await client.request(method, path, headers=headers, **more)

        return self._runner.run(go())

    def done(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """One request that must succeed; its JSON."""
        answer = self(method, path, **more)
        assert answer.status_code < 300, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def tell(self, role: str, verb: str, body: bytes) -> None:
        """Send a command of a worker or gateway."""
        import msgspec

        from turnout.workers.ports import Request

        raw = self._runner.run(self.plane.ask(role, verb, Request(self.plane.clock.id(), "t", msgspec.Raw(body)), 1))
        assert b'"accepted"' in raw, raw

    def worker(self) -> None:
        """A worker for fake engines joins."""
        body = b'{"worker": "w1", "host": "h", "engines": ["fake"], "devices": [], "capacity": 4}'
        self.tell("worker", "worker.join", body)


@pytest.fixture
def store() -> MemoryStore:
    """The log behind the app."""
    return MemoryStore()


@pytest.fixture
def make_api(runner: asyncio.Runner, store: MemoryStore) -> Callable[..., Api]:
    """An app with settings of the test's own."""

    def make(**settings: Any) -> Api:
        return Api(runner, store, AdminSettings(**settings))

    return make


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    """The app with the settings that are there without any."""
    return make_api()
