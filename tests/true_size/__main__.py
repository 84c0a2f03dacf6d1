"""``python -m tests.true_size``: SD 1.5 of true size, random weights, all the way on the CPU, nothing downloaded.

Each stage is a process of its own, so that its peak of memory is its own. Exit 1 where float32 is further than 1e-3
from diffusers, relative to the largest value, or a stage takes more than 24 GiB beside the files it maps. The last
line is one JSON object. Needs 40 GB of disk. Rehearse: ``python -m tests.true_size --model tiny``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from tests.true_size import BUNDLE, STUDENT
from tests.true_size.stages import STEPS, run
from tests.true_size.training import job, phases

LIMIT, MEMORY_GIB = 1e-3, 24
_out, _err = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)
ONE_LEVEL = 1 / 255
"""Of an 8-bit image: what rounding may turn any difference into."""

STAGES = (
    "make",
    "train",
    "import",
    "verify",
    "diffusers",
    "openvino float32",
    "openvino bfloat16",
    "tensorrt float32",
    "tensorrt bfloat16",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.true_size", description=__doc__)
    parser.add_argument("--model", default="sd15", choices=["sd15", "tiny"])
    parser.add_argument("--work", type=Path, help="folder to keep everything in (default: none is kept)")
    parser.add_argument("--stage", action="append", choices=STAGES, help="may be repeated (default: all)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        run(chosen.stage[0], chosen.work, chosen.model)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        work = chosen.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        figures = {name: measured(name, work, chosen.model) for name in chosen.stage or STAGES}
    _out.print(json.dumps({"model": chosen.model, "stages": figures}), markup=False)
    failures = list(missed(figures))
    for failure in failures:
        _err.print(f"FAILED: {failure}", style="red")
    return int(bool(failures))


def measured(stage: str, work: Path, model: str) -> dict[str, Any]:
    """A stage in its own process: seconds, memory, and what it found.

    peak_gib: of resident pages, where a file mapped twice counts twice; own_gib: without files, seen five times a
    second.
    """
    _err.print(f"{stage} …")
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(command(stage, work, model), stdout=out)
        own_gib, status, usage = _until_its_end(child.pid)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        said = out.read()
    if child.returncode:
        sys.exit(f"{said}{stage} ended with exit status {child.returncode}")
    own = json.loads(said.splitlines()[-1]) if stage not in ("train", "import", "verify") else {}
    if stage == "train":
        own = phases(work)
    if stage == "import":
        own = exported(work / BUNDLE)
    figures = {
        "wall_s": time.monotonic() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss / 2**20,
        "own_gib": own_gib,
        **own,
    }
    _err.print(json.dumps(figures), markup=False)
    return figures


def _until_its_end(pid: int) -> tuple[float, int, resource.struct_rusage]:
    """The peak of memory of its own in GiB, its exit status, and what it used."""
    peak = 0
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return peak / 2**30, status, usage
        with contextlib.suppress(psutil.Error):
            memory = psutil.Process(pid).memory_info()
            peak = max(peak, memory.rss - memory.shared)
        time.sleep(0.2)


def command(stage: str, work: Path, model: str) -> list[str]:
    """What a stage runs: a user's own command where there is one."""
    student, bundle = str(work / STUDENT), str(work / BUNDLE)
    if stage == "train":
        return [sys.executable, "-m", "distill_jobs", *job(work, model)]
    if stage == "import":
        steps = [f"--steps={n}" for n in (STEPS, 1)]
        return [
            sys.executable,
            "-m",
            "distill_jobs",
            "import",
            student,
            bundle,
            "--name",
            f"{model}-random",
            *steps,
        ]
    if stage == "verify":
        return [sys.executable, "-m", "engines", "verify", bundle]
    return [
        sys.executable, "-m", "tests.true_size", "--inside", "--stage", stage, "--work", str(work), "--model", model
    ]  # fmt: skip


def exported(bundle: Path) -> dict[str, Any]:
    """The graphs' parity with torch as the manifest has it, and the sizes of the files."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return {
        "parity": {name: graph["parity"] for name, graph in manifest["graphs"].items()},
        "mb": {name: record["bytes"] / 1e6 for name, record in manifest["files"].items()},
    }


def missed(figures: dict[str, dict[str, Any]]) -> list[str]:
    """What the figures show that must not be."""
    found = [
        f"{stage} took {own['own_gib']:.1f} GiB" for stage, own in figures.items() if own["own_gib"] > MEMORY_GIB
    ]
    for part, error in figures.get("openvino float32", {}).get("errors", {}).items():
        if not error["relative"] <= (ONE_LEVEL if part == "image" else LIMIT):
            found.append(f"{part} differs from diffusers by {error['relative']:.2g} of its largest value")
    return found


if __name__ == "__main__":
    sys.exit(main())
