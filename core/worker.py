"""Decisions of one inference worker: whether it may be given instances."""

from __future__ import annotations

import msgspec

from turnout.core.decider import Rejected
from turnout.events.worker import (
    KeptEngine,
    SpareReleased,
    WorkerEvent,
    WorkerJoined,
    WorkerKeeps,
    WorkerLeft,
    WorkerLost,
)


class WorkerState(msgspec.Struct, frozen=True):
    """``live``: it has joined and is heard of; ``released``: spares that it is to end. The rest as in the events."""

    worker: str = ""
    host: str = ""
    engines: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    capacity: int = 0
    live: bool = False
    left: bool = False
    memory_bytes: int = 0
    device_bytes: dict[str, int] = {}
    domain: str = ""
    kept: tuple[KeptEngine, ...] = ()
    released: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """What fails together with it: its failure domain, else its host."""
        return self.domain or self.host


initial = WorkerState()


def evolve(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """State after the event."""
    match event:
        case WorkerJoined():
            return _joined(event)
        case WorkerLost():
            return msgspec.structs.replace(state, live=False)
        case WorkerLeft():
            return msgspec.structs.replace(state, live=False, left=True)
        case WorkerKeeps(_, kept):
            names = {engine.name for engine in kept}
            return msgspec.structs.replace(state, kept=kept, released=tuple(n for n in state.released if n in names))
        case SpareReleased(_, name):
            return msgspec.structs.replace(state, released=(*state.released, name))


class JoinWorker(msgspec.Struct, frozen=True):
    """A worker offers its host. Fields as in ``WorkerJoined``."""

    worker: str
    host: str
    engines: tuple[str, ...]
    devices: tuple[str, ...]
    capacity: int
    memory_bytes: int = 0
    device_bytes: dict[str, int] = {}
    domain: str = ""
    kept: tuple[KeptEngine, ...] = ()


class ReportKept(msgspec.Struct, frozen=True):
    """The worker has these engines that are no instance's: all of them."""

    worker: str
    kept: tuple[KeptEngine, ...]


class ReleaseSpare(msgspec.Struct, frozen=True):
    """Ask the worker to end a spare, as something else needs its room."""

    worker: str
    name: str
    reason: str


class LeaveWorker(msgspec.Struct, frozen=True):
    """The worker stops by itself."""

    worker: str


class LoseWorker(msgspec.Struct, frozen=True):
    """The leader has not heard of the worker for too long."""

    worker: str
    silent_s: float


WorkerCommand = JoinWorker | LeaveWorker | LoseWorker | ReportKept | ReleaseSpare


def decide(state: WorkerState, command: WorkerCommand) -> tuple[WorkerEvent, ...] | Rejected:
    """Record what the worker says, if it is news."""
    match command:
        case JoinWorker():
            joined = WorkerJoined(
                command.worker,
                command.host,
                command.engines,
                command.devices,
                command.capacity,
                command.memory_bytes,
                command.device_bytes,
                command.domain,
                command.kept,
            )
            same = msgspec.structs.replace(state, released=()) == _joined(joined)
            return () if same else (joined,)
        case _ if not state.worker:
            return Rejected("worker_unknown", f"worker {command.worker} has not joined", "send worker.join first")
        case LoseWorker(worker, silent_s):
            return (WorkerLost(worker, silent_s),) if state.live else ()
        case LeaveWorker(worker):
            return () if state.left else (WorkerLeft(worker),)
        case ReportKept(worker, kept):
            return () if state.kept == kept else (WorkerKeeps(worker, kept),)
        case ReleaseSpare(worker, name, reason):
            spare = any(engine.name == name and engine.role == "spare" for engine in state.kept)
            return (SpareReleased(worker, name, reason),) if spare and name not in state.released else ()


def _joined(event: WorkerJoined) -> WorkerState:
    """A worker that has just come, whatever was known of it before."""
    return WorkerState(
        event.worker,
        event.host,
        event.engines,
        event.devices,
        event.capacity,
        live=True,
        memory_bytes=event.memory_bytes,
        device_bytes=event.device_bytes,
        domain=event.domain,
        kept=event.kept,
    )
