"""Manifests against the code: commands, flags, settings, ports and paths that must exist there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer
from fastapi.routing import APIRoute
from pydantic import ValidationError

import distill_jobs.cli
import engines.cli
import server.cli
from distill_jobs.latent_sections import CaptionedData
from distill_jobs.recipe_file import shipped_recipes
from engines.backends.load import BUILT, ON_GPU
from server.api.operations import operations_routes
from server.app import routers
from server.errors import StartError
from server.process import check_exposure
from server.settings import Settings
from server.storage import is_folder
from tests.deploy.containers import Container, Image, containers, images
from tests.deploy.sources import Deployment, Object, name_of

APPS = {"engines": engines.cli.app, "distill_jobs": distill_jobs.cli.app, "server": server.cli.app}
PREFIX = "HALFSTEP_"
WORKDIR = Path("/app")
"""Of every image: where a recipe's relative folders are."""


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
    for where, document in deployment.objects():
        if document["kind"] == "HTTPRoute":
            yield from (f"{where} {name_of(document)}: {finding}" for finding in _route(document))


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
        if settings.backend in BUILT & ON_GPU and settings.start_backend is None:
            yield f"nothing checks the {settings.backend} engines, and there is nothing to fall back to"
        if container.words[3:4] == ("api",) and not container.where.startswith("image "):
            check_exposure(settings)
            if f"{PREFIX}SECRET" not in container.env:
                yield f"APIs need one {PREFIX}SECRET for all of them"
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
    store = container.env.get(f"{PREFIX}RESULT_STORE")
    named += [store] if store and is_folder(store) else []
    named += [word for word in container.words if word.startswith("/")]
    if {"distill_jobs", "run"} <= set(container.words):
        named.append(str(WORKDIR / CaptionedData.model_fields["cache"].default))
    inside = (
        ("/app", "/cache", "/runs", "/opt/halfstep") if container.where.startswith("image ") else container.mounts
    )
    for path in (part for value in named for part in str(value).split(":")):
        if not any(Path(path).is_relative_to(mount) for mount in inside):
            yield f"nothing is mounted at {path}"


# ---- routes


def _route(document: Object) -> Iterator[str]:
    """What waits for images, sends them, or streams events has no limit but the server's own."""
    limits = {
        match["path"]["value"]: rule.get("timeouts", {}).get("request", "0s")
        for rule in document["spec"]["rules"]
        for match in rule["matches"]
    }
    for path in sorted(slow_paths()):
        prefixes = [prefix for prefix in limits if f"{path}/".startswith(f"{prefix.rstrip('/')}/")]
        if not prefixes:
            yield f"{path} is not routed"
        elif limits[max(prefixes, key=len)] != "0s":
            yield f"{path} may take longer than {limits[max(prefixes, key=len)]}"


@cache
def slow_paths() -> frozenset[str]:
    """Of every POST, stream of events and file."""
    service: Any = SimpleNamespace(metrics=None, store=None, readiness=None, settings=Settings())
    routes = (route for part in routers(service) for route in part.routes if isinstance(route, APIRoute))
    slow = ("/events", "/files", "/images")
    return frozenset(
        route.path
        for route in routes
        if "POST" in (route.methods or ()) or any(part in route.path for part in slow)
    )


@cache
def path_settings() -> frozenset[str]:
    """Variables that name files or folders."""
    paths = {name for name, field in Settings.model_fields.items() if "Path" in str(field.annotation)}
    return frozenset(f"{PREFIX}{name.upper()}" for name in paths)


@cache
def operations_paths() -> frozenset[str]:
    """Paths of the probes and the metrics."""
    told = inspect.signature(operations_routes).parameters.values()
    needed = [None for each in told if each.default is each.empty]
    return frozenset(route.path for route in operations_routes(*needed).routes)  # type: ignore[arg-type,attr-defined]
