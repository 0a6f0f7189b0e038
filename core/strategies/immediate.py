"""ImmediateSwitch: all traffic in one step."""

from __future__ import annotations

from turnout.core.strategies.levels import Levels
from turnout.core.strategies.parameters import Parameters, read


class ImmediateSwitch(Levels):
    """One step to 100 percent as soon as the target is proven, after a shadow where one is asked for.

    There is nothing to compare with at full traffic: in the bake the judge goes by its ceilings.
    """

    name = "immediate"

    def read(self, parameters: dict[str, object]) -> Parameters | tuple[str, ...]:
        """Shadow and judge."""
        return read(self.name, parameters)
