"""deploy/kubernetes fits Kubernetes and the code: valid objects, real commands and settings, one set of ports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from turnout.events.version import VERSION
from turnout.workers.cli import cli
from turnout.workers.settings import Settings, load

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
NATS = FOLDER.parent / "nats"
#: The Kubernetes release whose schemas the objects are held to; the validator brings them along.
KUBERNETES = "1.37"
PROCESSES = ("controller", "gateway", "worker", "admin")
#: What a pod's variables hold there: only their place is known here.
FOUND = {
    "metadata.name": "turnout-worker-0",
    "spec.nodeName": "node-a",
    "status.podIP": "10.1.2.3",
    "turnout-nats": "nats://role:pw1@nats:4222",
    "turnout-admin": "0123456789abcdef",
}
#: Between a gateway's last stream and its end: it says that it leaves.
LEAVE_S = 10


def read(name: str) -> Iterator[dict[str, Any]]:
    """The objects of one file."""
    yield from yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))


def objects() -> list[dict[str, Any]]:
    """Everything that `kubectl apply -k` would make, but the settings."""
    (kustomization,) = read("kustomization.yaml")
    return [one for file in kustomization["resources"] for one in read(file)]


def pod(process: str) -> dict[str, Any]:
    """The specification of a process's pods."""
    (made,) = [
        one for one in objects() if one["metadata"]["name"] == f"turnout-{process}" and "template" in one["spec"]
    ]
    return dict(made["spec"]["template"]["spec"])


def container(process: str) -> dict[str, Any]:
    """The one container of a process's pods."""
    (only,) = pod(process)["containers"]
    return dict(only)


def environment(process: str) -> dict[str, str]:
    """What the container's variables will hold, with samples for what the cluster knows."""
    found: dict[str, str] = {}
    for one in container(process)["env"]:
        source = one.get("valueFrom", {})
        where = source.get("fieldRef", {}).get("fieldPath") or source.get("secretKeyRef", {}).get("name")
        found[one["name"]] = FOUND[where] if where else one["value"]
    return found


def settings(process: str) -> Settings:
    """What the process will read."""
    return load(str(FOLDER / "turnout.toml"), environment(process))


def ports(process: str) -> dict[str, int]:
    """Name → number, of the container's ports."""
    return {one["name"]: one["containerPort"] for one in container(process)["ports"]}


@pytest.mark.parametrize("one", objects(), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_each_object_is_valid_and_knows_no_other_field(one: dict[str, Any]) -> None:
    kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_an_object_with_a_misspelt_field_would_be_found() -> None:
    wrong: dict[str, Any] = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"selectr": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_every_file_is_used_and_every_image_has_this_versions_tag() -> None:
    (kustomization,) = read("kustomization.yaml")
    beside = {"kustomization.yaml", "monitoring.yaml", "nats-values.yaml"}
    assert {file.name for file in FOLDER.glob("*.yaml")} == {*kustomization["resources"], *beside}
    assert kustomization["configMapGenerator"] == [{"name": "turnout", "files": ["turnout.toml"]}]
    tags = {one["name"]: one["newTag"] for one in kustomization["images"]}
    assert tags == dict.fromkeys({container(process)["image"] for process in PROCESSES}, VERSION)


@pytest.mark.parametrize("process", PROCESSES)
def test_each_command_line_is_one_that_the_command_line_takes(process: str) -> None:
    program, name, *words = container(process)["command"]
    assert (program, name) == ("turnout", process)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    taken = command.make_context(name, words)
    (mounted,) = [one["mountPath"] for one in container(process)["volumeMounts"] if one["name"] == "settings"]
    assert taken.params["config"] == f"{mounted}/turnout.toml"


def test_every_turnout_command_in_comments_and_the_readme_exists() -> None:
    texts = [file.read_text(encoding="utf-8") for file in (*FOLDER.iterdir(), FOLDER.parent / "README.md")]
    named = {
        name for text in texts for name in re.findall(r"(?:exec [^\n]*?|^\s+|[`'])turnout ([a-z][a-z-]+)", text, re.M)
    }
    assert {"models", "replicas"} <= named
    assert [name for name in sorted(named) if cli.get_command(click.Context(cli), name) is None] == []


@pytest.mark.parametrize("process", PROCESSES)
def test_each_pod_reads_settings_that_exist_and_no_secret_is_in_a_file(process: str) -> None:
    # raises where a key or a variable of turnout is unknown
    read = settings(process)
    assert read.nats.url == FOUND["turnout-nats"]
    for one in container(process)["env"]:
        if re.search("URL|TOKEN|PASSWORD", one["name"]):
            assert "secretKeyRef" in one["valueFrom"], one
    # a Service called turnout-gateway would else set TURNOUT_GATEWAY_PORT to something like tcp://10.0.0.1:8400
    assert pod(process)["enableServiceLinks"] is False


def test_ports_of_settings_pods_services_probes_and_policies_are_the_same() -> None:
    assert ports("gateway") == {"http": settings("gateway").gateway.port}
    assert ports("admin") == {"http": settings("admin").admin.port}
    for process in ("controller", "worker"):
        assert ports(process) == {"metrics": int(getattr(settings(process).metrics, process).rpartition(":")[2])}
    for made in (one for one in objects() if one["kind"] == "Service"):
        process = made["spec"]["selector"]["app.kubernetes.io/component"]
        assert {one["targetPort"]: one["port"] for one in made["spec"]["ports"]} == ports(process)
    for process in PROCESSES:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if asked := container(process).get(probe):
                assert asked["httpGet"]["port"] in ports(process)
                assert asked["httpGet"]["path"] in ("/readyz", "/healthz", "/metrics")
    (policy,) = [one for one in objects() if one["kind"] == "NetworkPolicy"]
    assert [port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())] == [
        ports("worker")["metrics"]
    ]
    (monitor,) = read("monitoring.yaml")
    assert {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]} == {"http", "metrics"}
    labels = monitor["spec"]["selector"]["matchLabels"].items()
    workloads = [one for one in objects() if "template" in one["spec"]]
    assert all(labels <= one["spec"]["template"]["metadata"]["labels"].items() for one in workloads)


