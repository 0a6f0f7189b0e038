"""Requests that wait for an instance: in order, within bounds, until a revision with one comes or their time is up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from turnout.events.route import Endpoint, Hold, Split
from turnout.projections.routing import RouteView
from turnout.workers.gateway.holding import ASK_S, Holding

if TYPE_CHECKING:
    from turnout.workers.gateway.errors import Refusal

HOLD = Hold(3, 60.0, wake=True)
READY = (Split("v1", 100.0, (Endpoint("i1", "unix:/i1"),)),)


class Request:
    """A waiter that keeps what it is told."""

    def __init__(self, holding: Holding, name: str, told: list[str], size: int = 10) -> None:
        self.holding, self.name, self.told, self.size = holding, name, told, size

    def go_on(self) -> None:
        self.holding.leave("chat", self, 0.0)
        self.told.append(f"{self.name} goes on")

    def give_up(self, refusal: Refusal) -> None:
        self.holding.leave("chat", self, 0.0)
        self.told.append(f"{self.name} {refusal.code}")

    def still_waits(self, seconds: float) -> None:
        self.told.append(f"{self.name} {seconds:g} s")


class Gateway:
    """A holding with one model, and what it asks for."""

    def __init__(self, hold: Hold | None = HOLD, most_bytes: int = 1000) -> None:
        self.holding = Holding(most_bytes)
        self.told: list[str] = []
        self.asked: list[tuple[str, int]] = []
        self.holding.ask = lambda model, revision: self.asked.append((model, revision))
        self.revision = 0
        self.route(hold)

    def route(self, hold: Hold | None, splits: tuple[Split, ...] = ()) -> None:
        self.revision += 1
        self.holding.applied(RouteView("chat", self.revision, splits, hold=hold))

    def request(self, name: str, now: float = 0.0, size: int = 10) -> Request:
        request = Request(self.holding, name, self.told, size)
        refusal = self.holding.wait("chat", request, now)
        if refusal is not None:
            self.told.append(f"{name} {refusal.code}")
            assert (refusal.status, refusal.retry_after) == (503, 5)
        return request

    @property
    def held(self) -> int:
        return sum(count for _, count in self.holding.counts())


def test_a_model_without_hold_lets_nobody_wait() -> None:
    assert not Gateway(None).holding.waits("chat")
    assert not Gateway().holding.waits("other")


def test_requests_go_on_in_their_order_when_a_revision_has_an_instance() -> None:
    one = Gateway()
    for name in "abc":
        one.request(name)
    one.route(Hold(3, 60.0, wake=True), READY)
    assert one.told == ["a goes on", "b goes on", "c goes on"]
    assert (one.held, one.holding.waits("chat")) == (0, False)


def test_a_full_queue_and_full_memory_refuse_the_next_and_keep_the_others() -> None:
    one = Gateway(most_bytes=100)
    one.request("a", size=60)
    one.request("big", size=50)
    one.request("b")
    one.request("c")
    one.request("d")
    assert one.told == ["big queue_full", "d queue_full"]
    assert one.held == 3
    assert one.holding.refused == {("chat", "queue_full"): 2}


def test_who_leaves_makes_room_for_the_next() -> None:
    one = Gateway(Hold(1, 60.0))
    one.holding.leave("chat", one.request("a"), 1.0)
    one.request("b", 1.0)
    assert (one.told, one.held) == ([], 1)


def test_a_request_waits_as_long_as_it_may_and_hears_that_it_still_does() -> None:
    one = Gateway()
    one.request("a", 0.0)
    one.request("b", 30.0)
    one.holding.sweep(4.0)
    one.holding.sweep(5.0)
    one.holding.sweep(6.0)
    one.holding.sweep(60.0)
    assert one.told == ["a 5 s", "a load_timeout", "b 30 s"]


def test_a_model_on_demand_is_asked_for_at_once_and_again_while_somebody_waits() -> None:
    one = Gateway()
    one.request("a", 0.0)
    one.request("b", 0.5)
    one.holding.sweep(1.0)
    assert one.asked == [("chat", 1)]
    one.holding.sweep(ASK_S)
    assert one.asked == [("chat", 1)] * 2
    one.route(Hold(3, 60.0, True, 0))
    one.holding.sweep(ASK_S + 0.1)
    assert one.asked[-1] == ("chat", 2)


def test_what_a_switch_holds_is_not_asked_for() -> None:
    one = Gateway(Hold(3, 60.0))
    one.request("a")
    one.holding.sweep(30.0)
    assert one.asked == []


@pytest.mark.parametrize(
    ("hold", "code"),
    [(Hold(3, 60.0, True, 1, "no memory"), "load_failed"), (None, "not_held")],
)
def test_a_failed_load_or_a_model_that_is_not_on_demand_any_more_ends_the_wait(hold: Hold | None, code: str) -> None:
    one = Gateway()
    one.request("a")
    one.route(hold)
    assert (one.told, one.held) == ([f"a {code}"], 0)


def test_a_failure_of_before_refuses_nobody() -> None:
    one = Gateway(Hold(3, 60.0, True, 1, "no memory"))
    one.request("a")
    one.route(Hold(5, 60.0, True, 1, "no memory"))
    assert (one.told, one.held) == ([], 1)


def test_nobody_waits_in_a_gateway_that_has_stopped() -> None:
    one = Gateway()
    one.request("a")
    one.holding.close()
    assert one.told == ["a gateway_stopping"]


def test_how_long_requests_have_waited_is_counted() -> None:
    one = Gateway()
    one.holding.leave("chat", one.request("a", 0.0), 2.0)
    assert sum(one.holding.waited["chat"].counts) == 1
    assert one.holding.waited["chat"].sum_s == 2.0
