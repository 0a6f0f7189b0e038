"""Facts of one instance: a loaded version on one worker. Names here are storage format."""

from __future__ import annotations

from datetime import datetime

import msgspec

from turnout.events.model import EngineSpec


class InstanceRequested(msgspec.Struct, frozen=True):
    """A worker was asked to load the version. ``cause``: switch id, or ``restore``. ``attempt`` counts from 1."""

    instance: str
    model: str
    version: str
    worker: str
    engine: EngineSpec
    cause: str
    attempt: int = 1


class InstanceLoading(msgspec.Struct, frozen=True, gc=False):
    """Progress. ``stage``: starting, loading, warming, proving. ``seconds`` since the worker began."""

    instance: str
    stage: str
    seconds: float
    detail: str = ""


class InstanceReady(msgspec.Struct, frozen=True, gc=False):
    """The instance answered its golden probe.

    Attributes:
        instance: its id.
        address: where gateways reach it (see ``route.Endpoint``).
        load_s: seconds from the start to the first healthy answer.
        probe_s: seconds that the proof took.
        bytes: resident host memory of the engine's process group.
        fingerprint: what the engine calls itself (``system_fingerprint``), empty where it does not say.
    """

    instance: str
    address: str
    load_s: float
    probe_s: float
    bytes: int
    fingerprint: str


class InstanceDraining(msgspec.Struct, frozen=True, gc=False):
    """The worker was asked to stop it: no gateway routes to it. ``forced_by`` names who waived the proof of quiet."""

    instance: str
    reason: str
    forced_by: str = ""


class InstanceStopped(msgspec.Struct, frozen=True, gc=False):
    """The engine was stopped on request and its processes are gone."""

    instance: str
    seconds: float


class InstanceFailed(msgspec.Struct, frozen=True, gc=False):
    """The engine could not be loaded, died or hung. ``stage`` as in InstanceLoading, or ``serving``."""

    instance: str
    stage: str
    reason: str
    log_tail: tuple[str, ...] = ()
    exit_code: int | None = None


class InstanceProbeRequested(msgspec.Struct, frozen=True, gc=False):
    """A worker was asked to prove a ready instance once more. ``cause`` names the request, e.g. ``sw-1.1``."""

    instance: str
    cause: str
    at: datetime


class InstanceProbed(msgspec.Struct, frozen=True, gc=False):
    """The golden probe that ``cause`` asked for was answered, well (``ok``) or not."""

    instance: str
    cause: str
    ok: bool
    seconds: float
    reason: str = ""


InstanceEvent = (
    InstanceRequested
    | InstanceLoading
    | InstanceReady
    | InstanceProbeRequested
    | InstanceProbed
    | InstanceDraining
    | InstanceStopped
    | InstanceFailed
)
