"""Decisions of one instance's life: requested → loading → ready → draining → stopped, or failed.

A ready one may be put to sleep and woken: ready → sleeping → asleep → waking → ready.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from turnout.core.decider import Rejected
from turnout.events.instance import (
    InstanceDraining,
    InstanceEvent,
    InstanceFailed,
    InstanceLoading,
    InstanceMeasured,
    InstanceProbed,
    InstanceProbeRequested,
    InstanceReady,
    InstanceRequested,
    InstanceSleepRequested,
    InstanceSlept,
    InstanceStopped,
    InstanceWakeRequested,
    InstanceWoken,
    TierFailed,
)
from turnout.events.model import EngineSpec

ENDED = frozenset(("stopped", "failed"))
#: Stages in which an instance fails that was falling asleep, asleep or waking: no fault of its version.
SLUMBER = ("sleeping", "waking")


class InstanceState(msgspec.Struct, frozen=True):
    """One instance.

    Attributes:
        phase: unknown, requested, loading, ready, sleeping, asleep, waking, draining, stopped or failed.
        bytes: host memory that it is charged with: measured, and until then what it was admitted with.
        device_bytes: the same on ``device``, its accelerator.
        priority: what has a lower one makes room for what has a higher one.
        tier: how it was made ready the last time: cold, spare, adapter or wake.
        served: name that its requests must carry upstream; empty for the model's own.
        sleeps: it can be put to sleep; ``slept``: how often it was asked to.
        level: of the sleep that was asked for last.
        struck: tiers that have failed for it.
        into: the engine of its worker that it was expected to be put into, or to share; empty for a new one.
        base: the engine of its worker that it shares.
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
    tier: str = ""
    device_bytes: int = 0
    served: str = ""
    level: int = 0
    struck: tuple[str, ...] = ()
    device: str = ""
    priority: int = 0
    sleeps: bool = False
    slept: int = 0
    into: str = ""
    base: str = ""

    @property
    def shares(self) -> bool:
        """It is one of several in an engine that is charged by itself, or is about to be."""
        about = self.phase in ("requested", "loading") and self.engine is not None and bool(self.engine.adapter)
        return bool(self.base) or (about and bool(self.into))


initial = InstanceState()


def evolve(state: InstanceState, event: InstanceEvent) -> InstanceState:
    """State after the event."""
    match event:
        case InstanceLoading():
            return msgspec.structs.replace(state, phase="loading", stage=event.stage)
        case InstanceReady():
            return msgspec.structs.replace(
                state,
                phase="ready",
                stage="",
                address=event.address,
                bytes=event.bytes or state.bytes,
                tier=event.tier,
                device_bytes=event.device_bytes or (0 if event.base else state.device_bytes),
                served=event.served,
                sleeps=event.sleeps,
                base=event.base,
            )
        case InstanceMeasured():
            return msgspec.structs.replace(state, bytes=event.bytes, device_bytes=event.device_bytes)
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
                event.bytes,
                device_bytes=event.device_bytes,
                device=event.device,
                priority=event.priority,
                into=event.into,
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
        case TierFailed():
            return msgspec.structs.replace(state, struck=(*state.struck, event.tier))
        case InstanceSleepRequested():
            return msgspec.structs.replace(state, phase="sleeping", level=event.level, slept=state.slept + 1)
        case InstanceSlept():
            return msgspec.structs.replace(
                state, phase="asleep", level=event.level, bytes=event.bytes, device_bytes=event.device_bytes
            )
        case InstanceWakeRequested():
            return msgspec.structs.replace(
                state,
                phase="waking",
                cause=event.cause,
                bytes=max(event.bytes, state.bytes),
                device_bytes=max(event.device_bytes, state.device_bytes),
            )
        case InstanceWoken():
            return msgspec.structs.replace(
                state,
                phase="ready",
                tier="wake",
                bytes=event.bytes,
                device_bytes=event.device_bytes,
                address=event.address or state.address,
            )


class RequestInstance(msgspec.Struct, frozen=True):
    """Ask a worker to load a version. Fields as in ``InstanceRequested``."""

    instance: str
    model: str
    version: str
    worker: str
    engine: EngineSpec
    cause: str
    attempt: int = 1
    bytes: int = 0
    device_bytes: int = 0
    device: str = ""
    priority: int = 0
    into: str = ""


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
    tier: str = "cold"
    device_bytes: int = 0
    served: str = ""
    sleeps: bool = False
    base: str = ""


