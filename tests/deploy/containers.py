"""One shape for every container there is: of an image, of compose, of a pod."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.deploy.sources import Deployment, Object, instructions, name_of, pod_of

OURS = re.compile(r"(?:.*/)?(halfstep-[a-z-]+)(?::.*)?$")


@dataclass(frozen=True)
class Image:
    """What a stage of a Dockerfile leaves. name: as the manifests call it."""

    name: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    env: dict[str, str]
    ports: frozenset[int]


@dataclass(frozen=True)
class Container:
    """A process to be started. words: its command line in full; ports: by name or number."""

    where: str
    image: str
    words: tuple[str, ...]
    env: dict[str, str | None] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    mounts: tuple[str, ...] = ()
    probes: tuple[tuple[str, int], ...] = ()

    def flag(self, name: str) -> str | None:
        """The value of a flag on the command line."""
        words = list(self.words)
        return words[words.index(name) + 1] if name in words[:-1] else None


def images(deployment: Deployment) -> dict[str, Image]:
    """Our images by name; a stage that is only built upon is none."""
    made = [image for file in deployment.dockerfiles for image in _stages(file)]
    return {image.name: image for image in made}


def _stages(file: Any) -> list[Image]:
    stages: dict[str, dict[str, Any]] = {}
    current: dict[str, Any] = {}
    for word, rest in instructions(file):
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            parent = stages.get(source, {"env": {}, "ports": set(), "entrypoint": [], "command": []})
            current = {**parent, "env": dict(parent["env"]), "ports": set(parent["ports"])}
            stages[name] = current
        elif word in ("ENTRYPOINT", "CMD"):
            current["entrypoint" if word == "ENTRYPOINT" else "command"] = json.loads(rest)
        elif word == "ENV":
            current["env"].update(re.findall(r"(\w+)=(\S+)", rest))
        elif word == "EXPOSE":
            current["ports"] |= {int(port) for port in rest.split()}
    return [
        Image(
            f"halfstep-{name}",
            tuple(stage["entrypoint"]),
            tuple(stage["command"]),
            stage["env"],
            frozenset(stage["ports"]),
        )
        for name, stage in stages.items()
        if stage["entrypoint"]
    ]


def containers(deployment: Deployment) -> Iterator[Container]:
    """Every container of ours, of images, compose files and pods."""
    known = images(deployment)
    for image in known.values():
        words = (*image.entrypoint, *image.command)
        yield Container(f"image {image.name}", image.name, words, dict(image.env))
    for file, content in deployment.compose.items():
        for name, service in content["services"].items():
            base = deployment.compose["compose.yaml"]["services"].get(name, {})
            yield from _of_compose(f"{file} {name}", {**base, **service}, known)
    for where, document in deployment.objects():
        pod = pod_of(document)
        for container in pod["spec"]["containers"] if pod else ():
            yield from _of_pod(f"{where} {name_of(document)}", container, known)


def _command(image: Image, entrypoint: Any, command: Any) -> tuple[str, ...]:
    start = tuple(entrypoint or image.entrypoint)
    return (*start, *(command or (() if entrypoint else image.command)))


def _of_compose(where: str, service: Object, known: dict[str, Image]) -> Iterator[Container]:
    match = OURS.match(service.get("image", ""))
    if match is None:
        return
    image = known.get(match[1], Image(match[1], (), (), {}, frozenset()))
    env = {**image.env, **service.get("environment", {})}
    targets = [entry.split(":")[-1] for entry in map(str, service.get("ports", []))]
    mounts = [entry.split(":")[1] for entry in service.get("volumes", [])] + service.get("tmpfs", [])
    mounts += [f"/run/secrets/{name}" for name in service.get("secrets", [])]
    words = _command(image, service.get("entrypoint"), service.get("command"))
    ports = {target: int(target) for target in targets}
    yield Container(where, match[1], words, env, ports, tuple(mounts))


def _of_pod(where: str, container: Object, known: dict[str, Image]) -> Iterator[Container]:
    match = OURS.match(container["image"])
    if match is None:
        return
    image = known.get(match[1], Image(match[1], (), (), {}, frozenset()))
    env = {**image.env, **{entry["name"]: entry.get("value") for entry in container.get("env", [])}}
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    probes = []
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        http = container.get(kind, {}).get("httpGet")
        if http:
            probes.append((http["path"], ports.get(http["port"], http["port"])))
    mounts = tuple(mount["mountPath"] for mount in container.get("volumeMounts", []))
    words = _command(image, container.get("command"), container.get("args"))
    yield Container(where, match[1], words, env, ports, mounts, tuple(probes))
