"""Command → decision → events → answer, over a store that conflicts, times out, and keeps what it says it did not."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from turnout.core.config import ModelSwitchingConfig
from turnout.core.decider import Accepted, Failed, Rejected
from turnout.core.handling import VERBS, Defaults, StartSpare, StartSwitch
from turnout.core.instance import DrainInstance, ReportReady, RequestInstance
from turnout.core.model import AdmitSwitch, DeregisterVersion, RegisterVersion
from turnout.core.sagas.owed import Owed, Write
from turnout.core.worker import JoinWorker
from turnout.events.memory import MemoryStore
from turnout.events.model import EngineSpec
from turnout.events.store import StoreFull, Unavailable
from turnout.events.worker import KeptEngine
from turnout.workers.controller.commands import Commands, Deposed
from turnout.workers.controller.log import Log
from turnout.workers.ports import Request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from turnout.events.codec import Context
    from turnout.events.envelope import Recorded
    from turnout.events.store import Append

FAKE = EngineSpec("fake")


class StillClock:
    """Time stands."""

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic(self) -> float:
        return 0.0

    def id(self, prefix: str = "") -> str:
        return f"{prefix}1"

    def jitter(self) -> float:
        return 0.5


class RoughStore(MemoryStore):
    """Does something else on the next appends, as scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.script: list[Callable[[], Awaitable[None]] | str] = []

    async def append(self, appends: Sequence[Append], context: Context) -> tuple[Recorded, ...]:
        step = self.script.pop(0) if self.script else ""
        if step == "stored, but no answer":
            await super().append(appends, context)
            raise Unavailable("no answer")
        if step == "not stored":
            raise Unavailable("no answer")
        if step == "full":
            raise StoreFull("no room")
        if callable(step):
            await step()
        return await super().append(appends, context)


class Desk:
    """A controller's commands on a store, with others writing to it at the same time."""

    def __init__(self, store: MemoryStore) -> None:
        self.log = Log(store, _lost)
        self.commands = Commands(self.log, StillClock(), ModelSwitchingConfig(), Defaults())

    async def ask(self, verb: str, body: object, id: str = "c1", role: str = "ops") -> Any:
        return await self.commands.handle(role, verb, Request(id, "alice", msgspec.Raw(msgspec.json.encode(body))))


def _lost(error: Exception) -> None:
    raise error


def play(scene: Callable[[RoughStore, Desk], Awaitable[None]]) -> RoughStore:
    store = RoughStore()

    async def run() -> None:
        desk = Desk(store)
        await desk.log.follow()
        await scene(store, desk)
        await desk.log.close()

    asyncio.run(run())
    return store


async def prepared(desk: Desk) -> None:
    """A worker, and a model with two versions."""
    await desk.ask("worker.join", JoinWorker("w1", "h", ("fake",), (), 4), "join", "worker")
    await desk.ask("version.register", RegisterVersion("chat", "v1", FAKE), "r1")
    await desk.ask("version.register", RegisterVersion("chat", "v2", FAKE), "r2")


def test_an_accepted_command_says_where_it_stands_in_the_log() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        answer = await desk.ask("version.register", RegisterVersion("chat", "v1", FAKE))
        assert answer == Accepted("turnout.evt.model.chat", 2, (), ("c1:0", "c1:1"))

    store = play(scene)
    envelope = store.log[0].envelope
    assert (envelope.command, envelope.actor, envelope.causation, envelope.epoch) == ("c1", "ops:alice", "c1", 0)


def test_a_switch_is_answered_with_its_id() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        answer = await desk.ask("switch.start", StartSwitch("chat", "v1"))
        assert answer.ids == (desk.log.world.models["chat"].switch,)
        assert store.log[-1].envelope.correlation == answer.ids[0]

    play(scene)


def test_the_same_command_twice_takes_effect_once_and_is_answered_the_same() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        first = await desk.ask("switch.start", StartSwitch("chat", "v1"))
        count = len(store.log)
        assert await desk.ask("switch.start", StartSwitch("chat", "v1")) == first
        assert await Desk_of(store, "switch.start", StartSwitch("chat", "v1")) == first
        assert len(store.log) == count

    play(scene)


async def warm(desk: Desk) -> None:
    """Both versions are proven; nothing serves yet."""
    await prepared(desk)
    for instance, version in (("i1", "v1"), ("i2", "v2")):
        asked = RequestInstance(instance, "chat", version, "w1", FAKE, "restore")
        await desk.commands.carry_out(Owed(f"load.{instance}", (Write("instance", instance, asked),), "chat"), 1)
        await desk.ask("instance.ready", ReportReady(instance, f"unix:/{instance}", 1.0, 0.1), instance, "worker")


