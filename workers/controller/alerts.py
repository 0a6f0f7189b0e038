"""AlertSystem: what the log says of alerts reaches every sink, while this process leads.

Events first: the saga (core/sagas/alerts.py) writes AlertRaised and AlertResolved; what the log holds is delivered from
there, to each sink at least once, in order. Each sink has its own bounded queue and its own retries, so a dead or slow
one holds up nobody. Knows no transport.

A leader that takes over does not know what the one before it has delivered. It tells again what was raised or resolved
in the last AGAIN_S, and of older alerts only those that still stand, that nobody has acknowledged and that are younger
than OLD_S. So a raising is not lost in a gap of that length; a receiver may hear of one twice, and can tell by its id.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

import structlog

from turnout.core.sagas import alerts as saga
from turnout.events.store import Unavailable
from turnout.projections.alerts import AlertView
from turnout.workers.controller.sinks import TIME_LIMIT_S, Refused, Undelivered
from turnout.workers.metrics import Gauge

if TYPE_CHECKING:
    from turnout.core.alert import AlertState, RaiseAlert
    from turnout.core.world import World
    from turnout.workers.clock import Clock
    from turnout.workers.controller.commands import Commands
    from turnout.workers.controller.log import Log
    from turnout.workers.controller.sinks import Sink

log = structlog.get_logger()

#: What is told again by a new leader, seconds before it began to lead.
AGAIN_S = 60.0
#: An alert that still stands is told again by a new leader up to this age, seconds.
OLD_S = 3600.0
#: Deliveries that wait for one sink; the oldest is dropped, and said, where there are more.
WAITING_MOST = 256
#: Seconds before the first retry; doubled up to the most.
RETRY_S = 1.0
RETRY_S_MOST = 60.0
#: How often it is looked whether a sink wants to hear of an alert again, seconds.
TICK_S = 5.0


class AlertSystem:
    """Delivers alerts while this process leads.

    Args:
        log: the controller's.
        commands: for alerts that no saga raises.
        clock: of this process.
        sinks: see sinks.py.
    """

    def __init__(self, log: Log, commands: Commands, clock: Clock, sinks: tuple[Sink, ...]) -> None:
        self._log = log
        self._commands = commands
        self._clock = clock
        self._outboxes = tuple(_Outbox(sink, clock) for sink in sinks)
        self._epoch: int | None = None
        #: Alerts that the sinks were told of although the log could not be written.
        self._unwritten: set[str] = set()
        self._moved = asyncio.Event()
        log.watch(self._moved.set)

    async def run(self, epoch: int) -> None:
        """Deliver until cancelled. The log must be folded up to the start of this leader's time."""
        self._epoch = epoch
        told = self._log.views.sequence
        for view in self._backlog():
            self._tell(view)
        try:
            async with asyncio.TaskGroup() as group:
                for outbox in self._outboxes:
                    group.create_task(outbox.run())
                while True:
                    self._moved.clear()
                    told = self._tell_news(told)
                    self._tell_again()
                    await self._wait()
        finally:
            self._epoch = None
            self._unwritten.clear()
            for outbox in self._outboxes:
                outbox.clear()

    async def trigger_alert(self, alert: RaiseAlert) -> bool:
        """Raise an alert that no saga sees, e.g. of this process's own trouble. Only a leader does.

        Into the log first; the sinks hear of it from there. Where the log can't be written, which may be the very
        trouble, the sinks hear of it at once, and once. An alert of a kind that is not in ``CONDITIONS`` is over when
        somebody has acknowledged it. False where it is known already or this process does not lead.

        Raises:
            Deposed: another leader has taken over.
        """
        if self._epoch is None:
            return False
        try:
            return await self._commands.carry_out(saga.raising(self._log.world, alert), self._epoch)
        except Unavailable as e:
            if alert.alert in self._unwritten:
                return False
            self._unwritten.add(alert.alert)
            log.warning("alert_not_in_log", alert=alert.alert, reason=str(e))
            self._tell(
                AlertView(
                    alert=alert.alert,
                    severity=alert.severity,
                    kind=alert.kind,
                    summary=alert.summary,
                    hint=alert.hint,
                    model=alert.model,
                    version=alert.version,
                    switch=alert.switch,
                    raised_at=self._clock.now(),
                )
            )
            return True

    def gauges(self) -> tuple[Gauge, ...]:
        """What stands, and how the deliveries do; read in another thread."""
        made = list(gauges(self._log.world))
        for outbox in self._outboxes:
            labels = {"sink": outbox.sink.name}
            waiting, failing = len(outbox.waiting), float(bool(outbox.trouble))
            made.append(Gauge("turnout_alert_deliveries_waiting", "Not delivered yet.", waiting, labels))
            made.append(Gauge("turnout_alert_sink_failing", "1 while the last try failed.", failing, labels))
            made.append(Gauge("turnout_alert_deliveries_lost", "Dropped or refused.", outbox.lost, labels))
        return tuple(made)

    def _backlog(self) -> list[AlertView]:
        """What the leader before may not have delivered."""
        now, alerts = self._clock.now(), self._log.views.alerts
        found: list[AlertView] = []
        for _, view in alerts.news:
            at = view.resolved_at or view.raised_at
            age_s = OLD_S if at is None else (now - at).total_seconds()
            if age_s <= AGAIN_S or (age_s < OLD_S and view.state == "raised" and alerts.alerts.get(view.alert) is view):
                found.append(view)
        return found

    def _tell_news(self, after: int) -> int:
        """What the log has said since; returns how far it is told."""
        views = self._log.views
        news: list[AlertView] = []
        for sequence, view in reversed(views.alerts.news):
            if sequence <= after:
                break
            news.append(view)
        for view in reversed(news):
            self._unwritten.discard(view.alert)
            self._tell(view)
        return views.sequence

    def _tell_again(self) -> None:
        standing = self._log.views.alerts.standing()
        for outbox in self._outboxes:
            outbox.remind(standing)

    def _tell(self, view: AlertView) -> None:
        for outbox in self._outboxes:
            outbox.put(view)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(TICK_S):
                await self._moved.wait()
        except TimeoutError:
            pass


