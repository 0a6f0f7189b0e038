"""What a ``turnout up`` says about itself in its folder, so that other commands find it. Knows no connection."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

#: Folder of everything that ``turnout up`` keeps, under the current one.
FOLDER = ".turnout"
_FILE = "up.json"


class Running(msgspec.Struct, frozen=True):
    """A running ``turnout up``.

    Attributes:
        pid: its process id.
        nats: address of its control plane.
        gateway: URL where clients connect.
        processes: name → process id of what it supervises, 0 while one is being started again.
        admin: URL of the management API, which answers a moment later than the rest; empty where it does not run.
    """

    pid: int
    nats: str
    gateway: str
    processes: dict[str, int] = {}
    admin: str = ""


def write(folder: Path, running: Running) -> None:
    """Say it, readable at every moment."""
    new = folder / f"{_FILE}.new"
    new.write_bytes(msgspec.json.encode(running))
    new.replace(folder / _FILE)


def remove(folder: Path) -> None:
    """Say nothing any more."""
    (folder / _FILE).unlink(missing_ok=True)


def find(folder: Path | None = None) -> Running | None:
    """The ``turnout up`` of a folder (default: ``.turnout`` here); None where none runs."""
    try:
        running = msgspec.json.decode(((folder or Path(FOLDER)) / _FILE).read_bytes(), type=Running)
        os.kill(running.pid, 0)
    except (OSError, msgspec.MsgspecError):
        return None
    return running
