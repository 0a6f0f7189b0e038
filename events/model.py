"""Facts of one model: its versions, what it serves, what is known to be good, which switch holds it.

A model's stream also carries the reservation that keeps switches apart: ``SwitchAdmitted`` and ``SwitchClosed`` are
written in the same atomic batch as the first and the last event of the switch. Names here are storage format.
"""

from __future__ import annotations

import msgspec

from turnout.events.route import Rule


class Probe(msgspec.Struct, frozen=True, omit_defaults=True):
    """The golden request that proves an instance of a version through its real API.

    Attributes:
        path: path under the engine's address, e.g. ``/v1/completions``; empty means the engine kind's own choice.
        body: JSON object to post; empty means the engine kind's own choice. ``model`` is filled in by the worker.
        expect: text that the answer must contain; empty means any sane answer (not empty, not looping).
    """

    path: str = ""
    body: dict[str, object] = {}
    expect: str = ""


class EngineSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a version is run. Immutable: a change is a new version.

    Attributes:
        kind: engine adapter, one of ``vllm``, ``openai``, ``fake``.
        path: folder of the weights on the worker's host; empty where the kind needs none.
        url: address of a server that runs already (kind ``openai``), e.g. ``http://127.0.0.1:8000``.
        command: argv of a server to start (kind ``openai``); ``{socket}``, ``{port}`` and ``{model}`` are filled in.
        args: further flags for the engine, one word each.
        probe: how an instance is proven before it gets traffic.
    """

    kind: str
    path: str = ""
    url: str = ""
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    probe: Probe = Probe()


class ModelRegistered(msgspec.Struct, frozen=True, gc=False):
    """A served name exists from now on."""

    model: str


class VersionRegistered(msgspec.Struct, frozen=True):
    """An immutable version was added. ``digest`` is the SHA-256 of the canonical JSON of ``engine``."""

    model: str
    version: str
    engine: EngineSpec
    digest: str
    note: str = ""


class VersionDeregistered(msgspec.Struct, frozen=True, gc=False):
    """A version may not be used any more."""

    model: str
    version: str


class SwitchAdmitted(msgspec.Struct, frozen=True, gc=False):
    """A switch holds the model: no other may start until it is closed."""

    model: str
    switch: str
    target: str


class SwitchClosed(msgspec.Struct, frozen=True, gc=False):
    """The switch let go of the model. ``outcome``: completed, rolled_back, aborted or failed."""

    model: str
    switch: str
    outcome: str


class ActiveVersionChanged(msgspec.Struct, frozen=True, gc=False):
    """The version that the model serves when no switch runs."""

    model: str
    version: str
    previous: str
    switch: str


class KnownGoodMarked(msgspec.Struct, frozen=True, gc=False):
    """The version finished its bake: the newest such version is what an undo returns to."""

    model: str
    version: str
    switch: str


class KnownGoodRevoked(msgspec.Struct, frozen=True, gc=False):
    """An operator undid this version: an undo does not return to it any more."""

    model: str
    version: str
    switch: str


class PolicyChanged(msgspec.Struct, frozen=True):
    """A named way to switch, for later switches: ``policy`` as it was given, checked. Empty takes the name away."""

    model: str
    name: str
    policy: dict[str, object]


class RulesChanged(msgspec.Struct, frozen=True):
    """The model's rules, all of them, in their order."""

    model: str
    rules: tuple[Rule, ...]


ModelEvent = (
    ModelRegistered
    | VersionRegistered
    | VersionDeregistered
    | SwitchAdmitted
    | SwitchClosed
    | ActiveVersionChanged
    | KnownGoodMarked
    | KnownGoodRevoked
    | PolicyChanged
    | RulesChanged
)
