"""The manifests for Kubernetes: valid, complete, and in agreement with the server."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from jamba_server.server.cli.server import EXIT_SECONDS
from jamba_server.server.config import OPTIONS, ServerConfig
from jamba_server.server.config_sources import load_config
from jamba_server.server.http.app import ROUTERS
from tests.test_configs import exported_names, metric_names, run, tool

KUBERNETES = Path(__file__).parent.parent / "deploy" / "kubernetes"
BASE = KUBERNETES / "base"
# The oldest version in which a container can sleep before it ends is 1.30.
VERSIONS = ("1.30", "1.37")


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def merged(base: Any, patch: Any) -> Any:
    """A strategic merge as kustomize does it: lists of objects with a name are merged by it."""
    if isinstance(base, dict) and isinstance(patch, dict):
        keys = {**base, **patch}
        return {k: merged(base[k], patch[k]) if k in base and k in patch else keys[k] for k in keys}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in item for item in [*base, *patch]):
        found = {item["name"]: item for item in base}
        return list({**found, **{i["name"]: merged(found.get(i["name"], {}), i) for i in patch}}.values())
    return copy.deepcopy(patch)


def on_gpu() -> dict[str, Any]:
    return merged(load(BASE / "deployment.yaml"), load(KUBERNETES / "cuda" / "gpu.yaml"))


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    [only] = deployment["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_the_manifests(version: str, tmp_path: Path) -> None:
    program = tool("kubernetes-validate")
    patched = tmp_path / "gpu.yaml"
    patched.write_text(yaml.safe_dump(on_gpu()))
    files = [*(BASE / name for name in load(BASE / "kustomization.yaml")["resources"]), patched]
    assert run(program, "--strict", "--kubernetes-version", version, *files).count("passed") == len(files)


def test_every_manifest_is_listed() -> None:
    assert {*load(BASE / "kustomization.yaml")["resources"]} == {
        path.name for path in BASE.glob("*.yaml") if path.name != "kustomization.yaml"
    }
    overlay = load(KUBERNETES / "cuda" / "kustomization.yaml")
    assert [(KUBERNETES / "cuda" / name).resolve() for name in overlay["resources"]] == [BASE.resolve()]
    assert [patch["path"] for patch in overlay["patches"]] == ["gpu.yaml"]
    assert [image["newTag"] for image in overlay["images"]] == ["cuda"]


@pytest.mark.parametrize("deployment", [load(BASE / "deployment.yaml"), on_gpu()], ids=["cpu", "gpu"])
def test_the_server_accepts_its_environment(deployment: dict[str, Any]) -> None:
    variables = {entry["name"]: entry.get("value", "sk-key") for entry in container(deployment)["env"]}
    assert {*variables} <= {option.variable for option in OPTIONS.values()}
    config = load_config({}, variables)
    assert config.needs_key
    assert config.metrics_public


def test_the_gpu_is_added_to_the_limits() -> None:
    limits = container(on_gpu())["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["memory"]) == (1, "32Gi")
    assert [entry["name"] for entry in container(on_gpu())["env"]].count("JAMBA_MODEL") == 1


def test_probes_ask_for_paths_that_exist() -> None:
    deployment = load(BASE / "deployment.yaml")
    probed = container(deployment)
    paths = {route.path for router in ROUTERS for route in router.routes if hasattr(route, "path")}  # pyright: ignore
    assert probed["livenessProbe"]["httpGet"]["path"] == "/live" in paths
    assert probed["readinessProbe"]["httpGet"]["path"] == "/ready" in paths
    [port] = probed["ports"]
    assert port["containerPort"] == ServerConfig().port
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    assert load(BASE / "service.yaml")["spec"]["ports"][0]["targetPort"] == port["name"]


def test_the_grace_period_is_that_of_the_drain() -> None:
    spec = load(BASE / "deployment.yaml")["spec"]["template"]["spec"]
    [server] = spec["containers"]
    shutdown = next(float(entry["value"]) for entry in server["env"] if entry["name"] == "JAMBA_SHUTDOWN_TIMEOUT")
    pause = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] == pause + shutdown + EXIT_SECONDS


def test_labels_select_the_pods() -> None:
    deployment = load(BASE / "deployment.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for name in ("service.yaml", "disruptions.yaml"):
        selector = load(BASE / name)["spec"]["selector"]
        assert (selector.get("matchLabels") or selector).items() <= labels.items(), name
    claim = deployment["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == load(BASE / "volume.yaml")["metadata"]["name"]
    scaled = load(BASE / "autoscaler.yaml")["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == (deployment["kind"], deployment["metadata"]["name"])


def test_autoscaling_reads_metrics_of_this_server() -> None:
    rules = load(KUBERNETES / "prometheus-adapter.yaml")["rules"]["custom"]
    offered = {rule["name"]["as"] for rule in rules}
    asked = {metric["pods"]["metric"]["name"] for metric in load(BASE / "autoscaler.yaml")["spec"]["metrics"]}
    assert asked == offered
    for rule in rules:
        assert metric_names(rule["seriesQuery"]) <= exported_names()
