"""Event struct ↔ stored bytes. One table of types; keeps what it does not know. Knows nothing of transport."""

from __future__ import annotations

from datetime import datetime
from typing import get_args

import msgspec

from turnout.events import alert, gateway, instance, model, route, switch, upcast, worker
from turnout.events.envelope import Envelope, Position, Recorded, Unknown
from turnout.events.version import VERSION

_UNIONS = (
    model.ModelEvent,
    switch.SwitchEvent,
    instance.InstanceEvent,
    worker.WorkerEvent,
    gateway.GatewayEvent,
    alert.AlertEvent,
)

_MEMBERS: tuple[type[msgspec.Struct], ...] = (
    *(member for union in _UNIONS for member in get_args(union)),
    route.RouteChanged,
)

#: Every event type by the name that is stored.
TYPES: dict[str, type[msgspec.Struct]] = {member.__name__: member for member in _MEMBERS}

_encoder = msgspec.json.Encoder()
_envelope_decoder = msgspec.json.Decoder(Envelope)
_decoders = {name: msgspec.json.Decoder(t) for name, t in TYPES.items()}
_current = {name: upcast.CURRENT.get(name, 1) for name in TYPES}


class Damaged(msgspec.DecodeError):
    """A stored event cannot be read; the message names its subject and sequence. ``turnout verify`` checks the log."""


class Context(msgspec.Struct, frozen=True):
    """What the events of one command have in common. See :class:`Envelope` for the fields."""

    command: str
    actor: str
    causation: str
    correlation: str
    time: datetime
    epoch: int = 0


def record(subject: str, event: object, context: Context, n: int, previous: Position) -> tuple[str, bytes, bytes]:
    """Make the stored parts of the n-th event of a command: type name, envelope bytes and body bytes."""
    name = type(event).__name__
    if name not in TYPES:
        raise TypeError(f"{name} is not a turnout event (see events/codec.py)")
    envelope = Envelope(
        id=f"{context.command}:{n}",
        version=_current[name],
        command=context.command,
        actor=context.actor,
        causation=context.causation,
        correlation=context.correlation,
        time=context.time,
        epoch=context.epoch,
        previous=previous.digest,
        software=VERSION,
    )
    return name, _encoder.encode(envelope), _encoder.encode(event)


def decode(subject: str, sequence: int, name: str, raw_envelope: bytes, body: bytes) -> Recorded:
    """Read one stored event, upcast to the current version of its type.

    Raises:
        Damaged: the envelope or a known body is damaged; the message names subject and sequence.
    """
    try:
        envelope = _envelope_decoder.decode(raw_envelope)
        decoder = _decoders.get(name)
        event: object
        if decoder is None or envelope.version > _current[name]:
            event = Unknown(name, envelope.version, body)
        elif envelope.version < _current[name]:
            event = msgspec.convert(upcast.upcast(name, envelope.version, msgspec.json.decode(body)), TYPES[name])
        else:
            event = decoder.decode(body)
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError) as e:  # an upcast of a damaged body may raise any
        raise Damaged(f"event {sequence} on {subject} ({name}) cannot be read: {e}") from e
    return Recorded(subject, sequence, name, event, envelope, raw_envelope, body)
