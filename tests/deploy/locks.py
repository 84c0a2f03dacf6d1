"""Locked requirements: exact, hashed, and still what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.sources import ROOT, Deployment

EXTRAS = {"cpu": ["signing"], "gpu": ["torch", "signing"], "distil": ["distill"]}
"""What each image installs besides the project's own dependencies; ``make lock`` resolves the same."""


def findings(deployment: Deployment, pyproject: Path = ROOT / "pyproject.toml") -> Iterator[str]:
    """Every requirement that is not exact, not hashed, missing, or another than pyproject.toml asks for."""
    project = tomllib.loads(pyproject.read_text())["project"]
    for image, extras in EXTRAS.items():
        lock = deployment.root / "docker" / "requirements" / f"{image}.txt"
        text = lock.read_text()
        yield from (f"{lock.name}: {finding}" for finding in _form(text))
        versions = {
            canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)
        }
        wanted = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
        for requirement in map(Requirement, wanted):
            version = versions.get(canonicalize_name(requirement.name))
            if version is None:
                yield f"{lock.name}: {requirement.name} is missing; run make lock"
            elif version not in requirement.specifier:
                yield f"{lock.name}: {requirement.name} {version} is not {requirement.specifier}; run make lock"


def _form(text: str) -> Iterator[str]:
    for entry in re.split(r"\n(?=\S)", text.strip()):
        if entry.startswith("#"):
            continue
        name = entry.split()[0]
        if not re.match(r"[\w.-]+==[^\s=*]+$", name):
            yield f"{name} is not one exact version"
        if "--hash=sha256:" not in entry:
            yield f"{name} has no hash"
        if "://" in entry:
            yield f"{name} names a host"
