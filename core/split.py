"""Which version a request gets: key → bucket → version. Pure arithmetic; knows no request and no instance.

Each version has one run of neighbouring buckets out of 10 000, in the order of the versions' names. So the shares are
exact, the order in which a route lists its splits does not matter, and where two versions share the traffic (every
switch) a growing weight takes buckets from one end of the other's run: a key moves to the version that grows, never
back and forth. With three or more versions a key may also move between two neighbours when a third one grows.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence  # noqa: TC003  part of a public signature

from turnout.events.route import Split  # noqa: TC001  part of a public signature

BUCKETS = 10_000
#: A sticky user's number in samples of health is its cell: all cells of a bucket are of one version.
CELLS = 8 * BUCKETS

# The golden ratio's fraction in 64 bits: its multiples fill the buckets evenly from the first request on (Weyl's
# additive recurrence), so that 1 % is one request in about a hundred and not a run of luck.
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class SplitTable:
    """The weights of one revision, compiled: a lookup costs one hash and one bisection."""

    __slots__ = ("_bounds", "_salted", "versions")

    def __init__(self, splits: Sequence[Split], salt: str) -> None:
        """Compile.

        Args:
            splits: versions with a weight of 0 get no bucket; at least one has a weight.
            salt: what makes this split independent of others (the switch id).
        """
        weighted = sorted((split.version, split.weight) for split in splits if split.weight > 0)
        total = sum(weight for _, weight in weighted)
        if not weighted:
            raise ValueError("no version has a weight")
        self.versions = tuple(version for version, _ in weighted)
        reached, bounds = 0.0, list[int]()
        for _, weight in weighted[:-1]:
            reached += weight
            bounds.append(round(reached / total * BUCKETS))
        self._bounds = bounds
        self._salted = _salted(salt)

    def bucket(self, key: bytes) -> int:
        """The key's bucket under this salt."""
        return _number(self._salted, key) % BUCKETS

    def version_at(self, bucket: int) -> str:
        """The version that owns the bucket."""
        return self.versions[bisect_right(self._bounds, bucket)]

    def version(self, key: bytes) -> str:
        """The version of a sticky key."""
        return self.version_at(self.bucket(key))


def choose(splits: Sequence[Split], salt: str, key: bytes) -> str:
    """The version of a sticky key. For one question; whoever asks often keeps a :class:`SplitTable`.

    >>> from turnout.events.route import Split
    >>> choose((Split("v1", 100.0, ()), Split("v2", 0.0, ())), "sw-1", b"alice")
    'v1'
    """
    return SplitTable(splits, salt).version(key)


class Cells:
    """Sticky key → cell under one salt: ``cell % BUCKETS`` is the key's bucket."""

    __slots__ = ("_salted",)

    def __init__(self, salt: str) -> None:
        self._salted = _salted(salt)

    def of(self, key: bytes) -> int:
        """The key's cell, below CELLS."""
        return _number(self._salted, key) % CELLS


class Spread:
    """Buckets for requests without a key: evenly spread, whatever the number of requests.

    ``seed`` in [0, 1) sets the start, so that several gateways are not in step.
    """

    __slots__ = ("_state",)

    def __init__(self, seed: float) -> None:
        self._state = int(seed * (1 << 64)) & _MASK

    def bucket(self) -> int:
        """The next one."""
        self._state = (self._state + _GOLDEN) & _MASK
        return self._state * BUCKETS >> 64


def _salted(salt: str) -> hashlib.blake2b:
    # The length before the salt keeps ("ab", "c") and ("a", "bc") apart.
    return hashlib.blake2b(b"%d:" % len(salt.encode()) + salt.encode(), digest_size=8)


def _number(salted: hashlib.blake2b, key: bytes) -> int:
    hashed = salted.copy()
    hashed.update(key)
    return int.from_bytes(hashed.digest(), "little")
