"""Facts of one inference worker. Names here are storage format."""

from __future__ import annotations

import msgspec


class WorkerJoined(msgspec.Struct, frozen=True, gc=False):
    """A worker offers its host. ``engines``: kinds it may start. ``capacity``: most engine processes at once."""

    worker: str
    host: str
    engines: tuple[str, ...]
    devices: tuple[str, ...]
    capacity: int


class WorkerLost(msgspec.Struct, frozen=True, gc=False):
    """No sign of life for ``silent_s`` seconds. Its engines may still serve."""

    worker: str
    silent_s: float


class WorkerLeft(msgspec.Struct, frozen=True, gc=False):
    """The worker stopped by itself."""

    worker: str


WorkerEvent = WorkerJoined | WorkerLost | WorkerLeft
