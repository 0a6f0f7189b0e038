"""The controller: answers commands always, runs sagas and projector while it holds the lease. Ports only."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec
import structlog

from turnout.core.alert import RaiseAlert
from turnout.core.config import CACHE, CacheConfig, ModelSwitchingConfig
from turnout.core.decider import Failed
from turnout.events.store import StoreFull, Unavailable
from turnout.workers.controller.activity import QUESTION, Activity
from turnout.workers.controller.alerts import AlertSystem
from turnout.workers.controller.commands import Commands, Deposed
from turnout.workers.controller.health import QUESTIONS
from turnout.workers.controller.liveness import Liveness
from turnout.workers.controller.log import Log
from turnout.workers.controller.projector import Herald, Projector, lost_end
from turnout.workers.controller.sagas import SagaRunner

if TYPE_CHECKING:
    from turnout.core.handling import Defaults
    from turnout.events.store import EventStore
    from turnout.workers.clock import Clock
    from turnout.workers.controller.sinks import Sink
    from turnout.workers.ports import Beats, Bus, Grant, HealthReader, Lease, Request, RouteNews, ViewReader, ViewWriter

log = structlog.get_logger()


class Controller:
    """One controller process."""

    def __init__(
        self,
        id: str,
        *,
        store: EventStore,
        bus: Bus,
        beats: Beats,
        reader: ViewReader,
        writer: ViewWriter,
        news: RouteNews,
        lease: Lease,
        samples: HealthReader,
        sinks: tuple[Sink, ...] = (),
        clock: Clock,
        config: ModelSwitchingConfig,
        defaults: Defaults,
        cache: CacheConfig = CACHE,
        renew_s: float = 0.5,
        poll_s: float = 0.1,
    ) -> None:
        self.id = id
        self.log = Log(store, self._replaced)
        self.commands = Commands(self.log, clock, config, defaults, cache)
        self._liveness = Liveness(clock)
        self._herald = Herald(self.log, news)
        self._activity = Activity(clock)
        self._projector = Projector(self.log, writer, reader)
        self._writer = writer
        self._sagas = SagaRunner(self.log, self.commands, self._liveness, self._activity, clock, config, cache)
        self._samples = samples
        self.alerts = AlertSystem(self.log, self.commands, clock, sinks)
        self._bus, self._beats, self._lease, self._clock = bus, beats, lease, clock
        self._renew_s = renew_s
        self._until = 0.0  # until when the lease may be acted on, monotonic seconds
        #: Between two tries for the lease, seconds; with jitter, so that several candidates don't run in step.
        self._poll_s = poll_s
        self._lost_log: asyncio.Future[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        #: Set while this process leads.
        self.leading = asyncio.Event()
        #: Set once commands are answered.
        self.serving = asyncio.Event()

    async def run(self) -> None:
        """Follow, answer, and lead whenever the lease is free, until cancelled.

        Raises:
            LogReplaced: the log is another one than was read: the process must start again from nothing.
            Damaged: the log has lost events since the views were made.
            Unavailable: the store does not answer at the start.
        """
        self._lost_log = asyncio.get_running_loop().create_future()
        await self.log.follow()
        await self._refuse_loss()
        following = await self._sagas.health.follow(self._samples)
        listening = await self._beats.listen(self._heard)
        serving = await self._bus.serve(self._answer)
        self.serving.set()
        log.info("controller_serving", controller=self.id, sequence=self.log.sequence)
        candidate = asyncio.create_task(self._candidate())
        try:
            await asyncio.wait((candidate, self._lost_log), return_when=asyncio.FIRST_COMPLETED)
            (candidate if candidate.done() else self._lost_log).result()
        finally:
            candidate.cancel()
            await asyncio.gather(candidate, return_exceptions=True)
            await serving.close()
            await listening.close()
            await following.close()
            await self.log.close()

    def _heard(self, kind: str, id: str, body: bytes) -> None:
        self._liveness.heard(kind, id, body)
        self._activity.heard(kind, id, body)

    async def _refuse_loss(self) -> None:
        """Compare the log's end with what the views were made from.

        A server that finds a damaged record at its start drops it and everything behind it, in silence. To go on from
        there would stop engines that the lost events have asked for.
        """
        stored, _ = await self._writer.checkpoint()
        last = await self.log.store.last_sequence()
        if stored is not None and stored.sequence > last and self.log.views.log in ("", stored.log):
            raise lost_end(last, stored.sequence)

    def _replaced(self, error: Exception) -> None:
        if self._lost_log is not None and not self._lost_log.done():
            self._lost_log.set_exception(error)

    async def _answer(self, role: str, verb: str, request: Request) -> bytes:
        if role == "ops" and verb in QUESTIONS:
            return msgspec.json.encode(self._sagas.health.answer(verb, request.body))
        if role == "ops" and verb == QUESTION:
            return msgspec.json.encode(self._activity.answer(self.log.world))
        answer = await self.commands.handle(role, verb, request)
        if isinstance(answer, Failed) and answer.code == StoreFull.code:
            self._tell_full(answer.reason)
        return msgspec.json.encode(answer)

    def _tell_full(self, reason: str) -> None:
        """Raise an alert, once at a time; the answer does not wait for it."""
        if self.leading.is_set() and (self._telling is None or self._telling.done()):
            self._telling = asyncio.create_task(self._raise_full(reason))

    async def _raise_full(self, reason: str) -> None:
        hint = "make room on the NATS server's disk, or raise its limit"
        with contextlib.suppress(Deposed):
            await self.alerts.trigger_alert(RaiseAlert("store_full", "critical", "store_full", reason, hint))

    async def _candidate(self) -> None:
        trouble = ""
        while True:
            try:
                grant = await self._lease.acquire(self.id)
                trouble = ""
            except Unavailable as e:
                if str(e) != trouble:  # once for each outage, not ten times a second
                    log.warning("lease_unavailable", reason=str(e))
                trouble = str(e)
                grant = None
            if grant is not None:
                await self._lead(grant)
            await asyncio.sleep(self._poll_s * (0.5 + self._clock.jitter()))

    async def _lead(self, grant: Grant) -> None:
        """Lead until the lease is lost; whatever was owed is then owed by the next leader."""
        log.info("leading", controller=self.id, epoch=grant.epoch)
        try:
            # What the leader before has written must be folded before anything is owed.
            async with asyncio.timeout(max(0.0, grant.until - self._clock.monotonic())):
                await self.log.catch_up()
        except (TimeoutError, Unavailable) as e:
            log.warning("leading_given_up", reason=str(e) or "the log is too far ahead")
            return
        self._until = grant.until
        duties = [
            asyncio.create_task(self._keep(grant)),
            asyncio.create_task(self._sagas.run(grant.epoch, self._may_act)),
            asyncio.create_task(self._herald.run()),
            asyncio.create_task(self._projector.run(grant.epoch)),
            asyncio.create_task(self.alerts.run(grant.epoch)),
        ]
        self.leading.set()
        try:
            done, _ = await asyncio.wait(duties, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.leading.clear()
            self._until = 0.0
            for duty in duties:
                duty.cancel()
            await asyncio.gather(*duties, return_exceptions=True)
            await self._let_go(grant)
        for duty in done:
            try:
                duty.result()
            except Deposed:
                log.warning("deposed", controller=self.id, epoch=grant.epoch)
        log.info("leading_ended", controller=self.id, epoch=grant.epoch)

    async def _keep(self, grant: Grant) -> None:
        """Renew the lease; returns when it is lost or may not be acted on any more."""
        while True:
            await asyncio.sleep(self._renew_s)
            try:
                async with asyncio.timeout(max(0.0, grant.until - self._clock.monotonic())):
                    renewed = await self._lease.renew(self.id, grant)
            except Unavailable:
                renewed = grant
            except TimeoutError:
                return
            if renewed is None or self._clock.monotonic() >= renewed.until:
                return
            grant, self._until = renewed, renewed.until

    def _may_act(self) -> bool:
        return self._clock.monotonic() < self._until

    async def _let_go(self, grant: Grant) -> None:
        try:
            async with asyncio.timeout(1.0), self.commands.turn:  # a command that acts for the leader is stored first
                await self._lease.release(self.id, grant)
        except (Unavailable, TimeoutError):
            pass  # it runs out by itself
