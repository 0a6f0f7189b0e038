"""ModelCache: loads take turns, switches before preloads; an engine that grows is news once."""

from __future__ import annotations

import asyncio

from turnout.workers.inference.cache import CachedModel, ModelCache
from turnout.workers.inference.runner import Usage

MIB = 1 << 20


class Loads:
    """Loads that end when the test says so."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.most = 0
        self.ends: dict[str, asyncio.Event] = {}

    async def load(self, name: str) -> str:
        self.running.append(name)
        self.most = max(self.most, len(self.running))
        try:
            await self.ends.setdefault(name, asyncio.Event()).wait()
        finally:
            self.running.remove(name)
        return name

    def end(self, name: str) -> None:
        self.ends.setdefault(name, asyncio.Event()).set()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_two_loads_never_run_at_once_on_one_device_and_the_highest_priority_goes_first(
    runner: asyncio.Runner,
) -> None:
    async def scenario() -> None:
        cache, loads = ModelCache(), Loads()
        order = (("first", 0), ("preload", -1), ("switch", 100), ("later", 0))
        tasks = [
            asyncio.create_task(cache.preload_model(lambda n=name: loads.load(n), device="cuda:0", priority=priority))  # type: ignore[misc]
            for name, priority in order
        ]
        other = asyncio.create_task(cache.preload_model(lambda: loads.load("other"), device="cuda:1"))
        await settled()
        assert sorted(loads.running) == ["first", "other"]
        seen: list[str] = []
        for name in ("first", "switch", "later", "preload"):
            assert name in loads.running
            seen.append(name)
            loads.end(name)
            await settled()
        loads.end("other")
        assert [await task for task in tasks] == ["first", "preload", "switch", "later"]
        assert await other == "other"
        assert loads.most == 2

    runner.run(scenario())


def test_a_load_that_is_called_off_while_it_waits_holds_nobody_up(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        cache, loads = ModelCache(), Loads()
        first, second, third = (
            asyncio.create_task(cache.preload_model(lambda n=name: loads.load(n)))  # type: ignore[misc]
            for name in ("a", "b", "c")
        )
        await settled()
        second.cancel()
        await settled()
        loads.end("a")
        await first
        await settled()
        assert loads.running == ["c"]
        third.cancel()
        await asyncio.gather(second, third, return_exceptions=True)
        loads.end("d")
        assert await cache.preload_model(lambda: loads.load("d")) == "d"

    runner.run(scenario())


def test_an_engine_that_has_grown_is_news_once() -> None:
    cache = ModelCache()
    cache.put_model(CachedModel("i1", "chat", "v1", Usage(100 * MIB)))
    assert not cache.news("i1", Usage(110 * MIB))
    assert cache.news("i1", Usage(150 * MIB))
    assert not cache.news("i1", Usage(150 * MIB))
    assert [one.instance for one in cache.get_model("chat", "v1")] == ["i1"]
    cache.evict_model("i1")
    assert cache.get_model("chat", "v1") == ()
    assert not cache.news("i1", Usage())
