"""What each engine kind starts, from settings alone."""

from __future__ import annotations

import os

import pytest

from turnout.events.model import EngineSpec, Probe
from turnout.workers.inference.engines.base import Launch, Refusal, Site
from turnout.workers.inference.engines.fake import FakeEngine
from turnout.workers.inference.engines.openai import OpenAIEngine
from turnout.workers.inference.engines.vllm import VllmEngine, VllmInstall

SITE = Site(socket="/run/i-1.sock", port=4711)
AHEAD = Site(socket="/run/i-1.sock", port=4711, weights=False)
TCP = Site(socket="/run/i-1.sock", port=4711, host="10.0.0.5", unix=False)
CPU = VllmInstall("py", "0.32.0", "vllm.entrypoints.launchers.api_server.entry", cpu=True)
GPU = VllmInstall("py", "0.32.0", "vllm.entrypoints.launchers.api_server.entry", omni=True)


def launched(answer: Launch | Refusal) -> Launch:
    assert isinstance(answer, Launch), answer
    return answer


def test_vllm_on_a_cpu() -> None:
    spec = EngineSpec("vllm", path="/m/v1", args=("--max-model-len", "1024"))
    plan = launched(VllmEngine(CPU).plan(spec, "chat", "v1", SITE))
    assert plan.argv == (
        *("py", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", "/m/v1"),
        *("--max-model-len", "1024", "--disable-uvicorn-access-log", "--enforce-eager"),
        *("--fingerprint-mode", "custom", "--fingerprint-value=v1"),
        *("--worker-extension-cls", "turnout_in_vllm.Filler", "--middleware", "turnout_in_vllm.Names"),
        "--enable-prompt-tokens-details",
        *("--uds", "/run/i-1.sock", "--served-model-name", "chat", "chat@v1"),
    )
    assert plan.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert (plan.fills, plan.empty, plan.weights) == (True, False, "/m/v1")
    assert plan.address == "unix:/run/i-1.sock"
    assert plan.fingerprint == "v1"
    assert plan.env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "75"
    assert plan.env_default["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert plan.env_default["HF_HUB_OFFLINE"] == "1"


def test_vllm_on_a_gpu_compiles_and_may_listen_on_tcp() -> None:
    plan = launched(VllmEngine(GPU).plan(EngineSpec("vllm", path="/m/v1"), "chat", "v1", TCP))
    assert "--enforce-eager" not in plan.argv
    assert plan.argv[-7:-3] == ("--host", "10.0.0.5", "--port", "4711")
    assert plan.address == "http://10.0.0.5:4711"
    assert not plan.fills
    assert "VLLM_SERVER_DEV_MODE" not in plan.env  # no key guards those endpoints
    assert "VLLM_CPU_KVCACHE_SPACE" not in plan.env_default


def test_a_size_of_the_kv_cache_that_a_version_gives_is_not_overruled_by_the_environment() -> None:
    for args, expected in (
        ((), "1"),
        (("--kv-cache-memory-bytes=256M",), None),
        (("--kv_cache_memory_bytes", "1"), None),
    ):
        plan = launched(VllmEngine(CPU).plan(EngineSpec("vllm", path="/m/v1", args=args), "chat", "v1", SITE))
        assert plan.env_default.get("VLLM_CPU_KVCACHE_SPACE") == expected


def test_vllm_started_ahead_reads_no_weights() -> None:
    plan = launched(VllmEngine(CPU).plan(EngineSpec("vllm", path="/m/v1"), "chat", "v1", AHEAD))
    assert plan.argv[plan.argv.index("--load-format") + 1] == "dummy"
    assert plan.empty


def test_vllm_with_a_load_format_of_its_own_is_never_filled() -> None:
    spec = EngineSpec("vllm", path="/m/v1", args=("--load-format=bitsandbytes",))
    assert not launched(VllmEngine(CPU).plan(spec, "chat", "v1", SITE)).fills


@pytest.mark.parametrize("flag", ["--no-enforce-eager", "--enforce_eager", "-cc.mode=3", "-O3"])
def test_vllm_on_a_cpu_leaves_a_decision_about_compiling_to_the_version(flag: str) -> None:
    spec = EngineSpec("vllm", path="/m/v1", args=(flag,))
    plan = launched(VllmEngine(CPU).plan(spec, "chat", "v1", SITE))
    assert "--enforce-eager" not in plan.argv


def test_omni_is_started_by_its_own_entry_point_and_its_own_name_is_not_asked_for() -> None:
    spec = EngineSpec("vllm", path="/m/omni", args=("--omni",))
    plan = launched(VllmEngine(GPU).plan(spec, "voice", "v1", SITE))
    assert plan.argv[:5] == ("py", "-m", "vllm_omni.entrypoints.cli.main", "serve", "/m/omni")
    assert "--omni" in plan.argv
    assert plan.fingerprint == ""


def test_omni_without_vllm_omni_is_refused_with_what_to_install() -> None:
    answer = VllmEngine(CPU).plan(EngineSpec("vllm", path="/m", args=("--omni",)), "voice", "v1", SITE)
    assert isinstance(answer, Refusal)
    assert answer.code == "vllm_omni_missing"


def test_an_old_vllm_is_not_asked_for_a_fingerprint_that_it_can_not_give() -> None:
    old = VllmInstall("py", "0.11.2", "vllm.entrypoints.openai.api_server")
    plan = launched(VllmEngine(old).plan(EngineSpec("vllm", path="/m"), "chat", "v1", SITE))
    assert not any("fingerprint" in word for word in plan.argv)
    assert plan.fingerprint == ""


def test_no_vllm_is_said_with_what_to_do() -> None:
    answer = VllmEngine(None).plan(EngineSpec("vllm", path="/m"), "chat", "v1", SITE)
    assert isinstance(answer, Refusal)
    assert answer.code == "vllm_missing"
    assert "setup-vllm" in answer.hint


def test_the_workers_flags_come_after_the_versions_so_that_they_win() -> None:
    plan = launched(FakeEngine().plan(EngineSpec("fake", args=("--version=x",)), "chat", "v2", SITE))
    assert plan.argv.index("--version=x") < plan.argv.index("--version=v2")
    assert plan.counts
    assert os.pathsep not in plan.env["PYTHONPATH"].rstrip(os.pathsep) or plan.env["PYTHONPATH"]


def test_a_command_is_filled_in() -> None:
    spec = EngineSpec(
        "openai", path="/m/v1", command=("serve", "{path}", "--socket={socket}"), args=("--name", "{model}@{version}")
    )
    plan = launched(OpenAIEngine().plan(spec, "chat", "v1", TCP))
    assert plan.argv == ("serve", "/m/v1", "--socket=/run/i-1.sock", "--name", "chat@v1")
    assert plan.address == "unix:/run/i-1.sock"


def test_a_command_may_listen_on_a_port() -> None:
    spec = EngineSpec("openai", command=("serve", "{host}:{port}"))
    plan = launched(OpenAIEngine().plan(spec, "chat", "v1", SITE))
    assert plan.argv == ("serve", "127.0.0.1:4711")
    assert plan.address == "http://127.0.0.1:4711"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("http://localhost/llm/v1", "http://localhost:80/llm"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_a_running_server_is_asked_and_never_started(url: str, address: str) -> None:
    plan = launched(OpenAIEngine().plan(EngineSpec("openai", url=url), "chat", "v1", SITE))
    assert plan.argv == ()
    assert plan.address == address


@pytest.mark.parametrize(
    "spec",
    [
        EngineSpec("openai"),
        EngineSpec("openai", url="http://localhost", command=("x", "{port}")),
        EngineSpec("openai", command=("serve",)),
        EngineSpec("openai", url="https://localhost"),
        EngineSpec("openai", url="localhost:8000"),
    ],
)
def test_what_can_not_be_run_is_refused(spec: EngineSpec) -> None:
    answer = OpenAIEngine().plan(spec, "chat", "v1", SITE)
    assert isinstance(answer, Refusal)
    assert answer.hint


def test_a_version_may_bring_its_own_probe() -> None:
    spec = EngineSpec("fake", probe=Probe("/v1/embeddings", {"input": "x"}))
    plan = launched(FakeEngine().plan(spec, "chat", "v1", SITE))
    assert plan.probes == (Probe("/v1/embeddings", {"input": "x"}),)


def test_an_expected_text_alone_is_asked_by_the_kinds_own_probe() -> None:
    plan = launched(FakeEngine().plan(EngineSpec("fake", probe=Probe(expect="v1")), "chat", "v1", SITE))
    assert [p.path for p in plan.probes] == ["/v1/completions", "/v1/chat/completions"]
    assert {p.expect for p in plan.probes} == {"v1"}
