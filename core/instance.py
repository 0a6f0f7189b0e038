"""Decisions of one instance's life: requested → loading → ready → draining → stopped, or failed."""

from __future__ import annotations

from datetime import datetime

import msgspec

from turnout.core.decider import Rejected
from turnout.events.instance import (
    InstanceDraining,
    InstanceEvent,
    InstanceFailed,
    InstanceLoading,
    InstanceProbed,
    InstanceProbeRequested,
    InstanceReady,
    InstanceRequested,
    InstanceStopped,
)
from turnout.events.model import EngineSpec

ENDED = frozenset(("stopped", "failed"))


class InstanceState(msgspec.Struct, frozen=True):
    """One instance.

    Attributes:
        phase: unknown, requested, loading, ready, draining, stopped or failed.
        probe: cause of the newest probe that was asked for since it was ready, at ``probe_at`` (UTC).
        probed: cause of the newest one that was answered; ``sound`` where it was answered well.
    """

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
    probe: str = ""
    probe_at: datetime | None = None
    probed: str = ""
    sound: bool = True


initial = InstanceState()


def evolve(state: InstanceState, event: InstanceEvent) -> InstanceState:
    """State after the event."""
    match event:
        case InstanceLoading():
            return msgspec.structs.replace(state, phase="loading", stage=event.stage)
        case InstanceReady():
            return msgspec.structs.replace(state, phase="ready", stage="", address=event.address, bytes=event.bytes)
        case InstanceRequested():
            return InstanceState(
                event.instance,
                event.model,
                event.version,
                event.worker,
                event.engine,
                "requested",
                "",
                "",
                event.cause,
                event.attempt,
            )
        case InstanceProbeRequested():
            return msgspec.structs.replace(state, probe=event.cause, probe_at=event.at)
        case InstanceProbed():
            return msgspec.structs.replace(state, probed=event.cause, sound=event.ok)
        case InstanceDraining():
            forced = state.forced or bool(event.forced_by)
            return msgspec.structs.replace(state, phase="draining", reason=event.reason, forced=forced)
        case InstanceStopped():
            return msgspec.structs.replace(state, phase="stopped")
        case InstanceFailed():
            return msgspec.structs.replace(
                state, phase="failed", stage=event.stage, reason=event.reason, log_tail=event.log_tail
            )


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


class RequestProbe(msgspec.Struct, frozen=True):
    """Ask the worker to prove a ready instance once more."""

    instance: str
    cause: str
    at: datetime


class ReportProbed(msgspec.Struct, frozen=True):
    """The worker has asked the golden question that ``cause`` wanted."""

    instance: str
    cause: str
    ok: bool
    seconds: float
    reason: str = ""


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


InstanceCommand = (
    RequestInstance
    | ReportLoading
    | ReportReady
    | RequestProbe
    | ReportProbed
    | DrainInstance
    | ReportStopped
    | ReportFailed
)


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
        case RequestProbe(instance, cause, at):
            if state.phase != "ready" or state.probe == cause:
                return ()
            return (InstanceProbeRequested(instance, cause, at),)
        case ReportProbed(instance, cause, ok, seconds, reason):
            if cause != state.probe or cause == state.probed:
                return ()
            return (InstanceProbed(instance, cause, ok, seconds, reason),)
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
