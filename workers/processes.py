"""Builds each process from its settings and runs it until it is stopped. Adapters come from wiring.py.

Each ``run_…`` returns the exit code. What keeps a process from running is one sentence, raised at the start. A process
imports its own parts only, so that it starts fast.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from turnout.events.store import Damaged, LogReplaced
from turnout.workers.clock import SystemClock
from turnout.workers.wiring import control_plane

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from turnout.workers.controller.controller import Controller
    from turnout.workers.controller.sinks import Sink
    from turnout.workers.inference.policy import WorkerPolicy
    from turnout.workers.inference.worker import InferenceWorker
    from turnout.workers.metrics import Gauge, MetricsServer
    from turnout.workers.settings import Settings
    from turnout.workers.wiring import ControlPlane

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The process can't go on; the message says why and what to do."""


async def run_controller(settings: Settings, ready: Callable[[dict[str, object]], None]) -> int:
    """Run a controller until SIGTERM or SIGINT; ``ready`` is called once it answers commands."""
    from turnout.workers.controller.controller import Controller
    from turnout.workers.declared import Declared

    clock = SystemClock()
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def away(reason: str) -> None:
        if not lost.done():
            lost.set_result(reason)

    async with control_plane(
        settings.nats.url, f"turnout controller {os.getpid()}", clock=clock, away_s=settings.nats.away_s, away=away
    ) as plane:
        await plane.prepare(settings.nats.replicas)
        controller = Controller(
            settings.controller.id or clock.id("c-"),
            store=plane.store,
            bus=plane.bus,
            beats=plane.beats,
            reader=plane.reader,
            writer=plane.writer,
            news=plane.news,
            lease=plane.lease("controller"),
            samples=plane.health_reader,
            sinks=_sinks(settings),
            clock=clock,
            config=settings.switching,
            defaults=settings.switch,
            cache=settings.cache,
        )
        metrics = _metrics(settings, settings.metrics.controller, lambda: _controller_gauges(controller))
        try:
            return await _until_stopped(
                controller.run(),
                Declared(controller, settings, clock).run(),
                _say_ready(controller.serving, ready, {"process": "controller", "id": controller.id}),
                lost=lost,
            )
        finally:
            if metrics is not None:
                metrics.close()


async def run_worker(settings: Settings, ready: Callable[[dict[str, object]], None]) -> int:
    """Run a worker until a signal: SIGINT stops its engines, SIGTERM leaves them to the next worker of this folder.

    Never ends for want of NATS once it runs.
    """
    from turnout.workers.inference.host import HostRunner, engines
    from turnout.workers.inference.looking import Looking
    from turnout.workers.inference.worker import InferenceWorker

    clock, own = SystemClock(), settings.worker
    async with control_plane(settings.nats.url, f"turnout worker {os.getpid()}", clock=clock) as plane:
        check_s = settings.switching.health_check_interval if settings.switching.enable_health_checks else None
        own = msgspec.structs.replace(own, policy=_own_policy(settings))
        looking = Looking(own)
        runner = HostRunner(own, engines(own), clock, check_s, looking.inspector)
        worker = InferenceWorker(
            own,
            bus=plane.bus,
            beats=plane.beats,
            views=plane.reader,
            clock=clock,
            runner=runner,
            health=plane.health_writer,
            look=looking.look,
        )
        runner.on_probed(worker.probed)
        runner.on_kept(worker)
        metrics = _metrics(settings, settings.metrics.worker, lambda: _worker_gauges(worker, plane))
        ready({"process": "worker", "id": worker.id, "engines": list(runner.kinds)})
        try:
            return await _until_stopped(
                worker.run(), stop=lambda number: worker.stop(stop_engines=number == signal.SIGINT)
            )
        finally:
            looking.stop()
            if metrics is not None:
                metrics.close()


async def run_gateway(settings: Settings, ready: Callable[[dict[str, object]], None]) -> int:
    """Run a gateway until SIGTERM or SIGINT; ``ready`` is called once it takes requests.

    Never ends for want of NATS once it runs.
    """
    from turnout.workers.gateway.main import Gateway

    clock, config = SystemClock(), settings.switching
    own = msgspec.structs.replace(
        settings.gateway,
        metrics=settings.gateway.metrics and config.enable_metrics,
        track_requests=settings.gateway.track_requests and config.enable_request_tracking,
    )
    async with control_plane(settings.nats.url, f"turnout gateway {os.getpid()}", clock=clock) as plane:
        gateway = Gateway(
            own,
            id=clock.id("g-"),
            bus=plane.bus,
            beats=plane.beats,
            views=plane.reader,
            news=plane.news,
            clock=clock,
            connected=lambda: plane.connection.connected,
            health=plane.health_writer,
            metrics_interval_s=config.metrics_interval,
        )

        def listening(url: str) -> None:
            ready({"process": "gateway", "id": gateway.id, "address": url})

        try:
            return await _until_stopped(gateway.run(listening), stop=lambda _: gateway.stop())
        except OSError as e:
            why, hint = e.strerror or str(e), "stop what listens there, or choose another: --port"
            raise Stopped(f"port {own.port} on {own.host} can't be used: {why}; {hint}") from e


