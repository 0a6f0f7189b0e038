"""The judge: what it decides, what it says, and what must not move it."""

from __future__ import annotations

import itertools
import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.judging.traffic import (
    QUESTION,
    START,
    Gateway,
    judged,
    probe_failed,
    probe_passed,
    settled,
    spread,
)

from turnout.core.judging.judge import E_MOST
from turnout.core.judging.judgement import Decision, Judgement
from turnout.events.health import HealthEvent, ShadowSampled

if TYPE_CHECKING:
    from turnout.events.switch import Figure

ALONE = msgspec.structs.replace(QUESTION, comparative=False, step=3)


def figure(judgement: Judgement, name: str) -> Figure:
    return next(one for one in judgement.figures if one.name == name)


def good_traffic(gateway: Gateway, windows: int) -> list[HealthEvent]:
    for n in range(windows):
        failed = n % 4 == 0
        gateway.window(
            gateway.of("v1", 18 - failed, failed=failed, first_ms=200.0, total_ms=900.0),
            gateway.of("v2", 2, first_ms=200.0, total_ms=900.0),
        )
    return gateway.sent


# --- harm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("refused", "failed"), [(1, 0), (0, 1)])
def test_a_dead_canary_is_seen_within_five_requests(refused: int, failed: int) -> None:
    gateway = Gateway()
    for _ in range(5):
        gateway.window(gateway.of("v1", 9), gateway.of("v2", refused=refused, failed=failed))

    assert judged(gateway.sent).decision is Decision.FAIL


def test_a_dead_canary_is_seen_within_five_requests_after_two_thousand_good_ones() -> None:
    gateway = Gateway()
    for _ in range(100):
        gateway.window(gateway.of("v1", 178, failed=2), gateway.of("v2", 20))
    for _ in range(5):
        gateway.window(gateway.of("v1", 9), gateway.of("v2", failed=1))

    judgement = judged(gateway.sent)

    assert judgement.decision is Decision.FAIL
    assert judgement.metric == "error_ceiling"
    assert judgement.reason.startswith("lately worse: v2 failed 5 of 2,005 requests")


def test_refused_requests_add_up_over_gateways_until_one_of_them_gets_an_answer() -> None:
    only_dead = settled(compare=("errors",), comparative=False)
    first, second = Gateway("g1"), Gateway("g2")
    run = [*first.window(first.of("v2", refused=3)), *second.window(second.of("v2", refused=2))]
    answered = [*first.window(first.of("v2", refused=3)), *second.window(second.of("v2", 1))]
    again = [*second.window(second.of("v2", refused=2))]

    assert judged(run, only_dead).rule == "dead: 5 refused in a row"
    assert judged([*answered, *again], only_dead).decision is not Decision.FAIL


def test_a_run_of_refused_requests_from_before_the_step_is_not_of_the_step() -> None:
    only_dead = settled(compare=("errors",), comparative=False)
    gateway = Gateway()
    stale = gateway.window(gateway.of("v2", refused=1, run=40))

    assert judged(stale, only_dead).decision is not Decision.FAIL


def test_more_failures_than_the_source_roll_back_and_the_sentence_has_the_numbers() -> None:
    gateway = Gateway()
    for _ in range(9):
        gateway.window(gateway.of("v1", 45), gateway.of("v2", 2, failed=2))

    judgement = judged(gateway.sent, settled(compare=("errors",)))

    assert (judgement.decision, judgement.metric) == (Decision.FAIL, "errors")
    assert judgement.reason.startswith("v2 failed 18 of 36 requests while v1 failed 0 of 405 requests (e = ")
    assert judgement.reason.endswith(", needed 100)")
    assert judgement.rule.startswith("errors: e ")


def test_the_error_budget_is_shared_by_the_steps() -> None:
    def needed(steps: int) -> float:
        return figure(judged([], settled(compare=("errors",), steps=steps)), "errors").e_needed

    assert needed(1) == pytest.approx(100.0)
    assert needed(4) == pytest.approx(400.0)


