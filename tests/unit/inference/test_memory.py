"""How much engines may use, and when a load is stopped."""

from __future__ import annotations

import os

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
