"""What the management API promises whatever the resource: token, keys, problems, ETags, pages, limits, HEAD."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, get_args

import pytest
from tests.unit.admin.conftest import FAKE, TOKEN, Api

from turnout.core.alert import AcknowledgeAlert
from turnout.core.decider import Rejected
from turnout.core.handling import (
    AdvanceSwitch,
    ContinueSwitch,
    EvictVersion,
    HoldSwitch,
    PreloadVersion,
    RetrySwitch,
    StopInstance,
    StopSwitch,
    UndoModel,
)
from turnout.core.model import RegisterVersion, SetRules, SetServing
from turnout.core.residence import PinVersion, SetReplicas
from turnout.events.model import EngineSpec, ModelEvent, Probe, Serving
from turnout.events.route import Rule
from turnout.events.store import StoreFull, Unavailable
from turnout.projections.registry import Registry
from turnout.workers.admin import cache, fleet, models, problems, switches
from turnout.workers.answers import CommandRejected

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from turnout.workers.ports import Request

V1 = "/v1/models/chat/versions/v1"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/log", "/nothing", "/v1/models/chat/health"])
@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong-wrong-wrong-wrong", f"Basic {TOKEN}", TOKEN, "Bearer tökén", f"Bearer {TOKEN}x"],
)
def test_nothing_is_said_or_done_without_the_token(api: Api, path: str, header: str) -> None:
    answer = api("GET", path, headers={"authorization": header.encode()})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.json()["code"] == "token_invalid"
    assert TOKEN not in answer.text


def test_a_change_with_a_wrong_token_changes_nothing(api: Api) -> None:
    assert api("PUT", V1, json=FAKE, headers={"authorization": "Bearer nope"}).status_code == 401
    assert api.done("GET", "/v1/models")["items"] == []


def test_the_page_the_schema_health_and_metrics_need_no_token(api: Api) -> None:
    for path in ("/", "/openapi.json", "/healthz", "/metrics"):
        answer = api("GET", path, headers={"authorization": ""})
        assert answer.status_code == 200, path
        assert TOKEN not in answer.text
    assert api("GET", "/openapi.json").json()["openapi"].startswith("3.1")
    assert "turnout_admin_answers_total" in api("GET", "/metrics").text


def test_health_says_where_there_is_no_connection_to_nats(api: Api) -> None:
    api.connected = False
    answer = api("GET", "/healthz")
    assert (answer.status_code, answer.json()["connected"]) == (503, False)
    assert "turnout_admin_control_plane_connected 0.0" in api("GET", "/metrics").text


def test_a_command_sent_twice_with_its_key_takes_effect_once_and_is_answered_the_same(api: Api) -> None:
    key = {"idempotency-key": "register-1"}
    first, again = api("PUT", V1, json=FAKE, headers=key), api("PUT", V1, json=FAKE, headers=key)
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    assert len(first.json()["events"]) == 2
    assert len(api.done("GET", "/v1/log")["items"]) == 2


def test_a_switch_asked_for_twice_with_one_key_is_one_switch(api: Api) -> None:
    api.worker()
    api.done("PUT", V1, json=FAKE)
    body, key = {"model": "chat", "version": "v1"}, {"idempotency-key": "s1"}
    first, again = (
        api("POST", "/v1/switches", json=body, headers=key),
        api("POST", "/v1/switches", json=body, headers=key),
    )
    assert (first.status_code, first.json()) == (202, again.json())
    assert first.headers["location"] == f"/v1/switches/{first.json()['ids'][0]}"
    assert len(api.done("GET", "/v1/switches")["items"]) == 1
    other = api("POST", "/v1/switches", json=body)
    assert (other.status_code, other.json()["code"]) == (409, "switch_running")


def test_a_key_that_is_used_for_something_else_is_refused(api: Api, make_api: Callable[..., Api]) -> None:
    key = {"idempotency-key": "k"}
    api.done("PUT", V1, json=FAKE, headers=key)
    answer = api("PUT", "/v1/models/chat/versions/v2", json=FAKE, headers=key)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")
    restarted = make_api()  # remembers no keys: the other command is another one, not taken for the first
    assert restarted.done("PUT", "/v1/models/chat/versions/v2", json=FAKE, headers=key)["events"]
    assert set(restarted.done("GET", "/v1/models/chat")["versions"]) == {"v1", "v2"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/models/nope", None, 404, "model_unknown"),
        ("GET", "/v1/models/nope/route", None, 404, "model_unknown"),
        ("GET", "/v1/models/nope/health", None, 404, "model_unknown"),
        ("GET", "/v1/models/chat/versions/v9", None, 404, "version_unknown"),
        ("GET", "/v1/models/chat/policies/p", None, 404, "policy_unknown"),
        ("GET", "/v1/models/chat/versions/v1/compare/v9", None, 404, "version_unknown"),
        ("GET", "/v1/models/chat/versions/v1/compare/v1", None, 422, "versions_equal"),
        ("POST", "/v1/instances/i9/stop", {}, 404, "instance_unknown"),
        ("GET", "/v1/switches/sw-1", None, 404, "switch_unknown"),
        ("GET", "/v1/switches/sw-1/evidence", None, 404, "switch_unknown"),
        ("POST", "/v1/switches/sw-1/abort", {}, 404, "switch_unknown"),
        ("POST", "/v1/switches/sw-1/promote", {"step": 1}, 404, "switch_unknown"),
        ("GET", "/v1/switches/sw-1/report", None, 404, "switch_unknown"),
        ("GET", "/v1/models/chat/versions/v9/health", None, 404, "version_unknown"),
        ("GET", "/v1/models/chat/versions/v1/health", None, 409, "version_not_loaded"),
        ("GET", "/v1/models/chat/versions/v9/placing", None, 404, "version_unknown"),
        ("PUT", "/v1/models/chat/versions/v9/pin", {}, 404, "version_unknown"),
        ("POST", "/v1/models/chat/versions/v1/preload", {"priority": 1000}, 422, "parameters_invalid"),
        ("PUT", "/v1/models/chat/versions/v1/replicas", {"replicas": 0}, 422, "parameters_invalid"),
        ("GET", "/v1/models/nope/serving", None, 404, "model_unknown"),
        ("PUT", "/v1/models/chat/serving", {"serving": {"on_demand": True, "queue": 0}}, 422, "serving_invalid"),
        ("PUT", "/v1/models/chat/serving", {"serving": {"keep_alive": "5m"}}, 400, "request_invalid"),
        ("POST", "/v1/models/chat/rules/test", {"request": []}, 400, "request_invalid"),
        ("GET", "/v1/workers/w", None, 404, "worker_unknown"),
        ("GET", "/v1/gateways/g", None, 404, "gateway_unknown"),
        ("GET", "/v1/instances/i", None, 404, "instance_unknown"),
        ("GET", "/v1/alerts/a", None, 404, "alert_unknown"),
        ("POST", "/v1/alerts/a/acknowledge", {}, 404, "alert_unknown"),
        ("GET", "/v2", None, 404, "path_unknown"),
        ("DELETE", "/v1/models", None, 405, "method_unknown"),
        ("POST", "/v1/switches", {"model": "chat", "version": "v9"}, 404, "version_unknown"),
        ("POST", "/v1/switches/plan", {"model": "nope", "version": "v9"}, 404, "model_unknown"),
        ("POST", "/v1/switches", {"model": "chat", "version": 1}, 400, "request_invalid"),
        ("POST", "/v1/switches", {"model": "chat", "version": "v1", "wait": True}, 400, "request_invalid"),
        ("POST", "/v1/switches", {"model": "chat", "version": "v1", "bake_s": -1}, 422, "parameters_invalid"),
        ("POST", "/v1/models/chat/undo", {}, 409, "nothing_to_undo"),
        ("PUT", "/v1/models/chat/versions/v1", {"engine": {"kind": "fake", "args": ["-x"]}}, 409, "version_exists"),
        ("PUT", "/v1/models/chat/versions/v2", {"engine": {"kind": "none"}}, 422, "engine_invalid"),
        ("PUT", "/v1/models/chat/versions/v2", {"engine": {"kind": "fake", "pth": "/x"}}, 400, "request_invalid"),
        ("PUT", "/v1/models/chat/policies/p", {"strategy": "sudden"}, 422, "policy_invalid"),
        ("PUT", "/v1/models/chat/policies/p", {}, 422, "policy_invalid"),
        (
            "PUT",
            "/v1/models/chat/rules",
            {"rules": [{"name": "r", "when": "(", "version": "v1"}]},
            422,
            "rules_invalid",
        ),
        ("PUT", "/v1/models/chat/rules", {"rules": [{"name": "r", "wen": "true"}]}, 400, "request_invalid"),
        ("GET", "/v1/log?after=-1", None, 400, "request_invalid"),
        ("GET", "/v1/models?limit=0", None, 400, "request_invalid"),
    ],
)
def test_what_can_not_be_is_a_problem_with_a_code_and_a_hint(
    api: Api, method: str, path: str, body: dict[str, Any] | None, status: int, code: str
) -> None:
    api.done("PUT", V1, json=FAKE)
    answer = api(method, path, json=body)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["status"] == status
    assert problem["type"] == f"urn:turnout:problem:{code}"
    assert problem["instance"] == f"urn:turnout:request:{answer.headers['x-request-id']}"
    assert problem["title"]
    assert problem["detail"]
    assert problem["hint"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"\xff", b'{"model": "a", "model"', b'"x"', b"1e999"])
def test_a_malformed_body_is_refused_in_words(api: Api, body: bytes) -> None:
    answer = api("POST", "/v1/switches", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "request_invalid"), answer.text


def test_an_oversized_body_is_refused(make_api: Callable[..., Api]) -> None:
    api = make_api(max_body_bytes=100)
    answer = api("PUT", V1, json={**FAKE, "note": "x" * 200})
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert api.done("GET", "/v1/models")["items"] == []


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "policies/p"), ("PUT", "rules"), ("PUT", "serving"), ("DELETE", "versions/v1")]
)
def test_a_change_made_from_an_older_state_is_refused(api: Api, method: str, path: str) -> None:
    api.done("PUT", V1, json=FAKE)
    seen = api("GET", "/v1/models/chat").headers["etag"]
    api.done("PUT", "/v1/models/chat/versions/v2", json=FAKE)  # somebody else
    bodies: dict[str, dict[str, Any]] = {
        "policies/p": {"strategy": "canary"},
        "rules": {"rules": []},
        "serving": {"serving": {"on_demand": True}},
    }
    body = bodies.get(path)
    stale = api(method, f"/v1/models/chat/{path}", json=body, headers={"if-match": seen})
    assert (stale.status_code, stale.json()["code"]) == (412, "sequence_stale")
    now = api("GET", "/v1/models/chat").headers["etag"]
    assert api(method, f"/v1/models/chat/{path}", json=body, headers={"if-match": now}).status_code == 200


@pytest.mark.parametrize("etag", ["*", 'W/"3"', "3", '"x"', '"-1"', ""])
def test_an_etag_that_was_never_answered_is_stale(api: Api, etag: str) -> None:
    api.done("PUT", V1, json=FAKE)
    answer = api("PUT", "/v1/models/chat/rules", json={"rules": []}, headers={"if-match": etag})
    assert (answer.status_code, answer.json()["code"]) == (412, "sequence_stale")


def test_what_was_read_after_a_change_has_the_etag_for_the_next(api: Api) -> None:
    api.done("PUT", V1, json=FAKE)
    for number in range(3):
        etag = api("GET", "/v1/models/chat/policies").headers["etag"]
        policy = {"strategy": "canary", "bake": f"{number + 1}m"}
        api.done("PUT", "/v1/models/chat/policies/p", json=policy, headers={"if-match": etag})
        assert api.done("GET", "/v1/models/chat/policies/p") == policy


@pytest.mark.parametrize(
    ("error", "code", "after"),
    [(Unavailable("no controller answers; start one"), "store_unavailable", "1"),
     (StoreFull("the disk is full"), "store_full", "30")],
)  # fmt: skip
def test_a_failure_of_the_infrastructure_is_never_a_refusal(
    api: Api, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, after: str
) -> None:
    async def fail(role: str, verb: str, request: Request, timeout_s: float) -> bytes:
        raise error

    monkeypatch.setattr(api.plane.clock, "monotonic", iter(range(0, 10_000, 6)).__next__)
    monkeypatch.setattr(api.plane, "ask", fail)
    answer = api("PUT", V1, json=FAKE)
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, code, after)


def test_a_bug_is_told_without_its_insides(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*keys: str) -> None:
        raise RuntimeError("secret insides")

    monkeypatch.setattr(api.plane, "snapshot", fail)
    answer = api("GET", "/v1/models")
    assert (answer.status_code, answer.json()["code"]) == (500, "bug")
    assert "secret" not in answer.text


def test_pages_hold_everything_once(api: Api) -> None:
    names = [f"m{number}" for number in range(5)]
    for model in names:
        api.done("PUT", f"/v1/models/{model}/versions/v1", json=FAKE)
    seen: list[str] = []
    after = ""
    while True:
        page = api.done("GET", "/v1/models", params={"limit": 2} | ({"after": after} if after else {}))
        seen += [item["model"] for item in page["items"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert seen == names


def test_a_name_with_a_slash_is_one_segment(api: Api) -> None:
    api.done("PUT", "/v1/models/meta-llama%2FLlama-3.1%25/versions/v1", json=FAKE)
    assert api.done("GET", "/v1/models/meta-llama%2FLlama-3.1%25")["model"] == "meta-llama/Llama-3.1%"


def test_head_is_get_without_its_body_and_options_names_the_methods(api: Api) -> None:
    api.done("PUT", V1, json=FAKE)
    head, get = api("HEAD", "/v1/models/chat"), api("GET", "/v1/models/chat")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", get.headers["etag"])
    assert api("HEAD", "/v1/models/nope").status_code == 404
    assert api("HEAD", "/v1/log/stream").status_code == 200  # and it ends
    options = api("OPTIONS", V1)
    assert options.status_code == 204
    assert options.headers["allow"] == "DELETE, GET, HEAD, OPTIONS, PUT"
    assert api("PATCH", V1, json={}).headers["allow"] == options.headers["allow"]
    assert api("OPTIONS", "/nothing").status_code == 404


def test_no_other_site_is_let_in(api: Api) -> None:
    answer = api("GET", "/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_who_asks_stands_in_the_log(api: Api) -> None:
    api.done("PUT", V1, json=FAKE, headers={"x-turnout-actor": "alice"})
    assert api.done("GET", "/v1/models/chat")["versions"]["v1"]["registered_by"] == "ops:alice"
    answer = api("PUT", V1, json=FAKE, headers={"x-turnout-actor": "config"})  # may do what others may not
    assert (answer.status_code, answer.json()["code"]) == (422, "name_invalid")


def test_the_log_is_read_in_pages_and_filtered(api: Api) -> None:
    for model in ("a", "b", "a2"):
        api.done("PUT", f"/v1/models/{model}/versions/v1", json=FAKE)
    first = api.done("GET", "/v1/log", params={"limit": 4})
    rest = api.done("GET", "/v1/log", params={"after": first["next"]})
    assert [line["sequence"] for line in (*first["items"], *rest["items"])] == [1, 2, 3, 4, 5, 6]
    assert rest["next"] is None
    mine = api.done("GET", "/v1/log", params={"model": "b"})["items"]
    assert [line["type"] for line in mine] == ["ModelRegistered", "VersionRegistered"]
    assert mine[1]["sentence"] == "http registered b v1 (fake)"


def test_a_follower_goes_on_behind_the_last_event_that_it_has_seen(api: Api, runner: asyncio.Runner) -> None:
    api.done("PUT", V1, json=FAKE)
    api.done("PUT", "/v1/models/chat/versions/v2", json=FAKE)

    async def read(count: int, last: bytes) -> bytes:
        got = b""
        enough = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await enough.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal got
            got += message.get("body", b"")
            if got.count(b"\r\n\r\n") >= count:
                enough.set()

        scope = {
            **{"type": "http", "method": "GET", "path": "/v1/log/stream", "raw_path": b"/v1/log/stream"},
            **{"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""},
            "headers": [(b"authorization", f"Bearer {TOKEN}".encode()), (b"last-event-id", last)],
        }
        await asyncio.wait_for(api.app(scope, receive, send), 20)  # type: ignore[arg-type]
        return got

    lines = runner.run(read(2, b"1")).decode().splitlines()
    assert [line for line in lines if line.startswith(("id:", "event:"))][:4] == [
        "id: 2",
        "event: VersionRegistered",
        "id: 3",
        "event: VersionRegistered",
    ]


def test_a_request_that_takes_too_long_is_given_up(
    make_api: Callable[..., Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_api(request_s=0.05)

    async def hang(*keys: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(api.plane, "snapshot", hang)
    answer = api("GET", "/v1/models")
    assert (answer.status_code, answer.json()["code"]) == (408, "request_timeout")


def test_every_refusal_has_a_status_of_its_kind() -> None:
    assert problems.status_of("model_unknown") == 404
    assert problems.status_of("rules_invalid") == 422
    assert problems.status_of("sequence_stale") == 412
    assert problems.status_of("version_in_use") == 409
    made, _ = problems.of(CommandRejected(Rejected("no_capacity", "why", "what")))
    assert (made.status, made.title, made.hint) == (409, "Conflict", "what")


@pytest.mark.parametrize(
    ("body", "command", "named_elsewhere"),
    [
        (models.Registration, RegisterVersion, {"model", "version"}),
        (models.NewEngine, EngineSpec, set[str]()),
        (models.NewProbe, Probe, set[str]()),
        (models.NewRule, Rule, set[str]()),
        (models.NewRules, SetRules, {"model"}),
        (models.Undo, UndoModel, {"model"}),
        (models.Reason, StopSwitch, {"switch"}),
        (models.Reason, ContinueSwitch, {"switch"}),
        (models.Reason, RetrySwitch, {"switch"}),
        (models.Reason, PinVersion, {"model", "version"}),
        (models.Reason, EvictVersion, {"model", "version"}),
        (cache.Preload, PreloadVersion, {"model", "version"}),
        (cache.Replicas, SetReplicas, {"model", "version"}),
        (models.NewServing, Serving, set[str]()),
        (models.ServedLike, SetServing, {"model"}),
        (switches.Promotion, AdvanceSwitch, {"switch"}),
        (switches.Pause, HoldSwitch, {"switch"}),
        (fleet.Note, AcknowledgeAlert, {"alert", "by"}),
        (fleet.Stop, StopInstance, {"instance"}),
    ],
)
def test_a_body_can_say_all_that_its_command_can(
    body: type[msgspec.Struct], command: type[msgspec.Struct], named_elsewhere: set[str]
) -> None:
    assert {*body.__struct_fields__} | named_elsewhere == {*command.__struct_fields__}


def test_every_fact_of_a_model_moves_its_etag() -> None:
    assert set(get_args(ModelEvent)) <= set(Registry().folds)
