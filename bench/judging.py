"""How often the judge is wrong, and how soon it is right: beside a fixed threshold and a repeated Mann-Whitney test.

Whole runs are simulated as a gateway reports them: windows of 25 requests (100 requests/s, four samples a second),
ended early by each error, in one stream of samples that the real Judge folds, with every detector on and asked after
every window. Nothing is vectorised or left out, so there is nothing to cross-check. The two rivals look at the same
requests. Each run has a seed of its own (scenario and number) and no time passes: no figure depends on the machine.

    python bench/judging.py [--quick] [--runs 10000] [--minutes 60] [--kept FILE, to go on from]
    python bench/judging.py --only "first byte" --runs 100
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from bisect import bisect
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import msgspec
import report

from turnout.core.judging.judge import Judge, Question
from turnout.core.judging.judgement import Decision, JudgeSettings
from turnout.events.health import HealthSampled, Histogram, merged, quantile
from turnout.workers.gateway.health import ANSWERS_MOST

START = datetime(2026, 1, 1, tzinfo=UTC)
WINDOW = 25  # requests: a quarter of a second at 100/s
LOOK = 100  # canary requests between two looks of the rivals
SIGMA = 0.7  # of the logarithm of the time to the first byte
RULES = ("judge", "fixed threshold", "Mann-Whitney")
_POOL = 50_021
_TOLD_EVERY = 500  # runs


class Scenario(msgspec.Struct, frozen=True):
    """One world: how good source and target are, who asks, and what happens on the way.

    Attributes:
        name: also the seed of its runs.
        requests: of both versions, until the run ends without an alarm.
        weight: share of the target.
        source_errors, target_errors: shares of requests that fail.
        slower: the target's first byte takes so many times as long.
        empty: share of the target's answers that are empty.
        refused: the target's errors are refused connections.
        good_first: canary requests before the target's fault begins.
        gateways: how many there are; each request goes through one of them by chance.
        users: sticky ones, 0 for none; each has an error rate (intraclass correlation 0.2) and a pace of its own, and
            they ask as often as Zipf's law says (exponent 1.6: the busiest sends 44 % of the requests).
        restless: latency of both versions rises and falls by a factor of 3, and both fail 30 % of 500 requests.
        step: of the switch; only in the first step the target warms up.
        steps: judged steps of the switch.
    """

    name: str
    requests: int
    weight: float = 0.1
    source_errors: float = 0.01
    target_errors: float = 0.01
    slower: float = 1.0
    empty: float = 0.005
    refused: bool = False
    good_first: int = 0
    gateways: int = 1
    users: int = 0
    restless: bool = False
    step: int = 1
    steps: int = 1


class Run(msgspec.Struct, frozen=True):
    """What one run came to: canary requests at each rule's alarm, and at the judge's first pass (0: none)."""

    alarms: tuple[int, int, int]
    metric: str
    passed: int
    invalid: bool


class _Kept(msgspec.Struct, frozen=True):
    """A line of a study that goes on later; the runs of a scenario are in the order of their seeds."""

    scenario: str
    run: Run


SAME = (
    Scenario("1 % errors, 10 % of the traffic", 10_000),
    Scenario("3 % errors, 50 % of the traffic", 10_000, weight=0.5, source_errors=0.03, target_errors=0.03),
    Scenario(
        "sticky users with unequal habits, 3 % errors", 10_000, source_errors=0.03, target_errors=0.03, users=1000
    ),
    Scenario(
        "the same users through four gateways",
        10_000,
        source_errors=0.03,
        target_errors=0.03,
        users=1000,
        gateways=4,
    ),
    Scenario("restless load and an outage of both versions", 10_000, restless=True),
)
REFUSED, DEAD, TEN, FIVE, LATE = (
    Scenario("dead: refuses connections", 2_000, target_errors=1.0, refused=True),
    Scenario("dead: answers 500", 2_000, target_errors=1.0),
    Scenario("errors 1 % → 10 %", 10_000, target_errors=0.1),
    Scenario("errors 1 % → 5 %", 20_000, target_errors=0.05),
    Scenario("first byte 1.5 times as late, target warm", 10_000, slower=1.5, step=2),
)
FAULTS = (
    REFUSED,
    DEAD,
    Scenario("half of the requests fail", 2_000, target_errors=0.5),
    TEN,
    FIVE,
    Scenario("errors 1 % → 3 %", 40_000, target_errors=0.03),
    LATE,
    Scenario("first byte 1.5 times as late, target just loaded", 10_000, slower=1.5),
    Scenario("first byte twice as late, target warm", 10_000, slower=2.0, step=2),
    Scenario("empty answers 0.5 % → 5 %", 20_000, empty=0.05),
    Scenario("dead (500) after 2,000 good canary requests", 24_000, target_errors=1.0, good_first=2_000),
    Scenario("errors 1 % → 10 % after 2,000 good ones", 40_000, target_errors=0.1, good_first=2_000),
    Scenario("first byte 1.5 times as late after 2,000 good ones", 40_000, slower=1.5, good_first=2_000),
    *(
        msgspec.structs.replace(one, name=f"{one.name}, in one of four steps", steps=4)
        for one in (DEAD, TEN, FIVE, LATE)
    ),
)
#: What must be reached at 10 percent: medians of canary requests.
GOALS = {
    REFUSED.name: ("dead canary, refuses connections", "≤ 5", 5.0),
    DEAD.name: ("dead canary, answers 500", "≤ 5", 5.0),
    TEN.name: ("10 times a 1 % error rate", "about 70", 77.0),
    FIVE.name: ("5 times a 1 % error rate", "about 210", 231.0),
    LATE.name: ("first byte 1.5 times as late", "about 85", 93.5),
}


class _Arm:
    """One version's window in the making, and what the rivals remember of it."""

    __slots__ = (
        "all_first",
        "answers",
        "assigned",
        "bad_users",
        "empty",
        "errors",
        "first",
        "refused",
        "requests",
        "run",
        "showed",
        "sum_errors",
        "sum_requests",
        "token",
        "tokens",
        "total",
        "unit_empty",
        "unit_errors",
        "users",
        "window",
    )

    def __init__(self) -> None:
        self.window = self.run = self.sum_requests = self.sum_errors = 0
        self.all_first: Histogram = {}
        self.clear()

    def clear(self) -> None:
        self.requests = self.errors = self.refused = self.unit_errors = 0
        self.assigned = self.users = self.empty = self.unit_empty = 0
        self.first: Histogram = {}
        self.answers: dict[int, list[int]] = {}
        self.showed: dict[str, list[int]] = {}
        self.total: Histogram = {}
        self.token: Histogram = {}
        self.tokens: Histogram = {}
        self.bad_users: dict[str, int] = {}


