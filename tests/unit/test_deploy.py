"""What operators deploy: Kubernetes' manifests, systemd's units, Prometheus' rules and Grafana's board."""

from __future__ import annotations

import ast
import configparser
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployed import BOARD, DEPLOY, exposed, labels_of, metrics_of, queries
from tools import missing, tool
from typer.main import get_command

from agentstate.api.metrics import Metrics
from agentstate.api.server import SHUTDOWN_S
from agentstate.cli.main import app
from agentstate.cli.up import _ENGINE_END_S
from agentstate.settings import Settings

ROOT = DEPLOY.parent
KUBERNETES = DEPLOY / "kubernetes"
MANIFESTS: list[dict[str, Any]] = [
    one
    for path in sorted(KUBERNETES.glob("*.yaml"))
    for one in yaml.safe_load_all(path.read_text())
    if one["kind"] != "Kustomization"
]
PODS = {one["metadata"]["name"]: one["spec"]["template"] for one in MANIFESTS if "template" in one.get("spec", {})}
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
# Of Kubernetes, the oldest release that is still kept up, and the newest that the schemas are there for.
RELEASES = ("1.34", "1.37")


def container(name: str) -> dict[str, Any]:
    (one,) = PODS[name]["spec"]["containers"]
    return one


@pytest.mark.parametrize("release", RELEASES)
def test_manifests_are_as_kubernetes_wants_them(release: str) -> None:
    try:
        import kubernetes_validate
    except ImportError:
        missing("no kubernetes-validate")
    for manifest in MANIFESTS:
        kubernetes_validate.validate(manifest, release, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**MANIFESTS[0], "spce": {}}, release, strict=True)


