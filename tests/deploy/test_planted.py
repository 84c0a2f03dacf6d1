"""An error of each kind, planted in a copy of what is deployed, is caught by the check that is there for it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy import crosscheck, dockerfiles, hardening, locks, monitoring, schema
from tests.deploy.sources import ROOT, Deployment, RenderError, renderer

Findings = Callable[[Deployment], Iterator[str]]

needs_renderer = pytest.mark.skipif(renderer() is None, reason="neither kubectl nor kustomize is installed")
needs_hadolint = pytest.mark.skipif(dockerfiles.hadolint() is None, reason="hadolint is not installed")

PLANTED: dict[Findings, dict[str, list[tuple[str, str, str]]]] = {
    monitoring.findings: {
        "docker/prometheus/rules/alerts.yaml": [
            ("alert: HalfstepSlow", "alert: HalfstepSlower", "has no section"),
            ("halfstep_store_up", "halfstep_up", "no metric halfstep_up"),
        ],
        "k8s/components/keda/worker-autoscaler.yaml": [
            ("halfstep_queued_seconds", "halfstep_queue_s", "no metric"),
        ],
        "docker/prometheus/prometheus.yml": [
            ("port: 9464", "port: 9090", "has no metrics on port 9090"),
        ],
        "k8s/components/monitoring/pod-monitor.yaml": [
            ("port: metrics", "port: prom", "has no port prom"),
        ],
    },
    crosscheck.findings: {
        "docker/compose.yaml": [
            ('HALFSTEP_ALLOW_ANONYMOUS: "true"', 'HALFSTEP_ALLOW_ANONYMOUS: "false"', "API keys"),
            ("HALFSTEP_RESULT_STORE: /results", "HALFSTEP_RESULT_STORE: /files", "nothing is mounted at /files"),
        ],
        "docker/compose.gpu.yaml": [
            ("HALFSTEP_START_BACKEND: torch-cuda", "HALFSTEP_PRECISION: auto", "nothing to fall back to"),
        ],
        "k8s/overlays/gpu/worker.yaml": [
            (
                "name: HALFSTEP_START_BACKEND, value: torch-cuda",
                "name: HALFSTEP_PRECISION, value: auto",
                "nothing to fall back to",
            ),
        ],
        "k8s/base/worker.yaml": [
            ("[worker, ", "[work, ", "has no command work"),
            ("containerPort: 9464", "containerPort: 9465", "does not listen on port metrics"),
            ("--host, 0.0.0.0, ", "", "listens on loopback"),
        ],
        "k8s/base/api.yaml": [
            ("--metrics-port,", "--metric-port,", "has no --metric-port"),
            ("name: HALFSTEP_SECRET", "name: HALFSTEP_QUOTA", "need one HALFSTEP_SECRET"),
            ("HALFSTEP_DRAIN_TIMEOUT_S", "HALFSTEP_DRAIN_TIMEOUT", "no setting HALFSTEP_DRAIN"),
            ('TIMEOUT_S, value: "30"', 'TIMEOUT_S, value: "1"', "greater than or equal to 4"),
            ("path: /readyz", "path: /ready", "probe /ready is not served"),
            ("{name: cache, mountPath: /cache}", "{name: cache, mountPath: /c}", "mounted at /cache"),
            ("image: halfstep-api", "image: halfstep-apis", "no Dockerfile makes"),
        ],
        "k8s/overlays/distil/job.yaml": [
            ("            - digits\n", "            - digit\n", "no recipe digit"),
            ("mountPath: /app/runs}", "mountPath: /app/run}", "nothing is mounted at /app/runs/latents"),
        ],
        "k8s/components/gateway/route.yaml": [
            (
                "        - path: {type: PathPrefix, value: /sdapi}\n",
                "",
                "/sdapi/v1/txt2img may take longer",
            ),
            ("request: 0s", "request: 60s", "may take longer than 60s"),
            ("value: /", "value: /x/", "/v1/images/generations is not routed"),
        ],
        "docker/Dockerfile": [
            ('"--host", "0.0.0.0", "--port"', '"--hosts", "0.0.0.0", "--port"', "has no --hosts"),
        ],
    },
    schema.findings: {
        "k8s/base/api.yaml": [
            ("revisionHistoryLimit: 5", "revisionHistoryLimits: 5", "revisionHistoryLimits"),
        ],
        "k8s/base/redis.yaml": [
            ("replicas: 1", 'replicas: "one"', "'one' is not"),
        ],
        "k8s/components/keda/worker-autoscaler.yaml": [
            ("cooldownPeriod", "coolDownPeriod", "coolDownPeriod"),
        ],
        "k8s/components/gateway/route.yaml": [
            ("request: 10s", "request: 10 s", "'10 s' does not match"),
        ],
        "k8s/components/monitoring/pod-monitor.yaml": [
            ("interval: 15s", "interval: 15", "15 is not of type"),
        ],
        "docker/prometheus/rules/alerts.yaml": [
            ("> 0.01", "> 0.02", "run python -m tests.deploy --write-rules"),
        ],
        "docker/compose.yaml": [
            ("read_only: true", "readonly: true", "readonly"),
            ("networks: [store]", "networks: [shop]", "there is no network shop"),
            ("target: api}", "target: apis}", "has no stage apis"),
        ],
    },
    hardening.findings: {
        "k8s/base/api.yaml": [
            ("runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot is not"),
            ("runAsUser: 65534", "runAsUser: 0", "no user but root"),
            ("automountServiceAccountToken: false", "automountServiceAccountToken: true", "token is mounted"),
            ("enableServiceLinks: false", "enableServiceLinks: true", "service links"),
            ('limits: {cpu: "2", memory: 1Gi}', 'limits: {cpu: "2"}', "no limit of memory"),
            ("PeriodSeconds: 60", "PeriodSeconds: 48", "killed before it has drained"),
            ("failureThreshold: 450", "failureThreshold: 60", "killed after 120 s of its start"),
            ("key: redis-url", "key: redis-uri", "key redis-uri is documented"),
            ("targetPort: http", "targetPort: https", "no port https"),
        ],
        "k8s/base/redis.yaml": [
            ("{type: RuntimeDefault}", "{type: Unconfined}", "seccompProfile is not"),
            ("memory: 2Gi}", "memory: 512Mi}", "asks for 512Mi of memory and may take 1536mb"),
        ],
        "k8s/base/worker.yaml": [
            ("drop: [ALL]", "drop: [NET_RAW]", "capabilities are kept"),
            ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "is writable"),
            ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true", "may be gained"),
            ("failureThreshold: 360", "failureThreshold: 190", "killed after 950 s of its start"),
            ("progressDeadlineSeconds: 1900", "paused: false", "given up after 600 s"),
            (
                "EvictionPolicy: AlwaysAllow",
                "EvictionPolicy: IfHealthyBudget",
                "keep their node from being drained",
            ),
        ],
        "k8s/base/network-policies.yaml": [
            ("policyTypes: [Ingress, Egress]", "policyTypes: [Ingress]", "denies by default"),
        ],
        "k8s/overlays/gpu/build-engines.yaml": [
            ("claimName: halfstep-engines", "claimName: engines", "no claim engines"),
            ("fsGroupChangePolicy: OnRootMismatch", "fsGroupChangePolicy: Always", "writable by the group"),
        ],
        "k8s/overlays/gpu/worker.yaml": [
            ("fsGroupChangePolicy: OnRootMismatch", "fsGroupChangePolicy: Always", "writable by the group"),
        ],
        "k8s/components/bundles-pvc/api.yaml": [
            ("memory: 4Gi", "memory: 1Gi", "reads bundles of any size with 1Gi"),
        ],
        "k8s/components/gateway/api.yaml": [
            ("HALFSTEP_TRUSTED_PROXIES", "HALFSTEP_CORS_ORIGINS", "no API believes the gateway"),
        ],
        "k8s/components/bundle-key/api.yaml": [
            ("name: halfstep-bundle-key", "name: bundle-keys", "no ConfigMap bundle-keys is documented"),
        ],
        "k8s/overlays/cpu/api-autoscaler.yaml": [
            ("kind: Deployment, name: halfstep-api", "kind: Deployment, name: api", "scales"),
        ],
        "docker/compose.yaml": [
            ('"127.0.0.1:8000:8000"', '"8000:8000"', "open beyond loopback"),
            ("cap_drop: [ALL]", "cap_drop: []", "cap_drop is not"),
            ("stop_grace_period: 40s", "stop_grace_period: 28s", "killed before it has drained"),
        ],
    },
    locks.findings: {
        "docker/requirements/cpu.txt": [
            ("numpy==2", "numpy==1", "numpy 1"),
        ],
        "docker/requirements/gpu.txt": [
            ("torch==", "torch>=", "not one exact version"),
        ],
    },
    dockerfiles.findings: {
        "docker/Dockerfile": [
            ("USER 65534:65534\n", "", "runs as root"),
            ("COPY server server", "COPY serve server", "which does not exist"),
        ],
        "docker/Dockerfile.distil": [
            ("python:3.12.12-slim-bookworm", "python:latest", "no version"),
        ],
    },
}
"""By check and file: what is right, what is put in its place, and what the check then says."""

CASES = [
    (findings, file, *planted)
    for findings, files in PLANTED.items()
    for file, errors in files.items()
    for planted in errors
]


def copied(tmp_path: Path, file: str = "") -> Deployment:
    """A copy to plant an error in, seen through one overlay that holds the file."""
    for folder in ("docker", "k8s"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    _, folder, name, *_ = (*Path(file).parts, "", "", "")
    overlay = {
        "overlays": name,
        "components": {"gateway": "production", "bundle-key": "production", "bundles-pvc": "gpu"}.get(name, name),
    }.get(folder, "cpu")
    return Deployment(tmp_path, (overlay,))


@needs_renderer
@pytest.mark.parametrize(
    ("findings", "file", "right", "wrong", "finding"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_planted_error_is_caught(
    tmp_path: Path, findings: Findings, file: str, right: str, wrong: str, finding: str
) -> None:
    deployment = copied(tmp_path, file)
    text = (tmp_path / file).read_text()
    assert right in text
    (tmp_path / file).write_text(text.replace(right, wrong))
    found = list(findings(deployment))
    assert any(finding in problem for problem in found), found


@needs_hadolint
def test_hadolint_is_heard(tmp_path: Path) -> None:
    deployment = copied(tmp_path)
    with (tmp_path / "docker" / "Dockerfile").open("a") as file:
        file.write("RUN cd /tmp && apt-get install curl\n")
    assert any("DL3008" in problem for problem in dockerfiles.findings(deployment))


@needs_renderer
def test_an_overlay_that_does_not_render_is_told(tmp_path: Path) -> None:
    deployment = copied(tmp_path)
    file = tmp_path / "k8s" / "overlays" / "cpu" / "kustomization.yaml"
    file.write_text(file.read_text().replace("../../base", "../../bases"))
    with pytest.raises(RenderError, match="cpu: "):
        list(schema.findings(deployment))


def test_a_lock_without_hashes_is_told(tmp_path: Path) -> None:
    deployment = copied(tmp_path)
    file = tmp_path / "docker" / "requirements" / "cpu.txt"
    file.write_text(re.sub(r" \\\n    --hash=\S+", "", file.read_text()))
    assert any("has no hash" in problem for problem in locks.findings(deployment))
