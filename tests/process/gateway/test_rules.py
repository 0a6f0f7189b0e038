"""Rules through a real gateway: where requests go, what engines get, what answers say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tests.process.gateway.stage import BODY, Stage, on_stage

from turnout.events.route import Rule
from turnout.projections.routing import RouteView

if TYPE_CHECKING:
    from turnout.events.route import Split

pytestmark = pytest.mark.process

IMAGE = b'{"model":"chat","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:"}}]}]}'
AUDIO = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nchat\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\x00\xff\r\n--b--\r\n'
)


def apply(s: Stage, revision: int, *rules: Rule, splits: tuple[Split, ...], model: str = "chat") -> None:
    s.plane.apply(RouteView(model, revision, splits, "s", 30.0, rules=rules))


@on_stage()
async def test_a_rule_sends_requests_to_a_version_by_body_and_header(s: Stage) -> None:
    splits = (s.split("v1", await s.engine("a")), s.split("v2", await s.engine("b"), weight=0))
    beta = Rule("beta", "headers['x-team'] == 'beta' && tokens < 100", version="v2")
    apply(s, 1, beta, splits=splits)
    client = await s.client()

    chosen = await client.ask(head=b"X-Team: beta\r\n")
    other = await client.ask()
    long = await client.ask(BODY.replace(b"hi", b"hi" * 400), head=b"X-Team: beta\r\n")

    assert [answer.headers["x-turnout-version"] for answer in (chosen, other, long)] == ["v2", "v1", "v1"]
    assert chosen.headers["x-turnout-rule"] == "beta"
    assert "x-turnout-rule" not in other.headers
    assert [ask.body for ask in s.engines["b"].asked] == [BODY]


@on_stage()
async def test_a_request_for_another_model_names_it_to_the_engine(s: Stage) -> None:
    vision = await s.engine("vision")
    apply(s, 1, splits=(s.split("w1", vision),), model="vision")
    media = Rule("media", "'image' in modality || 'audio' in modality", model="vision")
    apply(s, 1, media, splits=(s.split("v1", await s.engine("a")),))
    client = await s.client()

    for _ in range(2):
        answer = await client.ask(IMAGE)
        assert (answer.status, answer.headers["x-turnout-version"]) == (200, "w1")
    await client.ask(AUDIO, "/v1/audio/transcriptions", b"content-type: multipart/form-data; boundary=b\r\n")
    text = await client.ask()

    assert text.headers["x-turnout-version"] == "v1"
    asked = [ask.body for ask in vision.asked]
    assert [json.loads(body) for body in asked[:2]] == [{**json.loads(IMAGE), "model": "vision"}] * 2
    assert asked[2] == AUDIO.replace(b"chat", b"vision")


@on_stage()
async def test_a_request_whose_chosen_version_is_gone_is_answered_by_another(s: Stage) -> None:
    gone = await s.engine("b")
    await gone.stop()
    splits = (s.split("v1", await s.engine("a")), s.split("v2", gone, weight=0))
    apply(s, 1, Rule("all", "true", version="v2"), splits=splits)
    client = await s.client()

    answer = await client.ask()

    assert (answer.status, answer.headers["x-turnout-version"]) == (200, "v1")


@on_stage(allow_pin=True)
async def test_a_pinned_request_is_asked_no_rule(s: Stage) -> None:
    splits = (s.split("v1", await s.engine("a")), s.split("v2", await s.engine("b"), weight=0))
    apply(s, 1, Rule("all", "true", version="v2"), splits=splits)
    client = await s.client()

    answer = await client.ask(head=b"x-turnout-version: v1\r\n")

    assert answer.headers["x-turnout-version"] == "v1"
    assert "x-turnout-rule" not in answer.headers