def test_they_are_rendered_by_kustomize() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    done = subprocess.run(["kubectl", "kustomize", str(KUBERNETES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    assert {one["metadata"].get("namespace", "agentstate") for one in rendered} == {"agentstate"}
    assert {one["kind"] for one in rendered} >= {"Deployment", "StatefulSet", "Job", "NetworkPolicy", "Service"}


@pytest.mark.parametrize("name", PODS)
def test_pods_run_commands_that_there_are_with_settings_that_there_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, arguments = container(name)["command"], container(name).get("args", [])
    assert command[0] == "agentstate" and command[1] in get_command(app).commands  # type: ignore[attr-defined]
    for variable in container(name)["env"]:
        prefix, _, field = variable["name"].partition("_")
        if prefix == "AGENTSTATE":
            assert field.lower() in Settings.model_fields
            monkeypatch.setenv(variable["name"], variable.get("value", "postgresql://u@h/d"))
    monkeypatch.delenv("AGENTSTATE_STORE_KEY", raising=False)
    Settings()
    assert not [one for one in arguments if not one.startswith("--")]


@pytest.mark.parametrize("name", PODS)
def test_pods_need_no_rights_and_no_writable_image(name: str) -> None:
    spec, own = PODS[name]["spec"], container(name)["securityContext"]
    assert spec["enableServiceLinks"] is False and spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"]
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {one["mountPath"] for one in container(name)["volumeMounts"]}
    home = next(one["value"] for one in container(name)["env"] if one["name"] == "HOME")
    assert {"/tmp", home} <= mounts
    assert "memory" in container(name)["resources"]["limits"]


def test_no_service_is_named_so_that_it_sets_a_setting() -> None:
    for service in (one for one in MANIFESTS if one["kind"] == "Service"):
        prefix = service["metadata"]["name"].upper().replace("-", "_")
        sets = {f"{prefix}_PORT", f"{prefix}_SERVICE_HOST", f"{prefix}_SERVICE_PORT"}
        assert not sets & {f"AGENTSTATE_{name.upper()}" for name in Settings.model_fields}


def test_nobody_is_ended_before_it_has_finished() -> None:
    grace = {name: pod["spec"].get("terminationGracePeriodSeconds", 30) for name, pod in PODS.items()}
    sleep = int(container("agentstate-service")["lifecycle"]["preStop"]["exec"]["command"][1])
    assert grace["agentstate-service"] > sleep + SHUTDOWN_S
    assert grace["agentstate-engine"] > _ENGINE_END_S
    compose = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())["services"]
    assert int(compose["service-1"]["stop_grace_period"].removesuffix("s")) > SHUTDOWN_S
    stops = {path.stem: int(unit(path)["Service"]["TimeoutStopSec"][-1]) for path in UNITS}
    assert stops["agentstate"] > SHUTDOWN_S and stops["agentstate-engine"] > _ENGINE_END_S


def test_probes_restart_no_engine_and_ask_what_is_there() -> None:
    from agentstate.api.app import create_app

    paths = create_app(Settings(database_url="sqlite:////none")).openapi()["paths"].keys()
    service, engine = container("agentstate-service"), container("agentstate-engine")
    assert {service[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} <= paths
    assert service["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert "livenessProbe" not in engine
    assert engine["startupProbe"]["periodSeconds"] * engine["startupProbe"]["failureThreshold"] >= 1200


def test_what_belongs_together_is_selected() -> None:
    by_kind = {(one["kind"], one["metadata"]["name"]): one for one in MANIFESTS}
    labels = {name: pod["metadata"]["labels"].items() for name, pod in PODS.items()}

    def selected(selector: dict[str, str]) -> set[str]:
        return {name for name, of in labels.items() if selector.items() <= of}

    assert selected(by_kind["Service", "agentstate-service"]["spec"]["selector"]) == {"agentstate-service"}
    assert selected(by_kind["Service", "agentstate-engines"]["spec"]["selector"]) == {"agentstate-engine"}
    budget = by_kind["PodDisruptionBudget", "agentstate-service"]["spec"]
    assert selected(budget["selector"]["matchLabels"]) == {"agentstate-service"}
    assert budget["minAvailable"] < by_kind["Deployment", "agentstate-service"]["spec"]["replicas"]
    engine = by_kind["NetworkPolicy", "agentstate-engine"]["spec"]
    (services, _) = engine["ingress"]
    assert selected(services["from"][0]["podSelector"]["matchLabels"]) == {"agentstate-service"}
    assert by_kind["NetworkPolicy", "agentstate-nobody"]["spec"]["podSelector"] == {}
    assert by_kind["StatefulSet", "agentstate-engine"]["spec"]["serviceName"] == "agentstate-engines"
    assert not [one for one in MANIFESTS if ":latest" in str(one)]


def unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """The sections of a unit; each key has all of its values."""
    parser = configparser.RawConfigParser(strict=False, delimiters="=", dict_type=_Every, empty_lines_in_values=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(path)
    return {name: {key: value.split("\n") for key, value in parser[name].items()} for name in parser.sections()}


class _Every(dict):  # type: ignore[type-arg]
    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, list) and isinstance(self.get(key), list):
            self[key].extend(value)
        else:
            super().__setitem__(key, value)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_units_are_what_systemd_understands(path: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    copy = tmp_path / path.name
    copy.write_text(re.sub(r"/opt/[\w-]+/bin/agentstate", "/bin/true", path.read_text()))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    threshold = {"agentstate": 15, "agentstate-engine": 25}[path.stem]
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={threshold}", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_units_run_commands_and_set_settings_that_there_are(path: Path) -> None:
    service = unit(path)["Service"]
    assert service["ExecStart"][0].split()[1] in get_command(app).commands  # type: ignore[attr-defined]
    example = (DEPLOY / "systemd/environment.example").read_text().splitlines()
    for line in [*service["Environment"], *example]:
        prefix, _, field = line.partition("=")[0].partition("_")
        assert prefix != "AGENTSTATE" or field.lower() in Settings.model_fields
    assert service["User"] == ["agentstate"] and service["NoNewPrivileges"] == ["yes"]


def service_metrics() -> Iterator[tuple[set[str], set[str]]]:
    """Of each metric of the service: its series and its labels."""
    metrics = Metrics(None)  # type: ignore[arg-type]
    own = {one._name: set(one._labelnames) for one in vars(metrics).values() if hasattr(one, "_labelnames")}
    for family in metrics.registry.collect():
        labels = own[family.name] if family.name in own else set(family._labelnames)  # type: ignore[attr-defined]
        yield exposed(family.name, family.type), {*labels, *({"le"} if family.type == "histogram" else ())}


def engine_metrics() -> set[str]:
    """The series of an engine, read from the source: SGLang need not be here. Their labels are tested with it."""
    kinds = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram"}
    tree = ast.parse((ROOT / "engine_patch/metrics.py").read_text())
    named: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            table = {"_COUNTERS": "counter", "_GAUGES": "gauge", "_HISTOGRAMS": "histogram"}.get(node.targets[0].id)
            rows = node.value.values if isinstance(node.value, ast.Dict) else getattr(node.value, "elts", [])
            if table is not None:
                named |= {f"agentstate:{row.elts[0].value}": table for row in rows}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and str(first.value).startswith("agentstate:"):
                named[str(first.value)] = kinds[node.func.id]
    return {series for name, kind in named.items() for series in exposed(name, kind)}


def test_every_metric_that_is_asked_for_is_there() -> None:
    labels = {name: of for series, of in service_metrics() for name in series}
    known = labels.keys() | engine_metrics()
    assert len(queries()) > 40
    for where, query in queries().items():
        asked = metrics_of(query)
        assert asked and asked <= known, where
        of_service = [labels[name] for name in asked & labels.keys()]
        if of_service:
            assert labels_of(query) <= set().union(*of_service), where
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}"), where


def test_every_alert_says_what_follows_and_what_to_do() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
    names = set(get_command(app).commands)  # type: ignore[attr-defined]
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert {"summary", "consequence", "action"} == rule["annotations"].keys()
        assert rule["labels"]["severity"] in ("warning", "critical")
        for command in re.findall(r"agentstate (\w+)", rule["annotations"]["action"]):
            assert command in names, rule["alert"]


def test_promtool_understands_the_rules() -> None:
    command = [tool("promtool"), "check", "rules", "--lint=all", str(DEPLOY / "prometheus/alerts.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_panel_lies_over_another() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart or below
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


@pytest.mark.parametrize("name", sorted(path.name for path in DEPLOY.iterdir() if path.is_dir()))
def test_each_says_what_has_been_run(name: str) -> None:
    directory = DEPLOY / name
    said = (directory / "README.md").read_text()
    assert "## What has been run" in said and "not" in said.partition("## What has been run")[2]
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", said):
        assert (directory / target).exists(), target
