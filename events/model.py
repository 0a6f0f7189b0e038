"""Facts of one model: its versions, what it serves, what is known to be good, which switch holds it.

A model's stream also carries the reservation that keeps switches apart: ``SwitchAdmitted`` and ``SwitchClosed`` are
written in the same atomic batch as the first and the last event of the switch. Names here are storage format.
"""

from __future__ import annotations

from datetime import datetime

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
        adapter: folder of a LoRA adapter on the worker's host, whose base is ``path``; empty for none.
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
    adapter: str = ""


class Inspection(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the files of a version say, read without loading them. All digests are SHA-256 (hex).

    Attributes:
        digest: of all content: the sorted list of (file name, bytes, SHA-256 of the file); an adapter's and its base's.
        weight_bytes: sum of the bytes of all tensors, of an adapter version's base.
        tensors: how many there are.
        architecture: first of ``architectures`` in config.json.
        dtype: in which most bytes of the weights are stored, e.g. ``bfloat16``.
        shape_digest: of what an engine keeps when new weights are put into it (configuration, tokenizer, chat template,
            sampling defaults): only versions with equal ones can follow each other in one engine.
        tensors_digest: of the names, types and shapes of all tensors.
        kv_token_bytes: of the key-value cache for one token; 0 where the configuration does not say.
        kv_bytes: of the whole key-value cache, by the version's settings.
        host_bytes: what a whole engine is expected to take in host memory; an estimate.
        adapter_rank: of the LoRA adapter, 0 for none, and ``adapter_bytes`` the sum of its tensors.
        base_digest: content of the weights that the adapter stands on; empty where there is no adapter.
        warnings: what is odd and does not speak against a try.
    """

    digest: str
    weight_bytes: int = 0
    tensors: int = 0
    architecture: str = ""
    dtype: str = ""
    shape_digest: str = ""
    tensors_digest: str = ""
    kv_token_bytes: int = 0
    kv_bytes: int = 0
    host_bytes: int = 0
    adapter_rank: int = 0
    adapter_bytes: int = 0
    base_digest: str = ""
    warnings: tuple[str, ...] = ()


class Contents(msgspec.Struct, frozen=True, omit_defaults=True):
    """What tells two versions apart, part by part. Digests are the first 16 hex digits of SHA-256.

    Attributes:
        layers: layer, or module outside of the layers → digest of its tensors; an adapter's, where there is one.
        config: setting of config.json → its value as JSON, cut where it is long.
        sampling: the same of generation_config.json: the engine's sampling defaults.
        tokenizer: digest of its files.
        template: digest of the chat template; empty where there is none.
    """

    layers: dict[str, str] = {}
    config: dict[str, str] = {}
    sampling: dict[str, str] = {}
    tokenizer: str = ""
    template: str = ""


class ModelRegistered(msgspec.Struct, frozen=True, gc=False):
    """A served name exists from now on."""

    model: str


class VersionRegistered(msgspec.Struct, frozen=True):
    """An immutable version was added.

    Attributes:
        digest: SHA-256 of the canonical JSON of ``engine``.
        note: why.
        tags: words to find it by.
        metrics: what was measured before it came here, e.g. an offline evaluation.
        parent: version that it was made from, empty for none.
        trust_architecture: an architecture that the engine does not name is tried all the same.
    """

    model: str
    version: str
    engine: EngineSpec
    digest: str
    note: str = ""
    tags: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    parent: str = ""
    trust_architecture: bool = False


class VersionValidated(msgspec.Struct, frozen=True):
    """A worker has read the version's files and found nothing that speaks against loading them.

    Views carry ``inspection``; ``contents`` stays in the log, where a comparison reads it.
    """

    model: str
    version: str
    worker: str
    inspection: Inspection
    contents: Contents = Contents()


class VersionRejected(msgspec.Struct, frozen=True):
    """The version's files can't be served: why, and what to do. It may be registered again once they can."""

    model: str
    version: str
    worker: str
    code: str
    reason: str
    hint: str = ""


#: Codes of a worker that can't look at a version's files: another one may.
UNSEEN = frozenset(("path_missing", "path_not_allowed", "engine_not_allowed"))


class VersionUnseen(msgspec.Struct, frozen=True):
    """A worker can't see the version's files, or may not; another one may."""

    model: str
    version: str
    worker: str
    code: str
    reason: str


class VersionDeregistered(msgspec.Struct, frozen=True, gc=False):
    """A version may not be used any more. ``reason``: why, where somebody said it."""

    model: str
    version: str
    reason: str = ""


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
    """The version that the model serves when no switch runs. ``switch`` is empty where no switch has led to it."""

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


class Serving(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether a model is always loaded, or only while somebody uses it.

    Attributes:
        on_demand: loaded when a request asks for it, which waits for it.
        keep_alive_s: seconds after the last byte of the last request until it is unloaded; 0 at once, -1 never.
        queue: requests that may wait in each gateway; more are refused.
        max_wait_s: seconds that a request waits at most.
        residency_s: seconds for which a loaded model is not unloaded for another one that is asked for.
    """

    on_demand: bool = False
    keep_alive_s: float = 300.0
    queue: int = 64
    max_wait_s: float = 120.0
    residency_s: float = 5.0


class ServingChanged(msgspec.Struct, frozen=True):
    """From now on the model is served like this."""

    model: str
    serving: Serving


class DemandSeen(msgspec.Struct, frozen=True, gc=False):
    """A request waits for a model that is served on demand: its active version is needed. ``gateway`` said so first."""

    model: str
    version: str
    gateway: str
    at: datetime


class DemandEnded(msgspec.Struct, frozen=True, gc=False):
    """A model that is served on demand is not needed any more, until the next request.

    ``cause``: ``idle`` (its keep_alive is over), ``room`` (another model is asked for) or ``failed`` (it can't be
    loaded; those who wait are told).
    """

    model: str
    version: str
    cause: str
    reason: str
    at: datetime


class VersionPinned(msgspec.Struct, frozen=True, gc=False):
    """The version's instances are kept whatever the cache says."""

    model: str
    version: str
    reason: str = ""


class VersionUnpinned(msgspec.Struct, frozen=True, gc=False):
    """The cache may let the version's instances go again."""

    model: str
    version: str


class PreloadRequested(msgspec.Struct, frozen=True, gc=False):
    """The version shall be loaded once there is room, before anybody switches to it.

    ``priority``: it makes room only at the cost of idle instances with a lower one. ``reason``: empty for an operator's
    wish, else what made turnout expect it.
    """

    model: str
    version: str
    priority: int
    at: datetime
    reason: str = ""


class PreloadEnded(msgspec.Struct, frozen=True, gc=False):
    """The wish is over. ``outcome``: ready, failed or withdrawn."""

    model: str
    version: str
    outcome: str
    reason: str = ""


class EvictionRequested(msgspec.Struct, frozen=True, gc=False):
    """Instances of the version that are idle at this time shall go; a wish to preload it is over."""

    model: str
    version: str
    at: datetime
    reason: str = ""


class ReplicasChanged(msgspec.Struct, frozen=True, gc=False):
    """How many instances the version has while it serves."""

    model: str
    version: str
    replicas: int


ModelEvent = (
    ModelRegistered
    | VersionRegistered
    | VersionValidated
    | VersionRejected
    | VersionUnseen
    | VersionDeregistered
    | SwitchAdmitted
    | SwitchClosed
    | ActiveVersionChanged
    | KnownGoodMarked
    | KnownGoodRevoked
    | PolicyChanged
    | RulesChanged
    | ServingChanged
    | DemandSeen
    | DemandEnded
    | VersionPinned
    | VersionUnpinned
    | PreloadRequested
    | PreloadEnded
    | EvictionRequested
    | ReplicasChanged
)
