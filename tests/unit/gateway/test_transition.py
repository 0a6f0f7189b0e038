"""TransitionManager and RequestTracker: revisions, choices, drains, ejections."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from turnout.events.route import Endpoint, Split
from turnout.projections.routing import RouteView
from turnout.workers.gateway.transition import (
    EJECT_AFTER,
    NOTHING_READY,
    UNKNOWN_MODEL,
    UNKNOWN_VERSION,
    Choice,
    Drained,
    RequestTracker,
    Ticket,
    TransitionManager,
)


def split(version: str, weight: float, *instances: str) -> Split:
    names = instances or (f"{version}-a",)
    return Split(version, weight, tuple(Endpoint(name, f"unix:/run/{name}") for name in names))


def route(revision: int, *splits: Split, drain_s: float = 30.0, left: dict[str, int] | None = None) -> RouteView:
    return RouteView("chat", revision, splits, "salt", drain_s, left or {})


def manager() -> TransitionManager:
    return TransitionManager(RequestTracker())


def choose(m: TransitionManager, key: bytes = b"", now: float = 0.0, pin: str = "") -> Choice:
    choice = m.handle_request_routing("chat", key, now, pin)
    assert isinstance(choice, Choice)
    return choice


def begin(m: TransitionManager, now: float = 0.0) -> Ticket:
    ticket = Ticket(choose(m, now=now))
    m.tracker.begin(ticket)
    return ticket


def test_a_lower_or_equal_revision_changes_nothing() -> None:
    m = manager()
    m.begin_transition(route(5, split("v2", 100)), 0.0)
    assert m.begin_transition(route(4, split("v1", 100)), 0.0) is None
    assert m.begin_transition(route(5, split("v1", 100)), 0.0) is None
    assert choose(m).version == "v2"
    assert m.applied() == {"chat": 5}


def test_a_registered_model_without_a_route_is_known_and_not_ready() -> None:
    m = manager()
    m.begin_transition(route(0), 0.0)
    assert m.handle_request_routing("chat") is NOTHING_READY
    assert m.handle_request_routing("other") is UNKNOWN_MODEL
    assert m.models() == ("chat",)
    assert m.applied() == {}


def test_complaint_12_ten_thousand_users_through_a_rollout_keep_to_their_version_and_never_go_back() -> None:
    """20 requests of each user over 5 → 25 → 50 → 100 %, at two gateways: exact shares, moves one way only."""
    gateways = manager(), manager()
    users = [b"user-%d" % n for n in range(10_000)]
    on_target: set[bytes] = set()
    for revision, weight in enumerate((5.0, 25.0, 50.0, 100.0), start=1):
        for m in gateways:
            m.begin_transition(route(revision, split("v1", 100.0 - weight), split("v2", weight)), 0.0)
        now: set[bytes] = set()
        for user in users:
            versions = {choose(gateways[turn % 2], user).version for turn in range(5)}
            assert len(versions) == 1, "it does not matter which gateway, nor how often"
            if versions == {"v2"}:
                now.add(user)
        assert abs(len(now) / len(users) - weight / 100) < 0.01
        assert on_target <= now, "nobody flips back"
        on_target = now


def test_an_idle_version_that_leaves_is_drained_at_once() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100)), 0.0)
    transition = m.begin_transition(route(2, split("v2", 100)), 0.0)
    assert transition is not None
    assert transition.drained == (Drained("chat", "v1", 2),)
    assert transition.draining == ()


def test_a_busy_version_drains_with_its_last_request_and_says_so_once() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100)), 0.0)
    first, second = begin(m), begin(m)
    transition = m.begin_transition(route(2, split("v2", 100)), 0.0)
    assert transition is not None
    assert (transition.drained, transition.draining) == ((), ("v1",))
    later = m.begin_transition(route(3, split("v2", 100), left={"v1": 2}), 1.0)
    assert later is not None
    assert later.drained == ()
    assert m.request_ended(first) is None
    assert m.request_ended(second) == Drained("chat", "v1", 3)
    after = m.begin_transition(route(4, split("v2", 100), left={"v1": 2}), 2.0)
    assert after is not None
    assert after.drained == ()


def test_no_request_goes_to_a_version_that_has_left() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100)), 0.0)
    begin(m)
    m.begin_transition(route(2, split("v2", 100)), 0.0)
    assert {choose(m).version for _ in range(20)} == {"v2"}
    assert m.handle_request_routing("chat", pin="v1") is UNKNOWN_VERSION


def test_a_version_that_comes_back_stops_draining() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100)), 0.0)
    ticket = begin(m)
    m.begin_transition(route(2, split("v2", 100)), 0.0)
    m.rollback_transition(route(3, split("v1", 100)), 1.0)
    assert m.overdue(1e9) == ()
    assert m.request_ended(ticket) is None
    assert choose(m).version == "v1"


def test_past_the_deadline_requests_are_named_and_what_is_ended_is_counted() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100)), 0.0)
    finished, cut = begin(m), begin(m)
    m.begin_transition(route(2, split("v2", 100), drain_s=10.0), 100.0)
    assert m.overdue(109.9) == ()
    m.request_ended(finished)
    assert m.overdue(110.0) == (cut,)
    assert m.request_ended(cut, cut=True) == Drained("chat", "v1", 2, ended=1)


def test_later_revisions_do_not_move_the_deadline_of_a_drain() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100)), 0.0)
    ticket = begin(m)
    m.begin_transition(route(2, split("v2", 100), drain_s=10.0), 0.0)
    m.begin_transition(route(3, split("v2", 100, "v2-b"), drain_s=0.0), 1.0)
    assert m.overdue(9.0) == ()
    assert m.overdue(10.0) == (ticket,)


def test_a_version_that_came_and_went_between_two_revisions_is_reported() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100)), 0.0)
    transition = m.begin_transition(route(3, split("v1", 100), left={"v0": 1, "v2": 3}), 0.0)
    assert transition is not None
    assert transition.drained == (Drained("chat", "v2", 3),)


def test_only_the_versions_of_this_model_are_touched() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100)), 0.0)
    m.begin_transition(RouteView("other", 1, (split("v1", 100),)), 0.0)
    ticket = begin(m)
    transition = m.begin_transition(RouteView("other", 2, (split("v2", 100),)), 0.0)
    assert transition is not None
    assert (transition.drained, transition.draining) == ((Drained("other", "v1", 2),), ())
    assert m.request_ended(ticket) is None


def test_a_sticky_key_stays_and_a_pin_wins() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 50), split("v2", 50)), 0.0)
    assert len({choose(m, b"alice").version for _ in range(50)}) == 1
    assert {choose(m, b"alice", pin=v).version for v in ("v1", "v2")} == {"v1", "v2"}
    assert {choose(m).version for _ in range(50)} == {"v1", "v2"}


def test_a_weight_of_zero_is_for_retries_only() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100), split("v2", 0)), 0.0)
    assert {choose(m, b"%d" % n).version for n in range(200)} == {"v1"}
    choice = choose(m)
    other = m.reroute("chat", choice, [choice.slot], 0.0)
    assert other is not None
    assert other.version == "v2"
    assert m.reroute("chat", other, [choice.slot, other.slot], 0.0) is None
    assert m.reroute("chat", choice, [choice.slot], 0.0, pinned=True) is None


def test_a_retry_goes_to_the_same_version_first() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100, "a", "b"), split("v2", 0)), 0.0)
    choice = choose(m)
    other = m.reroute("chat", choice, [choice.slot], 0.0)
    assert other is not None
    assert (other.version, other.instance) == ("v1", "b" if choice.instance == "a" else "a")


def test_a_retry_follows_the_revision_that_is_applied_now() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100)), 0.0)
    choice = choose(m)
    m.begin_transition(route(2, split("v2", 100)), 0.0)
    other = m.reroute("chat", choice, [choice.slot], 0.0)
    assert other is not None
    assert (other.version, other.revision) == ("v2", 2)


def test_a_version_whose_instances_are_gone_sends_its_share_elsewhere() -> None:
    m = manager()
    m.begin_transition(route(1, Split("v1", 100, ()), split("v2", 0)), 0.0)
    assert choose(m).version == "v2"
    m.begin_transition(route(2, Split("v1", 100, ())), 0.0)
    assert m.handle_request_routing("chat") is NOTHING_READY


def test_the_least_busy_instance_is_taken() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100, "a", "b", "c")), 0.0)
    for _ in range(9):
        begin(m)
    lane = m.tracker.lanes["chat", "v1"]
    assert [slot.in_flight for slot in lane.slots.values()] == [3, 3, 3]


def test_of_many_instances_the_less_busy_of_two_is_taken() -> None:
    m = manager()
    names = [f"i{n}" for n in range(10)]
    m.begin_transition(route(1, split("v1", 100, *names)), 0.0)
    for _ in range(1000):
        begin(m)
    load = [slot.in_flight for slot in m.tracker.lanes["chat", "v1"].slots.values()]
    assert max(load) - min(load) <= 6
    ejected = list({c.instance: c for c in (choose(m) for _ in range(200))}.values())[:9]
    for choice in ejected:
        for _ in range(EJECT_AFTER):
            m.connection_failed(choice, 0.0)
    left = set(names) - {choice.instance for choice in ejected}
    assert {choose(m, now=0.5).instance for _ in range(50)} == left, "ejected ones are passed over, whoever is picked"


def affine(*names: str, revision: int = 1) -> TransitionManager:
    m = TransitionManager(RequestTracker(), affine=("chat",))
    m.begin_transition(route(revision, split("v1", 100, *names)), 0.0)
    return m


def near(m: TransitionManager, prefix: bytes, now: float = 0.0) -> Choice:
    choice = m.handle_request_routing("chat", now=now, prefix=prefix)
    assert isinstance(choice, Choice)
    return choice


def test_prompts_that_begin_alike_go_to_one_instance_in_every_gateway() -> None:
    m, other = affine("a", "b", "c"), affine("a", "b", "c")
    prompts = [b"prompt %d" % n for n in range(300)]
    assert {len({near(m, prompt).instance for _ in range(5)}) for prompt in prompts} == {1}
    assert [near(m, p).instance for p in prompts] == [near(other, p).instance for p in prompts]
    spread = [near(m, p).instance for p in prompts]
    assert all(spread.count(name) > 60 for name in "abc")


def test_an_instance_that_comes_moves_only_the_prompts_that_it_gets() -> None:
    before, after = affine("a", "b", "c"), affine("a", "b", "c", "d")
    prompts = [b"prompt %d" % n for n in range(300)]
    moved = {near(after, p).instance for p in prompts if near(before, p).instance != near(after, p).instance}
    assert moved == {"d"}


def test_an_instance_that_has_clearly_more_to_do_gets_no_more_of_its_prompts() -> None:
    m = affine("a", "b", "c", "d")
    for _ in range(40):
        m.tracker.begin(Ticket(near(m, b"the same prompt")))
    load = [slot.in_flight for slot in m.tracker.lanes["chat", "v1"].slots.values()]
    assert max(load) <= 14, "10 would be its share"
    assert sum(load) == 40


def test_prompts_of_an_ejected_instance_go_to_the_next_one() -> None:
    m = affine("a", "b", "c")
    home = near(m, b"prompt")
    for _ in range(EJECT_AFTER):
        m.connection_failed(home, 0.0)
    second = {near(m, b"prompt", now=0.5).instance for _ in range(10)}
    assert len(second) == 1
    assert home.instance not in second


def test_failures_in_a_row_take_an_instance_out_for_a_growing_time() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100, "a", "b")), 0.0)
    bad = next(c for c in (choose(m) for _ in range(10)) if c.instance == "a")
    assert [m.connection_failed(bad, 0.0) for _ in range(EJECT_AFTER)] == [False, False, True]
    assert {choose(m, now=0.9).instance for _ in range(10)} == {"b"}
    assert {choose(m, now=1.0).instance for _ in range(10)} == {"a", "b"}
    m.connection_failed(bad, 1.0)
    assert {choose(m, now=2.9).instance for _ in range(10)} == {"b"}
    for _ in range(20):
        m.connection_failed(bad, 3.0)
    assert {choose(m, now=32.9).instance for _ in range(10)} == {"b"}
    assert {choose(m, now=33.0).instance for _ in range(10)} == {"a", "b"}


def test_an_answer_forgives_what_failed_before() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100, "a", "b")), 0.0)
    choice = choose(m)
    for _ in range(EJECT_AFTER):
        m.connection_failed(choice, 0.0)
    m.connection_worked(choice)
    assert {choose(m).instance for _ in range(10)} == {"a", "b"}


def test_the_last_instance_is_never_taken_out() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100, "a", "b")), 0.0)
    for choice in {c.instance: c for c in (choose(m) for _ in range(10))}.values():
        for _ in range(EJECT_AFTER):
            m.connection_failed(choice, 0.0)
    assert choose(m, now=0.5).instance in {"a", "b"}


def test_an_ejection_survives_a_new_revision() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100, "a", "b")), 0.0)
    bad = next(c for c in (choose(m) for _ in range(10)) if c.instance == "a")
    for _ in range(EJECT_AFTER):
        m.connection_failed(bad, 0.0)
    m.begin_transition(route(2, split("v1", 100, "a", "b", "c")), 0.0)
    assert {choose(m, now=0.5).instance for _ in range(20)} == {"b", "c"}


def test_the_stamp_names_version_and_revision() -> None:
    m = manager()
    m.begin_transition(route(7, split("v1", 100)), 0.0)
    assert choose(m).stamp == b"\r\nx-turnout-version: v1\r\nx-turnout-revision: 7\r\nx-request-id: "


def test_ending_a_request_twice_is_a_bug_that_is_seen() -> None:
    m = manager()
    m.begin_transition(route(1, split("v1", 100)), 0.0)
    ticket = begin(m)
    m.request_ended(ticket)
    with pytest.raises(KeyError):
        m.request_ended(ticket)


class Transitions(RuleBasedStateMachine):
    """Any order of revisions, requests and ends, against a plain model."""

    def __init__(self) -> None:
        super().__init__()
        self.m = manager()
        self.revision = 0
        self.versions: frozenset[str] = frozenset()
        self.running: list[Ticket] = []
        self.owed: dict[str, int] = {}
        self.heard: dict[str, int] = {}

    @initialize()
    def start(self) -> None:
        self.apply(frozenset({"v1"}))

    @rule(versions=st.frozensets(st.sampled_from(("v1", "v2", "v3")), min_size=1))
    def apply(self, versions: frozenset[str]) -> None:
        self.revision += 1
        share = 100 / len(versions)
        for version in self.versions - versions:
            self.owed[version] = self.revision
        for version in versions:
            self.owed.pop(version, None)
        self.versions = versions
        transition = self.m.begin_transition(route(self.revision, *(split(v, share) for v in sorted(versions))), 0.0)
        assert transition is not None
        self.hear(*transition.drained)

    @rule()
    def request(self) -> None:
        ticket = begin(self.m)
        assert ticket.choice.version in self.versions
        assert ticket.choice.revision == self.revision
        self.running.append(ticket)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.running:
            ticket = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            if (drained := self.m.request_ended(ticket)) is not None:
                self.hear(drained)

    @rule(revision=st.integers(0, 3))
    def stale(self, revision: int) -> None:
        assert self.m.begin_transition(route(min(revision, self.revision), split("v9", 100)), 0.0) is None

    def hear(self, *reports: Drained) -> None:
        for report in reports:
            assert report.revision == self.revision
            assert self.owed.pop(report.version) <= report.revision, "drained twice, or while in the route"
            self.heard[report.version] = report.revision

    @invariant()
    def what_is_owed_is_what_still_runs(self) -> None:
        busy = {ticket.choice.version for ticket in self.running} - self.versions
        assert set(self.owed) == busy

    @invariant()
    def counts_are_true(self) -> None:
        assert self.m.tracker.in_flight("chat") == len(self.running)
        assert set(self.m.tracker.running()) == set(self.running)


TestTransitions = Transitions.TestCase
