"""``python -m tests.true_size``: SD 1.5 of true size, random weights, all the way on the CPU, nothing downloaded.

Each stage is a process of its own, so that its peak of memory is its own. Exit 1 where float32 is further than 1e-3
from diffusers or bfloat16 than 0.06, relative to the largest value (an image: 1 or 16 levels), or a stage takes
more than 24 GiB beside the files it maps. The last line is one JSON object. Needs 40 GB of disk.
Rehearse: ``python -m tests.true_size --model tiny``
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from tests.true_size import BUNDLE, STUDENT
from tests.true_size.stages import STEPS, run
from tests.true_size.training import job, phases

MEMORY_GIB = 24
_out, _err = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Bound:
    """How far an engine may be from diffusers. values: over the largest value; levels: of 255, of an image."""

    values: float
    levels: int


BOUNDS = {"openvino float32": Bound(1e-3, 1), "openvino bfloat16": Bound(0.06, 16)}
"""Rounding an image may turn any difference into one level. bfloat16's are twice what was measured (2.9e-2 in
encoding, 8 levels): other processors sum in other orders."""

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
    for stage, bound in BOUNDS.items():
        for part, error in figures.get(stage, {}).get("errors", {}).items():
            if not _near(part, error, bound):
                found.append(
                    f"{stage}: {part} differs from diffusers by {error['largest']:.2g}, "
                    f"{error['relative']:.2g} of its largest value"
                )
    return found


def _near(part: str, error: Mapping[str, float], bound: Bound) -> bool:
    if part == "image":
        return error["largest"] <= bound.levels
    return error["relative"] <= bound.values


if __name__ == "__main__":
    sys.exit(main())
