"""The saga runner: carries out, waits for the right moment, never in circles."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from turnout.core.config import ModelSwitchingConfig
from turnout.core.handling import Defaults
from turnout.core.instance import RequestInstance, WakeInstance
from turnout.core.sagas.owed import Agenda, Owed, Write
from turnout.core.worker import JoinWorker, LoseWorker
from turnout.events.memory import MemoryStore
from turnout.events.model import EngineSpec
from turnout.events.store import Unavailable
from turnout.workers.clock import SystemClock
from turnout.workers.controller import sagas as module
from turnout.workers.controller.activity import Activity
from turnout.workers.controller.commands import Commands
from turnout.workers.controller.liveness import Liveness
from turnout.workers.controller.log import Log
from turnout.workers.controller.sagas import SagaRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from turnout.events.codec import Context
    from turnout.events.envelope import Recorded
    from turnout.events.store import Append

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class StillClock(SystemClock):
    """The wall clock stands."""

    def now(self) -> datetime:
        return NOW


class Scripted(SagaRunner):
    """Answers its agendas from a list, and counts how often it is asked."""

    def __init__(self, log: Log, commands: Commands, clock: SystemClock, agendas: list[Agenda]) -> None:
        super().__init__(log, commands, Liveness(clock), Activity(clock), clock, ModelSwitchingConfig())
        self.agendas = agendas
        self.asked = 0

    def agenda(self) -> Agenda:
        self.asked += 1
        return self.agendas.pop(0) if len(self.agendas) > 1 else self.agendas[0]


def ran(agendas: list[Agenda], turns: int = 50, store: MemoryStore | None = None) -> tuple[Scripted, MemoryStore]:
    made: list[tuple[Scripted, MemoryStore]] = []

    async def run() -> None:
        kept, clock = store or MemoryStore(), StillClock()
        log = Log(kept, lambda error: None)
        await log.follow()
        runner = Scripted(log, Commands(log, clock, ModelSwitchingConfig(), Defaults()), clock, agendas)
        made.append((runner, kept))
        task = asyncio.create_task(runner.run(1, lambda: True))
        for _ in range(turns):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    return made[0]


def owed(id: str, worker: str) -> Owed:
    return Owed(id, (Write("worker", worker, JoinWorker(worker, "h", (), (), 1)),), "")


def test_a_moment_that_has_passed_without_anything_owed_does_not_make_it_run_in_circles() -> None:
    runner, _ = ran([Agenda(wake=NOW - timedelta(seconds=5))])
    assert runner.asked <= 2
    runner, _ = ran([Agenda(wake=NOW)])
    assert runner.asked <= 2


def test_it_waits_for_the_moment_when_something_will_be_owed(monkeypatch: object) -> None:
    runner, _ = ran([Agenda(wake=NOW + timedelta(seconds=0.5))])
    assert runner.asked <= 2


def test_two_things_owed_on_the_same_aggregate_are_not_both_carried_out_on_one_agenda() -> None:
    both = Agenda((owed("a", "w1"), Owed("b", (Write("worker", "w1", LoseWorker("w1", 11.0)),), ""), owed("c", "w2")))
    _, store = ran([both, Agenda()])
    assert [r.envelope.command for r in store.log] == ["a", "c"]


def test_two_things_that_take_room_are_not_both_carried_out_on_one_agenda() -> None:
    def load(id: str) -> Owed:
        command = RequestInstance(id, "chat", "v1", "w1", EngineSpec("fake"), "restore")
        return Owed(id, (Write("instance", id, command),), "chat")

    nothing = Owed("a", (Write("instance", "i0", WakeInstance("i0", "restore")),), "chat")  # it is not there
    _, store = ran([Agenda((nothing, load("i1"), load("i2"), owed("b", "w2"))), Agenda()])
    assert [r.envelope.command for r in store.log] == ["i1", "b"]


def test_what_is_refused_does_not_keep_the_rest_from_being_carried_out() -> None:
    refused = Owed("a", (Write("worker", "w9", LoseWorker("w9", 11.0)),), "")
    _, store = ran([Agenda((refused, owed("b", "w1"))), Agenda()])
    assert [r.envelope.command for r in store.log] == ["b"]


class LateStore(MemoryStore):
    """Its first answer does not come; what was asked is stored only when the next write is tried."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[tuple[Sequence[Append], Context]] = []

    async def append(self, appends: Sequence[Append], context: Context) -> tuple[Recorded, ...]:
        if not self.log and not self.late:
            self.late.append((appends, context))
            raise Unavailable("no answer")
        while self.late:
            await super().append(*self.late.pop())
        return await super().append(appends, context)


def test_nothing_else_is_written_while_it_is_not_clear_whether_a_write_was_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.0)
    store = LateStore()
    _, _ = ran([Agenda((owed("a", "w1"), owed("b", "w2"))), Agenda()], store=store)
    assert [r.envelope.command for r in store.log] == ["a", "b"]
