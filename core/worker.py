"""Decisions of one inference worker: whether it may be given instances."""

from __future__ import annotations

import msgspec

from turnout.core.decider import Rejected
from turnout.events.worker import WorkerEvent, WorkerJoined, WorkerLeft, WorkerLost


class WorkerState(msgspec.Struct, frozen=True):
    """``live``: it has joined and is heard of. The rest as in ``WorkerJoined``."""

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


class LeaveWorker(msgspec.Struct, frozen=True):
    """The worker stops by itself."""

    worker: str


class LoseWorker(msgspec.Struct, frozen=True):
    """The leader has not heard of the worker for too long."""

    worker: str
    silent_s: float


WorkerCommand = JoinWorker | LeaveWorker | LoseWorker


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
            )
            return () if state == _joined(joined) else (joined,)
        case _ if not state.worker:
            return Rejected("worker_unknown", f"worker {command.worker} has not joined", "send worker.join first")
        case LoseWorker(worker, silent_s):
            return (WorkerLost(worker, silent_s),) if state.live else ()
        case LeaveWorker(worker):
            return () if state.left else (WorkerLeft(worker),)


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
    )
