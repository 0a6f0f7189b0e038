"""All views together: one fold of the log, and which keys it has changed. Knows no bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from turnout.events import subjects
from turnout.projections.alerts import Alerts
from turnout.projections.fleet import Gateways, Workers
from turnout.projections.registry import Registry
from turnout.projections.routing import Routing
from turnout.projections.switches import Switches

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.events.envelope import Recorded
    from turnout.projections.fold import Folds


#: Kinds of views that processes act on.
_URGENT = frozenset(("route", "worker"))


class Projection(Protocol):
    """One kind of view."""

    @property
    def kind(self) -> str:
        """First part of its keys."""
        ...

    @property
    def folds(self) -> Folds:
        """What it does with each type of event."""
        ...

    @property
    def changed(self) -> set[str]:
        """Ids whose views have changed."""
        ...

    def view(self, id: str) -> object | None:
        """The view of one id, None where there is none."""
        ...


class Views:
    """The fold of everything that is published. ``sequence``: how far it has come."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.routing = Routing()
        self.switches = Switches()
        self.workers = Workers()
        self.gateways = Gateways()
        self.alerts = Alerts()
        self._newest: Recorded | None = None
        #: Digest of the log's first event: which log this is the fold of.
        self.log = ""
        self._dirty: dict[str, tuple[int, Projection, str]] = {}
        self._news: set[str] = set()
        self._all: tuple[Projection, ...] = (
            self.registry,
            self.routing,
            self.switches,
            self.workers,
            self.gateways,
            self.alerts,
        )
        self._folds = _joined(self._all)

    @property
    def sequence(self) -> int:
        """Of the newest event."""
        return 0 if self._newest is None else self._newest.sequence

    def apply(self, recorded: Recorded) -> None:
        """Take the log's next event."""
        if self._newest is None:
            self.log = recorded.digest
        self._newest = recorded
        event = recorded.event
        fold = self._folds.get(type(event))
        if fold is not None:
            fold(event, recorded)

    def settle(self) -> None:
        """Note what has changed up to here. Call it between two events, before ``take``."""
        self._news |= self.routing.changed
        for projection in self._all:
            if projection.changed:
                for id in projection.changed:
                    if id:
                        self._dirty[subjects.view_key(projection.kind, id)] = (self.sequence, projection, id)
                projection.changed.clear()

    def urgent(self) -> bool:
        """Whether something changed that gateways or workers act on; the rest is for people."""
        return any(projection.kind in _URGENT for _, projection, _ in self._dirty.values())

    def news(self) -> dict[str, bytes]:
        """Model → JSON of its route, where it has changed since this was asked last and up to ``settle``."""
        news, self._news = self._news, set()
        return {model: msgspec.json.encode(self.routing.view(model)) for model in news}

    def take(self, after: int) -> dict[str, bytes | None]:
        """Key → JSON of every view that events above ``after`` have changed; None where a view is gone.

        What is taken (or older than ``after``, so stored by somebody else) is forgotten.
        """
        dirty, self._dirty = self._dirty, {}
        changes: dict[str, bytes | None] = {}
        for key, (sequence, projection, id) in dirty.items():
            if sequence > after:
                view = projection.view(id)
                changes[key] = None if view is None else msgspec.json.encode(view)
        return changes

    def everything(self) -> dict[str, bytes]:
        """Key → JSON of every view: what a rebuild from nothing would store."""
        stores: tuple[tuple[str, dict[str, object]], ...] = (
            ("model", dict(self.registry.models)),
            ("route", dict[str, object](self.routing.routes)),
            ("switch", dict(self.switches.switches)),
            ("worker", dict(self.workers.workers)),
            ("gateway", dict(self.gateways.gateways)),
            ("alert", dict(self.alerts.alerts)),
        )
        return {
            subjects.view_key(kind, id): msgspec.json.encode(view)
            for kind, views in stores
            for id, view in views.items()
            if id
        }


def _joined(projections: tuple[Projection, ...]) -> dict[type, Callable[[Any, Recorded], None]]:
    """One table for all projections: most types concern only one of them."""
    joined: dict[type, Callable[[Any, Recorded], None]] = {}
    for projection in projections:
        for type_, fold in projection.folds.items():
            joined[type_] = _both(joined[type_], fold) if type_ in joined else fold
    return joined


def _both(
    first: Callable[[Any, Recorded], None], second: Callable[[Any, Recorded], None]
) -> Callable[[Any, Recorded], None]:
    def fold(event: Any, recorded: Recorded) -> None:
        first(event, recorded)
        second(event, recorded)

    return fold
