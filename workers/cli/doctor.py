"""``doctor``: what this machine has, what is missing, and what to do about it. Changes nothing."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.text import Text

from turnout.events.units import size
from turnout.workers import running
from turnout.workers.cli.terminal import DONE, FAILED, Terminal, common, rows, table
from turnout.workers.embedded import EmbeddedServerError, binary_version, dotted, find_binary
from turnout.workers.inference.engines.vllm import find_vllm
from turnout.workers.inference.memory import accelerators
from turnout.workers.registry import find_engines
from turnout.workers.settings import Settings, SettingsError, load

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("missing", "bold red")}
_MIN_FILES = 4096
_MIN_FREE_BYTES = 1 << 30


class Check(msgspec.Struct, frozen=True):
    """One finding. ``state``: ok, note (turnout works without it) or missing."""

    name: str
    state: str
    found: str
    hint: str = ""


@click.command()
@click.option("--config", metavar="PATH", default="", help="The settings file. Default: turnout.toml here.")
@common
def doctor(io: Terminal, config: str) -> None:
    """Say what this machine has and what is missing. Exit code 1 where something needed is missing."""

    async def work() -> int:
        checks = list(_checks(config))
        bad = any(check.state == "missing" for check in checks)
        if io.json:
            io.emit({"status": "missing" if bad else "ok", "checks": checks})
        else:
            _show(io, checks)
        return FAILED if bad else DONE

    io.run_process(work)


def _show(io: Terminal, checks: list[Check]) -> None:
    lines: list[tuple[str | Text, str | Text, str | Text]] = []
    for check in checks:
        lines.append((Text(*_MARKS[check.state]), check.name, check.found))
        if check.hint:
            lines.append(("", "", Text(f"→ {check.hint}", "dim")))
    made = table("", "", "")
    made.show_header = False
    io.show(rows(made, lines))


def _checks(config: str) -> Iterator[Check]:
    settings, found = _settings(config)
    yield found
    yield _nats()
    yield from _vllm(settings)
    yield _devices()
    yield _port(settings)
    yield _proc()
    yield _folder()
    yield _files()


def _settings(config: str) -> tuple[Settings, Check]:
    try:
        settings = load(config, os.environ)
    except SettingsError as e:
        what = "; ".join(f"{p.where}: {p.what}" for p in e.problems)
        return Settings(), Check("settings", "missing", what, "correct it; examples/turnout.toml has every key")
    said = settings.file or "no turnout.toml here: defaults"
    return settings, Check("settings", "ok", said)


def _nats() -> Check:
    try:
        binary = find_binary()
        return Check("nats-server", "ok", f"{dotted(binary_version(binary))}  {os.path.normpath(binary)}")
    except EmbeddedServerError as e:
        reason, _, hint = str(e).partition(": ")
        return Check("nats-server", "missing", reason, hint)


def _vllm(settings: Settings) -> Iterator[Check]:
    install = find_vllm(settings.worker.vllm_python)
    if install is None:
        hint = "make setup-vllm, or name its interpreter: [worker] vllm_python; the other engines work without"
        yield Check("vllm", "note", "not found", hint)
        return
    names = sum(len(engine.architectures) for engine in find_engines(install.python))
    kind = "CPU build" if install.cpu else "GPU build"
    yield Check("vllm", "ok", f"{install.version} ({kind}, {names} architectures)  {install.python}")


def nvidia_gpus() -> int:
    """How many GPUs the NVIDIA driver of this machine shows."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _devices() -> Check:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host = f"{cores} cores, {size(memory)}"
    if gpus := nvidia_gpus():
        known = accelerators()
        if known is None:
            hint = """their memory does not count: pip install 'turnout[gpu]', and [worker] devices = ["cuda:0"]"""
            return Check("devices", "note", f"{gpus} NVIDIA GPUs whose memory can't be read, {host}", hint)
        each = ", ".join(f"{name} {size(total)}" for name, total in known.sizes().items())
        return Check("devices", "ok", f"{each}, {host}")
    if Path("/dev/kfd").exists():
        return Check("devices", "ok", f"AMD GPU, {host}")
    return Check("devices", "note", f"no GPU, {host}", "engines run on the CPU")


def _port(settings: Settings) -> Check:
    host, port = settings.gateway.host, settings.gateway.port
    if running.find() is not None:
        return Check("gateway port", "ok", "turnout up runs in this folder")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            hint = "stop what listens there, or choose another: --port"
            return Check("gateway port", "missing", f"{host}:{port} can't be used: {e.strerror}", hint)
    return Check("gateway port", "ok", f"{host}:{port} is free")


def _proc() -> Check:
    try:
        for name in ("/proc/net/tcp", "/proc/net/unix", "/proc/self/stat"):
            Path(name).read_bytes()
    except OSError as e:
        hint = "the worker reads /proc to prove that an engine is unused before it stops it: run it on Linux with /proc"
        return Check("/proc", "missing", f"{e.filename} can't be read: {e.strerror}", hint)
    return Check("/proc", "ok", "connections of engines can be counted")


def _folder() -> Check:
    folder = Path(running.FOLDER)
    there = folder if folder.exists() else Path()
    if not os.access(there, os.W_OK):
        hint = "start turnout in a folder that you may write to"
        return Check("store folder", "missing", f"{there.resolve()} can't be written", hint)
    free = shutil.disk_usage(there).free
    said = f"{folder.resolve()}, {size(free)} free"
    if free < _MIN_FREE_BYTES:
        return Check("store folder", "note", said, "free some space: a full disk stops changes (requests go on)")
    return Check("store folder", "ok", said)


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MIN_FILES:
        hint = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}, before a gateway with many connections"
        return Check("open files", "note", f"at most {soft}", hint)
    return Check("open files", "ok", f"at most {soft}")
