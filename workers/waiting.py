"""The client for programs without asyncio: twins of its classes whose methods wait. Public as ``turnout.sync``.

A connection has a thread of its own with an event loop, on which the client of workers/client.py runs; nothing of what
that does is written again here. Each twin's methods have the arguments of the method that they stand for.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from turnout.workers import client as waited

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator

    from turnout.events.envelope import Recorded
    from turnout.projections.switches import SwitchView
    from turnout.workers.registry import BaseRegistry

__all__ = [
    "Client",
    "DynamicModelRegistry",
    "HealthMonitor",
    "ModelSwitcher",
    "ModelVersionManager",
    "SwitchOperation",
    "connect",
]

A = TypeVar("A")
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="turnout client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Do it there, wait here. What interrupts the waiting ends the work."""
        done = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return done.result()
        except BaseException:
            done.cancel()
            raise

    def each(self, many: AsyncIterator[T]) -> Iterator[T]:
        """Its members one by one, each waited for."""
        end = object()
        try:
            while (one := self.run(_next(many, end))) is not end:
                yield one  # type: ignore[misc]  # the end is no member
        finally:
            self.run(_close(many))

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Twin(Generic[A]):
    """Stands for one object of the client: ``twin``, which lives on ``loop``."""

    def __init__(self, loop: _Loop, twin: A) -> None:
        self.loop = loop
        self.twin = twin


def _waits(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Any, P], R]:
    """The same method, waited for."""

    @functools.wraps(method)
    def wait(self: _Twin[Any], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.loop.run(method(self.twin, *args, **kwargs))

    return wait


def _starts(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, waited.SwitchOperation]],
) -> Callable[Concatenate[Any, P], SwitchOperation]:
    """The same method, waited for; its switch is a twin."""

    @functools.wraps(method)
    def start(self: _Twin[Any], /, *args: P.args, **kwargs: P.kwargs) -> SwitchOperation:
        return SwitchOperation(self.loop, self.loop.run(method(self.twin, *args, **kwargs)))

    return start


class Client(_Twin[waited.Client]):
    """As :class:`turnout.Client`."""

    models = _waits(waited.Client.models)
    model = _waits(waited.Client.model)
    switch = _waits(waited.Client.switch)
    find_switch = _waits(waited.Client.find_switch)
    views = _waits(waited.Client.views)

    def log(self, *, follow: bool = False) -> Iterator[Recorded]:
        """As :meth:`turnout.Client.log`."""
        return self.loop.each(self.twin.log(follow=follow))


class SwitchOperation(_Twin[waited.SwitchOperation]):
    """As :class:`turnout.SwitchOperation`."""

    status = _waits(waited.SwitchOperation.status)
    abort = _waits(waited.SwitchOperation.abort)
    promote = _waits(waited.SwitchOperation.promote)
    pause = _waits(waited.SwitchOperation.pause)
    resume = _waits(waited.SwitchOperation.resume)
    wait = _waits(waited.SwitchOperation.wait)

    @property
    def id(self) -> str:
        """The switch id."""
        return self.twin.id

    def progress(self) -> Iterator[SwitchView]:
        """The switch as it is, then after every change, to its end."""
        return self.loop.each(self.twin.progress())


class ModelSwitcher(_Twin[waited.ModelSwitcher]):
    """As :class:`turnout.ModelSwitcher`."""

    def __init__(self, client: Client) -> None:
        super().__init__(client.loop, waited.ModelSwitcher(client.twin))

    switch_model = _starts(waited.ModelSwitcher.switch_model)
    plan_switch = _waits(waited.ModelSwitcher.plan_switch)
    promote = _starts(waited.ModelSwitcher.promote)
    pause = _starts(waited.ModelSwitcher.pause)
    resume = _starts(waited.ModelSwitcher.resume)
    retry = _starts(waited.ModelSwitcher.retry)
    undo = _starts(waited.ModelSwitcher.undo)
    abort_switch = _starts(waited.ModelSwitcher.abort_switch)
    set_policy = _waits(waited.ModelSwitcher.set_policy)
    remove_policy = _waits(waited.ModelSwitcher.remove_policy)
    get_policies = _waits(waited.ModelSwitcher.get_policies)
    get_switch_status = _waits(waited.ModelSwitcher.get_switch_status)
    get_switch_report = _waits(waited.ModelSwitcher.get_switch_report)


class HealthMonitor(_Twin[waited.HealthMonitor]):
    """As :class:`turnout.HealthMonitor`."""

    def __init__(self, client: Client) -> None:
        super().__init__(client.loop, waited.HealthMonitor(client.twin))

    check_model_health = _waits(waited.HealthMonitor.check_model_health)
    check_version_health = _waits(waited.HealthMonitor.check_version_health)
    check_evidence = _waits(waited.HealthMonitor.check_evidence)
    monitor_switch_impact = _waits(waited.HealthMonitor.monitor_switch_impact)


class DynamicModelRegistry(_Twin[waited.DynamicModelRegistry]):
    """As :class:`turnout.DynamicModelRegistry`."""

    def __init__(self, base_registry: BaseRegistry, client: Client) -> None:
        super().__init__(client.loop, waited.DynamicModelRegistry(base_registry, client.twin))

    register_model = _waits(waited.DynamicModelRegistry.register_model)
    deregister_model = _waits(waited.DynamicModelRegistry.deregister_model)
    get_active_model = _waits(waited.DynamicModelRegistry.get_active_model)
    get_uses = _waits(waited.DynamicModelRegistry.get_uses)
    get_loaded = _waits(waited.DynamicModelRegistry.get_loaded)
    set_serving = _waits(waited.DynamicModelRegistry.set_serving)
    switch_model = _starts(waited.DynamicModelRegistry.switch_model)  # type: ignore[arg-type]  # **settings


class ModelVersionManager(_Twin[waited.ModelVersionManager]):
    """As :class:`turnout.ModelVersionManager`."""

    def __init__(self, registry: DynamicModelRegistry, client: Client) -> None:
        super().__init__(client.loop, waited.ModelVersionManager(registry.twin, client.twin))

    create_version = _waits(waited.ModelVersionManager.create_version)  # type: ignore[arg-type]  # **about
    get_version = _waits(waited.ModelVersionManager.get_version)
    get_history = _waits(waited.ModelVersionManager.get_history)
    compare_versions = _waits(waited.ModelVersionManager.compare_versions)
    rollback_to_version = _starts(waited.ModelVersionManager.rollback_to_version)


@contextmanager
def connect(url: str = "", *, actor: str = "") -> Generator[Client]:
    """Connect to turnout's control plane while the block runs.

    Args:
        url: of NATS; empty for the ``turnout up`` of the current folder, else the server on this machine.
        actor: who asks, for the log; empty for the operating system's user.

    Raises:
        Unavailable: NATS can't be reached.
    """
    loop = _Loop()
    try:
        connection = waited.connect(url, actor=actor)
        client = loop.run(connection.__aenter__())
        try:
            yield Client(loop, client)
        finally:
            loop.run(connection.__aexit__(None, None, None))
    finally:
        loop.close()


async def _next(many: AsyncIterator[T], end: object) -> T | object:
    return await anext(many, end)


async def _close(many: AsyncIterator[Any]) -> None:
    close = getattr(many, "aclose", None)
    if close is not None:
        await close()