class _World:
    """Draws the requests of one run and shows them to the judge and to its rivals."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.random = random.Random(f"{scenario.name}:{seed}")
        self.judge = Judge(
            Question(
                settings=SETTINGS, source="v1", target="v2", step=scenario.step, steps=scenario.steps, first_revision=1
            )
        )
        self.arms = [(_Arm(), _Arm()) for _ in range(scenario.gateways)]
        self.canary = self.passed = 0
        self.alarms = [0, 0, 0]
        self.metric = ""
        self.invalid = False
        self.fixed = _Fixed()
        self.at = START
        self.seen: set[int] = set()
        self.failed: set[int] = set()
        self.found_empty: set[int] = set()
        if scenario.users:
            self._draw_users(scenario)

    def _draw_users(self, scenario: Scenario) -> None:
        """Who gets the target, how often they fail, how slow they are, and how much they ask (Zipf, 1.6)."""
        draw, count = self.random, scenario.users
        self.user_target = [draw.random() < scenario.weight for _ in range(count)]
        spread, mean = (1.0 - CORRELATION) / CORRELATION, scenario.source_errors
        self.user_errors = [draw.betavariate(mean * spread, (1.0 - mean) * spread) for _ in range(count)]
        self.user_pace = [draw.gauss(0.0, 0.3) / LOG_BIN for _ in range(count)]
        self.user_asks = list(accumulate(1.0 / rank**1.6 for rank in range(1, count + 1)))

    def run(self) -> Run:
        """The whole run, or until every rule has given its alarm."""
        scenario, draw = self.scenario, self.random.random
        slower = math.log(scenario.slower) / LOG_BIN
        first_ms, token_ms, tokens = POOLS
        in_window = 0
        for n in range(scenario.requests):
            user, pace, late = -1, 0.0, 0.0
            if scenario.users:
                user = bisect(self.user_asks, draw() * self.user_asks[-1])
                is_target, errors, pace = self.user_target[user], self.user_errors[user], self.user_pace[user]
            else:
                is_target, errors = draw() < scenario.weight, scenario.source_errors
            faulty = is_target and self.canary >= scenario.good_first
            if faulty:
                late = slower
                if user < 0:
                    errors = scenario.target_errors
            if scenario.restless:
                pace += 6.0 * math.sin(n / 1500.0)
                errors = 0.3 if 4000 <= n < 4500 else errors
            gateway = int(draw() * scenario.gateways) if scenario.gateways > 1 else 0
            arm = self.arms[gateway][is_target]
            self.canary += is_target
            failed = draw() < errors
            here = user if user < 0 else user * scenario.gateways + gateway
            fresh = user < 0 or here not in self.seen
            if fresh:
                arm.assigned += 1
                if user >= 0:
                    arm.users += 1
                    self.seen.add(here)
            arm.requests += 1
            if failed:
                self._fail(arm, user, here, scenario.refused and is_target)
            else:
                arm.run = 0
                first = max(0, int(first_ms[int(draw() * _POOL)] + pace + late))
                if user >= 0 and len(bins := arm.answers.setdefault(user, [])) < ANSWERS_MOST:
                    bins.append(first)
                if fresh:
                    arm.first[first] = arm.first.get(first, 0) + 1
                    many = max(0, int(tokens[int(draw() * _POOL)]))
                    arm.tokens[many] = arm.tokens.get(many, 0) + 1
                each = max(0, int(token_ms[int(draw() * _POOL)] + pace))
                arm.token[each] = arm.token.get(each, 0) + 1
                last = first + 8
                arm.total[last] = arm.total.get(last, 0) + 1
                if draw() < (scenario.empty if faulty else EMPTY):
                    arm.empty += 1
                    if user < 0:
                        arm.unit_empty += 1
                    elif here not in self.found_empty:
                        arm.unit_empty += 1
                        arm.showed.setdefault("empty", []).append(user)
                        self.found_empty.add(here)
            in_window += 1
            if failed or in_window >= WINDOW:
                in_window = 0
                self._flush()
                if all(self.alarms) or (self.alarms[0] and scenario.good_first):
                    break
        return Run((self.alarms[0], self.alarms[1], self.alarms[2]), self.metric, self.passed, self.invalid)

    def _fail(self, arm: _Arm, user: int, here: int, refused: bool) -> None:
        arm.errors += 1
        arm.refused += refused
        arm.run = arm.run + 1 if refused else 0
        if user < 0:
            arm.unit_errors += 1
            return
        arm.bad_users[f"{user:x}"] = arm.bad_users.get(f"{user:x}", 0) + 1
        if here not in self.failed:
            arm.unit_errors += 1
            arm.showed.setdefault("error", []).append(user)
            self.failed.add(here)

    def _flush(self) -> None:
        """The gateways' samples of both arms, and what each rule says of them."""
        started, self.at = self.at, self.at + timedelta(milliseconds=250)
        for number, arms in enumerate(self.arms):
            shares = 1.0 - self.scenario.weight, self.scenario.weight
            for version, arm, share in zip(("v1", "v2"), arms, shares, strict=True):
                if arm.requests:
                    self._sample(f"g{number}", version, arm, share, started)
        if not self.alarms[0]:
            self._ask()
        source, target = (_together([arms[side] for arms in self.arms]) for side in (0, 1))
        if target.requests:
            if not self.alarms[1] and self.fixed.alarms(source, target):
                self.alarms[1] = self.canary
            if not self.alarms[2] and target.sum_requests % LOOK < target.requests:
                self.alarms[2] = self.canary if mann_whitney(source, target) else 0
        for arms in self.arms:
            for arm in arms:
                arm.clear()

    def _sample(self, gateway: str, version: str, arm: _Arm, share: float, started: datetime) -> None:
        arm.window += 1
        arm.sum_requests += arm.requests
        arm.sum_errors += arm.errors
        for bin, count in arm.first.items():
            arm.all_first[bin] = arm.all_first.get(bin, 0) + count
        outcomes = {"ok": arm.requests - arm.errors, "refused": arm.refused, "http_error": arm.errors - arm.refused}
        self.judge.take(
            HealthSampled(
                gateway=gateway,
                model="chat",
                version=version,
                window=arm.window,
                revision=1,
                share=share,
                started=started,
                ended=self.at,
                requests=arm.requests,
                outcomes={outcome: count for outcome, count in outcomes.items() if count},
                signs={"empty": arm.empty} if arm.empty else {},
                assigned=arm.assigned,
                unit_errors=arm.unit_errors,
                unit_signs={"empty": arm.unit_empty} if arm.unit_empty else {},
                users=arm.users,
                bad_users=arm.bad_users,
                run=arm.run,
                first_ms={"stream/4k": arm.first} if arm.first and not arm.answers else {},
                answers={"stream/4k": arm.answers} if arm.answers else {},
                showed=arm.showed,
                token_ms=arm.token,
                total_ms=arm.total,
                tokens=arm.tokens,
            )
        )

    def _ask(self) -> None:
        decision = self.judge.decision()
        if decision is Decision.FAIL:
            self.alarms[0] = self.canary - self.scenario.good_first
            self.metric = self.judge.judgement().metric
        elif decision is Decision.PASS and not self.passed:
            self.passed = self.canary
        self.invalid = self.invalid or decision is Decision.INVALID


