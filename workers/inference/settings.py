"""What an inference worker is told: who it is, what it may run, and how patient it is. Values only."""

from __future__ import annotations

import msgspec

from turnout.workers.inference.memory import amount
from turnout.workers.inference.policy import WorkerPolicy


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker process.

    Attributes:
        id: stays the same over restarts, so that the worker finds its engines again; empty: the host's name.
        run_folder: where sockets, logs and what is known of running engines lie; one worker at a time. A relative
            path starts in the folder that the worker was started in.
        policy: what may be run here.
        capacity: most engine processes at once.
        devices: what the engines run on, e.g. ``cpu`` or ``cuda:0``; told to the control plane.
        memory: host memory that all engines together may use: a share (``80%``) or a size (``16GiB``).
        device_memory: the same for each accelerator among the devices.
        domain: what fails together with this host, e.g. a rack or a zone; empty for the host alone.
        unix: engines listen on Unix sockets; else on TCP ports of ``address``, for gateways on other hosts.
        address: this host's address, as gateways reach it.
        vllm_python: interpreter of the environment that has vLLM; empty: the worker's own, else ``.venv-vllm`` here.
        load_timeout_s: a start without progress for so long has failed.
        probe_timeout_s: longest wait for the answer to a golden question.
        hang_after_s: a ready engine that answers nothing for so long, and uses no processor time, hangs. One that does
            use it gets three times as long.
        quiet_s: an engine is stopped when nobody has been connected to it for so long.
        beat_s: between two signs of life.
        measure_s: between two looks at the memory of the engines.
        spares: most engines that are kept running without a version, for versions of the same shape to be put into.
            Each takes the memory of an engine. They are what is evicted, or started ahead where memory is free.
    """

    id: str = ""
    run_folder: str = ".turnout/engines"
    policy: WorkerPolicy = WorkerPolicy()
    capacity: int = 8
    devices: tuple[str, ...] = ("cpu",)
    memory: str = "80%"
    device_memory: str = "95%"
    domain: str = ""
    unix: bool = True
    address: str = "127.0.0.1"
    vllm_python: str = ""
    load_timeout_s: float = 900.0
    probe_timeout_s: float = 30.0
    hang_after_s: float = 90.0
    quiet_s: float = 1.0
    beat_s: float = 1.0
    measure_s: float = 5.0
    spares: int = 0

    def problems(self) -> tuple[str, ...]:
        """What can't be meant, one sentence each, naming the field."""
        found: list[str] = []
        if self.capacity < 1:
            found.append(f"capacity is {self.capacity}: give 1 or more")
        if not 0 <= self.spares <= 16:
            found.append(f"spares is {self.spares}: give 0 to 16")
        for field in ("load_timeout_s", "probe_timeout_s", "hang_after_s", "beat_s", "measure_s"):
            value: float = getattr(self, field)
            if not 0 < value < 1e9:
                found.append(f"{field} is {value}: give a number of seconds above 0")
        for field in ("memory", "device_memory"):
            text: str = getattr(self, field)
            if amount(text, 1 << 40) is None:
                found.append(f'{field} is {text!r}: give a share such as "80%", or a size such as "16GiB"')
        if not 0 <= self.quiet_s < 1e9:
            found.append(f"quiet_s is {self.quiet_s}: give a number of seconds, 0 or more")
        unknown = [kind for kind in self.policy.engines if kind not in ("vllm", "openai", "fake")]
        if unknown:
            found.append(f"policy.engines names {unknown[0]!r}: known are vllm, openai and fake")
        return tuple(found)