def test_a_leader_begins_a_switch_to_a_warm_target_in_one_write_in_its_own_name() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await warm(desk)
        desk.commands.lead(3, lambda: True)
        before = len(store.log)
        answer = await desk.ask("switch.start", StartSwitch("chat", "v1"))
        written = store.log[before:]
        assert written[-1].type == "RouteChanged"
        assert {(r.envelope.command, r.envelope.epoch) for r in written} == {("c1", 3)}
        assert (answer.sequence, len(answer.events)) == (store.log[-1].sequence, len(written))
        assert await desk.ask("switch.start", StartSwitch("chat", "v1")) == answer

    play(scene)


@pytest.mark.parametrize("why", ["it does not lead", "the lease is over", "another leads by now"])
def test_whoever_does_not_lead_leaves_the_first_step_to_the_leader(why: str) -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await warm(desk)
        if why != "it does not lead":
            desk.commands.lead(0 if why == "another leads by now" else 1, lambda: why != "the lease is over")
        await desk.ask("switch.start", StartSwitch("chat", "v1"))
        assert [r.envelope.epoch for r in store.log[-2:]] == [0, 0]
        assert desk.log.world.switches[desk.log.world.models["chat"].switch].phase == "requested"

    play(scene)


def test_a_command_that_begins_with_a_step_waits_for_the_turn_of_the_sagas() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await warm(desk)
        desk.commands.lead(1, lambda: True)
        async with desk.commands.turn:  # a saga asks the target to stop, on the world as it is before the command
            asking = asyncio.create_task(desk.ask("switch.start", StartSwitch("chat", "v1")))
            for _ in range(20):
                await asyncio.sleep(0)
            stop = Write("instance", "i1", DrainInstance("i1", "makes room"))
            await desk.commands.carry_out(Owed("drain.i1", (stop,), "chat"), 1)
        await asking
        assert desk.log.world.switches[desk.log.world.models["chat"].switch].phase == "requested"
        assert "chat" not in desk.log.world.routes

    play(scene)


async def Desk_of(store: RoughStore, verb: str, body: object) -> Any:  # noqa: N802  stands for another controller
    other = Desk(store)
    await other.log.follow()
    return await other.ask(verb, body)


def test_what_was_stored_without_an_answer_is_found_and_not_written_again() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        store.script = ["stored, but no answer"]
        answer = await desk.ask("switch.start", StartSwitch("chat", "v1"))
        assert isinstance(answer, Accepted)
        assert len(answer.events) == 2

    store = play(scene)
    assert [r.type for r in store.log].count("SwitchRequested") == 1


def test_what_was_not_stored_is_written_again_with_the_same_ids() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        store.script = ["not stored"]
        assert isinstance(await desk.ask("version.register", RegisterVersion("chat", "v1", FAKE)), Accepted)

    assert [r.envelope.id for r in play(scene).log] == ["c1:0", "c1:1"]


def test_who_loses_a_race_decides_again_on_what_the_winner_wrote() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        other = Desk(store)
        await other.log.follow()

        async def somebody_is_faster() -> None:
            assert isinstance(await other.ask("switch.start", StartSwitch("chat", "v2"), "c2"), Accepted)

        store.script = [somebody_is_faster]
        refused = await desk.ask("switch.start", StartSwitch("chat", "v1"))
        assert isinstance(refused, Rejected)
        assert refused.code == "switch_running"

    play(scene)


def test_a_refusal_is_given_only_by_a_fold_that_is_up_to_date() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        late = Desk(store)
        asyncio.get_running_loop().call_later(0.01, lambda: asyncio.ensure_future(late.log.follow()))
        assert isinstance(await late.ask("switch.start", StartSwitch("chat", "v1")), Accepted)

    play(scene)


