"""Tiny models on disk, whole and broken. Imported by path: see conftest.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "head_dim": 4,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
}
SIZES = {"BF16": 2, "F32": 4, "U8": 1}

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def shapes(layers: int = 4) -> Shapes:
    """Names, types and shapes of a small Llama."""
    found: Shapes = {"model.embed_tokens.weight": ("BF16", (16, 8)), "model.norm.weight": ("BF16", (8,))}
    for n in range(layers):
        found[f"model.layers.{n}.self_attn.q_proj.weight"] = ("BF16", (8, 8))
        found[f"model.layers.{n}.self_attn.o_proj.weight"] = ("BF16", (8, 8))
        found[f"model.layers.{n}.mlp.up_proj.weight"] = ("BF16", (12, 8))
    return found


def safetensors(path: Path, tensors: Shapes, *, fill: int = 0, changed: str = "") -> Path:
    """A whole file; the bytes of tensor ``changed`` differ from those of the others."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, at = b"", 0
    for name, (dtype, shape) in tensors.items():
        count = SIZES[dtype]
        for n in shape:
            count *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + count]}
        data += bytes([fill + (name == changed)]) * count
        at += count
    return raw(path, json.dumps(header).encode(), data)


def raw(path: Path, header: bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with this header, which may lie about its length."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def folder(path: Path, tensors: Shapes | None = None, *, changed: str = "", **config: Any) -> Path:
    """A model that can be served."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (path / "generation_config.json").write_text('{"temperature": 0.7}')
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    safetensors(path / "model.safetensors", shapes() if tensors is None else tensors, changed=changed)
    return path


def adapter(path: Path, *, rank: int = 2, width: int = 8, module: str = "self_attn.q_proj", layers: int = 4) -> Path:
    """A LoRA adapter for :func:`folder`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "target_modules": ["q_proj"]})
    )
    tensors: Shapes = {}
    for n in range(layers):
        name = f"base_model.model.model.layers.{n}.{module}"
        tensors[f"{name}.lora_A.weight"] = ("F32", (rank, width))
        tensors[f"{name}.lora_B.weight"] = ("F32", (8, rank))
    safetensors(path / "adapter_model.safetensors", tensors)
    return path
