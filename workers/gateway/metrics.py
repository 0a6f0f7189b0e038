"""MetricsCollector: plain numbers on the request path, Prometheus text when somebody asks.

Labels are bounded: only served names, versions and the words below ever become one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from turnout.workers.gateway.health import Tally

#: Upper bounds in seconds; the last bucket has none.
BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

#: How a request can go wrong; see docs/gateway-design.md.
FAILURES = (
    "connect",  # an instance took no connection
    "broken",  # the connection broke before the first byte of the answer
    "engine_dead",  # an instance answered that it can't serve any more
    "no_instance",  # every instance was tried, or there was none
    "first_byte_timeout",
    "silent",  # nothing came for too long in the middle of an answer
    "total_timeout",
    "cut",  # the answer broke after its first byte
    "error_event",  # the engine sent an error inside a stream
    "aborted",  # the engine ended a stream with finish_reason "abort"
    "no_done",  # a stream ended without its [DONE]
    "drain_ended",  # the version's time to drain was up
    "client_gone",  # the client closed before the last byte
    "client_stalled",  # the client took nothing for too long
)


class Histogram:
    """Counts per bucket, and the sum in seconds."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def observe_sorted(self, ordered: list[float]) -> None:
        """Count many, in rising order."""
        at, most = 0, len(ordered)
        while at < most:
            bucket = bisect_left(BOUNDS_S, ordered[at])
            end = bisect_right(ordered, BOUNDS_S[bucket], at) if bucket < len(BOUNDS_S) else most
            self.counts[bucket] += end - at
            at = end
        self.sum_s += sum(ordered)

    def cumulative(self) -> list[tuple[str, float]]:
        """As Prometheus wants it."""
        total, made = 0, list[tuple[str, float]]()
        for bound, count in zip((*BOUNDS_S, float("inf")), self.counts, strict=True):
            total += count
            made.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        return made


