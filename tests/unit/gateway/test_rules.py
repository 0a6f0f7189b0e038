"""What the gateway reads of a request for its rules, and where it sends the request then."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.core.rules import Facts, Rules
from turnout.events.route import Endpoint, Mirror, Rule, Split
from turnout.projections.routing import RouteView
from turnout.workers.gateway.request import read_head, with_model
from turnout.workers.gateway.rules import facts_of
from turnout.workers.gateway.transition import NOTHING_READY, Choice, RequestTracker, TransitionManager

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Asks for everything.
EVERYTHING = Rules(
    "chat",
    (
        Rule("a", "modality == [] && tokens + messages + max_tokens > 0 && tools && stream", version="v"),
        Rule("b", "user == path && headers.team == '' && metadata.tier == metadata.n", version="v"),
    ),
)
PATH = b"/v1/chat/completions"
FORM = b"multipart/form-data; boundary=b"


def read(body: object, headers: Mapping[str, str] | None = None, path: bytes = PATH) -> Facts:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return facts_of(EVERYTHING, path, headers or {}, b"application/json", raw)


# Facts


def test_a_chat_is_read_part_by_part() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4000}}
    facts = read(
        {
            "model": "chat",
            "messages": [
                {"role": "system", "content": "x" * 40},
                {"role": "user", "content": [{"type": "text", "text": "y" * 40}, image]},
                {"role": "assistant", "content": None, "refusal": ""},
            ],
            "tools": [{"type": "function"}],
            "stream": True,
            "max_completion_tokens": 64,
            "user": "alice",
            "metadata": {"tier": "gold", "n": 7, "other": "x"},
        },
        {"team": "blue"},
    )

    assert facts == Facts(
        "/v1/chat/completions",
        ["text", "image"],
        20,
        3,
        True,
        True,
        64,
        "alice",
        {"team": "blue"},
        {"tier": "gold", "n": "7"},
    )


@pytest.mark.parametrize(
    ("body", "modality", "tokens", "messages"),
    [
        ({"prompt": "x" * 80}, ["text"], 20, 0),
        ({"prompt": ["x" * 40, "x" * 40]}, ["text"], 20, 0),
        ({"prompt": [1, 2, 3]}, ["text"], 3, 0),
        ({"prompt": [[1, 2], [3]]}, ["text"], 3, 0),
        ({"input": "x" * 80}, ["text"], 20, 0),
        ({"input": [{"role": "user", "content": "x" * 80}], "instructions": "y" * 40}, ["text"], 30, 1),
        ({"input": [{"content": [{"type": "input_image"}, {"type": "input_audio"}]}]}, ["image", "audio"], 0, 1),
        ({"messages": [{"content": "x" * 80}], "system": [{"type": "text", "text": "y" * 40}]}, ["text"], 30, 1),
        ({"messages": [{"content": [{"type": "video_url"}, {"type": "x_audio_embeds"}]}]}, ["audio", "video"], 0, 1),
        ({"messages": [{"content": "é" * 40}]}, ["text"], 20, 1),
        ({"messages": [{"content": ""}]}, [], 0, 1),
    ],
)
def test_every_shape_of_a_prompt_is_measured(body: object, modality: list[str], tokens: int, messages: int) -> None:
    facts = read(body)

    assert (facts.modality, facts.tokens, facts.messages) == (modality, tokens, messages)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_every_name_of_the_longest_answer_is_read(name: str) -> None:
    assert read({name: 12}).max_tokens == 12
    assert read({"messages": [], name: 12}).max_tokens == 12
    assert read({"messages": [], name: 10**30}).max_tokens == 2**53


@pytest.mark.parametrize(
    "body",
    [
        {"messages": 5, "tools": 7, "stream": "yes", "max_tokens": -1, "user": ["a"], "metadata": []},
        {"messages": [1, None, "x"], "tools": None, "stream": 1, "max_tokens": 1e300, "user": None, "metadata": "x"},
        {"messages": [{"content": [{"type": 3, "text": 4}, 5]}], "tools": [], "max_tokens": "9", "metadata": None},
        b'{"user":"\\ud800","messages":[{"content":"\\ud800"}],"metadata":{"tier":"\\udfff"}}',
        b'{"messages":' + b"[" * 5000,
        b"no json at all",
    ],
)
def test_what_nobody_understands_counts_as_not_said_and_every_rule_can_be_asked(body: object) -> None:
    facts = read(body)

    assert not facts.stream
    assert facts.max_tokens == 0
    assert EVERYTHING.choose(facts) is None
    assert EVERYTHING.counts.get(("a", "failed"), 0) == 0


TEXT = st.text(max_size=5) | st.sampled_from(["text", "image_url", "audio", "plain words"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "type", "text"]), inner),
    max_leaves=12,
)
FIELDS = st.sampled_from(["messages", "input", "prompt", "tools", "stream", "max_tokens", "user", "metadata"])


@given(st.dictionaries(FIELDS, JSON))
def test_reading_never_fails(body: dict[str, Any]) -> None:
    asked = Rules("chat", EVERYTHING.rules)

    asked.choose(read(body))

    assert not any(outcome == "failed" for _, outcome in asked.counts)


Some = st.SearchStrategy[dict[str, Any]]
PART: Some = st.fixed_dictionaries({"type": TEXT}, optional={"text": TEXT})
PARTS = st.lists(PART, max_size=3)
MESSAGE: Some = st.fixed_dictionaries({"role": TEXT}, optional={"content": TEXT | PARTS | st.none()})
CHATS: Some = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3)},
    optional={
        "system": TEXT | PARTS,
        "tools": st.lists(st.just({"type": "function"}), max_size=1) | st.none(),
        "stream": st.booleans() | st.none(),
        "max_tokens": st.integers(-1, 2**60) | st.none(),
        "user": TEXT | st.none(),
        "safety_identifier": TEXT,
        "metadata": st.dictionaries(st.sampled_from(["tier", "n"]), TEXT | st.integers() | st.none()) | st.none(),
    },
)


@given(CHATS)
def test_both_ways_to_read_a_chat_find_the_same(chat: dict[str, Any]) -> None:
    unusual = {**chat, "system": {"content": chat.get("system")}}  # a shape that the typed decoder does not take

    assert read(chat) == read(unusual)


def test_a_form_is_known_by_its_path_alone() -> None:
    facts = facts_of(EVERYTHING, b"/v1/audio/transcriptions", {}, FORM, b"--b\r\n")

    assert (facts.modality, facts.tokens) == (["audio"], 0)


def test_headers_are_read_by_lower_case_names_and_cut_to_a_length() -> None:
    head = read_head(
        b"POST /v1/completions HTTP/1.1\r\nhost: g\r\nX-Team: a\r\nx-team: b\r\nX-Long: " + b"l" * 2000 + b"\r\n\r\n"
    )

    assert head.values(frozenset(("x-team", "x-none"))) == {"x-team": "a, b"}
    assert head.values(frozenset(("x-long",))) == {"x-long": "l" * 512}


# Another model


def test_only_the_model_of_a_body_is_changed() -> None:
    body = b'{"a":1e2, "model" : "\\u0063hat","m":[{"content":"caf\\u00e9 \xc3\xa9","model":"x"}],"model":"chat"}'

    made = with_model(b"application/json", body, "large/1")

    assert made == b'{"a":1e2,"model":"large/1","m":[{"content":"caf\\u00e9 \xc3\xa9","model":"x"}]}'


def test_only_the_model_of_a_form_is_changed() -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    form = part % (b"file", b"\x00\xff model") + part % (b"model", b"%b") + part % (b"user", b"u") + b"--b--\r\n"

    assert with_model(FORM, form.replace(b"%b", b"chat"), "large/1") == form.replace(b"%b", b"large/1")


# Choosing


def split(version: str, weight: float, ready: bool = True) -> Split:
    return Split(version, weight, (Endpoint(f"{version}-a", f"unix:/run/{version}"),) if ready else ())


def managed(*rules: Rule, splits: tuple[Split, ...], candidate: str = "") -> TransitionManager:
    manager = TransitionManager(RequestTracker())
    view = RouteView("chat", 1, splits, "sw-1", 30.0, {}, rules, (), candidate)
    manager.begin_transition(view, 0.0)
    manager.begin_transition(RouteView("vision", 4, (split("w1", 100.0),), "s"), 0.0)
    return manager


def chosen(manager: TransitionManager, facts: Facts, key: bytes = b"") -> tuple[str, str, bool]:
    """(model, version, by the split)."""
    choice, by_split = manager.handle_ruled_request("chat", facts, key)
    assert isinstance(choice, Choice)
    return choice.model, choice.version, by_split


SHORT, LONG = Facts(tokens=10), Facts(tokens=5000)


def test_a_rule_sends_a_request_to_its_version_and_the_answer_names_the_rule() -> None:
    manager = managed(Rule("long", "tokens > 1000", version="v2"), splits=(split("v1", 100.0), split("v2", 0.0)))

    assert chosen(manager, LONG) == ("chat", "v2", False)
    assert chosen(manager, SHORT) == ("chat", "v1", True)
    choice, _ = manager.handle_ruled_request("chat", LONG)
    assert isinstance(choice, Choice)
    assert b"\r\nx-turnout-rule: long\r\n" in choice.stamp
    assert choice is manager.handle_ruled_request("chat", LONG)[0]  # made once


def test_a_rule_sends_a_request_to_another_model_whose_own_rules_are_not_asked() -> None:
    manager = managed(Rule("images", "'image' in modality", model="vision"), splits=(split("v1", 100.0),))
    back = RouteView("vision", 5, (split("w1", 100.0),), "s", rules=(Rule("back", "true", model="chat"),))
    manager.begin_transition(back, 0.0)

    assert chosen(manager, Facts(modality=["image"])) == ("vision", "w1", False)
    assert chosen(manager, Facts(modality=["text"])) == ("chat", "v1", True)


@pytest.mark.parametrize(
    "away",
    [Rule("r", "true", version="v2"), Rule("r", "true", version="gone"), Rule("r", "true", model="gone")],
)
def test_a_rule_whose_target_is_not_there_leaves_the_request_to_the_split(away: Rule) -> None:
    manager = managed(away, splits=(split("v1", 100.0), split("v2", 0.0, ready=False)))

    assert chosen(manager, SHORT) == ("chat", "v1", True)
    assert list(manager.rule_counts()) == [("chat", "r", "not_ready", 1)]


def test_only_requests_of_a_candidate_rule_take_part_in_the_split() -> None:
    short = Rule("short", "tokens < 100", candidate=True)
    manager = managed(short, splits=(split("v1", 40.0), split("v2", 60.0)), candidate="v2")
    keys = [b"user-%d" % n for n in range(300)]

    assert {chosen(manager, LONG, key) for key in keys} == {("chat", "v1", False)}
    assert {chosen(manager, LONG) for _ in range(50)} == {("chat", "v1", False)}
    by_split = [chosen(manager, SHORT, key) for key in keys]
    assert set(by_split) == {("chat", "v1", True), ("chat", "v2", True)}
    plain = [manager.handle_request_routing("chat", key) for key in keys]
    assert [version for _, version, _ in by_split] == [c.version for c in plain if isinstance(c, Choice)]


@pytest.mark.parametrize(
    ("splits", "candidate"),
    [((split("v2", 100.0),), "v2"), ((split("v2", 100.0),), ""), ((split("v1", 0.0), split("v2", 100.0)), "v2")],
)
def test_a_candidate_rule_restricts_nothing_when_there_is_nothing_to_decide(
    splits: tuple[Split, ...], candidate: str
) -> None:
    manager = managed(Rule("short", "tokens < 100", candidate=True), splits=splits, candidate=candidate)

    assert chosen(manager, LONG) == ("chat", "v2", True)
    assert chosen(manager, SHORT) == ("chat", "v2", True)


def test_a_restricted_request_is_served_by_the_candidate_rather_than_by_nobody() -> None:
    short = Rule("short", "tokens < 100", candidate=True)
    manager = managed(short, splits=(split("v1", 90.0, ready=False), split("v2", 10.0)), candidate="v2")

    assert chosen(manager, LONG) == ("chat", "v2", False)


def test_a_candidate_rule_of_a_model_without_an_instance_leaves_the_request_to_the_next_rule() -> None:
    rules = Rule("short", "tokens < 100", candidate=True), Rule("rest", "true", model="vision")
    manager = managed(*rules, splits=(split("v1", 100.0, ready=False),))

    assert chosen(manager, SHORT) == ("vision", "w1", False)


def test_nothing_that_is_ready_is_said_as_without_rules() -> None:
    manager = managed(Rule("r", "true", version="v1"), splits=(split("v1", 100.0, ready=False),))

    assert manager.handle_ruled_request("chat", SHORT) == (NOTHING_READY, True)


def test_rules_come_and_go_with_revisions_and_their_counts_go_on() -> None:
    manager = managed(Rule("long", "tokens > 1000", version="v1"), splits=(split("v1", 100.0),))
    chosen(manager, LONG)
    compiled = manager.ruled["chat"]

    manager.begin_transition(changed_view(manager, revision=2), 0.0)
    assert manager.ruled["chat"] is compiled

    changed = (Rule("long", "tokens > 2000", version="v1"), Rule("new", "tools", version="v1"))
    manager.begin_transition(changed_view(manager, revision=3, rules=changed), 0.0)
    chosen(manager, LONG)
    assert list(manager.rule_counts()) == [("chat", "long", "decides", 2)]

    manager.begin_transition(changed_view(manager, revision=4, rules=()), 0.0)
    assert manager.ruled == {}


def changed_view(manager: TransitionManager, **changes: Any) -> RouteView:
    view = manager.route("chat")
    assert view is not None
    return msgspec.structs.replace(view, **changes)


def test_mirrors_may_be_connected_to_and_get_no_request() -> None:
    manager = managed(splits=(split("v1", 100.0),))
    mirror = Mirror("v2", 10.0, (Endpoint("v2-a", "unix:/run/v2"),))
    manager.begin_transition(changed_view(manager, revision=2, mirrors=(mirror,)), 0.0)

    assert "unix:/run/v2" in manager.addresses()
    choice = manager.handle_request_routing("chat", pin="v2")
    assert not isinstance(choice, Choice)
