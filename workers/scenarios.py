"""The scenarios of the demonstration: one rollout each, under load, with a candidate that is good or bad in one way.

Everything runs as real processes; the candidate's faults are the fake engine's flags, and it is proven before they
begin. Measures from outside (what clients saw), from the log (what was decided when) and from the gateways' samples
(who was assigned what). Prints nothing.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from turnout.core.model import SetRules
from turnout.core.switch import ENDED
from turnout.events.envelope import Recorded
from turnout.events.gateway import RouteApplied
from turnout.events.health import HealthEvent, HealthSampled, ShadowSampled
from turnout.events.model import EngineSpec
from turnout.events.route import Rule
from turnout.events.switch import (
    BakeStarted,
    DrainStarted,
    Figure,
    RollbackStarted,
    StepApplied,
    StepStarted,
    SwitchRequested,
    TargetReady,
    VerdictReached,
)
from turnout.workers import wiring
from turnout.workers.client import Client, DynamicModelRegistry, ModelSwitcher, SwitchOperation, held
from turnout.workers.demo import MODEL, DemoError, Progress, turnout_up, worker_joins
from turnout.workers.load import Answer, Ask, Clients, quantile
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from turnout.projections.switches import SwitchView

SOURCE, TARGET = "v1", "v2"

#: Short times, so that a scenario ends within a minute; everything else is the default.
_SETTINGS = """
[switching]
metrics_interval = 1.0

[worker]
quiet_s = 0.1

[gateway.limits]
first_byte_s = 2.0
between_s = 2.0
"""
#: Load before the switch is asked for, so that the source's pace is known, and after its end.
_BEFORE_S, _AFTER_S = 3.0, 1.5
#: Until the source serves, and longer than a gateway waits with its last samples.
_SERVES_S, _SAMPLES_S = 60.0, 1.3
#: Clients connect first: what they wait then says nothing of a switch.
_WARM_UP = timedelta(seconds=1)
_USERS = 1000
_TOKENS = 20
_PACE = (f"--tokens={_TOKENS}", "--first-token-ms=60", "--token-ms=5", "--load-seconds=0.5")
_SHORT = "Say hello."
_LONG = "Sum up what follows. " + "A turnout moves a running train from one track to another. " * 40
_JUDGE: dict[str, object] = {"minRequests": 30, "minUsers": 10, "minSeconds": 3}
#: Less has to be shown before a step may be left: 5 % of failures take twice as many requests to rule out as 10 %.
_LENIENT: dict[str, object] = {**_JUDGE, "errorCeiling": 0.1}


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout.

    Attributes:
        name: as it is asked for.
        about: what is shown, in one sentence.
        source, target: further flags of the two engines.
        policy: how it is switched, in the words of docs/strategies.md.
        ends: the phase that it must end in.
        serves: the version that must serve then.
        rules: of the model.
        long: every second request has a long prompt.
        rate: requests a second.
        limit_s: until it must have ended.
    """

    name: str
    about: str
    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    policy: dict[str, object]
    ends: str
    serves: str
    rules: tuple[Rule, ...] = ()
    long: bool = False
    rate: float = 40.0
    limit_s: float = 60.0


def _canary(**more: object) -> dict[str, object]:
    """10 %, 50 %, everything: each step left on evidence only."""
    return {
        "strategy": "canary",
        "steps": [{"setWeight": 10}, {"setWeight": 50}],
        "judge": _JUDGE,
        "stepDeadline": "45s",
        "onInconclusive": "abort",
        "bake": "1s",
        "drain": "10s",
        **more,
    }