@pytest.mark.parametrize(
    ("metric", "usual", "bad"),
    [
        ("first_byte", {"first_ms": 200.0}, {"first_ms": 300.0}),
        ("first_byte_p95", {"first_ms": 200.0}, {"first_ms": 400.0}),
        ("token_time", {"token_ms": spread(20.0, 7)}, {"token_ms": spread(40.0, 7)}),
        ("latency_ceiling", {"total_ms": 900.0}, {"total_ms": 6000.0}),
        ("empty", {}, {"signs": {"empty": 1}}),
        ("repetition", {}, {"signs": {"repetition": 1}}),
        ("length_stop", {"signs": {"length": 1}}, {"signs": {"length": 2}}),
    ],
)
def test_each_signal_rolls_back_by_itself(metric: str, usual: dict[str, Any], bad: dict[str, Any]) -> None:
    def after(target: dict[str, Any]) -> Judgement:
        gateway = Gateway()
        for _ in range(100):
            gateway.window(gateway.of("v1", 18, **usual), gateway.of("v2", 2, **target))
        return judged(gateway.sent, settled(compare=(metric,)))

    signs = {"signs": {"length": 0}} if metric == "length_stop" else {}
    assert after({**usual, **signs}).decision is not Decision.FAIL
    assert (after(bad).decision, after(bad).metric) == (Decision.FAIL, metric)
    assert after(bad).reason.endswith(", needed 100)")


def test_latency_of_a_target_that_was_just_loaded_does_not_count_yet() -> None:
    gateway = Gateway()
    for _ in range(9):
        gateway.window(gateway.of("v1", 18, first_ms=200.0), gateway.of("v2", 2, first_ms=5000.0, total_ms=20_000.0))

    first_step = judged(gateway.sent, msgspec.structs.replace(QUESTION, step=1))
    later_step = judged(gateway.sent)

    assert figure(first_step, "first_byte").e == 1.0
    assert first_step.decision is Decision.HOLD
    assert later_step.decision is Decision.FAIL


def test_a_target_that_is_a_little_slower_is_tolerated() -> None:
    gateway = Gateway()
    for _ in range(400):
        gateway.window(gateway.of("v1", 18, first_ms=200.0), gateway.of("v2", 2, first_ms=215.0))

    judgement = judged(gateway.sent)

    assert figure(judgement, "first_byte").e < 1.0
    assert judgement.decision is not Decision.FAIL


def test_longer_answers_are_shown_and_roll_nothing_back() -> None:
    gateway = Gateway()
    for _ in range(200):
        gateway.window(gateway.of("v1", 18, tokens=spread(100.0, 18)), gateway.of("v2", 2, tokens=spread(400.0, 2)))

    judgement = judged(gateway.sent)

    assert figure(judgement, "tokens").e > 1000
    assert judgement.decision is Decision.HOLD


def test_an_outage_of_both_versions_is_not_held_against_the_target() -> None:
    gateway = Gateway(share=0.5)
    good_traffic(gateway, 40)
    for _ in range(40):
        gateway.window(gateway.of("v1", 2, failed=2), gateway.of("v2", 2, failed=2))

    assert judged(gateway.sent).decision is not Decision.FAIL


def test_a_source_above_the_ceiling_does_not_make_its_successor_fail() -> None:
    gateway = Gateway(share=1.0, revision=4)
    before = [
        event
        for _ in range(10)
        for event in gateway.window(gateway.of("v1", 80, failed=20, total_ms=9000.0), seconds=60.0)
    ]
    gateway.revision = 5
    for _ in range(10):
        gateway.window(gateway.of("v2", 80, failed=20, total_ms=9000.0), seconds=60.0)

    assert judged(gateway.sent, ALONE).decision is not Decision.FAIL
    assert judged(gateway.sent[len(before) :], ALONE).decision is Decision.FAIL


