"""The bucket stays equal to the fold, whatever happens to a commit."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec
import pytest

from turnout.events.codec import Context
from turnout.events.envelope import START
from turnout.events.memory import MemoryStore
from turnout.events.model import EngineSpec, ModelRegistered, VersionRegistered
from turnout.events.route import RouteChanged, Split
from turnout.events.store import Append, Conflict, Damaged, Unavailable
from turnout.workers.controller import projector as module
from turnout.workers.controller.log import Log
from turnout.workers.controller.projector import Herald, Projector
from turnout.workers.ports import Checkpoint, ViewEntry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping


class Bucket:
    """Views in a dict, with a script of what goes wrong: each entry is for one commit."""

    def __init__(self) -> None:
        self.views: dict[str, bytes] = {}
        self.stored: Checkpoint | None = None
        self.revision = 0
        self.script: list[str] = []
        self.commits: list[dict[str, bytes | None]] = []
        self.asked: Callable[[], Awaitable[None]] | None = None

    async def checkpoint(self) -> tuple[Checkpoint | None, int]:
        if self.script and self.script[0] == "no checkpoint":
            self.script.pop(0)
            raise Unavailable("no answer")
        return self.stored, self.revision

    async def commit(self, views: Mapping[str, bytes | None], checkpoint: Checkpoint, expected: int) -> int:
        step = self.script.pop(0) if self.script else ""
        if step == "not stored":
            raise Unavailable("no answer")
        if expected != self.revision:
            raise Conflict("somebody else")
        self.commits.append(dict(views))
        for key, value in views.items():
            if value is None:
                self.views.pop(key, None)
            else:
                self.views[key] = value
        self.revision += 1
        self.stored = checkpoint
        if step == "stored, but no answer":
            raise Unavailable("no answer")
        return self.revision

    async def snapshot(self, keys: tuple[str, ...]) -> tuple[dict[str, ViewEntry], Checkpoint | None]:
        del keys
        if self.asked is not None:
            asked, self.asked = self.asked, None
            await asked()
        return {key: ViewEntry(key, value, 1) for key, value in self.views.items()}, self.stored

    async def watch(self, *_: object) -> None:
        raise NotImplementedError


class Scene:
    """A log that grows, and a projector that follows it."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.bucket = Bucket()
        self.log = Log(self.store, lambda error: None)
        self.projector = Projector(self.log, self.bucket, self.bucket)  # type: ignore[arg-type]  # it never watches
        self.versions = 0

    async def grow(self, model: str = "chat") -> None:
        """One event more."""
        self.versions += 1
        subject = f"turnout.evt.model.{model}"
        held = await self.store.read(subject)
        event = (
            VersionRegistered(model, f"v{self.versions}", EngineSpec("fake"), "") if held else ModelRegistered(model)
        )
        context = Context(f"c{self.versions}", "test", "", "", datetime(2026, 1, 1, tzinfo=UTC))
        await self.store.append((Append(subject, held[-1].position if held else START, (event,)),), context)

    async def equal(self) -> None:
        """Wait until the bucket is what the fold is."""
        async with asyncio.timeout(5):
            while not (  # noqa: ASYNC110  each turn of the loop is a step
                self.bucket.views == self.log.views.everything()
                and self.bucket.stored is not None
                and self.bucket.stored.sequence == self.log.sequence
            ):
                await asyncio.sleep(0)


