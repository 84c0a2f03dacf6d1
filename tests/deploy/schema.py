"""Manifests against schemas: Kubernetes' own, strict, and for other kinds strict ones of the fields used here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.deploy.rules import FILE, prometheus_rule
from tests.deploy.sources import Deployment, Object, name_of

KUBERNETES = "1.37"
_SCHEMAS = Path(__file__).parent / "schemas"


def findings(deployment: Deployment) -> Iterator[str]:
    """Every object that its schema refuses, and every name in compose files that leads nowhere."""
    seen: set[str] = set()
    for where, document in deployment.objects():
        text = json.dumps(document, sort_keys=True)
        if text not in seen:  # overlays share most of what they hold
            seen.add(text)
            yield from (f"{where} {name_of(document)}: {finding}" for finding in _object(text))
    for file, content in deployment.compose.items():
        yield from (f"{file}: {finding}" for finding in _against("compose", content))
    yield from _compose_references(deployment)
    rule = deployment.root / FILE
    if prometheus_rule(deployment) != next((d for d in deployment.written if d["kind"] == "PrometheusRule"), None):
        yield f"{rule.name}: differs from docker/prometheus/rules; run python -m tests.deploy --write-rules"


@cache
def _object(text: str) -> tuple[str, ...]:
    document = json.loads(text)
    if (_SCHEMAS / f"{document['kind']}.json").is_file():
        return tuple(_against(document["kind"], document))
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{_place(error.path)}: {error.message}",)
    except kubernetes_validate.SchemaNotFoundError as error:
        return (error.message,)
    return ()


@cache
def _schema(name: str) -> Any:
    return json.loads((_SCHEMAS / f"{name}.json").read_text())


def _against(name: str, content: Object) -> Iterator[str]:
    for error in jsonschema.Draft202012Validator(_schema(name)).iter_errors(content):
        yield f"{_place(error.path)}: {error.message}"


def _place(path: Any) -> str:
    return ".".join(map(str, path)) or "top level"


def _compose_references(deployment: Deployment) -> Iterator[str]:
    declared = deployment.compose["compose.yaml"]
    for file, content in deployment.compose.items():
        for name, service in content["services"].items():
            for finding in _service_references(service, declared, deployment.root):
                yield f"{file} {name}: {finding}"


def _service_references(service: Object, declared: Object, root: Path) -> Iterator[str]:
    yield from (f"there is no service {s}" for s in service.get("depends_on", []) if s not in declared["services"])
    yield from (f"there is no network {n}" for n in service.get("networks", []) if n not in declared["networks"])
    for volume in service.get("volumes", []):
        source = volume.partition(":")[0]
        if source.startswith("."):
            if not (root / "docker" / source).exists():
                yield f"there is no {source}"
        elif source not in declared["volumes"]:
            yield f"there is no volume {source}"
    build = service.get("build")
    if build:
        file = root / "docker" / build["context"] / build["dockerfile"]
        if not file.is_file():
            yield f"there is no {build['dockerfile']}"
        elif f" AS {build.get('target')}" not in file.read_text():
            yield f"{build['dockerfile']} has no stage {build.get('target')}"
