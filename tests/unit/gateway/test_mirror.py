"""Copies: who is copied, within which bound, what makes a pair, and what a route that drops a mirror leaves behind."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from turnout.events.health import HealthEvent, ShadowSampled
from turnout.events.route import Endpoint, Mirror, Split
from turnout.projections.routing import RouteView
from turnout.workers.clock import SystemClock
from turnout.workers.gateway import mirror
from turnout.workers.gateway.health import HealthCollector
from turnout.workers.gateway.mirror import Copies
from turnout.workers.gateway.request import Request, read_head
from turnout.workers.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from turnout.workers.gateway.mirror import Copy

TIME = datetime(2026, 1, 2, tzinfo=UTC)


def request(
    body: bytes = b"{}", path: str = "/v1/chat/completions", kind: str = "application/json", method: str = "POST"
) -> Request:
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return Request(read_head(head.encode()), b"req-1", body)


class Rig:
    """Copies whose connections a test holds in its hand."""

    def __init__(self) -> None:
        self.collector = HealthCollector(60.0)
        self.copies = Copies(GatewaySettings(), asyncio.get_running_loop(), SystemClock().monotonic, 0.0)
        self.asked: list[tuple[str, Copy]] = []
        self.kept: frozenset[str] = frozenset()
        self.revision = 0
        self.now = 0.0
        pool = self.copies.pool
        pool.connect = lambda address, exchange: self.asked.append((address, exchange))  # type: ignore[method-assign,arg-type]
        pool.keep = lambda addresses: setattr(self, "kept", addresses)  # type: ignore[method-assign]

    def route(self, *mirrors: Mirror, model: str = "chat") -> list[ShadowSampled]:
        """Apply the next revision; what it ends."""
        self.revision += 1
        split = Split("v1", 100.0, (Endpoint("a", "unix:/run/a"),))
        view = RouteView(model, self.revision, (split,), "sw-1", mirrors=mirrors, candidate="v2")
        applied = self.collector.apply(view, "g-1", self.now, TIME)
        self.copies.apply(view, applied.shadows)
        return shadows(applied.ended)

    def copy(self, *args: Request) -> Copy | None:
        """Copy a request, as a relay would at its first byte."""
        made = self.copies.copy("chat", *(args or (request(),)))
        return made[0] if made else None

    def take(self) -> ShadowSampled | None:
        """The sample that is due."""
        self.now += 1.0
        found = shadows(self.collector.take("g-1", self.now, TIME))
        return found[0] if found else None


def shadows(events: tuple[HealthEvent, ...] | list[HealthEvent]) -> list[ShadowSampled]:
    return [event for event in events if isinstance(event, ShadowSampled)]


V2 = Mirror("v2", 100.0, (Endpoint("b", "unix:/run/b"),))


def played(case: Callable[[Rig], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def whole() -> None:
            rig = Rig()
            await case(rig)
            await rig.copies.close()
            assert not rig.copies.running

        asyncio.run(whole())

    run.__name__, run.__doc__ = case.__name__, case.__doc__
    return run


@played
async def test_no_more_than_the_bound_are_under_way_the_rest_is_dropped_and_counted(rig: Rig) -> None:
    rig.route(V2)
    made = [rig.copy() for _ in range(mirror.MOST + 5)]
    assert sum(copy is not None for copy in made) == mirror.MOST
    assert len(rig.asked) == mirror.MOST
    for copy in made[:2]:
        assert copy is not None
        copy.connect_failed("nobody there")
        copy.primary_ended("ok", 0.5)
    assert rig.copy() is not None, "who has ended makes room"
    sample = rig.take()
    assert sample is not None
    assert (sample.version, sample.copies, sample.dropped, sample.only_copy_failed) == ("v2", 2, 5, 2)


@played
async def test_a_pair_counts_when_both_have_ended_whoever_is_the_first(rig: Rig) -> None:
    rig.route(V2)
    first, second, third = rig.copy(), rig.copy(), rig.copy()
    assert first is not None
    assert second is not None
    assert third is not None
    first.connect_failed("nobody there")
    assert rig.take() is None
    first.primary_ended("http_error", 0.1)
    second.primary_ended("cut", 0.1)
    assert rig.take() is not None, "only the first"
    second.cancel()
    third.primary_ended("client_gone", 0.1)
    third.connect_failed("nobody there")
    sample = rig.take()
    assert sample is not None
    assert (sample.copies, sample.only_copy_failed, sample.both_failed) == (1, 1, 0), "a client that left is no failure"


@played
async def test_copies_to_an_engine_that_the_route_drops_are_given_up_at_once(rig: Rig) -> None:
    rig.route(V2)
    copy = rig.copy()
    assert copy is not None
    assert rig.kept == {"unix:/run/b"}
    rig.route()
    assert (rig.kept, rig.copies.running, rig.copy()) == (frozenset(), set(), None)
    copy.primary_ended("ok", 0.1)
    assert rig.take() is None, "nothing is known of it"


@played
async def test_copies_that_the_route_still_asks_for_go_on_under_the_revision_that_began_them(rig: Rig) -> None:
    rig.route(V2)
    copy = rig.copy()
    assert copy is not None
    rig.route(V2)
    rig.route(model="other")
    copy.connect_failed("nobody there")
    copy.primary_ended("ok", 0.1)
    sample = rig.take()
    assert sample is not None
    assert (sample.revision, sample.copies) == (1, 1)


@played
async def test_only_what_may_be_asked_twice_is_copied(rig: Rig) -> None:
    rig.route(V2)
    for odd in (
        request(b""),
        request(b"x" * mirror.BODY_MOST_BYTES),
        request(kind="multipart/form-data; boundary=x"),
        request(path="/v1/videos"),
        request(method="DELETE", path="/v1/responses/1"),
    ):
        assert rig.copy(odd) is None
    assert rig.copy(request(path="/v1/embeddings")) is not None


@played
async def test_so_many_percent_are_copied(rig: Rig) -> None:
    rig.route(Mirror("v2", 25.0, V2.endpoints))
    made = [rig.copy() for _ in range(40)]
    assert sum(copy is not None for copy in made) == pytest.approx(10, abs=1)


@played
async def test_copies_to_two_instances_take_turns(rig: Rig) -> None:
    rig.route(Mirror("v2", 100.0, (Endpoint("b", "unix:/run/b"), Endpoint("c", "unix:/run/c"))))
    for _ in range(4):
        rig.copy()
    assert sorted(address for address, _ in rig.asked) == ["unix:/run/b"] * 2 + ["unix:/run/c"] * 2