SCENARIOS = {
    one.name: one
    for one in (
        Scenario(
            name="canary-good",
            about="a candidate that is as good as what serves is promoted on evidence",
            policy=_canary(judge=_LENIENT),
            ends="completed",
            serves=TARGET,
            rate=50.0,
        ),
        Scenario(
            name="canary-dead",
            about="a candidate that was proven and then takes no connection is rolled back; no client notices",
            target=("--deaf-after=2",),  # a proof asks two questions
            policy=_canary(),
            ends="rolled_back",
            serves=SOURCE,
        ),
        Scenario(
            name="canary-errors",
            about="a candidate that answers one request in ten with an error, against one in a hundred, is rolled back",
            # Seeds by which the first hundreds of requests fail about as often as the rates say.
            source=("--error-rate=0.01", "--error-says=out of memory", "--sound-first=1", "--seed=1"),
            target=("--error-rate=0.1", "--error-says=out of memory", "--sound-first=1", "--seed=6"),
            policy=_canary(),
            ends="rolled_back",
            serves=SOURCE,
            rate=50.0,
        ),
        Scenario(
            name="canary-slow",
            about="a candidate that takes 1.5 times as long to the first token, and for each token, is rolled back",
            target=("--first-token-ms=90", "--token-ms=8"),
            policy=_canary(),
            ends="rolled_back",
            serves=SOURCE,
        ),
        Scenario(
            name="canary-garbage",
            about="a candidate that says one token over and over, with status 200, is rolled back",
            target=("--loop", "--sound-first=1"),
            policy=_canary(),
            ends="rolled_back",
            serves=SOURCE,
        ),
        Scenario(
            name="canary-hung",
            about="a candidate that takes requests and never answers, and whose /health says 200, is rolled back",
            target=("--hang-after=1",),
            policy=_canary(),
            ends="rolled_back",
            serves=SOURCE,
        ),
        Scenario(
            name="ab",
            about="two equal versions side by side to a number of requests; the report says so and the source stays",
            policy={
                "strategy": "ab",
                "split": 50,
                "until": {"samples": 300, "duration": "50s"},
                "judge": _JUDGE,
                "drain": "10s",
            },
            ends="concluded",
            serves=SOURCE,
        ),
        Scenario(
            name="gradual",
            about="10, 25, 50, 100 %, three seconds each; only evidence of harm would stop it",
            policy={
                "strategy": "gradual",
                "steps": [
                    step for weight in (10, 25, 50) for step in ({"setWeight": weight}, {"pause": {"duration": "3s"}})
                ],
                "bake": "1s",
                "drain": "10s",
            },
            ends="completed",
            serves=TARGET,
        ),
        Scenario(
            name="shadow",
            about="first the candidate gets copies of half the requests, whose answers reach nobody, then a canary",
            policy=_canary(
                shadow={"percent": 50, "duration": "4s", "minCopies": 50},
                steps=[{"setWeight": 50}],
                judge=_LENIENT,
            ),
            ends="completed",
            serves=TARGET,
        ),
        Scenario(
            name="rules",
            about="the candidate gets short prompts first; long ones stay where they are until it is promoted",
            policy=_canary(steps=[{"setWeight": 50}], judge=_LENIENT),
            ends="completed",
            serves=TARGET,
            rules=(Rule(name="short-first", when="tokens < 100", candidate=True),),
            long=True,
        ),
    )
}


class Phase(msgspec.Struct, frozen=True):
    """A part of the switch. ``weight``: percent of the target; ``mirror``: percent that is copied to it."""

    name: str
    seconds: float
    weight: float = 0.0
    mirror: float = 0.0


class Verdict(msgspec.Struct, frozen=True):
    """The newest verdict of the switch."""

    decision: str
    reason: str
    rule: str
    step: int
    figures: tuple[Figure, ...]


