"""What a worker's owner allows to be run on the host. Checked before any plan is made, whoever registered the version.

Registering a version is an operator's right on the control plane; running a command on a GPU host is not part of it.
The check reads the file system (paths are resolved, links followed) and nothing else.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import msgspec

from turnout.workers.inference.engines.base import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turnout.events.model import EngineSpec

#: Flags of vLLM (0.32) that a version may not set, as shell patterns on the name written with dashes.
#: Where it listens and what it is called are the worker's; the rest runs code, opens a port, reads or writes beyond the
#: model's folder, or puts prompts into the log (and so into events). A name that a later vLLM adds is caught by the
#: patterns with a star where it follows the same naming.
DENIED_VLLM_FLAGS = (
    # the worker's own
    *("--model", "--served-model-name", "--uds", "--host", "--port", "--fingerprint-*", "--config", "--help"),
    # code of the caller's choice
    *("--trust-*", "--worker-cls", "--worker-extension-cls", "--scheduler-cls", "--*-cls", "--*-plugin", "--*-plugins"),
    *("--tool-parser-plugin", "--reasoning-parser-plugin", "--io-processor-plugin", "--logits-processors"),
    *("--middleware", "--model-class-overrides", "--code-revision", "--tool-server", "--log-config-file"),
    *("--logging-config*", "--ec-manager-config", "--profiler-config", "--additional-config"),
    # doors: ports, other hosts, further endpoints, keys
    *("--api-key", "--ssl-*", "--enable-ssl-refresh", "--grpc", "--grpc-port", "--headless", "--*-port", "--*-address"),
    *("--master-addr", "--master-port", "--data-parallel-address", "--data-parallel-rpc-port", "-dpa", "-dpp"),
    *("--data-parallel-supervisor-port", "--nnodes", "-n", "--node-rank", "-r", "--enable-scale-out", "--root-path"),
    *("--kv-transfer-config", "--ec-transfer-config", "--kv-events-config", "--weight-transfer-config", "--hf-token"),
    *("--*-transfer-config", "--enable-trace-replay", "--enable-prompt-embeds", "--enable-mm-embeds"),
    # files beyond the model, prompts in the log
    *("--allowed-local-media-path", "--enable-log-requests", "--enable-log-outputs", "--enable-log-deltas"),
)
DENIED_FAKE_FLAGS = (
    "--socket",
    "--host",
    "--port",
    "--model",
    "--version",
    "--weights",
    "--enable-lora",
    "--help",
    "-h",
)

#: Keys inside a JSON value (or after a dot) that name code to be imported.
_CODE_KEY = re.compile(
    r"plugin|(^|_)cls$|(^|_)class(es)?$|(^|_)module$|module_path|inductor_passes|auto_map", re.IGNORECASE
)
#: Values of keys and flags that end in "backend" choose from a list; a dot or colon makes them an import.
_BACKEND = re.compile(r"backend$")
_IMPORT = re.compile(r"[.:]")
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class WorkerPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The owner's word.

    Attributes:
        engines: engine kinds that may be run.
        commands: how a command of kind ``openai`` must begin, e.g. ``/opt/llama/llama-server`` or
            ``python /srv/serve.py``. Who allows just ``python`` allows everything. None by default.
        hosts: hosts that the URL of kind ``openai`` may name.
        model_roots: folders under which weights, and every other file that a flag names, must lie. Links are followed
            first. Empty: the folder that the worker was started in.
        denied_flags: engine kind → flags that versions may not set, beyond those that are denied anyway.
        allowed_flags: engine kind → flags that are allowed although this software denies them; exact names.
    """

    engines: tuple[str, ...] = ("vllm", "openai", "fake")
    commands: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "::1")
    model_roots: tuple[str, ...] = ()
    denied_flags: dict[str, tuple[str, ...]] = {}
    allowed_flags: dict[str, tuple[str, ...]] = {}

    def admit(self, spec: EngineSpec, model: str, version: str) -> EngineSpec | Refusal:
        """The spec with its path and executable resolved, or why it may not be run here."""
        if spec.kind not in self.engines:
            return Refusal(
                "engine_not_allowed",
                f"this worker does not run engines of kind {spec.kind}",
                f"it runs {', '.join(self.engines) or 'none'}; the worker's owner sets `engines` in its policy",
            )
        for name in (model, version):
            if name.startswith("-") or "\0" in name:
                return Refusal(
                    "name_not_allowed", f"{name!r} would be read as a flag", "choose a name without a leading -"
                )
        refusal = self._check_args(spec)
        if refusal is not None:
            return refusal
        if spec.url:
            refusal = self._check_url(spec.url)
            if refusal is not None:
                return refusal
        command = self._resolve_command(spec.command)
        if isinstance(command, Refusal):
            return command
        path = self._resolve_path(spec.path) if spec.path else ""
        if isinstance(path, Refusal):
            return path
        adapter = self._resolve_path(spec.adapter) if spec.adapter else ""
        if isinstance(adapter, Refusal):
            return adapter
        return msgspec.structs.replace(spec, path=path, command=command, adapter=adapter)

    def roots(self) -> tuple[Path, ...]:
        """The model roots, resolved now."""
        return tuple(Path(os.path.realpath(os.path.expanduser(root))) for root in self.model_roots or (".",))

    def _inside(self, path: str) -> bool:
        real = Path(os.path.realpath(os.path.expanduser(path)))
        return any(real.is_relative_to(root) for root in self.roots())

    def _resolve_path(self, path: str) -> str | Refusal:
        if not self._inside(path):
            return self._outside(path)
        real = os.path.realpath(os.path.expanduser(path))
        if not os.path.exists(real):
            return Refusal(
                "path_missing",
                f"there is nothing at {path} on this worker's host",
                "copy the weights there, or register the version again with the right --source",
                "starting",
            )
        return real

    def _outside(self, path: str) -> Refusal:
        roots = ", ".join(map(str, self.roots()))
        return Refusal(
            "path_not_allowed",
            f"{path} does not lie under a model root of this worker",
            f"move it under {roots}, or let the worker's owner add its folder to `model_roots`",
        )

    def _check_url(self, url: str) -> Refusal | None:
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:
            host = ""
        if host in self.hosts:
            return None
        return Refusal(
            "url_not_allowed",
            f"this worker may not reach the host of {url}",
            f"it may reach {', '.join(self.hosts) or 'none'}; the worker's owner sets `hosts` in its policy",
        )

    def _resolve_command(self, command: tuple[str, ...]) -> tuple[str, ...] | Refusal:
        """The command with its executable's absolute path, where it begins as an allowed one does."""
        if not command:
            return ()
        for allowed in self.commands:
            words = shlex.split(allowed)
            found = shutil.which(words[0]) if words else None
            if found is None:
                continue
            asked = shutil.which(command[0]) if "/" in command[0] or command[0] == words[0] else None
            same = asked is not None and os.path.realpath(asked) == os.path.realpath(found)
            if same and command[1 : len(words)] == tuple(words[1:]):
                return (found, *command[1:])
        return Refusal(
            "command_not_allowed",
            f"this worker may not run {shlex.join(command[:2])}",
            f"it may run {', '.join(self.commands) or 'no command'}; the worker's owner sets `commands` in its policy",
        )

    def _check_args(self, spec: EngineSpec) -> Refusal | None:
        if any("\0" in word for word in (*spec.args, *spec.command)):
            return Refusal("flag_not_allowed", "an argument holds a NUL byte", "register the version again without it")
        if spec.kind == "openai":
            return None  # the owner allowed the command, and what it makes of its arguments
        builtin = DENIED_VLLM_FLAGS if spec.kind == "vllm" else DENIED_FAKE_FLAGS
        denied = (*builtin, *self.denied_flags.get(spec.kind, ()))
        allowed = frozenset(self.allowed_flags.get(spec.kind, ()))
        flag = ""
        for word in spec.args:
            if word == "--":
                return _denied("--", "it would end the worker's own flags")
            if not word.startswith("-") and not flag:
                return _denied(word, "it belongs to no flag")
            if word.startswith("-") and not _is_number(word):
                flag = _flag(word)
                if flag in allowed:
                    continue
                hit = _match(flag, denied)
                if hit:
                    return _denied(word, f"it is, or could stand for, {hit}")
            if flag not in allowed:
                refusal = self._check_value(flag, word)
                if refusal is not None:
                    return refusal
        return None

    def _check_value(self, flag: str, word: str) -> Refusal | None:
        """Look into a flag's value: paths, addresses and names of code, also inside JSON and after a dot."""
        name, dots, value = _split(word)
        for part in dots:
            if _CODE_KEY.search(part.replace("-", "_")):
                return _denied(word, f"{part} names code to be run")
        for key, text in _texts(dots[-1] if dots else (name or flag), value):
            if key.startswith("{") and _CODE_KEY.search(key[1:].replace("-", "_")):
                return _denied(word, f"the key {key[1:]} names code to be run")
            if _BACKEND.search(key) and _IMPORT.search(text):
                return _denied(word, "a backend with a dot or colon is an import")
            if text == "custom_class":
                return _denied(word, "it loads a class of the caller's choice")
            for candidate in (text, text.partition("=")[2]):
                if _SCHEME.match(candidate):
                    return _denied(word, "it is an address, and the engine may only read local files")
                if _is_path(candidate) and not self._inside(candidate):
                    return self._outside(candidate)
        return None


