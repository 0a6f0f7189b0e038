"""turnout.toml, environment and flags: what is read, which wins, and how a mistake is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from turnout.core.config import ModelSwitchingConfig
from turnout.workers.settings import DEFAULT_PORT, Settings, SettingsError, load

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    monkeypatch.chdir(tmp_path)
    return WriteFile(tmp_path)


class WriteFile:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, text: str) -> str:
        file = self.folder / "turnout.toml"
        file.write_text(text)
        return str(file)


def problems(file: str, environ: dict[str, str] | None = None, flags: dict[str, object] | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(file, environ or {}, flags)
    return [f"{p.where}: {p.what}" for p in caught.value.problems]


def test_nothing_written_down_is_enough(write: WriteFile) -> None:
    settings = load()
    assert settings == Settings()
    assert settings.gateway.port == DEFAULT_PORT
    assert settings.gateway.host == "127.0.0.1"
    assert settings.switching == ModelSwitchingConfig()


def test_a_model_needs_two_lines(write: WriteFile) -> None:
    settings = load(write('[models.chat.versions.v1]\nengine = "fake"\n'))
    assert settings.models["chat"].first == "v1"
    assert settings.engines()["chat", "v1"].kind == "fake"


def test_the_file_of_this_folder_is_found_and_a_named_one_wins(write: WriteFile) -> None:
    write("[gateway]\nport = 9001\n")
    other = write.folder / "other.toml"
    other.write_text("[gateway]\nport = 9002\n")
    assert load().gateway.port == 9001
    assert load(environ={"TURNOUT_CONFIG": str(other)}).gateway.port == 9002
    assert load(str(other), {"TURNOUT_CONFIG": "missing.toml"}).gateway.port == 9002


def test_a_flag_wins_over_the_environment_and_that_over_the_file(write: WriteFile) -> None:
    file = write("[gateway]\nport = 9001\n")
    assert load(file, {"TURNOUT_GATEWAY_PORT": "9002"}).gateway.port == 9002
    assert load(file, {"TURNOUT_GATEWAY_PORT": "9002"}, {"gateway.port": 9003}).gateway.port == 9003


def test_all_fields_of_the_switching_configuration_can_be_written_down(write: WriteFile) -> None:
    file = write(
        "[switching]\n"
        "enable_dynamic_registry = false\n"
        "max_cached_models = 2\n"
        "model_ttl_seconds = 60\n"
        'default_switch_strategy = "immediate"\n'
        "enable_health_checks = false\n"
        "health_check_interval = 5\n"
        "max_transition_time = 20.5\n"
        "enable_request_tracking = false\n"
        "enable_metrics = false\n"
        "metrics_interval = 10\n"
        "alert_thresholds = { error_rate = 0.5, latency_p95 = 100 }\n"
    )
    assert load(file).switching == ModelSwitchingConfig(
        enable_dynamic_registry=False,
        max_cached_models=2,
        model_ttl_seconds=60,
        enable_health_checks=False,
        health_check_interval=5,
        max_transition_time=20.5,
        enable_request_tracking=False,
        enable_metrics=False,
        metrics_interval=10,
        alert_thresholds={"error_rate": 0.5, "latency_p95": 100},
    )


@pytest.mark.parametrize("field", ModelSwitchingConfig.__struct_fields__)
def test_each_field_of_the_switching_configuration_can_come_from_the_environment(field: str, write: WriteFile) -> None:
    written = {
        bool: ("false", False),
        int: ("7", 7),
        float: ("7.5", 7.5),
        str: ("immediate", "immediate"),
        dict: ("{ error_rate = 0.2 }", {"error_rate": 0.2}),
    }
    text, value = written[type(getattr(ModelSwitchingConfig(), field))]
    settings = load(environ={f"TURNOUT_SWITCHING_{field.upper()}": text})
    assert getattr(settings.switching, field) == value


def test_a_text_in_the_environment_needs_no_quotes(write: WriteFile) -> None:
    environ = {"TURNOUT_NATS_URL": "nats://10.0.0.1:4222", "TURNOUT_CONTROLLER_ID": "7"}
    settings = load(environ=environ)
    assert settings.nats.url == "nats://10.0.0.1:4222"
    assert settings.controller.id == "7"


def test_an_unknown_key_names_its_line_its_table_and_the_nearest_one(write: WriteFile) -> None:
    file = write("[gateway]\nport = 9001\n\n[switching]\nmax_cached_model = 3\n")
    assert problems(file) == [
        f"{file}, line 5: [switching] has no key 'max_cached_model'; did you mean 'max_cached_models'?"
    ]


def test_an_unknown_table_names_the_nearest_one(write: WriteFile) -> None:
    file = write("[gatway]\nport = 9001\n")
    assert problems(file) == [f"{file}, line 1: the file has no key 'gatway'; did you mean 'gateway'?"]


def test_an_unknown_variable_names_the_nearest_one(write: WriteFile) -> None:
    assert problems("", {"TURNOUT_GATEWAY_PROT": "1", "HOME": "/", "TURNOUT_OPS_PASSWORD": "x"}) == [
        "TURNOUT_GATEWAY_PROT: is no setting; did you mean 'TURNOUT_GATEWAY_PORT'?"
    ]


def test_all_problems_are_told_at_once(write: WriteFile) -> None:
    file = write(
        "[switching]\n"
        'max_cached_models = "many"\n'
        "health_check_interval = 0\n"
        'default_switch_strategy = "canari"\n'
        "[switch]\n"
        "bake_s = -1\n"
        "[nats]\n"
        "replicas = 2\n"
        "[gateway]\n"
        "ports = 1\n"
    )
    assert problems(file, {"TURNOUT_GATEWAY_PORT": "high"}) == [
        f"{file}, line 2: switching.max_cached_models is 'many': give a whole number",
        f"{file}, line 10: [gateway] has no key 'ports'; did you mean 'port'?",
        "TURNOUT_GATEWAY_PORT: gateway.port is 'high': give a whole number",
        f"{file}, line 3: [switching] health_check_interval is 0.0: give a number of seconds above 0",
        f"{file}, line 4: [switching] default_switch_strategy is 'canari': choose one of "
        "ab, canary, gradual, immediate",
        f"{file}, line 6: [switch] bake_s is -1.0: give a number of seconds, 0 or more",
        f"{file}, line 8: [nats] replicas is 2: give 1, 3 or 5",
    ]


def test_what_is_no_toml_says_where(write: WriteFile) -> None:
    file = write("[gateway]\nport = = 1\n")
    assert len(told := problems(file)) == 1
    assert "is not TOML" in told[0]
    assert "line 2" in told[0]


def test_a_file_that_is_not_there_is_told(write: WriteFile) -> None:
    assert problems("missing.toml") == ["missing.toml: can't be read: No such file or directory"]


def test_a_value_where_a_table_belongs_is_told(write: WriteFile) -> None:
    file = write('gateway = "fast"\n')
    assert problems(file) == [f"{file}, line 1: gateway must be a table: write [gateway]"]


def test_limits_of_one_model_are_checked_like_all_others(write: WriteFile) -> None:
    file = write('[gateway.model_limits."org/chat.v2"]\nfirst_byte = 3\n')
    assert problems(file) == [
        f"{file}, line 2: [gateway.model_limits.\"org/chat.v2\"] has no key 'first_byte'; did you mean 'first_byte_s'?"
    ]
    limits = load(write('[gateway.model_limits."org/chat.v2"]\nfirst_byte_s = 3\n')).gateway.model_limits
    assert limits["org/chat.v2"].first_byte_s == 3


def test_the_path_of_a_declared_version_starts_at_the_file(write: WriteFile) -> None:
    (write.folder / "deep").mkdir()
    file = write.folder / "deep" / "turnout.toml"
    file.write_text('[models.chat.versions.v1]\nengine = "vllm"\nsource = "../weights"\n')
    assert load(str(file)).engines()["chat", "v1"].path == str(write.folder / "weights")


def test_a_declared_command_may_be_a_line_or_words(write: WriteFile) -> None:
    file = write(
        '[models.a.versions.v1]\nengine = "openai"\ncommand = "python serve.py --name \'a b\'"\n'
        '[models.b.versions.v1]\nengine = "openai"\ncommand = ["python", "serve.py", "--name", "a b"]\n'
    )
    engines = load(file).engines()
    assert engines["a", "v1"].command == engines["b", "v1"].command == ("python", "serve.py", "--name", "a b")


def test_what_can_not_be_registered_is_told_before_anything_starts(write: WriteFile) -> None:
    file = write(
        "[models.chat]\n"
        'active = "v9"\n'
        "[models.chat.versions.v1]\n"
        'engine = "vllm"\n'
        "[models.chat.versions.v2]\n"
        'engine = "openai"\n'
        "[models.chat.versions.v3]\n"
        'note = "no engine"\n'
        "[models.empty]\n"
    )
    told = problems(file)
    assert f"{file}, line 7: [models.chat.versions.v3] needs 'engine'" in told
    assert f"{file}, line 2: [models.chat] active is 'v9', which is not declared; known: v1, v2" in told
    assert (
        f"{file}, line 3: [models.chat.versions.v1] a vllm version needs its weights: "
        'name the folder: source = "PATH"' in told
    )
    assert any('url = "URL"' in one and "v2" in one for one in told)
    assert any(one.startswith(f"{file}, line 9: [models.empty] has no version") for one in told)


def test_the_example_file_is_accepted_and_names_every_key() -> None:
    from pathlib import Path

    example = Path(__file__).parents[3] / "examples" / "turnout.toml"
    load(str(example))
    text = example.read_text()
    for table in ("nats", "switching", "switch", "gateway", "worker", "controller", "metrics"):
        assert f"[{table}]" in text
        for key in getattr(Settings(), table).__struct_fields__:
            assert f"{key}" in text, f"[{table}] {key}"


def test_what_is_loaded_ahead_is_read_with_its_schedule(write: WriteFile) -> None:
    file = write(
        '[cache]\nwarm = ["recent", "predicted"]\n'
        '[[cache.schedule]]\nmodel = "chat"\nversion = "v2"\ncron = "45 8 * * mon-fri"\n'
    )
    cache = load(file).cache
    assert cache.warm == ("recent", "predicted")
    assert [(one.model, one.version, one.cron) for one in cache.schedule] == [("chat", "v2", "45 8 * * mon-fri")]
    assert load("", {"TURNOUT_CACHE_WARM": '["recent"]'}).cache.warm == ("recent",)
    assert (Settings().cache.warm, Settings().cache.schedule) == ((), ())


def test_what_can_not_be_loaded_ahead_names_its_field_and_reason(write: WriteFile) -> None:
    file = write(
        '[cache]\nwarm = ["oracle"]\n'
        '[[cache.schedule]]\nmodel = "chat"\nversion = "v2"\ncron = "61 * * * *"\n'
        '[[cache.schedule]]\nmodel = "chat"\nversion = ""\ncron = "* * * * *"\n'
    )
    told = problems(file)
    assert any("line 2: [cache] warm names 'oracle': choose from recent, predicted" in one for one in told)
    assert any("[cache] schedule number 1: cron '61 * * * *': minute '61' can't be read" in one for one in told)
    assert any("[cache] schedule number 2: version is empty" in one for one in told)
    told = problems(write('[[cache.schedule]]\nmodel = "chat"\nversion = "v2"\ncorn = "* * * * *"\n'))
    assert any("[cache.schedule.1] has no key 'corn'; did you mean 'cron'?" in one for one in told)
    assert any("[cache.schedule.1] needs 'cron'" in one for one in told)
    told = problems(write('[cache]\nschedule = "daily"\n'))
    assert any("cache.schedule must be a list of tables: write [[cache.schedule]]" in one for one in told)
