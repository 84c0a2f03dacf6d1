"""Checkpoints: written atomically, verified by hash when read, two kept; safetensors only, never a pickle."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill_jobs.errors import StorageError

log = logging.getLogger(__name__)

KEEP = 2
STATE = "state.safetensors"
DIGEST = "state.sha256"


@dataclass(frozen=True)
class Checkpoint:
    """update: updates done; seconds: of training so far; rewinds: of the phase so far; tensors: the whole state."""

    update: int
    seconds: float
    tensors: dict[str, Tensor]
    rewinds: int = 0


def write_checkpoint(folder: Path, checkpoint: Checkpoint, every: int = 1) -> None:
    """Add a checkpoint under ``folder`` and drop all but the newest two, and the newest at a multiple of ``every``.

    Raises: StorageError.
    """

    def fill(staging: Path) -> None:
        progress = {"update": checkpoint.update, "seconds": checkpoint.seconds, "rewinds": checkpoint.rewinds}
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, staging / STATE, metadata={name: str(value) for name, value in progress.items()})
        (staging / DIGEST).write_text(_sha256(staging / STATE), encoding="ascii")

    write_folder(folder / f"{checkpoint.update:08d}", fill)
    kept = {*_checkpoints(folder)[-KEEP:], *_checkpoints(folder, every)[-1:]}
    for stale in (*folder.glob(".*.writing"), *(path for path in _checkpoints(folder) if path not in kept)):
        shutil.rmtree(stale)


def intact_checkpoint(folder: Path, every: int = 1) -> Path | None:
    """Where the newest intact checkpoint under ``folder`` stands, of those at a multiple of ``every``.

    Damaged ones are passed over loudly.
    """
    for path in reversed(_checkpoints(folder, every)):
        try:
            if _sha256(path / STATE) != (path / DIGEST).read_text(encoding="ascii"):
                raise ValueError("its sha256 differs from the one recorded")
            load_checkpoint(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s); using the one before it", path, error)
        else:
            return path
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint found intact; its tensors are mapped from the file, not yet read."""
    with safe_open(path / STATE, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return Checkpoint(int(metadata["update"]), float(metadata["seconds"]), tensors, int(metadata["rewinds"]))


def write_folder(destination: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write into a staging folder, flush it to disk and rename it to ``destination``.

    Raises: StorageError when the disk refuses; what stood at ``destination`` still stands.
    """
    staging = destination.with_name(f".{destination.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        fill(staging)
        for path in (*staging.rglob("*"), staging):
            _fsync(path)
        if destination.exists():
            shutil.rmtree(destination)
        staging.rename(destination)
        _fsync(destination.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise StorageError(
            f"{destination} cannot be written ({error}); what was written before is intact. "
            "Free some space and go on with --resume"
        ) from error


def write_text(destination: Path, text: str) -> None:
    """Write a small file in one move. Raises: StorageError."""
    staging = destination.with_name(f".{destination.name}.writing")
    try:
        staging.write_text(text, encoding="utf-8")
        _fsync(staging)
        staging.replace(destination)
    except OSError as error:
        raise StorageError(f"{destination} cannot be written ({error})") from error


def _checkpoints(folder: Path, every: int = 1) -> list[Path]:
    found = sorted(p for p in folder.glob("[0-9]*") if p.is_dir()) if folder.is_dir() else []
    return [path for path in found if int(path.name) % every == 0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str | Path, destination: str | Path) -> None:
    """A hard link to a finished file, which nobody writes in place; a copy where the disk has no links."""
    try:
        os.link(os.path.realpath(source), destination)  # else a symbolic link is linked, and may lead nowhere there
    except OSError:
        shutil.copyfile(source, destination)
