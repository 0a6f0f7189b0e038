"""What the fake engine does when it is operated on: filled, renamed, given adapters, put to sleep.

It copies the endpoints of vLLM's dev mode and of turnout's hand in it with the failures that were seen on real ones,
the silent ones above all: an answer of 200 after which requests hang, talk nonsense or keep old weights. "Weights" are
a word, or a folder whose ``fake.json`` may say what is wrong with them: ``nan``, ``broken`` or ``missing``; or with the
next reload of them, which answers 200 all the same: ``unread`` reads nothing, ``stale`` reads other weights.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

PATHS = frozenset(
    (
        *("/collective_rpc", "/pause", "/resume", "/is_paused", "/sleep", "/wake_up", "/is_sleeping"),
        *("/turnout/name", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/reset_prefix_cache"),
    )
)
#: A prompt of so many bytes fills a block of the cache of prefixes; a shorter one is computed anew each time.
BLOCK_BYTES = 1024
_BLOCK_TOKENS = 128
#: Parts of a sleeping engine that are woken apart from each other.
_TAGS = frozenset(("weights", "kv_cache"))


class Refused(Exception):
    """Answered with ``status``. ``dies``: and the engine is dead then."""

    def __init__(self, status: int, message: str, *, dies: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.dies = dies


class Hand:
    """State of one fake engine that can be operated on. ``weights`` empty: it was started without any.

    ``keeps_prefixes``: a pause leaves the cache of prefixes as it is.
    """

    def __init__(
        self,
        weights: str,
        model: str,
        *,
        adapters: bool = False,
        wake_fails: bool = False,
        keeps_prefixes: bool = False,
    ) -> None:
        self.weights = self.head = weights
        self.format = "auto" if weights else "dummy"
        self.paused = False
        self.asleep: set[str] = set()
        self.garbage = False
        self.poisoned = False
        self.wedged = False
        self.adapters: dict[str, str] = {}
        self.held: list[Callable[[], None]] = []
        self.named: Callable[[str, str], None] = lambda name, fingerprint: None
        self._model = model
        self._takes_adapters = adapters
        self._wake_fails = wake_fails
        self._keeps_prefixes = keeps_prefixes
        self._prefixes: dict[tuple[str, bytes], float] = {}

    @property
    def holds(self) -> bool:
        """Requests get no byte: paused, or asleep."""
        return self.paused or bool(self.asleep)

    @property
    def nan(self) -> bool:
        """It computes numbers that are none. A reload of good weights does not help any more: the cache holds them."""
        return self.poisoned

    def logprob(self, name: str) -> float:
        """Log probability of its first token: tells weights, output heads and adapters apart."""
        said = f"{self.weights}|{self.head}|{self.adapters.get(name, '')}"
        return -0.1 - zlib.crc32(said.encode()) % 1000 / 500

    def recall(self, name: str, prompt: bytes) -> tuple[float, int]:
        """Log probability of what follows a prompt, and how many of its tokens were in the cache of prefixes.

        What is cached there belongs to the weights that have computed it, and to the adapter's name that it was asked
        under, whatever is loaded under that name now.
        """
        said = self.logprob(name)
        if len(prompt) < BLOCK_BYTES:
            return said, 0
        key = (name if name in self.adapters else "", prompt)
        if key in self._prefixes:
            return self._prefixes[key], _BLOCK_TOKENS
        self._prefixes[key] = said
        return said, 0

    def answer(self, path: str, query: str, body: bytes) -> object:
        """Do it.

        Raises:
            Refused: it answers with an error.
        """
        asked = cast("dict[str, Any]", msgspec.json.decode(body)) if body else {}
        match path:
            case "/pause":
                self.paused = True
                if not self._keeps_prefixes:
                    self._prefixes.clear()
                return {"status": "paused"}
            case "/resume":
                self.paused = False
                self._let_go()
                return {"status": "resumed"}
            case "/is_paused":
                return {"is_paused": self.paused}
            case "/is_sleeping":
                return {"is_sleeping": bool(self.asleep)}
            case "/sleep":
                return self._sleep(int(parse_qs(query).get("level", ["1"])[0]))
            case "/wake_up":
                return self._wake(frozenset(parse_qs(query).get("tags", _TAGS)))
            case "/turnout/name":
                self.named(asked["names"][0], asked["fingerprint"])
                return {"changed": 1}
            case "/collective_rpc":
                return {"results": [self._call(asked["method"], asked.get("kwargs") or {})]}
            case "/v1/load_lora_adapter" | "/v1/unload_lora_adapter":
                return self._adapter(path, asked)
            case _:
                return {}

    def _let_go(self) -> None:
        if not self.holds:
            held, self.held = self.held, []
            for go_on in held:
                go_on()

    def _sleep(self, level: int) -> object:
        self.asleep = set(_TAGS)
        self.garbage = level > 1
        return {"status": "sleeping", "level": level}

    def _wake(self, tags: frozenset[str]) -> object:
        if self.wedged or self._wake_fails:
            self.wedged = True
            raise Refused(500, "CUDA Error: out of memory at cumem_allocator.cpp:62")
        self.asleep -= tags
        self._let_go()
        return {"status": "sleeping" if self.asleep else "awake", "tags": sorted(tags)}

    def _call(self, method: str, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        match method:
            case "update_config":
                self.format = kwargs["overrides"]["load_config"]["load_format"]
                return None
            case "turnout_fill":
                return self._fill(kwargs["path"], repack=kwargs.get("repack", True))
            case "turnout_proof":
                return {"fault": self._fault(kwargs["path"]), "compared": 1}
            case _:
                raise Refused(500, f"no such method: {method}")

    def _fill(self, path: str, *, repack: bool) -> dict[str, Any]:
        if self.format == "dummy":
            raise Refused(500, "Model reloading with `dummy` format")
        wrong = _wrong(path)
        if wrong.get("broken"):
            raise Refused(500, "start (0) + length (1536) exceeds dimension size (1024)", dies=True)
        if wrong.get("unread"):
            return {"fault": ""}
        self.weights = f"{path} of before" if wrong.get("stale") else path
        self.garbage = False
        self.poisoned = self.poisoned or bool(wrong.get("nan"))
        if repack:
            self.head = path
        missing = wrong.get("missing")
        return {"fault": f"Following weights were not loaded from checkpoint: {missing}" if missing else ""}

    def _fault(self, path: str) -> str:
        if self.weights != path:
            return "model.norm.weight differs from the file"
        if self.head != self.weights:
            return "the output head computes with other weights than it has (off by 0.105): stale"
        return "the output head computes numbers that are not finite" if self.poisoned else ""

    def _adapter(self, path: str, asked: dict[str, Any]) -> object:
        name = asked["lora_name"]
        if not self._takes_adapters:
            raise Refused(404, "Not Found")
        if path.endswith("unload_lora_adapter"):
            if self.adapters.pop(name, None) is None:
                raise Refused(404, f"The lora adapter '{name}' cannot be found.")
            return f"Success: LoRA adapter '{name}' removed successfully."
        if name in self.adapters:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        if _wrong(asked["lora_path"]).get("missing"):
            raise Refused(404, f"No adapter found for {asked['lora_path']}")
        self.adapters[name] = asked["lora_path"]
        return f"Success: LoRA adapter '{name}' added successfully."


def _wrong(path: str) -> dict[str, Any]:
    """What is wrong with these weights."""
    try:
        return cast("dict[str, Any]", msgspec.json.decode((Path(path) / "fake.json").read_bytes()))
    except OSError:
        return {}