def _together(arms: list[_Arm]) -> _Arm:
    """What the rivals look at: the same version's windows of all gateways."""
    if len(arms) == 1:
        return arms[0]
    whole = _Arm()
    for arm in arms:
        whole.requests += arm.requests
        whole.errors += arm.errors
        whole.sum_requests += arm.sum_requests
        whole.sum_errors += arm.sum_errors
        whole.first = merged(whole.first, arm.first)
        whole.all_first = merged(whole.all_first, arm.all_first)
    return whole


class _Fixed:
    """Roll back if more than 5 % of 100 canary requests failed, or their p95 is 1.5 times the source's so far."""

    def __init__(self) -> None:
        self.requests = self.errors = 0
        self.first: Histogram = {}

    def alarms(self, source: _Arm, target: _Arm) -> bool:
        self.requests += target.requests
        self.errors += target.errors
        for bin, count in target.first.items():
            self.first[bin] = self.first.get(bin, 0) + count
        if self.requests < LOOK:
            return False
        slow, usual = quantile(self.first, 0.95), quantile(source.all_first, 0.95)
        bad = self.errors > 0.05 * self.requests or (slow is not None and usual is not None and slow > 1.5 * usual)
        self.__init__()
        return bad


def mann_whitney(source: _Arm, target: _Arm) -> bool:
    """One-sided at 1 %: first bytes, or outcomes (0 and 1), of all requests so far. Asked every 100 canary requests."""
    failed = ({0: a.sum_requests - a.sum_errors, 1: a.sum_errors} for a in (source, target))
    return _larger(*failed) > 2.326 or _larger(source.all_first, target.all_first) > 2.326


