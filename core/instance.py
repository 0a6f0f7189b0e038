"""Decisions of one instance's life: requested → loading → ready → draining → stopped, or failed."""

from __future__ import annotations

import msgspec

from turnout.core.decider import Rejected
from turnout.events.instance import (
    InstanceDraining,
    InstanceEvent,
    InstanceFailed,
    InstanceLoading,
    InstanceReady,
    InstanceRequested,
    InstanceStopped,
)
from turnout.events.model import EngineSpec

ENDED = frozenset(("stopped", "failed"))


class InstanceState(msgspec.Struct, frozen=True):
    """``phase``: unknown, requested, loading, ready, draining, stopped or failed."""

    instance: str = ""
    model: str = ""
    version: str = ""
    worker: str = ""
    engine: EngineSpec | None = None
    phase: str = "unknown"
    stage: str = ""
    address: str = ""
    cause: str = ""
    attempt: int = 1
    bytes: int = 0
    reason: str = ""
    log_tail: tuple[str, ...] = ()
    forced: bool = False


initial = InstanceState()


def evolve(state: InstanceState, event: InstanceEvent) -> InstanceState:
    """State after the event."""
    match event:
        case InstanceLoading(_, stage):
            return msgspec.structs.replace(state, phase="loading", stage=stage)
        case InstanceReady(_, address, _, _, bytes):
            return msgspec.structs.replace(state, phase="ready", stage="", address=address, bytes=bytes)
        case InstanceRequested(instance, model, version, worker, engine, cause, attempt):
            return InstanceState(instance, model, version, worker, engine, "requested", "", "", cause, attempt)
        case InstanceDraining(_, reason, forced_by):
            forced = state.forced or bool(forced_by)
            return msgspec.structs.replace(state, phase="draining", reason=reason, forced=forced)
        case InstanceStopped():
            return msgspec.structs.replace(state, phase="stopped")
        case InstanceFailed(_, stage, reason, log_tail):
            return msgspec.structs.replace(state, phase="failed", stage=stage, reason=reason, log_tail=log_tail)


class RequestInstance(msgspec.Struct, frozen=True):
    """Ask a worker to load a version."""

    instance: str
    model: str
    version: str
    worker: str
    engine: EngineSpec
    cause: str
    attempt: int = 1


class ReportLoading(msgspec.Struct, frozen=True):
    """The worker's progress; stages as in the event."""

    instance: str
    stage: str
    seconds: float
    detail: str = ""


class ReportReady(msgspec.Struct, frozen=True):
    """The worker has proven the instance."""

    instance: str
    address: str
    load_s: float
    probe_s: float
    bytes: int = 0
    fingerprint: str = ""


class DrainInstance(msgspec.Struct, frozen=True):
    """Ask the worker to stop it. Only sent when no gateway routes to it, or when an operator forces it."""

    instance: str
    reason: str
    forced_by: str = ""


class ReportStopped(msgspec.Struct, frozen=True):
    """The engine's processes are gone, as asked."""

    instance: str
    seconds: float


class ReportFailed(msgspec.Struct, frozen=True):
    """The engine could not be loaded, died or hung."""

    instance: str
    stage: str
    reason: str
    log_tail: tuple[str, ...] = ()
    exit_code: int | None = None


InstanceCommand = RequestInstance | ReportLoading | ReportReady | DrainInstance | ReportStopped | ReportFailed


def decide(state: InstanceState, command: InstanceCommand) -> tuple[InstanceEvent, ...] | Rejected:
    """Move the life forward, never back."""
    match command:
        case RequestInstance(instance, model, version, worker, engine, cause, attempt):
            if state.phase != "unknown":
                return ()
            return (InstanceRequested(instance, model, version, worker, engine, cause, attempt),)
        case _ if state.phase == "unknown":
            return Rejected(
                "instance_unknown",
                f"no instance {command.instance} was ever requested",
                "stop what runs under this id: nobody asked for it",
            )
        case _ if state.phase in ENDED:
            return ()
        case DrainInstance(instance, reason, forced_by):
            if state.phase == "draining" and (state.forced or not forced_by):  # a force that comes later is news
                return ()
            return (InstanceDraining(instance, reason, forced_by),)
        case ReportStopped(instance, seconds):
            return (InstanceStopped(instance, seconds),)
        case ReportFailed(instance, stage, reason, log_tail, exit_code):
            return (InstanceFailed(instance, stage, reason, log_tail, exit_code),)
        case ReportLoading(instance, stage, seconds, detail):
            if state.phase in ("ready", "draining") or state.stage == stage:
                return ()
            return (InstanceLoading(instance, stage, seconds, detail),)
        case ReportReady(instance, address, load_s, probe_s, bytes, fingerprint):
            if state.phase == "draining":
                return Rejected(
                    "instance_draining",
                    f"instance {instance} was asked to stop ({state.reason}) while it was loading",
                    "stop it",
                )
            if state.phase == "ready" and state.address == address:
                return ()
            return (InstanceReady(instance, address, load_s, probe_s, bytes, fingerprint),)
