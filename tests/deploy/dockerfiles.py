"""Dockerfiles: hadolint, and that a process is nobody's and sees only what it needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.deploy.sources import ROOT, Deployment, instructions


def hadolint() -> str | None:
    """The linter beside this interpreter or on the PATH, if it is installed."""
    beside = Path(sys.executable).parent / "hadolint"
    return str(beside) if beside.is_file() else shutil.which("hadolint")


def findings(deployment: Deployment) -> Iterator[str]:
    """What hadolint says, and what a Dockerfile of ours lacks."""
    linter = hadolint()
    for file in deployment.dockerfiles:
        if linter:
            result = subprocess.run([linter, "--no-color", str(file)], check=False, capture_output=True, text=True)
            yield from (f"{file.name}: {line}" for line in result.stdout.splitlines())
        yield from (f"{file.name}: {finding}" for finding in _own(file))


def _own(file: Path) -> Iterator[str]:
    steps = instructions(file)
    if ("USER", "65534:65534") not in steps:
        yield "runs as root"
    for word, rest in steps:
        if word == "ARG" and "=" in rest and (":" not in rest or rest.endswith(":latest")):
            yield f"the base image {rest} has no version"
        if word == "COPY" and not rest.startswith("--from"):
            source = rest.split()[0]
            if not (ROOT / source).exists():
                yield f"copies {source}, which does not exist"
        if word in ("ENTRYPOINT", "CMD") and not rest.startswith("["):
            yield f"{word} starts a shell, which passes no signals on"
