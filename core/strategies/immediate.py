"""ImmediateSwitch: all traffic in one step."""

from __future__ import annotations

from turnout.core.strategies.base import Action, Evidence, Finish, Operation, SetWeight


class ImmediateSwitch:
    """One step to 100 percent as soon as the target is proven. Takes no parameters."""

    name = "immediate"

    def problems(self, parameters: dict[str, object]) -> tuple[str, ...]:
        """It has no parameters, so every one is a mistake."""
        return tuple(f"immediate takes no parameter {name!r}" for name in parameters)

    def execute_switch(self, operation: Operation, evidence: Evidence) -> Action:
        """100 percent, then done."""
        if operation.weight < 100:
            return SetWeight(100.0, "all at once")
        return Finish("all traffic is on the target")
