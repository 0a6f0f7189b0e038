"""``up``, ``controller``, ``worker``, ``gateway``, ``admin``: the processes, and everything at once on one machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from turnout.events.store import Unavailable
from turnout.events.version import VERSION
from turnout.workers import log as logs
from turnout.workers import running, settings
from turnout.workers.admin.settings import TOKEN_FILE, AdminSettings
from turnout.workers.cli.terminal import DONE, FAILED, Terminal, common
from turnout.workers.clock import SystemClock, secret
from turnout.workers.settings import DEFAULT_PORT
from turnout.workers.up import Child, ChildFailed, Home, PortTaken, Supervisor, Told, reserve

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from rich.text import Text

    from turnout.workers.embedded import EmbeddedServer
    from turnout.workers.settings import Settings

_config = click.option("--config", metavar="PATH", default="", help="The settings file. Default: turnout.toml here.")
_level = click.option("--log-level", type=click.Choice(logs.LEVELS), default="info", show_default=True)


def _load(io: Terminal, config: str, flags: dict[str, object]) -> Settings:
    """The settings, or all their problems and the end of the process."""
    if io.nats:
        flags["nats.url"] = io.nats
    try:
        return settings.load(config, os.environ, {key: value for key, value in flags.items() if value is not None})
    except settings.SettingsError as e:
        if io.json:
            problems = [{"where": p.where, "what": p.what} for p in e.problems]
            io.emit(
                {
                    "status": "error",
                    "code": "settings_invalid",
                    "reason": str(e),
                    "hint": "correct them; nothing was started",
                    "problems": problems,
                }
            )
        else:
            from rich.text import Text

            count = len(e.problems)
            io.err.print(Text(f"the settings have {count} problem{'s' if count > 1 else ''}:", "bold red"))
            for problem in e.problems:
                io.err.print(Text.assemble("  ", (f"{problem.where}: ", "bold"), problem.what))
        raise SystemExit(FAILED) from None


def _run(
    io: Terminal,
    name: str,
    level: str,
    start: Callable[[Callable[[dict[str, object]], None]], Awaitable[int]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> None:
    """Run one process to its end; what keeps it from running is one sentence."""
    from turnout.workers.processes import Stopped
    from turnout.workers.wiring import Incompatible

    logs.set_up(level, process=name)

    def ready(said: dict[str, object]) -> None:
        if io.json:
            io.emit({"status": "ready", **said})

    async def work() -> int:
        try:
            return await start(ready)
        except Incompatible as e:
            io.fail("nats_incompatible", str(e))
        except Stopped as e:
            reason, _, hint = str(e).rpartition("; ")
            io.fail("stopped", reason or hint, hint if reason else "")
        return FAILED

    io.run_process(work, loop_factory)


@click.command()
@_config
@_level
@common
def controller(io: Terminal, config: str, log_level: str) -> None:
    """Run a controller. Several may run on one NATS; one of them leads, the others answer commands and wait."""
    loaded = _load(io, config, {})
    from turnout.workers.processes import run_controller

    _run(io, "controller", log_level, lambda ready: run_controller(loaded, ready))


@click.command()
@click.option("--id", "id_", default=None, help="Stays the same over restarts. Default: the host's name.")
@_config
@_level
@common
def worker(io: Terminal, id_: str | None, config: str, log_level: str) -> None:
    """Run the worker of this host. It runs what its own settings allow, [worker.policy], and nothing else.

    SIGTERM ends it and leaves its engines serving: the next worker of this folder takes them over. Ctrl-C (SIGINT)
    stops them too.
    """
    loaded = _load(io, config, {"worker.id": id_})
    from turnout.workers.processes import run_worker

    _run(io, "worker", log_level, lambda ready: run_worker(loaded, ready))


@click.command()
@click.option("--host", default=None, help="Address to listen on. Default: 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="Default: 8400. 0 takes a free one.")
@click.option("--processes", type=click.IntRange(1, 256), default=1, help="As many, on one port: one for each core.")
@_config
@_level
@common
def gateway(io: Terminal, host: str | None, port: int | None, processes: int, config: str, log_level: str) -> None:
    """Run a gateway. It serves on by its last route when NATS or every controller is away."""
    loaded = _load(io, config, {"gateway.host": host, "gateway.port": port})
    if processes > 1:
        logs.set_up(log_level, process="gateways")
        log_folder = Path(running.FOLDER).absolute() / "logs"
        io.run_process(lambda: _gateways(io, loaded, processes, log_folder))
    import uvloop

    from turnout.workers.processes import run_gateway

    _run(io, "gateway", log_level, lambda ready: run_gateway(loaded, ready), uvloop.new_event_loop)


async def _gateways(io: Terminal, loaded: Settings, processes: int, log_folder: Path) -> int:
    """Several gateways on one port."""
    shown = _Shown(io)
    try:
        with reserve(loaded.gateway.host, loaded.gateway.port) as held:
            home = Home(log_folder, SystemClock(), shown.tell)
            children = _gateway_children(held, loaded, processes, home, {})
            return await _supervise(
                io, Supervisor(children), lambda: _say_gateways(io, _url(loaded.gateway.host, held), processes)
            )
    except PortTaken as e:
        io.fail("port_taken", str(e), "stop what listens there, or choose another: --port")
        return FAILED


def _say_gateways(io: Terminal, url: str, processes: int) -> None:
    if io.json:
        io.emit({"status": "ready", "process": "gateway", "address": url, "processes": processes})
    else:
        io.say(f"{processes} gateways at {url}; Ctrl-C stops them")


@click.command()
@click.option("--host", default=None, help="Address to listen on. Default: 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="Default: 8401. 0 takes a free one.")
@_config
@_level
@common
def admin(io: Terminal, host: str | None, port: int | None, config: str, log_level: str) -> None:
    """Run the management API. It needs a token: TURNOUT_ADMIN_TOKEN, or a file that TURNOUT_ADMIN_TOKEN_FILE names."""
    loaded = _load(io, config, {"admin.host": host, "admin.port": port})
    from turnout.workers.processes import run_admin

    _run(io, "admin", log_level, lambda ready: run_admin(loaded, ready))


@click.command()
@click.option("--host", default=None, help="Address of the gateway. Default: 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="Port of the gateway. Default: 8400.")
@click.option("--processes", type=click.IntRange(1, 256), default=1, help="Gateway processes on that port.")
@click.option("--folder", default=running.FOLDER, show_default=True, help="Where everything is kept.")
@click.option("--admin-port", type=click.IntRange(0, 65535), default=None,
              help="Port of the management API. Default: the one above the gateway's.")  # fmt: skip
@click.option("--no-admin", is_flag=True, help="Without the management API.")
@_config
@common
def up(
    io: Terminal,
    host: str | None,
    port: int | None,
    processes: int,
    folder: str,
    admin_port: int | None,
    no_admin: bool,
    config: str,
) -> None:
    """Run everything on this machine: a NATS server of its own (unless --nats), controller, worker, gateway and admin.

    Models of turnout.toml are registered and served at once. Everything is kept in ./.turnout, so the next start goes
    on where this one ended. Ctrl-C stops everything, the engines too.
    """
    flags: dict[str, object] = {"gateway.host": host, "gateway.port": port, "admin.port": admin_port}
    loaded = _load(io, config, flags if not no_admin else {**flags, "admin.enabled": False})
    logs.set_up("error")
    io.run_process(lambda: _up(io, loaded, processes, Path(folder).absolute()))


async def _up(io: Terminal, loaded: Settings, processes: int, folder: Path) -> int:
    clock = SystemClock()
    begun = clock.monotonic()
    if (other := running.find(folder)) is not None:
        io.fail(
            "already_running", f"turnout up runs here already (process {other.pid})", f"clients use {other.gateway}/v1"
        )
        return FAILED
    from turnout.workers.embedded import EmbeddedServer, EmbeddedServerError
    from turnout.workers.wiring import Incompatible, control_plane

    server = None if loaded.nats.url else EmbeddedServer(folder / "nats", clock)
    shown = _Shown(io)
    async with contextlib.AsyncExitStack() as stack:
        try:
            held = stack.enter_context(reserve(loaded.gateway.host, loaded.gateway.port))
            if server is not None:
                await server.start()
                stack.callback(server.stop)
            nats = server.url if server is not None else loaded.nats.url
            async with control_plane(nats, "turnout up") as plane:  # so that all processes can start at once
                await plane.prepare(loaded.nats.replicas)
        except PortTaken as e:
            io.fail("port_taken", str(e), "stop what listens there, or choose another: --port")
            return FAILED
        except (EmbeddedServerError, Incompatible) as e:
            io.fail("nats_unusable", str(e))
            return FAILED
        env = {"TURNOUT_NATS_URL": nats}
        if "run_folder" not in _written(loaded):
            env["TURNOUT_WORKER_RUN_FOLDER"] = str(folder / "engines")
        home = Home(folder / "logs", clock, shown.tell)
        options = ["--config", loaded.file] if loaded.file else []
        try:
            admin = _admin_child(loaded, folder, held.getsockname()[1], home, env, stack)
        except PortTaken as e:
            io.fail("port_taken", str(e), "stop what listens there, choose another: --admin-port, or --no-admin")
            return FAILED
        children = [
            Child("controller", ["controller", *options], env, home),
            Child("worker", ["worker", *options], env, home, stop_signal=signal.SIGINT),
            *_gateway_children(held, loaded, processes, home, env),
            *((admin.child,) if admin else ()),
        ]
        supervisor = Supervisor(children, ("admin", "gateway", "worker", "controller"))
        url = _url(loaded.gateway.host, held)

        def address() -> str:
            return admin.address if admin and not admin.child.failed else ""

        written: list[running.Running] = []

        def write() -> None:
            pids = {child.name: child.pid for child in children if child.pid or child.needed}
            pids |= {"nats": server.pid} if server is not None else {}
            said = running.Running(os.getpid(), nats, url, pids, address())
            if written != [said]:
                running.write(folder, said)
                written[:] = [said]

        async def keep_written() -> None:
            while True:
                supervisor.changed.clear()
                write()
                await supervisor.changed.wait()

        def ready() -> None:
            write()
            _say_up(io, loaded, url, nats, address(), folder, clock.monotonic() - begun)

        stack.callback(running.remove, folder)
        beside = [keep_written()] if io.json else [keep_written(), _tell_log(nats, shown)]
        if server is not None:
            beside.append(_keep_server(server, shown, supervisor.changed.set))
        return await _supervise(io, supervisor, ready, *beside)


def _written(loaded: Settings) -> set[str]:
    """Keys of [worker] that differ from what is there without a file."""
    default = type(loaded.worker)()
    return {f for f in default.__struct_fields__ if getattr(default, f) != getattr(loaded.worker, f)}


def _gateway_children(
    held: socket.socket, loaded: Settings, processes: int, home: Home, env: dict[str, str]
) -> list[Child]:
    shared = {
        **env,
        "TURNOUT_GATEWAY_HOST": loaded.gateway.host,
        "TURNOUT_GATEWAY_PORT": str(held.getsockname()[1]),
        "TURNOUT_GATEWAY_REUSE_PORT": "true",
    }
    if loaded.nats.url:
        shared.setdefault("TURNOUT_NATS_URL", loaded.nats.url)
    options = ["--config", loaded.file] if loaded.file else []
    names = ["gateway"] if processes == 1 else [f"gateway-{n}" for n in range(1, processes + 1)]
    return [Child(name, ["gateway", *options], shared, home) for name in names]


class _Admin(NamedTuple):
    """The management API's process, and where it will answer."""

    child: Child
    address: str