def _denied(word: str, why: str) -> Refusal:
    return Refusal(
        "flag_not_allowed",
        f"a version may not set {word}: {why}",
        "leave it out, or let the worker's owner add the flag to `allowed_flags`",
    )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _split(word: str) -> tuple[str, list[str], str]:
    """``--name.a.b=value`` → name, [a, b], value; a bare word is a value without a name."""
    if not word.startswith("-"):
        return "", [], word
    name, _, value = word.partition("=")
    name, *dots = name.split(".")
    return _flag(name), [d.rstrip("+") for d in dots], value


def _flag(word: str) -> str:
    """A flag's name as vLLM's parser reads it: up to the first ``=`` or dot, underscores as dashes, without ``no-``."""
    name = re.split(r"[=.]", word, maxsplit=1)[0]
    if name.startswith("--"):
        name = "--" + name[2:].replace("_", "-")
        if name.startswith("--no-"):
            name = "--" + name[5:]
    return name


def _match(flag: str, denied: tuple[str, ...]) -> str:
    """The denied flag that ``flag`` is, or that argparse would take it for, empty where there is none.

    argparse takes an unambiguous beginning of a flag for the flag; ``-n2`` for ``-n 2``.
    """
    for pattern in denied:
        if fnmatch.fnmatchcase(flag, pattern):
            return pattern
        plain = pattern.partition("*")[0]
        if flag not in _WHOLE and len(flag) > 1 and plain.startswith(flag):
            return pattern
        if not plain.startswith("--") and len(plain) == 2 and flag[:2] == plain and _is_number(flag[2:]):
            return pattern
    return ""


#: Flags of vLLM that are whole, although a denied flag begins like them: argparse prefers the exact name.
_WHOLE = frozenset(("-dp",))


def _texts(key: str, value: str) -> Iterator[tuple[str, str]]:
    """All texts in a value: itself, or what its JSON holds. Keys of JSON objects are marked with a leading ``{``."""
    if value[:1] in ("{", "["):
        try:
            data: object = json.loads(value)
        except ValueError:
            yield key, value
            return
        yield from _walk(key, data)
    else:
        for item in value.split(","):
            yield key, item


def _walk(key: str, data: object) -> Iterator[tuple[str, str]]:
    if isinstance(data, dict):
        for k, v in cast("dict[str, object]", data).items():
            yield "{" + k, ""
            yield from _walk(k, v)
    elif isinstance(data, list):
        for v in cast("list[object]", data):
            yield from _walk(key, v)
    elif isinstance(data, str):
        yield key, data


def _is_path(text: str) -> bool:
    """Whether the engine could read it as a path that exists or may exist on this host."""
    if _is_number(text):
        return False
    return text.startswith(("/", "~", ".")) or "/.." in text or os.path.exists(text)
