"""The live view, drawn from fixed data without a terminal; and what is told to come next."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec
import pytest
from rich.console import Console
from tests.unit.cli.tale import FIGURES, T0, canary_at_step_1, canary_held, canary_rolled_back

from turnout.core.health import HealthStatus, Numbers, VersionHealth
from turnout.core.judging.judgement import Decision, Judgement
from turnout.core.switch import SwitchState
from turnout.core.switch import evolve as evolve_switch
from turnout.core.switch import initial as no_switch
from turnout.events.switch import SwitchEvent
from turnout.projections.views import Views
from turnout.workers.cli.pictures import Outlook, Picture, outlook, picture
from turnout.workers.cli.watch import Seen, screen
from turnout.workers.cli.words import bar, e_text, evidence_share, share_text
from turnout.workers.client import Following
from turnout.workers.controller.health import HealthReport
from turnout.workers.ports import ViewEntry

if TYPE_CHECKING:
    from turnout.events.memory import MemoryStore

HOLD = Judgement(
    Decision.HOLD,
    step=1,
    source_requests=412,
    target_requests=31,
    target_users=12,
    missing="31 of 50 requests, 12 of 20 users",
    figures=FIGURES,
)


def seen(store: MemoryStore) -> Picture:
    views = Views()
    for recorded in store.log:
        views.apply(recorded)
    following = Following()
    following.take({key: ViewEntry(key, value, 1) for key, value in views.everything().items()}, 1)
    made = picture("chat", following.views)
    assert made is not None
    return made


def state(store: MemoryStore) -> SwitchState:
    made = no_switch
    for recorded in store.log:
        if isinstance(recorded.event, SwitchEvent):
            made = evolve_switch(made, recorded.event)
    return made


def drawn(what: Seen, width: int = 120) -> list[str]:
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(screen(what, T0 + timedelta(seconds=30), width))
    return captured.get().splitlines()


def test_the_live_view_shows_weights_evidence_and_what_comes_next(store: MemoryStore) -> None:
    canary_at_step_1(store)
    health = HealthReport(
        "chat",
        T0,
        (
            VersionHealth("v1", HealthStatus.HEALTHY, (), Numbers(412, 1, 0.0024, p95_ms=240.0), 1, "passed", 12),
            VersionHealth("v2", HealthStatus.DEGRADED, (), Numbers(31, 1, 0.032, p95_ms=260.0), 1, "failing"),
        ),
    )
    coming = Outlook(HOLD.missing, T0 + timedelta(seconds=48))
    lines = drawn(Seen(msgspec.structs.replace(seen(store), evidence=HOLD, outlook=coming), health))
    text = "\n".join(lines)
    v1, v2 = lines[1].split(), lines[2].split()
    assert v1[:8] == ["v1", "active", "█" * 19 + "░", "95", "%", "12", "in", "flight"]
    assert v2[:9] == ["v2", "target", "█" + "░" * 19, "5", "%", "0", "in", "flight", "degraded"]
    assert "31 requests, 3.2 % failed" in lines[2]
    assert "switch sw-1  v1 → v2 (canary)  cut over  step 1 of 3 (5 %)  since 30 s, by alice" in text
    assert "next  in 18 s at the latest: as soon as the evidence passes" in text
    assert "4,210 of 200" in text
    assert "missing for a pass: 31 of 50 requests, 12 of 20 users" in text
    assert "412 requests on v1, 31 on v2 by 12 users" in text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal_and_the_shares_are_never_cut(width: int, store: MemoryStore) -> None:
    canary_at_step_1(store)
    lines = drawn(Seen(msgspec.structs.replace(seen(store), evidence=HOLD)), width)
    assert max(map(len, lines)) <= width
    assert "95 %" in lines[1]


def test_the_last_verdict_stays_on_the_screen_until_the_next(store: MemoryStore) -> None:
    canary_rolled_back(store)
    text = "\n".join(drawn(Seen(seen(store))))
    assert "last switch  sw-1  rolled back" in text


def test_nobody_to_ask_is_said_and_the_rest_is_shown(store: MemoryStore) -> None:
    canary_at_step_1(store)
    text = "\n".join(drawn(Seen(seen(store), trouble="no controller answers")))
    assert "neither evidence nor health: no controller answers" in text
    assert "step 1 of 3" in text


def test_the_strategy_itself_says_what_comes_next(store: MemoryStore) -> None:
    # given a canary that waits for evidence only
    canary_at_step_1(store, {"steps": [{"setWeight": 5}], "stepDeadline": "10m", "judge": {"minRequests": 40}})
    applied_at = state(store).applied_at
    assert applied_at is not None
    # then it waits for evidence until its deadline, with what is missing
    now = T0 + timedelta(seconds=30)
    coming = outlook(state(store), None, now)
    assert coming is not None
    assert coming.at == applied_at + timedelta(minutes=10)
    assert "0 of 40 requests" in coming.what
    passed = msgspec.structs.replace(HOLD, decision=Decision.PASS, missing="", reason="no worse than v1")
    assert outlook(state(store), passed, now) == Outlook("goes to 100 %: no worse than v1")
    # and evidence of another step is none of this one
    other = msgspec.structs.replace(passed, step=7)
    assert outlook(state(store), other, now) == coming


def test_a_hold_has_no_end_in_time(store: MemoryStore) -> None:
    canary_held(store)
    assert outlook(state(store), None, T0) == Outlook("stands still until an operator promotes or aborts it")


def test_a_bar_shows_what_is_there_and_what_is_missing() -> None:
    assert bar(0, 4) == "░░░░"
    assert bar(0.001, 4) == "█░░░"
    assert bar(0.999, 4) == "███░"
    assert bar(1, 4) == "████"


def test_evidence_grows_on_its_bar_as_fast_as_it_comes_in() -> None:
    assert evidence_share(0.2, 200) == 0
    assert evidence_share(200**0.5, 200) == pytest.approx(0.5)
    assert evidence_share(1e9, 200) == 1
    assert [e_text(e) for e in (0.0123, 3.14, 42.0, 4210.0, 3.2e9)] == ["0.012", "3.1", "42", "4,210", "3e9"]
    assert [share_text(s) for s in (None, 0, 0.0024, 0.032, 0.5)] == ["-", "0 %", "0.24 %", "3.2 %", "50 %"]