async def run_admin(settings: Settings, ready: Callable[[dict[str, object]], None]) -> int:
    """Run the management API until SIGTERM or SIGINT; ``ready`` is called once it takes requests."""
    try:
        from turnout.workers.admin.app import build
        from turnout.workers.admin.server import AdminServer
    except ModuleNotFoundError as e:
        raise Stopped(f"the management API needs {e.name}; install it: pip install 'turnout[admin]'") from e
    from turnout.workers.admin.settings import TokenUnusable
    from turnout.workers.client import Client

    clock, own = SystemClock(), settings.admin
    try:
        token = own.read_token()
    except TokenUnusable as e:
        raise Stopped(str(e)) from e
    async with control_plane(settings.nats.url, f"turnout admin {os.getpid()}", clock=clock) as plane:
        app = build(Client(plane, "http"), token, own, lambda: plane.connection.connected)
        server = AdminServer(app, own, lambda url: ready({"process": "admin", "address": url}))
        try:
            return await _until_stopped(server.run_until_stopped(), stop=lambda _: server.stop())
        except OSError as e:
            why, hint = e.strerror or str(e), "stop what listens there, or choose another: --port"
            raise Stopped(f"port {own.port} on {own.host} can't be used: {why}; {hint}") from e


def _sinks(settings: Settings) -> tuple[Sink, ...]:
    """Who is told of alerts."""
    from turnout.workers.controller import sinks

    try:
        return sinks.make(settings.alerts)
    except sinks.SinkUnusable as e:
        raise Stopped(str(e)) from e


def _own_policy(settings: Settings) -> WorkerPolicy:
    """The worker's policy; what turnout.toml itself declares is allowed, because the owner wrote both."""
    policy = settings.worker.policy
    declared = settings.engines().values()
    roots = dict.fromkeys(policy.model_roots or (".",)) | dict.fromkeys(e.path for e in declared if e.path)
    commands = dict.fromkeys(policy.commands) | dict.fromkeys(shlex.join(e.command) for e in declared if e.command)
    hosts = dict.fromkeys(policy.hosts) | dict.fromkeys(urlsplit(e.url).hostname or "" for e in declared if e.url)
    return msgspec.structs.replace(policy, model_roots=tuple(roots), commands=tuple(commands), hosts=tuple(hosts))


async def _say_ready(event: asyncio.Event, ready: Callable[[dict[str, object]], None], said: dict[str, object]) -> None:
    await event.wait()
    ready(said)


async def _until_stopped(
    main: Coroutine[object, object, None],
    *beside: Coroutine[object, object, None],
    lost: asyncio.Future[str] | None = None,
    stop: Callable[[int], None] | None = None,
) -> int:
    """Run ``main`` until it ends, a signal asks to stop, or the connection is lost; ``beside`` may end before.

    Args:
        main: what the process is.
        beside: what runs along; its errors end the process.
        lost: gets the reason why the connection is given up.
        stop: gets the first signal, and makes ``main`` end; without it ``main`` is cancelled. A second one cancels.

    Raises:
        Stopped: the connection is lost, or the log is another one.
    """
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future(main)
    others = [asyncio.ensure_future(one) for one in beside]
    asked: list[int] = []

    def on_signal(number: int) -> None:
        asked.append(number)
        if stop is not None and len(asked) == 1:
            stop(number)
        else:
            work.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    waiting: set[asyncio.Future[Any]] = {work, *others}
    if lost is not None:
        waiting.add(lost)
    try:
        while not work.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if lost is not None and lost in done and not asked:
                raise Stopped(lost.result())
            for one in done - {work}:
                one.result()
        if not (asked and work.cancelled()):
            work.result()
    except LogReplaced as e:
        raise Stopped(f"the log was replaced while this process ran ({e}): start it again") from e
    except Damaged as e:
        raise Stopped(f"{e}; check the whole log: turnout verify") from e
    finally:
        for one in (work, *others):
            one.cancel()
        await asyncio.gather(work, *others, return_exceptions=True)
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
    return 0


def _metrics(settings: Settings, listen: str, read: Callable[[], tuple[Gauge, ...]]) -> MetricsServer | None:
    if not listen or not settings.switching.enable_metrics:
        return None
    from turnout.workers.metrics import MetricsServer

    try:
        return MetricsServer(listen, read)
    except (OSError, ValueError, OverflowError) as e:
        raise Stopped(f"/metrics can't be answered at {listen}: {e}; choose another address in [metrics]") from e


def _controller_gauges(controller: Controller) -> tuple[Gauge, ...]:
    """Read in another thread: every collection is copied in one step."""
    from turnout.workers.metrics import Gauge

    world = controller.log.world
    phases: dict[str, int] = {}
    for instance in list(world.instances.values()):
        phases[instance.phase] = phases.get(instance.phase, 0) + 1
    return (
        Gauge("turnout_controller_leading", "1 while this controller leads.", float(controller.leading.is_set())),
        Gauge("turnout_log_sequence", "Newest event that was folded.", controller.log.sequence),
        Gauge("turnout_models", "Registered models.", len(world.models)),
        Gauge("turnout_switches_running", "Switches that have not ended.", len(world.running)),
        Gauge("turnout_gateways_live", "Gateways whose acknowledgements are awaited.", len(world.live_gateways)),
        Gauge("turnout_workers_live", "Workers that are heard of.", sum(w.live for w in list(world.workers.values()))),
        *(
            Gauge("turnout_instances", "Instances by phase, ended ones too.", count, {"phase": phase})
            for phase, count in sorted(phases.items())
        ),
        *controller.alerts.gauges(),
    )


def _worker_gauges(worker: InferenceWorker, plane: ControlPlane) -> tuple[Gauge, ...]:
    from turnout.workers.metrics import Gauge

    return (
        Gauge("turnout_worker_instances", "Engines that run, load or stop.", len(worker.instances)),
        Gauge(
            "turnout_worker_memory_bytes",
            "Host memory that proven engines hold, as told to the control plane.",
            sum(one.told.bytes for one in worker.cache.models),
        ),
        Gauge("turnout_worker_connected", "1 while there is a connection to NATS.", float(plane.connection.connected)),
    )
