"""The retention saga: takes away versions that nobody has used for long, where the operator wants that. Pure.

By default nothing is taken away: a version is a line in the log. Never taken: what serves or may have to serve again
(the active version, what an undo goes to, the newest that is known to be good); what a rule, a wish, a pin or the
schedule names; what is loaded; whatever a switch runs on; and a model's last version.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from turnout.core.config import CACHE, CacheConfig
from turnout.core.model import DeregisterVersion
from turnout.core.sagas.owed import Agenda, Owed, Write

if TYPE_CHECKING:
    from turnout.core.config import ModelSwitchingConfig
    from turnout.core.world import World


def agenda(world: World, config: ModelSwitchingConfig, now: datetime, cache: CacheConfig = CACHE) -> Agenda:
    """Take away what is due, and when the next one is. What only the configuration file may change stays."""
    if not cache.version_ttl_seconds or not config.enable_dynamic_registry:
        return Agenda(())
    ttl = timedelta(seconds=cache.version_ttl_seconds)
    loaded = {(world.instances[id].model, world.instances[id].version) for id in world.alive}
    owed: list[Owed] = []
    wakes: list[datetime] = []
    for model, state in sorted(world.models.items()):
        if state.switch or len(state.versions) < 2:
            continue
        kept = _kept(world, model, cache)
        for version in state.versions:
            since = world.last_used(model, version)
            if version in kept or (model, version) in loaded or since is None:
                continue
            if now < since + ttl:
                wakes.append(since + ttl)
                continue
            why = f"nobody has used it for {cache.version_ttl_seconds:g} s (version_ttl_seconds)"
            id = f"retire.{model}.{version}.{since.timestamp():.6f}"
            owed.append(Owed(id, (Write("model", model, DeregisterVersion(model, version, why)),), model))
    return Agenda(tuple(owed), min(wakes, default=None))


def _kept(world: World, model: str, cache: CacheConfig) -> set[str]:
    """Versions of the model that stay, however old they are."""
    state = world.models[model]
    return {
        state.active,
        state.undo_target,
        *state.known_good[-1:],
        *state.residence.pinned,
        *state.residence.wishes,
        *(rule.version for rule in state.rules),
        *(one.version for one in cache.schedule if one.model == model),
    }
