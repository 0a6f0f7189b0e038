"""Command → decision → events → answer. The only place that appends to the log.

A decision is made on this process's fold and stored under the positions that it was made from; where those have moved
on, the fold is brought up to date and the decision made again. A time-out says nothing: the subjects are read again and
searched for the command's id. Knows no transport and no saga.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import structlog

from turnout.core.config import CACHE, CacheConfig, ModelSwitchingConfig
from turnout.core.decider import Accepted, Answer, Failed, Rejected
from turnout.core.handling import VERBS, Context, Defaults, Told, Writes
from turnout.core.sagas.owed import decide
from turnout.core.world import Done, World
from turnout.events import subjects
from turnout.events.codec import Context as EventContext
from turnout.events.store import Append, Conflict, StoreFull, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.core.sagas.owed import Owed
    from turnout.workers.clock import Clock
    from turnout.workers.controller.log import Log
    from turnout.workers.ports import Request

    Decided = Writes | Rejected | Told
    _Planned = Callable[[World, bool], Decided]

log = structlog.get_logger()

#: Conflicts in a row before a command is given back to its sender: more than two writers can cause by racing.
TRIES = 10
#: By then a command from outside is answered, seconds: below the wait of those who ask (workers/client.py), so that
#: they hear of a store that is silent (a full disk is) and don't take this process for gone.
ANSWER_S = 1.5


#: Commands that take turns with the sagas: those that open a switch, because its first step may go with them, the one
#: that stops an instance, and the one that takes memory for a spare.
_IN_TURN = frozenset(("switch.start", "switch.retry", "model.undo", "instance.stop", "worker.spare"))
#: Commands that only the leader answers: its sagas give out memory, and another controller may be a moment behind
#: what they gave.
_LEADERS = frozenset(("worker.spare",))


class Deposed(Exception):
    """Another leader has written with a higher epoch: this one must stop at once."""


class Commands:
    """Decides commands on the log's fold and appends what they make true."""

    def __init__(
        self,
        log: Log,
        clock: Clock,
        config: ModelSwitchingConfig,
        defaults: Defaults,
        cache: CacheConfig = CACHE,
    ) -> None:
        self._log = log
        self._clock = clock
        self._config = config
        self._defaults = defaults
        self._cache = cache
        #: Whose turn it is to decide what moves traffic or stops instances: a saga's, or a command's that begins with a
        #: saga's step. Positions can't keep these two apart, because they write to different subjects.
        self.turn = asyncio.Lock()
        self._leads: Callable[[], bool] = _never
        self._epoch = 0

    def lead(self, epoch: int, may_act: Callable[[], bool]) -> None:
        """From now on, commands may begin with a saga's step while ``may_act`` says so. ``epoch``: of the lease."""
        self._epoch, self._leads = epoch, may_act

    async def handle(self, role: str, verb: str, request: Request) -> Answer | Told:
        """Answer a command from outside. Never raises: what goes wrong is an answer, too."""
        known = VERBS.get((role, verb))
        if known is None:
            return Rejected(
                "verb_unknown",
                f"role {role!r} has no command {verb!r}",
                "see docs/protocol.md for the commands of each role",
            )
        if not request.id:
            return Rejected("request_invalid", "the command has no id", "make one and keep it for every retry")
        body_type, handler = known
        try:
            body = msgspec.json.decode(request.body, type=body_type)
        except msgspec.MsgspecError as e:
            return Rejected("request_invalid", f"{verb}: {e}", "see docs/protocol.md for the fields of the command")
        actor = f"{role}:{request.actor}" if request.actor else role

        def plan(world: World, leads: bool) -> Decided:
            context = Context(
                request.id, request.actor, self._clock.now(), self._config, self._defaults, leads, self._cache
            )
            planned = handler(world, body, context)
            if request.if_sequence is None or isinstance(planned, Rejected | Told):
                return planned
            return _stale(world, planned, request.if_sequence) or planned

        try:
            async with asyncio.timeout(ANSWER_S):
                if verb in _LEADERS and not self._leads():
                    return Failed("not_leading", f"only the leader answers {verb}", "send it again with the same id")
                if verb not in _IN_TURN or not self._leads():
                    return await self._settle(request.id, actor, plan, _never)
                async with self.turn:
                    return await self._settle(request.id, actor, plan, self._leads)
        except TimeoutError:
            silent = Unavailable(
                f"the event store did not answer within {ANSWER_S:g} s: it is being started, or its disk is full; "
                "make room, and restart a nats-server that met a full disk (turnout up does that itself)"
            )
            return Failed(silent.code, str(silent), "send the same command again with the same id")
        except Unavailable as e:
            return Failed(e.code, str(e), "send the same command again with the same id")
        except Exception:
            log.exception("bug_in_command", verb=verb, command=request.id)
            return Failed(
                "bug",
                f"turnout failed to decide {verb}; nothing was written",
                "this is a fault of turnout: report it with the controller's log",
            )

    async def carry_out(self, owed: Owed, epoch: int) -> bool:
        """Append what a saga owes. False where the world has moved on: ask the saga again.

        Raises:
            Deposed: another leader has taken over.
            Unavailable: the store gave no clear answer.
        """
        world = self._log.world
        if world.done(owed.id) is not None:
            return False
        if world.epoch > epoch:
            raise Deposed
        decided = self._decide(world, owed.writes)
        if isinstance(decided, Rejected):
            log.error("owed_command_rejected", command=owed.id, code=decided.code, reason=decided.reason)
            return False
        if not decided:
            return False
        causation = world.last_event(decided[0].subject)
        context = EventContext(owed.id, "controller", causation, owed.correlation, self._clock.now(), epoch)
        try:
            self._log.own(await self._log.store.append(decided, context))
        except Conflict:
            await self._reload(decided)
            return False
        except Unavailable:
            await self._reload(decided)
            if world.done(owed.id) is None:  # not stored: the runner waits before it asks again
                raise
        return True

    async def _settle(self, id: str, actor: str, plan: _Planned, may_lead: Callable[[], bool]) -> Answer | Told:
        """Decide until it is stored, refused or true already."""
        world = self._log.world
        sure = False
        trouble: Unavailable | None = None
        for attempt in range(TRIES):
            if done := world.done(id):
                if not sure:  # the tail may have brought only the first events of its batch
                    await self._log.catch_up()
                    sure = True
                    continue
                return _accepted(id, done)
            leads = world.epoch <= self._epoch and may_lead()
            planned = plan(world, leads)
            if isinstance(planned, Told):
                return planned
            decided = planned if isinstance(planned, Rejected) else self._decide(world, planned)
            if isinstance(decided, Rejected) or not decided:
                if not sure:  # this fold may be a moment behind: look again before saying no
                    await self._log.catch_up()
                    sure = True
                    continue
                if isinstance(planned, Rejected):
                    return planned
                return decided if isinstance(decided, Rejected) else _true_already(world, planned)
            epoch = self._epoch if leads else 0
            context = EventContext(id, actor, id, _correlation(decided), self._clock.now(), epoch)
            try:
                recorded = await self._log.store.append(decided, context)
            except Conflict:
                await self._reload(decided)
            except StoreFull:
                raise  # nothing was stored, and nothing will be until somebody makes room
            except Unavailable as e:
                trouble = e
                await asyncio.sleep(min(1.0, 0.05 * 2**attempt))
                await self._reload(decided)
            else:
                self._log.own(recorded)
                switches = [i for kind, i in (subjects.parse_event(a.subject) for a in decided) if kind == "switch"]
                first, last = recorded[0], recorded[-1]
                switch = switches[0] if switches else ""
                return _accepted(id, Done(first.subject, first.sequence, last.sequence, len(recorded), switch))
        raise trouble or Unavailable(f"{TRIES} others wrote first; the command was not stored")

    def _decide(self, world: World, writes: Writes) -> tuple[Append, ...] | Rejected:
        """All writes' events under the positions that they were decided from."""
        decided = decide(world, writes)
        if isinstance(decided, Rejected):
            return decided
        return tuple(Append(subject, world.position(subject), events) for subject, events in decided.items())

    async def _reload(self, appends: tuple[Append, ...]) -> None:
        """Bring the subjects of a decision up to date from the store."""
        for append in appends:
            self._log.reread(await self._log.store.read(append.subject))


