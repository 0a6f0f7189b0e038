"""The only place where a NATS subject is spelled or parsed. Knows names, not connections.

Served names may hold characters that a subject token may not (``.``, ``/``, blanks): every byte outside
``A-Za-z0-9_-`` is written ``=XX`` (hex), which the key rules of NATS buckets allow as well.
"""

from __future__ import annotations

import re

EVENTS = "turnout.evt"
COMMANDS = "turnout.cmd"
BEATS = "turnout.beat"
HEALTH = "turnout.health"
VIEWS = "$KV.VIEWS"
LIVE_VIEWS = "turnout.view"
ROUTE_NEWS = "turnout.route"
LEASES = "$KV.LEASES"
AGGREGATES = ("model", "switch", "route", "instance", "worker", "gateway", "alert")

_PLAIN = re.compile(rb"[A-Za-z0-9_-]")
_ESCAPE = re.compile(r"=([0-9A-F]{2})")


def token(name: str) -> str:
    """Write any name as one subject token.

    >>> token("meta-llama/Llama-3.1-8B")
    'meta-llama=2FLlama-3=2E1-8B'
    """
    if not name:
        raise ValueError("an empty name has no subject token")
    raw = name.encode()
    return "".join(chr(b) if _PLAIN.match(bytes((b,))) else f"={b:02X}" for b in raw)


def name(token: str) -> str:
    """Read a subject token back. The inverse of :func:`token`."""
    return _ESCAPE.sub(lambda m: chr(int(m[1], 16)), token).encode("latin-1").decode()


def event(aggregate: str, id: str) -> str:
    """Subject of one aggregate's events, e.g. ``turnout.evt.model.chat``."""
    return f"{EVENTS}.{aggregate}.{token(id)}"


def parse_event(subject: str) -> tuple[str, str]:
    """Aggregate type and id of an event subject."""
    _, _, aggregate, id = subject.split(".")
    return aggregate, name(id)


def command(role: str, verb: str) -> str:
    """Subject of a command, e.g. ``turnout.cmd.ops.switch.start`` for role ``ops`` and verb ``switch.start``."""
    return f"{COMMANDS}.{role}.{verb}"


def parse_command(subject: str) -> tuple[str, str]:
    """Role and verb of a command subject."""
    role, _, verb = subject.removeprefix(f"{COMMANDS}.").partition(".")
    return role, verb


def beat(kind: str, id: str) -> str:
    """Subject of the signs of life of one worker or gateway, e.g. ``turnout.beat.gateway.g1``."""
    return f"{BEATS}.{kind}.{token(id)}"


def parse_beat(subject: str) -> tuple[str, str]:
    """Kind and id of a beat's subject."""
    _, _, kind, id = subject.split(".")
    return kind, name(id)


def view(key: str) -> str:
    """Bucket subject of a view key, e.g. ``$KV.VIEWS.route.chat``."""
    return f"{VIEWS}.{key}"


def live_view(key: str) -> str:
    """Where the server republishes a view as soon as it is stored, e.g. ``turnout.view.route.chat``."""
    return f"{LIVE_VIEWS}.{key}"


def route_news(model: str) -> str:
    """Where the leader tells gateways of a route before it is stored as a view, e.g. ``turnout.route.chat``."""
    return f"{ROUTE_NEWS}.{token(model)}"


def view_key(kind: str, id: str) -> str:
    """Key of a view, e.g. ``route.chat``."""
    return f"{kind}.{token(id)}"


def parse_view_key(key: str) -> tuple[str, str]:
    """Kind and id of a view key."""
    kind, _, id = key.partition(".")
    return kind, name(id)


def lease(role: str) -> str:
    """Bucket subject of a lease, e.g. ``$KV.LEASES.controller``."""
    return f"{LEASES}.{role}"


def health(model: str, version: str) -> str:
    """Subject of the samples of one version, e.g. ``turnout.health.chat.v2``."""
    return f"{HEALTH}.{token(model)}.{token(version)}"