def gauges(world: World) -> tuple[Gauge, ...]:
    """The alerts that stand, by kind, severity and model; read in another thread."""
    counts: dict[tuple[str, str, str], int] = {}
    unseen = 0
    for key in tuple(world.raised):
        state: AlertState = world.state("alert", key)
        labels = (state.kind, state.severity, state.model)
        counts[labels] = counts.get(labels, 0) + 1
        unseen += not state.acknowledged
    return (
        Gauge("turnout_alerts_unacknowledged", "Alerts that stand and that nobody has acknowledged.", unseen),
        *(
            Gauge("turnout_alerts", "Alerts that stand.", n, {"kind": kind, "severity": severity, "model": model})
            for (kind, severity, model), n in sorted(counts.items())
        ),
    )


class _Outbox:
    """What one sink has still to be told.

    Attributes:
        sink: whose.
        waiting: oldest first.
        trouble: why the last try failed, empty where it did not.
        lost: deliveries that were dropped or refused.
    """

    def __init__(self, sink: Sink, clock: Clock) -> None:
        self.sink = sink
        self.waiting: deque[AlertView] = deque()
        self.trouble = ""
        self.lost = 0
        self._clock = clock
        self._more = asyncio.Event()
        self._under_way = ""
        #: Alert → when the sink was told last, monotonic seconds.
        self._told: dict[str, float] = {}

    def put(self, view: AlertView) -> None:
        """One more to tell."""
        if len(self.waiting) >= WAITING_MOST:
            self._lose(self.waiting.popleft(), f"{WAITING_MOST} wait already")
        self.waiting.append(view)
        if view.state == "resolved":
            self._told.pop(view.alert, None)
        else:
            self._told[view.alert] = self._clock.monotonic()
        self._more.set()

    def remind(self, standing: tuple[AlertView, ...]) -> None:
        """Tell again what the sink wants to hear again by now, unless it waits anyway."""
        now = self._clock.monotonic()
        waiting = {view.alert for view in self.waiting} | {self._under_way}
        for view in standing:
            again_s = self.sink.again_s(view)
            told = self._told.setdefault(view.alert, now)
            if again_s is not None and now - told >= again_s and view.alert not in waiting:
                self.put(view)

    def clear(self) -> None:
        """Forget everything: another leader tells it."""
        self.waiting.clear()
        self._told.clear()
        self.trouble = ""

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            self._more.clear()
            while self.waiting:
                view = self.waiting.popleft()
                self._under_way = view.alert
                await self._deliver(view)
                self._under_way = ""
            await self._more.wait()

    async def _deliver(self, view: AlertView) -> None:
        """Try until it is delivered or refused."""
        wait_s = RETRY_S
        while True:
            try:
                async with asyncio.timeout(TIME_LIMIT_S):
                    await self.sink.deliver(view, self._clock.now())
            except Refused as e:
                self._lose(view, str(e))
                return
            except (Undelivered, TimeoutError) as e:
                reason = str(e) or f"no answer within {TIME_LIMIT_S:g} s"
            except Exception:
                log.exception("bug_in_sink", sink=self.sink.name, alert=view.alert)
                self._lose(view, "a fault of turnout")
                return
            else:
                if self.trouble:
                    log.info("alert_sink_works_again", sink=self.sink.name)
                self.trouble = ""
                return
            if not self.trouble:  # once for each outage
                log.warning("alert_sink_fails", sink=self.sink.name, reason=reason, alert=view.alert)
            self.trouble = reason
            await asyncio.sleep(wait_s * (0.5 + self._clock.jitter()))
            wait_s = min(RETRY_S_MOST, 2 * wait_s)

    def _lose(self, view: AlertView, reason: str) -> None:
        self.lost += 1
        log.error("alert_not_delivered", sink=self.sink.name, alert=view.alert, state=view.state, reason=reason)
