"""Facts of one model's routing table. Names here are storage format."""

from __future__ import annotations

import msgspec


class Endpoint(msgspec.Struct, frozen=True, gc=False):
    """One proven instance. ``address``: ``unix:/run/i.sock`` or ``http://host:port``, with an optional base path."""

    instance: str
    address: str


class Split(msgspec.Struct, frozen=True, gc=False):
    """A version's share. ``weight`` in percent; 0 keeps the version at hand for retries, without traffic of its own."""

    version: str
    weight: float
    endpoints: tuple[Endpoint, ...]


class RouteChanged(msgspec.Struct, frozen=True, gc=False):
    """The whole table of one model from ``revision`` on. Weights are percent and add up to 100, or there is no split.

    Attributes:
        model: the served name.
        revision: grows by one.
        splits: every version that may get a request; what is absent drains.
        salt: salt of the sticky split (the switch id).
        drain_s: seconds that requests on an absent version may still run.
        cause: switch id, or ``repair`` where instances came or went.
    """

    model: str
    revision: int
    splits: tuple[Split, ...]
    salt: str
    drain_s: float
    cause: str


RouteEvent = RouteChanged
