"""``turnout verify`` on a log that has lost its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.unit.cli.conftest import LocalPlane, Turnout
from tests.unit.cli.test_commands import one_json

from turnout.workers.cli import audit

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded


@pytest.mark.parametrize(("left", "where"), [(1, "ends at event 1"), (0, "is empty")])
def test_verify_finds_that_the_last_events_are_gone(
    turnout: Turnout, monkeypatch: pytest.MonkeyPatch, left: int, where: str
) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    whole = LocalPlane.log_page

    async def cut(plane: LocalPlane, after: int) -> tuple[tuple[Recorded, ...], int]:
        return (await whole(plane, after))[0][: max(0, left - after)], 0

    # when the views know more than the log has
    monkeypatch.setattr(LocalPlane, "log_page", cut)
    monkeypatch.setattr(audit, "_LOOK_AGAIN_S", ())
    result = turnout("verify")
    # then no word says that it is whole, and it says what to do
    assert result.exit_code == 1
    assert f"the last {2 - left} events are gone: the log {where}, the views know event 2" in result.stderr
    assert "put the event store back" in result.stderr
    assert "whole" not in result.stdout
    said = one_json(turnout("verify", "--json"))
    assert (said["status"], said["ends_at"], said["missing"], said["views_at"]) == ("broken", left, 2 - left, 2)


def test_verify_looks_again_where_a_replica_lags(turnout: Turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    turnout("register", "chat", "v1", "--engine", "fake")
    whole, behind = LocalPlane.log_page, [1, 1]

    async def lagging(plane: LocalPlane, after: int) -> tuple[tuple[Recorded, ...], int]:
        return (await whole(plane, after))[0][: behind.pop() if behind else None], 0

    monkeypatch.setattr(LocalPlane, "log_page", lagging)
    monkeypatch.setattr(audit, "_LOOK_AGAIN_S", (0.0, 0.0, 0.0))
    assert turnout("verify").exit_code == 0
