"""CanarySwitch: more traffic only on evidence that the target is not worse."""

from __future__ import annotations

from turnout.core.strategies.levels import Levels
from turnout.core.strategies.parameters import Level, Parameters, read

_DEFAULT = (Level(5.0), Level(25.0), Level(50.0))


class CanarySwitch(Levels):
    """Leaves each level below 100 percent on a pass; at the level's deadline it does what ``onInconclusive`` says.

    No data is never a pass. A level that is to go by time alone belongs into a gradual rollout.
    """

    name = "canary"

    def read(self, parameters: dict[str, object]) -> Parameters | tuple[str, ...]:
        """Steps, shadow and judge; an analysis in each level, written or not."""
        return read(self.name, parameters, _DEFAULT, judged=True)
