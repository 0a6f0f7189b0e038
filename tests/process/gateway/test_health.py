"""What a real gateway measures of its engines, for whom it counts it, and shadow copies beside it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from tests.process.gateway.stage import BODY, OK, Ask, Engine, Peer, Stage, on_stage, polite

from turnout.events.health import HealthEvent, HealthSampled, ShadowSampled
from turnout.events.route import Endpoint, Mirror, Split
from turnout.projections.routing import RouteView
from turnout.workers.gateway import health, mirror
from turnout.workers.gateway.settings import TimeLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

pytestmark = pytest.mark.process

EMPTY = b'{"choices":[{"message":{"role":"assistant","content":""},"finish_reason":"stop"}]}'


class Samples:
    """What the gateway publishes, added up."""

    def __init__(self, stage: Stage) -> None:
        self.events: list[HealthEvent] = []
        stage.plane.on_sampled(self.events.append)

    def of(self, version: str) -> list[HealthSampled]:
        return [e for e in self.events if isinstance(e, HealthSampled) and e.version == version]

    def outcomes(self, version: str) -> dict[str, int]:
        """How requests ended that were assigned to the version."""
        return added(sample.outcomes for sample in self.of(version))

    def signs(self, version: str) -> dict[str, int]:
        return added(sample.signs for sample in self.of(version))

    def shadow(self, field: Callable[[ShadowSampled], int]) -> int:
        return sum(field(e) for e in self.events if isinstance(e, ShadowSampled))


def added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total


def beside(
    stage: Stage, splits: tuple[Split, ...], *engines: Engine, percent: float = 100.0, revision: int = 1
) -> None:
    """A route with a mirror."""
    endpoints = tuple(Endpoint(engine.name, engine.address) for engine in engines)
    mirrors = (Mirror("v2", percent, endpoints),) if engines else ()
    stage.plane.apply(RouteView("chat", revision, splits, "sw-1", 30.0, mirrors=mirrors, candidate="v2"))


@on_stage()
async def test_a_failed_try_is_charged_to_the_version_that_was_chosen_first(s: Stage) -> None:
    gone, good = await s.engine("gone"), await s.engine("good")
    await gone.stop()
    samples = Samples(s)
    s.route(s.split("v2", gone, weight=50), s.split("v1", good, weight=50))
    client = await s.client()
    for _ in range(20):
        assert (await client.ask()).status == 200
    await s.wait(lambda: sum(samples.outcomes("v1").values()) + sum(samples.outcomes("v2").values()) == 20)
    refused = samples.outcomes("v2")["refused"]
    assert refused in (9, 10, 11)
    assert samples.outcomes("v2") == {"refused": refused}
    assert samples.outcomes("v1") == {"ok": 20 - refused}, "and nothing for those that it saved"
    assert samples.of("v2")[-1].run == refused


@on_stage()
async def test_an_error_of_a_candidate_is_told_without_waiting_for_the_interval(s: Stage) -> None:
    async def cut(peer: Peer) -> None:
        await peer.ask()
        await peer.begin_stream()
        await peer.event(b'{"choices":[]}')
        peer.reset()

    bad, good = await s.engine("bad", cut), await s.engine("good")
    samples = Samples(s)
    s.route(s.split("v2", bad, weight=10), s.split("v1", good, weight=90))
    with patch.object(health, "FAST_S", 1e9):  # nothing is due but what hurries
        while not s.failures("v2"):
            await (await s.client()).ask()
        await s.wait(lambda: samples.outcomes("v2") == {"cut": 1})
    assert samples.of("v2")[0].unit_errors == 1


@on_stage()
async def test_what_goes_wrong_inside_a_stream_is_seen(s: Stage) -> None:
    async def script(peer: Peer) -> None:
        ask = await peer.ask()
        kind = ask.headers["user-agent"]
        await peer.begin_stream()
        if kind == "error":
            await peer.event(b'{"error":{"message":"EngineCore"}}')
        elif kind == "abort":
            await peer.event(b'{"choices":[{"delta":{},"finish_reason":"abort"}]}')
        elif kind == "empty":
            await peer.event(b'{"choices":[{"delta":{"content":" "},"finish_reason":"stop"}]}')
        else:
            for n in range(20):
                await peer.event(b'{"choices":[{"delta":{"content":" word%d"},"finish_reason":null}]}' % n)
            await peer.event(b'{"choices":[{"delta":{},"finish_reason":"length"}]}')
        if kind == "no done":
            await peer.send(b"0\r\n\r\n")
        else:
            await peer.end_stream()

    engine = await s.engine("e", script)
    samples = Samples(s)
    s.route(s.split("v1", engine, weight=50), s.split("v2", engine, weight=50))
    for kind in ("error", "abort", "empty", "no done", "long"):
        client = await s.client()
        await client.ask(head=f"user-agent: {kind}\r\n".encode())

    def total(of: Callable[[str], dict[str, int]]) -> dict[str, int]:
        return added((of("v1"), of("v2")))

    await s.wait(lambda: sum(total(samples.outcomes).values()) == 5)
    assert total(samples.outcomes) == {"error_event": 1, "aborted": 1, "cut": 1, "ok": 2}
    assert total(samples.signs) == {"empty": 1, "length": 1}
    timed = [e for e in samples.of("v1") + samples.of("v2") if e.token_ms]
    assert sum(sum(e.token_ms.values()) for e in timed) == 1, "one value for the only long answer"
    text = (await (await s.client()).get("/metrics")).body.decode()
    assert 'turnout_gateway_outcomes_total{model="chat",outcome="error_event"' in text
    assert 'turnout_gateway_signs_total{model="chat",sign="empty"' in text


@on_stage(allow_pin=True)
async def test_a_request_that_names_its_version_is_no_part_of_the_comparison(s: Stage) -> None:
    engine = await s.engine("e")
    samples = Samples(s)
    s.route(s.split("v1", engine, weight=50), s.split("v2", engine, weight=50))
    client = await s.client()
    await client.ask(head=b"x-turnout-version: v2\r\n")
    await s.wait(lambda: samples.outcomes("v2") == {"ok": 1})
    assert [(sample.requests, sample.assigned, sample.first_ms) for sample in samples.of("v2")] == [(1, 0, {})]


@on_stage(limits=TimeLimits(first_byte_s=0.3, between_s=30.0, total_s=60.0))
async def test_silence_and_clients_that_leave_are_told_apart(s: Stage) -> None:
    async def silent(peer: Peer) -> None:
        await peer.ask()
        await peer.gone()

    engine = await s.engine("e", silent)
    samples = Samples(s)
    s.route(s.split("v1", engine, weight=50), s.split("v2", engine, weight=50))
    leaving = await s.client()
    await leaving.post()
    await s.wait(lambda: engine.asked)
    leaving.close()
    await s.wait(lambda: not s.in_flight)
    assert (await (await s.client()).ask()).status == 504
    await s.wait(lambda: sum(map(len, (samples.outcomes("v1"), samples.outcomes("v2")))) == 2)
    assert added((samples.outcomes("v1"), samples.outcomes("v2"))) == {"client_gone": 1, "timeout": 1}
    assert sum(e.unit_errors for e in samples.of("v1") + samples.of("v2")) == 1


@on_stage()
async def test_a_late_first_byte_is_told_of_while_it_is_still_awaited(s: Stage) -> None:
    release = asyncio.Event()

    async def hanging(peer: Peer) -> None:
        while True:
            await peer.ask()
            await peer.until(release)
            await peer.answer()

    engine = await s.engine("e", hanging)
    samples = Samples(s)
    s.route(s.split("v1", engine, weight=50), s.split("v2", engine, weight=50))
    for model in s.plane.context.health._models.values():  # pyright: ignore[reportPrivateUsage]
        model.slow_s = 0.2
    client = await s.client()
    await client.post()
    await s.wait(lambda: added((samples.signs("v1"), samples.signs("v2"))) == {"slow": 1})
    assert s.in_flight == 1
    release.set()
    assert (await client.answer()).status == 200
    await s.wait(lambda: added((samples.outcomes("v1"), samples.outcomes("v2"))) == {"ok": 1})
    first = [e.first_ms for e in samples.of("v1") + samples.of("v2")]
    assert sum(sum(h.values()) for one in first for h in one.values()) == 1, "counted once"


@on_stage()
async def test_what_is_left_is_told_when_the_gateway_stops(s: Stage) -> None:
    engine = await s.engine("e")
    samples = Samples(s)
    s.route(s.split("v1", engine))
    client = await s.client()
    await client.ask()
    assert samples.outcomes("v1") == {}, "the interval is a minute"
    client.close()
    await s.plane.stop()
    assert samples.outcomes("v1") == {"ok": 1}


@on_stage()
async def test_complaint_13_a_shadow_that_hangs_changes_nothing_for_the_primary(s: Stage) -> None:
    """Ingress-nginx halved the throughput of production, APISIX made the next request wait for the mirror."""
    gone: list[Peer] = []

    async def hanging(peer: Peer) -> None:
        await peer.ask()
        await peer.gone()
        gone.append(peer)

    primary, shadow = await s.engine("primary"), await s.engine("shadow", hanging)
    samples = Samples(s)
    beside(s, (s.split("v1", primary),), shadow)
    clients = [await s.client() for _ in range(8)]
    for _ in range(10):  # each client's next request goes out while the copy of the one before hangs
        for answer in await asyncio.gather(*(client.ask() for client in clients)):
            assert (answer.status, answer.body, answer.headers["x-turnout-version"]) == (200, OK, "v1")
    assert len(primary.asked) == 80
    await s.wait(lambda: len(shadow.asked) == mirror.MOST)
    await s.wait(lambda: samples.shadow(lambda e: e.dropped) == 80 - mirror.MOST)
    assert samples.outcomes("v1")["ok"] > 0
    assert s.failures("v1") == {}
    assert not gone

    # Once the route drops the mirror its engine is rid of all of them, and quiet.
    beside(s, (s.split("v1", primary),), revision=2)
    await s.wait(lambda: len(gone) == mirror.MOST and not shadow.open)
    assert samples.shadow(lambda e: e.copies) == 0, "nothing is known of them"


@on_stage()
async def test_a_copy_begins_after_the_first_byte_of_its_primary(s: Stage) -> None:
    release = asyncio.Event()

    async def waiting(peer: Peer) -> None:
        await peer.ask()
        await release.wait()
        await peer.answer()

    primary, shadow = await s.engine("primary", waiting), await s.engine("shadow")
    beside(s, (s.split("v1", primary),), shadow)
    client = await s.client()
    await client.post()
    await s.wait(lambda: primary.asked)
    other = await s.client()
    await other.get("/healthz")  # the gateway has been round its loop since
    assert not shadow.asked
    release.set()
    await client.answer()
    await s.wait(lambda: shadow.asked)
    copy: Ask = shadow.asked[0]
    assert (copy.line, copy.body) == (primary.asked[0].line, BODY)
    assert copy.headers["x-request-id"] == primary.asked[0].headers["x-request-id"] + "-copy"


@on_stage()
async def test_copies_and_primaries_are_compared_in_pairs(s: Stage) -> None:
    async def failing(peer: Peer) -> None:
        for n in range(1000):
            await peer.ask()
            if n % 2:
                await peer.answer(b"{}", "500 Internal Server Error")
            else:
                await peer.answer(EMPTY)

    primary, shadow = await s.engine("primary", polite), await s.engine("shadow", failing)
    samples = Samples(s)
    beside(s, (s.split("v1", primary),), shadow)
    client = await s.client()
    for n in range(1, 9):
        await client.ask()
        await s.wait(lambda n=n: len(shadow.asked) == n)  # type: ignore[misc]
        await s.wait(lambda: not s.plane.context.copies.running)
    await s.wait(lambda: samples.shadow(lambda e: e.copies) == 8)
    assert samples.shadow(lambda e: e.both_ok) == samples.shadow(lambda e: e.only_copy_failed) == 4
    assert samples.shadow(lambda e: e.signs.get("empty", 0)) == 4
    assert shadow.connections == 1, "kept open from copy to copy"
    assert samples.outcomes("v2") == {}, "copies are no requests"


@on_stage()
async def test_a_copy_to_nobody_fails_and_the_primary_does_not(s: Stage) -> None:
    primary, shadow = await s.engine("primary"), await s.engine("shadow")
    await shadow.stop()
    samples = Samples(s)
    beside(s, (s.split("v1", primary),), shadow)
    client = await s.client()
    for _ in range(5):
        assert (await client.ask()).status == 200
    await s.wait(lambda: samples.shadow(lambda e: e.only_copy_failed) == 5)
