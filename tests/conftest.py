"""What all tests share: a loop to run coroutines on, a bounded wait, and real nats-servers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from turnout.workers.clock import SystemClock
from turnout.workers.embedded import EmbeddedServer, EmbeddedServerError, find_binary
from turnout.workers.nats import Connection, connect, ensure_streams

if TYPE_CHECKING:
    from pathlib import Path

pytest.register_assert_rewrite("turnout.core.testing")

settings.register_profile("turnout", deadline=None)  # how long an example takes says nothing about what it tests
settings.load_profile("turnout")

Until = Callable[[Callable[[], object]], Coroutine[Any, Any, None]]
MakeServer = Callable[..., EmbeddedServer]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for the whole test: ``runner.run(coroutine)``."""
    with asyncio.Runner() as one:
        yield one


@pytest.fixture
def until() -> Until:
    """``await until(lambda: condition)``: wait for it, at most 20 s."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  any condition, not only one with an event
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture
def clock() -> SystemClock:
    """The real clock."""
    return SystemClock()


@pytest.fixture(scope="session")
def nats_binary() -> Path:
    """Where nats-server is; without it the test is skipped, or fails where ``CI`` is set."""
    try:
        return find_binary()
    except EmbeddedServerError as e:
        if os.environ.get("CI"):
            pytest.fail(str(e))
        pytest.skip(str(e))


@pytest.fixture
def make_nats_server(
    nats_binary: Path, tmp_path: Path, clock: SystemClock, runner: asyncio.Runner
) -> Iterator[MakeServer]:
    """Start a nats-server on a folder of this test: ``make_nats_server("a", port=…)``. Stopped at the end."""
    servers: list[EmbeddedServer] = []

    def make(name: str = "nats", **settings: object) -> EmbeddedServer:
        server = EmbeddedServer(tmp_path / name, clock, **settings)  # type: ignore[arg-type]
        servers.append(server)
        runner.run(server.start())
        return server

    yield make
    for server in servers:
        server.kill()


@pytest.fixture
def nats_server(make_nats_server: MakeServer) -> EmbeddedServer:
    """A nats-server of this test's own (starting one takes 50 ms), without streams."""
    return make_nats_server()


@pytest.fixture
def connection(nats_server: EmbeddedServer, clock: SystemClock, runner: asyncio.Runner) -> Iterator[Connection]:
    """A connection to ``nats_server``, which has turnout's streams."""
    made = runner.run(connect(nats_server.url, "test", clock))
    runner.run(ensure_streams(made.nc))
    yield made
    runner.run(made.close())
