"""The files that other programs read: deployments, Prometheus, Grafana, docker-compose, the Dockerfile."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.process.client import SupervisionStats
from jamba_server.engine.replicas.engines import Engines
from jamba_server.engine.types import EngineStats, TierStats
from jamba_server.server.config import ServerConfig
from jamba_server.server.config_sources import load_config
from jamba_server.server.http.limits.edge import Edge
from jamba_server.server.http.limits.metrics import EdgeCollector
from jamba_server.server.http.metrics import Metrics
from jamba_server.server.http.prefill.counts import HandOverCollector, HandOverCounts
from jamba_server.server.http.prefill.in_flight import BytesInFlight
from jamba_server.server.http.replica_metrics import ReplicaCollector
from jamba_server.server.http.streams.metrics import StreamCollector
from jamba_server.server.http.streams.registry import KeptStreams

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
DASHBOARD = CONFIGS / "grafana" / "dashboards" / "jamba.json"
DEPLOYMENTS = sorted(CONFIGS.glob("*.yaml"))


def tool(name: str) -> str:
    """A program beside this Python or on the PATH; skips the test where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def exported_names() -> set[str]:
    """The names under which queries find the server's metrics."""
    engine = SimpleNamespace(stats=EngineStats(tiers=TierStats()), supervision=SupervisionStats())
    metrics = Metrics(engine, model_name="m")  # pyright: ignore[reportArgumentType]
    metrics.registry.register(EdgeCollector("m", Edge.of(ServerConfig(), EngineStats)))
    metrics.registry.register(StreamCollector("m", KeptStreams.of(ServerConfig())))
    metrics.registry.register(ReplicaCollector("m", Engines(EngineConfig(model="any"), 2)))
    metrics.registry.register(HandOverCollector("m", HandOverCounts(), BytesInFlight(1)))
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in metrics.registry.collect() for suffix in suffixes[family.type]}


def queries(value: Any) -> Iterator[str]:
    """Every `expr` in a dashboard or a rule file, however deep."""
    if isinstance(value, dict):
        for key, child in value.items():
            if key == "expr":
                yield child
            else:
                yield from queries(child)
    elif isinstance(value, list):
        for child in value:
            yield from queries(child)


def metric_names(text: str) -> set[str]:
    return set(re.findall(r"\bjamba_(?!server\b)[a-z0-9_]+", text))


@pytest.mark.parametrize("file", ["alerts.yml", "grafana/dashboards/jamba.json"])
def test_queries_name_metrics_that_exist(file: str) -> None:
    asked = [metric_names(expr) for expr in queries(yaml.safe_load((CONFIGS / file).read_text()))]
    assert len(asked) > 5
    assert set().union(*asked) - exported_names() == set()


def test_the_dashboard_shows_every_metric() -> None:
    shown = set().union(*(metric_names(expr) for expr in queries(json.loads(DASHBOARD.read_text()))))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported_names()}
    assert families - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == set()


def test_the_dashboard_is_laid_out_without_gaps_and_overlaps() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_the_documents_list_every_metric_and_no_other() -> None:
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported_names()}
    assert metric_names((ROOT / "docs" / "operations.md").read_text()) == families


def test_every_alert_has_a_line_of_the_runbook() -> None:
    groups = yaml.safe_load((CONFIGS / "alerts.yml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"]]
    page = (ROOT / "docs" / "operations.md").read_text()
    assert re.findall(r"^\| `(Jamba\w+)` \| \S", page, re.MULTILINE) == alerts


@pytest.mark.parametrize("file", DEPLOYMENTS, ids=lambda path: path.name)
def test_deployments_are_valid(file: Path) -> None:
    assert load_config({}, {}, file).model is not None


def test_there_are_deployments_for_a_cpu_and_for_gpus() -> None:
    assert {path.name for path in DEPLOYMENTS} == {"cpu.yaml", "mini-1gpu.yaml", "reasoning-3b.yaml"}


def test_promtool_accepts_the_prometheus_configuration() -> None:
    promtool = tool("promtool")
    run(promtool, "check", "config", "--syntax-only", CONFIGS / "prometheus.yml")
    run(promtool, "check", "rules", CONFIGS / "alerts.yml")
    named = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())["rule_files"]
    assert [CONFIGS / name for name in named] == [CONFIGS / "alerts.yml"]


ALERT_TEST = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'jamba_request_success_total{{instance="a", finished_reason="stop"}}'
        values: '0+90x30'
      - series: 'jamba_request_success_total{{instance="a", finished_reason="error"}}'
        values: '0+10x30'
      - series: 'jamba_num_requests_waiting{{instance="a"}}'
        values: '3x30'
      - series: 'jamba_num_requests_waiting{{instance="b"}}'
        values: '3x15 0 3x14'
      - series: 'up{{job="jamba", instance="c"}}'
        values: '0x30'
    alert_rule_test:
      - alertname: JambaRequestsFail
        eval_time: 20m
        exp_alerts:
          - exp_labels: {{severity: critical, instance: a}}
            exp_annotations: {{summary: "a: 10% of the requests end in an error"}}
      - alertname: JambaDown
        eval_time: 20m
        exp_alerts:
          - exp_labels: {{severity: critical, instance: c, job: jamba}}
            exp_annotations: {{summary: "c does not answer /metrics"}}
      - alertname: JambaQueueGrows
        eval_time: 20m
        exp_alerts:
          - exp_labels: {{severity: warning, instance: a}}
            exp_annotations:
              summary: "a: requests have waited for 10 minutes without a break; add capacity"
