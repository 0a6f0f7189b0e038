"""What an operator wrote down: turnout.toml, environment, flags → one checked value. Starts nothing.

Strict: a key that does not exist is an error that names the nearest known one and where it stands. All problems are
reported at once. Flags win over the environment, the environment over the file.
"""

from __future__ import annotations

import difflib
import re
import shlex
import tomllib
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from turnout.core import model, policy, serving
from turnout.core.config import CacheConfig, ModelSwitchingConfig
from turnout.core.decider import Rejected
from turnout.core.handling import Defaults
from turnout.core.strategies import STRATEGIES
from turnout.events.model import EngineSpec, Probe, Serving
from turnout.workers.admin.settings import AdminSettings
from turnout.workers.controller.settings import AlertSettings
from turnout.workers.gateway.settings import GatewaySettings
from turnout.workers.inference.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FILE = "turnout.toml"
#: Port of the gateway where none is named; the engines' usual 8000 stays free for them.
DEFAULT_PORT = 8400

_PREFIX = "TURNOUT_"
#: Variables that are not settings: where the file is, and the passwords of the NATS server (deploy/nats).
_NOT_SETTINGS = frozenset(("TURNOUT_CONFIG",))
_PASSWORD = "_PASSWORD"  # noqa: S105  the end of names, no password
_MISSING: Any = object()

Path_ = tuple[str, ...]


class Problem(msgspec.Struct, frozen=True):
    """Something that can't be meant. ``where``: file and line, variable or flag."""

    where: str
    what: str


class SettingsError(Exception):
    """The settings can't be used; ``problems`` has all reasons."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("; ".join(f"{p.where}: {p.what}" for p in problems))
        self.problems = problems


class NatsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The control plane's server.

    Attributes:
        url: ``nats://user:password@host:port``, several with commas; empty for the default.
        replicas: of the streams, where this process makes them; 3 on a cluster.
        away_s: seconds without a connection after which a controller ends, to be started anew.
    """

    url: str = ""
    replicas: int = 1
    away_s: float = 60.0


class ControllerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One controller process. ``id``: empty makes one at every start."""

    id: str = ""


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where processes without an HTTP server of their own answer ``/metrics``: ``host:port``, empty for nowhere."""

    controller: str = ""
    worker: str = ""


class DeclaredVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A version of turnout.toml. Fields as in ``EngineSpec`` and ``RegisterVersion``.

    ``source`` is the path of its weights, ``command`` a line or words.
    """

    engine: str
    source: str = ""
    url: str = ""
    command: str | tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    note: str = ""
    probe: Probe = Probe()
    adapter: str = ""
    tags: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    parent: str = ""
    trust_architecture: bool = False
    replicas: int | None = None

    def spec(self, folder: Path) -> EngineSpec:
        """The engine settings; a path is relative to the file's folder."""
        command = tuple(shlex.split(self.command)) if isinstance(self.command, str) else self.command
        path, adapter = (str((folder / p).resolve()) if p else "" for p in (self.source, self.adapter))
        return EngineSpec(self.engine, path, self.url, command, self.args, self.probe, adapter)


class DeclaredModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of turnout.toml.

    ``active``: version that it serves at first; empty for the first one. ``policies``: named ways to switch, in the
    words of docs/strategies.md. The other fields say whether it is loaded on demand: see docs/on-demand.md.
    """

    active: str = ""
    on_demand: bool = False
    keep_alive: str | float | None = None
    queue: int | None = None
    max_wait: str | float | None = None
    residency: str | float | None = None
    versions: dict[str, DeclaredVersion] = {}
    policies: dict[str, dict[str, object]] = {}

    @property
    def first(self) -> str:
        """The version to serve while the log knows of none."""
        return self.active or next(iter(self.versions), "")

    @property
    def serving(self) -> Serving | tuple[str, ...]:
        """Whether it is loaded on demand, or what can't be meant."""
        words = {word: value for word in serving.WORDS if (value := getattr(self, word)) not in (None, False)}
        return serving.parse(words)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything; each attribute is a table of the file. ``folder``: where the file's paths start."""

    nats: NatsSettings = NatsSettings()
    switching: ModelSwitchingConfig = ModelSwitchingConfig()
    switch: Defaults = Defaults()
    cache: CacheConfig = CacheConfig()
    gateway: GatewaySettings = GatewaySettings(port=DEFAULT_PORT)
    worker: WorkerSettings = WorkerSettings()
    controller: ControllerSettings = ControllerSettings()
    metrics: MetricsSettings = MetricsSettings()
    alerts: AlertSettings = AlertSettings()
    admin: AdminSettings = AdminSettings()
    models: dict[str, DeclaredModel] = {}
    file: str = ""

    @property
    def folder(self) -> Path:
        """Folder of the file, else the current one."""
        return Path(self.file).resolve().parent if self.file else Path.cwd()

    def engines(self) -> dict[tuple[str, str], EngineSpec]:
        """(model, version) → engine settings, in the file's order."""
        return {
            (name, version): declared.spec(self.folder)
            for name, one in self.models.items()
            for version, declared in one.versions.items()
        }


