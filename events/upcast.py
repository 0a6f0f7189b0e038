"""Old event bodies → the current shape, on read only; what is stored is never edited.

To change an event: raise its number in CURRENT, add the step from the number before, record a history under
tests/histories. Steps are applied one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Body = dict[str, Any]

#: Current version of each event type that has had more than one.
CURRENT = {"InstanceReady": 2}


def _instance_ready_1(body: Body) -> Body:
    """Version 1 had one duration for loading and proof together."""
    body["load_s"] = body.pop("seconds")
    body["probe_s"] = 0.0
    return body


_STEPS: dict[tuple[str, int], Callable[[Body], Body]] = {("InstanceReady", 1): _instance_ready_1}


def upcast(name: str, version: int, body: Body) -> Body:
    """Bring a body of ``version`` to the current version of its type."""
    while version < CURRENT.get(name, 1):
        body = _STEPS[name, version](body)
        version += 1
    return body
