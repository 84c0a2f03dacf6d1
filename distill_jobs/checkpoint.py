"""Checkpoints: written atomically, verified by hash when read, two kept; safetensors only, never a pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load, save_file
from torch import Tensor

log = logging.getLogger(__name__)

KEEP = 2
STATE = "state.safetensors"
META = "meta.json"


@dataclass(frozen=True)
class Checkpoint:
    """update: updates done; seconds: training time so far; tensors: network, EMA and optimiser state by name."""

    update: int
    seconds: float
    tensors: dict[str, Tensor]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Add a checkpoint under ``folder`` and drop all but the newest two."""

    def fill(staging: Path) -> None:
        save_file({k: v.contiguous() for k, v in checkpoint.tensors.items()}, staging / STATE)
        digest = hashlib.sha256((staging / STATE).read_bytes()).hexdigest()
        meta = {"update": checkpoint.update, "seconds": checkpoint.seconds, "sha256": digest}
        (staging / META).write_text(json.dumps(meta), encoding="utf-8")

    write_folder(folder / f"{checkpoint.update:08d}", fill)
    for old in _checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint, or None. A damaged one is passed over loudly."""
    for path in reversed(_checkpoints(folder)):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError) as error:
            log.warning("checkpoint %s is damaged (%s); using the one before it", path, error)
    return None


def write_folder(destination: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write into a staging folder, flush it to disk and rename it to ``destination``."""
    staging = destination.with_name(f".{destination.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    fill(staging)
    for path in (*staging.rglob("*"), staging):
        _fsync(path)
    if destination.exists():
        shutil.rmtree(destination)
    staging.rename(destination)
    _fsync(destination.parent)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir()) if folder.is_dir() else []


def _read(path: Path) -> Checkpoint:
    meta = json.loads((path / META).read_text(encoding="utf-8"))
    data = (path / STATE).read_bytes()
    if hashlib.sha256(data).hexdigest() != meta["sha256"]:
        raise ValueError("its sha256 differs from the one recorded")
    return Checkpoint(int(meta["update"]), float(meta["seconds"]), load(data))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
