"""Latents that an evaluation drew, kept beside what they depend on, so that none is drawn twice.

An interrupted evaluation goes on, tables of the same prompts share their pictures, and runs that share a network
take its latents from each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill_jobs.checkpoint import write_folder
from distill_jobs.contenders import Contender

LATENTS = "latents.safetensors"
NAME, FINGERPRINT = "latents", "fingerprint"


@dataclass(frozen=True)
class KeptDraws:
    """folder: where this run keeps its own; lenders: those of other runs, which are read alone."""

    folder: Path
    lenders: tuple[Path, ...] = ()

    def latents(self, key: str, fingerprint: str, draw: Callable[[], Tensor]) -> Tensor:
        """(n, C, h, w), drawn where none are kept under ``key`` with an equal fingerprint. Raises: StorageError."""
        for folder in (self.folder, *self.lenders):
            if (kept := _read(folder / key / LATENTS, fingerprint)) is not None:
                return kept
        drawn = draw().contiguous()

        def fill(staging: Path) -> None:
            save_file({NAME: drawn}, staging / LATENTS, metadata={FINGERPRINT: fingerprint})

        write_folder(self.folder / key, fill)
        return drawn


@dataclass
class Networks:
    """The networks of contenders on a device, the last one in memory; hashes of their weights."""

    device: torch.device
    _last: tuple[Contender, UNet2DConditionModel] | None = None
    _hashes: dict[Contender, str] = field(default_factory=dict)

    def of(self, contender: Contender) -> UNet2DConditionModel:
        """Raises: JobError when it is missing."""
        if self._last is None or self._last[0] != contender:
            self._last = None  # before the next one is read
            self._last = contender, contender.load().to(self.device)
        return self._last[1]

    def sha256(self, contender: Contender) -> str:
        """Raises: JobError when it is missing."""
        if contender not in self._hashes:
            self._hashes[contender] = contender.weights_sha256()
        return self._hashes[contender]


def fingerprint_of(parts: Sequence[object], tensors: Sequence[Tensor | None]) -> str:
    """Of all that latents depend on. parts: what JSON can write."""
    digest = hashlib.sha256(json.dumps(parts).encode())
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, fingerprint: str) -> Tensor | None:
    """None where it is missing, of something else, or spoilt."""
    try:
        with safe_open(file, framework="pt") as opened:
            same = (opened.metadata() or {}).get(FINGERPRINT) == fingerprint
            return opened.get_tensor(NAME) if same else None
    except (OSError, SafetensorError):
        return None
