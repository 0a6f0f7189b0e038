"""What an engine's own log tells: how far it has come, and why it failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from turnout.workers.inference.engines.base import cause
from turnout.workers.inference.engines.vllm import SIGNS
from turnout.workers.inference.starting import stage_of

LOGS = Path(__file__).parent / "logs"


def recorded(name: str) -> list[str]:
    return (LOGS / name).read_text().splitlines()


def test_the_cause_of_a_recorded_failure_is_found_far_above_the_last_line() -> None:
    lines = recorded("vllm_truncated_weights.log")
    assert "root cause above" in lines[-1]
    assert cause(lines) == (
        "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: "
        "incomplete metadata, file not fully covered"
    )


def test_a_sound_log_has_no_cause() -> None:
    assert cause(recorded("vllm_sound_start.log")) == ""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["entry.py: error: unrecognized arguments: --foo"], "entry.py: error: unrecognized arguments: --foo"),
        (
            ["(Worker pid=1) ERROR 11-23 23:05:31 [multiproc_executor.py:953] RuntimeError: start (0) + length (1536)"],
            "RuntimeError: start (0) + length (1536)",
        ),
        (
            ["pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig", "  Value error, odd"],
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, odd",
        ),
        (
            ["torch.OutOfMemoryError: CUDA out of memory.", "RuntimeError: x"],
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (["OSError: [Errno 98] Address already in use"], "OSError: [Errno 98] Address already in use"),
        (["WARNING 11-23 23:05:31 [a.py:1] ValueError: only a warning"], ""),
        (["INFO:  127.0.0.1 - 200 OK"], ""),
        (["INFO:     127.0.0.1 said error: too long", "OSError: disk"], "OSError: disk"),
        (["INFO:root:a worker was Killed on purpose", "WARNING:root:ValueError: odd"], ""),
        (["2026-11-28 23:05:31,120 - INFO - last error: none", "[2026-11-28T23:05:31Z] [INFO] Killed"], ""),
        (["ERROR:    Exception in ASGI application"], "Exception in ASGI application"),
        (["ERROR [x] disk is full", "RuntimeError: Engine core initialization failed."], "disk is full"),
        ([], ""),
    ],
)
def test_the_line_that_names_the_cause(lines: list[str], expected: str) -> None:
    assert cause(lines) == expected


def test_the_stages_of_a_recorded_start_come_in_their_order() -> None:
    stages: list[str] = []
    stage = "starting"
    for line in recorded("vllm_sound_start.log"):
        said = stage_of(SIGNS, line, stage)
        if said is not None and said[0] != stage:
            stage = said[0]
            stages.append(stage)
    assert stages == ["loading", "warming"]


def test_a_stage_never_goes_back() -> None:
    assert stage_of(SIGNS, "INFO [x] Starting to load model a draft model", "warming") == (
        "warming",
        "Starting to load model a draft model",
    )