def load(
    file: str = "", environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> Settings:
    """Read and check everything.

    Args:
        file: path of the file; empty for ``TURNOUT_CONFIG``, else ``turnout.toml`` here where it exists.
        environ: variables; ``TURNOUT_<TABLE>_<KEY>`` sets ``key`` of ``[table]``, written as in the file.
        flags: ``table.key`` → value.

    Raises:
        SettingsError: with all problems.
    """
    environ = {} if environ is None else environ
    file = file or environ.get("TURNOUT_CONFIG", "")
    reader = _Reader()
    if file or Path(FILE).is_file():
        file = file or FILE
        reader.read_file(Path(file))
    reader.read_environment(environ)
    reader.read_flags(flags or {})
    settings = reader.settings(file)
    problems = [*reader.problems, *_meaningless(settings, reader)]
    if problems:
        raise SettingsError(tuple(problems))
    return settings


class _Reader:
    """Collects values with where they came from, then builds the structs, noting every problem."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._tree: dict[str, Any] = {}
        self._origin: dict[Path_, str] = {}
        self._file = ""
        self._lines: dict[Path_, int] = {}

    def read_file(self, path: Path) -> None:
        self._file = str(path)
        try:
            text = path.read_text(encoding="utf-8")
            self._tree = tomllib.loads(text)
        except OSError as e:
            self.problems.append(Problem(self._file, f"can't be read: {e.strerror}"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            self.problems.append(Problem(self._file, f"is not TOML: {e}"))
        else:
            self._lines = dict(_find_lines(text))

    def read_environment(self, environ: Mapping[str, str]) -> None:
        tables = {t.name: t.type for t in msgspec.structs.fields(Settings) if t.name not in ("models", "file")}
        known = {
            f"{_PREFIX}{t}_{key}".upper(): (t, key) for t, type in tables.items() for key in type.__struct_fields__
        }
        for name, raw in environ.items():
            if not name.startswith(_PREFIX) or name in _NOT_SETTINGS or name.endswith(_PASSWORD):
                continue
            if name in known:
                self._set(known[name], _parse(raw), name)
            else:
                self.problems.append(Problem(name, f"is no setting{_nearest(name, [*known, *_NOT_SETTINGS])}"))

    def read_flags(self, flags: Mapping[str, object]) -> None:
        for dotted, value in flags.items():
            table, _, key = dotted.partition(".")
            self._set((table, key), value, f"--{key.replace('_', '-')}")

    def settings(self, file: str) -> Settings:
        if "file" in self._tree:  # a field of the struct, not a table of the file
            self.problems.append(Problem(self.where(("file",)), f"unknown key 'file'{_nearest('file', _tables())}"))
        tree = {name: value for name, value in self._tree.items() if name != "file"}
        read: Settings = self._struct(Settings, tree, (), Settings())
        return msgspec.structs.replace(read, file=file)

    def where(self, path: Path_) -> str:
        """Where a value stands, or the nearest table around it."""
        if path in self._origin:
            return self._origin[path]
        for length in range(len(path), 0, -1):
            if line := self._lines.get(path[:length]):
                return f"{self._file}, line {line}"
        return self._file or "settings"

    def _set(self, path: tuple[str, str], value: object, origin: str) -> None:
        table, key = path
        inner = self._tree.setdefault(table, {})
        if isinstance(inner, dict):
            inner[key] = value
        self._origin[path] = origin

    def _wrong(self, path: Path_, what: str) -> None:
        self.problems.append(Problem(self.where(path), what))

    def _struct(self, type: type[Any], value: object, path: Path_, base: Any) -> Any:
        """Read a table; what is wrong is noted, and ``base``'s value stands in."""
        value = value.value if isinstance(value, _Text) else value
        if not isinstance(value, dict):
            self._wrong(path, f"{_dotted(path)} must be a table: write [{_dotted(path)}]")
            return base
        written = cast("dict[str, object]", value)
        hints = get_type_hints(type)
        fields = {f.name: f for f in msgspec.structs.fields(type)}
        known = [name for name in fields if (*path, name) != ("file",)]
        read: dict[str, Any] = {}
        for key, inner in written.items():
            here = (*path, key)
            if key not in fields:
                table = f"[{_dotted(path)}]" if path else "the file"
                self._wrong(here, f"{table} has no key {key!r}{_nearest(key, known)}")
            elif (got := self._value(hints[key], inner, here, getattr(base, key, _MISSING))) is not _MISSING:
                read[key] = got
        if base is not _MISSING:
            return msgspec.structs.replace(base, **read)
        missing = [f.name for f in fields.values() if f.required and f.name not in read]
        for name in missing:
            if name not in written:  # else it is there and its problem is noted
                self._wrong(path, f"[{_dotted(path)}] needs {name!r}")
        made: Any = _MISSING if missing else type(**read)
        return made

    def _value(self, type: Any, value: object, path: Path_, base: Any) -> Any:
        if isinstance(type, _TYPE) and issubclass(type, msgspec.Struct):
            return self._struct(type, value, path, base)
        if get_origin(type) is dict and _is_struct(inner := get_args(type)[1]):
            return self._table_of(inner, value, path)
        if get_origin(type) is tuple and _is_struct(inner := get_args(type)[0]):
            return self._list_of(inner, value, path)
        raw = value.raw if isinstance(value, _Text) else _MISSING
        parsed = value.value if isinstance(value, _Text) else value
        for candidate in (parsed, raw):
            try:
                if candidate is not _MISSING:
                    return msgspec.convert(candidate, cast("Any", type))
            except msgspec.ValidationError:
                continue
        self._wrong(path, f"{_dotted(path)} is {_shown(parsed)}: give {_wanted(type)}")
        return _MISSING

    def _table_of(self, inner: type[Any], value: object, path: Path_) -> Any:
        if not isinstance(value, dict):
            self._wrong(path, f"{_dotted(path)} must be a table: write [{_dotted(path)}.NAME]")
            return _MISSING
        read: dict[str, Any] = {}
        for name, one in cast("dict[str, object]", value).items():
            base = _MISSING if any(f.required for f in msgspec.structs.fields(inner)) else inner()
            got = self._struct(inner, one, (*path, name), base)
            if got is not _MISSING:
                read[name] = got
        return read

    def _list_of(self, inner: type[Any], value: object, path: Path_) -> Any:
        value = value.value if isinstance(value, _Text) else value
        if not isinstance(value, list):
            self._wrong(path, f"{_dotted(path)} must be a list of tables: write [[{_dotted(path)}]]")
            return _MISSING
        tables = enumerate(cast("list[object]", value), 1)
        read = [self._struct(inner, one, (*path, str(number)), _MISSING) for number, one in tables]
        return _MISSING if any(one is _MISSING for one in read) else tuple(read)


class _Text(msgspec.Struct, frozen=True):
    """A variable's value: as TOML where it reads as such, and as it was written."""

    value: object
    raw: str


_TYPE = type


def _parse(raw: str) -> _Text:
    try:
        return _Text(tomllib.loads(f"x = {raw}")["x"], raw)
    except tomllib.TOMLDecodeError:
        return _Text(raw, raw)


def _is_struct(type: Any) -> bool:
    return isinstance(type, _TYPE) and issubclass(type, msgspec.Struct)


def _meaningless(settings: Settings, reader: _Reader) -> Iterator[Problem]:
    """What is well-formed and still can't be meant."""
    for table, problems in (
        ("switching", settings.switching.problems(frozenset(STRATEGIES))),
        ("gateway", settings.gateway.problems()),
        ("worker", settings.worker.problems()),
        ("cache", settings.cache.problems()),
        ("switch", _switch_problems(settings.switch)),
        ("nats", _nats_problems(settings.nats)),
        ("alerts", settings.alerts.problems()),
        ("admin", settings.admin.problems()),
    ):
        for problem in problems:
            key = re.split(r"[ .]", problem, maxsplit=1)[0]
            yield Problem(reader.where((table, key)), f"[{table}] {problem}")
    for name, one in settings.models.items():
        yield from _model_problems(settings, name, one, reader)
    for number, planned in enumerate(settings.cache.schedule, 1):
        declared = settings.models.get(planned.model)
        known = declared is not None and planned.version in declared.versions
        if settings.models and not settings.switching.enable_dynamic_registry and not known:
            what = f"[cache] schedule number {number} names {planned.model} {planned.version}, which is not declared"
            yield Problem(reader.where(("cache", "schedule")), what)
    for name in settings.gateway.model_limits:
        if settings.models and not settings.switching.enable_dynamic_registry and name not in settings.models:
            where = reader.where(("gateway", "model_limits", name))
            yield Problem(where, f"[gateway.model_limits] names {name!r}{_nearest(name, list(settings.models))}")


def _switch_problems(defaults: Defaults) -> tuple[str, ...]:
    found = [
        f"{name} is {value}: give a number of seconds, 0 or more"
        for name in ("bake_s", "drain_s")
        if not 0 <= (value := getattr(defaults, name)) < 1e9
    ]
    if not 0 < defaults.hold_wait_s < 1e9:
        found.append(f"hold_wait_s is {defaults.hold_wait_s}: give a number of seconds above 0")
    if defaults.hold_queue < 1:
        found.append(f"hold_queue is {defaults.hold_queue}: give the number of requests that may wait, 1 or more")
    return tuple(found)


def _nats_problems(nats: NatsSettings) -> tuple[str, ...]:
    found: list[str] = []
    if nats.replicas not in (1, 3, 5):
        found.append(f"replicas is {nats.replicas}: give 1, 3 or 5")
    if not 1 <= nats.away_s < 1e9:
        found.append(f"away_s is {nats.away_s}: give a number of seconds, 1 or more")
    return tuple(found)


def _model_problems(settings: Settings, name: str, one: DeclaredModel, reader: _Reader) -> Iterator[Problem]:
    if not one.versions:
        what = f"[models.{name}] has no version: add [models.{name}.versions.v1] with engine = "
        yield Problem(reader.where(("models", name)), f'{what}"{model.ENGINE_KINDS[0]}"')
    if one.active and one.versions and one.active not in one.versions:
        what = f"[models.{name}] active is {one.active!r}, which is not declared"
        yield Problem(reader.where(("models", name, "active")), what + _nearest(one.active, list(one.versions)))
    if isinstance(wrong := one.serving, tuple):
        for problem in wrong:
            word = re.split(r"[ ,]", problem, maxsplit=1)[0]
            yield Problem(reader.where(("models", name, word)), f"[models.{name}] {problem}")
    for named, raw in one.policies.items():
        if isinstance(problems := policy.parse(raw), tuple):
            where = reader.where(("models", name, "policies", named))
            for problem in problems:
                yield Problem(where, f"[models.{name}.policies.{named}] {problem}")
    for version, declared in one.versions.items():
        where = reader.where(("models", name, "versions", version))
        if isinstance(declared.command, str) and _unbalanced(declared.command):
            yield Problem(where, f"[models.{name}.versions.{version}] command has an open quote: {declared.command}")
            continue
        tried = model.RegisterVersion(name, version, declared.spec(settings.folder), replicas=declared.replicas)
        decided = model.decide(model.initial, tried)
        if isinstance(decided, Rejected):
            hint = decided.hint.replace("--source PATH", 'source = "PATH"').replace(
                "--engine openai", 'engine = "openai"'
            )
            hint = hint.replace("--url URL", 'url = "URL"').replace("--command COMMAND", 'command = "COMMAND"')
            yield Problem(where, f"[models.{name}.versions.{version}] {decided.reason}: {hint}")


def _unbalanced(command: str) -> bool:
    try:
        shlex.split(command)
    except ValueError:
        return True
    return False


def _tables() -> list[str]:
    return [name for name in Settings.__struct_fields__ if name != "file"]


def _nearest(name: str, known: list[str]) -> str:
    """``; did you mean 'x'?``, or what there is."""
    near = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.6)
    if near:
        return f"; did you mean {next(k for k in known if k.lower() == near[0])!r}?"
    return f"; known: {', '.join(sorted(known))}" if len(known) <= 24 else ""


