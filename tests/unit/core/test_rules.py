"""Rules: what is refused when they are set, what a request meets, and that the explanation says the same."""

from __future__ import annotations

import itertools

import cel
import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from turnout.core.rules import MODALITIES, Facts, Rules, problems
from turnout.events.route import Rule

VISION = Facts("/v1/chat/completions", ["text", "image"], 300, 2, True, True, 64, "alice", {"x-team": "a"}, {"n": "7"})


def rule(when: str, name: str = "r", percent: float = 100.0) -> Rule:
    return Rule(name, when, version="v2", percent=percent)


def applies(when: str, facts: Facts = VISION) -> bool:
    assert problems([rule(when)]) == ()
    return Rules("chat", (rule(when),)).choose(facts) is not None


@pytest.mark.parametrize(
    "when",
    [
        "true",
        "'image' in modality && !('audio' in modality)",
        "size(modality) == 2 && modality.exists(m, m == 'image')",
        "modality == ['text', 'image']",
        "tokens > 200 && tokens < 400",
        "messages == 2 && tools && stream && max_tokens <= 64",
        "user == 'alice' && path == '/v1/chat/completions'",
        "user.startsWith('al') && user.contains('lic') && user.matches(r'^a\\w+$')",
        "headers['x-team'] == 'a' && has(headers.x) == false",
        "'x-team' in headers ? metadata.n == '7' : false",
        "int(metadata.n) > 5 // in the words of the client",
        "headers . missing == ''",
        "headers['missing'] != 'a' && metadata['missing'] == \"\"",
        "!('missing' in headers) && !has(metadata.missing)",
    ],
)
def test_an_expression_over_the_facts_applies(when: str) -> None:
    assert applies(when)


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("", "it is empty"),
        ("tokens >", "is no CEL expression: at column 9: Syntax error"),
        ("tokenz > 5", "there is no 'tokenz': a rule may ask for"),
        ("_0 == headers.team", "there is no '_0'"),
        ("user.lowerAscii() == 'a'", "there is no function 'lowerAscii': a rule may call"),
        ("tokens", "is 0 for a request where it should be true or false"),
        ("tokens > 5 ? true : 'no'", "is 'no' for a request where it should be true or false"),
        ("tokens > 'a'", "can't be evaluated: No such overload"),
        ("path == '/v1/embeddings' && user > 5", "can't be evaluated: No such overload"),
        ("tokens / 0 > 1", "fails for every request: division by zero"),
        ("int(user + 'x') > 1", "fails for every request"),
        ("stream && user.matches('(')", "'(' is no regular expression: unclosed group"),
        ("modality.exists(a, modality.all(b, a == b))", "a loop stands inside a loop"),
        ("modality.exists(user, user == 'text')", "a loop calls its element 'user'"),
        ("'picture' in modality", "there is no modality 'picture': there are text, image, audio, video"),
        ("headers['X-Team'] == 'a'", "'X-Team' is no header's name: write it in lower case"),
        ("headers.authorization == 'a'", "rules can't read the header 'authorization'"),
        ("'cookie' in headers", "rules can't read the header 'cookie'"),
        ("headers[user] == 'a'", "headers can only be asked for one entry"),
        ("size(metadata) > 1", "metadata can only be asked for one entry"),
        ("'a' + 'b' in headers", "headers can only be asked for one entry"),
        ("(" * 200 + "true" + ")" * 200, "is no CEL expression"),
        (f"user == '{'a' * 1024}'", "the expression has 1034 bytes: at most 1024"),
    ],
)
def test_an_expression_that_cannot_be_meant_is_refused_with_rule_and_field(when: str, said: str) -> None:
    found = problems([rule("true", "first"), rule(when, "second")])

    assert len(found) == 1
    assert found[0].startswith("rule 'second': when: ")
    assert said in found[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Rule("r", "true"), "rule 'r': has no target"),
        (Rule("r", "true", version="v1", candidate=True), "rule 'r': has version and candidate"),
        (Rule("a b", "true", version="v1"), "rules[0].name is 'a b'"),
        (rule("true", percent=0), "rule 'r': percent is 0"),
        (rule("true", percent=100.5), "rule 'r': percent is 100.5"),
        (rule("true", percent=float("nan")), "rule 'r': percent is nan"),
    ],
)
def test_a_rule_without_one_target_a_name_or_a_share_is_refused(wrong: Rule, said: str) -> None:
    assert [problem.partition(":")[0] for problem in problems([wrong])] == [said.partition(":")[0]]
    assert problems([wrong])[0].startswith(said)


