"""The reconciler: what it does with the log's wishes, and what it says of what happens."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from turnout.events.instance import (
    InstanceFailed,
    InstanceLoading,
    InstanceProbeRequested,
    InstanceReady,
    InstanceSleepRequested,
    InstanceWakeRequested,
    InstanceWoken,
)
from turnout.events.model import EngineSpec, Inspection
from turnout.events.worker import KeptEngine, SpareReleased, WorkerLost
from turnout.projections.fleet import WorkerView
from turnout.workers.inference.runner import Failure, Found, Loaded

if TYPE_CHECKING:
    import asyncio

TIME = datetime(2026, 1, 1, tzinfo=UTC)
LOADED = Loaded("unix:/run/i-1.sock", 1.5, 0.1, 7, "v1")


async def ready(rig: Any, until: Any, id: str = "i-1") -> None:
    """Bring an instance to ready."""
    rig.plane.request(id)
    rig.host.loaded(id)
    await until(lambda: rig.plane.phase(id) == "ready")


def test_it_joins_with_what_it_can_run(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await until(lambda: rig.plane.worker().live)
            state = rig.plane.worker()
            assert (state.engines, state.devices, state.capacity) == (("fake", "openai"), ("cpu",), 4)
            role, _, request = rig.plane.asked[0]
            assert (role, request.actor) == ("worker", "worker:w1")

    runner.run(test())


def test_a_requested_instance_is_loaded_proven_and_reported(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            rig.plane.request()
            await until(lambda: rig.plane.phase() == "loading")
            rig.host.progress["i-1"]("proving", "")
            await until(lambda: rig.plane.state().stage == "proving")
            rig.host.loaded()
            await until(lambda: rig.plane.phase() == "ready")
            assert rig.plane.log[-1] == InstanceReady("i-1", "unix:/run/i-1.sock", 1.5, 0.1, 7, "v1")
            await until(lambda: rig.host.watched == {"i-1"})

    runner.run(test())


@pytest.mark.parametrize("trouble", ["", "no answer within 5 s"])
def test_a_probe_that_the_log_asks_for_is_answered_once_with_what_the_engine_said(
    runner: asyncio.Runner, rig: Any, until: Any, trouble: str
) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.host.troubles["i-1"] = trouble
            rig.plane.record(InstanceProbeRequested("i-1", "sw-1.1", TIME))
            await until(lambda: rig.plane.state().probed == "sw-1.1")
            rig.plane.show()
            assert rig.plane.state().sound is not bool(trouble)
            assert rig.plane.verbs().count("instance.probed") == 1

    runner.run(test())


def test_one_load_runs_at_a_time(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            rig.plane.request("i-1")
            rig.plane.request("i-2")
            await until(lambda: rig.host.loading == ["i-1"])
            await until(lambda: rig.plane.phase("i-1") == "loading")
            assert rig.plane.phase("i-2") == "requested"
            rig.host.loaded("i-1")
            await until(lambda: rig.host.loading == ["i-2"])

    runner.run(test())


def test_a_server_that_runs_already_does_not_wait_for_a_load(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            rig.plane.request("i-1")
            await until(lambda: rig.host.loading == ["i-1"])
            rig.plane.request("i-2", EngineSpec("openai", url="http://127.0.0.1:1"))
            await until(lambda: rig.host.loading == ["i-1", "i-2"])

    runner.run(test())


def test_a_failed_load_is_reported_with_stage_reason_and_log_tail(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            rig.plane.request()
            rig.host.loaded(outcome=Failure("loading", "weights are truncated", ("cause: x",), 1))
            await until(lambda: rig.plane.phase() == "failed")
            assert rig.plane.log[-1] == InstanceFailed("i-1", "loading", "weights are truncated", ("cause: x",), 1)
            assert rig.host.loading == []

    runner.run(test())


def test_a_failed_instance_is_not_loaded_again_by_a_view_that_lags(
    runner: asyncio.Runner, rig: Any, until: Any
) -> None:
    async def test() -> None:
        async with rig:
            rig.plane.request()
            await until(lambda: rig.plane.phase() == "loading")
            rig.plane.stalled = True
            rig.host.loaded(outcome=Failure("loading", "no"))
            await until(lambda: rig.plane.phase() == "failed" and not rig.worker.instances)
            old = msgspec.json.encode(WorkerView("w1", instances={}))
            rig.plane.stalled = False
            rig.plane.show_view(rig.worker._view, len(rig.plane.log))  # the same old view again
            await until(lambda: not rig.worker._changed.is_set())
            assert rig.worker.instances == ()
            rig.plane.show_view(old, len(rig.plane.log))
            await until(lambda: not rig.worker._ended)

    runner.run(test())


def test_a_dead_engine_is_reported(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.host.dies("i-1", Failure("serving", "the engine ended", ("x",), 0))
            await until(lambda: rig.plane.phase() == "failed")
            assert rig.plane.log[-1].exit_code == 0
            assert rig.worker.instances == ()

    runner.run(test())


def test_a_draining_engine_is_stopped_only_when_it_is_quiet(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.host.used["i-1"] = "1 connections are open"
            rig.plane.drain()
            await until(lambda: not rig.host.watched)
            rig.clock.ahead += 11
            await until(lambda: rig.plane.beats[-1].unquiet == {"i-1": "1 connections are open"})
            assert rig.host.stopped == []
            assert rig.plane.phase() == "draining"
            del rig.host.used["i-1"]
            await until(lambda: rig.plane.phase() == "stopped")
            assert rig.host.stopped == ["i-1"]
            await until(lambda: rig.plane.beats[-1].unquiet == {})

    runner.run(test())


def test_an_operators_force_waives_the_proof_of_quiet(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.host.used["i-1"] = "1 connections are open"
            rig.plane.drain(forced_by="ops:alice")
            await until(lambda: rig.plane.phase() == "stopped")

    runner.run(test())


def test_a_force_that_comes_later_is_heard(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.host.used["i-1"] = "1 connections are open"
            rig.plane.drain()
            await until(lambda: not rig.host.watched)
            rig.plane.drain(forced_by="ops:alice")
            await until(lambda: rig.plane.phase() == "stopped")

    runner.run(test())


def test_a_drain_during_the_load_ends_the_load(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            rig.plane.request()
            await until(lambda: rig.host.loading)
            rig.plane.drain()
            await until(lambda: rig.plane.phase() == "stopped")
            assert rig.host.stopped == ["i-1"]
            assert rig.host.loading == []

    runner.run(test())


def test_a_ready_report_that_comes_too_late_ends_in_a_stop(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            rig.plane.request()
            await until(lambda: rig.host.loading)
            rig.plane.stalled = True  # the worker can't see that it is asked to stop
            rig.plane.drain()
            rig.host.loaded()
            await until(lambda: rig.plane.phase() == "stopped")
            assert "instance.ready" in rig.plane.verbs()

    runner.run(test())


def test_reports_are_repeated_with_the_same_id_until_they_are_answered(
    runner: asyncio.Runner, rig: Any, until: Any
) -> None:
    async def test() -> None:
        async with rig:
            rig.plane.request()
            await until(lambda: rig.host.loading)
            rig.plane.down = True
            rig.host.loaded()
            await until(lambda: rig.plane.verbs().count("instance.ready") >= 3)
            rig.plane.down = False
            await until(lambda: rig.plane.phase() == "ready")
            ids = {request.id for _, verb, request in rig.plane.asked if verb == "instance.ready"}
            assert len(ids) == 1

    runner.run(test())


def test_an_engine_that_dies_while_nobody_answers_is_reported_afterwards(
    runner: asyncio.Runner, rig: Any, until: Any
) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.plane.down = True
            rig.host.dies("i-1", Failure("serving", "the engine ended"))
            await until(lambda: "instance.failed" in rig.plane.verbs())
            rig.plane.down = False
            await until(lambda: rig.plane.phase() == "failed")

    runner.run(test())


def test_what_is_gone_from_the_view_is_stopped(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.plane.record(InstanceFailed("i-1", "serving", "an operator gave it up"))
            await until(lambda: rig.host.stopped == ["i-1"])
            await until(lambda: rig.worker.instances == ())
            assert "instance.stopped" not in rig.plane.verbs()

    runner.run(test())


def test_a_view_that_is_being_rebuilt_stops_nothing(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            for sequence in range(len(rig.plane.log)):  # older than the instance: it does not know it yet
                rig.plane.show_view(msgspec.json.encode(WorkerView("w1")), sequence)
                await until(lambda: not rig.worker._changed.is_set())
            rig.plane.show()
            await until(lambda: not rig.worker._changed.is_set())
            assert rig.host.stopped == []
            assert rig.worker.instances == ("i-1",)

    runner.run(test())


def test_a_lost_worker_joins_again(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await until(lambda: rig.plane.worker().live)
            rig.plane.record(WorkerLost("w1", 10.0))
            await until(lambda: rig.plane.worker().live)
            assert rig.plane.verbs().count("worker.join") == 2

    runner.run(test())


def test_engines_that_are_no_instances_are_told_with_the_join_and_whenever_they_change(
    runner: asyncio.Runner, rig: Any, until: Any
) -> None:
    async def test() -> None:
        first, second = KeptEngine("spare-1", "spare", "f"), KeptEngine("base-1", "base", "g")
        rig.host.keeps = (first,)
        async with rig:
            await until(lambda: rig.plane.worker().kept == (first,))
            assert "worker.kept" not in rig.plane.verbs(), "the join has said it"
            rig.host.keeps = (first, second)
            rig.worker.changed()
            await until(lambda: rig.plane.worker().kept == (first, second))
            rig.host.keeps = ()
            await rig.worker.told()
            assert rig.plane.worker().kept == ()
            said = rig.plane.verbs().count("worker.kept")
            await rig.worker.told()
            assert rig.plane.verbs().count("worker.kept") == said, "it is no news"

    runner.run(test())


def test_a_spare_that_shall_make_room_is_ended_once(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        rig.host.keeps = (KeptEngine("spare-1", "spare", "f"),)
        async with rig:
            await until(lambda: rig.plane.worker().live)
            rig.plane.record(SpareReleased("w1", "spare-1", "makes room"))
            await until(lambda: bool(rig.host.ended_spares))
            rig.plane.show()
            await until(lambda: not rig.worker._changed.is_set())
            assert rig.host.ended_spares == ["spare-1"]

    runner.run(test())


def test_a_restarted_worker_adopts_and_reports_again(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        rig.plane.request()
        rig.host.earlier = {"i-1": Found(1, LOADED)}
        async with rig:
            await until(lambda: rig.plane.phase() == "ready")
            assert rig.host.orders == {}
            rig.plane.drain()
            await until(lambda: rig.plane.phase() == "stopped")
            assert rig.host.stopped == ["i-1"]

    runner.run(test())


def test_an_engine_that_was_found_loading_is_loaded_on(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        rig.plane.request()
        rig.host.earlier = {"i-1": Found(1)}
        async with rig:
            await until(lambda: rig.host.loading == ["i-1"])
            rig.host.loaded()
            await until(lambda: rig.plane.phase() == "ready")

    runner.run(test())


def test_an_engine_that_nobody_asked_for_is_stopped(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        rig.host.earlier = {"i-9": Found(4000, LOADED)}  # of a log that was thrown away
        async with rig:
            await until(lambda: rig.host.stopped == ["i-9"])
            await until(lambda: rig.worker.instances == ())
            assert "instance.stopped" not in rig.plane.verbs()

    runner.run(test())


def test_a_serving_engine_that_is_gone_after_a_restart_is_reported(
    runner: asyncio.Runner, rig: Any, until: Any
) -> None:
    async def test() -> None:
        rig.plane.request()
        rig.plane.record(InstanceReady("i-1", "unix:/run/i-1.sock", 1.0, 0.1, 7, "v1"))
        async with rig:
            await until(lambda: rig.plane.phase() == "failed")
            assert rig.plane.log[-1].log_tail == ("last line",)

    runner.run(test())


def test_a_load_that_died_with_its_worker_is_reported_under_its_stage(
    runner: asyncio.Runner, rig: Any, until: Any
) -> None:
    async def test() -> None:
        rig.plane.request()
        rig.plane.record(InstanceLoading("i-1", "warming", 3.0))
        async with rig:
            await until(lambda: rig.plane.phase() == "failed")
            assert rig.plane.log[-1].stage == "warming"
            assert rig.host.orders == {}

    runner.run(test())


def test_a_drain_that_came_while_the_worker_was_away_is_answered(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        rig.plane.request()
        rig.plane.drain()
        async with rig:
            await until(lambda: rig.plane.phase() == "stopped")

    runner.run(test())


def test_stopping_the_worker_leaves_its_engines_running(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
        assert rig.host.stopped == []
        assert rig.host.released
        assert "worker.leave" not in rig.plane.verbs()

    runner.run(test())


def test_stopping_with_engines_stops_them_and_leaves(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.worker.stop(stop_engines=True)
            await rig.ended()
        assert rig.host.stopped == ["i-1"]
        assert rig.plane.phase() == "stopped"
        assert rig.plane.worker().left

    runner.run(test())


def test_stopping_ends_although_nobody_answers(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.plane.down = True
            rig.worker.stop(stop_engines=True)
            await until(lambda: "instance.stopped" in rig.plane.verbs())
            rig.clock.ahead += 60
            await until(lambda: "worker.leave" in rig.plane.verbs())
            rig.clock.ahead += 60
            await rig.ended()
        assert rig.host.stopped == ["i-1"]

    runner.run(test())


def test_a_wrong_golden_answer_of_a_serving_engine_is_in_the_beats(
    runner: asyncio.Runner, rig: Any, until: Any
) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.host.troubles["i-1"] = "the answer is empty"
            await until(lambda: rig.plane.beats[-1].unsound == {"i-1": "the answer is empty"})
            assert rig.plane.phase() == "ready"

    runner.run(test())


@pytest.mark.parametrize("when", ["load", "watch"])
def test_a_bug_in_one_life_is_reported_and_the_others_live_on(
    runner: asyncio.Runner, rig: Any, until: Any, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until, "i-2")

            async def broken(*_: object) -> None:
                raise ZeroDivisionError

            monkeypatch.setattr(rig.host, when, broken)
            rig.plane.request("i-1")
            rig.host.loaded("i-1")
            await until(lambda: rig.plane.phase("i-1") == "failed")
            assert "ZeroDivisionError" in rig.plane.state("i-1").reason
            assert rig.worker.instances == ("i-2",)

    runner.run(test())


def test_a_version_that_nobody_has_looked_at_is_looked_at_once(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            rig.plane.register()
            await until(lambda: "v1" in rig.plane.versions().validated)
            rig.plane.show()
            rig.plane.register("v2")
            await until(lambda: "v2" in rig.plane.versions().validated)
            assert [check.version for check in rig.looked] == ["v1", "v2"]
            assert rig.plane.verbs().count("version.inspected") == 2

    runner.run(test())


def test_a_version_whose_files_can_not_be_served_is_reported_with_the_reason(
    runner: asyncio.Runner, rig: Any, until: Any
) -> None:
    async def test() -> None:
        rig.finds = {"code": "weights_truncated", "reason": "it ends too early", "hint": "copy it again"}
        async with rig:
            rig.plane.register()
            await until(lambda: "v1" in rig.plane.versions().rejected)
            rig.finds = {"inspection": Inspection("c0ffee")}
            rig.plane.register(path="/models/mended")
            await until(lambda: "v1" in rig.plane.versions().validated)
            assert [check.engine.path for check in rig.looked] == ["/models/v1", "/models/mended"]

    runner.run(test())


def test_a_fault_in_looking_is_a_rejection_and_the_worker_lives_on(
    runner: asyncio.Runner, rig: Any, until: Any
) -> None:
    async def test() -> None:
        rig.finds = {"no_such_field": 1}
        async with rig:
            rig.plane.register()
            await until(lambda: "v1" in rig.plane.versions().rejected)
            assert rig.plane.versions().rejected["v1"].code == "bug"
            await ready(rig, until)

    runner.run(test())


def test_an_instance_is_ordered_with_what_its_files_said(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            rig.plane.register()
            await until(lambda: "v1" in rig.plane.versions().validated)
            rig.plane.request()
            await until(lambda: "i-1" in rig.host.orders)
            assert rig.host.orders["i-1"].inspection == Inspection("c0ffee")

    runner.run(test())


async def asleep(rig: Any, until: Any) -> None:
    """An instance that the log has put to sleep at level 2."""
    await ready(rig, until)
    rig.plane.record(InstanceSleepRequested("i-1", 2, "makes room"))
    await until(lambda: rig.plane.phase() == "asleep")


def test_it_sleeps_once_it_is_quiet_and_is_woken_at_a_new_address(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await ready(rig, until)
            rig.host.used["i-1"] = "1 connections are open"
            rig.plane.record(InstanceSleepRequested("i-1", 2, "makes room"))
            await until(lambda: not rig.host.watched)
            assert rig.host.slept == []
            del rig.host.used["i-1"]
            await until(lambda: rig.plane.phase() == "asleep")
            assert rig.host.slept == [("i-1", 2)]
            rig.host.wakes.append(Loaded("unix:/run/new.sock", 0.2, 0.1, 7, "v1", tier="wake", slept=1))
            rig.plane.record(InstanceWakeRequested("i-1", "sw-2"))
            await until(lambda: rig.plane.phase() == "ready")
            assert rig.plane.log[-1] == InstanceWoken("i-1", 0.2, 0.1, 7, 0, "unix:/run/new.sock")
            await until(lambda: rig.host.watched == {"i-1"})
            rig.plane.record(InstanceSleepRequested("i-1", 1, "again"))
            await until(lambda: rig.host.slept == [("i-1", 2), ("i-1", 1)])

    runner.run(test())


def test_a_wake_that_fails_ends_the_instance(runner: asyncio.Runner, rig: Any, until: Any) -> None:
    async def test() -> None:
        async with rig:
            await asleep(rig, until)
            rig.host.wakes.append(Failure("waking", "it says other things than before"))
            rig.plane.record(InstanceWakeRequested("i-1", "sw-2"))
            await until(lambda: rig.plane.phase() == "failed")
            assert rig.plane.log[-1] == InstanceFailed("i-1", "waking", "it says other things than before")
            await until(lambda: rig.worker.instances == ())

    runner.run(test())


def test_an_engine_that_dies_in_its_sleep_is_reported_and_one_that_shall_end_is_stopped(
    runner: asyncio.Runner, rig: Any, until: Any
) -> None:
    async def test() -> None:
        async with rig:
            await asleep(rig, until)
            rig.host.dies("i-1", Failure("sleeping", "killed"))
            await until(lambda: rig.plane.phase() == "failed")
            await ready(rig, until, "i-2")
            rig.plane.record(InstanceSleepRequested("i-2", 1, "makes room"))
            await until(lambda: rig.plane.phase("i-2") == "asleep")
            rig.plane.drain("i-2")
            await until(lambda: rig.plane.phase("i-2") == "stopped")
            assert rig.host.stopped == ["i-2"]

    runner.run(test())
