"""The static registry: what turnout.toml declares, and which architectures the installed engines name.

vLLM's names are read from its source file, because importing it takes seconds and torch. Knows no connection.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from turnout.core.decider import Rejected

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turnout.events.model import EngineSpec

#: Where the packages keep their tables of architectures (vLLM 0.32, vLLM-Omni 0.30).
_TABLES = {
    "vllm": ("model_executor", "models", "registry.py"),
    "vllm_omni": ("model_executor", "models", "registry.py"),
}


class Engine(msgspec.Struct, frozen=True):
    """An installed engine package. ``architectures`` are the names in its tables, also of models it no longer runs."""

    package: str
    folder: str
    architectures: frozenset[str]


class BaseRegistry:
    """What is known before anything is registered.

    Args:
        models: (model, version) → engine settings of turnout.toml.
        engines: the installed packages; see :func:`find_engines`.
    """

    def __init__(
        self, models: Mapping[tuple[str, str], EngineSpec] | None = None, engines: tuple[Engine, ...] = ()
    ) -> None:
        self.models = dict(models or {})
        self.engines = engines

    def supported(self) -> frozenset[str]:
        """All architectures that an installed engine names; empty where none is installed."""
        return frozenset[str]().union(*(engine.architectures for engine in self.engines))

    def problem(self, engine: EngineSpec) -> Rejected | None:
        """Why a version can't be served, as far as this machine can tell; None where nothing speaks against it.

        Only what can be read here is judged: the weights may lie on the worker's host alone.
        """
        supported = self.supported()
        if engine.kind != "vllm" or not supported:
            return None
        name = architecture(Path(engine.path))
        if not name or name in supported:
            return None
        near = difflib.get_close_matches(name, sorted(supported), n=3)
        like = f"; the nearest that it names: {', '.join(near)}" if near else ""
        return Rejected(
            "architecture_unknown",
            f"{engine.path} is a {name}, which the installed vLLM does not name{like}",
            "check the folder's config.json, or register it all the same with --trust-architecture "
            "(vLLM runs some by Transformers)",
        )


def architecture(folder: Path) -> str:
    """The first of ``architectures`` in a folder's config.json; empty where that can't be read here."""
    try:
        config: object = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    names = cast("dict[str, object]", config).get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not names:
        return ""
    first = cast("list[object]", names)[0]
    return first if isinstance(first, str) else ""


def find_engines(python: str = "") -> tuple[Engine, ...]:
    """The engine packages of an interpreter, without starting it and without importing them.

    Args:
        python: path of an interpreter; empty for this one.
    """
    found: list[Engine] = []
    for package, table in _TABLES.items():
        folder = _package(package, python)
        if folder is None:
            continue
        names = _names(folder.joinpath(*table))
        if names:
            found.append(Engine(package, str(folder), names))
    return tuple(found)


def _package(package: str, python: str) -> Path | None:
    if not python:
        spec = importlib.util.find_spec(package)  # finds, does not import
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        return Path(places[0]) if places else None
    # <environment>/bin/python → <environment>/lib/python3.x/site-packages; the link is not followed: it leaves it
    environment = Path(python).absolute().parent.parent
    return next(iter(sorted(environment.glob(f"lib/python3*/site-packages/{package}"))), None)


def _names(file: Path) -> frozenset[str]:
    """The string keys of the file's top-level dict displays: the tables of architectures."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return frozenset()
    names: set[str] = set()
    for statement in tree.body:
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            keys = (key.value for key in value.keys if isinstance(key, ast.Constant))
            names.update(key for key in keys if isinstance(key, str))
    return frozenset(names)
