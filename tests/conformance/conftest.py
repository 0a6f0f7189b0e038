"""The same store, three times."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import docker  # type: ignore[import-untyped]
import pytest
from testcontainers.core.container import DockerContainer

from turnout.events.jetstream import JetStreamStore
from turnout.events.memory import MemoryStore
from turnout.workers.nats import Connection, connect, ensure_streams

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from turnout.events.store import EventStore
    from turnout.workers.clock import SystemClock

IMAGE = "nats:2.15.1"
DOCKER_SOCKET = "/var/run/docker.sock"


@pytest.fixture(scope="session")
def container_url() -> Iterator[str]:
    """A nats-server in a container, where a Docker engine answers."""
    if "DOCKER_HOST" not in os.environ:
        with socket.socket(socket.AF_UNIX) as probe:  # the docker package leaves its socket open where nobody listens
            if probe.connect_ex(DOCKER_SOCKET) != 0:
                pytest.skip(f"no Docker engine listens on {DOCKER_SOCKET}, and DOCKER_HOST is not set")
    engine = docker.from_env()
    engine.ping()  # pyright: ignore[reportUnknownMemberType]
    engine.close()
    with DockerContainer(IMAGE).with_command("-js").with_exposed_ports(4222) as container:
        yield f"nats://{container.get_container_host_ip()}:{container.get_exposed_port(4222)}"


@pytest.fixture(
    params=[
        "memory",
        pytest.param("embedded", marks=pytest.mark.nats),
        pytest.param("embedded-leader-reads", marks=pytest.mark.nats),
        pytest.param("testcontainers", marks=pytest.mark.nats),
    ]
)
def store(request: pytest.FixtureRequest, runner: asyncio.Runner, clock: SystemClock) -> Iterator[EventStore]:
    """An empty event store."""
    if request.param == "memory":
        yield MemoryStore()
    elif request.param == "testcontainers":
        connection = runner.run(_connect_container(request.getfixturevalue("container_url"), clock))
        yield JetStreamStore(connection.nc)
        runner.run(connection.close())
    else:
        replicas = 3 if request.param == "embedded-leader-reads" else 1
        yield JetStreamStore(request.getfixturevalue("connection").nc, replicas=replicas)


async def _connect_container(url: str, clock: SystemClock) -> Connection:
    connection = await connect(url, "test", clock)
    await connection.nc.request("$JS.API.STREAM.DELETE.EVENTS")  # the container serves all tests of the session
    await ensure_streams(connection.nc)
    return connection
