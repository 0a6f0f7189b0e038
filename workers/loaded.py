"""What is loaded, where, and until when it is kept: from the views and from what gateways say. Knows no terminal."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from turnout.events import subjects
from turnout.projections.fleet import WorkerView
from turnout.projections.registry import ModelView
from turnout.projections.routing import RouteView

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turnout.core.sagas.demand import Use
    from turnout.projections.fleet import InstanceView


class Loaded(msgspec.Struct, frozen=True):
    """An instance, or a model at zero (without one).

    Attributes:
        model, version: what it is; ``worker`` where it is, empty at zero.
        phase: requested, loading (with its stage), ready, sleeping, asleep, waking or draining; ``zero`` for nothing
            loaded.
        tier: how it was made ready the last time: cold, spare, adapter or wake; empty before that.
        level: of its sleep (1: its weights are in host memory; 2: they are dropped); 0 where it is awake.
        bytes: of the host, as measured last; None where it is not known.
        load_s: how long it took to load; None where it is not known.
        in_flight: requests; None where the gateways have not said.
        kept_until: UTC; None where ``kept`` says why there is no such time.
        kept: ``for ever``, ``in use``, ``until``, ``leaving``, ``while there is room``, ``asked for``,
            ``loaded when asked for`` or ``woken when asked for``.
    """

    model: str
    version: str
    instance: str
    worker: str
    phase: str
    tier: str
    level: int
    bytes: int | None
    load_s: float | None
    in_flight: int | None
    kept: str
    kept_until: datetime | None = None


def loaded(found: Mapping[str, Any], uses: Mapping[str, Use], now: datetime) -> list[Loaded]:
    """Every instance that has not ended, then the models that are at zero."""
    models = {view.model: view for view in found.values() if isinstance(view, ModelView)}
    lines = [
        _instance(one, worker.worker, models.get(one.model), found, uses.get(one.model), now)
        for worker in found.values()
        if isinstance(worker, WorkerView)
        for one in worker.instances.values()
    ]
    here = {(line.model, line.version) for line in lines}
    for name, view in models.items():
        if view.serving.on_demand and view.active and (name, view.active) not in here:
            kept = "asked for" if view.wanted else "loaded when asked for"
            lines.append(Loaded(name, view.active, "", "", "zero", "", 0, None, None, None, kept))
    return sorted(lines, key=lambda line: (line.model, line.version, line.instance))


def _instance(
    one: InstanceView, worker: str, view: ModelView | None, found: Mapping[str, Any], use: Use | None, now: datetime
) -> Loaded:
    route = found.get(subjects.view_key("route", one.model))
    splits = route.splits if isinstance(route, RouteView) else ()
    routed = any(endpoint.instance == one.instance for split in splits for endpoint in split.endpoints)
    kept, until = "for ever", None
    if one.phase == "draining":
        kept = "leaving"
    elif one.phase == "asleep" and view is not None and view.serving.on_demand and one.version == view.active:
        kept = "woken when asked for"
    elif view is not None and one.phase in ("ready", "sleeping", "asleep") and not routed:
        kept = "while there is room"
    elif view is not None and view.serving.on_demand and one.version == view.active and one.phase == "ready":
        keep_s = view.serving.keep_alive_s
        if keep_s >= 0 and use is not None:
            kept = "in use" if use.in_flight else "until"
            until = None if use.in_flight else now + timedelta(seconds=max(0.0, keep_s - use.idle_s))
    phase = f"{one.phase} ({one.stage})" if one.stage else one.phase
    in_flight = use.in_flight if use is not None and routed else None
    return Loaded(
        one.model,
        one.version,
        one.instance,
        worker,
        phase,
        one.tier,
        one.level if one.phase in ("sleeping", "asleep", "waking") else 0,
        one.bytes or None,
        one.load_s or None,
        in_flight,
        kept,
        until,
    )
