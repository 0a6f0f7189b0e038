"""What a tier is: one way to make an instance ready. Knows no engine kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.workers.inference.runner import Failure, Loaded
    from turnout.workers.inference.starting import Planned


class Tier(Protocol):
    """One way."""

    @property
    def name(self) -> str:
        """As in the event ``InstanceReady``."""
        ...

    def unfit(self, planned: Planned) -> str:
        """Why it can't be tried for this order now; empty where it can."""
        ...

    def source(self, planned: Planned) -> str:
        """What it would start from, e.g. the version that an engine holds now. Failures are remembered for the pair."""
        ...

    async def load(self, planned: Planned, progress: Callable[[str, str], None]) -> Loaded | Failure:
        """Make the instance ready and prove it. What has failed is gone when this returns."""
        ...
