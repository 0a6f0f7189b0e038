"""What deploy/ holds fits the code: it can be read, names metrics and commands that exist, and holds no secret."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from turnout.workers.cli import cli

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
_METRIC = re.compile(r"\bturnout_[a-z0-9_]+")
#: What Prometheus adds to a metric's name.
_ENDS = re.compile(r"_(total|bucket|sum|count)$")


def _sources() -> str:
    """The text of every module that may name a metric."""
    return "".join(file.read_text(encoding="utf-8") for file in (ROOT / "workers").rglob("*.py"))


def _known(metric: str, sources: str) -> bool:
    """Whether the code names it whole, or without the gateway's prefix."""
    plain = _ENDS.sub("", metric)
    return any(f'"{name}"' in sources for name in (plain, metric, plain.removeprefix("turnout_gateway_")))


@pytest.mark.parametrize("file", ["prometheus/turnout.rules.yaml", "grafana/turnout.json"])
def test_every_metric_that_is_asked_for_exists(file: str) -> None:
    sources = _sources()
    asked = set(_METRIC.findall((DEPLOY / file).read_text(encoding="utf-8")))
    assert len(asked) > 5
    assert [one for one in sorted(asked) if not _known(one, sources)] == []


def test_the_rules_are_whole() -> None:
    rules: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus/turnout.rules.yaml").read_text(encoding="utf-8"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert rule["expr"]
            assert "record" in rule or (rule["labels"]["severity"] and rule["annotations"]["description"]), rule


def test_the_dashboard_asks_only_its_chosen_source() -> None:
    made = msgspec.json.decode((DEPLOY / "grafana/turnout.json").read_bytes())
    assert {panel["datasource"]["uid"] for panel in made["panels"]} == {"${source}"}
    assert len({panel["id"] for panel in made["panels"]}) == len(made["panels"])


def test_compose_starts_commands_that_exist_and_holds_no_secret() -> None:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name, service in services.items():
        if service["image"] == "turnout":
            assert service["command"][:2] == ["turnout", name]
            assert name in cli.commands or cli.get_command(None, name)  # type: ignore[arg-type]
        for variable, value in service["environment"].items():
            if re.search("PASSWORD|TOKEN|URL", variable):
                assert "${TURNOUT_" in value, f"{name}: {variable} must come from outside"


@pytest.mark.parametrize("process", ["controller", "gateway", "worker", "admin"])
def test_a_unit_starts_its_process_and_reads_its_secrets_from_files(process: str) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((DEPLOY / "systemd" / f"turnout-{process}.service").read_text(encoding="utf-8"))
    assert unit["Service"]["ExecStart"].split()[1] == process
    assert unit["Service"]["EnvironmentFile"] == f"/etc/turnout/{process}.env"
