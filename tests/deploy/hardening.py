"""What every pod, container and namespace must hold: least privilege, limits, time to drain, closed networks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from server.engine_process import START_S
from server.process import OVERTIME_S
from server.settings import Settings
from tests.deploy.sources import Deployment, Object, name_of, pod_of

OUTSIDE_SECRETS = {
    "halfstep": {"redis-url", "redis-password", "api-keys", "secret", "s3-access-key-id", "s3-secret-access-key"}
}
"""Secrets that are made by hand, by name and key; docs/deploying.md says how."""

BUNDLES_GIB = 4
"""Least memory, in GiB, of a process that is given a bundle other than the embedded one."""

READING_S = 900.0
"""Time for reading every byte of the bundles, with a signature twice, before anything else starts."""

OUTSIDE_CONFIG_MAPS = {"halfstep-bundle-key"}
"""As are these."""


def findings(deployment: Deployment) -> Iterator[str]:
    """Every promise that is not held, one sentence each."""
    overlays: dict[str, list[Object]] = {}
    for where, document in deployment.objects():
        overlays.setdefault(where, []).append(document)
    for where, documents in overlays.items():
        for document in documents:
            for finding in (*_workload(document), *_references(document, documents)):
                yield f"{where} {name_of(document)}: {finding}"
        yield from (f"{where}: {finding}" for finding in _network(documents))
    for file, content in deployment.compose.items():
        for name, service in content["services"].items():
            yield from (f"{file} {name}: {finding}" for finding in _compose(service, file))


def _workload(document: Object) -> Iterator[str]:
    pod = pod_of(document)
    if pod is None:
        return
    spec = pod["spec"]
    security = spec.get("securityContext", {})
    expected = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    for field, value in expected.items():
        if security.get(field) != value:
            yield f"securityContext.{field} is not {value}"
    if not security.get("runAsUser"):
        yield "securityContext.runAsUser names no user but root"
    if spec.get("automountServiceAccountToken") is not False:
        yield "a service account's token is mounted"
    if spec.get("enableServiceLinks") is not False:
        yield "service links may set HALFSTEP_ variables"
    for flag in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(flag):
            yield f"{flag} is set"
    if any("hostPath" in volume for volume in spec.get("volumes", [])):
        yield "a path of the host is mounted"
    yield from _kept_engines(spec)
    for container in (*spec.get("initContainers", []), *spec["containers"]):
        yield from _container(container)
        yield from _grace(spec, container)
        if document["kind"] in ("Deployment", "StatefulSet"):
            yield from (f"no {probe}" for probe in _PROBES if probe not in container)
        if document["metadata"]["name"] in ("halfstep-api", "halfstep-worker"):
            yield from _start(document, container)
            yield from _room(container)
        yield from _kept_in_memory(container)


_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def _container(container: Object) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("readOnlyRootFilesystem") is not True:
        yield "the root file system is writable"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "privileges may be gained"
    if security.get("capabilities", {}).get("drop") != ["ALL"] or security.get("capabilities", {}).get("add"):
        yield "capabilities are kept"
    if security.get("privileged"):
        yield "the container is privileged"
    limits = container.get("resources", {}).get("limits", {})
    yield from (f"no limit of {resource}" for resource in ("cpu", "memory") if resource not in limits)
    tag = container["image"].rpartition(":")[2]
    if ":" not in container["image"] or tag == "latest":
        yield f"the image {container['image']} has no version"


def _grace(spec: Object, container: Object) -> Iterator[str]:
    drain = next((e.get("value") for e in container.get("env", []) if e["name"].endswith("DRAIN_TIMEOUT_S")), None)
    if drain is None:
        return
    waits = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    needed = waits + float(Settings(drain_timeout_s=drain).drain_timeout_s) + OVERTIME_S
    if spec.get("terminationGracePeriodSeconds", 30) < needed:
        yield f"killed before it has drained, which takes {needed:g} s"


def _start(document: Object, container: Object) -> Iterator[str]:
    """What reads bundles and makes engines ready has the time that the code gives it, and so has a rollout."""
    probe, spec = container.get("startupProbe", {}), document["spec"]
    allowed = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
    needed = READING_S + (START_S if container["name"] == "worker" else 0)
    if allowed < needed:
        yield f"killed after {allowed} s of its start, which may take {needed:g} s"
    grace = spec["template"]["spec"].get("terminationGracePeriodSeconds", 30)
    if (deadline := spec.get("progressDeadlineSeconds", 600)) < allowed + grace:
        yield f"a rollout is given up after {deadline} s, while a pod may end in {grace} s and start in {allowed} s"


def _kept_in_memory(container: Object) -> Iterator[str]:
    """A store that takes more memory than it asked for is the first to be evicted."""
    args = container.get("args", [])
    if "--maxmemory" not in args:
        return
    most = args[args.index("--maxmemory") + 1].lower()
    asked = container["resources"]["requests"]["memory"]
    if _mebibytes(asked) < _mebibytes(most):
        yield f"asks for {asked} of memory and may take {most}"


def _mebibytes(text: str) -> int:
    """Of Kubernetes' Gi and Mi, and Redis' gb and mb, which are the same powers of two."""
    number, unit = re.fullmatch(r"(\d+)(gi|mi|gb|mb)", text.lower()).groups()  # type: ignore[union-attr]
    return int(number) * (1024 if unit.startswith("g") else 1)


def _kept_engines(spec: Object) -> Iterator[str]:
    """With fsGroup a mount makes all files of a claim writable by the group; such engines are built again."""
    claims = {volume["name"] for volume in spec.get("volumes", []) if "persistentVolumeClaim" in volume}
    mounts = [mount for container in spec["containers"] for mount in container.get("volumeMounts", [])]
    kept = any(mount["mountPath"] == "/cache" and mount["name"] in claims for mount in mounts)
    if kept and spec["securityContext"].get("fsGroupChangePolicy") != "OnRootMismatch":
        yield "kept engines become writable by the group at every mount"


def _room(container: Object) -> Iterator[str]:
    """Bundles that are mounted may be large: to check the graphs of SD 1.5 alone takes 1 GiB."""
    mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
    limit = container.get("resources", {}).get("limits", {}).get("memory", "0Gi")
    if "/bundles" in mounts and not (limit.endswith("Gi") and int(limit.removesuffix("Gi")) >= BUNDLES_GIB):
        yield f"reads bundles of any size with {limit} of memory"


# ---- references


def _references(document: Object, documents: list[Object]) -> Iterator[str]:
    pod = pod_of(document)
    spec = document.get("spec", {})
    names = {(d["kind"], d["metadata"]["name"]) for d in documents}
    if document["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
        target = spec["scaleTargetRef"]
        if (target["kind"], target["name"]) not in names:
            yield f"scales {target['kind']}/{target['name']}, which does not exist"
    if document["kind"] == "HTTPRoute" and not any(map(_believes_proxies, documents)):
        yield "no API believes the gateway that clients came over https"
    for rule in spec.get("rules", []) if document["kind"] == "HTTPRoute" else []:
        yield from (
            f"routes to {b['name']}, no Service" for b in rule["backendRefs"] if ("Service", b["name"]) not in names
        )
    if document["kind"] in ("Service", "PodDisruptionBudget"):
        yield from _selects(document, documents)
    if document["kind"] == "PodDisruptionBudget" and spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
        yield "pods that are not ready keep their node from being drained"
    if pod is None:
        return
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
    own = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and ("PersistentVolumeClaim", claim) not in names:
            yield f"there is no claim {claim}"
        config = volume.get("configMap", {}).get("name")
        if config and config not in OUTSIDE_CONFIG_MAPS and ("ConfigMap", config) not in names:
            yield f"no ConfigMap {config} is documented"
    for container in pod["spec"]["containers"]:
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        yield from (f"there is no volume {name}" for name in mounts - set(volumes) - own)
        yield from _secrets(container, volumes.values())


def _believes_proxies(document: Object) -> bool:
    pod = pod_of(document)
    if pod is None:
        return False
    return any(e["name"].endswith("_TRUSTED_PROXIES") for c in pod["spec"]["containers"] for e in c.get("env", []))


def _secrets(container: Object, volumes: object) -> Iterator[str]:
    refs = [
        e["valueFrom"]["secretKeyRef"] for e in container.get("env", []) if "secretKeyRef" in e.get("valueFrom", {})
    ]
    for volume in volumes:  # type: ignore[attr-defined]
        secret = volume.get("secret", {})
        refs += [{"name": secret["secretName"], "key": item["key"]} for item in secret.get("items", [])]
    for ref in refs:
        if ref["key"] not in OUTSIDE_SECRETS.get(ref["name"], set()):
            yield f"no Secret {ref['name']} with a key {ref['key']} is documented"


def _selects(document: Object, documents: list[Object]) -> Iterator[str]:
    spec = document["spec"]
    wanted = spec["selector"].get("matchLabels", spec["selector"])
    pods = [pod for pod in map(pod_of, documents) if pod]
    chosen = [pod for pod in pods if wanted.items() <= pod["metadata"]["labels"].items()]
    if not chosen:
        yield "selects no pod"
    for port in spec.get("ports", []):
        open_ports = {p["name"] for pod in chosen for c in pod["spec"]["containers"] for p in c.get("ports", [])}
        if port["targetPort"] not in open_ports:
            yield f"its pods have no port {port['targetPort']}"


# ---- networks


def _network(documents: list[Object]) -> Iterator[str]:
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    if any(pod_of(d) for d in documents if d["kind"] == "Deployment"):
        denies = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        if denies not in policies:
            yield "no NetworkPolicy denies by default"
    for policy in policies:
        for rule in policy.get("ingress", []):
            if not rule.get("from"):
                yield "a NetworkPolicy lets everybody in"
        for rule in policy.get("egress", []):
            if not rule.get("to"):
                yield "a NetworkPolicy lets out to anywhere"


def _compose(service: Object, file: str) -> Iterator[str]:
    if file != "compose.yaml":
        return  # an override: what it does not name stays
    for field, value in {
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }.items():
        if service.get(field) != value:
            yield f"{field} is not {value}"
    yield from (f"no {limit}" for limit in ("mem_limit", "pids_limit") if limit not in service)
    image = service.get("image", "")
    if ":" not in image or image.endswith(":latest"):
        yield f"the image {image} has no version"
    if image.startswith("halfstep-"):
        drain = service.get("environment", {}).get("HALFSTEP_DRAIN_TIMEOUT_S", Settings().drain_timeout_s)
        needed = float(drain) + OVERTIME_S
        if int(service.get("stop_grace_period", "10s").removesuffix("s")) < needed:
            yield f"killed before it has drained, which takes {needed:g} s"
    for port in service.get("ports", []):
        if not str(port).startswith("127.0.0.1:"):
            yield f"port {port} is open beyond loopback"