def test_the_target_alone_is_held_to_the_first_byte_that_the_source_had() -> None:
    gateway = Gateway(share=1.0, revision=4)
    for _ in range(10):
        gateway.window(gateway.of("v1", 100, first_ms=200.0))
    gateway.revision = 5
    for _ in range(10):
        gateway.window(gateway.of("v2", 50, first_ms=800.0))

    judgement = judged(gateway.sent, ALONE)

    assert (judgement.decision, judgement.metric) == (Decision.FAIL, "first_byte_p95")


def test_probes_roll_back_once_three_in_a_row_have_failed() -> None:
    assert judged([probe_failed(1), probe_failed(2)]).decision is Decision.HOLD
    assert judged([probe_failed(2), probe_failed(3)]).reason == "v2 failed 3 probes in a row on i2: the answer is empty"
    assert judged([probe_failed(3), probe_passed()]).decision is Decision.HOLD
    assert judged([probe_failed(3, version="v1")]).decision is Decision.HOLD
    only_i7 = msgspec.structs.replace(QUESTION, instances=("i7",))
    assert judged([probe_failed(3)], only_i7).decision is Decision.HOLD


def test_copies_that_fail_where_the_primary_answers_roll_back_the_shadow() -> None:
    def copies(n: int, failed: int) -> ShadowSampled:
        return ShadowSampled(
            gateway="g1",
            model="chat",
            version="v2",
            window=n,
            revision=5,
            started=START,
            ended=START + timedelta(seconds=n),
            copies=10,
            both_ok=10 - failed,
            only_copy_failed=failed,
        )

    bad = judged([copies(n, 3) for n in range(8)], settled(compare=("shadow_errors",)))
    good = judged([copies(n, 0) for n in range(60)], settled())

    assert (bad.decision, bad.metric) == (Decision.FAIL, "shadow_errors")
    assert bad.reason.startswith("of 80 copies 24 failed on v2 where v1 answered, and 0 the other way round")
    assert good.decision is Decision.PASS
    assert good.target_requests == 600


# --- users -------------------------------------------------------------------------------------------------------


def busy_user(answered: int) -> list[HealthEvent]:
    """Nine other users without a failure, and one who fails 31 times, once in each of his windows."""
    gateway = Gateway()
    gateway.window(gateway.of("v1", 900, users=90), gateway.of("v2", 100, users=10))
    for n in range(31):
        failed = gateway.of("v2", answered, failed=1, bad_users={"u1": 1}, unit_errors=int(n == 0), assigned=0)
        gateway.window(gateway.of("v1", 90, assigned=0), failed)
    return gateway.sent


def test_a_single_user_who_fails_again_and_again_does_not_condemn_the_target() -> None:
    judgement = judged(busy_user(answered=3))

    assert judgement.decision is Decision.HOLD
    assert judgement.target_errors == 31


def test_nor_do_the_failures_of_a_single_user_vanish_from_what_a_pass_needs() -> None:
    assert judged(busy_user(answered=15), settled(compare=("error_ceiling",))).decision is Decision.HOLD


def test_users_who_are_seen_by_every_gateway_do_not_break_the_split() -> None:
    events: list[HealthEvent] = []
    for name in ("g1", "g2", "g3", "g4", "g5", "g6"):
        gateway = Gateway(name)
        events += gateway.window(gateway.of("v1", 400, users=40), gateway.of("v2", 100, users=10))
        events += gateway.window(gateway.of("v1", 400, assigned=0), gateway.of("v2", 100, assigned=0))

    assert judged(events).decision is Decision.HOLD


def test_times_of_a_token_decide_nothing_where_users_are_sticky() -> None:
    gateway = Gateway()
    gateway.window(gateway.of("v1", 9, users=9), gateway.of("v2", 1, users=1))
    for _ in range(100):
        gateway.window(
            gateway.of("v1", 18, token_ms=spread(20.0, 63), assigned=0),
            gateway.of("v2", 2, token_ms=spread(90.0, 7), assigned=0),
        )

    judgement = judged(gateway.sent)

    assert figure(judgement, "token_time").e > 1000
    assert judgement.decision is Decision.HOLD


