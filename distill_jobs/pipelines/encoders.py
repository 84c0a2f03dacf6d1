"""What stands between people and latents in a pipeline folder: its text encoders and its autoencoder, together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill_jobs.data.source import Condition
from distill_jobs.pipelines.folder import PipelineFolder, files_read
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.pipelines.vae import Autoencoder, Encoded


@dataclass(frozen=True)
class Encoders:
    """The frozen parts of a teacher, on a device."""

    prompts: PromptEncoder
    autoencoder: Autoencoder
    device: torch.device

    @classmethod
    def load(cls, folder: PipelineFolder, device: torch.device) -> Encoders:
        """Raises: TeacherError when weights are missing."""
        prompts, autoencoder = PromptEncoder.load(folder), Autoencoder.load(folder)
        prompts.encoders.to(device)
        return cls(prompts, autoencoder.to(device), device)

    @torch.inference_mode()
    def latents(self, pixels: Tensor) -> Encoded:
        """On the CPU, of pixels: (B, 3, H, W) in -1 … 1."""
        encoded = self.autoencoder.encode(pixels.to(self.device))
        return Encoded(encoded.mean.cpu(), encoded.std.cpu())

    def condition(self, captions: Sequence[str], time_ids: Tensor) -> Condition:
        """On the CPU. time_ids: (B, 6), for layouts that take them."""
        return self.prompts.encode(captions, time_ids).to("cpu")

    def null(self) -> Condition:
        """The empty condition, one row on the CPU, without time ids."""
        return self.prompts.null().to("cpu")


def encoders_sha256(folder: PipelineFolder) -> str:
    """Hash of everything that latents and conditions depend on: weights, configs and tokenizer files."""
    return _parts_sha256(folder, ("vae", *folder.encoders, *folder.tokenizers))


def network_sha256(folder: PipelineFolder) -> str:
    """Hash of the UNet: weights and config."""
    return _parts_sha256(folder, ("unet",))


def _parts_sha256(folder: PipelineFolder, parts: Sequence[str]) -> str:
    digest = hashlib.sha256(folder.layout.encode())
    for part in parts:
        for name, file in sorted(files_read(folder.path / part).items()):
            digest.update(f"{part}/{name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
