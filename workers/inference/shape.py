"""What an engine keeps when other weights are put into it: versions with the same shape may follow each other in one.

Reads headers and small files only. Knows no engine kind and no process.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from turnout.workers.inference.weights import read_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Files that an engine reads once, at its start.
_KEPT = (
    *("config.json", "generation_config.json", "*token*", "chat_template*", "vocab*", "merges*"),
    *("*processor_config.json", "*.py"),
)


def files(folder: str) -> tuple[Path, ...]:
    """The weight files of a folder."""
    return tuple(sorted(Path(folder).glob("*.safetensors")))


def digest(settings: Iterable[str], folder: str) -> str:
    """SHA-256 of the settings, of what the engine keeps of the folder, and of its tensors' names, types and shapes.

    Raises:
        Unusable: a weight file is damaged, or there is none.
        OSError: a file can't be read.
    """
    said = hashlib.sha256(msgspec.json.encode(tuple(settings)))
    if not folder:
        return said.hexdigest()
    for name in sorted(os.listdir(folder)):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _KEPT):
            said.update(name.encode() + b"\0" + hashlib.sha256((Path(folder) / name).read_bytes()).digest())
    tensors = read_weights(Path(folder)).tensors
    said.update(msgspec.json.encode(sorted((name, one.dtype, one.shape) for name, one in tensors.items())))
    return said.hexdigest()


def stamp(folder: str) -> str:
    """Tells whether the weight files are the ones that were there before: names, sizes and times."""
    if not folder:
        return ""
    seen = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in files(folder)]
    return hashlib.sha256(msgspec.json.encode(sorted(seen))).hexdigest()


def prefetch(folder: str) -> None:
    """Ask the kernel to read the weight files ahead; it goes on in the background."""
    for path in files(folder):
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
