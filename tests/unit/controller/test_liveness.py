from __future__ import annotations

from turnout.core.testing import WorldBuilder
from turnout.events.gateway import GatewayJoined, GatewayLost
from turnout.events.worker import WorkerJoined
from turnout.workers.clock import SystemClock
from turnout.workers.controller.liveness import GATEWAY_LEASE_S, WORKER_LEASE_S, Liveness


class HandClock(SystemClock):
    """Seconds that a test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


def told() -> tuple[WorldBuilder, Liveness, HandClock]:
    builder, clock = WorldBuilder(), HandClock()
    builder.happens(GatewayJoined("g1", "http://g1")).happens(WorkerJoined("w1", "h", (), (), 1))
    liveness = Liveness(clock)
    liveness.restart()
    assert liveness.owed(builder.world) == ()
    return builder, liveness, clock


def ids(liveness: Liveness, builder: WorldBuilder) -> list[str]:
    return [owed.writes[0].id for owed in liveness.owed(builder.world)]


def test_who_is_silent_for_a_whole_lease_is_lost() -> None:
    builder, liveness, clock = told()
    clock.seconds += GATEWAY_LEASE_S
    assert ids(liveness, builder) == []
    clock.seconds += 0.1
    assert ids(liveness, builder) == ["g1"]
    clock.seconds += WORKER_LEASE_S - GATEWAY_LEASE_S
    assert ids(liveness, builder) == ["g1", "w1"]


def test_a_beat_is_a_whole_lease_more() -> None:
    builder, liveness, clock = told()
    clock.seconds += GATEWAY_LEASE_S
    liveness.heard("gateway", "g1", b"")
    clock.seconds += GATEWAY_LEASE_S
    assert "g1" not in ids(liveness, builder)


def test_a_new_leader_gives_everybody_a_whole_lease() -> None:
    builder, liveness, clock = told()
    clock.seconds += 1000.0
    liveness.restart()
    assert ids(liveness, builder) == []
    clock.seconds += GATEWAY_LEASE_S + 0.1
    assert ids(liveness, builder) == ["g1"]


def test_who_joins_again_is_not_lost_again_before_its_first_beat() -> None:
    builder, liveness, clock = told()
    clock.seconds += GATEWAY_LEASE_S + 0.1
    assert ids(liveness, builder) == ["g1"]
    builder.happens(GatewayLost("g1", 6.1))
    assert ids(liveness, builder) == []
    builder.happens(GatewayJoined("g1", "http://g1"))
    assert ids(liveness, builder) == []


def test_each_loss_has_an_id_of_its_own_and_the_same_loss_the_same() -> None:
    builder, liveness, clock = told()
    clock.seconds += GATEWAY_LEASE_S + 0.1
    (first,) = liveness.owed(builder.world)
    assert liveness.owed(builder.world)[0].id == first.id
    builder.happens(GatewayLost("g1", 6.1)).happens(GatewayJoined("g1", "http://g1"))
    liveness.owed(builder.world)
    clock.seconds += GATEWAY_LEASE_S + 0.1
    assert liveness.owed(builder.world)[0].id != first.id


def test_what_is_in_flight_is_what_gateways_that_live_have_said_last() -> None:
    _, liveness, clock = told()
    liveness.heard("gateway", "g1", b'{"connected":true,"in_flight":{"chat":{"v1":9}}}')
    liveness.heard("gateway", "g1", b'{"connected":true,"in_flight":{"chat":{"v1":3,"v2":1},"embed":{"v1":5}}}')
    liveness.heard("gateway", "g2", b'{"in_flight":{"chat":{"v1":2}}}')
    liveness.heard("gateway", "g3", b"{}")
    liveness.heard("gateway", "g4", b"beat")
    assert liveness.in_flight("chat") == {"v1": 5, "v2": 1}
    clock.seconds += GATEWAY_LEASE_S
    liveness.heard("gateway", "g2", b'{"in_flight":{"chat":{"v1":2}}}')
    clock.seconds += 0.1
    assert liveness.in_flight("chat") == {"v1": 2}


def test_beats_of_processes_that_are_gone_are_forgotten_after_a_lease() -> None:
    builder, liveness, clock = told()
    liveness.heard("gateway", "g1", b"")
    liveness.heard("gateway", "old", b'{"connected": true, "in_flight": {"chat": {"v1": 2}}}')
    liveness.owed(builder.world)
    assert liveness.in_flight("chat") == {"v1": 2}
    clock.seconds += WORKER_LEASE_S + 0.1
    liveness.owed(builder.world)
    assert liveness.in_flight("chat") == {}
    assert list(getattr(liveness, "_heard")) == [("gateway", "g1")]  # noqa: B009  what it holds is the question
