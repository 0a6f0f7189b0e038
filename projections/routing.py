"""View ``route.<model>``: how a gateway routes one served name. Knows nothing of switches.

There is one for every registered model, also while nothing serves it: a served name never disappears from
``/v1/models`` because an engine is down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turnout.events.model import ModelRegistered
from turnout.events.route import Hold, Mirror, RouteChanged, Rule, Split
from turnout.projections.fold import Fold

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


#: Versions that a view remembers as gone; a gateway that missed more of them has long been declared lost.
LEFT_MOST = 256


class RouteView(msgspec.Struct, frozen=True, gc=False):
    """What a gateway applies between two requests.

    Attributes:
        model: the served name.
        revision: 0 until there is a first route; a gateway never applies a lower one.
        splits: see ``events.route.Split``; empty means that nothing serves the model (503).
        salt: salt of the sticky split.
        drain_s: seconds that requests on versions that this revision does not name may still run.
        left: version → revision that it left the route with, of versions that are not back; the newest
            ``LEFT_MOST``. A gateway that was cut off skips revisions: without this it could not report that a version
            which came and went meanwhile is drained, and the controller would wait for ever.
        rules, mirrors, candidate, hold: see ``events.route.RouteChanged``.
    """

    model: str
    revision: int = 0
    splits: tuple[Split, ...] = ()
    salt: str = ""
    drain_s: float = 0.0
    left: dict[str, int] = {}
    rules: tuple[Rule, ...] = ()
    mirrors: tuple[Mirror, ...] = ()
    candidate: str = ""
    hold: Hold | None = None


class Routing(Fold):
    """Fold of ModelRegistered and RouteChanged."""

    kind = "route"

    def __init__(self) -> None:
        super().__init__({RouteChanged: self._route_changed, ModelRegistered: self._model_registered})
        #: Model → its newest revision, and what has left before it. Views are made of them where somebody asks: a copy
        #: of what has left for each revision would be most of the time of a long log's fold.
        self._newest: dict[str, RouteChanged | None] = {}
        self._left: dict[str, dict[str, int]] = {}

    @property
    def routes(self) -> dict[str, RouteView]:
        """Model → its route."""
        return {model: _view(model, event, self._left[model]) for model, event in self._newest.items()}

    def view(self, id: str) -> RouteView | None:
        """The view of one model."""
        return _view(id, self._newest[id], self._left[id]) if id in self._newest else None

    def _route_changed(self, event: RouteChanged, recorded: Recorded) -> None:
        model = event.model
        before = self._newest.get(model)
        self._newest[model] = event
        self.changed.add(model)
        if before is None:
            self._left[model] = {}
        else:
            _leave(self._left[model], before, event)

    def _model_registered(self, event: ModelRegistered, recorded: Recorded) -> None:
        if event.model not in self._newest:
            self._newest[event.model] = None
            self._left[event.model] = {}
            self.changed.add(event.model)


def _view(model: str, event: RouteChanged | None, left: dict[str, int]) -> RouteView:
    if event is None:
        return RouteView(model)
    return RouteView(
        model,
        event.revision,
        event.splits,
        event.salt,
        event.drain_s,
        left.copy(),
        event.rules,
        event.mirrors,
        event.candidate,
        event.hold,
    )


def _leave(left: dict[str, int], before: RouteChanged, event: RouteChanged) -> None:
    """Note what has left by this event, newest last."""
    here = [split.version for split in event.splits]
    gone = [split.version for split in before.splits if split.version not in here]
    if event.mirrors or before.mirrors:
        here += [mirror.version for mirror in event.mirrors]
        gone = [version for version in gone if version not in here]
        gone += [mirror.version for mirror in before.mirrors if mirror.version not in here]
    for version in here:
        left.pop(version, None)
    for version in gone:
        left.pop(version, None)  # set anew below, as the newest
        left[version] = event.revision
    while len(left) > LEFT_MOST:
        del left[next(iter(left))]
