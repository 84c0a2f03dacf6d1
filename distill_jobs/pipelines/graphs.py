"""What a latent bundle's ONNX files compute around the steps: prompts to conditions, latents to images and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill_jobs.pipelines.packing import Packing
from distill_jobs.pipelines.text import TextEncoders
from distill_jobs.pipelines.tiny_decoder import TinyDecoder
from distill_jobs.pipelines.vae import Autoencoder
from engines.manifest import CONDITION, FREE, IMAGE, LATENT, TOKENS, TensorSpec


class PromptGraph(nn.Module):
    """Token ids to packed conditions, by one or two text encoders."""

    def __init__(self, encoders: TextEncoders, packing: Packing) -> None:
        super().__init__()
        self.encoders = encoders
        self.packing = packing

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, rows, D) float32 of tokens: (B, T) int64."""
        return self.packing.pack(*self.encoders(tokens))

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name=TOKENS, dtype="int64", shape=(-1, self.packing.tokens)),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name=CONDITION, dtype="float32", shape=(-1, self.packing.rows, self.packing.width)),)


class LatentDecodeGraph(nn.Module):
    """Latents to images, by the autoencoder's decoder or by a tiny one."""

    def __init__(self, decoder: Autoencoder | TinyDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 of latent: (B, C, h, w); rounded as diffusers' image processor does."""
        levels = ((self.decoder.decode(latent) * 0.5 + 0.5).clamp(0, 1) * 255).round()
        return levels.permute(0, 2, 3, 1).to(torch.uint8)

    def inputs(self, height: int, width: int) -> tuple[TensorSpec, ...]:
        shape = (-1, self.decoder.channels, height, width)
        return (TensorSpec(name=LATENT, dtype="float32", shape=shape),)

    def outputs(self, height: int, width: int) -> tuple[TensorSpec, ...]:
        return (_image(height, width, self.decoder.pixels_per_latent),)


class LatentEncodeGraph(nn.Module):
    """Images to latents: the mean of what the autoencoder's encoder gives."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, h, w) float32 of image: (B, H, W, 3) uint8."""
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
        return self.autoencoder.encode(pixels).mean

    def inputs(self, height: int, width: int) -> tuple[TensorSpec, ...]:
        return (_image(height, width, self.autoencoder.pixels_per_latent),)

    def outputs(self, height: int, width: int) -> tuple[TensorSpec, ...]:
        shape = (-1, self.autoencoder.channels, height, width)
        return (TensorSpec(name=LATENT, dtype="float32", shape=shape),)


def _image(height: int, width: int, scale: int) -> TensorSpec:
    """Of latents of height × width, which may be FREE."""
    high, wide = (FREE if cells == FREE else cells * scale for cells in (height, width))
    return TensorSpec(name=IMAGE, dtype="uint8", shape=(-1, high, wide, 3))
