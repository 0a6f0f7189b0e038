"""Who is alive: beats heard by this process, and whom the log believes alive without any. Time comes by the clock.

Beats of gateways also say what is in flight; that is for people to see, and decides nothing.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from turnout.core.gateway import LoseGateway
from turnout.core.sagas.owed import Owed, Write
from turnout.core.worker import LoseWorker
from turnout.events import subjects
from turnout.workers.ports import GatewayBeat

if TYPE_CHECKING:
    from turnout.core.world import World
    from turnout.workers.clock import Clock

#: Seconds without a beat after which a process is not awaited any more. Beats come every second; several may be lost
#: on a crowded machine before anything is decided.
GATEWAY_LEASE_S = 6.0
WORKER_LEASE_S = 10.0


class Liveness:
    """Remembers when each worker and gateway was last heard of."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard: dict[tuple[str, str], float] = {}
        #: Since when the log, as this leader reads it, takes each of them for alive: a joining is a sign of life.
        self._live: dict[tuple[str, str], float] = {}
        #: What each gateway said last.
        self._said: dict[str, GatewayBeat] = {}

    def heard(self, kind: str, id: str, body: bytes) -> None:
        """A beat came."""
        self._heard[kind, id] = self._clock.monotonic()
        if kind == "gateway":
            with suppress(msgspec.MsgspecError):  # a gateway of another version: it lives, and that is what counts
                self._said[id] = msgspec.json.decode(body, type=GatewayBeat)

    def in_flight(self, model: str) -> dict[str, int]:
        """Version → requests in flight at all gateways that were heard of within their lease, by their newest beats."""
        since = self._clock.monotonic() - GATEWAY_LEASE_S
        self._said = {id: beat for id, beat in self._said.items() if self._heard.get(("gateway", id), 0.0) >= since}
        found: dict[str, int] = {}
        for beat in self._said.values():
            for version, count in beat.in_flight.get(model, {}).items():
                found[version] = found.get(version, 0) + count
        return found

    def restart(self) -> None:
        """Give everybody a full lease from now on: called when this process begins to lead."""
        self._live.clear()

    def owed(self, world: World) -> tuple[Owed, ...]:
        """Loss reports of those that the log believes alive and that were silent for a whole lease."""
        now = self._clock.monotonic()
        live = [("gateway", id) for id in sorted(world.live_gateways)]
        live += [("worker", id) for id, worker in sorted(world.workers.items()) if worker.live]
        self._live = {key: self._live.get(key, now) for key in live}
        recent = now - WORKER_LEASE_S  # each start has a new id: old ones are of no use
        self._heard = {key: at for key, at in self._heard.items() if key in self._live or at >= recent}
        owed: list[Owed] = []
        for kind, id in live:
            silent_s = round(now - max(self._live[kind, id], self._heard.get((kind, id), 0.0)), 3)
            if kind == "gateway" and silent_s > GATEWAY_LEASE_S:
                owed.append(self._lost(world, kind, id, LoseGateway(id, silent_s)))
            elif kind == "worker" and silent_s > WORKER_LEASE_S:
                owed.append(self._lost(world, kind, id, LoseWorker(id, silent_s)))
        return tuple(owed)

    def _lost(self, world: World, kind: str, id: str, command: object) -> Owed:
        last = world.last_event(subjects.event(kind, id))
        return Owed(f"lost.{last}", (Write(kind, id, command),), id)
