"""Complaints of users of other systems, which must not happen here: notes/peers.md, section 3, by number."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import openai
import pytest
from tests.process.system.cluster import Cluster, Stage, alone, on_stage
from tests.process.system.traffic import Reply, ask, exchange, get

from turnout.core.handling import StopSwitch, UndoModel
from turnout.core.model import DeregisterVersion, SetServing
from turnout.core.world import World
from turnout.events import jsapi
from turnout.events.alert import AlertRaised
from turnout.events.gateway import RouteApplied, VersionDrained
from turnout.events.instance import InstanceRequested
from turnout.events.model import ActiveVersionChanged, DemandEnded, DemandSeen, Serving
from turnout.events.route import RouteChanged
from turnout.events.switch import BakeStarted, StepStarted, SwitchPaused, VerdictReached
from turnout.workers import wiring
from turnout.workers.client import CommandRejected
from turnout.workers.inference.engines.fake_server import Draw
from turnout.workers.load import Clients

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

pytestmark = [pytest.mark.process, pytest.mark.nats]

ARGS = ("--token-ms=10", "--tokens=400")
#: A worker with a place for one engine, and how long a model may keep it while the other one waits.
ONE_PLACE = """
[worker]
quiet_s = 0.2
capacity = 1

[gateway]
shutdown_s = 2.0
"""
RESIDENCY_S = 5.0


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(gateways=2))
    one.run(one.cluster.serving("v1", "v2", args=ARGS))
    yield one
    one.close()


def other(c: Cluster) -> str:
    return "v2" if c.world.models["chat"].active == "v1" else "v1"


async def streaming(c: Cluster, version: str, count: int) -> bool:
    running = [r for gateway in c.gateways for r in await c.requests(gateway)]
    return [r["version"] == version and r["phase"] == "streaming" for r in running].count(True) >= count


@on_stage
async def test_complaint_1_long_streams_run_to_their_end_through_a_switch(c: Cluster) -> None:
    source, target = c.world.models["chat"].active, other(c)
    load = c.load(5)
    before = len(c.seen)
    # given 50 streams of three seconds, in the middle of which the model is switched
    load.send_now(50, tokens=300)
    await c.until(lambda: streaming(c, source, 50), "50 streams run")
    view = await c.switched(target)
    assert view.phase == "completed", view
    # then each has said [DONE], and nothing was ended early
    history = await c.history()
    history.clean()
    long = [r for r in history.replies if r.text.count(" ") > 250]
    assert len(long) == 50
    assert {r.version for r in long} == {source}
    drained = [s.recorded.event for s in c.seen[before:] if isinstance(s.recorded.event, VersionDrained)]
    assert [e.ended for e in drained if e.version == source] == [0, 0]


@on_stage
async def test_complaint_1_streams_over_the_drain_deadline_each_end_with_an_error_event(c: Cluster) -> None:
    source, target = c.world.models["chat"].active, other(c)
    load = c.load(5)
    before = len(c.seen)
    load.send_now(50, tokens=390)
    await c.until(lambda: streaming(c, source, 50), "50 streams run")
    view = await c.switched(target, drain_s=0.5)
    assert view.phase == "completed", view
    history = await c.history()
    history.sound()
    assert not history.failed(), history.failed()[:5]
    assert [r.reason for r in history.cut()] == ["version_drained"] * 50
    drained = [s.recorded.event for s in c.seen[before:] if isinstance(s.recorded.event, VersionDrained)]
    assert sum(e.ended for e in drained if e.version == source) == 50


@on_stage
async def test_complaint_1_what_openai_clients_see_of_both(c: Cluster) -> None:
    # real clients: a stream that runs to its end, and one that is ended with an error that they raise
    source, target = c.world.models["chat"].active, other(c)
    clients = Clients(c.gateways["g1"], "chat", 5.0, c.clock, prompt="hi", max_tokens=300)
    clients.start()
    await c.until(lambda: streaming(c, source, 5), "streams run")
    assert (await c.switched(target)).phase == "completed"
    await clients.stop()
    assert {a.outcome for a in clients.answers} == {"ok"}, [a for a in clients.answers if a.outcome != "ok"]

    async with openai.AsyncOpenAI(base_url=f"{c.gateways['g1']}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "hi"}], max_tokens=390, stream=True
        )
        assert (await c.switched(source, drain_s=0.3)).phase == "completed"
        with pytest.raises(openai.APIError, match="had to stop"):
            async for _ in stream:
                pass


@on_stage
async def test_complaint_5_exit_codes_states_and_live_version_tell_the_same(c: Cluster) -> None:
    source, target = c.world.models["chat"].active, other(c)
    await c.register("dies", "--crash-at-load")

    async def live() -> set[str]:
        return {(await ask(url, "chat", c.clock)).version for url in c.gateways.values() for _ in range(3)}

    # a promotion
    code, out, err = await c.command("switch", "chat", target, "--wait", "--json")
    assert code == 0, (out, err)
    assert json.loads(out.splitlines()[-1])["status"] == "completed"
    assert await live() == {target}
    # a version that can't be loaded
    code, out, err = await c.command("switch", "chat", "dies", "--wait", "--json")
    failed = json.loads(out.splitlines()[-1])
    assert (code, failed["status"], await live()) == (1, "failed", {target}), (out, err)
    assert failed["log_tail"]
    # a switch that somebody aborts in its bake
    before = len(c.seen)
    waiting = asyncio.create_task(c.command("switch", "chat", source, "--bake", "30", "--wait", "--json"))
    running = await c.event(BakeStarted, before)
    assert await live() == {source}
    code, out, err = await c.command("abort", running.switch, "--json")
    assert code == 0, (out, err)
    code, out, err = await waiting
    aborted = json.loads(out.splitlines()[-1])
    assert (code, aborted["status"], await live()) == (3, "aborted", {target}), (out, err)
    assert (await c.switcher.get_switch_status(running.switch)).phase == "aborted"
    # an undo that was asked for is a success
    assert (await c.switched(source)).phase == "completed"
    code, out, err = await c.command("undo", "chat", "--wait", "--json")
    assert (code, await live()) == (0, {target}), (out, err)
    # and a promotion stands in the log only after every gateway was seen to serve it
    await c.caught_up()
    for at, seen in enumerate(c.seen):
        event = seen.recorded.event
        if isinstance(event, ActiveVersionChanged):
            applied = [s.recorded.event for s in c.seen[:at] if isinstance(s.recorded.event, RouteApplied)]
            routed = [s.recorded.event for s in c.seen[:at] if isinstance(s.recorded.event, RouteChanged)]
            newest = [r for r in routed if r.model == event.model][-1]
            assert [s.version for s in newest.splits if s.weight] == [event.version]
            gateways = {a.gateway for a in applied if a.model == event.model and a.revision == newest.revision}
            assert len(gateways) == 2


@on_stage
async def test_complaint_5_a_rollback_by_verdict_is_no_success_and_the_source_serves(c: Cluster) -> None:
    source = c.world.models["chat"].active
    await c.register("errs", "--error-rate=1", "--sound-first=1", "--error-says=no", *ARGS)
    c.load(20)
    words = ("--strategy", "canary", "--param", "steps=[{setWeight = 50}]", "--wait", "--json")
    code, out, err = await c.command("switch", "chat", "errs", *words)
    ended = json.loads(out.splitlines()[-1])
    assert (code, ended["status"]) == (3, "rolled_back"), (out, err)
    assert ended["verdict"]["decision"] == "fail"
    assert (await c.switcher.get_switch_status(ended["switch"])).phase == "rolled_back"
    await c.caught_up()
    assert c.world.models["chat"].active == source
    assert {(await ask(url, "chat", c.clock)).version for url in c.gateways.values() for _ in range(3)} == {source}


@on_stage
async def test_complaint_6_an_abort_with_nothing_to_abort_has_no_effect(c: Cluster) -> None:
    ended = (await c.switched(other(c))).switch
    await c.caught_up()
    before = c.world.sequence
    for switch, code in (("sw-none", "switch_unknown"), (ended, "switch_ended")):
        exit_code, out, _ = await c.command("abort", switch, "--json")
        answer = json.loads(out)
        assert (exit_code, answer["status"], answer["code"]) == (1, "rejected", code)
        assert answer["hint"]
    await c.caught_up()
    assert c.world.sequence == before


@on_stage
async def test_complaint_6_random_commands_never_leave_the_routed_version_without_an_engine(c: Cluster) -> None:
    draw = Draw(20260)
    load = c.load(15)
    await c.answered(load)
    for version in ("r1", "r2", "r3"):
        await c.register(version, *ARGS)
    rejected = accepted = 0
    while accepted <= 15 or rejected <= 5:  # a slow machine refuses more of them: a switch runs longer
        version = ("v1", "v2", "r1", "r2", "r3")[int(draw() * 5)]
        kind = int(draw() * 6)
        try:
            if kind < 3:
                operation = await c.switch(version, bake_s=(0.0, 0.3, 20.0)[int(draw() * 3)])
                if draw() < 0.4:
                    await operation.wait(0.4 if draw() < 0.5 else 30)
            elif kind == 3:
                await c.client.send("switch.abort", StopSwitch(c.world.models["chat"].switch or "sw-none"))
            elif kind == 4:
                model = c.world.models["chat"]
                await c.client.send("model.undo", UndoModel("chat", to="" if model.switch else model.undo_target))
            else:
                await c.client.send("version.deregister", DeregisterVersion("chat", version))
                await c.register(version, *ARGS)
            accepted += 1
        except CommandRejected:
            rejected += 1
        except TimeoutError:
            pass
    if running := c.world.models["chat"].switch:
        with contextlib.suppress(CommandRejected):  # it is an undo already, or has just ended
            await c.client.send("model.undo", UndoModel("chat"))
        await c.until(lambda: c.world.models["chat"].switch != running, "the last switch has ended")
    await c.answered(load)
    (await c.history()).clean()
    for version in ("v1", "v2"):
        await c.register(version, *ARGS)
    if c.world.models["chat"].active != "v1":
        assert (await c.switched("v1")).phase == "completed"


@on_stage
async def test_complaint_7_the_model_is_never_missing_while_it_is_switched(c: Cluster) -> None:
    load = c.load(20)
    listed: list[tuple[int, bool]] = []
    going = True

    async def poll() -> None:
        turn = 0
        while going:
            turn += 1
            answer = await get(c.gateways["g1" if turn % 2 else "g2"], "/v1/models")
            listed.append((answer.status, "chat" in [m["id"] for m in json.loads(answer.body)["data"]]))
            await asyncio.sleep(0.02)

    polling = asyncio.create_task(poll())
    for _ in range(20):
        assert (await c.switched(other(c))).phase == "completed"
    going = False
    await polling
    await c.answered(load)
    (await c.history()).clean()
    assert set(listed) == {(200, True)}
    assert len(listed) > 20


def test_complaint_8_two_clients_of_two_models_on_one_place_do_not_unload_each_others_model() -> None:
    alone(lambda: Cluster(base=ONE_PLACE, gateways=2), _two_clients)


async def _two_clients(c: Cluster) -> None:
    models = ("alpha", "beta")
    for model in models:
        await c.register("v1", "--load-seconds=0.2", "--token-ms=5", "--tokens=10", model=model)
        await c.client.send("model.serving", SetServing(model, Serving(on_demand=True, residency_s=RESIDENCY_S)))

    def known() -> bool:
        applied = {(e.gateway, e.model) for s in c.seen if isinstance(e := s.recorded.event, RouteApplied)}
        return applied >= {(gateway, model) for gateway in c.world.live_gateways for model in models}

    await c.until(known, "both gateways know that requests for both models wait")

    async def client(model: str) -> list[Reply]:
        urls = list(c.gateways.values())
        return [await ask(urls[n % 2], model, c.clock, stream=n % 5 != 0, tokens=10) for n in range(100)]

    # when each asks for its own, a hundred times, and there is a place for one of the two
    replies = await asyncio.gather(*(client(model) for model in models))
    # then every answer is whole
    assert {(r.status, r.outcome, r.reason) for each in replies for r in each} == {(200, "ok", "")}
    await c.caught_up()
    log = [seen.recorded for seen in c.seen]
    # and they were served in turns: a model stays while it may, before it makes room for the one that waits
    came: dict[str, datetime] = {}
    swaps = 0
    for recorded in log:
        event = recorded.event
        if isinstance(event, DemandSeen):
            came[event.model] = event.at
        elif isinstance(event, DemandEnded):
            assert event.cause == "room"
            assert (event.at - came[event.model]).total_seconds() >= RESIDENCY_S
            swaps += 1
    assert 1 <= swaps <= 10
    # and never were two engines alive, nor one started twice for the same turn
    fold, most = World(), 0
    for recorded in log:
        fold.apply(recorded)
        most = max(most, len(fold.alive))
    assert most == 1
    starts = [r.event for r in log if isinstance(r.event, InstanceRequested)]
    assert len(starts) == swaps + 1


@on_stage
async def test_complaint_11_back_and_forth_under_load_keeps_to_the_route_of_each_revision(c: Cluster) -> None:
    await c.until(lambda: not c.world.models["chat"].switch, "nothing runs")
    source, target = c.world.models["chat"].active, other(c)
    load = c.load(25)
    await c.answered(load)
    before = len(c.seen)
    # switch, abort, switch, undo, switch
    first = await c.switch(target, bake_s=30.0)
    await c.event(BakeStarted, before, switch=first.id)
    await c.answered(load)
    await first.abort()
    assert (await c.ended(first)).phase == "aborted"
    await c.answered(load)
    assert (await c.switched(target)).phase == "completed"
    await c.answered(load)
    undone = await c.ended(await c.switcher.undo("chat"))
    assert (undone.phase, undone.target) == ("completed", source)
    await c.answered(load)
    assert (await c.switched(target)).phase == "completed"
    await c.answered(load)
    # then no request failed, none went to the old version after its revision, and each revision's weights were exact
    history = await c.history()
    history.clean()
    for reply in history.replies:
        route = history.routes["chat", reply.revision].recorded.event
        assert isinstance(route, RouteChanged)
        assert [s.version for s in route.splits if s.weight == 100] == [reply.version]
    # and going back and forth between warm engines started none
    assert not [s for s in c.seen[before:] if isinstance(s.recorded.event, InstanceRequested)]
    steps = [s.recorded.event for s in c.seen[before:] if isinstance(s.recorded.event, StepStarted)]
    assert [s.weight for s in steps] == [100.0] * 4


def test_complaint_14_with_its_source_of_evidence_gone_a_rollout_is_held_with_an_alert_and_may_be_promoted() -> None:
    alone(lambda: Cluster(gateways=2), _no_evidence)


async def _no_evidence(c: Cluster) -> None:
    await c.serving("v1", "v2", args=ARGS)
    load = c.load(20)
    await c.answered(load)
    # given nobody takes the gateways' samples any more
    async with wiring.control_plane(c.nats_url, "test") as plane:
        await jsapi.api(plane.connection.nc, "STREAM.DELETE.HEALTH", None, 5.0)
    judge = {"minRequests": 5, "minUsers": 1, "minSeconds": 1}
    steps: dict[str, object] = {"steps": [{"setWeight": 20}], "stepDeadline": 3, "judge": judge}
    operation = await c.switch("v2", strategy="canary", parameters=steps, bake_s=0.0)
    # then it is neither promoted nor rolled back, somebody is told, and both versions serve on
    paused = await c.event(SwitchPaused, switch=operation.id)
    assert paused.cause == "inconclusive"
    verdict = await c.event(VerdictReached, switch=operation.id)
    assert (verdict.decision, verdict.target_requests) == ("inconclusive", 0)
    await c.event(AlertRaised, alert="switch_held.chat")
    await c.answered(load, 20)
    assert [s.weight for s in c.world.routes["chat"].splits] == [80.0, 20.0]
    # and whoever knows better takes it on
    code, out, err = await c.command("promote", operation.id, "--step", "1", "--json")
    assert code == 0, (out, err)
    assert (await c.ended(operation)).phase == "completed"
    await c.answered(load)
    (await c.history()).clean()


@on_stage
async def test_complaint_15_an_engine_that_never_gets_ready_gets_no_request(c: Cluster) -> None:
    load = c.load(20)
    await c.answered(load)
    source = c.world.models["chat"].active
    before = len(c.seen)
    await c.register("stuck", "--hang-at-load")
    operation = await c.switch("stuck")
    await c.until(lambda: c.engine_pids("stuck"), "its engine runs")
    await c.answered(load, 30)
    assert not [s for s in c.seen[before:] if isinstance(s.recorded.event, RouteChanged)]
    await operation.abort(reason="stuck")
    assert (await c.ended(operation)).phase == "aborted"
    await c.until(lambda: not c.engine_pids("stuck"), "its engine is gone")
    await c.answered(load)
    history = await c.history()
    history.clean()
    assert {r.version for r in history.replies} == {source}


@on_stage
async def test_complaint_16_no_request_starts_or_stops_an_engine(c: Cluster) -> None:
    await c.serving("v1", "v2", model="fuzzed")
    await c.caught_up()
    before = c.world.sequence
    draw = Draw(16)
    statuses: dict[int, int] = {}
    for body in _fuzzed(draw, 300):
        path = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")[int(draw() * 4)]
        status = (await exchange(c.gateways["g1" if draw() < 0.5 else "g2"], "POST", path, body)).status
        statuses[status] = statuses.get(status, 0) + 1
    # then each was answered, by no error of the server's, and nothing at all stands in the log
    assert all(200 <= status < 500 for status in statuses), statuses
    assert statuses.get(200), statuses
    await c.caught_up()
    assert c.world.sequence == before
    assert (await ask(c.gateways["g1"], "fuzzed", c.clock)).outcome == "ok"


def _fuzzed(draw: Draw, count: int) -> Iterator[bytes]:
    """Bodies that ask for other models, versions, sizes and behaviours; and bodies that are none."""
    names: list[object] = ["fuzzed", "fuzzed", "fuzzed@v2", "v2", "fuzzed:latest", "", "../fuzzed", "FUZZED"]
    names += [None, 7, ["fuzzed"], {}]
    knobs: dict[str, list[object]] = {
        "num_ctx": [1, 4096, 10**9, -1],
        "keep_alive": [-1, 0, "0s", "24h"],
        "options": [{"num_ctx": 8192, "num_gpu": 0}, [], 3],
        "max_tokens": [1, 3, 0],
        "max_model_len": [10**7],
        "unload": [True],
        "engine": ["vllm"],
        "version": ["v2"],
        "lora_request": [{"name": "x", "path": "/"}],
        "n": [1],
        "user": ["u", "u" * 2000],
        "stream": [False],
        "metadata": [{"turnout": "v2"}],
    }
    for _ in range(count):
        kind = draw()
        if kind < 0.15:
            yield bytes(int(draw() * 256) for _ in range(1 + int(draw() * 60)))
            continue
        body: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "input": "hi"}
        if kind > 0.2:
            body["model"] = names[int(draw() * len(names))]
        for knob, values in knobs.items():
            if draw() < 0.3:
                body[knob] = values[int(draw() * len(values))]
        text = json.dumps(body).encode()
        yield text[: int(draw() * len(text))] if kind > 0.9 else text
