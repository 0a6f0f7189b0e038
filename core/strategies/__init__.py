"""How a switch gives traffic to its target, one strategy a file. Pure: no clock, no I/O."""

from turnout.core.strategies.base import SwitchingStrategy
from turnout.core.strategies.immediate import ImmediateSwitch

#: Every strategy by the name that operators give.
STRATEGIES: dict[str, SwitchingStrategy] = {"immediate": ImmediateSwitch()}

__all__ = ["STRATEGIES", "ImmediateSwitch", "SwitchingStrategy"]