def _larger(source: Histogram, target: Histogram) -> float:
    """The standardised Mann-Whitney statistic, with its correction for ties."""
    n, m = sum(source.values()), sum(target.values())
    if not n or not m:
        return 0.0
    below, u, ties = 0, 0.0, 0.0
    for bin in sorted({**source, **target}):
        a, b = source.get(bin, 0), target.get(bin, 0)
        u += b * (below + a / 2.0)
        below += a
        ties += (a + b) ** 3 - (a + b)
    whole = n + m
    variance = n * m / 12.0 * (whole + 1.0 - ties / (whole * (whole - 1.0)))
    return (u - n * m / 2.0) / math.sqrt(variance) if variance > 0.0 else 0.0


def _pool(median: float, sigma: float) -> list[float]:
    """Draws of a lognormal distribution, as logarithms in widths of a bin."""
    draw = random.Random(f"{median}:{sigma}")
    return [draw.gauss(math.log(median), sigma) / LOG_BIN for _ in range(_POOL)]


LOG_BIN = math.log(1.1)
POOLS = _pool(200.0, SIGMA), _pool(20.0, 0.3), _pool(150.0, 0.8)
EMPTY = 0.005
CORRELATION = 0.2
SETTINGS = JudgeSettings(error_ceiling=0.05, latency_ceiling_ms=5000.0)