def _admin_child(
    loaded: Settings,
    folder: Path,
    gateway_port: int,
    home: Home,
    env: dict[str, str],
    stack: contextlib.AsyncExitStack,
) -> _Admin | None:
    """The management API, where it is wanted and installed. Its token is made once and stays in the folder.

    It is not needed for a request to be answered, so nobody waits for it. Its port is held while ``stack`` is open.

    Raises:
        PortTaken: somebody else listens where it would.
    """
    own = loaded.admin
    if not own.enabled:
        return None
    if find_spec("litestar") is None or find_spec("uvicorn") is None:
        home.tell(Told("admin", "warning", "no management API: it needs pip install 'turnout[admin]'"))
        return None
    chosen = own.port != AdminSettings().port or loaded.gateway.port == DEFAULT_PORT
    port = own.port if chosen else (gateway_port + 1 if loaded.gateway.port else 0)
    held = stack.enter_context(reserve(own.host, port))
    mine = {
        **env,
        "TURNOUT_ADMIN_HOST": own.host,
        "TURNOUT_ADMIN_PORT": str(held.getsockname()[1]),
        "TURNOUT_ADMIN_REUSE_PORT": "true",
    }
    if not own.token and not own.token_file:
        mine["TURNOUT_ADMIN_TOKEN_FILE"] = str(_token_file(folder))
    options = ["--config", loaded.file] if loaded.file else []
    return _Admin(Child("admin", ["admin", *options], mine, home, needed=False), _url(own.host, held))


