"""GradualRollout: more traffic as time passes, back at evidence of harm."""

from __future__ import annotations

from turnout.core.strategies.levels import Levels
from turnout.core.strategies.parameters import Level, Parameters, read

_DEFAULT = (Level(10.0, 60.0), Level(25.0, 60.0), Level(50.0, 60.0))


class GradualRollout(Levels):
    """Goes on when a level's pause is over, without waiting for evidence unless the level has an analysis.

    Too little evidence does not stop it; harm rolls it back, and evidence that can't be compared or read holds it.
    """

    name = "gradual"

    def read(self, parameters: dict[str, object]) -> Parameters | tuple[str, ...]:
        """Steps, shadow and judge."""
        return read(self.name, parameters, _DEFAULT)
