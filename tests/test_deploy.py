"""What an operator applies: alerts and dashboard ask for metrics that exist, manifests are what Kubernetes takes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.main import create_app
from app.metrics import Metrics
from app.settings import Settings
from app.sqlite_collections import SQLiteCollections
from training.__main__ import build_parser

DEPLOY = Path(__file__).parent.parent / "deploy"
_FROM_PROMETHEUS = {"up"}
_ON_A_GPU = {"semblance_gpu_memory_bytes"}


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    return group["rules"]


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in alerts())
    for panel in json.loads((DEPLOY / "grafana/dashboards/semblance.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "5m")


def selectors(expression: str) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


@pytest.fixture(scope="module")
def labels_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Each sample that a server can give, with its labels."""
    folder = tmp_path_factory.mktemp("data")
    with SQLiteCollections(folder) as collections:
        app = create_app(Settings(store=folder), {}, collections)
        metrics: Metrics = app.state.service.metrics
        metrics.requests.labels("GET", "/", "200").observe(1)
        metrics.rejections.labels("busy").inc()
        metrics.decode.labels("clip").observe(1)
        metrics.drawing.labels("dalle").observe(1)
        metrics.cached("clip", "text", 1, 1)
        meter = metrics.batches("clip", "image")
        meter.waited(1)
        meter.ran(1, 1)
        text = metrics.text().decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        found.setdefault(family.name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_expression_asks_for_what_there_is(labels_of: dict[str, set[str]]) -> None:
    asked = [(expression, each) for expression in expressions() for each in selectors(expression)]
    assert len({each.name for _, each in asked}) > 15
    for expression, each in asked:
        assert each.name in labels_of.keys() | _FROM_PROMETHEUS | _ON_A_GPU, expression
        for matcher in each.matchers.matchers:
            assert matcher.name in labels_of.get(each.name, set()) | {"job"}, (expression, matcher.name)


def test_the_reasons_that_alerts_name_exist() -> None:
    from app.errors import REASONS
    from app.metrics import Metrics

    named = {
        reason
        for expression in expressions()
        for each in selectors(expression)
        for matcher in each.matchers.matchers
        if matcher.name == "reason"
        for reason in matcher.value.split("|")
    }
    assert named
    assert named <= set(REASONS)
    # A counter that is first seen at 3 has not risen for Prometheus: the alert on a full disk would miss a burst.
    told = Metrics().text().decode()
    assert all(f'semblance_rejections_total{{reason="{each}"}} 0.0' in told for each in named)


def test_the_proxy_waits_as_long_as_a_server() -> None:
    from app.settings import Settings

    settings = Settings()
    longest = max(settings.deadline, settings.generate_deadline, settings.drain_seconds)
    text = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()
    for side in ("client", "server"):
        found = re.search(rf"^  timeout {side} (\d+)s$", text, re.MULTILINE)
        assert found
        assert int(found[1]) > longest


def test_each_alert_says_what_to_do() -> None:
    for rule in alerts():
        assert re.fullmatch("Semblance[A-Za-z]+", rule["alert"])
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["labels"]["severity"] in {"page", "warn"}


@pytest.mark.parametrize("file", sorted((DEPLOY / "kubernetes").glob("*.yaml")), ids=lambda file: file.name)
def test_manifests_are_what_kubernetes_takes(file: Path) -> None:
    manifests = list(yaml.safe_load_all(file.read_text()))
    assert manifests
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        if manifest["kind"] == "Deployment":
            pod = manifest["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            (container,) = pod["containers"]
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            selected = manifest["spec"]["selector"]["matchLabels"]
            assert selected == manifest["spec"]["template"]["metadata"]["labels"]


def test_the_commands_of_trainings_are_the_command_lines() -> None:
    job = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "train.yaml").read_text()))[1]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    launched, _, training = container["args"][0].partition(" -m training ")
    assert launched.startswith("exec torchrun --nnodes 8 ")
    options = build_parser().parse_args(shlex.split(training))
    assert options.batch_size % (8 * 8 * options.chunk) == 0


def test_slurm_starts_torchrun_on_each_node_and_again_when_it_fails(tmp_path: Path) -> None:
    """With commands that say what they were asked in the places of Slurm's and torch's; the first try fails."""
    commands = {
        "scontrol": 'echo "node-a"; echo "node-b"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_NODEID=1 exec "$@"',
        "torchrun": f'echo "$@" >> {tmp_path}/asked; [ "$(wc -l < {tmp_path}/asked)" = 2 ]',
        "sleep": "true",
    }
    for name, does in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **{"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"},
    }
    script = DEPLOY / "slurm" / "train.sbatch"
    subprocess.run(["bash", script, "simclr", "--data", "my photos"], env=environment, check=True, timeout=60)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2
    assert asked[0] == (
        "--nnodes 2 --nproc-per-node 8 --max-restarts 10 --rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint node-a:29400 "
        "--rdzv-conf is_host=0 -m training simclr --data my photos"
    )


def test_the_compose_file_confines_what_it_serves() -> None:
    services = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
    assert profiles == {"gpu", "train", "observability", "scale"}
    for name in ("app", "gpu", "replica-1", "replica-2"):
        assert services[name]["read_only"]
        assert services[name]["cap_drop"] == ["ALL"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service.get("volumes", []):
            if volume.startswith("./deploy"):
                assert (DEPLOY.parent / volume.partition(":")[0]).exists(), volume
