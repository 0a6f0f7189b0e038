"""What the log says of alerts reaches every sink; a dead one holds up nobody, and a new leader does not ring again."""

from __future__ import annotations

import asyncio
import importlib
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from turnout.core.alert import AcknowledgeAlert, RaiseAlert, ResolveAlert
from turnout.core.config import ModelSwitchingConfig
from turnout.core.handling import Defaults
from turnout.core.sagas.owed import Owed, Write
from turnout.events.memory import MemoryStore
from turnout.events.store import StoreFull
from turnout.projections.alerts import AlertView
from turnout.workers.clock import SystemClock
from turnout.workers.controller import alerts as module
from turnout.workers.controller import sinks
from turnout.workers.controller.alerts import AlertSystem, gauges
from turnout.workers.controller.commands import Commands
from turnout.workers.controller.log import Log
from turnout.workers.controller.settings import AlertSettings
from turnout.workers.controller.sinks import AlertmanagerSink, Refused, SinkUnusable, Undelivered, WebhookSink

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

NOW = datetime(2026, 1, 1, tzinfo=UTC)
VIEW = AlertView(
    alert="error_rate.chat.v1",
    id="alert.error_rate.chat.v1.1.raised:0",
    severity="critical",
    kind="error_rate",
    summary="chat v1: 9 of 20 requests failed",
    hint="look",
    model="chat",
    version="v1",
    raised_at=NOW,
    times=1,
)


