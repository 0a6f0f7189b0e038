"""View ``route.<model>``: how a gateway routes one served name. Knows nothing of switches.

There is one for every registered model, also while nothing serves it: a served name never disappears from
``/v1/models`` because an engine is down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turnout.events.model import ModelRegistered
from turnout.events.route import Mirror, RouteChanged, Rule, Split
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
        rules, mirrors, candidate: see ``events.route.RouteChanged``.
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


class Routing(Fold):
    """Fold of ModelRegistered and RouteChanged."""

    kind = "route"

    def __init__(self) -> None:
        super().__init__({RouteChanged: self._route_changed, ModelRegistered: self._model_registered})
        self.routes: dict[str, RouteView] = {}

    def view(self, id: str) -> RouteView | None:
        """The view of one model."""
        return self.routes.get(id)

    def _route_changed(self, event: RouteChanged, recorded: Recorded) -> None:
        model = event.model
        left = _left(self.routes.get(model), event)
        self.routes[model] = RouteView(
            model,
            event.revision,
            event.splits,
            event.salt,
            event.drain_s,
            left,
            event.rules,
            event.mirrors,
            event.candidate,
        )
        self.changed.add(model)

    def _model_registered(self, event: ModelRegistered, recorded: Recorded) -> None:
        if event.model not in self.routes:
            self.routes[event.model] = RouteView(event.model)
            self.changed.add(event.model)


def _left(before: RouteView | None, event: RouteChanged) -> dict[str, int]:
    """What has left by this event, newest last."""
    if before is None:
        return {}
    here = {split.version for split in event.splits}
    gone = [split.version for split in before.splits if split.version not in here]
    if event.mirrors or before.mirrors:
        here.update(mirror.version for mirror in event.mirrors)
        gone = [version for version in gone if version not in here]
        gone += [mirror.version for mirror in before.mirrors if mirror.version not in here]
    if not gone and here.isdisjoint(before.left):
        return before.left
    left = before.left.copy()  # not rebuilt entry by entry: a fold of a long log spends its time here
    for version in here:
        left.pop(version, None)
    for version in gone:
        left.pop(version, None)  # set anew below, as the newest
        left[version] = event.revision
    while len(left) > LEFT_MOST:
        del left[next(iter(left))]
    return left
