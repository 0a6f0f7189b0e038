"""Facts of one inference worker. Names here are storage format."""

from __future__ import annotations

import msgspec


class WorkerJoined(msgspec.Struct, frozen=True):
    """A worker offers its host.

    Attributes:
        engines: kinds it may start.
        devices: what engines run on, e.g. ``cpu`` or ``cuda:0``.
        capacity: most engine processes at once.
        memory_bytes: host memory that all engines together may use; 0 where it is not known, and not bounded then.
        device_bytes: accelerator → its memory that engines may use; none where engines run on the host's processors.
        domain: what fails together, e.g. a rack or a zone; empty for the host itself.
    """

    worker: str
    host: str
    engines: tuple[str, ...]
    devices: tuple[str, ...]
    capacity: int
    memory_bytes: int = 0
    device_bytes: dict[str, int] = {}
    domain: str = ""


class WorkerLost(msgspec.Struct, frozen=True, gc=False):
    """No sign of life for ``silent_s`` seconds. Its engines may still serve."""

    worker: str
    silent_s: float


class WorkerLeft(msgspec.Struct, frozen=True, gc=False):
    """The worker stopped by itself."""

    worker: str


WorkerEvent = WorkerJoined | WorkerLost | WorkerLeft
