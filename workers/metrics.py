"""``/metrics`` of processes that have no HTTP server of their own: controller and worker. Knows no process's insides.

The numbers are read when they are asked for; nothing is counted twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.metrics_core import Metric


class Gauge(msgspec.Struct, frozen=True):
    """One series now. ``name`` has its unit; ``labels`` are the same keys for all of one name."""

    name: str
    help: str
    value: float
    labels: dict[str, str] = {}


class _Collector:
    def __init__(self, read: Callable[[], tuple[Gauge, ...]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for gauge in self._read():
            family = families.get(gauge.name)
            if family is None:
                family = families[gauge.name] = GaugeMetricFamily(gauge.name, gauge.help, labels=list(gauge.labels))
            family.add_metric(list(gauge.labels.values()), gauge.value)
        yield from families.values()


class MetricsServer:
    """Answers in a thread of its own until it is closed.

    Args:
        listen: ``host:port``; port 0 takes a free one.
        read: the numbers now; called in that thread, so it must only read.

    Raises:
        OSError: the address can't be used.
    """

    def __init__(self, listen: str, read: Callable[[], tuple[Gauge, ...]]) -> None:
        host, _, port = listen.rpartition(":")
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(read))
        self._server: WSGIServer
        self._server, self._thread = start_http_server(int(port), host or "127.0.0.1", registry)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
