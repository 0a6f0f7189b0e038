"""HealthCollector: how the requests of each version ended, in windows that are published as samples.

On its way a request that goes well is only put on a list. Many are counted at once, several times a second: sorted, so
that a bin is counted by where it ends. Errors are counted at once. What an answer says (empty, looping, cut short) is
read only while a switch compares two versions. Knows no socket, no event loop and no control plane: whoever drives it
says what time it is and takes the samples.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from hashlib import blake2b
from typing import TYPE_CHECKING, cast

import msgspec

from turnout.core.split import CELLS, Cells
from turnout.events.health import (
    BIN_RATIO,
    ERRORS,
    INFRASTRUCTURE,
    HealthEvent,
    HealthSampled,
    Histogram,
    ShadowSampled,
    bin_of,
    merged,
    quantile,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from turnout.projections.routing import RouteView
    from turnout.workers.gateway.reading import Seen

#: Seconds between two samples of a model whose switch is running.
FAST_S = 0.25
#: Answers that are read in a second, for each model: any more would cost more than they tell. Whose turn it is does not
#: depend on the version.
LOOKS_PER_S = 50.0
#: Sticky users remembered for each revision; beyond that a sample of them stands for all.
USERS_MOST = 100_000
#: Users with errors that a sample names, and that a window remembers.
BAD_USERS_MOST = 64
_BAD_USERS_KEPT = 4096
#: Users whose answers a sample has, each of them as often, and users of each sign that it names.
NAMED_MOST = 256
ANSWERS_MOST = 4
#: A first byte counts as slow after so many times the model's usual p95, and after this many seconds at least.
SLOW_TIMES = 4.0
SLOW_LEAST_S = 1.0
#: What is usual is learned from versions with at least this share, so that a slow candidate does not become usual.
_USUAL_SHARE = 0.5
_PACE_LEAST = 50
_PACE_MOST = 20_000
#: Fewer tokens than this tell nothing of the time that one takes.
TIMED_TOKENS = 16

#: Has no factor in common with CELLS and is 0.618 of it, so that multiples are spread evenly.
_GOLDEN = 49_443

_SIZES = (1024, 4096, 16_384, 65_536)
_SIZE_NAMES = ("1k", "4k", "16k", "64k", "more")
_STRATA = tuple(f"{kind}/{size}" for kind in ("whole", "stream") for size in _SIZE_NAMES)

#: Upper bounds of the bins of a histogram of milliseconds, in seconds: a lookup is cheaper than a logarithm.
_BOUNDS_S = tuple(BIN_RATIO ** (bin + 1) / 1000.0 for bin in range(220))
_NO_COUNTS = [0] * (len(_BOUNDS_S) + 1)


class Users:
    """The sticky users of one model under one revision, as 64-bit hashes.

    All versions share one table: where it is full, half of the users are let go of in all versions alike, so that the
    shares of the versions stay what they are.

    Args:
        salt: of the route: by it all gateways give a user the same cell.
        most: how many users are remembered.
    """

    __slots__ = ("_cell_of", "_cells", "_marks", "_mask", "_most", "_seen")

    def __init__(self, salt: str = "", most: int = USERS_MOST) -> None:
        self._most = most
        self._cells = Cells(salt)
        self._cell_of: dict[int, int] = {}
        self._mask = 0  # of the bits that are 0 in the hashes of sampled users
        self._seen: set[int] = set()
        self._marks: dict[str, set[int]] = {}

    def enter(self, key: bytes) -> bool:
        """Note a request of a user; true for the first one of a user in the sample."""
        hashed = hash(key)
        if hashed in self._seen or hashed & self._mask:
            return False
        self._seen.add(hashed)
        if len(self._seen) > self._most:
            self._thin()
        return True

    def mark(self, what: str, key: bytes) -> bool:
        """True where the user shows this for the first time."""
        marked, mask = self.marks(what)
        hashed = hash(key)
        if hashed in marked or hashed & mask:
            return False
        marked.add(hashed)
        return True

    def marks(self, what: str) -> tuple[set[int], int]:
        """The hashes of those who have shown it, and the bits that are 0 in the hashes of the sample."""
        return self._marks.setdefault(what, set()), self._mask

    def cell(self, key: bytes) -> int:
        """The user's number in samples."""
        hashed = hash(key)
        found = self._cell_of.get(hashed)
        if found is None:
            if len(self._cell_of) > self._most:
                self._cell_of.clear()
            found = self._cell_of[hashed] = self._cells.of(key)
        return found

    def _thin(self) -> None:
        self._mask = mask = self._mask << 1 | 1
        self._seen = {hashed for hashed in self._seen if not hashed & mask}
        for what, marked in self._marks.items():
            self._marks[what] = {hashed for hashed in marked if not hashed & mask}


