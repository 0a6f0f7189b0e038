"""What is loaded and shall be, how a model is served, which rule decides; health of a version, story of a switch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.admin.conftest import FAKE
from tests.unit.cli.tale import serving

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.admin.conftest import Api

    from turnout.events.memory import MemoryStore

CHAT = "/v1/models/chat"
V1, V2, V3 = (f"{CHAT}/versions/v{number}" for number in (1, 2, 3))


@pytest.fixture
def chat(store: MemoryStore, make_api: Callable[..., Api]) -> Api:
    """chat serves v1 and has v2 loaded, both on w1; v3 is registered."""
    serving(store)
    api = make_api()
    api.done("PUT", f"{CHAT}/versions/v3", json=FAKE)
    return api


def test_the_cache_says_what_each_worker_holds_and_why(chat: Api) -> None:
    cache = chat.done("GET", "/v1/cache")
    (worker,) = cache["workers"]
    serves, idle = worker["instances"]
    assert (worker["worker"], worker["places"], worker["capacity"]) == ("w1", 2, 4)
    assert (serves["version"], serves["idle_since"], serves["leaves"]) == ("v1", None, 0)
    assert (idle["version"], idle["phase"], idle["leaves"], idle["pinned"]) == ("v2", "ready", 1, False)
    assert serves["why"]
    assert idle["why"]


def test_a_pin_is_set_once_and_taken_away(chat: Api) -> None:
    key = {"idempotency-key": "pin-1", "x-turnout-actor": "alice"}
    first = chat.done("PUT", f"{V2}/pin", json={"reason": "fair"}, headers=key)
    assert first["events"]
    assert chat.done("PUT", f"{V2}/pin", json={"reason": "fair"}, headers=key) == first
    assert [one["pinned"] for one in chat.done("GET", "/v1/cache")["workers"][0]["instances"]] == [False, True]
    assert chat.done("DELETE", f"{V2}/pin")["events"]
    assert chat.done("DELETE", f"{V2}/pin")["events"] == []
    assert [one["pinned"] for one in chat.done("GET", "/v1/cache")["workers"][0]["instances"]] == [False, False]


def test_a_preload_loads_and_an_eviction_forgets_the_wish(api: Api) -> None:
    api.done("PUT", V1, json=FAKE)  # no worker: the wish waits
    answer = api("POST", f"{V1}/preload", json={"priority": 3})
    assert answer.status_code == 202
    (waiting,) = api.done("GET", "/v1/cache")["waiting"]
    assert (waiting["version"], waiting["priority"]) == ("v1", 3)
    assert api("POST", f"{V1}/evict", json={"reason": "not now"}).status_code == 202
    assert api.done("GET", "/v1/cache")["waiting"] == []


def test_where_a_version_fits_is_told_and_nothing_is_loaded(chat: Api) -> None:
    chat.done("PUT", f"{V3}/replicas", json={"replicas": 2})
    before = len(chat.done("GET", "/v1/log")["items"])
    placing = chat.done("GET", f"{V3}/placing")
    assert (placing["replicas"], placing["missing"], placing["chosen"]) == (2, 2, ["w1", "w1"])
    assert (placing["offers"][0]["worker"], placing["offers"][0]["verdict"]) == ("w1", "fits")
    assert len(chat.done("GET", "/v1/log")["items"]) == before


def test_what_is_loaded_is_listed_with_models_at_zero(chat: Api) -> None:
    chat.done("PUT", "/v1/models/rare/versions/v1", json=FAKE)
    chat.done("PUT", "/v1/models/rare/serving", json={"serving": {"on_demand": True}})
    one, two, zero = chat.done("GET", "/v1/loaded")["items"]
    assert (one["model"], one["version"], one["worker"], one["bytes"]) == ("chat", "v1", "w1", 2**20)
    assert (two["version"], two["kept"]) == ("v2", "while there is room")
    assert (zero["model"], zero["phase"], zero["worker"]) == ("rare", "zero", "")
    assert chat.done("GET", "/v1/loaded?model=rare")["items"] == [zero]


def test_how_a_model_is_served_is_read_and_set(api: Api) -> None:
    api.done("PUT", V1, json=FAKE)
    read = api("GET", f"{CHAT}/serving")
    assert read.json() == {}  # as the schema's defaults say: always loaded
    body = {"serving": {"on_demand": True, "keep_alive_s": 60.0}}
    assert api.done("PUT", f"{CHAT}/serving", json=body, headers={"if-match": read.headers["etag"]})["events"]
    assert api.done("GET", f"{CHAT}/serving") == body["serving"]
    assert api.done("PUT", f"{CHAT}/serving", json=body)["events"] == []


def test_the_rules_are_asked_about_a_request(chat: Api) -> None:
    rule = {"name": "beta", "when": "headers['x-team'] == 'beta'", "version": "v3"}
    trial: dict[str, Any] = {"request": {"messages": []}, "headers": {"X-Team": "beta"}}
    none = chat.done("POST", f"{CHAT}/rules/test", json=trial)
    assert (none["rule"], none["rules"]) == (None, [])
    before = chat.done("POST", f"{CHAT}/rules/test", json={**trial, "rules": [rule]})
    assert (before["rule"], before["facts"]["path"]) == ("beta", "/v1/chat/completions")
    chat.done("PUT", f"{CHAT}/rules", json={"rules": [rule]})
    (told,) = chat.done("POST", f"{CHAT}/rules/test", json=trial)["rules"]
    assert (told["rule"], told["outcome"]) == ("beta", "not_ready")
    assert told["reason"]
    other = chat.done("POST", f"{CHAT}/rules/test", json={"request": {}})
    assert (other["rule"], other["rules"][0]["outcome"]) == (None, "passes")
    wrong = chat("POST", f"{CHAT}/rules/test", json={**trial, "rules": [{**rule, "when": "("}]})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "rules_invalid")


def test_the_health_of_one_version_is_that_of_the_model_s_report(chat: Api) -> None:
    whole = {one["version"]: one for one in chat.done("GET", f"{CHAT}/health")["versions"]}
    assert chat.done("GET", f"{V1}/health") == whole["v1"]
    assert chat("GET", f"{V3}/health").json()["code"] == "version_not_loaded"


def test_the_report_of_a_switch_tells_its_story(chat: Api) -> None:
    (switch,) = chat.done("POST", "/v1/switches", json={"model": "chat", "version": "v2"})["ids"]
    report = chat.done("GET", f"/v1/switches/{switch}/report")
    assert (report["source"], report["target"], report["actor"]) == ("v1", "v2", "ops:http")
    assert report["outcome"] == "running"
    assert [moment["type"] for moment in report["moments"]].count("SwitchRequested") == 1
    chat.done("POST", f"/v1/switches/{switch}/abort", json={"reason": "no"})
    assert chat.done("GET", f"/v1/switches/{switch}/report")["ended_because"]
