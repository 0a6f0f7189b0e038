"""Two versions of a model side by side: what was registered, what their files say, and what the log knows of them.

A fold of the log that is fed from its start; it never raises. No decisions: which ways from one to the other are
possible is told by what the files have in common; a worker proves it.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from turnout.events.instance import InstanceFailed, InstanceReady, InstanceRequested
from turnout.events.model import Contents, EngineSpec, Inspection, VersionRegistered, VersionRejected, VersionValidated
from turnout.events.switch import SwitchRequested, VerdictReached

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turnout.events.envelope import Recorded


class Side(msgspec.Struct, frozen=True):
    """One version.

    Attributes:
        version: its name.
        engine: as it was registered, at ``registered_at`` (UTC) by ``registered_by``.
        state: checking, validated or rejected (``reason``).
        inspection: what its files say; None where it has none or nobody has looked.
        loads: how often an instance of it became ready, the newest after ``load_s`` seconds with ``bytes`` of memory.
        failures: of its instances, and why the newest failed.
        verdict: the newest on it as a target: pass, fail, inconclusive or invalid, and why; empty for none.
        health: status now; empty where it is not measured. ``requests`` to ``p95_ms``: of the newest minutes, None
            where nothing was measured.
    """

    version: str
    engine: EngineSpec
    registered_at: datetime
    registered_by: str
    note: str = ""
    tags: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    parent: str = ""
    state: str = "validated"
    reason: str = ""
    inspection: Inspection | None = None
    loads: int = 0
    load_s: float | None = None
    bytes: int | None = None
    failures: int = 0
    failure: str = ""
    verdict: str = ""
    verdict_reason: str = ""
    health: str = ""
    requests: int | None = None
    error_rate: float | None = None
    first_p95_ms: float | None = None
    p95_ms: float | None = None


class Difference(msgspec.Struct, frozen=True):
    """A setting that differs; empty on a side that does not have it."""

    name: str
    first: str
    second: str


class Layers(msgspec.Struct, frozen=True):
    """Whose weights differ, by the digest of each layer's tensors. ``only_*``: layers that one version lacks."""

    changed: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()


class Way(msgspec.Struct, frozen=True):
    """How an engine of the first version may become one of the second. ``why``: what speaks for or against it."""

    tier: str
    possible: bool
    why: str


class Comparison(msgspec.Struct, frozen=True):
    """Two versions of one model.

    Attributes:
        engine: settings of the engines that differ.
        config: what differs in config.json, and ``sampling`` in generation_config.json.
        tokenizer: whether both have the same; None where it is not known of both. ``template`` likewise.
        layers: whose weights differ; None where it is not known of both.
        ways: from the first to the second, the fastest first.
    """

    model: str
    first: Side
    second: Side
    engine: tuple[Difference, ...]
    config: tuple[Difference, ...]
    sampling: tuple[Difference, ...]
    tokenizer: bool | None
    template: bool | None
    layers: Layers | None
    ways: tuple[Way, ...]


class Comparing:
    """The fold. Feed it the log from its start, then ask."""

    def __init__(self, model: str, first: str, second: str) -> None:
        self._model = model
        self._names = (first, second)
        self._sides: dict[str, Side] = {}
        self._contents: dict[str, Contents] = {}
        self._homes: dict[str, str] = {}
        self._switches: dict[str, str] = {}

    def take(self, recorded: Recorded) -> None:
        """The log's next event."""
        event = recorded.event
        match event:
            case VersionRegistered(model, version) if model == self._model and version in self._names:
                self._contents.pop(version, None)
                self._sides[version] = Side(
                    version,
                    event.engine,
                    recorded.envelope.time,
                    recorded.envelope.actor,
                    event.note,
                    event.tags,
                    event.metrics,
                    event.parent,
                    "checking" if event.engine.path or event.engine.adapter else "validated",
                )
            case VersionValidated(model, version) if model == self._model:
                self._contents[version] = event.contents
                self._set(version, state="validated", reason="", inspection=event.inspection)
            case VersionRejected(model, version) if model == self._model:
                self._set(version, state="rejected", reason=event.reason)
            case InstanceRequested(instance, model, version) if model == self._model and version in self._names:
                self._homes[instance] = version
            case InstanceReady(instance) if instance in self._homes:
                version = self._homes[instance]
                known = self._sides.get(version)
                loads = known.loads + 1 if known else 1
                self._set(version, loads=loads, load_s=event.load_s, bytes=event.bytes or None)
            case InstanceFailed(instance) if instance in self._homes:
                version = self._homes[instance]
                known = self._sides.get(version)
                failures = known.failures + 1 if known else 1
                self._set(version, failures=failures, failure=f"{event.stage}: {event.reason}")
            case SwitchRequested(switch, model, target) if model == self._model and target in self._names:
                self._switches[switch] = target
            case VerdictReached(switch) if switch in self._switches:
                self._set(self._switches[switch], verdict=event.decision, verdict_reason=event.reason)
            case _:
                pass

    def comparison(self) -> Comparison | None:
        """What is known by now; None where one of the two was never registered."""
        first, second = (self._sides.get(name) for name in self._names)
        if first is None or second is None:
            return None
        one, two = (self._contents.get(name) for name in self._names)
        return Comparison(
            model=self._model,
            first=first,
            second=second,
            engine=_differences(_engine(first.engine), _engine(second.engine)),
            config=_differences(one.config, two.config) if one and two else (),
            sampling=_differences(one.sampling, two.sampling) if one and two else (),
            tokenizer=one.tokenizer == two.tokenizer if one and two and one.tokenizer and two.tokenizer else None,
            template=one.template == two.template if one and two else None,
            layers=_layers(one.layers, two.layers) if one and two and one.layers and two.layers else None,
            ways=_ways(first, second),
        )

    def _set(self, version: str, **known: object) -> None:
        side = self._sides.get(version)
        if side is not None:
            self._sides[version] = msgspec.structs.replace(side, **known)


