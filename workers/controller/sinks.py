"""Where alerts go: the log output, webhooks, Alertmanagers, and the services of the library Apprise.

A sink delivers one alert once and says whether that worked; it knows no queue, no retry and no leader. Addresses may
hold secrets: nothing here says more of one than scheme and host.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec
import structlog

from turnout.events.version import VERSION

if TYPE_CHECKING:
    from turnout.projections.alerts import AlertView
    from turnout.workers.controller.settings import AlertSettings

log = structlog.get_logger()

#: For one delivery, seconds.
TIME_LIMIT_S = 5.0
#: A person is told again of an alert that nobody has acknowledged, seconds.
REMIND_S = 4 * 3600.0
#: An Alertmanager forgets what it is not told again: it is told every REFRESH_S, and asked to keep it for LAPSE_S.
REFRESH_S = 60.0
LAPSE_S = 300.0
#: Answers that another try may change.
_AGAIN = frozenset((408, 425, 429))
_STATUS_LINE_MOST = 1024


class Undelivered(Exception):
    """It did not arrive, or nobody knows: another try may help."""


class Refused(Exception):
    """The receiver will not have it: another try would not help."""


class SinkUnusable(Exception):
    """The settings ask for a sink that can't be made; the message says what to do."""


class Sink(Protocol):
    """One receiver.

    Attributes:
        name: for logs and metrics; no other sink has it, and it tells no secret.
    """

    name: str

    def again_s(self, view: AlertView) -> float | None:
        """Seconds after which it wants to hear of an alert that still stands; None for never."""
        ...

    async def deliver(self, view: AlertView, now: datetime) -> None:
        """Tell of the alert as it is now. The caller sets the time limit.

        Raises:
            Undelivered: try again.
            Refused: don't.
        """
        ...


def make(settings: AlertSettings) -> tuple[Sink, ...]:
    """The sinks that the settings ask for, and the log output.

    Raises:
        SinkUnusable: one of them can't be made.
    """
    return (
        LogSink(),
        *(WebhookSink(url, number) for number, url in enumerate(settings.webhook, 1)),
        *(AlertmanagerSink(url, number) for number, url in enumerate(settings.alertmanager, 1)),
        *(NotifySink(url, number) for number, url in enumerate(settings.notify, 1)),
    )


class LogSink:
    """The controller's own log output."""

    name = "log"

    def again_s(self, view: AlertView) -> float | None:
        """As to a person."""
        return _remind_s(view)

    async def deliver(self, view: AlertView, now: datetime) -> None:
        """One line."""
        fields = {"alert": view.alert, "id": view.id, "kind": view.kind, "summary": view.summary}
        if view.state == "resolved":
            log.info("alert_resolved", **fields, reason=view.reason)
        elif view.severity == "info":
            log.info("alert_raised", **fields, hint=view.hint)
        elif view.severity == "warning":
            log.warning("alert_raised", **fields, hint=view.hint)
        else:
            log.error("alert_raised", **fields, hint=view.hint)


class WebhookSink:
    """One JSON object by POST: the fields of the alert's view. ``id`` and ``state`` together tell a repetition."""

    def __init__(self, url: str, number: int) -> None:
        self._url = urlsplit(url)
        self.name = f"webhook {number} {_public(self._url)}"

    def again_s(self, view: AlertView) -> float | None:
        """As to a person."""
        return _remind_s(view)

    async def deliver(self, view: AlertView, now: datetime) -> None:
        """POST it."""
        await _post(self._url, _path(self._url), msgspec.json.encode(view))


class AlertmanagerSink:
    """A Prometheus Alertmanager (API v2). It groups, silences and repeats by its own rules."""

    def __init__(self, url: str, number: int) -> None:
        self._url = urlsplit(url)
        self.name = f"alertmanager {number} {_public(self._url)}"

    def again_s(self, view: AlertView) -> float | None:
        """Before it would take the alert for resolved, acknowledged or not."""
        return REFRESH_S

    async def deliver(self, view: AlertView, now: datetime) -> None:
        """POST it; the labels are the same when it is resolved."""
        path = f"{self._url.path.rstrip('/')}/api/v2/alerts"
        await _post(self._url, path, msgspec.json.encode([alertmanager_alert(view, now)]))