def _never() -> bool:
    """Nobody leads here."""
    return False


def _stale(world: World, writes: Writes, known: int) -> Rejected | None:
    """Why a command is refused that was made from an older state; None where its sender knows the newest."""
    first = writes[0]
    now = world.position(subjects.event(first.aggregate, first.id)).sequence
    if now == known:
        return None
    return Rejected(
        "sequence_stale",
        f"{first.aggregate} {first.id} is at event {now} by now, not at {known}: somebody has changed it",
        "read it again, see whether you still want the change, and send it with the new sequence",
    )


def _accepted(id: str, done: Done) -> Accepted:
    ids = (done.switch,) if done.switch else ()
    return Accepted(done.subject, done.sequence, ids, tuple(f"{id}:{n}" for n in range(done.events)))


def _true_already(world: World, writes: Writes) -> Accepted:
    """The answer to a command that left nothing to write. Views as old as its sequence know that it is true."""
    first = writes[0]
    subject = subjects.event(first.aggregate, first.id)
    return Accepted(subject, world.sequence, (first.id,) if first.aggregate == "switch" else ())


def _correlation(appends: tuple[Append, ...]) -> str:
    """The switch that the events belong to, else the aggregate's id."""
    ids = dict(subjects.parse_event(a.subject) for a in appends)
    return ids.get("switch") or next(iter(ids.values()))
