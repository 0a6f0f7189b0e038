"""What gateways and workers measure. Kept in a stream of its own (HEALTH) with an age limit: evidence, not facts.

A verdict carries the figures that it was decided on, so nothing in the log depends on aged-out samples. No sample holds
a prompt, an answer or a key. Users appear as salted 64-bit hashes where they met a failure, and while two versions are
compared as the number of a cell, one of 80 000, which may be that of several users. Names here are storage format.
"""

from __future__ import annotations

import math
from datetime import datetime

import msgspec

#: How a request ended. Exactly one of them for each request.
OUTCOMES = (
    "ok",  # a whole answer, nothing wrong with it
    "bad_request",  # the client's own mistake (4xx but 429): no error of the version
    "client_gone",  # the client left, or took nothing: no error of the version
    "refused",  # connect or broken before the first byte: the request may have been saved by another instance
    "http_error",  # 429 or 5xx
    "error_event",  # an error inside a stream
    "cut",  # the answer broke after its first byte, or a stream ended without its end
    "aborted",  # finish_reason "abort"
    "timeout",  # silence: before the first byte, between two, or in all
    "drained",  # ended because the version's time to drain was up: no error of the version
)
#: Those that count as errors of the version that the request was first assigned to.
ERRORS = frozenset(("refused", "http_error", "error_event", "cut", "aborted", "timeout"))
#: Errors that say that the engine is gone rather than wrong; a run of them is a dead version.
INFRASTRUCTURE = frozenset(("refused",))
#: Signs of a bad answer that came with status 200; counted beside the outcome, several may apply.
SIGNS = (
    "empty",  # no output but white space, finish_reason stop, no tool call
    "repetition",  # half of the 4-grams at the end are repeats
    "length",  # finish_reason length
    "slow",  # no first byte within the slow threshold, whether the client waited or left
)

#: Two neighbouring bins of a histogram differ by this factor.
BIN_RATIO = 1.1
_LOG_RATIO = math.log(BIN_RATIO)

#: Bin → count. Mergeable by adding. Bin ``n`` holds values from BIN_RATIO**n up to BIN_RATIO**(n+1); the unit (ms or
#: tokens) is the field's. Values below 1 count as 1.
Histogram = dict[int, int]


def bin_of(value: float) -> int:
    """The bin of a value; the unit's own."""
    return math.floor(math.log(value) / _LOG_RATIO) if value > 1.0 else 0


def middle(bin: int) -> float:
    """The geometric middle of a bin."""
    return math.exp((bin + 0.5) * _LOG_RATIO)


def merged(first: Histogram, second: Histogram) -> Histogram:
    """Both together."""
    made = dict(first)
    for bin, count in second.items():
        made[bin] = made.get(bin, 0) + count
    return made


def quantile(histogram: Histogram, q: float) -> float | None:
    """The value below which a share ``q`` lies (a bin's middle); None where nothing was counted."""
    total = sum(histogram.values())
    if not total:
        return None
    left = q * total
    for bin in sorted(histogram):
        left -= histogram[bin]
        if left <= 0:
            return middle(bin)
    return middle(max(histogram))


