"""Whoever may register a version must not thereby run any command on a GPU host."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from turnout.events.model import EngineSpec
from turnout.workers.inference.engines.base import Refusal
from turnout.workers.inference.policy import WorkerPolicy

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model root with one model, a secret beside it, and a link from inside to outside."""
    inside = tmp_path / "models"
    (inside / "v1").mkdir(parents=True)
    (inside / "v1" / "template.jinja").write_text("x")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("k")
    (inside / "escape").symlink_to(tmp_path / "secret")
    monkeypatch.chdir(inside)
    return inside


def code(answer: EngineSpec | Refusal) -> str:
    return answer.code if isinstance(answer, Refusal) else ""


def vllm(*args: str, path: str = "v1") -> EngineSpec:
    return EngineSpec("vllm", path=path, args=args)


@pytest.mark.parametrize(
    "args",
    [
        # code of the caller's choice, in every spelling that vLLM's parser takes for the flag
        ("--trust-remote-code",),
        ("--trust_remote_code",),
        ("--trust-remote",),
        ("--trust",),
        ("--no-trust-remote-code",),
        ("--worker-extension-cls", "evil.Worker"),
        ("--worker-extension-cls=evil.Worker",),
        ("--worker_extension_cls=evil.Worker",),
        ("--worker-e", "evil.Worker"),
        ("--worker-cls", "evil.Worker"),
        ("--scheduler-cls=evil.S",),
        ("--tool-parser-plugin", "plugin.py"),
        ("--tool-parser-p", "plugin.py"),
        ("--reasoning-parser-plugin=plugin.py",),
        ("--some-future-plugin=plugin.py",),
        ("--some-future-cls=evil.X",),
        ("--middleware", "evil.Middleware"),
        ("--mid=evil",),
        ("--logits-processors", "evil:P"),
        ("--model-class-overrides", '{"A":"evil:B"}'),
        ("--logging-config-file", "x"),
        ("--log-config-file", "x"),
        ("--distributed-executor-backend", "evil.Executor"),
        ("--distributed-executor-backend=evil.Executor",),
        ("-cc.backend=evil.compile",),
        ("--compilation-config", '{"backend": "evil.compile"}'),
        ("--compilation-config", '{"inductor_passes": {"post": "evil.pass"}}'),
        ("-cc.inductor_passes.post=evil.pass",),
        ("--structured-outputs-config.reasoning_parser_plugin=evil.py",),
        ("--speculative-config", '{"method": "custom_class", "model": "evil:Drafter"}'),
        ("--spec-method", "custom_class"),
        ("--hf-overrides", '{"auto_map": {"AutoModel": "evil--repo.M"}}'),
        ("--kv-transfer-config", '{"kv_connector_module_path": "evil"}'),
        ("--kv-transfer-config.kv_connector_module_path=evil",),
        ("--kv-tr", "{}"),
        ("--tool-server", "demo"),
        # a file with all of that in it
        ("--config", "flags.yaml"),
        ("--config=flags.yaml",),
        ("--conf", "flags.yaml"),
        ("--config.worker-cls=x",),
        # where it listens and what it is called
        ("--host", "0.0.0.0"),
        ("--port=80",),
        ("--po=80",),
        ("--uds", "other.sock"),
        ("--model", "v1"),
        ("--mod=v1",),
        ("--served-model-name", "other"),
        ("--served", "other"),
        ("--fingerprint-value=v9",),
        # doors
        ("--api-key", "secret"),
        ("--ssl-certfile", "x"),
        ("--ssl", "x"),
        ("--grpc",),
        ("--grpc-port=1",),
        ("--headless",),
        ("--master-port", "1"),
        ("-dpa", "10.0.0.1"),
        ("-n", "2"),
        ("-n2",),
        ("--enable-scale-out",),
        ("--hf-token", "t"),
        ("--otlp-traces-endpoint", "http://elsewhere"),
        ("--tokenizer", "s3://bucket/tokenizer"),
        ("--enable-prompt-embeds",),
        # prompts would get into the log, and with its tail into events
        ("--enable-log-requests",),
        ("--enable-log-outputs",),
        # the worker's own flags would become positional
        ("--",),
        ("evil/model",),
        ("--max-model-len\0", "1"),
    ],
)
def test_a_version_may_not_set_flags_that_run_code_or_open_doors(root: Path, args: tuple[str, ...]) -> None:
    answer = WorkerPolicy().admit(vllm(*args), "chat", "v1")
    assert code(answer) == "flag_not_allowed", answer


@pytest.mark.parametrize(
    "args",
    [
        ("--chat-template", "/etc/passwd"),
        ("--chat-template=/etc/passwd",),
        ("--chat-template", "../secret/key"),
        ("--chat-template", "escape/key"),
        ("--chat-template", "v1/../../secret/key"),
        ("--tokenizer", "~/other"),
        ("--lora-modules", "a=/etc"),
        ("--lora-modules", '{"name": "a", "path": "/etc"}'),
        ("--speculative-config", '{"method": "draft_model", "model": "/etc"}'),
        ("--speculative-config.model=/etc",),
        ("--download-dir", "/var"),
    ],
)
def test_a_flag_may_not_name_a_file_outside_the_model_roots(root: Path, args: tuple[str, ...]) -> None:
    answer = WorkerPolicy().admit(vllm(*args), "chat", "v1")
    assert code(answer) == "path_not_allowed", answer


