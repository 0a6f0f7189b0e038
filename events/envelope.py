"""What stands around an event: who, why, when, after what. Travels in headers, not in the body.

Two headers are stored with every event: ``Turnout-Type`` (readable by any tool that filters) and ``Turnout-Envelope``
(one JSON object). One object instead of a header for each field, because a client parses headers line by line and that
is what bounds the speed of a replay. The digest of an event covers everything that is stored of it; each event carries
the digest of the one before it on its subject, so that a changed, removed or inserted event breaks the chain.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

import msgspec

TYPE_HEADER = "Turnout-Type"
ENVELOPE_HEADER = "Turnout-Envelope"


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """The fields that travel with one event.

    Attributes:
        id: ``<command id>:<n>``, n counting the events of one command: the same command makes the same ids.
        version: version of the event type.
        command: id of the command that caused it; it takes effect once.
        actor: who asked (``ops:alice``, ``gateway:g1``, ``controller``).
        causation: id of the event or command that led to the command.
        correlation: what belongs together, e.g. the switch id.
        time: UTC, from the one clock of the process that wrote it.
        epoch: fencing number of the leader's lease, 0 where no leader was needed.
        previous: digest of the previous event on the subject, empty for the first.
        software: version of turnout that wrote it.
    """

    id: str
    version: int
    command: str
    actor: str
    causation: str
    correlation: str
    time: datetime
    epoch: int
    previous: str
    software: str


class Position(msgspec.Struct, frozen=True, gc=False):
    """Where a subject's history ends: its last stream sequence and that event's digest."""

    sequence: int
    digest: str


START = Position(0, "")


class Unknown(msgspec.Struct, frozen=True, gc=False):
    """An event of a type or version that this software does not know. Kept as it is; folds skip it."""

    type: str
    version: int
    body: bytes


class Recorded(msgspec.Struct, frozen=True, gc=False):
    """One stored event: where it stands, what it says, and the stored bytes that the digest covers."""

    subject: str
    sequence: int
    type: str
    event: object
    envelope: Envelope
    raw_envelope: bytes
    body: bytes

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what is stored: subject, type, envelope and body, each preceded by its length."""
        return digest(self.subject, self.type, self.raw_envelope, self.body)

    @property
    def position(self) -> Position:
        """The subject's position after this event."""
        return Position(self.sequence, self.digest)


def digest(subject: str, type: str, raw_envelope: bytes, body: bytes) -> str:
    """SHA-256 (hex) over the four parts, each preceded by its length in decimal and a colon."""
    sha = hashlib.sha256()
    for part in (subject.encode(), type.encode(), raw_envelope, body):
        sha.update(b"%d:" % len(part))
        sha.update(part)
    return sha.hexdigest()
