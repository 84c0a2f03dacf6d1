"""What Prometheus is told against the code: metrics, targets, and a runbook for each alert."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml
from prometheus_client.registry import Collector

from server.metrics import Metrics
from tests.deploy.containers import containers
from tests.deploy.crosscheck import operations_paths
from tests.deploy.sources import ROOT, Deployment, Object, name_of

METRIC = re.compile(r"halfstep_[a-z0-9_]+")


def findings(deployment: Deployment) -> Iterator[str]:
    """Every metric, target and runbook that does not exist, one sentence each."""
    yield from _metrics(deployment)
    yield from _runbooks(deployment)
    yield from _scrapes(deployment)
    yield from _compose_scrapes(deployment)


@cache
def metric_names() -> frozenset[str]:
    """Every sample a process may export, with the suffixes of histograms and counters."""
    names = set()
    for collector in dict.fromkeys(Metrics().registry._collector_to_names):
        for family in _families(collector):
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            names |= {family.name + suffix for suffix in suffixes}
    return frozenset(names)


def _families(collector: Collector) -> list[Any]:
    describe = getattr(collector, "describe", None)
    return list(describe() if describe else collector.collect())


def _metrics(deployment: Deployment) -> Iterator[str]:
    recorded = set(_recorded(deployment))
    for where, text in _queries(deployment):
        for name in METRIC.findall(text):
            if name not in metric_names() | recorded and not _is_label(text, name):
                yield f"{where}: there is no metric {name}"


def _runbooks(deployment: Deployment) -> Iterator[str]:
    """Each alert has a section that says what to do."""
    sections = {
        heading.lower() for heading in re.findall(r"^## (\w+)$", (ROOT / "docs/operations.md").read_text(), re.M)
    }
    for file in sorted((deployment.root / "docker/prometheus/rules").glob("*.yaml")):
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in (r for r in group["rules"] if "alert" in r):
                page, _, anchor = rule.get("annotations", {}).get("runbook", "").partition("#")
                if page != "docs/operations.md" or anchor != rule["alert"].lower() or anchor not in sections:
                    yield f"{file.name}: {rule['alert']} has no section in docs/operations.md"


def _is_label(text: str, name: str) -> bool:
    return bool(re.search(rf"{name}\s*(=|!~|=~)", text))


def _queries(deployment: Deployment) -> Iterator[tuple[str, str]]:
    for where, document in deployment.objects():
        if document["kind"] in ("ScaledObject", "PrometheusRule", "HorizontalPodAutoscaler"):
            yield f"{where} {name_of(document)}", json.dumps(document["spec"])
    for file in sorted((deployment.root / "docker").rglob("*")):
        if file.suffix in (".json", ".yaml", ".yml") and {"grafana", "prometheus"} & set(file.parts):
            yield file.relative_to(deployment.root).as_posix(), file.read_text()


def _recorded(deployment: Deployment) -> Iterator[str]:
    for file in (deployment.root / "docker").rglob("*.y*ml"):
        yield from re.findall(r"record:\s*\"?([\w:]+)", file.read_text())


def _scrapes(deployment: Deployment) -> Iterator[str]:
    """Prometheus finds in each pod a port of the name it looks for, and the path is served."""
    by_overlay: dict[str, list[Object]] = {}
    for where, document in deployment.objects():
        by_overlay.setdefault(where, []).append(document)
    for where, documents in by_overlay.items():
        pods = [c for c in containers(deployment) if c.where.startswith(f"{where} Deployment/")]
        for monitor in (d for d in documents if d["kind"] == "PodMonitor"):
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["path"] not in operations_paths():
                    yield f"{where} {name_of(monitor)}: {endpoint['path']} is not served"
                for pod in pods:
                    if endpoint["port"] not in pod.ports:
                        yield f"{where} {name_of(monitor)}: {pod.where} has no port {endpoint['port']}"


def _compose_scrapes(deployment: Deployment) -> Iterator[str]:
    """Prometheus' own targets are services of the compose file that listen there for it."""
    config = yaml.safe_load((deployment.root / "docker/prometheus/prometheus.yml").read_text())
    services = {c.where: c for c in containers(deployment) if c.where.startswith("compose.yaml ")}
    for target in (t for job in config["scrape_configs"] for t in job["dns_sd_configs"]):
        for name in target["names"]:
            container = services.get(f"compose.yaml {name}")
            if container is None:
                yield f"prometheus.yml: there is no service {name}"
            elif container.flag("--metrics-port") != str(target["port"]):
                yield f"prometheus.yml: {name} has no metrics on port {target['port']}"