def through_two_gateways(cells: tuple[int, int], order: tuple[str, str]) -> Judgement:
    """A user of the target fails, and gets an empty answer and a slow one, at each of two gateways; no other does."""
    gateways = {name: Gateway(name) for name in ("g1", "g2")}
    events: list[HealthEvent] = []
    for number, gateway in enumerate(gateways.values()):
        many = {"stream/4k": {400 * number + n + 100: [50 + n % 5] for n in range(400)}}
        events += gateway.window(gateway.of("v1", 400, users=400, answers=many))
    cell_of = dict(zip(gateways, cells, strict=True))
    for name in order:
        gateway, cell = gateways[name], cell_of[name]
        user = gateway.of(
            "v2",
            1,
            failed=1,
            users=1,
            signs={"empty": 1},
            bad_users={f"u{cell}": 1},
            answers={"stream/4k": {cell: [70]}},
            showed={"error": [cell], "empty": [cell]},
        )
        events += gateway.window(gateway.of("v1", 1, assigned=0), user)
        events += gateway.window(gateway.of("v1", 1, assigned=0))
    return judged(events)


@pytest.mark.parametrize("name", ["errors", "empty", "first_byte", "first_byte_p95"])
def test_a_user_counts_once_whichever_gateways_saw_it(name: str) -> None:
    same = through_two_gateways((1, 1), ("g1", "g2"))
    two = through_two_gateways((1, 2), ("g1", "g2"))

    assert figure(two, name).e > figure(same, name).e
    assert (same.target_users, two.target_users) == (1, 2)


def test_which_gateway_is_heard_of_first_does_not_matter() -> None:
    assert through_two_gateways((1, 1), ("g1", "g2")) == through_two_gateways((1, 1), ("g2", "g1"))


def test_a_revision_within_the_step_does_not_make_a_user_a_new_one() -> None:
    first, again = (Gateway(revision=revision) for revision in (5, 6))
    events: list[HealthEvent] = []
    for gateway in (first, again):
        failed = gateway.of("v2", failed=1, users=1, bad_users={"u1": 1}, showed={"error": [1]})
        events += gateway.window(gateway.of("v1", 9), failed)

    assert figure(judged(events), "errors").e == figure(judged(first.sent), "errors").e


def test_users_pass_with_the_mean_of_their_answers_where_their_first_ones_say_too_little() -> None:
    def passes(answers: int) -> bool:
        gateway = Gateway(share=0.5)
        noise = itertools.cycle([n * 37 % 29 - 14 for n in range(29)])
        for n in range(80):
            v1, v2 = (
                {"stream/4k": {4 * n + user: [50 + next(noise) for _ in range(answers)] for user in users}}
                for users in ((0, 1), (2, 3))
            )
            windows = gateway.of("v1", 2, users=2, answers=v1), gateway.of("v2", 2, users=2, answers=v2)
            gateway.window(*windows, seconds=1.0)
        gateway.window(gateway.of("v1", 1, assigned=0), seconds=30.0)
        return judged(gateway.sent, settled(compare=("first_byte",))).decision is Decision.PASS

    assert not passes(1)
    assert passes(4)


def test_five_failures_of_one_user_stop_the_rollout_and_say_whose_they_were() -> None:
    gateway = Gateway()
    for n in range(5):
        user = gateway.of("v2", failed=1, users=1 - min(n, 1), bad_users={"u1": 1}, assigned=1, unit_errors=int(not n))
        gateway.window(gateway.of("v1", 9), user)

    judgement = judged(gateway.sent)

    assert judgement.decision is Decision.FAIL
    assert judgement.reason.endswith("; single user: 5 of the 5 failures are one user's")


# --- a pass ------------------------------------------------------------------------------------------------------


