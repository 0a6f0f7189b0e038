"""What a version will need on a worker, estimated before it is loaded there. Pure; reads no file and no device.

The best source wins: measured for this version on this worker; measured on this worker for a version with the same
settings, else of the same architecture, scaled by what both were estimated at; what files and settings say; measured
elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turnout.core.fit import fit

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.core.world import World
    from turnout.events.model import Inspection

#: The fake engine's own memory: what it holds without ``--memory``.
FAKE_BYTES = 22 << 20
#: vLLM's default share of a device, and what its process takes there beside weights and cache (not measured).
DEVICE_SHARE = 0.9
DEVICE_BYTES = 1_500_000_000


class Need(msgspec.Struct, frozen=True):
    """Host and device bytes of one instance. ``source``: what the figure rests on; empty where nothing is known."""

    bytes: int = 0
    device_bytes: int = 0
    source: str = ""

    @property
    def known(self) -> bool:
        """There is a figure."""
        return bool(self.source)


def estimate(world: World, model: str, version: str, worker: str) -> Need:
    """What the version needs on the worker."""
    state = world.models[model]
    spec = state.versions[version]
    if spec.url:
        return Need(source="it runs elsewhere")
    if spec.adapter and (base := world.bases.get((worker, fit(spec, state.validated.get(version))))) is not None:
        more = adapter_need(world, model, version)
        return Need(base.bytes + more.bytes, base.device_bytes, f"its base was measured on {worker}")
    measured = world.sizes.get((worker, model, version))
    if measured is not None:
        return Need(measured.bytes, measured.device_bytes, f"measured on {worker}")
    said = _said(world, model, version, worker)
    for alike in (_same_settings, _same_architecture):
        if (scaled := _by_another(world, model, version, worker, said, alike)) is not None:
            return scaled
    if said.known:
        return said
    load = world.loads.get((model, version))
    return Need(load.bytes, 0, "measured on another worker") if load is not None and load.bytes else Need()


def adapter_need(world: World, model: str, version: str) -> Need:
    """What an adapter takes beside its base, which runs already."""
    inspected = world.models[model].validated.get(version)
    return Need(inspected.adapter_bytes if inspected is not None else 0, source="its adapter's files")


def _said(world: World, model: str, version: str, worker: str) -> Need:
    """What its files and its settings say."""
    state = world.models[model]
    spec, inspected = state.versions[version], state.validated.get(version)
    if spec.kind == "fake":
        return Need(FAKE_BYTES + (number(spec.args, "--memory") << 20), source="its --memory")
    if inspected is not None and inspected.host_bytes:
        home = world.workers.get(worker)
        device = _of_device(spec.args, inspected, home.device_bytes) if home is not None and home.device_bytes else 0
        return Need(inspected.host_bytes, device, "estimated from its files")
    return Need()


def _of_device(args: tuple[str, ...], inspected: Inspection, devices: dict[str, int]) -> int:
    """Bytes on an accelerator: weights and KV cache; without a size for the cache an engine takes its share of all."""
    if inspected.kv_bytes:
        return inspected.weight_bytes + inspected.kv_bytes + DEVICE_BYTES
    share = value(args, "--gpu-memory-utilization")
    try:
        taken = float(share) if share else DEVICE_SHARE
    except ValueError:
        taken = DEVICE_SHARE
    return round(max(devices.values()) * min(1.0, max(0.0, taken)))


def _by_another(
    world: World, model: str, version: str, worker: str, said: Need, alike: Callable[[_About, _About], bool]
) -> Need | None:
    """The newest version that is like this one and was measured on the worker: what it really took, scaled."""
    mine = _about(world, model, version)
    others = [name for name in world.models if name != model] if mine.architecture or mine.kind == "fake" else []
    for name in (model, *others):
        state = world.models[name]
        for other in reversed(state.versions):
            measured = world.sizes.get((worker, name, other))
            if measured is None or not alike(mine, _about(world, name, other)):
                continue
            expected = _said(world, name, other, worker)
            which = other if name == model else f"{name} {other}"
            why = "the same settings" if alike is _same_settings else "the same architecture"
            return Need(
                _scaled(measured.bytes, said.bytes, expected.bytes),
                _scaled(measured.device_bytes, said.device_bytes, expected.device_bytes),
                f"measured on {worker} for {which}, which has {why}",
            )
    return None


def _scaled(measured: int, said: int, expected: int) -> int:
    return round(measured * said / expected) if said and expected else measured


class _About(msgspec.Struct, frozen=True):
    """What makes two versions alike. ``adapter``: it shares an engine, and its own figure says nothing of another."""

    kind: str
    words: tuple[str, ...]
    architecture: str
    adapter: bool


def _about(world: World, model: str, version: str) -> _About:
    state = world.models[model]
    spec, inspected = state.versions[version], state.validated.get(version)
    return _About(
        spec.kind,
        (*spec.command, *spec.args),
        inspected.architecture if inspected is not None else "",
        bool(spec.adapter),
    )


def _same_settings(one: _About, other: _About) -> bool:
    return one == other


def _same_architecture(one: _About, other: _About) -> bool:
    same = (one.kind, one.architecture, one.adapter) == (other.kind, other.architecture, other.adapter)
    return same and bool(one.architecture)


def value(args: tuple[str, ...], flag: str) -> str:
    """What a flag gives, empty where it is not there."""
    for at, word in enumerate(args):
        name, _, given = word.partition("=")
        if name == flag:
            return given or (args[at + 1] if at + 1 < len(args) else "")
    return ""


def number(args: tuple[str, ...], flag: str) -> int:
    """The whole number that a flag gives, 0 where it is not there or no number."""
    given = value(args, flag)
    return int(given) if given.isdecimal() else 0
