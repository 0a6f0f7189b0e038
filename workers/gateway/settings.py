"""GatewaySettings: what an operator decides for one gateway process. Values only; workers/settings.py reads them."""

from __future__ import annotations

import math

import msgspec


class TimeLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long an engine may take, in seconds. A hung engine keeps its connections open: silence is the only sign.

    Attributes:
        first_byte_s: from sending the request to the first byte of the answer.
        between_s: between two reads of the answer, while the client takes what it gets.
        total_s: from the request to the last byte.
    """

    first_byte_s: float = 300.0
    between_s: float = 60.0
    total_s: float = 3600.0


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One gateway process.

    Attributes:
        host: address to listen on.
        port: 0 takes a free one.
        reuse_port: several processes share the port (``--processes``).
        max_body_bytes: larger requests are refused (413); a body is held in memory, so that it can be sent again.
        max_header_bytes: larger request heads are refused (431).
        max_connections: client connections; more are refused (503) and closed.
        header_s: from the first byte of a request to the end of its head.
        body_s: from the head to the last byte of the body.
        keep_alive_s: how long a client connection may idle.
        stalled_s: how long a client may take nothing while there is something to send.
        limits: what an engine may take.
        model_limits: the same for single models, by served name.
        connect_s: for a connection to an engine.
        pool_idle_s: how long an unused connection to an engine is kept; must stay below the engine's own keep-alive
            (75 s for the engines that turnout starts).
        pool_most: unused connections kept for each engine.
        sticky_header: request header whose value keeps a user on one version; without it ``user``,
            ``prompt_cache_key``, ``safety_identifier`` and the API key are looked at, in this order.
        allow_pin: clients may choose a version with ``x-turnout-version`` (testers); else the header is dropped.
        prefix_affinity: served names whose prompts that begin alike go to the same instance, so that it finds their
            beginning in its prefix cache, unless it has clearly more to do than the others.
        metrics: answer ``/metrics``.
        track_requests: answer ``/requests`` with a list of what is running.
        held_bytes: bodies of all requests that wait for a model to be loaded; more are refused (503).
        shutdown_s: how long running requests may go on after a stop was asked for.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    reuse_port: bool = False
    max_body_bytes: int = 32 * 1024 * 1024
    max_header_bytes: int = 64 * 1024
    max_connections: int = 20_000
    header_s: float = 15.0
    body_s: float = 300.0
    keep_alive_s: float = 75.0
    stalled_s: float = 300.0
    limits: TimeLimits = TimeLimits()
    model_limits: dict[str, TimeLimits] = {}
    connect_s: float = 5.0
    pool_idle_s: float = 60.0
    pool_most: int = 256
    sticky_header: str = ""
    allow_pin: bool = False
    prefix_affinity: tuple[str, ...] = ()
    metrics: bool = True
    track_requests: bool = True
    held_bytes: int = 256 * 1024 * 1024
    shutdown_s: float = 30.0

    def problems(self) -> tuple[str, ...]:
        """What can't be meant, one sentence each, naming the field."""
        found = [
            f"{field} is {value}: give a number above 0"
            for field in (
                "max_body_bytes",
                "max_header_bytes",
                "max_connections",
                "header_s",
                "body_s",
                "keep_alive_s",
                "stalled_s",
                "held_bytes",
                "connect_s",
                "pool_idle_s",
                "shutdown_s",
            )
            if not _positive(value := getattr(self, field))
        ]
        for name, limits in (
            ("limits", self.limits),
            *((f"model_limits.{m}", v) for m, v in self.model_limits.items()),
        ):
            found.extend(
                f"{name}.{field} is {value}: give a number of seconds above 0"
                for field in TimeLimits.__struct_fields__
                if not _positive(value := getattr(limits, field))
            )
        if not 0 <= self.port <= 65535:
            found.append(f"port is {self.port}: give 0 to 65535")
        if self.reuse_port and not self.port:
            found.append("several processes can't share port 0: name a port")
        return tuple(found)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