def test_without_traffic_it_holds_and_says_what_is_missing() -> None:
    judgement = judged([])

    assert judgement.decision is Decision.HOLD
    assert judgement.missing.startswith(
        "0 of 50 requests, 0 of 60 s, evidence that it fails less than 3 times as often"
    )
    assert judgement.target_requests == judgement.samples == 0


def test_a_source_with_traffic_does_not_stand_in_for_a_target_without() -> None:
    gateway = Gateway()
    for _ in range(2000):
        gateway.window(gateway.of("v1", 20, first_ms=200.0, assigned=0))

    judgement = judged(gateway.sent, settled())

    assert judgement.decision is Decision.HOLD
    assert "0 of 1 requests" in judgement.missing


def test_a_target_as_good_as_its_source_passes() -> None:
    judgement = judged(good_traffic(Gateway(), 400))

    assert judgement.decision is Decision.PASS
    assert judgement.missing == ""
    assert judgement.reason.startswith("v2 failed 0 of 800 requests and v1 100 of 7,200 requests; its first byte")


def test_a_pass_needs_no_failure_to_compare_with() -> None:
    gateway = Gateway()
    for _ in range(300):
        gateway.window(gateway.of("v1", 18, first_ms=200.0), gateway.of("v2", 2, first_ms=200.0))

    assert judged(gateway.sent).decision is Decision.PASS


def test_a_pass_waits_for_requests_users_and_time() -> None:
    gateway = Gateway()
    gateway.window(gateway.of("v1", 279, users=93), gateway.of("v2", 31, users=12), seconds=5.0)

    assert judged(gateway.sent).missing.startswith("31 of 50 requests, 12 of 20 users, 5 of 60 s, evidence")


def test_evidence_that_leans_towards_harm_is_no_pass() -> None:
    gateway = Gateway()
    for n in range(300):
        gateway.window(
            gateway.of("v1", 18, first_ms=200.0),
            gateway.of("v2", 2 - (n == 299), failed=int(n == 299), first_ms=200.0),
        )
    gateway.window(gateway.of("v1", 18))  # the pair before counts once the next one has come

    judgement = judged(gateway.sent)

    assert judgement.decision is Decision.HOLD
    assert judgement.missing.startswith("errors leans towards harm")


def test_comparisons_that_were_not_chosen_do_not_decide() -> None:
    gateway = Gateway()
    for _ in range(300):
        gateway.window(gateway.of("v1", 18, first_ms=200.0), gateway.of("v2", 2, first_ms=900.0))

    assert judged(gateway.sent).decision is Decision.FAIL
    assert judged(gateway.sent, settled(compare=("errors", "error_ceiling"))).decision is Decision.PASS


# --- evidence that is not what it should be ----------------------------------------------------------------------


def test_a_split_that_is_not_the_routes_is_invalid_and_ceilings_still_count() -> None:
    gateway = Gateway()
    for _ in range(60):
        gateway.window(gateway.of("v1", 50), gateway.of("v2", 50))
    broken = judged(gateway.sent)
    for _ in range(20):
        gateway.window(gateway.of("v1", 9), gateway.of("v2", failed=1))

    assert broken.decision is Decision.INVALID
    assert "v2 should get 10.0% of the requests and got 50.0%" in broken.reason
    assert judged(gateway.sent).metric == "error_ceiling"


@pytest.mark.parametrize(
    "odd",
    [
        {"share": math.nan},
        {"share": 1.5},
        {"requests": -3},
        {"total_ms": {-4: 1}},
        {"first_ms": {"a": {5: -1}}},
        {"answers": {"a": {7: []}}},
        {"answers": {"a": {7: [999]}}},
    ],
)
def test_samples_that_cant_be_meant_are_no_evidence_and_four_in_a_row_are_an_error(odd: dict[str, object]) -> None:
    gateway = Gateway()
    good_traffic(gateway, 400)
    passing = judged(gateway.sent)
    for _ in range(3):
        gateway.window(msgspec.structs.replace(gateway.of("v2", failed=50), **odd))
    three = judged(gateway.sent)
    gateway.window(msgspec.structs.replace(gateway.of("v2", failed=50), **odd))
    four = judged(gateway.sent)
    good_traffic(gateway, 1)

    assert passing.decision is three.decision is Decision.PASS
    assert four.decision is Decision.ERROR
    assert "4 samples in a row can't be read" in four.reason
    assert judged(gateway.sent).decision is Decision.PASS


