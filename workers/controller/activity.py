"""Who uses what is loaded on demand: what gateways say with their signs of life. Time comes by the clock."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from turnout.core.sagas.demand import Use
from turnout.workers.ports import GatewayBeat, ModelUse

if TYPE_CHECKING:
    from turnout.core.world import World
    from turnout.workers.clock import Clock

#: A word that is older than this says nothing any more, seconds.
FRESH_S = 3.0

QUESTION = "model.uses"


class AskUses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``model.uses``: who uses what is loaded on demand?"""


class UsesReport(msgspec.Struct, frozen=True, tag="uses", tag_field="status"):
    """The answer to ``model.uses``: the models that have an instance and on which every live gateway has its word."""

    at: datetime
    models: dict[str, Use]


_beat = msgspec.json.Decoder(GatewayBeat)


class Activity:
    """The newest word of each gateway."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[float, dict[str, ModelUse]]] = {}

    def heard(self, kind: str, id: str, body: bytes) -> None:
        """A beat came."""
        if kind != "gateway":
            return
        try:
            models = _beat.decode(body).uses
        except msgspec.MsgspecError:  # of another release; its gateway counts as one that says nothing
            return
        self._heard[id] = (self._clock.monotonic(), models)

    def answer(self, world: World) -> UsesReport:
        """Answer the question."""
        return UsesReport(self._clock.now(), self.uses(world))

    def uses(self, world: World) -> dict[str, Use]:
        """Model → what is done with it, of the models on which every live gateway has given its word.

        A gateway that was not heard, or that does not use the newest route yet, may be sending a request now.
        """
        now = self._clock.monotonic()
        self._heard = {id: word for id, word in self._heard.items() if id in world.live_gateways}
        fresh = [word for word in self._heard.values() if now - word[0] <= FRESH_S]
        if not fresh or len(fresh) < len(world.live_gateways):
            return {}
        uses: dict[str, Use] = {}
        for model in fresh[0][1]:
            revision = world.state("route", model).revision
            said = [(now - at, models.get(model)) for at, models in fresh]
            known = [(age, use) for age, use in said if use is not None and use.revision >= revision]
            if len(known) == len(said):
                in_flight = sum(use.in_flight for _, use in known)
                idle_s = 0.0 if in_flight else min(use.idle_s + age for age, use in known)
                uses[model] = Use(in_flight, sum(use.held for _, use in known), round(idle_s, 3))
        return uses