@pytest.mark.parametrize(
    "args",
    [
        ("--max-model-len", "1024"),
        ("--max-model-len=1024", "--dtype", "bfloat16"),
        ("-tp", "2"),
        ("-dp", "2"),
        ("-cc.mode=3",),
        ("--compilation-config", '{"mode": 3, "cudagraph_capture_sizes": [1, 2]}'),
        ("--omni",),
        ("--enable-lora", "--max-lora-rank", "8"),
        ("--enable-sleep-mode",),
        ("--gpu-memory-utilization", ".5"),
        ("--kv-cache-memory-bytes", "256M"),
        ("--chat-template", "v1/template.jinja"),
        ("--lora-modules", "a=v1"),
        ("--hf-overrides", '{"architectures": ["A"], "classifier_from_token": ["no", "yes"]}'),
        ("--quantization", "awq"),
        ("--attention-backend", "FLASH_ATTN"),
        ("--config-format", "hf"),
        ("--model-impl", "vllm"),
        ("--seed", "-1"),
    ],
)
def test_a_version_may_set_what_a_user_needs(root: Path, args: tuple[str, ...]) -> None:
    answer = WorkerPolicy().admit(vllm(*args), "chat", "v1")
    assert isinstance(answer, EngineSpec), answer
    assert answer.args == args


@pytest.mark.parametrize("path", ["/etc", "../secret", "escape", "v1/../../secret", "~"])
def test_weights_must_lie_under_a_model_root(root: Path, path: str) -> None:
    assert code(WorkerPolicy().admit(vllm(path=path), "chat", "v1")) == "path_not_allowed"


def test_a_path_is_handed_on_with_its_links_resolved(root: Path) -> None:
    (root / "newest").symlink_to(root / "v1")
    answer = WorkerPolicy().admit(vllm(path="newest"), "chat", "v1")
    assert isinstance(answer, EngineSpec)
    assert answer.path == str((root / "v1").resolve())


def test_a_missing_path_is_said_as_what_it_is(root: Path) -> None:
    answer = WorkerPolicy().admit(vllm(path="v7"), "chat", "v1")
    assert isinstance(answer, Refusal)
    assert (answer.code, answer.stage) == ("path_missing", "starting")


def test_another_root_can_be_set(root: Path) -> None:
    policy = WorkerPolicy(model_roots=(str(root.parent / "secret"),))
    assert isinstance(policy.admit(vllm(path=str(root.parent / "secret")), "chat", "v1"), EngineSpec)
    assert code(policy.admit(vllm(path="v1"), "chat", "v1")) == "path_not_allowed"


def test_no_command_is_allowed_unless_the_owner_names_it(root: Path) -> None:
    spec = EngineSpec("openai", command=(sys.executable, "-m", "http.server", "{port}"))
    assert code(WorkerPolicy().admit(spec, "chat", "v1")) == "command_not_allowed"


def test_a_command_must_begin_as_the_owner_wrote_it(root: Path) -> None:
    policy = WorkerPolicy(commands=(f"{sys.executable} serve.py",))
    good = policy.admit(EngineSpec("openai", command=(sys.executable, "serve.py", "{port}")), "chat", "v1")
    assert isinstance(good, EngineSpec)
    for words in ((sys.executable, "-c", "import os"), (sys.executable,), ("/bin/sh", "serve.py")):
        assert code(policy.admit(EngineSpec("openai", command=words), "chat", "v1")) == "command_not_allowed"


def test_an_executable_of_the_same_name_elsewhere_is_not_the_allowed_one(root: Path) -> None:
    other = root / "sh"
    other.write_text("#!/bin/true\n")
    other.chmod(0o755)
    policy = WorkerPolicy(commands=("sh",))
    assert code(policy.admit(EngineSpec("openai", command=(str(other), "x")), "chat", "v1")) == "command_not_allowed"


@pytest.mark.parametrize("url", ["http://169.254.169.254/x", "http://evil@10.0.0.1:80", "http://[bad", "http://"])
def test_a_url_must_name_an_allowed_host(root: Path, url: str) -> None:
    assert code(WorkerPolicy().admit(EngineSpec("openai", url=url), "chat", "v1")) == "url_not_allowed"


def test_a_url_of_this_machine_is_allowed(root: Path) -> None:
    assert isinstance(
        WorkerPolicy().admit(EngineSpec("openai", url="http://127.0.0.1:8000/v1"), "chat", "v1"), EngineSpec
    )


def test_an_engine_kind_can_be_switched_off(root: Path) -> None:
    answer = WorkerPolicy(engines=("vllm",)).admit(EngineSpec("fake"), "chat", "v1")
    assert code(answer) == "engine_not_allowed"


@pytest.mark.parametrize(("model", "version"), [("--worker-cls=x", "v1"), ("chat", "-v")])
def test_a_name_that_could_be_a_flag_is_refused(root: Path, model: str, version: str) -> None:
    assert code(WorkerPolicy().admit(vllm(), model, version)) == "name_not_allowed"


def test_the_owner_can_allow_a_flag_and_deny_another(root: Path) -> None:
    policy = WorkerPolicy(allowed_flags={"vllm": ("--trust-remote-code",)}, denied_flags={"vllm": ("--enable-lora",)})
    assert isinstance(policy.admit(vllm("--trust-remote-code"), "chat", "v1"), EngineSpec)
    assert code(policy.admit(vllm("--trust-rem"), "chat", "v1")) == "flag_not_allowed"
    assert code(policy.admit(vllm("--enable-lora"), "chat", "v1")) == "flag_not_allowed"


def test_a_refusal_says_what_was_refused_why_and_what_to_do(root: Path) -> None:
    answer = WorkerPolicy().admit(vllm("--trust-remote-code"), "chat", "v1")
    assert isinstance(answer, Refusal)
    assert answer.stage == "policy"
    assert "--trust-remote-code" in answer.sentence
    assert "allowed_flags" in answer.sentence
