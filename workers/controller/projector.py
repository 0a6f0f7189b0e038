"""Fold → views in the bucket, one atomic commit for each group of events; new routes are told at once. Only the leader.

Exactly once relative to the log: a commit names the checkpoint that it was made from, so that a second projector is
refused and starts again from what is stored. Knows the ports only.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from turnout.events.store import Conflict, Damaged, Unavailable
from turnout.workers.ports import Checkpoint

if TYPE_CHECKING:
    from turnout.workers.controller.log import Log
    from turnout.workers.ports import RouteNews, ViewReader, ViewWriter

log = structlog.get_logger()

_KINDS = ("model.*", "route.*", "switch.*", "worker.*", "gateway.*", "alert.*")
_RETRY_S = 0.25
#: How long a change that no process acts on may wait for others, seconds.
GATHER_S = 0.015


def lost_end(ends_at: int, views_at: int) -> Damaged:
    """The log has lost its last events: the views know more of them."""
    return Damaged(
        f"the log ends at event {ends_at}, but its views were made from {views_at}: the last events are gone; "
        "restore the store folder from a backup, or start with an empty one"
    )


class Projector:
    """Keeps the bucket equal to the fold while this process leads."""

    def __init__(self, log: Log, writer: ViewWriter, reader: ViewReader) -> None:
        self._log = log
        self._writer = writer
        self._reader = reader
        self._moved = asyncio.Event()
        #: A commit began whose end is not known: only a rebuild is sure to store what it took.
        self._unsure = False
        log.watch(self._moved.set)

    async def run(self, epoch: int) -> None:
        """Project until cancelled.

        Raises:
            Damaged: the log ends before the stored views. Views of what is left would hide that from ``verify``.
        """
        while True:
            try:
                await self._project(epoch)
            except (Conflict, Unavailable) as e:
                log.warning("projection_retried", reason=str(e) or type(e).__name__)
                await asyncio.sleep(_RETRY_S)

    async def _project(self, epoch: int) -> None:
        stored, revision = await self._writer.checkpoint()
        views = self._log.views
        if stored is not None and stored.log == views.log and stored.sequence > views.sequence:
            await self._log.catch_up()  # the leader before wrote once more: views never go back
            if stored.sequence > views.sequence:
                raise lost_end(views.sequence, stored.sequence)
        if self._unsure or stored is None or stored.log != views.log:
            revision = await self._rebuild(epoch, revision)
            after = 0  # what has become dirty meanwhile is not in it
        else:
            after = stored.sequence
        committed = -1
        while True:
            await self._gather()
            self._moved.clear()
            views.settle()  # nothing may be folded between this and the next two lines
            changes = views.take(after)
            if changes or views.sequence > committed:  # readers wait for a sequence, whether it changed a view or not
                committed = views.sequence
                revision = await self._commit(changes, Checkpoint(views.sequence, views.log, epoch), revision)
            after = 0  # whatever is dirty from now on came after the checkpoint
            await self._moved.wait()

    async def _gather(self) -> None:
        """Let views that only people read wait a moment.

        A switch writes its request, and a few milliseconds later its first step: in one commit the step does not wait
        for the request's, and the disk is asked once.
        """
        views = self._log.views
        try:
            async with asyncio.timeout(GATHER_S):
                while True:
                    self._moved.clear()
                    views.settle()
                    if views.urgent():
                        return
                    await self._moved.wait()
        except TimeoutError:
            pass

    async def _commit(self, changes: dict[str, bytes | None], checkpoint: Checkpoint, revision: int) -> int:
        """Store what was taken. Where that fails or is cut short, the whole state is written next: always true."""
        self._unsure = True
        revision = await self._writer.commit(changes, checkpoint, revision)
        self._unsure = False
        return revision

    async def _rebuild(self, epoch: int, revision: int) -> int:
        """Store every view as the fold has it, and remove what the fold does not know."""
        views = self._log.views
        everything: dict[str, bytes | None] = dict(views.everything())
        views.settle()
        views.take(views.sequence)
        self._unsure = True
        checkpoint = Checkpoint(views.sequence, views.log, epoch)
        stored, _ = await self._reader.snapshot(_KINDS)
        for key in stored:
            everything.setdefault(key, None)
        log.info("views_rebuilt", views=len(everything), sequence=checkpoint.sequence)
        return await self._commit(everything, checkpoint, revision)


class Herald:
    """Tells gateways of each new route as soon as it stands in the log, while this process leads.

    The stored view follows a disk's write later; it is what a gateway goes by that has missed the news.
    """

    def __init__(self, log: Log, news: RouteNews) -> None:
        self._log = log
        self._news = news
        self._moved = asyncio.Event()
        log.watch(self._moved.set)

    async def run(self) -> None:
        """Tell until cancelled."""
        self._log.views.news()  # what came before is stored, or is about to be
        while True:
            for model, view in self._log.views.news().items():
                await self._news.tell(model, view)
            self._moved.clear()
            await self._moved.wait()
