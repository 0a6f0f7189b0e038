"""What a version will need on a worker, estimated before it is loaded there. Pure; reads no file and no device.

The best source wins: measured for this version on this worker; measured on this worker for a version with the same
settings, scaled by what both were estimated at; measured elsewhere; else what the settings say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turnout.core.fit import fit

if TYPE_CHECKING:
    from turnout.core.world import World

#: The fake engine's own memory: what it holds without ``--memory``.
FAKE_BYTES = 22 << 20


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
    said = _said(world, model, version)
    if (scaled := _by_a_sibling(world, model, version, worker, said)) is not None:
        return scaled
    if said.known:
        return said
    load = world.loads.get((model, version))
    return Need(load.bytes, 0, "measured on another worker") if load is not None and load.bytes else Need()


def adapter_need(world: World, model: str, version: str) -> Need:
    """What an adapter takes beside its base, which runs already."""
    inspected = world.models[model].validated.get(version)
    return Need(inspected.adapter_bytes if inspected is not None else 0, source="its adapter's files")


def _said(world: World, model: str, version: str) -> Need:
    """What its files and its settings say."""
    state = world.models[model]
    spec, inspected = state.versions[version], state.validated.get(version)
    if spec.kind == "fake":
        return Need(FAKE_BYTES + (_number(spec.args, "--memory") << 20), source="its --memory")
    if inspected is not None and inspected.host_bytes:
        return Need(inspected.host_bytes, 0, "estimated from its files")
    return Need()


def _by_a_sibling(world: World, model: str, version: str, worker: str, said: Need) -> Need | None:
    """A version with the same engine and the same flags, loaded on the worker last: what it really took."""
    versions = world.models[model].versions
    spec = versions[version]
    for other in reversed(versions):
        one = versions[other]
        measured = world.sizes.get((worker, model, other))
        if (
            measured is None
            or one.kind != spec.kind
            or one.args != spec.args
            or not _alike(world, model, version, other)
        ):
            continue
        expected = _said(world, model, other).bytes
        scale = said.bytes / expected if said.bytes and expected else 1.0
        return Need(
            round(measured.bytes * scale),
            round(measured.device_bytes * scale),
            f"measured on {worker} for {other}, which has the same settings",
        )
    return None


def _alike(world: World, model: str, version: str, other: str) -> bool:
    """Whether both are of one architecture, as far as their files were read."""
    validated = world.models[model].validated
    mine, its = validated.get(version), validated.get(other)
    return (mine.architecture if mine else "") == (its.architecture if its else "")


def _number(args: tuple[str, ...], flag: str) -> int:
    """The whole number that a flag gives, 0 where it is not there or no number."""
    for at, word in enumerate(args):
        name, _, value = word.partition("=")
        if name == flag:
            value = value or (args[at + 1] if at + 1 < len(args) else "")
            return int(value) if value.isdecimal() else 0
    return 0