def play(scene: Callable[[Scene], Awaitable[None]], monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(module, "_RETRY_S", 0.0)
    made: list[Scene] = []

    async def run() -> None:
        one = Scene()
        made.append(one)
        await one.grow()
        await one.log.follow()
        task = asyncio.create_task(one.projector.run(1))
        await one.equal()
        await scene(one)
        await one.equal()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    return made[0]


def test_each_event_becomes_the_views_that_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(one: Scene) -> None:
        await one.grow("embed")
        await one.equal()
        assert set(one.bucket.commits[-1]) == {"model.embed", "route.embed"}

    play(scene, monkeypatch)


def test_no_commit_names_an_event_whose_views_it_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads its own write waits for the checkpoint: what the checkpoint covers must be there."""
    monkeypatch.setattr(module, "GATHER_S", 0.001)
    short: list[tuple[int, int]] = []

    async def scene(one: Scene) -> None:
        commit = one.bucket.commit

        async def checked(views: Mapping[str, bytes | None], checkpoint: Checkpoint, expected: int) -> int:
            revision = await commit(views, checkpoint, expected)
            known = len(msgspec.json.decode(one.bucket.views["model.chat"])["versions"])
            if known != checkpoint.sequence - 1:  # the first event made the model, each further one a version
                short.append((checkpoint.sequence, known))
            return revision

        def told_late() -> None:  # an event may be folded some turns before anybody hears of it
            asyncio.get_running_loop().call_later(0.002, tell)

        tell = getattr(one.log, "_tell")  # noqa: B009  what the log does of itself, only later
        monkeypatch.setattr(one.bucket, "commit", checked)
        monkeypatch.setattr(one.log, "_tell_soon", told_late)
        for n in range(60):
            await one.grow()
            await asyncio.sleep(0.0001 * (n % 17))
        tell()

    play(scene, monkeypatch)
    assert short == []


def test_a_commit_that_was_lost_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for script in (
        ["not stored"],
        ["stored, but no answer"],
        ["not stored", "not stored"],
        ["not stored", "no checkpoint"],
    ):

        async def scene(one: Scene, script: list[str] = script) -> None:
            one.bucket.script = list(script)
            await one.grow()
            await one.equal()
            await one.grow("embed")

        play(scene, monkeypatch)


def test_events_that_come_during_a_rebuild_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(one: Scene) -> None:
        async def meanwhile() -> None:
            await one.grow("embed")
            await asyncio.sleep(0)

        one.bucket.asked = meanwhile
        one.bucket.script = ["not stored"]
        await one.grow()

    play(scene, monkeypatch)


def test_views_that_another_projector_wrote_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(one: Scene) -> None:
        one.bucket.views["model.ghost"] = b"{}"
        one.bucket.revision += 7
        one.bucket.stored = Checkpoint(99, "another log", 1)
        await one.grow()

    one = play(scene, monkeypatch)
    assert "model.ghost" not in one.bucket.views


def test_a_projector_that_was_stopped_in_a_commit_makes_up_for_it_when_it_leads_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(one: Scene) -> None:
        forever = asyncio.Event()

        async def stuck(*_: object) -> int:
            await forever.wait()
            return 0

        other = Projector(one.log, one.bucket, one.bucket)  # type: ignore[arg-type]  # it never watches
        whole = one.bucket.commit
        one.bucket.commit = stuck  # type: ignore[assignment,method-assign]
        first = asyncio.create_task(other.run(1))
        await one.grow()
        for _ in range(20):
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        one.bucket.commit = whole  # type: ignore[method-assign]
        again = asyncio.create_task(other.run(2))
        await one.equal()
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)

    monkeypatch.setattr(module, "_RETRY_S", 0.0)

    async def run() -> None:
        one = Scene()
        await one.grow()
        await one.log.follow()
        await scene(one)

    asyncio.run(run())


def test_gateways_are_told_of_each_new_route_and_of_nothing_that_came_before() -> None:
    told: list[tuple[str, int]] = []

    class News:
        async def tell(self, model: str, view: bytes) -> None:
            told.append((model, msgspec.json.decode(view)["revision"]))

        async def listen(self, *_: object) -> None:
            raise NotImplementedError

    async def run() -> None:
        one = Scene()
        await one.grow("old")
        await one.log.follow()
        herald = asyncio.create_task(Herald(one.log, News()).run())  # type: ignore[arg-type]  # it never listens
        await asyncio.sleep(0)
        await one.grow("chat")
        split = Split("v1", 100.0, ())
        context = Context("r", "test", "", "", datetime(2026, 1, 1, tzinfo=UTC))
        changed = RouteChanged("chat", 1, (split,), "", 1.0, "")
        await one.store.append((Append("turnout.evt.route.chat", START, (changed,)),), context)
        async with asyncio.timeout(5):
            while ("chat", 1) not in told:  # noqa: ASYNC110  each turn of the loop is a step
                await asyncio.sleep(0)
        herald.cancel()
        await asyncio.gather(herald, return_exceptions=True)

    asyncio.run(run())
    assert [model for model, _ in told if model != "chat"] == []


def test_a_log_that_has_lost_its_end_is_not_projected() -> None:
    """Views of what is left would be true of it, and nobody could see the loss any more."""

    async def run() -> None:
        one = Scene()
        await one.grow()
        await one.log.follow()
        one.bucket.stored = Checkpoint(7, one.log.views.log, 1)
        one.bucket.views["model.chat"] = b"{}"
        with pytest.raises(Damaged, match="ends at event 1, but its views were made from 7"):
            await one.projector.run(1)
        assert one.bucket.commits == []

    asyncio.run(run())
