"""How much engines may use, and when a load is stopped."""

# ruff: noqa: N802  the library's own names

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from turnout.workers.inference import memory, process
from turnout.workers.inference.memory import MemoryManager, amount

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("80%", 800),
        ("100 %", 1000),
        ("0%", None),
        ("120%", None),
        ("512", 512),
        ("16GiB", 16 << 30),
        ("1.5 g", 3 << 29),
        ("400MB", 400 * MIB),
        ("much", None),
        ("0", None),
        ("", None),
    ],
)
def test_an_amount_is_a_share_or_a_size(text: str, bytes: int | None) -> None:
    assert amount(text, 1000) == bytes


def test_a_host_without_accelerators_offers_its_own_memory() -> None:
    offer = MemoryManager("50%", ("cpu",), "95%").offer
    assert offer.memory_bytes == memory.host_bytes() // 2
    assert offer.device_bytes == {}


class FakeNvml(ModuleType):
    """What turnout asks of ``pynvml``, over two devices."""

    class NVMLError(Exception):
        """As the library's."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.processes: dict[int, list[SimpleNamespace]] = {0: [], 1: []}
        self.broken = False

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        if self.broken:
            raise self.NVMLError("GPU is lost")
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=(handle + 1) * 1000 * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return self.processes[handle]


def nowhere(tool: str) -> None:
    """No tool is installed."""


def there(tool: str) -> str:
    return f"/bin/{tool}"


def holds(pid: int, bytes: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=bytes)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    made = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr("shutil.which", nowhere)
    return made


def test_devices_and_what_an_engine_holds_on_them_are_read_by_nvml(nvml: FakeNvml) -> None:
    manager = MemoryManager("50%", ("cuda:0", "cuda:1", "cuda:7"), "90%")
    assert manager.offer.device_bytes == {"cuda:0": 900 * MIB, "cuda:1": 1800 * MIB}
    here, other = os.getpid(), 1 << 30
    nvml.processes[0] = [
        SimpleNamespace(pid=here, usedGpuMemory=300 * MIB),
        SimpleNamespace(pid=other, usedGpuMemory=5),
    ]
    nvml.processes[1] = [SimpleNamespace(pid=here, usedGpuMemory=7), SimpleNamespace(pid=here, usedGpuMemory=None)]
    assert manager.usage(os.getpgid(0)).device_bytes == 300 * MIB + 7


def test_a_driver_that_falls_silent_tells_nothing_and_breaks_nothing(nvml: FakeNvml) -> None:
    manager = MemoryManager("50%", ("cuda:0",), "90%")
    nvml.broken = True
    used = manager.usage(os.getpgid(0))
    assert used.device_bytes == 0
    assert used.bytes > 0
    assert MemoryManager("50%", ("cuda:0",), "90%").offer.device_bytes == {}


def test_without_the_library_the_drivers_tool_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    answers = {
        "--query-gpu=index,memory.total": "0, 1000\n",
        "--query-compute-apps=pid,used_memory": f"{os.getpid()}, 30\n",
    }

    def run(argv: list[str], **how: object) -> SimpleNamespace:
        return SimpleNamespace(stdout=answers[argv[1]])

    monkeypatch.setattr("shutil.which", there)
    monkeypatch.setattr("subprocess.run", run)
    manager = MemoryManager("50%", ("cuda:0",), "90%")
    assert manager.offer.device_bytes == {"cuda:0": 900 * MIB}
    assert manager.usage(os.getpgid(0)).device_bytes == 30 * MIB


def test_this_process_holds_memory() -> None:
    assert MemoryManager("50%", ("cpu",), "95%").usage(os.getpgid(0)).bytes > 0


@pytest.mark.parametrize(
    ("used", "estimate", "beside", "free", "stopped"),
    [
        (500, 500, 600, 9999, ""),
        (620, 500, 600, 9999, ""),
        (
            640,
            500,
            600,
            9999,
            "it holds 640 MiB of memory and was admitted with 500 MiB, and all engines",
        ),
        (640, 500, 300, 9999, ""),
        (220, 100, 900, 9999, ""),
        (230, 100, 900, 9999, "it holds 230 MiB"),
        (5000, 0, 900, 9999, ""),
        (5000, 0, 0, 1, "the host has 1 MiB of memory left"),
        (50, 100, 0, 1, ""),
    ],
)
def test_a_load_is_stopped_beyond_its_estimate_and_before_the_host_has_nothing_left(
    monkeypatch: pytest.MonkeyPatch, used: int, estimate: int, beside: int, free: int, stopped: str
) -> None:
    def held(leader: int) -> int:
        return used * MIB

    monkeypatch.setattr(process, "memory_bytes", held)
    monkeypatch.setattr(memory, "available_bytes", lambda: free * MIB)
    objection = MemoryManager("1000MiB", ("cpu",), "95%").objection(1, estimate * MIB, beside * MIB)
    assert objection.startswith(stopped)
    assert bool(objection) == bool(stopped)
