"""The saga runner: carries out, waits for the right moment, never in circles."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from turnout.core.config import ModelSwitchingConfig
from turnout.core.handling import Defaults
from turnout.core.sagas.owed import Agenda, Owed, Write
from turnout.core.worker import JoinWorker, LoseWorker
from turnout.events.memory import MemoryStore
from turnout.workers.clock import SystemClock
from turnout.workers.controller.activity import Activity
from turnout.workers.controller.commands import Commands
from turnout.workers.controller.liveness import Liveness
from turnout.workers.controller.log import Log
from turnout.workers.controller.sagas import SagaRunner

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


def ran(agendas: list[Agenda], turns: int = 50) -> tuple[Scripted, MemoryStore]:
    made: list[tuple[Scripted, MemoryStore]] = []

    async def run() -> None:
        store, clock = MemoryStore(), StillClock()
        log = Log(store, lambda error: None)
        await log.follow()
        runner = Scripted(log, Commands(log, clock, ModelSwitchingConfig(), Defaults()), clock, agendas)
        made.append((runner, store))
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


def test_what_is_refused_does_not_keep_the_rest_from_being_carried_out() -> None:
    refused = Owed("a", (Write("worker", "w9", LoseWorker("w9", 11.0)),), "")
    _, store = ran([Agenda((refused, owed("b", "w1"))), Agenda()])
    assert [r.envelope.command for r in store.log] == ["b"]