class ReportTierFailed(msgspec.Struct, frozen=True):
    """A faster way has failed, and the worker goes on with the next one; fields as in the event."""

    instance: str
    tier: str
    source: str
    reason: str


class SleepInstance(msgspec.Struct, frozen=True):
    """Ask the worker to put a ready instance to sleep. Only sent when no gateway routes to it. ``level``: 1 or 2."""

    instance: str
    level: int
    reason: str


class ReportSlept(msgspec.Struct, frozen=True):
    """It sleeps, and holds so much memory still. ``number``: which of its sleeps this is, from 1."""

    instance: str
    level: int
    seconds: float
    bytes: int = 0
    device_bytes: int = 0
    number: int = 1


class WakeInstance(msgspec.Struct, frozen=True):
    """Ask the worker to wake a sleeping instance. Fields as in ``InstanceWakeRequested``."""

    instance: str
    cause: str
    bytes: int = 0
    device_bytes: int = 0


class ReportWoken(msgspec.Struct, frozen=True):
    """It is awake and proven again. ``number``: which of its sleeps is over, from 1."""

    instance: str
    seconds: float
    probe_s: float
    bytes: int = 0
    device_bytes: int = 0
    address: str = ""
    number: int = 1


class ReportMeasured(msgspec.Struct, frozen=True):
    """The worker has measured its memory again; fields as in ``InstanceMeasured``."""

    instance: str
    bytes: int
    device_bytes: int = 0


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
    | ReportMeasured
    | RequestProbe
    | ReportProbed
    | DrainInstance
    | ReportStopped
    | ReportFailed
    | ReportTierFailed
    | SleepInstance
    | ReportSlept
    | WakeInstance
    | ReportWoken
)


def decide(state: InstanceState, command: InstanceCommand) -> tuple[InstanceEvent, ...] | Rejected:
    """Move the life forward, never back."""
    match command:
        case RequestInstance():
            return () if state.phase != "unknown" else (_requested(command),)
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
        case ReportMeasured(instance, bytes, device_bytes):
            device_bytes = device_bytes or state.device_bytes  # none: the driver can't tell whose processes they are
            if (bytes, device_bytes) == (state.bytes, state.device_bytes):
                return ()
            return (InstanceMeasured(instance, bytes, device_bytes),)
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
            if state.phase not in ("requested", "loading") or state.stage == stage:
                return ()
            return (InstanceLoading(instance, stage, seconds, detail),)
        case ReportTierFailed(instance, tier, source, reason):
            return () if tier in state.struck else (TierFailed(instance, tier, source, reason),)
        case SleepInstance(instance, level, reason):
            return (InstanceSleepRequested(instance, level, reason),) if state.phase == "ready" else ()
        case ReportSlept(instance, level, seconds, bytes, device_bytes, number):
            if state.phase != "sleeping" or number != state.slept:  # a late word of a dead worker
                return ()
            return (InstanceSlept(instance, level, seconds, bytes, device_bytes),)
        case WakeInstance(instance, cause, bytes, device_bytes):
            if state.phase != "asleep":
                return ()
            return (InstanceWakeRequested(instance, cause, bytes, device_bytes),)
        case ReportReady() | ReportWoken() if state.phase == "draining":
            return Rejected(
                "instance_draining",
                f"instance {command.instance} was asked to stop ({state.reason}) before it was ready",
                "stop it",
            )
        case ReportWoken(instance, seconds, probe_s, bytes, device_bytes, address, number):
            if state.phase != "waking" or number != state.slept:
                return ()
            return (InstanceWoken(instance, seconds, probe_s, bytes, device_bytes, address),)
        case ReportReady():
            if state.slept or (state.phase == "ready" and state.address == command.address):
                return ()  # what has slept has another address since
            return (_ready(command),)


def _ready(command: ReportReady) -> InstanceReady:
    return InstanceReady(
        command.instance,
        command.address,
        command.load_s,
        command.probe_s,
        command.bytes,
        command.fingerprint,
        command.tier,
        command.device_bytes,
        command.served,
        command.sleeps,
        command.base,
    )


def _requested(command: RequestInstance) -> InstanceRequested:
    return InstanceRequested(
        command.instance,
        command.model,
        command.version,
        command.worker,
        command.engine,
        command.cause,
        command.attempt,
        command.bytes,
        command.device_bytes,
        command.device,
        command.priority,
        command.into,
    )