def _dotted(path: Path_) -> str:
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"' for part in path)


def _shown(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _wanted(type: Any) -> str:
    """A type as a person would say it."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text in quotes",
        Path: "a path in quotes",
        types.NoneType: "nothing",
    }
    if type in names:
        return names[type]
    origin = get_origin(type)
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(one) for one in get_args(type) if one is not types.NoneType)
    if origin in (tuple, list, frozenset, set):
        return 'a list, e.g. ["one", "two"]' if get_args(type)[0] is str else "a list"
    if origin is dict:
        return "a table"
    return str(type)


def _find_lines(text: str) -> Iterator[tuple[Path_, int]]:
    """Path of every table and key → its first line. Good enough for messages: multi-line values are not followed."""
    table: Path_ = ()
    seen: set[Path_] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            table = _split(header[1])
            found = [table[:length] for length in range(1, len(table) + 1)]
        elif key := re.match(r"""\s*((?:"[^"]*"|'[^']*'|[A-Za-z0-9_.-]+)+)\s*=""", line):
            path = (*table, *_split(key[1]))
            found = [path[:length] for length in range(len(table) + 1, len(path) + 1)]
        else:
            continue
        for path in found:
            if path not in seen:
                seen.add(path)
                yield path, number


def _split(dotted: str) -> Path_:
    parts = re.findall(r"""\s*(?:"([^"]*)"|'([^']*)'|([^.\s]+))\s*""", dotted)
    return tuple(next(p for p in part if p) if any(part) else "" for part in parts)