class Copies(msgspec.Struct, frozen=True):
    """What became of the copies of a shadow, and how long whole answers took before the switch and beside them, ms."""

    answered: int
    failed: int
    dropped: int
    primary_p95_before_ms: float | None
    primary_p95_beside_ms: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a scenario showed.

    Attributes:
        outcome: the switch's phase at the end.
        canary_requests_until_rollback: requests that were assigned to the target until the rollback's route was
            applied, whoever answered them; None where nothing was rolled back.
        failed: requests without an answer, or with an error, that was not an engine's own.
        cut: streams that began and broke, likewise.
        errors: error answers, silence and broken streams that were the engine's own and reached a client.
        final_version: what the model serves.
        verdict: None where none was reached.
        as_planned: it ended as it should, nothing failed or was cut, and what a rule keeps apart stayed apart.
        control_loop_s: from the end of the newest sample before the decision to give the source everything back, to
            the last gateway's acknowledgement.
        versions: answers by version.
        shares: of requests below 100 %, by kind of prompt, the share that the target answered; None of none.
        copies: None where nothing was copied.
        reasons: of what was not ok, at most five.
    """

    scenario: str
    outcome: str
    canary_requests_until_rollback: int | None
    failed: int
    cut: int
    final_version: str
    verdict: Verdict | None
    as_planned: bool
    errors: int
    requests: int
    versions: dict[str, int]
    seconds: float
    phases: tuple[Phase, ...]
    control_loop_s: float | None
    shares: dict[str, float | None]
    copies: Copies | None
    reasons: tuple[str, ...]


class Outcome(msgspec.Struct, frozen=True):
    """The report, and the log that it was read from."""

    report: Report
    switch: str
    log: list[Recorded]


async def play(scenario: Scenario, folder: Path, progress: Progress) -> Outcome:
    """Start everything in ``folder`` (made anew), play the scenario, stop everything.

    Raises:
        DemoError: something could not be started.
    """
    async with (
        turnout_up(folder, progress, _SETTINGS) as (nats, gateway),
        wiring.control_plane(nats, "turnout demo") as plane,
    ):
        client = Client(plane, actor="demo")
        await worker_joins(client)
        await _serve_source(scenario, client, progress)
        samples: list[HealthEvent] = []
        following = await plane.health_reader.follow(client.clock.now(), samples.append)
        try:
            return await _show(scenario, client, gateway, samples, progress)
        finally:
            await following.close()


async def _serve_source(scenario: Scenario, client: Client, progress: Progress) -> None:
    registry, switcher = DynamicModelRegistry(BaseRegistry(), client), ModelSwitcher(client)
    for version, flags in ((SOURCE, scenario.source), (TARGET, scenario.target)):
        progress(f"registering {MODEL} {version}: fake engine {' '.join(flags) or 'without a fault'}")
        await registry.register_model(MODEL, version, EngineSpec("fake", args=(*_PACE, *flags)), note=scenario.name)
    await switcher.set_policy(MODEL, scenario.name, scenario.policy)
    if scenario.rules:
        await client.send("model.rules", SetRules(MODEL, scenario.rules))
    first = await (await switcher.switch_model(MODEL, SOURCE, reason="the first version", bake_s=0.0)).wait(_SERVES_S)
    if first.phase != "completed":
        raise DemoError(f"{SOURCE} could not be served: {first.reason}")


async def _show(
    scenario: Scenario, client: Client, gateway: str, samples: list[HealthEvent], progress: Progress
) -> Outcome:
    load = Clients(gateway, MODEL, scenario.rate, client.clock, max_tokens=_TOKENS, asks=_asks(long=scenario.long))
    load.start()
    try:
        progress(f"clients ask {scenario.rate:g} times a second, every second one as one of {_USERS} users")
        await asyncio.sleep(_BEFORE_S)
        operation = await ModelSwitcher(client).switch_model(
            MODEL, TARGET, policy=scenario.name, reason=f"scenario {scenario.name}"
        )
        view = await _follow(operation, scenario.limit_s, progress)
        await asyncio.sleep(_AFTER_S)
    finally:
        progress("waiting for the last answers")
        await load.stop()
    await asyncio.sleep(_SAMPLES_S)
    log = [recorded async for recorded in client.log()]
    serves = (await client.model(MODEL)).active
    return Outcome(_report(scenario, view, serves, load.answers, log, samples), operation.id, log)


def _asks(*, long: bool) -> list[Ask]:
    """Every second one by a user, every second pair with a long prompt where there are such."""
    return [
        Ask(_LONG if long and n // 2 % 2 else _SHORT, "" if n % 2 else f"user-{n // 2 % _USERS}")
        for n in range(2 * _USERS)
    ]


async def _follow(operation: SwitchOperation, limit_s: float, progress: Progress) -> SwitchView:
    """To its end, to a hold that needs a person, or until the time is up."""
    said = ""
    try:
        async with asyncio.timeout(limit_s):
            async for view in operation.progress():
                if (text := _told(view)) != said:
                    said = text
                    progress(text)
                if view.phase in ENDED or held(view):
                    return view
    except TimeoutError:
        pass
    return await operation.status()


def _told(view: SwitchView) -> str:
    where = f"{view.model} {view.source} → {view.target}: {view.phase.replace('_', ' ')}"
    if view.mirror:
        return f"{where}, copies of {view.mirror:g} % of the requests"
    ended = view.phase in ENDED or view.phase in ("paused", "rolling_back")
    return f"{where}: {view.reason}" if ended else f"{where}, {view.weight:g} % on {view.target}"


def _report(
    scenario: Scenario,
    view: SwitchView,
    serves: str,
    answers: list[Answer],
    log: list[Recorded],
    samples: list[HealthEvent],
) -> Report:
    events = [r for r in log if getattr(r.event, "switch", "") == view.switch]
    bad = [a for a in answers if a.outcome != "ok"]
    failed, cut = (sum(a.outcome == outcome and not a.by_engine for a in bad) for outcome in ("failed", "cut"))
    back = next((r for r in events if isinstance(r.event, RollbackStarted)), None)
    ended = view.ended_at or log[-1].envelope.time
    shares = _shares(events, answers) if scenario.rules else {}
    planned = view.phase == scenario.ends and serves == scenario.serves and shares.get("long", 0.0) == 0.0
    return Report(
        scenario=scenario.name,
        outcome=view.phase,
        canary_requests_until_rollback=_assigned(back, events, samples) if view.phase == "rolled_back" else None,
        failed=failed,
        cut=cut,
        errors=sum(a.by_engine for a in bad),
        final_version=serves,
        verdict=_verdict(events),
        as_planned=planned and not failed and not cut,
        requests=len(answers),
        versions={v: sum(a.version == v for a in answers) for v in (SOURCE, TARGET)},
        seconds=_seconds(events[0].envelope.time, ended),
        phases=_phases(events, ended),
        control_loop_s=None if back is None else _control_loop(back, log, samples),
        shares=shares,
        copies=_copies(events, answers, samples),
        reasons=tuple(dict.fromkeys(a.reason for a in bad))[:5],
    )


def _assigned(back: Recorded | None, events: list[Recorded], samples: list[HealthEvent]) -> int | None:
    """Requests that the target was assigned by the switch's revisions."""
    first = next((r.event.revision for r in events if isinstance(r.event, StepStarted)), None)
    if back is None or first is None or not isinstance(back.event, RollbackStarted):
        return None
    revisions = range(first, back.event.revision)
    return sum(
        one.requests
        for one in samples
        if isinstance(one, HealthSampled) and one.version == TARGET and one.revision in revisions
    )