def test_two_rules_of_one_name_and_too_many_rules_are_refused() -> None:
    assert problems([rule("true"), rule("tools")]) == ("rule 'r': name: there are two rules of this name",)
    assert problems([rule("true", f"r{n}") for n in range(50)]) == ()
    assert problems([rule("true", f"r{n}") for n in range(51)]) == ("there are 51 rules: at most 50 are allowed",)


def test_the_first_rule_that_applies_decides() -> None:
    rules = Rules("chat", (rule("tokens > 1000", "long"), rule("tools", "tools"), rule("true", "rest")))

    assert [rules.choose(facts) for facts in (VISION, Facts(tokens=2000, tools=True), Facts())] == [
        rules.rules[1],
        rules.rules[0],
        rules.rules[2],
    ]


def test_a_request_whose_rule_fails_goes_on_to_the_next_one_and_is_counted() -> None:
    rules = Rules("chat", (rule("int(metadata.n) > 5", "numbers"), rule("true", "rest")))

    assert rules.choose(Facts(metadata={"n": "many"})) == rules.rules[1]
    assert rules.choose(Facts(metadata={"n": "6"})) == rules.rules[0]
    assert rules.counts == {("numbers", "failed"): 1, ("rest", "decides"): 1, ("numbers", "decides"): 1}


def test_a_rule_that_does_not_compile_any_more_fails_and_leaves_the_others() -> None:
    rules = Rules("chat", (rule("from_a_newer_turnout()", "new"), rule("syntax error", "odd"), rule("true", "rest")))

    assert rules.choose(Facts()) == rules.rules[2]
    assert [told.outcome for told in rules.explain(Facts())] == ["failed", "failed", "decides"]


@pytest.mark.parametrize("when", ["tokens > {}", "(" * 80 + "tokens > {}" + ")" * 80, "!" * 900 + "(tokens > {})"])
def test_fifty_rules_are_asked_in_their_order_however_deep_they_are(when: str) -> None:
    rules = Rules("chat", tuple(rule(when.format(100 - n), f"r{n}") for n in range(50)))

    assert rules.choose(Facts(tokens=51)) is None
    assert rules.choose(Facts(tokens=91)) == rules.rules[10]
    assert rules.choose(Facts(tokens=101)) == rules.rules[0]


def test_a_target_that_is_not_ready_leaves_the_request_to_the_next_rule() -> None:
    rules = Rules("chat", (Rule("a", "true", version="v2"), Rule("b", "true", model="other")))

    assert rules.choose(Facts(), usable=lambda one: one.name == "b") == rules.rules[1]
    assert rules.counts == {("a", "not_ready"): 1, ("b", "decides"): 1}
    assert rules.explain(Facts(), usable=lambda one: one.name == "b")[0].reason == (
        "true is true, but version v2 has no ready instance"
    )


def test_a_percentage_holds_for_keys_and_for_requests_without_one() -> None:
    rules = Rules("chat", (rule("true", percent=30.0),))

    with_keys = sum(rules.choose(Facts(), b"user-%d" % n) is not None for n in range(5000))
    without = sum(rules.choose(Facts()) is not None for _ in range(5000))

    assert 1380 < with_keys < 1620  # four standard deviations of 1500
    assert 1490 <= without <= 1510


def test_a_raised_percentage_keeps_everybody_who_was_inside() -> None:
    keys = [b"user-%d" % n for n in range(500)]
    inside = [
        {key for key in keys if Rules("chat", (rule("true", percent=percent),)).choose(Facts(), key)}
        for percent in (1.0, 10.0, 50.0, 100.0)
    ]

    assert all(smaller < larger for smaller, larger in itertools.pairwise(inside))


def test_two_rules_draw_their_shares_independently() -> None:
    rules = Rules("chat", (rule("true", "a", 50.0), rule("true", "b", 50.0)))

    keyed = [rules.choose(Facts(), b"user-%d" % n) for n in range(4000)]
    unkeyed = [rules.choose(Facts()) for _ in range(4000)]

    for chosen in (keyed, unkeyed):
        assert 850 < sum(one is not None and one.name == "b" for one in chosen) < 1150


def test_the_rules_say_what_must_be_read_for_them() -> None:
    assert not Rules("chat", (rule("headers.a == 'x' && path == '/'"),)).reads_body
    assert Rules("chat", (rule("'image' in modality"),)).reads_body
    assert Rules("chat", (rule("has(metadata.a) || 'b' in headers"),)).metadata == {"a"}
    assert Rules("chat", (rule("has(metadata.a) || 'b' in headers"),)).headers == {"b"}


