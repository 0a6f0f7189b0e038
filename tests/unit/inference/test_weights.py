"""Weight files, whole, broken and hostile: each is a sentence with its numbers, and never a crash."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.inference import files

from turnout.workers.inference.weights import (
    INDEX,
    Tensor,
    Unusable,
    depth,
    layer_of,
    odd_layer,
    read_header,
    read_weights,
)

if TYPE_CHECKING:
    from pathlib import Path


def entry(begin: int, end: int, shape: Any = (4,), dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_whole_file_tells_its_tensors(tmp_path: Path) -> None:
    path = files.safetensors(tmp_path / "model.safetensors", {"a": ("BF16", (2, 3)), "b": ("F32", ())})
    found = read_header(path)
    assert [(name, one.dtype, one.shape, one.bytes) for name, one in found.items()] == [
        ("a", "BF16", (2, 3), 12),
        ("b", "F32", (), 4),
    ]
    assert found["b"].end == path.stat().st_size


@pytest.mark.parametrize("cut", [1, 100])
def test_a_truncated_file_is_told_with_both_sizes(tmp_path: Path, cut: int) -> None:
    path = files.safetensors(tmp_path / "model.safetensors", files.shapes())
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.raises(Unusable) as caught:
        read_header(path)
    assert caught.value.code == "weights_truncated"
    assert f"{len(whole) - cut:,}" in caught.value.reason
    assert f"{len(whole):,}" in caught.value.reason


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", "weights_truncated", "has 0 bytes"),
        (b"\x01\x02", "weights_truncated", "too few"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "weights_truncated", "its header alone has 1,099,511,627,776"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n", "weights_truncated", "header alone"),
        ((4).to_bytes(8, "little") + b"nope", "weights_invalid", "can't be read"),
        ((2).to_bytes(8, "little") + b"[]", "weights_invalid", "can't be read"),
        ((2).to_bytes(8, "little") + b"{}more", "weights_invalid", "speaks of 10 only"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "weights_invalid", "can't be read"),
    ],
)
def test_a_file_that_is_none_is_told_as_such(tmp_path: Path, content: bytes, code: str, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(Unusable) as caught:
        read_header(path)
    assert caught.value.code == code
    assert says in caught.value.reason
    assert caught.value.hint


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, "tensor 'b' of model.safetensors begins at byte 2"),
        ({"a": entry(2, 6)}, "the one before it ends at 0"),
        ({"a": entry(0, 4), "b": entry(6, 10)}, "begins at byte 6, and the one before it ends at 4"),
        ({"a": entry(0, 4, (5,))}, "its shape '[5]' needs others"),
        ({"a": entry(0, 4, (-4,))}, "has the shape"),
        ({"a": entry(0, 4, (1,) * 40)}, "has the shape"),
        ({"a": entry(4, 0)}, "is at 4 to 0"),
        ({"a": entry(0, 4, dtype="Q9")}, "of type 'Q9'"),
        ({"a": {"dtype": "U8", "shape": "4", "data_offsets": [0, 4]}}, "can't be read"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}, "can't be read"),
        ({"a": [1]}, "can't be read"),
        ({"x" * 5000: entry(2, 6)}, "xxx…'"),
    ],
)
def test_a_header_that_lies_is_told_with_what_it_says(tmp_path: Path, header: dict[str, Any], says: str) -> None:
    path = files.raw(tmp_path / "model.safetensors", json.dumps(header).encode(), b"\0" * 10)
    with pytest.raises(Unusable) as caught:
        read_header(path)
    assert caught.value.code == "weights_invalid"
    assert says in caught.value.reason
    assert len(caught.value.reason) < 400


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(Unusable, match="can't be read"):
        read_header(files.raw(tmp_path / "model.safetensors", deep))


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_no_bytes_at_all_are_more_than_unusable(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(Unusable):
        read_header(path)


def index(path: Path, weight_map: dict[str, str]) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_index_brings_its_files_together(tmp_path: Path) -> None:
    files.safetensors(tmp_path / "one.safetensors", {"a": ("U8", (2,)), "not-in-the-index": ("U8", (9,))})
    files.safetensors(tmp_path / "two.safetensors", {"b": ("U8", (3,))})
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    found = read_weights(tmp_path)
    assert (sorted(found.tensors), found.bytes) == (["a", "b"], 5)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "a\0.safetensors"]
)
def test_an_index_may_not_name_what_does_not_lie_beside_it(tmp_path: Path, name: str) -> None:
    index(tmp_path, {"a": name})
    with pytest.raises(Unusable) as caught:
        read_weights(tmp_path)
    assert caught.value.code == "index_invalid"


def test_a_file_that_the_index_names_and_that_is_missing_is_named(tmp_path: Path) -> None:
    index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(Unusable, match=r"'one\.safetensors', and there is no such file"):
        read_weights(tmp_path)


def test_tensors_that_the_index_names_and_that_are_missing_are_counted_and_named(tmp_path: Path) -> None:
    files.safetensors(tmp_path / "one.safetensors", {"a": ("U8", (2,))})
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"})
    with pytest.raises(Unusable, match="lacks 2 of the 3 tensors") as caught:
        read_weights(tmp_path)
    assert caught.value.code == "tensors_missing"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": []}', "\udcff"])
def test_an_index_that_can_not_be_read_is_said_so(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text, errors="surrogateescape")
    with pytest.raises(Unusable) as caught:
        read_weights(tmp_path)
    assert caught.value.code == "index_invalid"


def test_a_missing_file_of_a_numbered_set_is_named(tmp_path: Path) -> None:
    for n in (1, 3):
        files.safetensors(tmp_path / f"model-{n:05d}-of-00003.safetensors", {f"t{n}": ("U8", (1,))})
    with pytest.raises(Unusable, match="1 of the 3 files of model are missing, the first is number 2"):
        read_weights(tmp_path)


def test_two_models_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    files.safetensors(tmp_path / "a.safetensors", {"w": ("U8", (1,))})
    files.safetensors(tmp_path / "b.safetensors", {"w": ("U8", (1,))})
    with pytest.raises(Unusable, match=r"tensor 'w' is in a\.safetensors and in b\.safetensors"):
        read_weights(tmp_path)


def tensors(shapes: files.Shapes) -> dict[str, Tensor]:
    return {name: Tensor(dtype, shape, 0, 0) for name, (dtype, shape) in shapes.items()}


def test_a_layer_that_lacks_what_all_others_have_is_told() -> None:
    shapes = files.shapes(6)
    assert odd_layer(tensors(shapes)) == ""
    del shapes["model.layers.3.self_attn.o_proj.weight"]
    assert odd_layer(tensors(shapes)) == ("model.layers.3 lacks self_attn.o_proj.weight, which the other 5 layers have")


def test_a_layer_that_has_another_shape_than_all_others_is_told() -> None:
    shapes = {**files.shapes(6), "model.layers.2.mlp.up_proj.weight": ("BF16", (10, 8))}
    assert odd_layer(tensors(shapes)) == (
        "model.layers.2.mlp.up_proj.weight has the shape [10, 8], and [12, 8] in the other 5 layers"
    )


def test_layers_that_take_turns_are_no_fault() -> None:
    shapes = files.shapes(6)
    for n in (1, 3, 5):
        del shapes[f"model.layers.{n}.self_attn.o_proj.weight"]
    for n in (0, 2):
        shapes[f"model.layers.{n}.mlp.up_proj.weight"] = ("BF16", (20, 8))
    assert odd_layer(tensors(shapes)) == ""
    first_is_dense = {**files.shapes(6), "model.layers.0.mlp.dense.weight": ("BF16", (8, 8))}
    del first_is_dense["model.layers.0.mlp.up_proj.weight"]
    assert odd_layer(tensors(first_is_dense)) == ""


def test_the_layer_of_a_tensor_is_in_its_name() -> None:
    assert layer_of("model.layers.12.mlp.up_proj.weight") == "model.layers.12"
    assert layer_of("transformer.h.3.attn.c_attn.bias") == "transformer.h.3"
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert layer_of("x") == "x"
    assert depth(files.shapes(5)) == 5
    assert depth([*files.shapes(5), "vision.layers.0.weight"]) == 0
