"""``ps``: what is loaded, how it came there, and how deep it sleeps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.unit.cli.tale import serving

from turnout.events.instance import InstanceSleepRequested, InstanceSlept
from turnout.events.model import Serving, ServingChanged

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from turnout.events.memory import MemoryStore


def test_ps_tells_the_tier_of_what_is_loaded_and_the_level_of_what_sleeps(
    turnout: Callable[..., Result], store: MemoryStore
) -> None:
    tale = serving(store)
    asked = InstanceSleepRequested("i-v2", 2, "makes room")
    tale.by("controller", "instance", "i-v2", asked).by("worker:w1", "instance", "i-v2", InstanceSlept("i-v2", 2, 1, 9))
    awake, asleep = json.loads(turnout("ps", "--json").stdout)["instances"]
    assert (awake["version"], awake["phase"], awake["tier"], awake["level"]) == ("v1", "ready", "cold", 0)
    assert (asleep["version"], asleep["phase"], asleep["tier"], asleep["level"]) == ("v2", "asleep", "cold", 2)
    assert (asleep["bytes"], asleep["kept"]) == (9, "while there is room")
    lines = turnout("ps").stdout.splitlines()
    assert "TIER" in lines[0]
    assert "cold" in lines[1]
    assert "asleep (level 2)" in lines[2]


def test_ps_tells_of_a_model_at_zero_that_it_is_woken_when_asked_for(
    turnout: Callable[..., Result], store: MemoryStore
) -> None:
    tale = serving(store)
    tale.by("ops:alice", "model", "chat", ServingChanged("chat", Serving(on_demand=True)))
    tale.by("controller", "instance", "i-v1", InstanceSleepRequested("i-v1", 1, "idle"), InstanceSlept("i-v1", 1, 1, 9))
    first, _ = json.loads(turnout("ps", "--json").stdout)["instances"]
    assert (first["version"], first["phase"], first["kept"]) == ("v1", "asleep", "woken when asked for")
