"""Weight files by their headers: which tensors there are, and whether the files hold them whole. Reads no weights.

Everything is read as if an enemy had written it: lengths, offsets and names are checked before they are used. The
format: 8 bytes (little endian) with the length of the header, the header (JSON: name → type, shape, offsets), the bytes
of the tensors (https://github.com/huggingface/safetensors). Knows no engine and no event.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"
#: The format's own limit on a header.
HEADER_MOST = 100_000_000
INDEX_MOST = 100_000_000
_DIMENSIONS_MOST = 32
#: Bits of one element.
_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
#: Type in a header → as configurations call it.
DTYPES = {
    **{"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I8": "int8", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2", "I32": "int32"},
}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<n>\d{5})-of-(?P<of>\d{5})\.safetensors")


class Unusable(Exception):
    """The files can't be served. ``code`` for programs, ``reason`` and ``hint`` for people."""

    def __init__(self, code: str, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.hint = hint


class Tensor(msgspec.Struct, frozen=True):
    """One tensor; ``begin`` and ``end`` are bytes of its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return self.end - self.begin


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_headers = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entries = msgspec.json.Decoder(_Entry)
_indexes = msgspec.json.Decoder(_Index)


def read_header(path: Path) -> dict[str, Tensor]:
    """Name → tensor, in the order of their bytes.

    Raises:
        Unusable: the file is no whole safetensors file; the reason has the numbers.
        OSError: it can't be read.
    """
    name = path.name
    again = "copy the file again, then register the version again"
    with path.open("rb") as file:
        size = path.stat().st_size
        first = file.read(8)
        if len(first) < 8:
            raise Unusable("weights_truncated", f"{name} has {size} bytes: too few for a safetensors file", again)
        length = int.from_bytes(first, "little")
        if length > size - 8:
            raise Unusable(
                "weights_truncated",
                f"{name} has {size:,} bytes, and says that its header alone has {length:,}",
                f"{again}; a file of Git LFS or Xet that was never fetched looks like this, too",
            )
        if length > HEADER_MOST:
            raise Unusable(
                "weights_invalid",
                f"{name} has a header of {length:,} bytes; at most {HEADER_MOST:,} are allowed",
                again,
            )
        raw = file.read(length)
    try:
        entries = {key: _entries.decode(one) for key, one in _headers.decode(raw).items() if key != "__metadata__"}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise Unusable("weights_invalid", f"the header of {name} can't be read: {e}", again) from None
    tensors: dict[str, Tensor] = {}
    at = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        trouble = _trouble(entry, at)
        if trouble:
            raise Unusable("weights_invalid", f"tensor {_short(key)} of {name} {trouble}", again)
        at = end
        tensors[key] = Tensor(entry.dtype, tuple(entry.shape), 8 + length + begin, 8 + length + end)
    whole = 8 + length + at
    if whole > size:
        raise Unusable(
            "weights_truncated", f"{name} ends after {size:,} bytes, and its header speaks of {whole:,}", again
        )
    if whole < size:
        raise Unusable("weights_invalid", f"{name} has {size:,} bytes, and its header speaks of {whole:,} only", again)
    return tensors


def _trouble(entry: _Entry, at: int) -> str:
    """What can't be with one entry of a header whose tensors before it end at ``at``; empty where all is well."""
    begin, end = entry.data_offsets
    bits = _BITS.get(entry.dtype)
    if bits is None:
        return f"is of type {_short(entry.dtype)}, which no reader knows"
    if len(entry.shape) > _DIMENSIONS_MOST or any(n < 0 for n in entry.shape):
        return f"has the shape {_short(str(entry.shape))}"
    if begin < 0 or end < begin:
        return f"is at {begin} to {end}"
    if begin != at:
        return f"begins at byte {begin:,}, and the one before it ends at {at:,}"
    if math.prod(entry.shape) * bits != (end - begin) * 8:
        return f"has {end - begin:,} bytes, and its shape {_short(str(entry.shape))} needs others"
    return ""


class Weights(msgspec.Struct, frozen=True):
    """All tensors of a folder. ``files``: file name → name → tensor."""

    files: dict[str, dict[str, Tensor]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name → tensor, of all files."""
        return {name: one for tensors in self.files.values() for name, one in tensors.items()}

    @property
    def bytes(self) -> int:
        """Sum of all tensors."""
        return sum(one.bytes for tensors in self.files.values() for one in tensors.values())


def read_weights(folder: Path) -> Weights:
    """The safetensors files that an engine would read; none where the folder has none.

    Raises:
        Unusable: a file or a tensor is missing, not whole, or there twice.
        OSError: a file can't be read.
    """
    index = folder / INDEX
    if index.is_file():
        return _by_index(folder, index)
    names = sorted(path.name for path in folder.glob(f"*{SUFFIX}") if path.is_file())
    _all_shards(names)
    files = {name: read_header(folder / name) for name in names}
    seen: dict[str, str] = {}
    for name, tensors in files.items():
        for key in tensors:
            if key in seen:
                raise Unusable(
                    "weights_invalid",
                    f"tensor {_short(key)} is in {seen[key]} and in {name}",
                    "leave only the files of one model in the folder, then register the version again",
                )
            seen[key] = name
    return Weights(files)


def _by_index(folder: Path, index: Path) -> Weights:
    if index.stat().st_size > INDEX_MOST:
        raise Unusable(
            "index_invalid",
            f"{INDEX} has {index.stat().st_size:,} bytes; at most {INDEX_MOST:,} are allowed",
            "write the model again with the library that made it",
        )
    try:
        wanted = _indexes.decode(index.read_bytes()).weight_map
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise Unusable(
            "index_invalid", f"{INDEX} can't be read: {e}", "write the model again with the library that made it"
        ) from None
    by_file: dict[str, set[str]] = {}
    for tensor, name in wanted.items():
        by_file.setdefault(name, set()).add(tensor)
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensors in sorted(by_file.items()):
        if name != name.strip() or "/" in name or "\\" in name or "\0" in name or not name.endswith(SUFFIX):
            raise Unusable(
                "index_invalid",
                f"{INDEX} names the file {_short(name)}, which is not the plain name of a {SUFFIX} file",
                "an index may only name files that lie beside it: take the model from a source that you trust",
            )
        if not (folder / name).is_file():
            raise Unusable(
                "weights_missing",
                f"{INDEX} names {_short(name)}, and there is no such file",
                "copy all files of the model, then register the version again",
            )
        found = read_header(folder / name)
        if lacking := sorted(tensors - found.keys()):
            raise Unusable(
                "tensors_missing",
                f"{name} lacks {len(lacking)} of the {len(tensors)} tensors that {INDEX} says are in it, "
                f"e.g. {_short(lacking[0])}",
                "copy index and weights of the same model, then register the version again",
            )
        files[name] = {key: one for key, one in found.items() if key in tensors}
    return Weights(files)


def _all_shards(names: Iterable[str]) -> None:
    """A set of numbered files must be whole."""
    sets: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name):
            sets.setdefault((shard["stem"], int(shard["of"])), set()).add(int(shard["n"]))
    for (stem, of), found in sets.items():
        if len(found) < of:
            first = next(n for n in range(1, of + 1) if n not in found)
            raise Unusable(
                "weights_missing",
                f"{of - len(found)} of the {of} files of {stem} are missing, the first is number {first}",
                "copy all files of the model, then register the version again",
            )


_LAYER = re.compile(r"(?P<stack>(?:.*\.)?(?:layers|h|blocks|block))\.(?P<n>\d+)\.(?P<rest>.+)")
#: In a stack of fewer layers nothing can be told from one that differs.
_LAYERS_LEAST = 4


def layer_of(name: str) -> str:
    """The layer of a tensor, e.g. ``model.layers.7``; where it is in none, its name without the last word."""
    found = _LAYER.fullmatch(name)
    if found:
        return f"{found['stack']}.{found['n']}"
    return name.rpartition(".")[0] or name


def odd_layer(tensors: Mapping[str, Tensor]) -> str:
    """What one layer lacks, or has in another shape, that all others of its stack have alike; empty where none does.

    An engine does not refuse such weights: the tensor then holds whatever was in memory, and the answers are fluent and
    wrong (vLLM 0.32, unquantised layers).
    """
    stacks: dict[str, dict[int, dict[str, tuple[str, tuple[int, ...]]]]] = {}
    for name, one in tensors.items():
        if found := _LAYER.fullmatch(name):
            layer = stacks.setdefault(found["stack"], {}).setdefault(int(found["n"][:9]), {})
            layer[found["rest"]] = (one.dtype, one.shape)
    for stack, layers in sorted(stacks.items()):
        if len(layers) < _LAYERS_LEAST:
            continue
        kinds: dict[frozenset[str], list[int]] = {}
        for n, layer in layers.items():
            kinds.setdefault(frozenset(layer), []).append(n)
        usual = max(kinds, key=lambda kind: len(kinds[kind]))
        for kind, members in kinds.items():
            if len(members) == 1 and kind < usual and len(kinds) == 2:
                return f"{stack}.{members[0]} lacks {min(usual - kind)}, which the other {len(layers) - 1} layers have"
        if len(kinds) > 1:
            continue
        for rest in sorted(usual):
            shapes: dict[tuple[int, ...], list[int]] = {}
            for n, layer in layers.items():
                shapes.setdefault(layer[rest][1], []).append(n)
            if len(shapes) == 2 and (alone := min(shapes, key=lambda s: len(shapes[s]))) and len(shapes[alone]) == 1:
                other = max(shapes, key=lambda s: len(shapes[s]))
                return (
                    f"{stack}.{shapes[alone][0]}.{rest} has the shape {list(alone)}, "
                    f"and {list(other)} in the other {len(layers) - 1} layers"
                )
    return ""


def depth(tensors: Iterable[str]) -> int:
    """Layers of the one stack that the names tell of; 0 where there is none, or more than one."""
    stacks: dict[str, set[str]] = {}
    for name in tensors:
        if found := _LAYER.fullmatch(name):
            stacks.setdefault(found["stack"], set()).add(found["n"])
    return len(next(iter(stacks.values()))) if len(stacks) == 1 else 0


def _short(text: str) -> str:
    """A name from a file, fit for a sentence."""
    shown = text if len(text) <= 80 else text[:79] + "…"
    return repr(shown)