def _control_loop(back: Recorded, log: list[Recorded], samples: list[HealthEvent]) -> float | None:
    if not isinstance(back.event, RollbackStarted):
        return None
    decided, revision = back.event.at, back.event.revision
    known = [_known_at(one) for one in samples]
    newest = max((at for at in known if at <= decided), default=None)
    applied = [r.envelope.time for r in log if isinstance(r.event, RouteApplied) and r.event.revision == revision]
    return None if newest is None or not applied else _seconds(newest, max(applied))


def _known_at(event: HealthEvent) -> datetime:
    return event.ended if isinstance(event, HealthSampled | ShadowSampled) else event.at


def _verdict(events: list[Recorded]) -> Verdict | None:
    reached = [r.event for r in events if isinstance(r.event, VerdictReached)]
    if not reached:
        return None
    newest = reached[-1]
    return Verdict(newest.decision, newest.reason, newest.rule, newest.step, newest.figures)


def _phases(events: list[Recorded], ended: datetime) -> tuple[Phase, ...]:
    begun: list[tuple[datetime, Phase]] = []
    for recorded in events:
        at = recorded.envelope.time
        match recorded.event:
            case SwitchRequested():
                begun.append((at, Phase("loading", 0.0)))
            case TargetReady():
                begun.append((at, Phase("ready", 0.0)))
            case StepStarted(_, step, weight, mirror=mirror):
                begun.append((at, Phase(f"step {step}", 0.0, weight, mirror)))
            case BakeStarted():
                begun.append((at, Phase("bake", 0.0, 100.0)))
            case DrainStarted():
                begun.append((at, Phase("drain", 0.0, 100.0)))
            case RollbackStarted():
                begun.append((at, Phase("rollback", 0.0)))
            case _:
                pass
    ends = [at for at, _ in begun[1:]] + [ended]
    return tuple(
        msgspec.structs.replace(phase, seconds=_seconds(at, end))
        for (at, phase), end in zip(begun, ends, strict=True)
        if phase.name != "ready" or end > at
    )


def _shares(events: list[Recorded], answers: list[Answer]) -> dict[str, float | None]:
    """Of the requests that were sent while the traffic was split."""
    applied = {r.event.step: r.envelope.time for r in events if isinstance(r.event, StepApplied)}
    steps = [r for r in events if isinstance(r.event, StepStarted)]
    over = next((r.envelope.time for r in steps if isinstance(r.event, StepStarted) and r.event.weight == 100), None)
    since = applied.get(1)
    shares: dict[str, float | None] = {}
    for kind, prompt in (("short", _SHORT), ("long", _LONG)):
        asked = [a for a in answers if a.ask.prompt == prompt and since and over and since < a.sent and a.ended < over]
        shares[kind] = round(sum(a.version == TARGET for a in asked) / len(asked), 3) if asked else None
    return shares


def _copies(events: list[Recorded], answers: list[Answer], samples: list[HealthEvent]) -> Copies | None:
    shadow = [one for one in samples if isinstance(one, ShadowSampled)]
    if not shadow:
        return None
    asked = events[0].envelope.time
    steps = [r.envelope.time for r in events if isinstance(r.event, StepStarted)]
    warm = min(a.sent for a in answers) + _WARM_UP
    begin, end = steps[0], steps[1] if len(steps) > 1 else datetime.max.replace(tzinfo=asked.tzinfo)
    return Copies(
        answered=sum(one.copies for one in shadow),
        failed=sum(one.only_copy_failed + one.both_failed for one in shadow),
        dropped=sum(one.dropped for one in shadow),
        primary_p95_before_ms=_p95(a for a in answers if warm < a.sent and a.ended < asked),
        primary_p95_beside_ms=_p95(a for a in answers if begin < a.sent and a.ended < end),
    )


def _p95(answers: Iterable[Answer]) -> float | None:
    found = quantile((a.total_ms for a in answers if a.outcome == "ok"), 0.95)
    return None if found is None else round(found, 1)


def _seconds(start: datetime, end: datetime) -> float:
    return round((end - start).total_seconds(), 3)
