"""Facts of one inference worker. Names here are storage format."""

from __future__ import annotations

import msgspec


class KeptEngine(msgspec.Struct, frozen=True, omit_defaults=True):
    """An engine that runs on a worker and is no instance's.

    Attributes:
        name: of the engine, on its worker.
        role: ``spare``, which gets a version's weights in place, or ``base``, which adapters share.
        fit: what versions that may use it have in common (``core.fit``); empty where none may.
        holds: model and version whose weights it has, or the folder of the base; empty where it has none yet.
        bytes: host memory that it takes: as measured, and until then as expected; ``device_bytes`` the same on
            ``device``, its accelerator.
        instance: the instance that it was of, or was started for; empty for none.
    """

    name: str
    role: str
    fit: str = ""
    holds: str = ""
    bytes: int = 0
    device: str = ""
    device_bytes: int = 0
    instance: str = ""

    def is_charged(self, phase: str, *, claimed: bool) -> bool:
        """Whether it takes room of its own, and not that of an instance.

        Args:
            phase: of ``instance``; empty where that has ended. A base is charged to the instance that starts it until
                that is ready, a spare to the instance that it was of until that has left.
            claimed: an instance that is loading shall be put into it.
        """
        if self.role == "base":
            return phase not in ("requested", "loading")
        return not claimed and phase != "draining"


class WorkerJoined(msgspec.Struct, frozen=True):
    """A worker offers its host.

    Attributes:
        engines: kinds it may start.
        devices: what engines run on, e.g. ``cpu`` or ``cuda:0``.
        capacity: most engine processes at once.
        memory_bytes: host memory that all engines together may use; 0 where it is not known, and not bounded then.
        device_bytes: accelerator → its memory that engines may use; none where engines run on the host's processors.
        domain: what fails together, e.g. a rack or a zone; empty for the host itself.
        kept: engines that run there already and are no instance's.
    """

    worker: str
    host: str
    engines: tuple[str, ...]
    devices: tuple[str, ...]
    capacity: int
    memory_bytes: int = 0
    device_bytes: dict[str, int] = {}
    domain: str = ""
    kept: tuple[KeptEngine, ...] = ()


class WorkerKeeps(msgspec.Struct, frozen=True):
    """These engines run on the worker, or are started there, and are no instance's: all of them."""

    worker: str
    kept: tuple[KeptEngine, ...]


class SpareReleased(msgspec.Struct, frozen=True, gc=False):
    """The worker is to end one of its spares."""

    worker: str
    name: str
    reason: str


class WorkerLost(msgspec.Struct, frozen=True, gc=False):
    """No sign of life for ``silent_s`` seconds. Its engines may still serve."""

    worker: str
    silent_s: float


class WorkerLeft(msgspec.Struct, frozen=True, gc=False):
    """The worker stopped by itself."""

    worker: str


WorkerEvent = WorkerJoined | WorkerLost | WorkerLeft | WorkerKeeps | SpareReleased
