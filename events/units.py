"""Figures as people read them. Knows no event."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes with a binary unit: ``812 MiB``, ``3 KiB``."""
    if abs(count) >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if abs(count) >= 2**20 or not count else f"{count / 2**10:.0f} KiB"
