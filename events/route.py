"""Facts of one model's routing table. Names here are storage format."""

from __future__ import annotations

import msgspec


class Endpoint(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One proven instance.

    ``address``: ``unix:/run/i.sock`` or ``http://host:port``, with an optional base path. ``served``: name that
    requests must carry there, where several versions share the engine; empty for the model's own.
    """

    instance: str
    address: str
    served: str = ""


class Split(msgspec.Struct, frozen=True, gc=False):
    """A version's share. ``weight`` in percent; 0 keeps the version at hand for retries, without traffic of its own."""

    version: str
    weight: float
    endpoints: tuple[Endpoint, ...]


class Rule(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Chooses by the input, before the split. The first rule of a model that applies decides; none: the split does.

    Attributes:
        name: for people and headers, unique in its model.
        when: CEL expression over the request (see core/rules.py); true where the rule applies.
        version: send it to this version, which is kept loaded for it; empty for one of the other two.
        model: send it by another model's route instead.
        candidate: only such requests take part in a running switch's split; while a model has a rule of this kind all
            others stay on the source until the target has all the traffic.
        percent: of the requests to which it applies (by their sticky key); the others go on to the next rule.
    """

    name: str
    when: str
    version: str = ""
    model: str = ""
    candidate: bool = False
    percent: float = 100.0


class Mirror(msgspec.Struct, frozen=True, gc=False):
    """Copies of ``percent`` of the requests go to ``version``; what it answers reaches nobody."""

    version: str
    percent: float
    endpoints: tuple[Endpoint, ...]


class Hold(msgspec.Struct, frozen=True, gc=False):
    """What a gateway does with a request while no version in the route has an instance: it waits, within these bounds.

    Attributes:
        queue: requests that may wait in each gateway.
        wait_s: seconds that each of them waits at most.
        wake: the model is loaded on demand: ask for it when a request waits.
        failed: loads that have failed in a row; one more ends the wait of those that wait.
        reason: why the newest of them failed.
    """

    queue: int
    wait_s: float
    wake: bool = False
    failed: int = 0
    reason: str = ""


class RouteChanged(msgspec.Struct, frozen=True, gc=False):
    """The whole table of one model from ``revision`` on. Weights are percent and add up to 100, or there is no split.

    Attributes:
        model: the served name.
        revision: grows by one.
        splits: every version that may get a request; what is absent drains.
        salt: salt of the sticky split (the switch id).
        drain_s: seconds that requests on an absent version may still run.
        cause: switch id, or ``repair`` where instances came or went or rules were set.
        rules: in the order in which they are asked.
        mirrors: whom to send copies to.
        candidate: version of the running switch's target; empty where none runs.
        hold: where requests wait while there is no instance; None where they are refused.
    """

    model: str
    revision: int
    splits: tuple[Split, ...]
    salt: str
    drain_s: float
    cause: str
    rules: tuple[Rule, ...] = ()
    mirrors: tuple[Mirror, ...] = ()
    candidate: str = ""
    hold: Hold | None = None


RouteEvent = RouteChanged