def simulate(task: tuple[Scenario, int]) -> Run:
    """One run."""
    return _World(*task).run()


def study(runs: dict[Scenario, int], minutes: float = math.inf, kept: Path | None = None) -> dict[str, list[Run]]:
    """So many runs of each scenario, on all cores, in turns; those of faults in the first fifth.

    Args:
        runs: scenario → how many.
        minutes: after so many what is finished counts.
        kept: where finished runs are written to, and read from when the study goes on.
    """
    found: dict[str, list[Run]] = {scenario.name: [] for scenario in runs}
    for line in kept.read_bytes().splitlines() if kept is not None and kept.exists() else ():
        one = msgspec.json.decode(line, type=_Kept)
        found[one.scenario].append(one.run)
    tasks = [
        ((seed + 0.5) / count / (5.0 if scenario in FAULTS else 1.0), n, seed)
        for n, (scenario, count) in enumerate(runs.items())
        for seed in range(len(found[scenario.name]), count)
    ]
    scenarios = list(runs)
    asked = [(scenarios[n], seed) for _, n, seed in sorted(tasks)]
    began = time.monotonic()
    with (
        get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool,
        (kept or Path(os.devnull)).open("ab", buffering=0) as file,
    ):
        for done, ((scenario, _), run) in enumerate(zip(asked, pool.imap(simulate, asked), strict=True), start=1):
            found[scenario.name].append(run)
            file.write(msgspec.json.encode(_Kept(scenario.name, run)) + b"\n")
            minute = (time.monotonic() - began) / 60.0
            if done % _TOLD_EVERY == 0:
                alarms = {one.name: _alarms(found[one.name], 0) for one in SAME if one in runs}
                print(f"{minute:.1f} min: {done:,} of {len(asked):,} runs, false alarms {alarms}", file=sys.stderr)
            if minute > minutes:
                break
    return found