class _Version:
    """What outlives a window: the numbering of samples, the run of failures, and the totals for Prometheus."""

    __slots__ = ("model", "outcomes", "pairs", "run", "signs", "version", "window")

    def __init__(self, model: str, version: str) -> None:
        self.model = model
        self.version = version
        self.window = 0
        self.run = 0
        self.outcomes: dict[str, int] = {}
        self.signs: dict[str, int] = {}
        self.pairs: dict[str, int] = {}

    def next_window(self) -> int:
        self.window += 1
        return self.window


class Looks:
    """How many answers may still be read in this window; all versions of a model take from the same."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = LOOKS_PER_S

    def take(self) -> bool:
        """Whether an answer that begins now is to be read."""
        self.left -= 1.0
        return self.left >= 0.0


class Tally:
    """One version's requests under one revision; ``sample`` takes what has come since the last time.

    A *key* is a user's, empty for a request without one, and None for a request that the split has not assigned (a rule
    or a pin has): it is counted, and compared with nothing.

    Attributes:
        begin: takes the key of a request that was assigned.
        done: takes (key, seconds, bytes of the prompt) of a request that has ended well, with the first read of its
            answer, and was not looked at.
        whole: told of the seconds of many such requests, in rising order, for whoever counts them too.
        running: requests that were assigned and have not ended, as of the last digest.
        looks: leave to read answers, and to wait for them with an eye on the clock; None where nothing is compared.
        shadows: who gets copies of the version's requests, for whoever sends them.
    """

    __slots__ = (
        "_answers",
        "_assigned",
        "_bad_users",
        "_begun",
        "_done",
        "_first_ms",
        "_hurry",
        "_model",
        "_new_users",
        "_of",
        "_ok",
        "_outcomes",
        "_showed",
        "_signs",
        "_slow_ms",
        "_token_ms",
        "_tokens",
        "_total_ms",
        "_unit_errors",
        "_unit_signs",
        "_users",
        "begin",
        "done",
        "looks",
        "revision",
        "running",
        "shadows",
        "share",
        "whole",
    )

    def __init__(
        self,
        model: _Model,
        of: _Version,
        revision: int,
        share: float,
        users: Users,
        compared: bool,
        shadows: tuple[ShadowTally, ...],
    ) -> None:
        self._model = model
        self._of = of
        self.revision = revision
        self.share = share
        self._users = users
        self.looks = model.looks if compared else None
        self.shadows = shadows
        self.running = 0
        self._hurry = model.hurry if share < 1.0 else None
        self._begun: list[bytes | None] = []
        # Flat, three places for each request: a list of tuples would be the garbage collector's to look at.
        self._done: list[bytes | float | None] = []
        self.begin: Callable[[bytes | None], None] = self._begun.append
        self.done: Callable[[tuple[bytes | None, float, int]], None] = self._done.extend
        self.whole: Callable[[list[float]], None] = _not_told
        self._clear()

    def _clear(self) -> None:
        self._ok = self._assigned = self._unit_errors = self._new_users = 0
        self._outcomes: dict[str, int] = {}
        self._signs: dict[str, int] = {}
        self._unit_signs: dict[str, int] = {}
        self._bad_users: dict[bytes, int] = {}
        self._first_ms: list[list[int] | None] = [None] * len(_STRATA)
        self._slow_ms: dict[str, Histogram] = {}
        self._answers: dict[str, dict[int, list[int]]] = {}
        self._showed: dict[str, list[int]] = {}
        self._token_ms: Histogram = {}
        self._total_ms = _NO_COUNTS.copy()
        self._tokens: Histogram = {}

    @property
    def model(self) -> str:
        """The served name."""
        return self._of.model

    @property
    def version(self) -> str:
        """Whose requests these are."""
        return self._of.version

    @property
    def slow_s(self) -> float:
        """Seconds after which a missing first byte is a sign; 0 while nothing usual is known."""
        return self._model.slow_s

    # What needs more than a place on a list

    def answered(self, seconds: float, key: bytes | None, stream: bool, size: int, complete: bool) -> None:
        """The first byte of a good answer came, and the last one with it where it is ``complete``."""
        self._of.run = 0
        bin = bisect_right(_BOUNDS_S, seconds)
        if key and self.looks is not None:
            self._answer(key, _STRATA[_stratum(size, stream)], bin)
        elif self._is_first("answer", key):
            self._first(_stratum(size, stream))[bin] += 1
        if complete:
            self._total_ms[bin] += 1

    def came_back(self) -> None:
        """The version has sent something: a run of failures is over."""
        self._of.run = 0

    def took(self, seconds: float) -> None:
        """The last byte came, or would have."""
        self._total_ms[bisect_right(_BOUNDS_S, seconds)] += 1

    def went_well(self) -> None:
        """A request has ended with a whole answer."""
        self.running -= 1
        self._ok += 1

    def ended(self, outcome: str, key: bytes | None) -> None:
        """A request has ended with anything but ``ok``."""
        self.digest()  # in the order in which things happened
        self.running -= 1
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
        if outcome not in ERRORS:
            return
        if outcome in INFRASTRUCTURE:
            self._of.run += 1
        if key and (key in self._bad_users or len(self._bad_users) < _BAD_USERS_KEPT):
            self._bad_users[key] = self._bad_users.get(key, 0) + 1
        if self._is_first("error", key):
            self._unit_errors += 1
            self._show("error", key)
        if self._hurry is not None:
            self._hurry()

    def slow(self, seconds: float, key: bytes | None, stream: bool, size: int) -> None:
        """No first byte after the slow threshold: its time so far counts, as nobody knows when the rest comes."""
        stratum = _STRATA[_stratum(size, stream)]
        if key and self.looks is not None:
            self._answer(key, stratum, bisect_right(_BOUNDS_S, seconds))
        elif self._is_first("answer", key):
            _count(self._slow_ms.setdefault(stratum, {}), seconds * 1000.0)
        self._sign("slow", key)

    def saw(self, seen: Seen, key: bytes | None, seconds: float) -> None:
        """A whole answer was read; ``seconds`` from its first byte to its last, 0 where it is no stream."""
        for sign in seen.signs:
            self._sign(sign, key)
        if not seen.tokens:
            return
        if self._is_first("tokens", key):
            _count(self._tokens, seen.tokens)
        if seconds and seen.tokens >= TIMED_TOKENS:
            _count(self._token_ms, seconds * 1000.0 / (seen.tokens - 1))

    def _sign(self, sign: str, key: bytes | None) -> None:
        self._signs[sign] = self._signs.get(sign, 0) + 1
        if self._is_first(sign, key):
            self._unit_signs[sign] = self._unit_signs.get(sign, 0) + 1
            self._show(sign, key)

    def _show(self, what: str, key: bytes | None) -> None:
        """A unit has shown it; where it is a user who is compared, tell which."""
        if key and self.looks is not None:
            self._showed.setdefault(what, []).append(self._users.cell(key))

    def _answer(self, key: bytes, stratum: str, bin: int) -> None:
        """A user who is compared was answered."""
        bins = self._answers.setdefault(stratum, {}).setdefault(self._users.cell(key), [])
        if len(bins) < ANSWERS_MOST:
            bins.append(bin)

    def _is_first(self, what: str, key: bytes | None) -> bool:
        """Whether its unit shows this for the first time; a request without a key is a unit of its own."""
        return key is not None and (not key or self._users.mark(what, key))

    def _first(self, stratum: int) -> list[int]:
        """Counts of first bytes, by bin."""
        counts = self._first_ms[stratum]
        if counts is None:
            counts = self._first_ms[stratum] = _NO_COUNTS.copy()
        return counts

    # When a window ends

    def digest(self) -> None:
        """Count what stands on the lists."""
        begun, done = self._begun, self._done
        if begun:
            for key in set(begun):
                if not key:
                    self._assigned += begun.count(key) if key is not None else 0
                elif self._users.enter(key):
                    self._new_users += 1
                    self._assigned += 1
            self.running += len(begun)
            begun.clear()
        if done:
            seconds = cast("list[float]", done[1::3])
            self._count_answers(cast("list[bytes | None]", done[::3]), seconds, cast("list[int]", done[2::3]))
            done.clear()
            seconds.sort()
            _count_sorted(self._total_ms, seconds)
            self.running -= len(seconds)
            self._ok += len(seconds)
            self._of.run = 0
            self.whole(seconds)

    def _count_answers(self, keys: list[bytes | None], seconds: list[float], sizes: list[int]) -> None:
        """Count the times of answers that came whole: each without a key, and the first ones of a user."""
        distinct = set(keys)
        compared = self.looks is not None
        if not compared:
            self._count_first(distinct, keys, seconds, sizes)
        if compared or b"" in distinct:
            for stratum, (own_keys, own_seconds) in enumerate(_by_size(keys, seconds, sizes)):
                if b"" in distinct:
                    plain = sorted(one for key, one in zip(own_keys, own_seconds, strict=True) if key == b"")
                    if plain:
                        _count_sorted(self._first(stratum), plain)
                if compared:
                    self._count_compared(_STRATA[stratum], own_keys, own_seconds)

    def _count_first(
        self, distinct: set[bytes | None], keys: list[bytes | None], seconds: list[float], sizes: list[int]
    ) -> None:
        """Count the first answer of each user who has had none; most have."""
        marked, mask = self._users.marks("answer")
        owed = {key for key in distinct if key and not (hash(key) in marked or hash(key) & mask)}
        for key, one, size in zip(keys, seconds, sizes, strict=True) if owed else ():
            if key in owed:
                owed.remove(key)
                marked.add(hash(key))
                self._first(_stratum(size, stream=False))[bisect_right(_BOUNDS_S, one)] += 1
                if not owed:
                    return

    def _count_compared(self, stratum: str, keys: list[bytes | None], seconds: list[float]) -> None:
        """Count the answers of users whose cells have not had as many as count."""
        had = self._answers.get(stratum, {})
        owed = {
            key: most for key in set(keys) if key and (most := ANSWERS_MOST - len(had.get(self._users.cell(key), ())))
        }
        for key, one in zip(keys, seconds, strict=True) if owed else ():
            if key in owed:
                self._answer(key, stratum, bisect_right(_BOUNDS_S, one))
                owed[key] -= 1
                if not owed[key]:
                    del owed[key]
                    if not owed:
                        return

    def open_outcomes(self) -> dict[str, int]:
        """Of the window that has not ended."""
        self.digest()
        return {**self._outcomes, "ok": self._ok} if self._ok else self._outcomes

    def open_signs(self) -> dict[str, int]:
        """Of the window that has not ended."""
        return self._signs

    def named(self) -> Iterator[tuple[str, list[int] | dict[int, list[int]]]]:
        """What the window has of users: stratum and sign → cells."""
        yield from self._answers.items()
        yield from self._showed.items()

    def keep(self, what: str, most: int) -> None:
        """Leave all users out but those with a cell that is one of the first ``most`` in a fixed order."""
        if (answers := self._answers.get(what)) is not None:
            self._answers[what] = {cell: bins for cell, bins in answers.items() if _order(cell) < most}
            return
        showed = self._showed.get(what, [])
        kept = self._showed[what] = [cell for cell in showed if _order(cell) < most]
        if what == "error":
            self._unit_errors -= len(showed) - len(kept)
        elif showed:
            self._unit_signs[what] -= len(showed) - len(kept)

    def sample(self, gateway: str, started: datetime, ended: datetime) -> HealthSampled | None:
        """End the window; None where there is nothing to say of it."""
        of, outcomes = self._of, self.open_outcomes()
        if not (outcomes or self._assigned or self._signs):
            return None
        _add(of.outcomes, outcomes)
        _add(of.signs, self._signs)
        counted = zip(_STRATA, self._first_ms, strict=True)
        first_ms = {stratum: _histogram(counts) for stratum, counts in counted if counts is not None}
        if self.share >= _USUAL_SHARE:
            for histogram in first_ms.values():
                self._model.learn(histogram)
            for answers in self._answers.values():
                self._model.learn_answers(answers)
        for stratum, histogram in self._slow_ms.items():
            first_ms[stratum] = merged(first_ms.get(stratum, {}), histogram)
        worst = sorted(self._bad_users.items(), key=lambda item: (-item[1], item[0]))[:BAD_USERS_MOST]
        made = HealthSampled(
            gateway=gateway,
            model=of.model,
            version=of.version,
            window=of.next_window(),
            revision=self.revision,
            share=self.share,
            started=started,
            ended=ended,
            requests=sum(outcomes.values()),
            outcomes=outcomes,
            signs=self._signs,
            assigned=self._assigned,
            unit_errors=self._unit_errors,
            unit_signs=self._unit_signs,
            users=self._new_users,
            bad_users={self._model.pseudonym(key): count for key, count in worst},
            run=of.run,
            first_ms=first_ms,
            answers=self._answers,
            showed=self._showed,
            token_ms=self._token_ms,
            total_ms=_histogram(self._total_ms),
            tokens=self._tokens,
        )
        self._clear()
        return made


class ShadowTally:
    """The copies that one version got under one revision."""

    __slots__ = ("_copy_ms", "_model", "_of", "_pairs", "_primary_ms", "_signs", "revision", "running")

    def __init__(self, model: _Model, of: _Version, revision: int) -> None:
        self._model = model
        self._of = of
        self.revision = revision
        self.running = 0
        self._clear()

    def _clear(self) -> None:
        self._pairs: dict[str, int] = {}
        self._signs: dict[str, int] = {}
        self._copy_ms: Histogram = {}
        self._primary_ms: Histogram = {}

    @property
    def version(self) -> str:
        """Who got the copies."""
        return self._of.version

    @property
    def looks(self) -> Looks:
        """Leave to read answers."""
        return self._model.looks

    def digest(self) -> None:
        """Everything is counted at once."""

    def dropped(self) -> None:
        """A copy was not sent: there was no room."""
        self._pairs["dropped"] = self._pairs.get("dropped", 0) + 1

    def paired(self, copy: str, primary: str, copy_s: float, primary_s: float, signs: tuple[str, ...]) -> None:
        """A copy and its primary have both ended, with these outcomes."""
        copy_failed, primary_failed = copy in ERRORS, primary in ERRORS
        if copy_failed:
            pair = "both_failed" if primary_failed else "only_copy_failed"
        else:
            pair = "only_primary_failed" if primary_failed else "both_ok"
        self._pairs[pair] = self._pairs.get(pair, 0) + 1
        for sign in signs:
            self._signs[sign] = self._signs.get(sign, 0) + 1
        _count(self._copy_ms, copy_s * 1000.0)
        _count(self._primary_ms, primary_s * 1000.0)

    def open_pairs(self) -> dict[str, int]:
        """Of the window that has not ended."""
        return self._pairs

    def sample(self, gateway: str, started: datetime, ended: datetime) -> ShadowSampled | None:
        """End the window; None where there is nothing to say of it."""
        of, pairs = self._of, self._pairs
        if not pairs:
            return None
        _add(of.pairs, pairs)
        made = ShadowSampled(
            gateway=gateway,
            model=of.model,
            version=of.version,
            window=of.next_window(),
            revision=self.revision,
            started=started,
            ended=ended,
            copies=sum(pairs.values()) - pairs.get("dropped", 0),
            dropped=pairs.get("dropped", 0),
            both_ok=pairs.get("both_ok", 0),
            only_copy_failed=pairs.get("only_copy_failed", 0),
            only_primary_failed=pairs.get("only_primary_failed", 0),
            both_failed=pairs.get("both_failed", 0),
            signs=self._signs,
            copy_ms=self._copy_ms,
            primary_ms=self._primary_ms,
        )
        self._clear()
        return made


class _Model:
    """One served name: its newest revision, and older ones whose requests still run."""

    def __init__(self, name: str, urgent: Callable[[str], None], started: datetime, now: float) -> None:
        self.name = name
        self.versions: dict[str, _Version] = {}
        self.looks = Looks()
        self.tallies: list[Tally | ShadowTally] = []
        self.revision = 0
        self.moving = False
        self.slow_s = 0.0
        self.started = started
        self.sampled_at = now
        self._pace: Histogram = {}
        self._salt = b""
        self._urgent = urgent

    def hurry(self) -> None:
        """Something happened that a judge should hear of at once."""
        self._urgent(self.name)

    def salted(self, salt: str) -> None:
        """By what users' names are made unreadable from now on: the same in all gateways for one switch."""
        self._salt = blake2b(salt.encode(), digest_size=16).digest()

    def pseudonym(self, key: bytes) -> str:
        """A user's name in samples."""
        return blake2b(key, digest_size=8, key=self._salt).hexdigest()

    def learn(self, first_ms: Histogram) -> None:
        """Remember how long a first byte usually takes."""
        self._pace = merged(self._pace, first_ms)
        total = sum(self._pace.values())
        if total > _PACE_MOST:
            self._pace = {bin: count // 2 for bin, count in self._pace.items() if count > 1}
        if total >= _PACE_LEAST:
            usual_ms = quantile(self._pace, 0.95) or 0.0
            self.slow_s = max(SLOW_LEAST_S, SLOW_TIMES * usual_ms / 1000.0)

    def learn_answers(self, answers: dict[int, list[int]]) -> None:
        """The same from what users were answered; of what is slow nobody knows when it came."""
        slow = bisect_right(_BOUNDS_S, self.slow_s) if self.slow_s else len(_BOUNDS_S)
        self.learn(Counter([bin for bins in answers.values() for bin in bins if bin < slow]))

    def version(self, name: str) -> _Version:
        found = self.versions.get(name)
        if found is None:
            found = self.versions[name] = _Version(self.name, name)
        return found

    def sample(self, gateway: str, now: float, utc: datetime) -> Iterator[HealthEvent]:
        """End all windows together."""
        self.looks.left = min(LOOKS_PER_S, max(0.0, self.looks.left) + (now - self.sampled_at) * LOOKS_PER_S)
        started, self.started, self.sampled_at = self.started, utc, now
        self._thin()
        for tally in self.tallies:
            if (made := tally.sample(gateway, started, utc)) is not None:
                yield made
        self.tallies = [tally for tally in self.tallies if tally.running or tally.revision == self.revision]

    def _thin(self) -> None:
        """Let go of users where a sample would name too many: of the same part of them in all versions."""
        tallies = [tally for tally in self.tallies if isinstance(tally, Tally)]
        for tally in tallies:
            tally.digest()
        crowded = {what for tally in tallies for what, cells in tally.named() if len(cells) > NAMED_MOST}
        most = CELLS
        while crowded:
            most //= 2
            for what in crowded:
                for tally in tallies:
                    tally.keep(what, most)
            crowded = {what for tally in tallies for what, cells in tally.named() if len(cells) > NAMED_MOST}


class HealthCollector:
    """All models of one gateway.

    Args:
        interval_s: between two samples of a model while nothing moves.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._models: dict[str, _Model] = {}
        self._hurried: set[str] = set()
        #: Called when a sample should not wait for its time; ``take`` is expected soon after.
        self.hurry: Callable[[], None] = _nobody

    def apply(self, route: RouteView, gateway: str, now: float, utc: datetime) -> Applied:
        """A revision was applied: end the windows of the one before, begin new ones."""
        model = self._models.get(route.model)
        if model is None:
            model = self._models[route.model] = _Model(route.model, self._urgent, utc, now)
        ended = tuple(model.sample(gateway, now, utc))
        model.revision = route.revision
        model.tallies = [tally for tally in model.tallies if tally.running]
        model.salted(route.salt)
        compared = sum(split.weight > 0 for split in route.splits) > 1 or bool(route.mirrors)
        model.moving = compared or bool(route.candidate)
        users = Users(route.salt)
        shadows = tuple(ShadowTally(model, model.version(mirror.version), route.revision) for mirror in route.mirrors)
        shares = assigned_shares(route)
        tallies = tuple(
            Tally(model, model.version(version), route.revision, share, users, compared, shadows)
            for version, share in sorted(shares.items())
        )
        model.tallies += [*tallies, *shadows]
        return Applied(ended, tallies, shadows)

    def take(self, gateway: str, now: float, utc: datetime) -> list[HealthEvent]:
        """The samples whose time has come, and those that can't wait; to be called several times a second."""
        taken: list[HealthEvent] = []
        for model in self._models.values():
            interval = FAST_S if model.moving else self._interval_s
            if model.name in self._hurried or now - model.sampled_at >= interval:
                taken += model.sample(gateway, now, utc)
            else:
                for tally in model.tallies:
                    tally.digest()
        self._hurried.clear()
        return taken

    def digest(self) -> None:
        """Count what stands on lists; no window ends."""
        for model in self._models.values():
            for tally in model.tallies:
                tally.digest()

    def take_all(self, gateway: str, now: float, utc: datetime) -> list[HealthEvent]:
        """What is left, when the gateway stops."""
        return [event for model in self._models.values() for event in model.sample(gateway, now, utc)]

    def outcomes(self) -> Iterator[tuple[str, str, str, int]]:
        """(model, version, outcome, requests), since the start."""
        return self._totals(lambda of: of.outcomes, lambda t: t.open_outcomes() if isinstance(t, Tally) else {})

    def signs(self) -> Iterator[tuple[str, str, str, int]]:
        """(model, version, sign, requests), since the start."""
        return self._totals(lambda of: of.signs, lambda t: t.open_signs() if isinstance(t, Tally) else {})

    def pairs(self) -> Iterator[tuple[str, str, str, int]]:
        """(model, version that got the copies, how the pair ended, copies), since the start."""
        return self._totals(lambda of: of.pairs, lambda t: t.open_pairs() if isinstance(t, ShadowTally) else {})

    def _totals(
        self, ended: Callable[[_Version], dict[str, int]], open: Callable[[Tally | ShadowTally], dict[str, int]]
    ) -> Iterator[tuple[str, str, str, int]]:
        for model in self._models.values():
            totals = {name: dict(ended(of)) for name, of in model.versions.items()}
            for tally in model.tallies:
                _add(totals[tally.version], open(tally))
            for version, counts in totals.items():
                for name, count in counts.items():
                    yield model.name, version, name, count

    def _urgent(self, model: str) -> None:
        if model not in self._hurried:
            self._hurried.add(model)
            self.hurry()


class Applied(msgspec.Struct, frozen=True, gc=False):
    """A revision's windows. ``ended``: samples of the revision before; ``shadows``: in the order of its mirrors."""

    ended: tuple[HealthEvent, ...]
    tallies: tuple[Tally, ...]
    shadows: tuple[ShadowTally, ...]


def assigned_shares(route: RouteView) -> dict[str, float]:
    """Version → share of the units that the split assigns to it.

    What a version without an instance should get goes to the heaviest that has one, as in ``TransitionManager``.
    """
    total = sum(split.weight for split in route.splits if split.weight > 0)
    shares = {split.version: 0.0 for split in route.splits}
    ready = [split for split in route.splits if split.weight > 0 and split.endpoints]
    if not ready:
        return shares
    heaviest = min(ready, key=lambda split: (-split.weight, split.version)).version
    for split in route.splits:
        if split.weight > 0:
            shares[split.version if split.endpoints else heaviest] += split.weight / total
    return shares


def _order(cell: int) -> int:
    """An order of the cells in which any first part of them is spread over all versions by their shares."""
    return cell * _GOLDEN % CELLS


def _add(totals: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        totals[name] = totals.get(name, 0) + count


def _stratum(size: int, stream: bool) -> int:
    return bisect_right(_SIZES, size) + (len(_SIZE_NAMES) if stream else 0)


def _by_size(
    keys: list[bytes | None], seconds: list[float], sizes: list[int]
) -> list[tuple[list[bytes | None], list[float]]]:
    """Keys and seconds by the stratum of answers that came whole."""
    found: list[tuple[list[bytes | None], list[float]]] = [([], []) for _ in _SIZE_NAMES]
    least = bisect_right(_SIZES, min(sizes))
    if least == bisect_right(_SIZES, max(sizes)):
        found[least] = keys, seconds
        return found
    for key, one, size in zip(keys, seconds, sizes, strict=True):
        own_keys, own_seconds = found[bisect_right(_SIZES, size)]
        own_keys.append(key)
        own_seconds.append(one)
    return found


def _count(histogram: Histogram, value: float) -> None:
    bin = bin_of(value)
    histogram[bin] = histogram.get(bin, 0) + 1


def _count_sorted(counts: list[int], seconds: list[float]) -> None:
    """Count seconds in rising order, by bin."""
    at, most = 0, len(seconds)
    while at < most:
        bin = bisect_right(_BOUNDS_S, seconds[at])
        end = bisect_left(seconds, _BOUNDS_S[bin], at) if bin < len(_BOUNDS_S) else most
        counts[bin] += end - at
        at = end


def _histogram(counts: list[int]) -> Histogram:
    return {bin: count for bin, count in enumerate(counts) if count}


def _nobody() -> None:
    """Nobody asked to hear it."""


def _not_told(_: list[float]) -> None:
    """Nobody else counts them."""