def test_the_explanation_names_what_was_read() -> None:
    rules = Rules("chat", (rule("tokens < 200 && headers.x == ''", "short"), rule("tools", "tools", 10), rule("true")))

    told = rules.explain(VISION, b"alice")

    assert [one.outcome for one in told] == ["passes", "outside", "decides"]
    assert told[0].reason == "tokens < 200 && headers.x == '' is false (tokens is 300, headers['x'] is '')"
    assert told[1].reason.startswith("tools is true (tools is true); the request's key is at ")
    assert told[1].reason.endswith(" %, outside of 10 %")


WHENS = st.sampled_from(
    [
        *("tokens > 100", "tools || stream", "'image' in modality", "headers.a == 'x'", "int(metadata.n) > 3"),
        *("user.startsWith('a')", "max_tokens > 10 && messages < 3", "'a' in headers", "path == '/v1/embeddings'"),
        *("modality.all(m, m == 'text')", "broken(", "true"),
    ]
)
TEXTS = st.sampled_from(["", "x", "5", "alice", "/v1/embeddings", "é"])
FACTS = st.builds(
    Facts,
    path=TEXTS,
    modality=st.lists(st.sampled_from(MODALITIES), unique=True),
    tokens=st.integers(0, 300),
    messages=st.integers(0, 5),
    tools=st.booleans(),
    stream=st.booleans(),
    max_tokens=st.integers(0, 20),
    user=TEXTS,
    headers=st.dictionaries(st.sampled_from("ab"), TEXTS),
    metadata=st.dictionaries(st.sampled_from("nm"), TEXTS),
)


@given(
    st.lists(st.tuples(WHENS, st.sampled_from([100.0, 40.0])), max_size=5),
    st.lists(st.tuples(FACTS, st.binary(min_size=1, max_size=3)), max_size=6),
)
def test_the_choice_is_what_the_explanation_says_whatever_was_asked_before(
    whens: list[tuple[str, float]], asked: list[tuple[Facts, bytes]]
) -> None:
    made = tuple(rule(when, f"r{n}", percent) for n, (when, percent) in enumerate(whens))
    rules = Rules("chat", made)

    for facts, key in asked:
        chosen = rules.choose(facts, key)
        told = Rules("chat", made).explain(facts, key)  # one that has seen no other request

        assert [one.rule for one in told if one.outcome == "decides"] == ([chosen.name] if chosen else [])


TERMS = st.sampled_from(
    [
        *("true", "tools", "stream", "tokens > 100", "messages == max_tokens", "'image' in modality"),
        *("user == 'x'", "user != 'x'", "path == user", "user.startsWith('al')", "user.endsWith('ce')"),
        *("user.contains(path)", "headers.a == 'x'", "headers['b'] != \"5\"", "'a' in headers", "has(metadata.n)"),
        *("metadata.n.contains('li')", "int(metadata.m) > 3", "size(headers.a + 'x') > 2", "user + 'x' == 'xx'"),
        *("'x' + user == 'xx'", "user == 'x' + ''", "metadata.m == r'5'", "modality.all(m, m != headers.b)"),
    ]
)
EXPRESSIONS = st.recursive(
    TERMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["&&", "||", "==", "!="]), inner).map(" ".join),
        st.tuples(inner, inner, inner).map(lambda parts: "{} ? {} : {}".format(*parts)),
        inner.map("({})".format),
        inner.map("!({})".format),
        inner.map("!{}".format),
        st.tuples(inner, inner).map(lambda parts: "({}) in [{}]".format(*parts)),
    ),
    max_leaves=5,
)


@given(EXPRESSIONS, FACTS)
@example("tools in ['a' in headers]", Facts())
def test_an_expression_means_what_cel_says_it_means(when: str, facts: Facts) -> None:
    assume(not problems((rule(when),)))  # what is refused when it is set need not mean anything
    facts = msgspec.structs.replace(
        facts, headers={"a": "", "b": "", **facts.headers}, metadata={"n": "", "m": "", **facts.metadata}
    )
    try:
        expected = cel.compile(when).execute(msgspec.structs.asdict(facts))
    except (LookupError, RuntimeError, TypeError, ValueError):
        expected = None

    chosen = Rules("chat", (rule(when),)).choose(facts)

    assert (chosen is not None) == (expected is True)
