"""What is deployed fits the code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import yaml

from tests.deploy import crosscheck, dockerfiles, hardening, locks, monitoring, schema
from tests.deploy.sources import Deployment, renderer

Findings = Callable[[Deployment], Iterator[str]]
CHECKS: list[Findings] = [
    dockerfiles.findings,
    schema.findings,
    crosscheck.findings,
    monitoring.findings,
    hardening.findings,
    locks.findings,
]

needs_renderer = pytest.mark.skipif(renderer() is None, reason="neither kubectl nor kustomize is installed")


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    """The repository's own; rendered once."""
    return Deployment()


@pytest.mark.parametrize("findings", CHECKS, ids=lambda check: check.__module__.rpartition(".")[2])
def test_clean(deployment: Deployment, findings: Findings) -> None:
    assert not list(findings(deployment))


def test_the_pod_that_fills_the_claim_is_as_closed_as_the_others(deployment: Deployment) -> None:
    pod = yaml.safe_load((deployment.root / "k8s/bundles-writer.yaml").read_text())
    assert not schema._object(json.dumps(pod))
    assert not list(hardening._workload({**pod, "spec": {"template": pod}}))
    claims = {d["metadata"]["name"] for d in deployment.written if d["kind"] == "PersistentVolumeClaim"}
    assert {v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"][:1]} <= claims


@needs_renderer
def test_every_overlay_renders(deployment: Deployment) -> None:
    assert set(deployment.rendered) == {"cpu", "distil", "gpu", "keda", "monitoring", "production"}
    kinds = {document["kind"] for documents in deployment.rendered.values() for document in documents}
    assert kinds >= {
        "Deployment",
        "StatefulSet",
        "Job",
        "ScaledObject",
        "PodMonitor",
        "PrometheusRule",
        "HTTPRoute",
    }


@needs_renderer
def test_the_checks_see_all_of_it(deployment: Deployment) -> None:
    seen = list(crosscheck.containers(deployment))
    assert {c.image for c in seen} == set(crosscheck.images(deployment))
    assert sum(bool(c.probes) for c in seen) >= 10
    assert "halfstep_queued_seconds" in monitoring.metric_names()
