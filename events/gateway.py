"""Facts of one gateway process: which route revisions it applied, which versions it has drained.

Names here are storage format.
"""

from __future__ import annotations

import msgspec


class GatewayJoined(msgspec.Struct, frozen=True, gc=False):
    """A gateway process will take requests; from now on its acknowledgements are awaited. ``address``: its URL."""

    gateway: str
    address: str


class RouteApplied(msgspec.Struct, frozen=True, gc=False):
    """Every request that the gateway takes from now on is routed by this revision or a later one."""

    gateway: str
    model: str
    revision: int


class VersionDrained(msgspec.Struct, frozen=True, gc=False):
    """The gateway routes by ``revision`` or later, none of which names the version; its last request has ended.

    ``ended`` counts requests that had to be ended with an error because the drain's time was up.
    """

    gateway: str
    model: str
    version: str
    revision: int
    ended: int = 0


class GatewayLost(msgspec.Struct, frozen=True, gc=False):
    """No sign of life for ``silent_s`` seconds: not awaited any more. It may still serve by its last route."""

    gateway: str
    silent_s: float


class GatewayLeft(msgspec.Struct, frozen=True, gc=False):
    """The gateway finished its last request and stopped."""

    gateway: str


GatewayEvent = GatewayJoined | RouteApplied | VersionDrained | GatewayLost | GatewayLeft
