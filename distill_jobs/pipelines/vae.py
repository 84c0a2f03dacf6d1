"""Images to latents and back: the autoencoder of a pipeline folder, with its scaling factor applied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.text import load_part


@dataclass(frozen=True)
class Encoded:
    """mean, std: (B, C, h, w) of the latent's Gaussian, scaled to about unit variance.

    std: 0 of a tiny autoencoder, which gives one latent an image.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents with noise: (B, C, h, w) standard normal."""
        return self.mean + self.std * noise


class Autoencoder(nn.Module):
    """AutoencoderKL or AutoencoderTiny between images in -1 … 1 and unit-variance latents."""

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny, scaling_factor: float) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = scaling_factor

    @classmethod
    def load(cls, folder: PipelineFolder) -> Autoencoder:
        """Raises: TeacherError when weights are missing."""
        return cls(load_part(folder, "vae", folder.autoencoder), folder.scaling_factor)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def pixels_per_latent(self) -> int:
        """Width of the square of pixels that one latent position stands for."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def encode(self, images: Tensor) -> Encoded:
        """images: (B, 3, H, W) float32 in -1 … 1."""
        posterior = self.vae.encode(images, return_dict=False)[0]
        if isinstance(posterior, Tensor):
            return Encoded(posterior * self.scaling_factor, torch.zeros_like(posterior))
        return Encoded(posterior.mean * self.scaling_factor, posterior.std * self.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) float32 images, about -1 … 1, of latents: (B, C, h, w)."""
        images: Tensor = self.vae.decode(latents / self.scaling_factor, return_dict=False)[0]
        return images
