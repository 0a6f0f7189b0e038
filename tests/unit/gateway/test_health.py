"""HealthCollector and Reading: what is counted, for whom, in which window, and what an answer gives away."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.core.split import BUCKETS, SplitTable
from turnout.events.health import HealthEvent, HealthSampled, bin_of, decode, encode
from turnout.events.route import Endpoint, Split
from turnout.projections.routing import RouteView
from turnout.workers.gateway import health, reading
from turnout.workers.gateway.health import HealthCollector, Tally, Users, assigned_shares
from turnout.workers.gateway.reading import Reading, Seen, repeats

TIME = datetime(2026, 1, 2, tzinfo=UTC)
CHAT = b"/v1/chat/completions"


def split(version: str, weight: float, *instances: str) -> Split:
    return Split(version, weight, tuple(Endpoint(name, f"unix:/run/{name}") for name in instances))


V1, V2 = split("v1", 90.0, "a"), split("v2", 10.0, "b")


class Rig:
    """A collector, its clock, and the tallies of the newest revision by version."""

    def __init__(self, interval_s: float = 60.0) -> None:
        self.collector = HealthCollector(interval_s)
        self.now = 0.0
        self.revision = 0
        self.hurries = 0
        self.tallies: dict[str, Tally] = {}
        self.collector.hurry = self._hurried

    def _hurried(self) -> None:
        self.hurries += 1

    def route(self, *splits: Split) -> list[HealthSampled]:
        """Apply the next revision; the samples that it ends."""
        self.revision += 1
        view = RouteView("chat", self.revision, splits, "sw-1")
        applied = self.collector.apply(view, "g-1", self.now, TIME + timedelta(seconds=self.now))
        self.tallies = {tally.version: tally for tally in applied.tallies}
        return samples(applied.ended)

    def take(self, after_s: float) -> list[HealthSampled]:
        """The samples that are due so much later."""
        self.now += after_s
        return samples(self.collector.take("g-1", self.now, TIME + timedelta(seconds=self.now)))

    def request(self, version: str, outcome: str = "ok", key: bytes = b"", seconds: float = 0.1) -> None:
        """One request from its beginning to its end."""
        tally = self.tallies[version]
        tally.begin(key)
        if outcome == "ok":
            tally.done((key, seconds, 100))
        else:
            tally.ended(outcome, key)


def samples(events: tuple[HealthEvent, ...] | list[HealthEvent]) -> list[HealthSampled]:
    for event in events:
        assert decode(encode(event)) == event
    return [event for event in events if isinstance(event, HealthSampled)]


# --- windows -----------------------------------------------------------------------------------------------------


def test_a_window_says_how_its_requests_ended() -> None:
    rig = Rig()
    rig.route(V1, V2)
    for outcome in ("ok", "ok", "bad_request", "http_error", "client_gone"):
        rig.request("v2", outcome)
    (sample,) = rig.take(0.25)
    assert (sample.gateway, sample.version, sample.revision, sample.window) == ("g-1", "v2", 1, 1)
    assert sample.outcomes == {"ok": 2, "bad_request": 1, "http_error": 1, "client_gone": 1}
    assert (sample.requests, sample.errors, sample.assigned, sample.unit_errors) == (5, 1, 5, 1)
    assert sample.first_ms == {"whole/1k": {bin_of(100): 2}}
    assert sample.total_ms == {bin_of(100): 2}
    assert sample.share == pytest.approx(0.1)


def test_source_and_target_of_a_period_are_told_together_and_nothing_is_told_twice() -> None:
    rig = Rig()
    rig.route(V1, V2)
    rig.request("v1")
    rig.request("v2")
    first = rig.take(0.25)
    assert [(s.version, s.started, s.ended) for s in first] == [
        (version, TIME, TIME + timedelta(seconds=0.25)) for version in ("v1", "v2")
    ]
    assert rig.take(0.25) == [], "nothing came"
    rig.request("v1")
    (second,) = rig.take(0.25)
    assert (second.window, second.started, second.requests) == (2, TIME + timedelta(seconds=0.5), 1)


def test_a_model_without_a_switch_is_told_of_at_its_interval() -> None:
    rig = Rig(interval_s=10.0)
    rig.route(split("v1", 100.0, "a"))
    rig.request("v1")
    assert rig.take(9.9) == []
    assert len(rig.take(0.2)) == 1
    rig.route(V1, V2)
    rig.request("v1")
    assert len(rig.take(0.25)) == 1, "while a switch compares, it is told of several times a second"


def test_a_request_belongs_to_the_revision_that_assigned_it() -> None:
    rig = Rig()
    rig.route(V1, V2)
    old = rig.tallies["v2"]
    old.begin(b"")
    (ended,) = rig.route(split("v1", 50.0, "a"), split("v2", 50.0, "b"))
    assert (ended.revision, ended.assigned, ended.requests) == (1, 1, 0)
    rig.request("v2")
    old.ended("cut", b"")
    late, new = sorted(rig.take(0.25), key=lambda s: s.revision)
    assert (late.revision, late.outcomes, late.assigned) == (1, {"cut": 1}, 0)
    assert late.share == pytest.approx(0.1)
    assert (new.revision, new.share, new.outcomes, new.assigned) == (2, 0.5, {"ok": 1}, 1)
    assert len({late.window, new.window, ended.window}) == 3


def test_an_error_of_a_candidate_is_told_at_once_one_of_the_only_version_is_not() -> None:
    rig = Rig()
    rig.route(V1, V2)
    rig.request("v2", "client_gone")
    assert rig.hurries == 0
    rig.request("v2", "refused")
    rig.request("v2", "refused")
    assert rig.hurries == 1, "once until it was taken"
    (sample,) = rig.take(0.0)
    assert sample.outcomes == {"client_gone": 1, "refused": 2}
    rig.route(split("v2", 100.0, "b"))
    rig.request("v2", "refused")
    assert rig.hurries == 1


def test_a_run_of_refused_requests_lasts_over_windows_until_an_answer_comes() -> None:
    rig = Rig()
    rig.route(V1, V2)
    for _ in range(3):
        rig.request("v2", "refused")
    assert rig.take(0.25)[0].run == 3
    rig.request("v2", "timeout")  # silence is no answer, and no proof that nobody is there
    rig.request("v2", "refused")
    assert rig.take(0.25)[0].run == 4
    rig.request("v2", "ok")
    rig.request("v2", "refused")
    assert rig.take(0.25)[0].run == 1


def test_shares_are_what_the_split_really_assigns() -> None:
    nobody = split("v2", 10.0)
    assert assigned_shares(RouteView("chat", 1, (V1, V2, split("v0", 0.0, "z")))) == pytest.approx(
        {"v1": 0.9, "v2": 0.1, "v0": 0.0}
    )
    assert assigned_shares(RouteView("chat", 1, (V1, nobody))) == pytest.approx({"v1": 1.0, "v2": 0.0})
    assert assigned_shares(RouteView("chat", 1, (nobody,))) == {"v2": 0.0}


# --- units -------------------------------------------------------------------------------------------------------


def test_a_user_is_one_unit_of_a_revision_however_often_it_asks_and_fails() -> None:
    rig = Rig()
    rig.route(V1, V2)
    for outcome in ("ok", "http_error", "http_error", "ok"):
        rig.request("v2", outcome, b"alice")
    rig.request("v2", "http_error", b"bob")
    (sample,) = rig.take(0.25)
    assert (sample.requests, sample.errors) == (5, 3)
    assert (sample.assigned, sample.users, sample.unit_errors) == (2, 2, 2)
    assert [len(bins) for bins in sample.answers["whole/1k"].values()] == [2], "both good answers of one user"
    assert sample.first_ms == {}, "what a user was answered is not counted twice"
    assert sorted(sample.bad_users.values()) == [1, 2]
    rig.request("v2", "http_error", b"alice")
    (again,) = rig.take(0.25)
    assert (again.assigned, again.unit_errors, again.errors) == (0, 0, 1)
    rig.route(V1, V2)
    rig.request("v2", "ok", b"alice")
    assert rig.take(0.25)[0].assigned == 1, "a new revision begins anew"


def test_no_sample_holds_a_key_and_two_gateways_call_a_user_the_same() -> None:
    one, two, other = Rig(), Rig(), Rig()
    names: list[set[str]] = []
    for rig, key in ((one, b"alice@example.org"), (two, b"alice@example.org"), (other, b"bob")):
        rig.route(V1, V2)
        rig.request("v2", "cut", key)
        rig.request("v2", "ok", b"carol")
        (sample,) = rig.take(0.25)
        assert b"alice" not in encode(sample)
        names.append(set(sample.bad_users))
    assert names[0] == names[1] != names[2]
    assert all(len(name) == 16 for name in names[0])


def test_a_sample_names_no_more_than_64_users() -> None:
    rig = Rig()
    rig.route(V1, V2)
    for n in range(100):
        rig.request("v2", "cut", b"user-%d" % n)
    rig.request("v2", "cut", b"user-99")
    (sample,) = rig.take(0.25)
    assert len(sample.bad_users) == 64
    assert max(sample.bad_users.values()) == 2


def test_two_gateways_give_a_user_the_same_cell_and_it_is_of_the_bucket_that_chose_the_version() -> None:
    cells: list[int] = []
    for rig in (Rig(), Rig()):
        rig.route(V1, V2)
        rig.request("v2", "ok", b"alice")
        rig.request("v2", "cut", b"alice")
        (sample,) = rig.take(0.25)
        cells += [*sample.answers["whole/1k"], *sample.showed["error"]]
    assert len(set(cells)) == 1
    assert cells[0] % BUCKETS == SplitTable((V1, V2), "sw-1").bucket(b"alice")


def test_users_are_named_only_while_two_versions_are_compared() -> None:
    rig = Rig(interval_s=0.25)
    rig.route(V1)
    rig.request("v1", "ok", b"alice")
    rig.request("v1", "cut", b"alice")
    (sample,) = rig.take(0.25)
    assert (sample.answers, sample.showed) == ({}, {})
    assert sum(sample.first_ms["whole/1k"].values()) == sample.unit_errors == 1


def test_a_crowded_window_names_the_same_part_of_the_users_of_both_versions() -> None:
    named: list[dict[str, set[int]]] = []
    for rig in (Rig(), Rig()):
        rig.route(V1, V2)
        table = SplitTable((V1, V2), "sw-1")
        for n in range(2000):
            key = b"user-%d" % n
            rig.request(table.version(key), "http_error" if n % 2 else "ok", key)
        sent = {sample.version: sample for sample in rig.take(0.25)}
        for sample in sent.values():
            assert sample.unit_errors == len(sample.showed["error"]) <= 256
            assert len(encode(sample)) < 64 * 1024
        assert 0.05 < len(sent["v2"].answers["whole/1k"]) / len(sent["v1"].answers["whole/1k"]) < 0.2
        named.append({version: {*sample.answers["whole/1k"]} for version, sample in sent.items()})
    assert named[0] == named[1]
    assert 100 < len(named[0]["v1"]) <= 256


def test_a_request_that_a_pin_has_brought_is_counted_and_compared_with_nothing() -> None:
    rig = Rig()
    rig.route(V1, V2)
    tally = rig.tallies["v2"]
    tally.begin(None)
    tally.begin(None)
    tally.ended("http_error", None)
    tally.done((None, 0.1, 100))
    (sample,) = rig.take(0.25)
    assert (sample.requests, sample.errors) == (2, 1)
    assert (sample.assigned, sample.unit_errors, sample.users, sample.first_ms) == (0, 0, 0, {})


def test_a_full_table_of_users_keeps_a_sample_that_is_fair_to_all_versions() -> None:
    users = Users(most=1000)
    first = {"v1": 0, "v2": 0}
    for n in range(200_000):
        version = "v2" if n % 10 == 0 else "v1"
        key = b"user-%d" % n
        if users.enter(key):
            first[version] += 1
            assert not users.enter(key)
    total = first["v1"] + first["v2"]
    assert 1000 < total < 20_000
    assert first["v2"] / total == pytest.approx(0.1, abs=4 * (0.09 / total) ** 0.5)


# --- the clock ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 4000.0), min_size=1, max_size=50))
def test_histograms_have_the_bins_of_the_contract(seconds: list[float]) -> None:
    rig = Rig()
    rig.route(split("v1", 100.0, "a"))
    for one in seconds:
        rig.request("v1", seconds=one)
    (sample,) = rig.take(60.0)
    expected = sorted(bin_of(one * 1000.0) for one in seconds)
    found = sorted(bin for bin, count in sample.total_ms.items() for _ in range(count))
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)), "off by one at a bound at most"
    assert sample.first_ms["whole/1k"] == sample.total_ms


_KEYS = st.sampled_from([b"", None, b"alice", b"bob", b"carol"])
_ANSWERS = st.lists(st.tuples(_KEYS, st.floats(0.0, 4000.0), st.sampled_from([10, 1023, 1024, 5000, 90_000])))


@given(st.lists(_ANSWERS, max_size=4), st.booleans())
def test_answers_counted_many_at_once_are_those_counted_one_by_one(
    digests: list[list[tuple[bytes | None, float, int]]], compared: bool
) -> None:
    """Each answer without a key counts, the first ones of a user, and none that the split has not assigned."""
    many, single = Rig(), Rig()
    told: list[float] = []
    for rig in (many, single):
        rig.route(*((V1, V2) if compared else (split("v1", 100.0, "a"),)))
    many.tallies["v1"].whole = told.extend
    for answers in digests:
        for answer in answers:
            many.tallies["v1"].begin(answer[0])
            many.tallies["v1"].done(answer)
            single.tallies["v1"].begin(answer[0])
            single.tallies["v1"].done(answer)
            single.collector.digest()
        many.collector.digest()
    assert many.take(60.0) == single.take(60.0)
    assert sorted(told) == sorted(seconds for answers in digests for _, seconds, _ in answers)


def test_a_users_first_answer_counts_by_the_size_of_its_prompt() -> None:
    rig = Rig()
    rig.route(split("v1", 100.0, "a"))
    tally = rig.tallies["v1"]
    for answer in ((b"alice", 0.1, 2000), (b"", 0.2, 10), (b"alice", 9.0, 10), (None, 9.0, 10), (b"", 0.2, 70_000)):
        tally.begin(answer[0])
        tally.done(answer)
    (sample,) = rig.take(60.0)
    assert sample.first_ms == {
        "whole/4k": {bin_of(100): 1},
        "whole/1k": {bin_of(200): 1},
        "whole/more": {bin_of(200): 1},
    }
    assert sum(sample.total_ms.values()) == sample.requests == 5


def test_what_is_slow_is_learned_from_the_bulk_of_the_traffic() -> None:
    rig = Rig()
    rig.route(V1, V2)
    assert rig.tallies["v2"].slow_s == 0.0, "nothing is known yet"
    for _ in range(100):
        rig.request("v1", seconds=0.5)
        rig.request("v2", seconds=20.0)
    rig.take(0.25)
    assert rig.tallies["v2"].slow_s == rig.tallies["v1"].slow_s == pytest.approx(2.0, rel=0.1)


def test_a_first_byte_that_does_not_come_counts_when_the_clock_passes_not_when_it_comes() -> None:
    rig = Rig()
    rig.route(V1, V2)
    tally = rig.tallies["v2"]
    tally.begin(b"alice")
    tally.slow(4.0, b"alice", stream=True, size=2000)
    (sample,) = rig.take(0.25)
    assert (sample.signs, sample.unit_signs, sample.requests) == ({"slow": 1}, {"slow": 1}, 0)
    assert list(sample.answers["stream/4k"].values()) == [[bin_of(4000)]]


def test_no_more_answers_are_read_than_the_budget_allows() -> None:
    rig = Rig()
    rig.route(V1, V2)
    first, second = rig.tallies["v1"].looks, rig.tallies["v2"].looks
    assert first is not None
    assert first is second, "whose turn it is does not depend on the version"
    assert sum(first.take() for _ in range(1000)) == health.LOOKS_PER_S
    rig.take(0.25)
    assert sum(first.take() for _ in range(1000)) == health.LOOKS_PER_S // 4
    rig.route(split("v1", 100.0, "a"))
    assert rig.tallies["v1"].looks is None, "nothing is read where nothing is compared"


def test_totals_for_prometheus_hold_the_window_that_is_still_open() -> None:
    rig = Rig()
    rig.route(V1, V2)
    rig.request("v2", "cut")
    rig.take(0.25)
    rig.request("v2", "cut")
    rig.request("v1")
    assert sorted(rig.collector.outcomes()) == [("chat", "v1", "ok", 1), ("chat", "v2", "cut", 2)]


# --- what an answer says -----------------------------------------------------------------------------------------


def chunk(delta: dict[str, object], finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"delta": delta, "finish_reason": finish}]}


def chat_stream(*texts: str, finish: str | None = "stop", done: bool = True, usage: int = 0) -> list[bytes]:
    """A stream as vLLM sends it, chunk sizes included."""
    events = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": text}) for text in texts)]
    if finish:
        events.append(chunk({}, finish))
    if usage:
        events.append({"choices": (), "usage": {"completion_tokens": usage}})
    bodies = [b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events]
    if done:
        bodies.append(b"data: [DONE]\n\n")
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    return [head, *(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies), b"0\r\n\r\n"]


def read(parts: list[bytes], path: bytes = CHAT) -> Seen:
    made = Reading(stream=True)
    for part in parts:
        made.add(part)
    return made.seen(path)


def read_whole(answer: object, path: bytes = CHAT, spaced: bool = False) -> Seen:
    body = msgspec.json.encode(answer)
    if spaced:
        body = body.replace(b'":', b'": ')
    made = Reading(stream=False)
    made.add(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + body)
    return made.seen(path)


def chat(content: str | None, finish: str = "stop", **message: object) -> dict[str, object]:
    return {
        "choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}],
        "usage": {"completion_tokens": 7},
    }


WORDS = tuple(f" word{n}" for n in range(40))


def test_a_sound_stream_shows_nothing_but_its_tokens() -> None:
    assert read(chat_stream(*WORDS, usage=40)) == Seen(tokens=40)
    assert read(chat_stream(*WORDS)) == Seen(tokens=43), "events, where the engine does not say"


@pytest.mark.parametrize(
    ("parts", "outcome"),
    [
        (chat_stream(*WORDS, done=False), "cut"),
        (chat_stream(*WORDS, finish="abort"), "aborted"),
        ([*chat_stream(*WORDS, done=False)[:-1], b'20\r\ndata: {"error":{"code":500}}\n\n\r\n'], "error_event"),
    ],
)
def test_the_end_of_a_stream_tells_how_it_went(parts: list[bytes], outcome: str) -> None:
    assert read(parts).outcome == outcome


def test_a_stream_that_speaks_of_errors_has_none() -> None:
    assert read(chat_stream(' {"error": 1}', "\nevent: error", ' "abort"', *WORDS)).outcome == "ok"


@pytest.mark.parametrize(
    ("parts", "signs"),
    [
        (chat_stream(), ("empty",)),
        (chat_stream(" ", "\n", "\t"), ("empty",)),
        (chat_stream(finish="length"), ("length",)),
        (chat_stream("!", *(["!"] * 30), finish="length"), ("length", "repetition")),
        (chat_stream(*([" no", " way"] * 20)), ("repetition",)),
        (chat_stream("One", " word"), ()),
        (chat_stream('He said "', '"', "\\", '" and so on'), ()),
    ],
)
def test_signs_of_a_bad_stream(parts: list[bytes], signs: tuple[str, ...]) -> None:
    assert read(parts).signs == signs


def test_a_stream_of_tool_calls_is_not_empty() -> None:
    call = b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":"f"}}]},"finish_reason":null}]}\n\n'
    assert read([call, *chat_stream(finish="tool_calls")]).signs == ()
    assert read([call, *chat_stream()]).signs == ()


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (chat("A sound answer."), Seen(tokens=7)),
        (chat(""), Seen(signs=("empty",), tokens=7)),
        (chat("\n \t"), Seen(signs=("empty",), tokens=7)),
        (chat(None, tool_calls=[{"id": "1"}]), Seen(tokens=7)),
        (chat(None, tool_calls=[]), Seen(signs=("empty",), tokens=7)),
        (chat("cut off", "length"), Seen(signs=("length",), tokens=7)),
        (chat("嗨" * 40), Seen(signs=("repetition",), tokens=7)),
        (chat("gone", "abort"), Seen("aborted")),
    ],
)
def test_signs_of_an_answer_that_is_no_stream(answer: object, seen: Seen, spaced: bool) -> None:
    assert read_whole(answer, spaced=spaced) == seen


def test_a_stream_of_responses_is_not_taken_for_one_that_says_everything_twice() -> None:
    text = "".join(WORDS)
    parts = [
        b"event: response.output_text.delta\ndata: " + msgspec.json.encode({"delta": word}) + b"\n\n" for word in WORDS
    ]
    done = {"type": "response.completed", "response": {"status": "completed", "output": [{"text": text}]}}
    parts.append(b"event: response.completed\ndata: " + msgspec.json.encode(done) + b"\n\n")
    assert read(parts, b"/v1/responses").signs == ()
    failed = b'event: response.failed\ndata: {"type":"response.failed"}\n\n'
    assert read([*parts[:-1], failed], b"/v1/responses").outcome == "error_event"


def test_of_a_long_answer_no_more_than_its_end_is_kept() -> None:
    made = Reading(stream=True)
    for part in chat_stream(*(f" word{n}" for n in range(4000))):
        made.add(part)
        assert sum(map(len, made.kept)) <= reading.STREAM_KEPT_BYTES + 200
    assert made.seen(CHAT) == Seen(tokens=4003)
    large = Reading(stream=True)
    large.add(b"data: " + b"x" * 10_000_000)
    assert sum(map(len, large.kept)) <= reading.STREAM_KEPT_BYTES
    assert read_whole(chat("word " * 20_000)) == Seen(), "too long to be looked at"


def test_an_end_without_text_says_nothing_of_a_stream_whose_beginning_was_let_go() -> None:
    assert "empty" not in read(chat_stream("Text.", *[" "] * 400)).signs


@given(st.binary(max_size=400), st.booleans())
def test_no_answer_can_break_the_reading(raw: bytes, stream: bool) -> None:
    made = Reading(stream)
    made.add(b'{"content":"' + raw)
    made.add(raw + b'"content":"\\"' + raw)
    for path in (CHAT, b"/v1/responses", b"/v1/embeddings"):
        made.seen(path)


def test_prose_and_short_answers_do_not_repeat_themselves() -> None:
    prose = (
        b"A turnout lets a train pass from one track to another while it is moving; the blades lie against one rail "
        b"or the other, never between them. It is thrown by a lever, a motor or a hand, and locked before a train."
    )
    assert not repeats(prose)
    assert not repeats(b"no no no")
    assert repeats(prose * 3)
