"""What a worker publishes of the golden questions that its health checks ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turnout.events.health import HealthEvent, ProbeFailed, ProbePassed

if TYPE_CHECKING:
    import asyncio


class Writer:
    """A HealthWriter that keeps what it gets."""

    dropped = 0

    def __init__(self) -> None:
        self.events: list[HealthEvent] = []

    async def publish(self, event: HealthEvent) -> None:
        self.events.append(event)


def test_failures_are_all_told_and_of_good_answers_the_first_after_one_and_every_tenth(
    rig: Any, runner: asyncio.Runner, until: Any
) -> None:
    async def test() -> None:
        writer = rig.worker._health = Writer()  # pyright: ignore[reportPrivateUsage]
        async with rig:
            rig.plane.request()
            rig.host.loaded()
            await until(lambda: rig.plane.phase() == "ready")
            rows = [0] * 11 + [1, 2] + [0] * 8
            for number, row in enumerate(rows, 1):
                await rig.worker.probed("i-1", number, row, 0.1, "empty" if row else "")
            await rig.worker.probed("i-9", 1, 1, 0.1, "of an instance that is gone")
        told = [(type(e), e.number) for e in writer.events if isinstance(e, ProbePassed | ProbeFailed)]
        assert told == [(ProbePassed, 10), (ProbeFailed, 12), (ProbeFailed, 13), (ProbePassed, 14), (ProbePassed, 20)]
        failed = writer.events[2]
        assert isinstance(failed, ProbeFailed)
        assert (failed.model, failed.version, failed.row, failed.reason) == ("chat", "v1", 2, "empty")

    runner.run(test())