class HealthSampled(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="HealthSampled", tag_field="type"):
    """One window of one version through one gateway, under one route revision.

    A *unit* is what the split assigns: a user (sticky key) at the first request under this revision, or a request
    without a key. Judging looks at units, because the failures of one user are not independent (notes: clusters); the
    ceiling and the sight of a dead version look at requests.

    Attributes:
        gateway, model, version: whose. The version is the one that the split chose first, whoever answered in the end.
        window: counts from 1 for each (gateway process, model, version): tells a repeated sample.
        revision: route revision that assigned these requests.
        share: probability in [0, 1] that a unit under this revision is assigned to this version.
        started, ended: UTC by the gateway's clock; where the window lies in time.
        requests: ended in this window.
        outcomes: outcome → requests.
        signs: sign → requests.
        assigned: units whose first request was assigned in this window.
        unit_errors: units whose first error came in this window.
        unit_signs: sign → units that showed it first in this window.
        users: distinct sticky users first seen under this revision in this window.
        bad_users: hash → errors in this window, of sticky users with errors; the most 64 with the most.
        run: errors of INFRASTRUCTURE in a row when the window ended, since the last answer.
        first_ms: stratum → histogram of ms to the first byte, of units' first requests; without those in ``answers``. A
            stratum is ``<stream|whole>/<size>`` where size is the bin of the prompt's bytes: ``1k``, ``4k``, ``16k``,
            ``64k``, ``more``.
        answers: stratum → cell → bins of ms to the first byte, of what sticky users were answered in this window while
            two versions are compared: the first 4 of a cell, and 256 cells. Where there are more, the same part of the
            cells is left out of ``answers`` and ``showed``, and of the units in ``unit_errors`` and ``unit_signs``, in
            both versions.
        showed: ``error`` or sign → cells of the sticky users among the units in ``unit_errors`` and ``unit_signs``,
            while two versions are compared; 256 of them.
        token_ms: histogram of ms for a token after the first, one value for each streamed answer of ≥ 16 tokens.
        total_ms: histogram of ms to the last byte, of all requests.
        tokens: histogram of output tokens (events of the stream where the engine does not say) of units' first answers.
    """

    gateway: str
    model: str
    version: str
    window: int
    revision: int
    share: float
    started: datetime
    ended: datetime
    requests: int = 0
    outcomes: dict[str, int] = {}
    signs: dict[str, int] = {}
    assigned: int = 0
    unit_errors: int = 0
    unit_signs: dict[str, int] = {}
    users: int = 0
    bad_users: dict[str, int] = {}
    run: int = 0
    first_ms: dict[str, Histogram] = {}
    answers: dict[str, dict[int, list[int]]] = {}
    showed: dict[str, list[int]] = {}
    token_ms: Histogram = {}
    total_ms: Histogram = {}
    tokens: Histogram = {}

    @property
    def errors(self) -> int:
        """Requests that ended with an error of the version."""
        return sum(count for outcome, count in self.outcomes.items() if outcome in ERRORS)


class ShadowSampled(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ShadowSampled", tag_field="type"):
    """One window of copies of requests that a version answered for nobody.

    Attributes:
        gateway, model, version, window, revision, started, ended: as in HealthSampled; ``version`` got the copies.
        copies: answered or given up in this window.
        dropped: not sent, because the budget was full.
        both_ok, only_copy_failed, only_primary_failed, both_failed: copies by how the pair ended.
        signs: sign → copies that showed it.
        copy_ms, primary_ms: histograms of ms to the last byte of the two.
    """

    gateway: str
    model: str
    version: str
    window: int
    revision: int
    started: datetime
    ended: datetime
    copies: int = 0
    dropped: int = 0
    both_ok: int = 0
    only_copy_failed: int = 0
    only_primary_failed: int = 0
    both_failed: int = 0
    signs: dict[str, int] = {}
    copy_ms: Histogram = {}
    primary_ms: Histogram = {}


class ProbePassed(msgspec.Struct, frozen=True, gc=False, tag="ProbePassed", tag_field="type"):
    """A worker's golden question was answered well. ``number`` counts from 1 for each start of the instance."""

    instance: str
    model: str
    version: str
    number: int
    seconds: float
    at: datetime


class ProbeFailed(msgspec.Struct, frozen=True, gc=False, tag="ProbeFailed", tag_field="type"):
    """It was not answered, or badly. ``row``: failures in a row, this one included."""

    instance: str
    model: str
    version: str
    number: int
    row: int
    reason: str
    at: datetime


HealthEvent = HealthSampled | ShadowSampled | ProbePassed | ProbeFailed

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(HealthEvent)


def encode(event: HealthEvent) -> bytes:
    """JSON with the type in ``type``."""
    return _encoder.encode(event)


def decode(body: bytes) -> HealthEvent:
    """Read one.

    Raises:
        msgspec.MsgspecError: it is none of them, or damaged.
    """
    event: HealthEvent = _decoder.decode(body)
    return event
