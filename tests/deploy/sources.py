"""What is deployed: Dockerfiles, compose files and Kubernetes objects of a folder, read but not judged."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def renderer() -> list[str] | None:
    """The command that renders a kustomization, or None where neither kubectl nor kustomize is installed."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    return ["kustomize", "build"] if shutil.which("kustomize") else None


class RenderError(Exception):
    """kustomize refuses an overlay; the message is its own."""


@dataclass(frozen=True)
class Deployment:
    """The folders ``docker`` and ``k8s`` under ``root``. only: overlays to look at, all when empty."""

    root: Path = ROOT
    only: tuple[str, ...] = ()

    @property
    def dockerfiles(self) -> list[Path]:
        return sorted((self.root / "docker").glob("Dockerfile*"))

    @property
    def overlays(self) -> list[str]:
        return sorted(self.only or (path.name for path in (self.root / "k8s" / "overlays").iterdir()))

    @cached_property
    def compose(self) -> dict[str, Object]:
        """Compose files by name, each parsed."""
        return {
            path.name: yaml.safe_load(path.read_text()) for path in sorted(self.root.glob("docker/compose*.yaml"))
        }

    @cached_property
    def rendered(self) -> dict[str, list[Object]]:
        """Objects of each overlay as a cluster gets them. Raises: RenderError."""
        return {name: self._render(name) for name in self.overlays}

    @cached_property
    def written(self) -> list[Object]:
        """Objects as they stand in the files that kustomizations list as resources, no patch applied."""
        listed = []
        for file in sorted((self.root / "k8s").rglob("kustomization.yaml")):
            names = yaml.safe_load(file.read_text()).get("resources", [])
            listed += [file.parent / name for name in names if name.endswith(".yaml")]
        return [document for path in listed for document in yaml.safe_load_all(path.read_text())]

    def objects(self) -> Iterator[tuple[str, Object]]:
        """Every object and where it is from: rendered where that is possible here, else as written."""
        if renderer() is None:
            yield from (("k8s", document) for document in self.written)
            return
        for overlay, documents in self.rendered.items():
            yield from ((overlay, document) for document in documents)

    def _render(self, overlay: str) -> list[Object]:
        command = [*(renderer() or []), str(self.root / "k8s" / "overlays" / overlay)]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            raise RenderError(f"{overlay}: {result.stderr.strip()}")
        return list(yaml.load_all(result.stdout, Loader=_Loader))


def name_of(document: Object) -> str:
    """``Deployment/halfstep-api``."""
    return f"{document['kind']}/{document['metadata']['name']}"


def pod_of(document: Object) -> Object | None:
    """The pod template of a workload, or None for other kinds."""
    template = document.get("spec", {}).get("template")
    return template if isinstance(template, dict) and "containers" in template.get("spec", {}) else None


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Instructions and their arguments, lines that go on joined."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word.upper(), rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in lines)]