class VersionNumbers:
    """What one version has done through this gateway.

    Attributes:
        statuses: answers by the first digit of their status.
        tally: the window that its next request counts in.
        whole: takes the seconds of an answer with status 2xx that came whole and is in no tally; many are counted at
            once, by ``digest``.
    """

    __slots__ = ("_whole", "failures", "first_byte", "retries", "statuses", "tally", "total", "whole")

    def __init__(self) -> None:
        self.statuses = [0] * 6
        self.failures: dict[str, int] = {}
        self.retries = 0
        self.tally: Tally | None = None
        self.first_byte = Histogram()
        self.total = Histogram()
        self._whole: list[float] = []
        self.whole: Callable[[float], None] = self._whole.append

    def digest(self) -> None:
        """Count what stands on the list."""
        if self._whole:
            self._whole.sort()
            self.add_whole(self._whole)
            self._whole.clear()

    def add_whole(self, ordered: list[float]) -> None:
        """Count many answers with status 2xx that came whole, by their seconds in rising order."""
        self.statuses[2] += len(ordered)
        self.first_byte.observe_sorted(ordered)
        self.total.observe_sorted(ordered)

    def began(self, status: int, seconds: float, complete: bool) -> None:
        """Count an answer whose first byte came after so many seconds, and its last one with it if it is complete."""
        bucket = bisect_left(BOUNDS_S, seconds)
        self.statuses[status // 100] += 1
        first, total = self.first_byte, self.total
        first.counts[bucket] += 1
        first.sum_s += seconds
        if complete:
            total.counts[bucket] += 1
            total.sum_s += seconds

    def failed(self, kind: str) -> None:
        """Count one failure."""
        self.failures[kind] = self.failures.get(kind, 0) + 1


if TYPE_CHECKING:
    #: Where counts per version and word come from.
    Counted = Callable[[], Iterable[tuple[str, str, str, int]]]


class Gauge:
    """A number that is read when somebody asks."""

    __slots__ = ("help", "name", "read")

    def __init__(self, name: str, help: str, read: Callable[[], float]) -> None:
        self.name = name
        self.help = help
        self.read = read


class MetricsCollector:
    """Everything that this process counts."""

    def __init__(self) -> None:
        self.versions: dict[tuple[str, str], VersionNumbers] = {}
        #: Requests that the gateway answered itself, by status.
        self.refused: dict[int, int] = {}
        self.gauges: list[Gauge] = []
        #: (model, version, requests in flight), read when somebody asks.
        self.in_flight: Callable[[], Iterable[tuple[str, str, int]]] = tuple
        #: Model → applied revision, read when somebody asks.
        self.revisions: Callable[[], dict[str, int]] = dict
        #: (model, version, word, count) of outcomes, signs and pairs with shadow copies, read when somebody asks.
        self.outcomes: Counted = tuple
        self.signs: Counted = tuple
        self.pairs: Counted = tuple
        #: (model, rule, outcome, count) of rules, read when somebody asks.
        self.rules: Counted = tuple
        #: Requests that wait for their model to have an instance: how many now, how long those of before, and why
        #: others were refused; read when somebody asks.
        self.held: Callable[[], Iterable[tuple[str, int]]] = tuple
        self.waited: dict[str, Histogram] = {}
        self.held_refused: dict[tuple[str, str], int] = {}
        #: Makes whoever counts answers for health samples tell of those that it has not told of.
        self.gather: Callable[[], None] = _nothing
        #: Health samples that were not published, read when somebody asks.
        self.samples_dropped: Callable[[], int] = int
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def version(self, model: str, version: str) -> VersionNumbers:
        """The numbers of one version; both names must come from a route, never from a request."""
        numbers = self.versions.get((model, version))
        if numbers is None:
            numbers = self.versions[model, version] = VersionNumbers()
        return numbers

    def digest(self) -> None:
        """Count what has come since the last time; to be called several times a second."""
        self.gather()
        for numbers in self.versions.values():
            numbers.digest()

    def refuse(self, status: int) -> None:
        """The gateway answered with an error of its own."""
        self.refused[status] = self.refused.get(status, 0) + 1

    def render(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All series, as prometheus_client asks for them."""
        self.digest()
        labels = ["model", "version"]
        answers = CounterMetricFamily(
            "turnout_gateway_answers", "Answers passed on, by status class.", labels=[*labels, "status"]
        )
        failures = CounterMetricFamily(
            "turnout_gateway_failures", "What went wrong with requests, by kind.", labels=[*labels, "kind"]
        )
        retries = CounterMetricFamily(
            "turnout_gateway_retries", "Requests sent again elsewhere before their first byte.", labels=labels
        )
        first = HistogramMetricFamily(
            "turnout_gateway_first_byte_seconds", "From the request to the answer's first byte.", labels=labels
        )
        total = HistogramMetricFamily(
            "turnout_gateway_request_seconds", "From the request to the answer's last byte.", labels=labels
        )
        for (model, version), numbers in self.versions.items():
            for digit, count in enumerate(numbers.statuses):
                if count:
                    answers.add_metric([model, version, f"{digit}xx"], count)
            for kind, count in numbers.failures.items():
                failures.add_metric([model, version, kind], count)
            retries.add_metric([model, version], numbers.retries)
            first.add_metric([model, version], numbers.first_byte.cumulative(), numbers.first_byte.sum_s)
            total.add_metric([model, version], numbers.total.cumulative(), numbers.total.sum_s)
        yield from (answers, failures, retries, first, total)
        yield from self._counted()
        yield from self._waits()
        running = GaugeMetricFamily("turnout_gateway_in_flight", "Requests in flight.", labels=labels)
        for model, version, count in self.in_flight():
            running.add_metric([model, version], count)
        yield running
        revisions = GaugeMetricFamily("turnout_gateway_route_revision", "Applied route revision.", labels=["model"])
        for model, revision in self.revisions().items():
            revisions.add_metric([model], revision)
        yield revisions
        refused = CounterMetricFamily(
            "turnout_gateway_refused", "Requests that the gateway answered with an error itself.", labels=["status"]
        )
        for status, count in self.refused.items():
            refused.add_metric([str(status)], count)
        yield refused
        for gauge in self.gauges:
            yield GaugeMetricFamily(gauge.name, gauge.help, value=gauge.read())

    def _counted(self) -> Iterator[Metric]:
        """What becomes of requests, by the versions that they were assigned to."""
        for name, help, label, read in (
            ("outcomes", "How requests ended, by the version that they were assigned to.", "outcome", self.outcomes),
            (
                "signs",
                "Answers that look bad; counted while versions are compared.",
                "sign",
                self.signs,
            ),
            ("shadow_copies", "Copies for nobody, by how they and their primaries ended.", "pair", self.pairs),
        ):
            family = CounterMetricFamily(f"turnout_gateway_{name}", help, labels=["model", "version", label])
            for model, version, word, count in read():
                family.add_metric([model, version, word], count)
            yield family
        ruled = CounterMetricFamily(
            "turnout_gateway_rules", "What rules did with requests.", labels=["model", "rule", "outcome"]
        )
        for model, rule, outcome, count in self.rules():
            ruled.add_metric([model, rule, outcome], count)
        yield ruled
        yield CounterMetricFamily(
            "turnout_gateway_samples_dropped",
            "Health samples that could not be published.",
            value=self.samples_dropped(),
        )

    def _waits(self) -> Iterator[Metric]:
        """Requests that wait, have waited, or could not."""
        held = GaugeMetricFamily(
            "turnout_gateway_held", "Requests that wait for their model to have an instance.", labels=["model"]
        )
        for model, count in self.held():
            held.add_metric([model], count)
        yield held
        waited = HistogramMetricFamily(
            "turnout_gateway_waited_seconds", "How long they waited, whatever became of them.", labels=["model"]
        )
        for model, histogram in self.waited.items():
            waited.add_metric([model], histogram.cumulative(), histogram.sum_s)
        yield waited
        refused = CounterMetricFamily(
            "turnout_gateway_held_refused",
            "Such requests that could not wait, or waited in vain.",
            labels=["model", "reason"],
        )
        for (model, reason), count in self.held_refused.items():
            refused.add_metric([model, reason], count)
        yield refused


def _nothing() -> None:
    """Nobody else counts."""
