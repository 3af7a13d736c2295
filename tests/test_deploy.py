"""The manifests for Kubernetes: valid, complete, and in agreement with the server."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from jamba_server.engine.start.rank_options import num_ranks
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


def node_pods() -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod templates of node 0 and of the other nodes."""
    group = load(KUBERNETES / "nodes" / "leader-worker-set.yaml")["spec"]["leaderWorkerTemplate"]
    return group["leaderTemplate"], group["workerTemplate"]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_the_pods_of_nodes(version: str, tmp_path: Path) -> None:
    """A LeaderWorkerSet is no resource of Kubernetes itself, so its templates are checked as those of deployments."""
    program, files = tool("kubernetes-validate"), [KUBERNETES / "nodes" / "service.yaml"]
    for index, template in enumerate(node_pods()):
        labels = template["metadata"]["labels"]
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "pods"},
            "spec": {"selector": {"matchLabels": labels}, "template": template},
        }
        files.append(tmp_path / f"{index}.yaml")
        files[-1].write_text(yaml.safe_dump(deployment))
    assert run(program, "--strict", "--kubernetes-version", version, *files).count("passed") == len(files)


def test_the_server_accepts_the_options_of_nodes() -> None:
    group = load(KUBERNETES / "nodes" / "leader-worker-set.yaml")["spec"]["leaderWorkerTemplate"]
    values = {"$(POD_ADDRESS)": "10.0.0.1", "$(LWS_LEADER_ADDRESS)": "node-0.nodes", "$(LWS_WORKER_INDEX)": "1"}
    configs: list[ServerConfig] = []
    for template in node_pods():
        [server] = template["spec"]["containers"]
        words: list[str] = server["args"]
        command, *flags = [values.get(word, word) for word in words]
        assert command == "serve"
        named = {option.flag: option.name for option in OPTIONS.values()}
        variables = {e["name"]: e.get("value", "sk-key") for e in server["env"] if e["name"].startswith("JAMBA_")}
        given = {named[flag]: value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
        configs.append(load_config(given, variables))
        assert num_ranks(configs[-1].engine(Path("model"))) == 2 * server["resources"]["limits"]["nvidia.com/gpu"]
    first, other = configs
    assert (first.node_rank, other.node_rank, first.nnodes, other.nnodes) == (0, 1, group["size"], group["size"])
    assert first.engine(Path("model")) == other.engine(Path("model"))
    ports = {port["name"]: port["containerPort"] for port in node_pods()[0]["spec"]["containers"][0]["ports"]}
    assert ports == {"http": first.port, "nodes": first.master_port}


def test_the_service_of_nodes_finds_node_0() -> None:
    selector = load(KUBERNETES / "nodes" / "service.yaml")["spec"]["selector"]
    first, other = (template["metadata"]["labels"] for template in node_pods())
    assert selector.items() <= first.items()
    assert not selector.items() <= other.items()
    listed = load(KUBERNETES / "nodes" / "kustomization.yaml")["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in (KUBERNETES / "nodes").glob("*.yaml")}
