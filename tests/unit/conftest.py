"""Decisions and folds touch no network and start no process: in their tests both are impossible."""

from __future__ import annotations

import socket
import subprocess
from typing import NoReturn

import pytest

_PURE = ("core", "controller", "projections")


@pytest.fixture(autouse=True)
def no_outside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.parent.name not in _PURE:
        return

    def forbidden(*args: object, **more: object) -> NoReturn:
        raise AssertionError("a unit test of decisions or folds reaches out of its process")

    for name in ("connect", "bind"):
        monkeypatch.setattr(socket.socket, name, forbidden)
    monkeypatch.setattr(subprocess.Popen, "__init__", forbidden)
