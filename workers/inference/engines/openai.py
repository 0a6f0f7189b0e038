"""Engine kind ``openai``: a server that runs already (URL), or any command that serves the OpenAI API.

A server that runs already is asked and proven, but never started or stopped: it is not turnout's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from turnout.workers.inference.engines.base import CHAT, COMPLETIONS, Launch, Refusal, Site, own_probe

if TYPE_CHECKING:
    from turnout.events.model import EngineSpec, Probe


class OpenAIEngine:
    """Fills ``{socket}`` or ``{port}``, and ``{host}``, ``{model}``, ``{version}``, ``{path}`` into the command."""

    kind = "openai"

    def plan(self, spec: EngineSpec, model: str, version: str, site: Site) -> Launch | Refusal:
        """Refuses a spec with neither URL nor command, with both, or a command that is not told where to listen."""
        if bool(spec.url) == bool(spec.command):
            return Refusal(
                "engine_incomplete",
                "an engine of kind openai needs either a url or a command",
                "register the version again with one of them",
                "starting",
            )
        probes = own_probe(spec, (COMPLETIONS, CHAT))
        if spec.url:
            return self._running(spec.url, model, probes)
        words = (*spec.command, *spec.args)
        unix = any("{socket}" in word for word in words)
        if not unix and not any("{port}" in word for word in words):
            return Refusal(
                "engine_incomplete",
                f"the command {spec.command[0]} is not told where to listen",
                "write {socket} (path of a Unix socket) or {port} into the command",
                "starting",
            )
        values = {
            "{socket}": site.socket,
            "{port}": str(site.port),
            "{host}": site.host,
            "{model}": model,
            "{version}": version,
            "{path}": spec.path,
        }
        return Launch(
            argv=tuple(_filled(word, values) for word in words),
            address=site.address(unix=unix),
            model=model,
            probes=probes,
        )

    @staticmethod
    def _running(url: str, model: str, probes: tuple[Probe, ...]) -> Launch | Refusal:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            return Refusal(
                "engine_url",
                f"{url} is not an address that a gateway can reach",
                "give http://HOST:PORT; put a TLS-ending proxy before a server that only speaks https",
                "starting",
            )
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        base = parts.path.rstrip("/").removesuffix("/v1")  # a request's own path brings /v1 along
        return Launch((), f"http://{host}:{parts.port or 80}{base}", model, probes=probes)


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word