def run(quick: bool, runs: int, minutes: float, kept: Path | None) -> report.Outcome:
    """So many runs of each scenario with nothing wrong, and of each fault three hundredths of them."""
    runs = 40 if quick else runs
    of_each = dict.fromkeys(SAME, runs) | dict.fromkeys(FAULTS, max(40, runs * 3 // 100))
    found = study(of_each, minutes, kept)
    alike, faulty = ({one.name: found[one.name] for one in scenarios} for scenarios in (SAME, FAULTS))
    goals = [_false_alarm_goal(alike)]
    for name, (what, goal, most) in GOALS.items():
        median = _delay(faulty[name], 0)
        goals.append(report.Goal(what, f"{goal} canary requests", f"{median:.0f} (median)", median <= most))
    return report.Outcome(
        figures={
            "false_alarms": {name: [_alarms(runs, rule) for rule in range(3)] for name, runs in alike.items()},
            "runs_alike": {name: len(runs) for name, runs in alike.items()},
            "passed": {name: sum(one.passed > 0 for one in runs) for name, runs in alike.items()},
            "invalid": {name: sum(one.invalid for one in runs) for name, runs in alike.items()},
            "delay_median": {name: [_delay(runs, rule) for rule in range(3)] for name, runs in faulty.items()},
            "delay_p90": {name: [_delay(runs, rule, 90) for rule in range(3)] for name, runs in faulty.items()},
            "runs_faulty": {name: len(runs) for name, runs in faulty.items()},
        },
        tables=[_alike_table(alike), _faulty_table(faulty)],
        goals=goals,
    )


def some(only: str, runs: int) -> None:
    """So many runs of each scenario whose name holds a text; printed, not kept."""
    for scenarios, table in ((SAME, _alike_table), (FAULTS, _faulty_table)):
        if chosen := tuple(one for one in scenarios if only in one.name):
            made = table(study(dict.fromkeys(chosen, runs)))
            print("\n".join((made.title, *(" | ".join(row) for row in (made.columns, *made.rows)))))


def _false_alarm_goal(alike: dict[str, list[Run]]) -> report.Goal:
    count = sum(len(runs) for runs in alike.values())
    alarms = sum(_alarms(runs, 0) for runs in alike.values())
    share = alarms / count
    most = max(_alarms(runs, 0) / len(runs) for runs in alike.values())
    said = f"{share:.2%} ({alarms} of {count:,} runs; at most {most:.2%} in one scenario)"
    return report.Goal("false alarms, looking after every window", "≤ 1 %", said, share <= 0.01)


def _alike_table(alike: dict[str, list[Run]]) -> report.Table:
    rows: list[list[str]] = []
    for name, runs in alike.items():
        shares = [f"{_alarms(runs, rule) / len(runs):.2%}" for rule in range(3)]
        passed = [one.passed for one in runs if one.passed]
        after = f"{report.median(passed):,.0f}" if passed else "-"
        rows.append([name, f"{len(runs):,}", *shares, f"{len(passed) / len(runs):.0%}", after])
    return report.Table(
        "Both versions the same: runs with a false alarm, and good canaries that pass (10,000 requests a run)",
        ["scenario", "runs", *RULES, "passed", "canary requests to a pass"],
        rows,
        [
            "fixed threshold: more than 5 % of 100 canary requests failed, or their p95 is 1.5 times the source's.",
            "Mann-Whitney: one-sided at 1 % on first bytes and on failures, every 100 canary requests.",
        ],
    )


def _faulty_table(faulty: dict[str, list[Run]]) -> report.Table:
    rows: list[list[str]] = []
    for name, runs in faulty.items():
        cells = [_cell(runs, rule) for rule in range(3)]
        if " after 2,000 good" in name:
            cells[1:] = ["-", "-"]  # most of them have given a false alarm by then
        metrics = Counter(one.metric for one in runs if one.metric).most_common(1)
        rows.append([name, *cells, metrics[0][0] if metrics else "-"])
    return report.Table(
        f"Canary requests until the alarm, {len(next(iter(faulty.values()))):,} runs each: median (90 %), missed",
        ["fault, at 10 % of the traffic", *RULES, "found by"],
        rows,
        ["Before the first look of a rival nothing is found: its first is after 100 canary requests."],
    )


def _cell(runs: list[Run], rule: int) -> str:
    missed = 1.0 - _alarms(runs, rule) / len(runs)
    said = f"{_delay(runs, rule):,.0f} ({_delay(runs, rule, 90):,.0f})"
    return f"{said}, {missed:.0%} missed" if missed else said


def _alarms(runs: list[Run], rule: int) -> int:
    return sum(one.alarms[rule] > 0 for one in runs)


def _delay(runs: list[Run], rule: int, percent: float = 50) -> float:
    """A run without an alarm counts as one that never ends."""
    return report.percentile((one.alarms[rule] or math.inf for one in runs), percent)


def _option(name: str, otherwise: str) -> str:
    """An option's value, taken out of the command line: ``report.main`` does not know it."""
    if name not in sys.argv:
        return otherwise
    at = sys.argv.index(name)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


if __name__ == "__main__":
    wanted, minutes = int(_option("--runs", "10000")), float(_option("--minutes", "inf"))
    kept = Path(name) if (name := _option("--kept", "")) else None
    if "--only" in sys.argv:
        some(sys.argv[sys.argv.index("--only") + 1], wanted)
        raise SystemExit(0)
    raise SystemExit(report.main("judging", lambda quick: run(quick, wanted, minutes, kept)))
