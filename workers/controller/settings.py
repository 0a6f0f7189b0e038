"""AlertSettings: where a controller tells of alerts. Values only; workers/settings.py reads them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

_NOTIFY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")


class AlertSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[alerts]``. Every alert is in the log and in the controller's own log output in any case.

    Attributes:
        webhook: addresses that get each alert as one JSON object by POST.
        alertmanager: addresses of Prometheus Alertmanagers, without ``/api/v2/alerts``; name every member of a cluster.
        notify: addresses of the notification library Apprise, e.g. ``slack://…``, ``mailto://…``, ``pagerduty://…``.
    """

    webhook: tuple[str, ...] = ()
    alertmanager: tuple[str, ...] = ()
    notify: tuple[str, ...] = ()

    def problems(self) -> tuple[str, ...]:
        """What can't be meant, each beginning with the key. No address is repeated: it may hold a secret."""
        found: list[str] = []
        for key, urls in (("webhook", self.webhook), ("alertmanager", self.alertmanager)):
            for number, url in enumerate(urls, 1):
                if problem := _http_problem(url):
                    found.append(f"{key} number {number} {problem}: give http://HOST:PORT/PATH or https://HOST/PATH")
        for number, url in enumerate(self.notify, 1):
            if not _NOTIFY.fullmatch(url):
                found.append(f"notify number {number} is no address: give SERVICE://…, as Apprise writes it")
        found.extend(
            f"{key} names one address twice: it would be told twice"
            for key in ("webhook", "alertmanager", "notify")
            if len(set(urls := getattr(self, key))) < len(urls)
        )
        return tuple(found)


def _http_problem(url: str) -> str:
    if url != url.strip() or any(c.isspace() or ord(c) < 32 for c in url):
        return "has blanks in it"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is no address"
    if parts.scheme not in ("http", "https"):
        return "is not http"
    if not parts.hostname:
        return "has no host"
    return "has port 0" if port == 0 else ""
