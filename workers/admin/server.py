"""Serves the app of the management API until it is asked to stop. Knows uvicorn; no resource, no NATS."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from turnout.workers.admin.settings import AdminSettings

#: Seconds that running requests, and those who follow the log, get after a stop was asked for.
_SHUTDOWN_S = 3
_KEEP_ALIVE_S = 30


class AdminServer(uvicorn.Server):
    """One listening server.

    Args:
        app: ASGI.
        settings: where to listen.
        listening: called with the URL once requests are taken.
    """

    def __init__(self, app: Any, settings: AdminSettings, listening: Callable[[str], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_SHUTDOWN_S,
            )
        )
        self._settings = settings
        self._listening = listening
        self._url = ""

    async def run_until_stopped(self) -> None:
        """Serve until ``stop``.

        Raises:
            OSError: the address can't be used.
        """
        host, port = self._settings.host, self._settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        reuse = self._settings.reuse_port
        with socket.create_server((host, port), family=family, backlog=256, reuse_port=reuse) as held:
            named = f"[{host}]" if ":" in host else host
            self._url = f"http://{named}:{held.getsockname()[1]}"
            await self.serve(sockets=[held])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:
            self._listening(self._url)

    def stop(self) -> None:
        """Take no more requests, and end."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the process's own affair."""
        yield
