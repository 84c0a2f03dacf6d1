"""The tiny decoder: diffusers' AutoencoderTiny, taught to decode the latents of the teacher's autoencoder.

Only its decoder is trained. Source of the architecture: TAESD, https://github.com/madebyollin/taesd.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill_jobs.draws import Draws
from distill_jobs.latent_sections import DecoderSection
from distill_jobs.making.autoencoder import difference
from distill_jobs.phases import Phases, train_into
from distill_jobs.pipelines.vae import Autoencoder
from distill_jobs.state import Phase, RowLoss
from distill_jobs.student import weights_sha256


class Decoder(Protocol):
    """What turns latents to images: an ``Autoencoder``, or a ``TinyDecoder``."""

    @property
    def channels(self) -> int: ...

    @property
    def pixels_per_latent(self) -> int: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class TinyDecoder(nn.Module):
    """The decoder of an AutoencoderTiny, of unit-variance latents."""

    def __init__(self, tiny: AutoencoderTiny) -> None:
        super().__init__()
        self.decoder = tiny.decoder
        self.channels = int(tiny.config.latent_channels)
        self.pixels_per_latent = int(2 ** (len(tiny.config.decoder_block_out_channels) - 1))

    def forward(self, latents: Tensor) -> Tensor:
        """As ``decode``."""
        images: Tensor = self.decoder(latents)
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) float32 images, about -1 … 1, of latents: (B, C, h, w)."""
        images: Tensor = self(latents)
        return images

    def enable_gradient_checkpointing(self) -> None:
        self.decoder.gradient_checkpointing = True
        self.decoder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def new_tiny(section: DecoderSection, channels: int, pixels_per_latent: int, seed: int) -> AutoencoderTiny:
    """A freshly initialised one; the same seed gives the same weights. channels: of a latent."""
    levels = pixels_per_latent.bit_length()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderTiny(
            latent_channels=channels,
            decoder_block_out_channels=(section.width,) * levels,
            num_decoder_blocks=(section.blocks,) * (levels - 1) + (1,),
            encoder_block_out_channels=(8,) * levels,  # never trained or used
            num_encoder_blocks=(1,) * levels,
            scaling_factor=1.0,
        )


def train_decoder(phases: Phases) -> None:
    """The tiny decoder, where the recipe asks for one. Raises: TeacherError; Interrupted; DivergedError."""
    section, folder, seed = phases.recipe.decoder, phases.folder.decoder, phases.recipe.seed
    if section is None or phases.teacher is None or phases.stands(folder):
        return
    teacher = Autoencoder.load(phases.teacher).to(phases.device)
    shape = teacher.channels, teacher.pixels_per_latent

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        latents = phases.clean(draws, update, batch)
        with torch.no_grad():
            of_data = section.target == "data"
            wanted = phases.pictures(draws, update, batch) if of_data else teacher.decode(latents).clamp(-1, 1)
        return RowLoss(difference(network(latents), wanted, section.gradient))

    def fill(staging: Path, weights: dict[str, Tensor]) -> None:
        tiny = new_tiny(section, *shape, seed)
        TinyDecoder(tiny).load_state_dict(weights)
        tiny.save_pretrained(staging, safe_serialization=True)

    phase = Phase("decoder", section, TinyDecoder(new_tiny(section, *shape, seed)), Draws(seed, "decoder"), loss)
    train_into(folder, phases.trainer, phase, fill)


def load_decoder(folder: Path) -> TinyDecoder:
    """The decoder of a finished phase, to be evaluated. Raises: JobError when there is none."""
    weights_sha256(folder, "")
    tiny = AutoencoderTiny.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return TinyDecoder(tiny).eval().requires_grad_(False)