def _token_file(folder: Path) -> Path:
    """The folder's token, made where there is none. Nobody else may read it, not even while it is written."""
    file = folder / TOKEN_FILE
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(f"{secret()}\n")
    return file


def _url(host: str, held: socket.socket) -> str:
    named = f"[{host}]" if ":" in host else host
    return f"http://{named}:{held.getsockname()[1]}"


async def _supervise(io: Terminal, supervisor: Supervisor, ready: Callable[[], None], *beside: Any) -> int:
    """Start all, stay until a signal, stop all. A second signal kills."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            supervisor.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    tasks: list[asyncio.Task[Any]] = []
    stopping = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(supervisor.start())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            ready()
            tasks = [asyncio.create_task(one) for one in beside]
            beside = ()
            await stopping
        io.say("")
        io.say("stopping: requests and engines end first")
    except ChildFailed as e:
        io.fail(e.code, e.reason, e.hint)
        return FAILED
    finally:
        for one in beside:
            one.close()
        for task in (*tasks, starting, stopping):
            task.cancel()
        await asyncio.gather(*tasks, starting, stopping, return_exceptions=True)
        await supervisor.stop()
    io.say("stopped")
    return DONE


async def _keep_server(server: EmbeddedServer, shown: _Shown, started: Callable[[], None]) -> None:
    """Start the NATS server again where it ends or must be, and say so."""

    def tell(trouble: str) -> None:
        shown.tell(Told("nats", "warning" if trouble else "info", trouble or "the NATS server writes again"))
        if not trouble:
            started()

    await server.supervise(tell)


def _say_up(io: Terminal, loaded: Settings, url: str, nats: str, admin: str, folder: Path, took_s: float) -> None:
    if io.json:
        said = {"gateway": url, "nats": nats, "admin": admin, "folder": str(folder), "pid": os.getpid()}
        io.emit({"status": "ready", **said})
        return
    from rich.text import Text

    from turnout.projections.audit import seconds

    with contextlib.suppress(ValueError):
        folder = folder.relative_to(Path.cwd())
    io.say(Text.assemble(("turnout ", "bold"), (VERSION, "bold"), f" is up after {seconds(took_s)}"))
    io.say("")
    io.say(Text.assemble("  clients   ", (f"{url}/v1", "bold cyan")))
    if admin:
        io.say(f"  admin     {admin}  (token in {loaded.admin.token_file or folder / TOKEN_FILE})")
    io.say(f"  NATS      {nats}")
    io.say(f"  kept in   {folder}  (logs of the processes in {folder / 'logs'})")
    io.say("")
    if not loaded.models:
        io.say("In another terminal, in this folder:", "dim")
        io.say("  turnout register chat v1 --engine fake")
        io.say("  turnout switch chat v1 --wait")
        io.say("")
    io.say("Ctrl-C stops everything. What happens:", "dim")


class _Shown:
    """What a supervising terminal shows of its children."""

    def __init__(self, io: Terminal) -> None:
        self.io = io
        self._clock = SystemClock()

    def tell(self, told: Told) -> None:
        """A child's warning."""
        from rich.text import Text

        style = "bold red" if told.level == "error" else "yellow"
        if not self.io.json:
            self.line(Text.assemble((told.name, "bold"), "  ", (told.text, style)))

    def line(self, text: Text) -> None:
        """One line with its time."""
        from rich.text import Text

        self.io.out.print(Text.assemble((f"{self._clock.now().astimezone():%H:%M:%S}  ", "dim"), text))


async def _tell_log(nats: str, shown: _Shown) -> None:
    """Say what the log says from now on, without the small print."""
    from rich.text import Text

    from turnout.projections.audit import Audit
    from turnout.workers.wiring import control_plane

    styles = {"good": "green", "warning": "yellow", "bad": "bold red"}
    audit = Audit()
    with contextlib.suppress(Unavailable):
        async with control_plane(nats, "turnout up") as plane:
            last = await plane.store.last_sequence()

            def deliver(recorded: Any) -> None:
                entry = audit.entry(recorded)
                told = entry.tone in styles or entry.type == "SwitchRequested"
                if recorded.sequence > last and told and entry.type != "KnownGoodMarked":
                    shown.line(Text(entry.sentence, styles.get(entry.tone, "")))

            await plane.store.tail(0, deliver, lambda _: None)
            await asyncio.Event().wait()
