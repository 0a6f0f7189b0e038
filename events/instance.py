"""Facts of one instance: a loaded version on one worker. Names here are storage format."""

from __future__ import annotations

from datetime import datetime

import msgspec

from turnout.events.model import EngineSpec


class InstanceRequested(msgspec.Struct, frozen=True):
    """A worker was asked to load the version.

    Attributes:
        cause: switch id, ``restore``, ``preload`` or ``warm``.
        attempt: counts from 1.
        bytes: host memory that it was admitted with, as estimated before the load; 0 where nothing was known.
        device_bytes: the same on ``device``, the accelerator that it is to run on; empty for the host's processors.
        priority: what has a lower one makes room for what has a higher one.
        into: the engine of its worker that it is expected to be put into, or to share; empty for a new one.
    """

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
        tier: how it was made ready: cold (a new process), spare, adapter.
        device_bytes: memory that the engine holds on its devices; 0 where it has none of its own.
        served: name that its requests must carry upstream; empty where the engine knows the model's own.
        sleeps: it can be put to sleep.
        base: the engine of its worker that it shares with other adapters, which is charged by itself; else empty.
    """

    instance: str
    address: str
    load_s: float
    probe_s: float
    bytes: int
    fingerprint: str
    tier: str = "cold"
    device_bytes: int = 0
    served: str = ""
    sleeps: bool = False
    base: str = ""


class InstanceMeasured(msgspec.Struct, frozen=True, gc=False):
    """It holds so much more or less memory than was known that the worker says it again."""

    instance: str
    bytes: int
    device_bytes: int = 0


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
    """The engine could not be loaded, died or hung.

    ``stage`` as in InstanceLoading, or ``serving``, ``sleeping``, ``waking``.
    """

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


class TierFailed(msgspec.Struct, frozen=True, gc=False):
    """A faster way to make the instance ready has failed; the worker takes the next one.

    ``source``: the version that the engine had loaded before, or the kind of engine that it is; empty for none.
    """

    instance: str
    tier: str
    source: str
    reason: str


class InstanceSleepRequested(msgspec.Struct, frozen=True, gc=False):
    """A worker was asked to put a ready instance to sleep: no gateway routes to it.

    ``level`` 1 keeps the weights in host memory, 2 drops them (waking reads them again).
    """

    instance: str
    level: int
    reason: str


class InstanceSlept(msgspec.Struct, frozen=True, gc=False):
    """It sleeps. ``bytes`` and ``device_bytes``: memory that it still holds on the host and on its devices."""

    instance: str
    level: int
    seconds: float
    bytes: int
    device_bytes: int = 0


class InstanceWakeRequested(msgspec.Struct, frozen=True, gc=False):
    """A worker was asked to wake a sleeping instance.

    ``cause``: switch id, ``restore`` or ``preload``. ``bytes`` and ``device_bytes``: what it was admitted with, which
    is all that it will hold then; 0 where nothing was known.
    """

    instance: str
    cause: str
    bytes: int = 0
    device_bytes: int = 0


class InstanceWoken(msgspec.Struct, frozen=True, gc=False):
    """It is awake and has answered its golden probe again.

    ``seconds``: the waking; ``probe_s``: the proof; ``address``: where gateways reach it from now on.
    """

    instance: str
    seconds: float
    probe_s: float
    bytes: int
    device_bytes: int = 0
    address: str = ""


InstanceEvent = (
    InstanceRequested
    | InstanceLoading
    | InstanceReady
    | InstanceMeasured
    | InstanceProbeRequested
    | InstanceProbed
    | InstanceDraining
    | InstanceStopped
    | InstanceFailed
    | TierFailed
    | InstanceSleepRequested
    | InstanceSlept
    | InstanceWakeRequested
    | InstanceWoken
)