def test_a_gateway_that_is_stopped_has_time_for_its_streams() -> None:
    unready_s = container("gateway")["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed_s = unready_s + settings("gateway").gateway.shutdown_s + LEAVE_S
    assert pod("gateway")["terminationGracePeriodSeconds"] >= needed_s


def test_a_worker_is_given_what_its_settings_say_that_it_has() -> None:
    own, given = settings("worker").worker, container("worker")["resources"]
    assert given["limits"]["memory"] == given["requests"]["memory"], "turnout counts on all of it"
    assert own.memory.endswith("%"), "of that limit, which turnout reads itself"
    assert int(given["limits"]["nvidia.com/gpu"]) == len(own.devices)
    assert own.id == FOUND["metadata.name"]
    assert (own.unix, own.address) == (False, FOUND["status.podIP"])
    mounted = {one["mountPath"]: one for one in container("worker")["volumeMounts"]}
    assert all(mounted[root]["readOnly"] for root in own.policy.model_roots)
    assert any(own.run_folder.startswith(f"{path}/") and not one.get("readOnly") for path, one in mounted.items())
    assert "livenessProbe" not in container("worker"), "a restarted pod ends its engines"


def test_each_disruption_budget_and_selector_finds_its_pods() -> None:
    labels = {
        one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"]
        for one in objects()
        if "template" in one["spec"]
    }
    for one in objects():
        selector = one["spec"].get("selector")
        if selector:
            wanted = selector.get("matchLabels", selector)
            assert wanted == labels[one["metadata"]["name"]], one["metadata"]["name"]
    budgets = {one["metadata"]["name"] for one in objects() if one["kind"] == "PodDisruptionBudget"}
    assert budgets == {"turnout-controller", "turnout-gateway", "turnout-worker"}


def test_the_nats_servers_are_as_many_as_the_streams_have_replicas_and_use_the_same_accounts() -> None:
    (values,) = read("nats-values.yaml")
    config = values["config"]
    assert config["cluster"]["replicas"] == settings("controller").nats.replicas
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert f"configMap.merge.data.{config['merge']['00$include']}=deploy/nats/accounts.conf" in readme.replace("\\", "")
    assert config["jetstream"]["merge"]["sync_interval"] in (NATS / "cluster.conf").read_text(encoding="utf-8")
    # each user of accounts.conf that a process has is in the secret that its pods read
    users = set(re.findall(r"user: (\w+), password", (NATS / "accounts.conf").read_text(encoding="utf-8")))
    keys = {
        one["valueFrom"]["secretKeyRef"]["key"]
        for process in PROCESSES
        for one in container(process)["env"]
        if one.get("valueFrom", {}).get("secretKeyRef", {}).get("name") == "turnout-nats"
    }
    assert keys == {"controller", "gateway", "worker", "ops"}
    assert keys <= users
    assert all(f"--from-literal={key}=nats://{key}:" in readme for key in keys)


def test_the_rules_become_an_object_of_the_operators_by_the_line_in_the_readme() -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"\(printf '(.+)'; sed 's/\^/    /' deploy/prometheus/turnout.rules.yaml\)", readme)
    rules = (FOLDER.parent / "prometheus" / "turnout.rules.yaml").read_text(encoding="utf-8")
    made = yaml.safe_load(line.replace("\\n", "\n") + re.sub("^", "    ", rules, flags=re.M))
    assert (made["kind"], made["metadata"]["name"]) == ("PrometheusRule", "turnout")
    assert made["spec"] == yaml.safe_load(rules)


def test_a_workers_pod_is_asked_to_end_its_engines_before_kubernetes_sends_the_signal_that_leaves_them() -> None:
    shell, _, script = container("worker")["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, script.partition(";")[0]) == ("sh", "kill -INT 1")
    assert container("worker")["command"][0] == "turnout", "the worker must be process 1"
