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
    """folder: where this run keeps its own; lenders: those of other runs, which are read alone.

    lent: the keys of what was taken from them.
    """

    folder: Path
    lenders: tuple[Path, ...] = ()
    lent: list[str] = field(default_factory=list)

    def latents(self, key: str, fingerprint: str, draw: Callable[[], Tensor]) -> Tensor:
        """(n, C, h, w), drawn where none are kept under ``key`` with an equal fingerprint. Raises: StorageError."""
        if (kept := _read(self.folder / key / LATENTS, fingerprint)) is not None:
            return kept
        found = (_read(lender / key / LATENTS, fingerprint) for lender in self.lenders)
        lent = next((each for each in found if each is not None), None)
        if lent is not None:
            self.lent.append(key)
        latents = draw().contiguous() if lent is None else lent

        def fill(staging: Path) -> None:
            save_file({NAME: latents}, staging / LATENTS, metadata={FINGERPRINT: fingerprint})

        write_folder(self.folder / key, fill)
        return latents


@dataclass
class Networks:
    """The networks of contenders on a device, the last one in memory; hashes of their weights."""

    device: torch.device
    _last: tuple[Path, UNet2DConditionModel] | None = None
    _hashes: dict[tuple[Path, Path | None], str] = field(default_factory=dict)

    def of(self, contender: Contender) -> UNet2DConditionModel:
        """Raises: JobError when it is missing."""
        if self._last is None or self._last[0] != contender.folder:
            self._last = None  # before the next one is read
            self._last = contender.folder, contender.load().to(self.device)
        return self._last[1]

    def drop(self) -> None:
        """Keep none in memory."""
        self._last = None

    def sha256(self, contender: Contender) -> str:
        """Raises: JobError when it is missing."""
        files = contender.folder, contender.unconditional
        if files not in self._hashes:
            self._hashes[files] = contender.weights_sha256()
        return self._hashes[files]


def fingerprint_of(parts: Sequence[object], tensors: Sequence[Tensor | None]) -> str:
    """Of all that latents depend on. parts: what JSON can write; the order of keys is no part of it."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
        else:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, fingerprint: str) -> Tensor | None:
    """None where it is missing, of something else, or spoilt."""
    try:
        with safe_open(file, framework="pt") as opened:
            same = (opened.metadata() or {}).get(FINGERPRINT) == fingerprint
            return opened.get_tensor(NAME) if same else None
    except (OSError, SafetensorError):
        return None