def _engine(engine: EngineSpec) -> dict[str, str]:
    named = {"kind": engine.kind, "path": engine.path, "adapter": engine.adapter, "url": engine.url}
    words = {"command": engine.command, "args": engine.args}
    return {k: v for k, v in (*named.items(), *((k, " ".join(v)) for k, v in words.items())) if v}


def _differences(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[Difference, ...]:
    names = (*first, *(name for name in second if name not in first))
    pairs = ((name, first.get(name, ""), second.get(name, "")) for name in names)
    return tuple(Difference(name, a, b) for name, a, b in pairs if a != b)


def _layers(first: Mapping[str, str], second: Mapping[str, str]) -> Layers:
    both = [name for name in first if name in second]
    return Layers(
        changed=tuple(name for name in both if first[name] != second[name]),
        same=tuple(name for name in both if first[name] == second[name]),
        only_first=tuple(name for name in first if name not in second),
        only_second=tuple(name for name in second if name not in first),
    )


def _ways(first: Side, second: Side) -> tuple[Way, ...]:
    one, two = first.inspection, second.inspection
    if first.engine.kind != second.engine.kind or first.engine.kind == "openai":
        why = "only two engines of kind vllm (or fake) can take each other's weights"
        return (Way("spare", False, why), Way("adapter", False, why), _cold(second))
    if one is None or two is None:
        why = "nobody has looked at the files of both"
        return (Way("spare", False, why), Way("adapter", False, why), _cold(second))
    return (_spare(first, second, one, two), _adapter(first, second, one, two), _cold(second))


def _spare(first: Side, second: Side, one: Inspection, two: Inspection) -> Way:
    """New weights in place, into an engine that was started for the first version."""
    if first.engine.adapter or second.engine.adapter:
        return Way("spare", False, "an adapter is no whole set of weights")
    if first.engine.args != second.engine.args:
        return Way("spare", False, "their engines have other settings")
    if one.shape_digest != two.shape_digest:
        return Way("spare", False, "configuration, tokenizer, chat template or sampling defaults differ: they stay")
    if one.tensors_digest != two.tensors_digest:
        return Way("spare", False, "their tensors have other names, types or shapes")
    return Way(
        "spare", True, "settings, tokenizer, template and the shapes of all tensors are equal: only weights differ"
    )


def _adapter(first: Side, second: Side, one: Inspection, two: Inspection) -> Way:
    """One base engine, and an adapter beside it."""
    bases = (one.base_digest or one.digest, two.base_digest or two.digest)
    if not first.engine.adapter and not second.engine.adapter:
        return Way("adapter", False, "neither is an adapter")
    if bases[0] != bases[1]:
        return Way("adapter", False, "they stand on different base weights")
    if first.engine.args != second.engine.args:
        return Way("adapter", False, "their engines have other settings")
    return Way("adapter", True, "they stand on the same base weights: one engine can serve both")


def _cold(second: Side) -> Way:
    if second.state == "rejected":
        return Way("cold", False, f"{second.version} can't be served: {second.reason}")
    return Way("cold", True, "a new engine, beside the old one")
