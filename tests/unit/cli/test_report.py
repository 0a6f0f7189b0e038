"""The report of a switch: the same facts as text, JSON and a page that needs nothing but itself."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

from tests.unit.cli.tale import FIGURES, T0, canary_held, canary_rolled_back

from turnout.events.health import HealthSampled
from turnout.events.switch import SwitchAborted
from turnout.workers.cli.page import page
from turnout.workers.story import Report, Story

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    from turnout.events.health import HealthEvent
    from turnout.events.memory import MemoryStore

    Turnout = Callable[..., Result]

_VOID = {"meta"}


class Checked(HTMLParser):
    """Knows which elements are open, and what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def told(store: MemoryStore) -> Report:
    story = Story("sw-1")
    for recorded in store.log:
        story.take(recorded)
    assert story.report is not None
    return story.report


def test_the_report_has_every_step_and_verdict_and_who_did_what(store: MemoryStore) -> None:
    canary_rolled_back(store)
    report = told(store)
    assert (report.outcome, report.serves, report.actor, report.reason) == (
        "rolled_back",
        "v1",
        "ops:alice",
        "new weights",
    )
    assert [(step.weight, step.applied_s, step.gateways) for step in report.steps] == [
        (5.0, 0.02, ("g1",)),
        (50.0, 0.03, ("g1",)),
    ]
    assert [round(step.lasted_s or 0, 2) for step in report.steps] == [9.02, 8.03]
    assert [verdict.decision for verdict in report.verdicts] == ["fail"]
    assert [figure.name for figure in report.effect] == ["errors", "first_byte"]
    assert report.sample_ratio == FIGURES[2]
    assert [share.weight for share in report.shares] == [0, 5, 50, 0]
    assert [(m.actor, m.type) for m in report.moments if m.person] == [
        ("ops:alice", "SwitchRequested"),
        ("ops:bob", "SwitchPromoted"),
    ]


def test_the_text_says_what_was_decided_and_on_what(turnout: Turnout, store: MemoryStore) -> None:
    canary_rolled_back(store)
    result = turnout("report", "sw-1")
    assert result.exit_code == 0
    text = result.stdout
    assert "rolled back after 18 s: v2 failed 7 of 9 requests while v1 failed 1 of 412; chat serves v1" in text
    assert "effect on errors: v2 has 14 to 2,100 times what v1 has (78 % to 0.24 %)" in text
    assert "sample ratio: the split was kept" in text
    assert re.search(r"errors +0\.24 % +78 % +14 to 2,100 +█+ +4,210 of 200", text)
    assert "* chat → v2: bob promoted it past step 1: looks fine" in text
    said: dict[str, Any] = json.loads(turnout("report", "chat", "--json").stdout)
    assert said["verdicts"][0]["figures"][0]["e"] == 4210.0


def test_a_switch_that_runs_is_reported_as_far_as_it_is(turnout: Turnout, store: MemoryStore) -> None:
    canary_held(store)
    report = told(store)
    assert (report.outcome, report.ended_at, report.serves) == ("running", None, "")
    assert report.steps[0].lasted_s is None
    assert "no verdict was reached yet" in turnout("report", "chat").stdout


def test_an_abort_is_reported_with_its_reason(store: MemoryStore) -> None:
    canary_held(store).switch(SwitchAborted("sw-1", "aborted by carol"), actor="ops:carol")
    report = told(store)
    assert (report.outcome, report.ended_because, report.serves) == ("aborted", "aborted by carol", "v1")


def test_the_page_is_whole_and_loads_nothing(turnout: Turnout, store: MemoryStore, tmp_path: Path) -> None:
    canary_rolled_back(store)
    file = tmp_path / "report.html"
    assert turnout("report", "chat", "--html", str(file)).stdout == f"wrote {file}\n"
    checked = Checked()
    checked.feed(file.read_text())
    assert checked.open == []
    assert checked.loads == []
    assert "script" not in checked.seen
    assert checked.seen.count("svg") == 4  # the share, errors and first byte of both versions, the e-values
    assert "url(" not in file.read_text()
    assert "prefers-color-scheme: dark" in file.read_text()


def test_a_page_that_can_not_be_written_is_one_clear_message(turnout: Turnout, store: MemoryStore) -> None:
    canary_rolled_back(store)
    result = turnout("report", "chat", "--html", "/nowhere/at/all.html", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["code"] == "file_not_written"


def test_nothing_from_outside_gets_onto_the_page_as_markup() -> None:
    evil = "<script>alert(1)</script>"
    made = page(Report("sw-1", evil, evil, evil, evil, evil, {evil: evil}, reason=evil, ended_because=evil), T0)
    assert "<script" not in made
    assert "&lt;script&gt;" in made


def test_a_report_of_nothing_yet_is_a_page_too() -> None:
    checked = Checked()
    checked.feed(page(Report("sw-1"), T0))
    assert checked.open == []


def sampled(version: str, at_s: float, requests: int, failed: int) -> HealthSampled:
    """A window so long after the switch was asked for."""
    at = T0 + timedelta(seconds=at_s)
    return HealthSampled(
        gateway="g1",
        model="chat",
        version=version,
        window=1,
        revision=1,
        share=1.0,
        started=at,
        ended=at,
        requests=requests,
        outcomes={"ok": requests - failed, "http_error": failed},
        first_ms={"stream/1k": {40: requests}},
        total_ms={60: requests},
    )


def test_the_report_says_what_clients_noticed_before_during_and_after(
    store: MemoryStore, turnout: Turnout, samples: list[HealthEvent], tmp_path: Path
) -> None:
    canary_rolled_back(store)
    samples += [sampled("v1", -30, 200, 0), sampled("v1", 5, 90, 0), sampled("v2", 6, 10, 4), sampled("v1", 60, 50, 1)]
    impact = json.loads(turnout("report", "chat", "--json").stdout)["impact"]
    assert [impact[when]["requests"] for when in ("before", "during", "after")] == [200, 100, 50]
    assert impact["during"]["errors"] == 4
    assert impact["during"]["low"] < 0.04 < impact["during"]["high"]
    assert impact["during"]["p95_limits_ms"] is not None
    text = turnout("report", "chat").stdout
    assert re.search(r"during +100 +4\.0 % \(1\.6 % to 9\.8 %\)", text)
    made = tmp_path / "report.html"
    turnout("report", "chat", "--html", str(made))
    html = made.read_text()
    assert "What clients noticed" in html
    assert html.count('<circle class="all"') == 9, "three periods in three plots"
    Checked().feed(html)


def test_without_samples_the_report_leaves_out_what_clients_noticed(store: MemoryStore, turnout: Turnout) -> None:
    canary_rolled_back(store)
    assert "what clients" not in turnout("report", "chat").stdout