"""


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    promtool = tool("promtool")
    file = tmp_path / "alerts_test.yml"
    file.write_text(ALERT_TEST.format(rules=json.dumps(str(CONFIGS / "alerts.yml"))))
    run(promtool, "test", "rules", file)


@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "docker-compose.cuda.yml"]], ids=len)
def test_docker_compose_accepts_its_files(files: list[str]) -> None:
    options = [word for name in files for word in ("--file", name)]
    run(tool("docker-compose"), *options, "config", "--quiet")
    for name in files:
        target = yaml.safe_load((ROOT / name).read_text())["services"]["server"]["build"]["target"]
        assert f" AS {target}\n" in (ROOT / "Dockerfile").read_text()


def mounts_of(service: dict[str, Any]) -> dict[str, str]:
    """Returns the sources of a service's mounts by their paths in the container. Variables have their defaults."""
    short = [volume.split(":") for volume in service["volumes"] if isinstance(volume, str)]
    long = [(volume["source"], volume["target"]) for volume in service["volumes"] if isinstance(volume, dict)]
    return {target: re.sub(r"\$\{\w+:-(.*)\}", r"\1", source) for source, target, *_ in (*short, *long)}


def test_compose_mounts_what_exists() -> None:
    """Docker would create a missing folder, which would then belong to root."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = [source for service in services.values() for source in mounts_of(service).values()]
    ours = [ROOT / mount for mount in mounts if mount.startswith(".")]
    assert len(ours) == 5
    assert [str(path) for path in ours if not path.exists()] == []
    assert (ROOT / "models" / ".gitignore").exists(), "so that a clone has the folder"
    # the scraped address is the service's name and the port that its image listens on
    scraped = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert scraped == [{"targets": ["server:8000"]}]
    assert "server" in services
    assert "JAMBA_PORT=8000" in (ROOT / "Dockerfile").read_text()


def test_grafana_finds_its_dashboard_and_its_data() -> None:
    provisioning = CONFIGS / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "jamba.yml").read_text())["providers"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounted = mounts_of(compose["grafana"])
    assert (ROOT / mounted[provider["options"]["path"]] / DASHBOARD.name) == DASHBOARD
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose


def test_the_documents_list_the_variables_of_compose_with_their_defaults() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    used = dict(re.findall(r"(?<!\$)\$\{(\w+):?-([^}]*)\}", text))
    used["JAMBA_API_KEY"] = ""
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| (.*?) ?\|", (ROOT / "docs" / "operations.md").read_text(), flags=re.MULTILINE
    )
    assert dict(rows) == {name: f"`{default}`" if default else "" for name, default in used.items()} | {
        "TORCH_INDEX": "PyTorch's CPU index"
    }


CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize("file", ["Dockerfile", "Makefile", "README.md", "CONTRIBUTING.md", "docker-compose.yml"])
def test_one_address_has_the_cpu_build_of_torch(file: str) -> None:
    assert set(re.findall(r"https://[\w./-]*pytorch[\w./-]*\w", (ROOT / file).read_text())) == {CPU_INDEX}


def test_the_default_image_has_the_cpu_build_of_torch_and_the_other_has_cuda() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    text = {stage.partition("\n")[0].rpartition(" AS ")[2]: stage for stage in stages}
    assert [*text][-1] == "cpu", "what is built where no target is named"
    assert "COPY --from=cpu-packages " in text["cpu"]
    assert f"ARG TORCH_INDEX={CPU_INDEX}\n" in text["cpu-packages"]
    assert "COPY --from=cuda-packages " in text["cuda"]
    assert "TORCH_INDEX" not in text["cuda-packages"]


def test_any_user_may_write_where_the_image_keeps_things() -> None:
    """OpenShift runs an image as a random user of group 0."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    [writable] = re.findall(r"--mode 1777 (.*)\n", dockerfile)
    kept = dict(re.findall(r"\b(HOME|HF_HOME|TRITON_CACHE_DIR)=(\S+)", dockerfile))
    assert set(kept) == {"HOME", "HF_HOME", "TRITON_CACHE_DIR"}
    assert set(kept.values()) <= set(writable.split())
    assert re.findall(r"^USER (.*)$", dockerfile, flags=re.MULTILINE) == ["10001:0", "10001:0"]


def test_hadolint_accepts_the_dockerfile() -> None:
    run(tool("hadolint"), "--failure-threshold", "warning", ROOT / "Dockerfile")


def test_the_dockerfile_takes_its_base_as_an_argument() -> None:
    instructions = re.findall(r"^[A-Z]+ .*$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert instructions[0].startswith("ARG BASE_IMAGE=")
    assert instructions[1].startswith("FROM ${BASE_IMAGE} ")
    targets = re.findall(r"^FROM .* AS (\w+)$", "\n".join(instructions), flags=re.MULTILINE)
    assert {"cpu", "cuda"} <= set(targets)