class NotifySink:
    """One service of Apprise, in a thread of its own: a service that hangs holds up nobody else.

    Raises:
        SinkUnusable: the library is not installed, or does not know the address.
    """

    def __init__(self, url: str, number: int) -> None:
        scheme = urlsplit(url).scheme
        try:
            apprise: Any = importlib.import_module("apprise")
        except ModuleNotFoundError:
            raise SinkUnusable(
                "[alerts] notify needs the library Apprise, which is not installed; "
                "install it: pip install 'turnout[alerts]', or take notify out of the settings"
            ) from None
        self._apprise = apprise.Apprise()
        if not self._apprise.add(url):
            raise SinkUnusable(
                f"[alerts] notify number {number} ({scheme}://…) is no address of Apprise; "
                "see its list of services for how it is written"
            )
        self.name = f"notify {number} {scheme}"
        self._thread = ThreadPoolExecutor(1, f"alerts-{number}")

    def again_s(self, view: AlertView) -> float | None:
        """As to a person."""
        return _remind_s(view)

    async def deliver(self, view: AlertView, now: datetime) -> None:
        """Let the library send title and text."""
        title, body, kind = text(view)
        loop = asyncio.get_running_loop()
        sent = await loop.run_in_executor(self._thread, self._send, title, body, kind)
        if not sent:
            raise Undelivered("the service did not take it (the library's own log says why)")

    def _send(self, title: str, body: str, kind: str) -> bool:
        limit_s = 0.8 * TIME_LIMIT_S  # its answer shall come before the caller has given up
        return bool(self._apprise.notify(title=title, body=body, notify_type=kind, timeout=limit_s))


def alertmanager_alert(view: AlertView, now: datetime) -> dict[str, Any]:
    """One alert as Alertmanager's API takes it."""
    ends = view.resolved_at if view.state == "resolved" else now + timedelta(seconds=LAPSE_S)
    labels = {
        "alertname": "Turnout" + "".join(part.title() for part in view.kind.split("_")),
        "alert": view.alert,
        "severity": view.severity,
        "model": view.model,
        "version": view.version,
        "source": "turnout",
    }
    annotations = {
        "summary": view.summary,
        "description": view.hint,
        "id": view.id,
        "switch": view.switch,
        "acknowledged_by": view.acknowledged_by,
        "reason": view.reason,
    }
    return {
        "labels": {name: value for name, value in labels.items() if value},
        "annotations": {name: value for name, value in annotations.items() if value},
        "startsAt": view.raised_at,
        "endsAt": ends,
    }


def text(view: AlertView) -> tuple[str, str, str]:
    """Title, text and sort (info, success, warning, failure) of a message to people."""
    if view.state == "resolved":
        return f"turnout: over: {view.alert}", f"{view.summary}\nover: {view.reason}", "success"
    kind = {"critical": "failure", "warning": "warning"}.get(view.severity, "info")
    seen = f"turnout alerts ack {view.alert}"
    return f"turnout: {view.severity}: {view.alert}", f"{view.summary}\nto do: {view.hint}\nseen it? {seen}", kind


def _remind_s(view: AlertView) -> float | None:
    return None if view.state == "acknowledged" else REMIND_S


def _public(url: SplitResult) -> str:
    """Scheme, host and port; no user, path or query."""
    return f"{url.scheme}://{url.hostname}" + (f":{url.port}" if url.port else "")


def _path(url: SplitResult) -> str:
    return (url.path or "/") + (f"?{url.query}" if url.query else "")


async def _post(url: SplitResult, path: str, body: bytes) -> None:
    """POST JSON and read no more than the status.

    On a connection of its own, so that whoever cancels it (the time limit) leaves nothing behind.
    """
    try:
        status = await _status(url, path, body)
    except (OSError, ValueError) as e:  # ValueError: the answer is no HTTP
        raise Undelivered(str(e) or type(e).__name__) from e
    if 200 <= status < 300:
        return
    if status >= 500 or status in _AGAIN:
        raise Undelivered(f"it answered {status}")
    raise Refused(f"it answered {status}: check the address in [alerts]")


async def _status(url: SplitResult, path: str, body: bytes) -> int:
    tls = url.scheme == "https"
    port = url.port or (443 if tls else 80)
    reader, writer = await asyncio.open_connection(url.hostname, port, ssl=True if tls else None)
    try:
        host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: close\r\nuser-agent: turnout/{VERSION}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        )
        if url.username is not None:
            pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
            head += f"authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        line = await reader.readline()
        protocol, _, rest = line[:_STATUS_LINE_MOST].decode("latin-1").partition(" ")
        if not protocol.startswith("HTTP/1."):
            raise ValueError("the answer is no HTTP" if line else "the connection was closed without an answer")
        return int(rest[:3])
    finally:
        writer.transport.abort()
