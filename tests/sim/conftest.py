"""Makes `tests.sim` importable whatever starts pytest, and keeps the simulated processes' logs out of the output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = str(Path(__file__).resolve().parents[2])
if _ROOT not in sys.path:
    sys.path.append(_ROOT)


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    from tests.sim.run import silence

    before = structlog.get_config()
    silence()
    yield
    structlog.configure(**before)
