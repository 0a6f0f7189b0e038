"""The log for readers by HTTP: pages above a sequence, and what comes after, each event with its plain sentence.

One fold of names is shared by all readers and fed once from the log's start. Knows the client; no HTTP.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from turnout.projections.audit import Audit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from turnout.events.envelope import Recorded
    from turnout.workers.client import Client

#: Events that one request looks through at most, whatever it filters for.
SCAN_MOST = 20_000
#: How often a followed log is looked at while no controller projects, seconds.
_POLL_S = 2.0
#: Looks without news after which a follower hears that it is still followed.
_QUIET_POLLS = 7


class Line(msgspec.Struct, frozen=True):
    """One event, as told and as stored.

    Attributes:
        sequence: its place in the log.
        time: UTC.
        actor: who asked, as in the envelope.
        type: of the event.
        model: served name that it concerns, empty for none.
        switch: id of the switch that it belongs to, empty for none.
        tone: ``good``, ``warning``, ``bad``, ``detail`` or empty.
        sentence: what happened.
        subject: of the event.
        command: id of the command that caused it.
        correlation: what belongs together.
        event: its body.
    """

    sequence: int
    time: datetime
    actor: str
    type: str
    model: str
    switch: str
    tone: str
    sentence: str
    subject: str
    command: str
    correlation: str
    event: dict[str, Any]


class Page(msgspec.Struct, frozen=True):
    """Some events. ``next``: ask with it as ``after`` for those behind; None where the log ends here now."""

    items: tuple[Line, ...]
    next: int | None


class Journal:
    """Reads the log for many readers."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._audit = Audit()
        self._known = 0
        self._feeding = asyncio.Lock()

    async def page(self, after: int, limit: int, model: str, switch: str) -> Page:
        """The next events above ``after`` that concern the model and the switch (empty for any).

        Raises:
            Unavailable: the log can't be read.
        """
        await self._learn(after)
        found: list[Line] = []
        at, seen, left = after, 0, 1
        while left and len(found) < limit and seen < SCAN_MOST:
            records, left = await self._client.log_page(at)
            if not records:
                return Page(tuple(found), None)
            for number, recorded in enumerate(records, 1):
                at, seen = recorded.sequence, seen + 1
                line = self._line(recorded)
                if _concerns(line, model, switch):
                    found.append(line)
                if len(found) == limit:
                    left += len(records) - number
                    break
        return Page(tuple(found), at if left else None)

    async def follow(self, after: int, model: str, switch: str) -> AsyncGenerator[Line | None]:
        """What comes above ``after``, on and on; None where nothing came for a while.

        Raises:
            Unavailable: the log can't be read.
        """
        async with self._client.follow() as following:  # no key: the checkpoint moves with every event
            quiet = 0
            while True:
                page = await self.page(after, 1000, model, switch)
                for line in page.items:
                    after = line.sequence
                    yield line
                if page.next is not None:
                    after = page.next
                    continue
                quiet = 0 if page.items or await following.moved(_POLL_S) else quiet + 1
                if quiet == _QUIET_POLLS:
                    quiet = 0
                    yield None

    async def _learn(self, upto: int) -> None:
        """Feed the fold with what stands before the page, once."""
        async with self._feeding:
            left = 1
            while left and self._known < upto:
                records, left = await self._client.log_page(self._known)
                for recorded in records:
                    self._audit.entry(recorded)
                    self._known = recorded.sequence
                if not records:
                    break

    def _line(self, recorded: Recorded) -> Line:
        entry = self._audit.entry(recorded)
        self._known = max(self._known, recorded.sequence)
        return Line(
            **msgspec.structs.asdict(entry),
            subject=recorded.subject,
            command=recorded.envelope.command,
            correlation=recorded.envelope.correlation,
            event=msgspec.json.decode(recorded.body),
        )


def _concerns(line: Line, model: str, switch: str) -> bool:
    return model in ("", line.model) and switch in ("", line.switch)
