"""The shape of a fold: a table from event type to what it does. One look-up per event: a rebuild folds millions.

Knows no projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded

#: Event type → what the fold does with such an event; gets the event and the record around it.
Folds = Mapping[type, Callable[[Any, "Recorded"], None]]


class Fold:
    """Base of the projections. ``folds``: the table; events of other types are skipped.

    ``changed`` collects the ids whose views differ from what was stored.
    """

    kind = ""

    def __init__(self, folds: Folds) -> None:
        self.folds = folds
        self.changed: set[str] = set()

    def apply(self, recorded: Recorded) -> None:
        """Take one event; never raises."""
        event = recorded.event
        fold = self.folds.get(type(event))
        if fold is not None:
            fold(event, recorded)
