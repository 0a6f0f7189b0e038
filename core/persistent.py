"""An immutable map whose next version costs one entry, however large it is. Knows nothing of what it holds.

A state that evolves by copying a dict pays for all that the dict has ever collected, at every event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

K = TypeVar("K")
V = TypeVar("V")
D = TypeVar("D")

_NONE: Any = object()


class PersistentMap(msgspec.Struct, Generic[K, V], eq=False):
    """A map that never changes: ``plus`` and ``minus`` make new ones.

    All versions share one dict, and it belongs to the newest. An older version holds how it differs from the next one;
    if it is asked all the same, it first makes a dict of its own (Baker, "Shallow binding makes functional arrays
    fast", 1991). So a fold, which only asks its newest state, pays one entry for each event. Whoever keeps an old
    version keeps what came after it in memory, too.
    """

    _entries: dict[K, V] | None = {}  # None in an older version,
    _undo: tuple[PersistentMap[K, V], K, V] | None = None  # which has this: the next one, the key that it changed, from

    def plus(self, key: K, value: V) -> PersistentMap[K, V]:
        """With this value under the key."""
        entries = self._entries
        if entries is None:
            entries = self._own()
        if not entries:  # the empty map that all states begin with must not hold on to any of them
            return PersistentMap({key: value})
        newer = PersistentMap(entries)
        before: Any = entries.get(key, _NONE)
        self._entries, self._undo = None, (newer, key, before)
        entries[key] = value
        return newer

    def minus(self, key: K) -> PersistentMap[K, V]:
        """Without the key; itself where it has none."""
        entries = self._entries
        if entries is None:
            entries = self._own()
        if key not in entries:
            return self
        newer = PersistentMap(entries)
        self._entries, self._undo = None, (newer, key, entries.pop(key))
        return newer

    @overload
    def get(self, key: K, /) -> V | None: ...
    @overload
    def get(self, key: K, default: V | D, /) -> V | D: ...
    def get(self, key: K, default: V | D | None = None, /) -> V | D | None:
        """The key's value, ``default`` where it has none."""
        entries = self._entries
        if entries is None:
            entries = self._own()
        return entries.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._own()

    def __iter__(self) -> Iterator[K]:
        return iter(tuple(self._own()))

    def __len__(self) -> int:
        return len(self._own())

    def __eq__(self, other: object) -> bool:
        """Equal to any map with the same entries, in whatever order."""
        return self._own() == (other._own() if isinstance(other, PersistentMap) else other)

    __hash__ = None  # type: ignore[assignment]  # as a dict

    def __repr__(self) -> str:
        return f"PersistentMap({self._own()!r})"

    def _own(self) -> dict[K, V]:
        """The dict of this very version."""
        if self._entries is not None:
            return self._entries
        changes: list[tuple[K, V]] = []
        version: PersistentMap[K, V] = self
        while version._undo is not None:
            version, key, value = version._undo
            changes.append((key, value))
        entries = dict(version._entries or {})
        for key, value in reversed(changes):
            if value is _NONE:
                del entries[key]
            else:
                entries[key] = value
        self._entries, self._undo = entries, None
        return entries
