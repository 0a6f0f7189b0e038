"""How a switch gives traffic to its target, one strategy a file. Pure: no clock, no I/O."""

from turnout.core.strategies.ab import ABTestSwitch
from turnout.core.strategies.base import SwitchingStrategy
from turnout.core.strategies.canary import CanarySwitch
from turnout.core.strategies.gradual import GradualRollout
from turnout.core.strategies.immediate import ImmediateSwitch

#: Every strategy by the name that operators give.
STRATEGIES: dict[str, SwitchingStrategy] = {
    strategy.name: strategy for strategy in (ImmediateSwitch(), GradualRollout(), CanarySwitch(), ABTestSwitch())
}

__all__ = ["STRATEGIES", "ABTestSwitch", "CanarySwitch", "GradualRollout", "ImmediateSwitch", "SwitchingStrategy"]