def test_repeated_samples_and_those_of_an_older_route_change_nothing() -> None:
    gateway = Gateway()
    events = good_traffic(gateway, 40)
    old = Gateway("g1", revision=4)
    stale = old.window(old.of("v1", 5), old.of("v2", failed=50))

    assert judged([*stale, *(twice for event in events for twice in (event, event))]) == judged(events)


def test_a_gateway_that_starts_again_and_counts_from_one_is_heard() -> None:
    gateway = Gateway()
    good_traffic(gateway, 10)
    again = Gateway(clock=gateway.clock)

    assert judged([*gateway.sent, *good_traffic(again, 10)]).target_requests == 40


def test_a_gateway_whose_clock_is_off_changes_nothing() -> None:
    def with_clock(off: timedelta) -> Judgement:
        one, two = Gateway("g1"), Gateway("g2", clock=START + off)
        pairs = zip(good_traffic(one, 40), good_traffic(two, 40), strict=True)
        return judged(event for pair in pairs for event in pair)

    assert with_clock(timedelta(days=-400)) == with_clock(timedelta(0)) == with_clock(timedelta(days=400))


def test_the_arms_of_one_window_count_together_whichever_comes_first() -> None:
    def e_after(order: int) -> float:
        gateway = Gateway()
        gateway.window(gateway.of("v1", 9, failed=9), gateway.of("v2", failed=2))
        events = gateway.sent[::order]
        gateway.sent = []
        alone = judged(events[:1])
        assert figure(alone, "errors").e == 1.0
        return figure(judged(events), "errors").e

    assert e_after(1) == e_after(-1)


samples = st.lists(
    st.tuples(st.sampled_from(["v1", "v2"]), st.integers(0, 30), st.integers(0, 6), st.integers(0, 6), st.booleans()),
    max_size=30,
)


@settings(max_examples=50, deadline=None)
@given(story=samples, share=st.floats(0, 1), comparative=st.booleans())
def test_any_samples_give_a_judgement_and_the_same_ones_the_same_bytes(
    story: list[tuple[str, int, int, int, bool]], share: float, comparative: bool
) -> None:
    gateway = Gateway(share=share)
    for version, ok, refused, failed, sticky in story:
        users = {"users": min(ok, 3), "bad_users": {"u1": failed}} if sticky else {}
        gateway.window(
            gateway.of(version, ok, refused=refused, failed=failed, first_ms=100.0, total_ms=300.0, **users)  # type: ignore[arg-type]
        )
    question = msgspec.structs.replace(QUESTION, comparative=comparative)

    first, second = judged(gateway.sent, question), judged(gateway.sent, question)

    assert msgspec.json.encode(first) == msgspec.json.encode(second)
    assert first.reason
    assert msgspec.json.decode(msgspec.json.encode(first), type=Judgement) == first, "what is no number becomes null"


@pytest.mark.parametrize("rate", [0.05, 0.0])
def test_evidence_beyond_all_bounds_is_still_a_number_in_json(rate: float) -> None:
    ceiling = msgspec.structs.replace(QUESTION.settings, error_ceiling=rate or 1e-300)
    gateway = Gateway(share=0.5)
    for _ in range(40):
        gateway.window(
            gateway.of("v1", 50_000, first_ms=5.0, total_ms=9.0), gateway.of("v2", failed=50_000, refused=50_000)
        )
    told = judged(gateway.sent, msgspec.structs.replace(QUESTION, settings=ceiling))
    read = msgspec.json.decode(msgspec.json.encode(told), type=Judgement)
    assert figure(read, "errors").e == E_MOST
    assert read == told
    assert read.decision is Decision.FAIL
