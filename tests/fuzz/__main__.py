"""``python -m tests.fuzz [quick|long]``: requests made up from the OpenAPI document, against a running server.

Schemathesis with all of its checks but one and all phases, every API: answers have the statuses, types and bodies
that the document names, nothing is a server error, and what breaks the document is refused. Exit 1 for a finding,
with a curl line that repeats it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

from tests.support.serving import ROOT, ServerProcess, serving
from tests.support.toy_bundle import make_toy_bundle

CONFIG = Path(__file__).with_name("schemathesis.toml")
CHECKS = ("--checks", "all", "--exclude-checks", "use_after_free")
"""DELETE of a job cancels it: the job stays, with the status cancelled."""

PROFILES = {
    "quick": ("--phases", "coverage,fuzzing,stateful", "--max-examples", "4", "--generation-deterministic"),
    "long": ("--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "200", "--continue-on-failure"),
}


def fuzz(server: ServerProcess, profile: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Its output tells every finding; the exit status is 0 without one. folder: for what it keeps of a run."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
    options = (*CHECKS, "--seed", "1", "--no-color", *PROFILES[profile])
    return subprocess.run(
        [*command, f"{server.url}/openapi.json", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=None if profile == "long" else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def main(profile: str = "long") -> int:
    with tempfile.TemporaryDirectory() as folder:
        bundle, log = make_toy_bundle(Path(folder) / "toy").path, Path(folder) / "log"
        with serving([bundle], log=log) as server:
            found = fuzz(server, profile, Path(folder))
            ready = httpx.get(f"{server.url}/readyz", timeout=30).status_code == 200
        sys.stdout.write(found.stdout or "")
        return 0 if found.returncode == 0 and ready else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
