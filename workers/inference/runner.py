"""The port between deciding what shall run and running it: real processes in host.py, simulated ones in tests/sim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from turnout.events.model import EngineSpec, Inspection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from turnout.core.model import ReportInspected
    from turnout.events.worker import KeptEngine
    from turnout.projections.fleet import CheckView

    #: Looks at a version's files: fills in the report.
    Look = Callable[[CheckView, ReportInspected], Awaitable[ReportInspected]]


class Order(msgspec.Struct, frozen=True):
    """An instance to load.

    ``sequence``: how far the log had come when it was asked for. ``inspection``: what the version's files said when
    they were looked at; None where it has none. ``bytes``: host memory that it was admitted with, 0 where nothing was
    known. ``device``: the accelerator that it is to run on, empty for the host's choice. ``slept``: how often it was
    asked to sleep. ``into``: the engine that it is expected to be put into, or to share, on which its admission rests;
    empty for a new one. ``struck``: ways that have failed here before, as tier and source: they are not tried again.
    """

    instance: str
    model: str
    version: str
    engine: EngineSpec
    sequence: int = 0
    inspection: Inspection | None = None
    bytes: int = 0
    device: str = ""
    slept: int = 0
    into: str = ""
    struck: tuple[tuple[str, str], ...] = ()


class HostMemory(msgspec.Struct, frozen=True):
    """What all engines of a host may use; fields as in the event ``WorkerJoined``. 0: not bounded."""

    memory_bytes: int = 0
    device_bytes: dict[str, int] = {}


class Usage(msgspec.Struct, frozen=True):
    """Memory that an engine holds: of the host, and of its accelerators. Bytes."""

    bytes: int = 0
    device_bytes: int = 0


class Struck(msgspec.Struct, frozen=True):
    """A faster tier that has failed; fields as in the event ``TierFailed``."""

    tier: str
    source: str
    reason: str


class Loaded(msgspec.Struct, frozen=True):
    """An instance that has passed its proof; fields as in the event ``InstanceReady``.

    ``struck``: the faster tiers that have failed before. ``slept``: how often it has slept before.
    """

    address: str
    load_s: float
    probe_s: float
    bytes: int = 0
    fingerprint: str = ""
    tier: str = "cold"
    device_bytes: int = 0
    served: str = ""
    sleeps: bool = False
    struck: tuple[Struck, ...] = ()
    slept: int = 0
    base: str = ""


class Slept(msgspec.Struct, frozen=True):
    """An engine that sleeps.

    Attributes:
        level: 1, its weights are in host memory; 2, they are dropped.
        seconds: what falling asleep took.
        bytes, device_bytes: memory that it still holds.
        number: which of its sleeps this is, from 1.
    """

    level: int
    seconds: float
    bytes: int = 0
    device_bytes: int = 0
    number: int = 1


class Failure(msgspec.Struct, frozen=True):
    """An instance that could not be loaded, died or hung; fields as in the event ``InstanceFailed``."""

    stage: str
    reason: str
    log_tail: tuple[str, ...] = ()
    exit_code: int | None = None
    struck: tuple[Struck, ...] = ()


class Found(msgspec.Struct, frozen=True):
    """An engine that an earlier worker has left running.

    ``loaded`` is None where it was never proven, and while it sleeps: then ``slept`` tells of it.
    """

    sequence: int
    loaded: Loaded | None = None
    slept: Slept | None = None


class Keeper(Protocol):
    """Who must know of the engines that are no instance's."""

    def changed(self) -> None:
        """There are others now, or they hold much more or less."""
        ...

    async def told(self) -> None:
        """Returns once it is known what there is now."""
        ...

    async def may_start(self, engine: KeptEngine) -> str:
        """Why there is no room to start this one; empty where there is, and it is counted from then on."""
        ...


class EngineRunner(Protocol):
    """Runs engines. An instance is known from ``found`` or ``load`` until ``stop`` has returned."""

    @property
    def memory(self) -> HostMemory:
        """What all engines together may use of this host."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """Engine kinds that can be run here."""
        ...

    async def found(self) -> Mapping[str, Found]:
        """Take over what runs from earlier. Called once, first."""
        ...

    async def load(self, order: Order, progress: Callable[[str, str], None]) -> Loaded | Failure:
        """Start the engine (or go on with one that was found) and prove it.

        ``progress(stage, detail)`` is called at each change. A failed engine is gone when this returns. Cancelled, it
        leaves the engine to ``stop``.
        """
        ...

    async def watch(self, instance: str) -> Failure:
        """Returns when a proven engine has died or hung; what is left of it is gone then."""
        ...

    async def prove(self, instance: str) -> str:
        """Ask a proven engine its golden question once more; empty where the answer is good, else what is wrong."""
        ...

    async def wait_quiet(self, instance: str, busy: Callable[[str], None]) -> Failure | None:
        """Until nobody uses the engine; then nobody can reach it any more. ``busy(what)`` names what is in the way.

        Returns the failure of an engine that died meanwhile.
        """
        ...

    async def sleep(self, order: Order, level: int) -> Slept | Failure:
        """Put an engine that is quiet to sleep; see ``control.sleep``. What has failed is gone when this returns."""
        ...

    async def slumber(self, instance: str) -> Failure:
        """Returns when a sleeping engine has died."""
        ...

    async def wake(self, order: Order) -> Loaded | Failure:
        """Wake it and prove it, at a new address. Tried once: what has failed is gone when this returns."""
        ...

    async def stop(self, instance: str) -> None:
        """End all processes of the engine; fine where there is none."""
        ...

    def remains(self, instance: str) -> Failure:
        """What can be told of an engine that should be running and is not."""
        ...

    async def usage(self, instance: str) -> Usage | None:
        """What a running engine holds now; None where it is not one of this host's."""
        ...

    def trouble(self, instance: str) -> str:
        """What the newest golden question has shown of a running engine; empty where all is well."""
        ...

    @property
    def kept(self) -> tuple[KeptEngine, ...]:
        """The engines that are no instance's; also one that is being started."""
        ...

    async def measure_kept(self) -> None:
        """Look at what they hold, and whether they run still."""
        ...

    async def release_spare(self, name: str) -> None:
        """End a spare; fine where there is none of that name."""
        ...

    async def end_spares(self) -> None:
        """End the engines that belong to no instance, and keep none from now on."""
        ...

    def release(self) -> None:
        """Let go of all engines; they run on, to be found again."""
        ...