class HandClock(SystemClock):
    """Seconds that a test sets, for both clocks."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    def jitter(self) -> float:
        return 0.0


class Ear:
    """A sink that notes what it hears; each entry of ``script`` is for one try."""

    def __init__(self, name: str = "ear", *script: Exception | None, again_s: float | None = None) -> None:
        self.name = name
        self.script = list(script)
        self.heard: list[str] = []
        self.ids: list[str] = []
        self.tries = 0
        self._again_s = again_s

    def again_s(self, view: AlertView) -> float | None:
        return self._again_s

    async def deliver(self, view: AlertView, now: datetime) -> None:
        self.tries += 1
        if self.script and (wrong := self.script.pop(0)) is not None:
            raise wrong
        self.heard.append(f"{view.state} {view.alert}")
        self.ids.append(view.id)


class Deaf(Ear):
    """Never answers."""

    async def deliver(self, view: AlertView, now: datetime) -> None:
        self.tries += 1
        await asyncio.Event().wait()


class Scene:
    """A controller's log and its alert system; leads when told to."""

    def __init__(self, *ears: Ear) -> None:
        self.clock = HandClock()
        self.store = MemoryStore()
        self.log = Log(self.store, lambda error: None)
        self.commands = Commands(self.log, self.clock, ModelSwitchingConfig(), Defaults())
        self.system = AlertSystem(self.log, self.commands, self.clock, ears)
        self.task: asyncio.Task[None] | None = None
        self._count = 0

    async def lead(self, epoch: int = 1) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.task = asyncio.create_task(self.system.run(epoch))
        await self.rest()

    async def stop(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def rest(self) -> None:
        """Let everything happen that needs no time."""
        assert self.task is None or not self.task.done(), self.task
        for _ in range(100):
            await asyncio.sleep(0)

    async def does(self, key: str, command: object) -> None:
        """One command takes effect."""
        self._count += 1
        assert await self.commands.carry_out(Owed(f"c{self._count}", (Write("alert", key, command),), key), 1)
        await self.rest()

    async def raises(self, key: str, kind: str = "gateway_lost") -> None:
        await self.does(key, RaiseAlert(key, "warning", kind, f"{key} is silent", "look"))

    async def resolves(self, key: str) -> None:
        await self.does(key, ResolveAlert(key, "it is back"))


def play(scene: Callable[[Scene], Awaitable[None]], monkeypatch: pytest.MonkeyPatch, *ears: Ear) -> Scene:
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    made: list[Scene] = []

    async def run() -> None:
        one = Scene(*ears)
        made.append(one)
        await one.log.follow()
        await scene(one)
        if one.task is not None:
            await one.stop()

    asyncio.run(run())
    return made[0]


# --- deliveries --------------------------------------------------------------------------------------------------


def test_every_sink_hears_what_the_log_says_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Ear(), Ear()

    async def scene(turnout: Scene) -> None:
        await turnout.lead()
        await turnout.raises("a")
        await turnout.raises("b")
        await turnout.resolves("a")

    play(scene, monkeypatch, one, other)
    assert one.heard == other.heard == ["raised a", "raised b", "resolved a"]
    assert one.ids[0] == one.ids[2] != one.ids[1], "an alert keeps its id until it is over"


def test_a_sink_that_never_answers_holds_up_neither_the_others_nor_the_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deaf, ear = Deaf(), Ear()

    async def scene(turnout: Scene) -> None:
        await turnout.lead()
        for number in range(8):
            await turnout.raises(f"a{number}")

    play(scene, monkeypatch, deaf, ear)
    assert deaf.tries == 1
    assert len(ear.heard) == 8


def test_what_waits_for_a_dead_sink_is_bounded_and_what_is_dropped_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING_MOST", 4)
    deaf = Deaf()
    lost: list[float] = []

    async def scene(turnout: Scene) -> None:
        await turnout.lead()
        for number in range(8):
            await turnout.raises(f"a{number}")
        lost.extend(g.value for g in turnout.system.gauges() if g.name == "turnout_alert_deliveries_lost")

    play(scene, monkeypatch, deaf)
    assert lost == [3.0], "four wait, and one is under way"


def test_a_delivery_that_fails_is_tried_until_it_arrives_and_the_order_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Ear("ear", Undelivered("no"), TimeoutError(), Undelivered("it answered 503"))

    async def scene(turnout: Scene) -> None:
        await turnout.lead()
        await turnout.raises("a")
        await turnout.resolves("a")

    play(scene, monkeypatch, ear)
    assert (ear.heard, ear.tries) == (["raised a", "resolved a"], 5)


def test_what_a_sink_refuses_is_not_tried_again_and_does_not_block_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (Refused("it answered 404"), ValueError("a fault of the sink")):
        ear = Ear("ear", wrong)

        async def scene(turnout: Scene) -> None:
            await turnout.lead()
            await turnout.raises("a")
            await turnout.raises("b")

        play(scene, monkeypatch, ear)
        assert (ear.heard, ear.tries) == (["raised b"], 2)


# --- leaders -----------------------------------------------------------------------------------------------------


def test_only_a_leader_delivers(monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Ear()

    async def scene(turnout: Scene) -> None:
        await turnout.raises("a")

    play(scene, monkeypatch, ear)
    assert ear.heard == []


def test_a_new_leader_tells_the_last_minute_again_and_older_ones_only_while_they_need_a_person(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ear = Ear()

    async def scene(turnout: Scene) -> None:
        await turnout.raises("ancient")
        turnout.clock.seconds += module.OLD_S
        for key in ("over", "seen", "stands"):
            await turnout.raises(key, "error_rate")
        await turnout.resolves("over")
        turnout.clock.seconds += module.AGAIN_S + 1
        await turnout.raises("new")
        await turnout.resolves("new")
        await turnout.does("seen", AcknowledgeAlert("seen", "", "alice"))
        await turnout.lead()

    play(scene, monkeypatch, ear)
    assert ear.heard == ["raised stands", "raised new", "resolved new"]


def test_a_leader_that_comes_back_begins_with_an_empty_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Ear("ear", *[Undelivered("no")] * 10_000)

    async def scene(turnout: Scene) -> None:
        await turnout.lead()
        await turnout.raises("a")
        await turnout.raises("b")
        await turnout.stop()
        ear.script.clear()
        turnout.clock.seconds += module.OLD_S
        await turnout.lead(2)
        await turnout.raises("c")

    play(scene, monkeypatch, ear)
    assert ear.heard == ["raised c"]


def test_reminders_do_not_pile_up_for_a_dead_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.0)
    deaf = Deaf("deaf", again_s=60.0)
    waiting: list[float] = []

    async def scene(turnout: Scene) -> None:
        await turnout.lead()
        for key in ("a", "b"):
            await turnout.raises(key)
        for _ in range(9):
            turnout.clock.seconds += 60.0
            await turnout.rest()
        waiting.extend(g.value for g in turnout.system.gauges() if g.name == "turnout_alert_deliveries_waiting")

    play(scene, monkeypatch, deaf)
    assert waiting == [1.0], "b waits once, a is under way"


def test_a_sink_is_told_again_of_what_stands_as_often_as_it_wants_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.0)
    often, never = Ear("often", again_s=60.0), Ear("never")

    async def scene(turnout: Scene) -> None:
        await turnout.lead()
        await turnout.raises("a")
        for seconds in (59.0, 1.0, 59.0):
            turnout.clock.seconds += seconds
            await turnout.rest()
        await turnout.resolves("a")
        turnout.clock.seconds += 1000.0
        await turnout.rest()

    play(scene, monkeypatch, often, never)
    assert often.heard == ["raised a", "raised a", "resolved a"]
    assert never.heard == ["raised a", "resolved a"]


# --- alerts that no saga raises ----------------------------------------------------------------------------------


def test_a_triggered_alert_is_in_the_log_before_the_sinks_hear_of_it_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Ear()
    trouble = RaiseAlert("x", "critical", "clock_jumped", "the clock jumped", "look at it")
    answers: list[bool] = []

    async def scene(turnout: Scene) -> None:
        answers.append(await turnout.system.trigger_alert(trouble))
        await turnout.lead()
        for _ in range(2):
            answers.append(await turnout.system.trigger_alert(trouble))
            await turnout.rest()

    made = play(scene, monkeypatch, ear)
    assert answers == [False, True, False]
    assert ear.heard == ["raised x"]
    assert ear.ids == [made.store.log[0].envelope.id]


def test_an_alert_that_the_log_has_no_room_for_is_told_all_the_same_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Ear()
    trouble = RaiseAlert("x", "critical", "store_full", "no room", "make some")

    async def scene(turnout: Scene) -> None:
        async def full(*_: object) -> Any:
            raise StoreFull("no room")

        await turnout.lead()
        monkeypatch.setattr(turnout.store, "append", full)
        for _ in range(2):
            await turnout.system.trigger_alert(trouble)
            await turnout.rest()

    play(scene, monkeypatch, ear)
    assert ear.heard == ["raised x"]


def test_the_gauges_count_what_stands_by_kind_severity_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(turnout: Scene) -> None:
        for key in ("a", "b", "c"):
            await turnout.raises(key, "error_rate")
        await turnout.does("a", AcknowledgeAlert("a"))
        await turnout.resolves("b")

    made = play(scene, monkeypatch)
    unseen, standing = gauges(made.log.world)
    assert (unseen.name, unseen.value) == ("turnout_alerts_unacknowledged", 1)
    assert (standing.value, standing.labels) == (2, {"kind": "error_rate", "severity": "warning", "model": ""})


# --- sinks -------------------------------------------------------------------------------------------------------


class Wire:
    """Stands for the network: notes what was sent, and answers."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.to: tuple[object, ...] = ()
        self.sent = b""
        self.closed = False
        self.transport = self

    def write(self, data: bytes) -> None:
        self.sent += data

    def abort(self) -> None:
        self.closed = True

    async def open(self, host: str, port: int, *, ssl: object) -> tuple[asyncio.StreamReader, Wire]:
        self.to = (host, port, ssl)
        reader = asyncio.StreamReader()
        reader.feed_data(self.answer)
        reader.feed_eof()
        return reader, self


def posted(sink: Any, answer: bytes, monkeypatch: pytest.MonkeyPatch, view: AlertView = VIEW) -> Wire:
    wire = Wire(answer)
    monkeypatch.setattr(asyncio, "open_connection", wire.open)
    try:
        asyncio.run(sink.deliver(view, NOW))
    finally:
        assert wire.closed
    return wire


OK = b"HTTP/1.1 200 OK\r\n\r\n"


def test_a_webhook_gets_the_alert_as_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = posted(WebhookSink("http://127.0.0.1:9/hook?token=s3cret", 1), OK, monkeypatch)
    head, _, body = wire.sent.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /hook?token=s3cret HTTP/1.1\r\nhost: 127.0.0.1:9\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert msgspec.json.decode(body, type=AlertView) == VIEW


def test_https_and_a_password_in_the_address_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = posted(WebhookSink("https://bob:p%40ss@[::1]/hook", 1), OK, monkeypatch)
    assert wire.to == ("::1", 443, True)
    assert b"host: [::1]:443\r\n" in wire.sent
    assert b"authorization: Basic Ym9iOnBAc3M=\r\n" in wire.sent


def test_an_answer_says_whether_another_try_may_help(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, wrong in (
        (b"HTTP/1.1 503 x\r\n", Undelivered),
        (b"HTTP/1.1 429 x\r\n", Undelivered),
        (b"SSH-2.0\r\n", Undelivered),
        (b"HTTP/1.1 what\r\n", Undelivered),
        (b"", Undelivered),
        (b"HTTP/1.1 404 x\r\n", Refused),
        (b"HTTP/1.1 301 x\r\n", Refused),
    ):
        with pytest.raises(wrong):
            posted(WebhookSink("http://127.0.0.1:9/", 1), answer, monkeypatch)


def test_nobody_listening_is_no_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(asyncio, "open_connection", refused)
    with pytest.raises(Undelivered):
        asyncio.run(WebhookSink("http://127.0.0.1:9/", 1).deliver(VIEW, NOW))


def test_an_alertmanager_gets_the_same_labels_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def alert(view: AlertView) -> dict[str, Any]:
        wire = posted(AlertmanagerSink("http://127.0.0.1:9/am/", 1), OK, monkeypatch, view)
        head, _, body = wire.sent.partition(b"\r\n\r\n")
        assert head.startswith(b"POST /am/api/v2/alerts HTTP/1.1\r\n")
        (one,) = cast("list[dict[str, Any]]", json.loads(body))
        return one

    over = msgspec.structs.replace(VIEW, state="resolved", resolved_at=NOW + timedelta(seconds=9), reason="calm")
    raised, resolved = alert(VIEW), alert(over)
    assert raised["labels"] == resolved["labels"] == {
        "alertname": "TurnoutErrorRate",
        "alert": "error_rate.chat.v1",
        "severity": "critical",
        "model": "chat",
        "version": "v1",
        "source": "turnout",
    }  # fmt: skip
    assert raised["annotations"]["summary"] == VIEW.summary
    assert datetime.fromisoformat(raised["startsAt"]) == NOW
    assert datetime.fromisoformat(raised["endsAt"]) == NOW + timedelta(seconds=sinks.LAPSE_S)
    assert datetime.fromisoformat(resolved["endsAt"]) == NOW + timedelta(seconds=9)
    assert sinks.LAPSE_S > 2 * sinks.REFRESH_S


def test_people_are_reminded_until_somebody_has_seen_it_and_alertmanagers_always() -> None:
    seen = msgspec.structs.replace(VIEW, state="acknowledged")
    webhook, manager = WebhookSink("http://h/", 1), AlertmanagerSink("http://h/", 1)
    assert webhook.again_s(VIEW) == sinks.REMIND_S
    assert webhook.again_s(seen) is None
    assert manager.again_s(seen) == sinks.REFRESH_S


class Library:
    """Stands for the module apprise."""

    def __init__(self, sent: bool) -> None:
        self._sent = sent
        self.messages: list[dict[str, Any]] = []

    def Apprise(self) -> Library:  # noqa: N802  the library's name
        return self

    def add(self, url: str) -> bool:
        return url.startswith("known://")

    def notify(self, **message: Any) -> bool:
        self.messages.append(message)
        return self._sent


def notified(library: Library | None, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Library:
        if library is None:
            raise ModuleNotFoundError(name)
        return library

    monkeypatch.setattr(importlib, "import_module", load)
    (_, sink) = sinks.make(AlertSettings(notify=(url,)))
    asyncio.run(sink.deliver(VIEW, NOW))


def test_a_message_to_people_says_what_is_wrong_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(sent=True)
    notified(library, "known://token", monkeypatch)
    (message,) = library.messages
    assert message["title"] == "turnout: critical: error_rate.chat.v1"
    assert "9 of 20 requests failed\nto do: look\n" in message["body"]
    assert message["notify_type"] == "failure"
    with pytest.raises(Undelivered):
        notified(Library(sent=False), "known://token", monkeypatch)


def test_a_service_that_can_not_be_told_is_said_at_the_start_without_its_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SinkUnusable, match=r"pip install 'turnout\[alerts\]'"):
        notified(None, "known://token", monkeypatch)
    with pytest.raises(SinkUnusable, match="no address of Apprise") as refused:
        notified(Library(sent=True), "bogus://s3cret", monkeypatch)
    assert "s3cret" not in str(refused.value)


def test_no_name_of_a_sink_tells_a_secret() -> None:
    urls = AlertSettings(webhook=("https://u:s3cret@h:8443/s3cret?k=s3cret",), alertmanager=("http://s3cret:x@am",))
    assert [sink.name for sink in sinks.make(urls)] == ["log", "webhook 1 https://h:8443", "alertmanager 1 http://am"]


def test_addresses_that_can_not_be_meant_are_refused_with_key_and_number() -> None:
    good = AlertSettings(
        webhook=("http://127.0.0.1:9/x", "https://h"), alertmanager=("http://am:9093",), notify=("slack://a/b/c",)
    )
    assert good.problems() == ()
    for settings, said in (
        (AlertSettings(webhook=("http://h", "ftp://s3cret")), "webhook number 2 is not http"),
        (AlertSettings(webhook=("http://",)), "webhook number 1 has no host"),
        (AlertSettings(webhook=("http://h:99999",)), "webhook number 1 is no address"),
        (AlertSettings(webhook=("http://h/a\r\nx: y",)), "webhook number 1 has blanks"),
        (AlertSettings(alertmanager=("am:9093",)), "alertmanager number 1 is not http"),
        (AlertSettings(notify=("slack",)), "notify number 1 is no address"),
        (AlertSettings(webhook=("http://h", "http://h")), "webhook names one address twice"),
    ):
        (problem,) = settings.problems()
        assert problem.startswith(said)
        assert "s3cret" not in problem
