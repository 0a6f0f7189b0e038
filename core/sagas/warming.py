"""The warming saga: wishes to preload what may be wanted soon. Pure; loading is placement's, and knows no strategy.

A wish is made only where its version fits now, beside everything that is held, and never while something that is needed
waits. It has the lowest priority: nothing leaves for it, and what it has loaded leaves first. No thrash: one wish at a
time, others' before its own; none for a version that has just gone, that failed to load, or that somebody let go since;
and what a guess rests on is out of date once an idle instance would be.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from turnout.core import cron
from turnout.core.config import CACHE, CacheConfig
from turnout.core.placement import FITS, Ledger
from turnout.core.residence import PRIORITY_MOST, EndPreload, Wish, WishPreload
from turnout.core.sagas import placement
from turnout.core.sagas.owed import Agenda, Owed, Write
from turnout.core.warming import Guess, predicted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turnout.core.config import ModelSwitchingConfig
    from turnout.core.world import World

#: Nothing has a lower one.
PRIORITY = -PRIORITY_MOST
#: What a strategy's wish begins with: nobody else's are withdrawn.
STRATEGIES = ("scheduled: ", "recent: ", "predicted: ")
#: A version that has just gone is not loaded again before: what took its room, or a restart, comes to its end first.
REST = timedelta(seconds=30)
#: A firing counts for so long: the leader may have been away, or there was no room.
LATE = timedelta(minutes=15)


def agenda(world: World, config: ModelSwitchingConfig, now: datetime, cache: CacheConfig = CACHE) -> Agenda:
    """Withdraw the wish that finds no room any more, or make one for the first version that is worth it and fits."""
    waiting = [
        (name, version, wish)
        for name, model in sorted(world.models.items())
        for version, wish in model.residence.wishes.items()
    ]
    withdrawn = tuple(_withdraw(*one) for one in waiting if _in_vain(world, config, *one))
    if waiting or not (cache.warm or cache.schedule) or placement.something_needed_waits(world):
        return Agenda(withdrawn)
    wake = now.replace(second=0, microsecond=0) + timedelta(minutes=1)  # the next firing, hour or end of a guess
    for model, guess in _guesses(world, config, now, cache):
        if not _worth(world, model, guess):
            continue
        gone = world.gone.get((model, guess.version))
        if gone is not None and now < gone + REST:
            wake = min(wake, gone + REST)
        elif fits(world, config, model, guess.version):
            wish = WishPreload(model, guess.version, PRIORITY, now, guess.reason)
            occasion = max(guess.since, gone) if gone is not None else guess.since
            id = f"warm.{model}.{guess.version}.{occasion.timestamp():.6f}"
            if world.done(id) is None:
                return Agenda((Owed(id, (Write("model", model, wish),), model),), wake)
    return Agenda((), wake)


def fits(world: World, config: ModelSwitchingConfig, model: str, version: str) -> bool:
    """Whether a worker has room for it now, without anything leaving, and may keep one more idle instance."""
    kept = Counter(one.worker for one in placement.evictable(world) if not one.asleep)
    offers = Ledger(world, ()).offers(model, version, PRIORITY)
    return any(offer.verdict == FITS and kept[offer.worker] < config.max_cached_models for offer in offers)


def _in_vain(world: World, config: ModelSwitchingConfig, model: str, version: str, wish: Wish) -> bool:
    """Whether a strategy's wish is not under way, and has no room any more or would be in the way."""
    if wish.priority != PRIORITY or not wish.reason.startswith(STRATEGIES):
        return False
    if version not in world.models[model].versions or _is_here(world, model, version):
        return False
    return placement.something_needed_waits(world) or not fits(world, config, model, version)


def _withdraw(model: str, version: str, wish: Wish) -> Owed:
    end = EndPreload(model, version, "withdrawn", "there is no room for it now")
    return Owed(f"unwarm.{model}.{version}.{wish.at.timestamp():.6f}", (Write("model", model, end),), model)


def _guesses(
    world: World, config: ModelSwitchingConfig, now: datetime, cache: CacheConfig
) -> Iterator[tuple[str, Guess]]:
    """(model, what may be wanted) that still holds: what was scheduled, what was used last, what is predicted."""
    for one in cache.schedule:
        expression = cron.parse(one.cron)
        at = None if isinstance(expression, str) else expression.last(now, LATE)
        if at is not None:
            yield one.model, Guess(one.version, at, f"scheduled: {one.cron} ({at:%H:%M} UTC)")
    oldest = now.timestamp() - config.model_ttl_seconds
    if "recent" in cache.warm:
        newest = sorted(((at, *key) for key, at in world.used.items() if at.timestamp() > oldest), reverse=True)
        for at, model, version in newest:
            yield model, Guess(version, at, f"recent: it served until {at:%H:%M:%S} UTC and is not loaded any more")
    if "predicted" in cache.warm:
        for model, state in sorted(world.models.items()):
            for guess in predicted(world.turns.get(model, ()), state.undo_target, now):
                if guess.since.timestamp() > oldest:
                    yield model, guess


def _worth(world: World, model: str, guess: Guess) -> bool:
    """Whether nobody has it loaded or on its way, and nothing speaks against it."""
    state = world.models.get(model)
    if state is None or guess.version not in state.versions or state.serving.on_demand:
        return False  # what is served on demand is loaded by who asks for it
    if guess.version in placement.needed(world, model) or _is_here(world, model, guess.version):
        return False
    if not placement.loadable(world, model, guess.version):
        return False
    asked = state.residence.evicted.get(guess.version)
    if asked is not None and asked.at >= guess.since:
        return False
    failures = world.failures.get((model, guess.version))
    if failures is None or failures.last < guess.since:
        return True
    return failures.stage == "serving" and failures.count == 1  # a sound engine that died once, as with its worker


def _is_here(world: World, model: str, version: str) -> bool:
    return any(world.instances[id].model == model and world.instances[id].version == version for id in world.alive)