@pytest.mark.parametrize(("step", "code"), [("not stored", "store_unavailable"), ("full", "store_full")])
def test_a_store_that_stays_away_is_an_infrastructure_error_and_not_a_refusal(
    step: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(seconds: float) -> None:
        del seconds

    monkeypatch.setattr("turnout.workers.controller.commands.asyncio.sleep", at_once)

    async def scene(store: RoughStore, desk: Desk) -> None:
        store.script = [step] * 50
        answer = await desk.ask("version.register", RegisterVersion("chat", "v1", FAKE))
        assert isinstance(answer, Failed)
        assert answer.code == code
        assert "same id" in answer.hint

    assert play(scene).log == []


def test_a_full_store_is_said_at_once() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        store.script = ["full"]
        assert isinstance(await desk.ask("version.register", RegisterVersion("chat", "v1", FAKE)), Failed)

    assert play(scene).log == []


def test_a_bug_is_an_answer_of_its_own_and_poisons_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(VERBS, ("ops", "version.deregister"), (DeregisterVersion, broken))

    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        answer = await desk.ask("version.deregister", DeregisterVersion("chat", "v1"))
        assert isinstance(answer, Failed)
        assert answer.code == "bug"
        assert isinstance(await desk.ask("switch.start", StartSwitch("chat", "v1"), "c2"), Accepted)

    play(scene)


@pytest.mark.parametrize(
    ("role", "verb", "body", "id", "code"),
    [
        ("ops", "model.delete", {}, "c1", "verb_unknown"),
        ("gw", "switch.start", {}, "c1", "verb_unknown"),
        ("ops", "switch.start", {"model": "chat"}, "c1", "request_invalid"),
        ("ops", "switch.start", {"model": "chat", "version": "v1", "speed": 3}, "c1", "request_invalid"),
        ("ops", "switch.start", {"model": "chat", "version": "v1"}, "", "request_invalid"),
    ],
)
def test_what_is_no_command_is_refused_with_a_hint(role: str, verb: str, body: object, id: str, code: str) -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        answer = await desk.ask(verb, body, id, role)
        assert isinstance(answer, Rejected)
        assert answer.code == code
        assert answer.hint

    assert play(scene).log == []


def test_what_is_true_already_is_accepted_with_how_far_the_log_has_come() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        answer = await desk.ask("worker.join", JoinWorker("w1", "h", ("fake",), (), 4), "join-2", "worker")
        assert answer == Accepted("turnout.evt.worker.w1", len(store.log))

    play(scene)


# --- what sagas owe ----------------------------------------------------------------------------------------------


def owed(switch: str = "sw-1") -> Owed:
    return Owed(f"{switch}.x", (Write("model", "chat", AdmitSwitch("chat", switch, "v1")),), switch)


def test_what_is_owed_is_written_once_with_the_leaders_epoch() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        assert await desk.commands.carry_out(owed(), 7)
        assert not await desk.commands.carry_out(owed(), 7)
        envelope = store.log[-1].envelope
        assert (envelope.epoch, envelope.actor, envelope.correlation) == (7, "controller", "sw-1")

    play(scene)


def test_a_leader_that_sees_a_higher_epoch_stops_at_once() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        assert await desk.commands.carry_out(owed(), 7)
        other = Owed("sw-2.x", (Write("model", "chat", DeregisterVersion("chat", "v2")),), "sw-2")
        with pytest.raises(Deposed):
            await desk.commands.carry_out(other, 6)

    play(scene)


def test_what_is_owed_by_an_old_fold_is_not_written_over_newer_events() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        other = Desk(store)
        await other.log.follow()

        async def somebody_is_faster() -> None:
            await other.ask("switch.start", StartSwitch("chat", "v2"), "c2")

        store.script = [somebody_is_faster]
        assert not await desk.commands.carry_out(owed(), 7)
        assert not await desk.commands.carry_out(owed(), 7), "refused now: another switch runs"

    assert [r.type for r in play(scene).log].count("SwitchAdmitted") == 1


def test_what_was_owed_and_stored_without_an_answer_is_found() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        store.script = ["stored, but no answer"]
        assert await desk.commands.carry_out(owed(), 7)
        assert desk.log.world.models["chat"].switch == "sw-1"

    play(scene)


def test_memory_for_a_spare_is_given_out_by_the_leader_alone() -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        spare = StartSpare("w1", KeptEngine("spare-1", "spare"))
        answer = await desk.ask("worker.spare", spare, role="worker")
        assert isinstance(answer, Failed), "another one's fold may be a moment behind what the leader has given"
        assert answer.code == "not_leading"
        desk.commands.lead(1, lambda: True)
        assert isinstance(await desk.ask("worker.spare", spare, role="worker"), Accepted)

    play(scene)


@pytest.mark.parametrize("step", ["not stored", "full"])
def test_what_was_owed_and_not_stored_is_said_so_that_the_runner_waits(step: str) -> None:
    async def scene(store: RoughStore, desk: Desk) -> None:
        await prepared(desk)
        store.script = [step]
        with pytest.raises(Unavailable):
            await desk.commands.carry_out(owed(), 7)
        assert await desk.commands.carry_out(owed(), 7)

    play(scene)
