"""The saga runner: asks what is owed, carries it out, asks again. Holds no state of its own.

What is owed is a pure function of the world and the time (core/sagas), so a runner that dies anywhere is continued by
the next one. Knows no transport.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from turnout.core.config import CACHE, CacheConfig, ModelSwitchingConfig
from turnout.core.instance import RequestInstance, WakeInstance
from turnout.core.sagas import alerts, demand, placement, retention, switch, warming
from turnout.core.sagas.owed import Agenda, Owed, merge
from turnout.events.store import StoreFull, Unavailable
from turnout.workers.controller.commands import Deposed
from turnout.workers.controller.health import HealthMonitor

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.workers.clock import Clock
    from turnout.workers.controller.activity import Activity
    from turnout.workers.controller.commands import Commands
    from turnout.workers.controller.liveness import Liveness
    from turnout.workers.controller.log import Log

log = structlog.get_logger()

#: How often liveness is looked at when nothing else happens, seconds.
_TICK_S = 1.0
_RETRY_S = 0.25


class SagaRunner:
    """Carries out what the sagas owe while this process leads."""

    def __init__(
        self,
        log: Log,
        commands: Commands,
        liveness: Liveness,
        activity: Activity,
        clock: Clock,
        config: ModelSwitchingConfig,
        cache: CacheConfig = CACHE,
    ) -> None:
        self._log = log
        self._commands = commands
        self._liveness = liveness
        self._activity = activity
        #: Wakes it up: what is owed depends on the evidence, too.
        self.health = HealthMonitor(log.world, clock, config, self._wake, liveness.in_flight)
        self._clock = clock
        self._config = config
        self._cache = cache
        self._moved = asyncio.Event()
        log.watch(self._wake)

    async def run(self, epoch: int, may_act: Callable[[], bool]) -> None:
        """Run until cancelled.

        Args:
            epoch: of this leader's lease.
            may_act: whether the lease still holds by the local clock. A process that stood still (a paused machine)
                wakes with an old world and believes everybody silent: it must not write before it has looked again.

        Raises:
            Deposed: another leader has taken over, or may have.
        """
        self._liveness.restart()
        self._commands.lead(epoch, may_act)
        while True:
            self._moved.clear()
            try:
                async with self._commands.turn:
                    agenda = self.agenda()
                    progress = await self._carry_out(agenda, epoch, may_act)
            except Unavailable as e:
                log.warning("saga_retried", reason=str(e))
                await asyncio.sleep(_RETRY_S)
                continue
            if not progress:
                await self._wait(agenda)

    def _wake(self) -> None:
        self._moved.set()

    def agenda(self) -> Agenda:
        """All that is owed now: switches, what goes to zero, placement, warming, old versions, losses, then alerts."""
        world, now = self._log.world, self._clock.now()
        agendas = [switch.agenda(world, id, now, self.health.judgement(id)) for id in sorted(world.running)]
        agendas.append(demand.agenda(world, self._activity.uses(world), now))
        agendas.append(placement.agenda(world, self._config, now, self._cache))
        agendas.append(warming.agenda(world, self._config, now, self._cache))
        agendas.append(retention.agenda(world, self._config, now, self._cache))
        agendas.append(Agenda(self._liveness.owed(world)))
        agendas.append(alerts.agenda(world, self.health.findings(), now))
        return merge(tuple(agendas))

    async def _carry_out(self, agenda: Agenda, epoch: int, may_act: Callable[[], bool]) -> bool:
        """Carry out what does not touch the same aggregate twice: the rest is asked for again afterwards.

        So is what takes room, after the first that has taken some: both may count on the same.
        """
        touched: set[tuple[str, str]] = set()
        progress = taken = False
        for owed in agenda.owed:
            keys = {(write.aggregate, write.id) for write in owed.writes}
            takes = any(isinstance(write.command, RequestInstance | WakeInstance) for write in owed.writes)
            if touched & keys or (takes and taken):
                continue
            touched |= keys
            done = await self._until_clear(owed, epoch, may_act)
            progress |= done
            taken |= takes and done
        return progress

    async def _until_clear(self, owed: Owed, epoch: int, may_act: Callable[[], bool]) -> bool:
        """Carry it out; where nobody can tell whether it was stored, again until somebody can.

        Such a write may land later. Nothing may be decided meanwhile as if it would not: a step to an instance, say,
        whose stop is still under way.
        """
        while True:
            if not may_act():
                raise Deposed
            try:
                return await self._commands.carry_out(owed, epoch)
            except StoreFull:
                raise  # nothing was stored
            except Unavailable as e:
                log.warning("saga_retried", reason=str(e))
                await asyncio.sleep(_RETRY_S)

    async def _wait(self, agenda: Agenda) -> None:
        delay_s = _TICK_S
        if agenda.wake is not None and agenda.wake > (now := self._clock.now()):
            delay_s = min(delay_s, (agenda.wake - now).total_seconds())
        try:
            async with asyncio.timeout(delay_s):
                await self._moved.wait()
        except TimeoutError:
            pass
