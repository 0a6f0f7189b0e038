"""The one clock and the one id source of a process. The only place that reads time or draws randomness.

``now`` is the wall clock of the process's start plus what the monotonic clock has counted since: a clock that is set
back or forth under a running process moves nothing.
"""

from __future__ import annotations

import random
import secrets
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Time and ids, so that a simulation can replace them."""

    def now(self) -> datetime:
        """UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds, never going back."""
        ...

    def id(self, prefix: str = "") -> str:
        """A new id, never used before; starts with the prefix."""
        ...

    def jitter(self) -> float:
        """A number in [0, 1), to keep retries of several processes apart."""
        ...


class SystemClock:
    """The clock of the machine."""

    #: Seconds, never going back. The function itself, because a gateway asks it several times for each request.
    monotonic = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._wall = datetime.now(UTC)
        self._mono = time.monotonic()

    def now(self) -> datetime:
        """UTC, free of jumps for the life of the process."""
        return self._wall + timedelta(seconds=time.monotonic() - self._mono)

    def id(self, prefix: str = "") -> str:
        """48 random bits in hex after the prefix, e.g. ``sw-3f9a0c12b7de``: short enough to type."""
        return prefix + uuid.uuid4().hex[:12]

    def jitter(self) -> float:
        """A number in [0, 1)."""
        return random.random()  # noqa: S311  jitter, no secret


def secret() -> str:
    """A new token that nobody can guess: 256 random bits in characters that stand in any header."""
    return secrets.token_urlsafe(32)
