"""What an answer to the golden question proves."""

from __future__ import annotations

import msgspec
import pytest

from turnout.workers.inference.client import Reply
from turnout.workers.inference.probe import judge, looping


def reply(data: object, status: int = 200, kind: str = "application/json") -> Reply:
    body = data if isinstance(data, bytes) else msgspec.json.encode(data)
    return Reply(status, {"content-type": kind}, body)


def completion(text: str, logprobs: object = ..., **fields: object) -> dict[str, object]:
    if logprobs is ...:
        logprobs = {"token_logprobs": [-0.1, -2.5]}
    choice = {"text": text, "logprobs": logprobs, "finish_reason": "length", **fields}
    return {"object": "text_completion", "system_fingerprint": "v1", "choices": [choice]}


def chat(text: str | None, **message: object) -> dict[str, object]:
    content = {"content": [{"token": "a", "logprob": -0.3}]}
    choice = {"message": {"role": "assistant", "content": text, **message}, "logprobs": content}
    return {"object": "chat.completion", "system_fingerprint": "v1", "choices": [choice]}


SOUND = completion(" Paris. It lies on the Seine")


@pytest.mark.parametrize(
    "answer",
    [
        SOUND,
        completion(" Paris. Paris. Paris"),
        chat("Hello! I'm here to help"),
        chat(None, reasoning_content="The user greets me"),
    ],
)
def test_a_sane_answer_proves_the_instance(answer: dict[str, object]) -> None:
    verdict = judge(reply(answer), "", "v1", logprobs=True)
    assert verdict.ok, verdict.reason
    assert verdict.fingerprint == "v1"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply({"error": {"message": "Out of range float values are not JSON compliant"}}, 400), "status 400: Out of"),
        (reply({"error": {"message": "EngineCore encountered an issue"}}, 500), "status 500"),
        (reply({"error": {"message": "boom"}}), "answered with an error: boom"),
        (reply(completion("")), "empty"),
        (reply(completion(" \n ")), "empty"),
        (reply(chat(None)), "empty"),
        (reply(completion("!!!!!!!!")), "repeats"),
        (reply(completion("no no no no no")), "repeats"),
        (reply(completion("fine", {"token_logprobs": [-0.1, -9999.0]})), "log probability is -9999"),
        (reply(b'{"choices":[{"text":"x","logprobs":{"token_logprobs":[NaN]}}]}'), "not valid JSON"),
        (reply(completion("fine", None)), "no log probabilities"),
        (reply(completion("fine", finish_reason="abort")), "aborted"),
        (reply({**SOUND, "system_fingerprint": "v0"}), "calls itself v0, not v1"),
        (reply({**SOUND, "system_fingerprint": None}), "calls itself nothing"),
        (reply({"choices": ["odd"]}), "OpenAI's shape"),
        (reply({"choices": [{"text": "x", "logprobs": {"token_logprobs": ["odd"]}}]}), "OpenAI's shape"),
        (reply([1]), "not a JSON object"),
        (reply(b"", kind="audio/wav"), "empty"),
        (reply(b"data: {}", kind="text/event-stream"), "stream"),
        (reply({"object": "list", "data": []}), "empty"),
        (reply({"object": "list", "data": [{"embedding": [0.0, 0.0]}]}), "zero"),
    ],
)
def test_each_sign_of_a_bad_engine_fails_the_proof(answer: Reply, reason: str) -> None:
    verdict = judge(answer, "", "v1", logprobs=True)
    assert not verdict.ok
    assert reason in verdict.reason


@pytest.mark.parametrize(
    "answer",
    [
        reply({"object": "list", "data": [{"embedding": [0.1, -0.2]}]}),
        reply({"text": "what was said"}),
        reply({"object": "response", "output": [{"content": [{"type": "output_text", "text": "hello"}]}]}),
        reply(b"RIFF....", kind="audio/wav"),
        reply({"created": 1, "data": [{"b64_json": "aGk="}]}),
    ],
)
def test_other_endpoints_are_proven_by_what_they_answer(answer: Reply) -> None:
    verdict = judge(answer, "", "v1", logprobs=True)
    assert verdict.ok, verdict.reason


def test_an_expected_text_decides() -> None:
    assert judge(reply(SOUND), "Seine", "v1", logprobs=True).ok
    assert "does not contain 'Rhine'" in judge(reply(SOUND), "Rhine", "v1", logprobs=True).reason


def test_log_probabilities_are_only_asked_of_engines_that_have_them() -> None:
    assert judge(reply(completion("fine", None)), "", "", logprobs=False).ok


def test_an_unknown_path_lets_the_next_probe_be_tried() -> None:
    assert judge(reply({"detail": "Not Found"}, 404), "", "", logprobs=False).absent


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_to_come_back_is_asked_again(status: int) -> None:
    assert judge(reply({}, status), "", "", logprobs=False).later


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("!!!!", True),
        ("!!!", False),
        ("ab ab ab ab", True),
        ("isimir isimir isimir isim", False),
        ("one two three four", False),
        ("", False),
        ("a", False),
    ],
)
def test_looping_is_one_piece_said_four_times(text: str, loops: bool) -> None:
    assert looping(text) is loops
