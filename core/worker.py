"""Decisions of one inference worker: whether it may be given instances."""

from __future__ import annotations

import msgspec

from turnout.core.decider import Rejected
from turnout.events.worker import WorkerEvent, WorkerJoined, WorkerLeft, WorkerLost


class WorkerState(msgspec.Struct, frozen=True):
    """``live``: it has joined and is heard of."""

    worker: str = ""
    host: str = ""
    engines: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    capacity: int = 0
    live: bool = False
    left: bool = False


initial = WorkerState()


def evolve(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """State after the event."""
    match event:
        case WorkerJoined(worker, host, engines, devices, capacity):
            return WorkerState(worker, host, engines, devices, capacity, True, False)
        case WorkerLost():
            return msgspec.structs.replace(state, live=False)
        case WorkerLeft():
            return msgspec.structs.replace(state, live=False, left=True)


class JoinWorker(msgspec.Struct, frozen=True):
    """A worker offers its host."""

    worker: str
    host: str
    engines: tuple[str, ...]
    devices: tuple[str, ...]
    capacity: int


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
        case JoinWorker(worker, host, engines, devices, capacity):
            if state == WorkerState(worker, host, engines, devices, capacity, True, False):
                return ()
            return (WorkerJoined(worker, host, engines, devices, capacity),)
        case _ if not state.worker:
            return Rejected("worker_unknown", f"worker {command.worker} has not joined", "send worker.join first")
        case LoseWorker(worker, silent_s):
            return (WorkerLost(worker, silent_s),) if state.live else ()
        case LeaveWorker(worker):
            return () if state.left else (WorkerLeft(worker),)
