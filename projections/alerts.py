"""View ``alert.<key>``: one alert as a person reads it. Also what was raised or resolved lately. No decisions."""

from __future__ import annotations

from collections import deque
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from turnout.events.alert import AlertAcknowledged, AlertRaised, AlertResolved
from turnout.projections.fold import Fold

if TYPE_CHECKING:
    from turnout.events.envelope import Recorded

#: Views of resolved alerts that are kept, the newest: keys may name processes, which come and go without end.
RESOLVED_MOST = 100
#: Raisings and resolutions that are kept for those who deliver them.
NEWS_MOST = 1000


class AlertView(msgspec.Struct, frozen=True):
    """The newest raising of one alert.

    Attributes:
        alert: its key; ``id`` is that of the raising: the same when it is resolved, another when it is raised again.
        state: raised, acknowledged or resolved.
        severity, kind, summary, hint, model, version, switch: as in ``AlertRaised``.
        raised_at, resolved_at: UTC; None where it is not resolved.
        times: how often it was raised.
        acknowledged_by: who has seen it, empty for nobody yet; ``note`` is what they said.
        reason: how it is known that it is over.
    """

    alert: str
    id: str = ""
    state: str = "raised"
    severity: str = ""
    kind: str = ""
    summary: str = ""
    hint: str = ""
    model: str = ""
    version: str = ""
    switch: str = ""
    raised_at: datetime | None = None
    resolved_at: datetime | None = None
    times: int = 0
    acknowledged_by: str = ""
    note: str = ""
    reason: str = ""


class Alerts(Fold):
    """Fold of the alert events.

    Attributes:
        alerts: key → view, those that stand and the newest that are over.
        news: (sequence, view right after it) of the newest raisings and resolutions, oldest first.
    """

    kind = "alert"

    def __init__(self) -> None:
        super().__init__(
            {
                AlertRaised: self._raised,
                AlertAcknowledged: self._acknowledged,
                AlertResolved: self._resolved,
            }
        )
        self.alerts: dict[str, AlertView] = {}
        self.news: deque[tuple[int, AlertView]] = deque(maxlen=NEWS_MOST)
        self._over: dict[str, None] = {}

    def view(self, id: str) -> AlertView | None:
        """The view of one alert."""
        return self.alerts.get(id)

    def standing(self) -> tuple[AlertView, ...]:
        """Those that are not resolved."""
        return tuple(view for view in self.alerts.values() if view.state != "resolved")

    def _raised(self, event: AlertRaised, recorded: Recorded) -> None:
        before = self.alerts.get(event.alert)
        self._over.pop(event.alert, None)
        self._set(
            AlertView(
                alert=event.alert,
                id=recorded.envelope.id,
                severity=event.severity,
                kind=event.kind,
                summary=event.summary,
                hint=event.hint,
                model=event.model,
                version=event.version,
                switch=event.switch,
                raised_at=recorded.envelope.time,
                times=1 if before is None else before.times + 1,
            )
        )
        self._tell(event.alert, recorded)

    def _acknowledged(self, event: AlertAcknowledged, recorded: Recorded) -> None:
        self._set(
            msgspec.structs.replace(
                self._known(event.alert), state="acknowledged", acknowledged_by=event.by, note=event.note
            )
        )

    def _resolved(self, event: AlertResolved, recorded: Recorded) -> None:
        self._set(
            msgspec.structs.replace(
                self._known(event.alert), state="resolved", reason=event.reason, resolved_at=recorded.envelope.time
            )
        )
        self._tell(event.alert, recorded)
        self._over[event.alert] = None
        if len(self._over) > RESOLVED_MOST:
            oldest = next(iter(self._over))
            del self._over[oldest], self.alerts[oldest]
            self.changed.add(oldest)

    def _known(self, alert: str) -> AlertView:
        return self.alerts.get(alert) or AlertView(alert)

    def _set(self, view: AlertView) -> None:
        self.alerts[view.alert] = view
        self.changed.add(view.alert)

    def _tell(self, alert: str, recorded: Recorded) -> None:
        self.news.append((recorded.sequence, self.alerts[alert]))
