"""The rules of Prometheus, as its operator takes them: made from the files that Prometheus itself reads."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.deploy.sources import Deployment, Object

FILE = Path("k8s/components/monitoring/rules.yaml")


def prometheus_rule(deployment: Deployment) -> Object:
    """The one object with every group of ``docker/prometheus/rules``."""
    files = sorted((deployment.root / "docker/prometheus/rules").glob("*.yaml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    metadata = {"name": "halfstep", "namespace": "halfstep", "labels": {"app.kubernetes.io/name": "halfstep"}}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": metadata,
        "spec": {"groups": groups},
    }


def write(deployment: Deployment) -> None:
    """Write the object to where the component monitoring lists it."""
    head = "# Made from docker/prometheus/rules by: python -m tests.deploy --write-rules\n"
    (deployment.root / FILE).write_text(
        head + yaml.safe_dump(prometheus_rule(deployment), sort_keys=False, width=110)
    )
