"""Manifests against the code: commands, flags, settings, ports, paths and metrics that must exist there."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import typer
import yaml
from prometheus_client.registry import Collector
from pydantic import ValidationError

import distill_jobs.cli
import engines.cli
import server.cli
from distill_jobs.recipe import shipped_recipes
from server.api.operations import operations_routes
from server.errors import StartError
from server.metrics import Metrics
from server.process import check_exposure
from server.settings import Settings
from tests.deploy.containers import Container, Image, containers, images
from tests.deploy.sources import ROOT, Deployment, Object, name_of

APPS = {"engines": engines.cli.app, "distill_jobs": distill_jobs.cli.app, "server": server.cli.app}
PREFIX = "HALFSTEP_"
METRIC = re.compile(r"halfstep_[a-z0-9_]+")


def findings(deployment: Deployment) -> Iterator[str]:
    """Everything the manifests say that the code does not know, one sentence each."""
    known = images(deployment)
    for container in containers(deployment):
        for finding in (
            *_image(container, known),
            *_command(container),
            *_settings(container),
            *_ports(container),
            *_paths(container),
        ):
            yield f"{container.where}: {finding}"
    yield from _metrics(deployment)
    yield from _runbooks(deployment)
    yield from _scrapes(deployment)
    yield from _compose_scrapes(deployment)


def _image(container: Container, known: Mapping[str, Image]) -> Iterator[str]:
    if container.image not in known:
        yield f"no Dockerfile makes the image {container.image}"


# ---- commands and flags


@cache
def commands(module: str) -> dict[str, Any]:
    """The commands of ``python -m module``, as click has them."""
    return dict(typer.main.get_command(APPS[module]).commands)  # type: ignore[attr-defined]


def _command(container: Container) -> Iterator[str]:
    words = list(container.words)
    if "torch.distributed.run" in words:
        words = _without_launcher(words)
    if words[:2] != ["python", "-m"] or len(words) < 3:
        yield f"starts {' '.join(words[:3])}, no module of ours"
        return
    module, rest = words[2], words[3:]
    if module not in APPS:
        yield f"there is no python -m {module}"
    elif rest and rest != ["--help"]:
        yield from _arguments(module, rest)


def _without_launcher(words: list[str]) -> list[str]:
    """The command line torchrun starts in each process."""
    return ["python", *words[words.index("-m", 2) :]]


def _arguments(module: str, rest: list[str]) -> Iterator[str]:
    name, arguments = rest[0], rest[1:]
    if name not in commands(module):
        yield f"python -m {module} has no command {name}"
        return
    known = {flag: p for p in commands(module)[name].params for flag in (*p.opts, *p.secondary_opts)}
    for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        if flag not in known:
            yield f"python -m {module} {name} has no {flag}"
    if (module, name) == ("distill_jobs", "run") and arguments[0] not in shipped_recipes():
        yield f"there is no recipe {arguments[0]}"


# ---- settings


def _settings(container: Container) -> Iterator[str]:
    values: dict[str, Any] = {}
    for variable, value in container.env.items():
        if not variable.startswith(PREFIX):
            continue
        field = variable.removeprefix(PREFIX).lower()
        if field not in Settings.model_fields or variable != variable.upper():
            yield f"there is no setting {variable}"
        elif value is not None and "${" not in str(value):
            values[field] = value
    try:
        settings = Settings(**values, host=container.flag("--host") or "127.0.0.1")
        if container.words[3:4] == ("api",) and not container.where.startswith("image "):
            check_exposure(settings)
    except ValidationError as error:
        yield from (f"{PREFIX}{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
    except StartError as error:
        yield str(error)


# ---- ports and paths


def _ports(container: Container) -> Iterator[str]:
    if container.words[:3] != ("python", "-m", "server") or not container.ports:
        return
    listens = {container.flag("--port"), container.flag("--metrics-port")} - {None}
    for name, port in container.ports.items():
        if str(port) not in listens:
            yield f"the process does not listen on port {name} ({port})"
    if container.flag("--host") != "0.0.0.0":
        yield "ports are named, but the process listens on loopback"


def _paths(container: Container) -> Iterator[str]:
    served = operations_paths()
    for path, port in container.probes:
        if path not in served:
            yield f"probe {path} is not served"
        if port not in container.ports.values():
            yield f"probe port {port} is not one of the container's"
    named = [value for key, value in container.env.items() if key in path_settings() and value]
    named += [word for word in container.words if word.startswith("/")]
    inside = (
        ("/app", "/cache", "/runs", "/opt/halfstep") if container.where.startswith("image ") else container.mounts
    )
    for path in (part for value in named for part in str(value).split(":")):
        if not any(Path(path).is_relative_to(mount) for mount in inside):
            yield f"nothing is mounted at {path}"


@cache
def path_settings() -> frozenset[str]:
    """Variables that name files or folders."""
    paths = {name for name, field in Settings.model_fields.items() if "Path" in str(field.annotation)}
    return frozenset(f"{PREFIX}{name.upper()}" for name in paths)


@cache
def operations_paths() -> frozenset[str]:
    """Paths of the probes and the metrics."""
    needed = inspect.signature(operations_routes).parameters
    return frozenset(route.path for route in operations_routes(*[None] * len(needed)).routes)  # type: ignore[arg-type,attr-defined]


# ---- metrics


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
