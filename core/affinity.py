"""Which instance keeps the prompts that begin alike: pure arithmetic, the same in every gateway.

A prompt's beginning falls into one of a few hundred places, and each place ranks the instances by a hash of its own
(rendezvous hashing). So an instance that comes or goes moves only the prompts that it gets or had. Knows no load: who
is busy is the caller's business.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PLACES = 256


class Affinity:
    """The ranks of one set of instances, compiled: a lookup is one checksum."""

    __slots__ = ("_ranked",)

    def __init__(self, instances: Sequence[str]) -> None:
        """Rank. ``instances``: at least two names."""
        self._ranked: list[tuple[int, int]] = []
        for place in range(PLACES):
            scores = [hashlib.blake2b(f"{place}:{name}".encode(), digest_size=8).digest() for name in instances]
            first, second, *_ = sorted(range(len(instances)), key=scores.__getitem__)
            self._ranked.append((first, second))

    def of(self, prefix: bytes) -> tuple[int, int]:
        """The instance for a prompt with this beginning and the one for when that is busy, as indexes."""
        return self._ranked[zlib.crc32(prefix) % PLACES]
