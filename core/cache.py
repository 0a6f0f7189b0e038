"""Which idle instances a worker may keep: a choice over numbers. Knows no process and no device."""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec


class Idle(msgspec.Struct, frozen=True):
    """A ready instance that no route uses. ``since``: UTC, when it was last used. ``protected``: an undo goes there."""

    instance: str
    worker: str
    since: datetime
    protected: bool


def evict(idle: tuple[Idle, ...], now: datetime, most: int, ttl_s: float) -> dict[str, str]:
    """Choose what leaves: instance → reason. Least recently used first; what an undo needs goes last.

    Args:
        idle: all idle instances of all workers.
        now: UTC.
        most: instances kept on each worker.
        ttl_s: seconds after which an idle instance leaves in any case.
    """
    leaving: dict[str, str] = {}
    kept: dict[str, list[Idle]] = {}
    for one in sorted(idle, key=lambda i: (i.protected, i.since, i.instance), reverse=True):
        if now - one.since >= timedelta(seconds=ttl_s):
            leaving[one.instance] = f"idle for {ttl_s:g} s (model_ttl_seconds)"
        elif len(kept.setdefault(one.worker, [])) >= most:
            leaving[one.instance] = f"least recently used of more than {most} (max_cached_models)"
        else:
            kept[one.worker].append(one)
    return leaving
