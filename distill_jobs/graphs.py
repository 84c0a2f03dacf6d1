"""What a bundle's ONNX files compute, as torch modules: the condition, one denoising step, the decode, the encode.

A row is one image in the making; all tensors share the batch axis B. Names and order of the inputs are those
of ``engines.manifest``. Everything outside the network body stays float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill_jobs.data.source import Condition
from distill_jobs.student import predict, sees_masks, takes_grid, takes_guidance, takes_time_ids
from engines.manifest import (
    CLEAN_ESTIMATE,
    COEFFICIENTS,
    CONDITION,
    FREE,
    GRID,
    GUIDANCE,
    IMAGE,
    KNOWN,
    LATENT,
    MASK,
    MASKED,
    NEXT_LATENT,
    NOISE,
    TIME_IDS,
    TIMESTEP,
    TOKENS,
    TensorSpec,
)
from engines.sampler import COEFFICIENT_NAMES


class StepGraph(nn.Module):
    """One denoising step of a student: network, clean estimate, affine update and inpainting blend.

    A student that sees the mask and the image behind it needs no blend, and takes that image in place of the known
    latent. The formulas are those of ``engines.sampler``; the student gives v (or whatever the coefficients' p and
    q were made for). unpack: what the network is told, from the graph's condition. names: of its inputs, in order.
    """

    def __init__(self, unet: UNet2DConditionModel, unpack: Callable[[Tensor], Condition] = Condition) -> None:
        super().__init__()
        self.unet = unet
        self.unpack = unpack
        self.names = tuple(tensor.name for tensor in self.inputs(FREE, FREE, 1))

    def forward(self, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """(next latent, clean estimate), both (B, C, h, w), of one tensor for each of ``names``.

        latent, noise, known, masked: (B, C, h, w); timestep: (B,) table indices; guidance: (B,) w = scale - 1;
        condition: (B, T, D); coefficients: (B, 9); mask: (B, 1, h, w), 1 where the image is generated; masked: the
        latent of the image without what is generated; time_ids: (B, 6) as of ``engines.framing``; grid: (B,) step
        counts N, for a student with one set of weights for all of them.
        """
        given = dict(zip(self.names, rows, strict=True))
        latent, noise, mask = given[LATENT], given[NOISE], given[MASK]
        extra = torch.cat([mask, given[MASKED]], dim=1) if MASKED in given else None
        told = self.unpack(given[CONDITION])
        if TIME_IDS in given:
            told = Condition(told.tokens, told.pooled, given[TIME_IDS])
        out = predict(self.unet, latent, given[TIMESTEP], told, given.get(GUIDANCE), extra, given.get(GRID))
        p, q, r, a, b, d, c, e, f = given[COEFFICIENTS][:, :, None, None, None].unbind(1)
        clean = torch.minimum(torch.maximum(p * latent + q * out, -r), r)
        update = a * latent + b * clean + d * out + c * noise
        if extra is not None:
            return update, clean
        return mask * update + (1 - mask) * (e * given[KNOWN] + f * noise), clean

    def inputs(self, height: int, width: int, tokens: int) -> tuple[TensorSpec, ...]:
        """Specs of ``forward``'s arguments for latents of height × width, FREE for several sizes."""
        latent = (-1, self.unet.config.out_channels, height, width)
        shapes = {
            LATENT: latent,
            TIMESTEP: (-1,),
            GUIDANCE: (-1,),
            CONDITION: (-1, tokens, self.unet.config.cross_attention_dim),
            COEFFICIENTS: (-1, len(COEFFICIENT_NAMES)),
            NOISE: latent,
            MASKED if sees_masks(self.unet) else KNOWN: latent,
            MASK: (-1, 1, height, width),
        }
        if takes_time_ids(self.unet):
            shapes[TIME_IDS] = (-1, 6)
        if takes_grid(self.unet):
            shapes[GRID] = (-1,)
        if not takes_guidance(self.unet):
            del shapes[GUIDANCE]
        return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())

    def outputs(self, height: int, width: int) -> tuple[TensorSpec, ...]:
        """Specs of what ``forward`` returns."""
        shape = (-1, self.unet.config.out_channels, height, width)
        return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name in (NEXT_LATENT, CLEAN_ESTIMATE))


class ConditionGraph(nn.Module):
    """Class index to the one-token condition of a class-conditional student."""

    classes: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("classes", torch.arange(width), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, D) one-hot float32 of tokens: (B, T) int64."""
        return (tokens[:, :, None] == self.classes).to(torch.float32)

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name=TOKENS, dtype="int64", shape=(-1, 1)),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name=CONDITION, dtype="float32", shape=(-1, 1, len(self.classes))),)


class DecodeGraph(nn.Module):
    """Pixel-space latents to images: no VAE, an integer enlargement by repeating pixels.

    Grey latents (one channel) become RGB.
    """

    def __init__(self, channels: int, enlarge: int) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"a pixel-space image has 1 or 3 channels, not {channels}")
        self.channels = channels
        self.enlarge = enlarge

    def forward(self, latent: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 images of latent: (B, C, h, w) in -1 … 1; H = h·enlarge."""
        levels = ((latent.clamp(-1, 1) + 1) * 127.5).round()
        batch, _, height, width = latent.shape
        k = self.enlarge
        rgb = levels.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(batch, height, k, width, k, 3)
        return rgb.reshape(batch, height * k, width * k, 3).to(torch.uint8)

    def inputs(self, height: int, width: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name=LATENT, dtype="float32", shape=(-1, self.channels, height, width)),)

    def outputs(self, height: int, width: int) -> tuple[TensorSpec, ...]:
        shape = (-1, height * self.enlarge, width * self.enlarge, 3)
        return (TensorSpec(name=IMAGE, dtype="uint8", shape=shape),)


class EncodeGraph(nn.Module):
    """Images to pixel-space latents: the mean of each enlarge × enlarge block, so that it undoes ``DecodeGraph``.

    Grey latents (one channel) take the luma of RGB (ITU-R BT.601).
    """

    mix: Tensor

    def __init__(self, channels: int, enlarge: int) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"a pixel-space image has 1 or 3 channels, not {channels}")
        self.channels = channels
        self.enlarge = enlarge
        luma = torch.tensor([[0.299, 0.587, 0.114]])
        self.register_buffer("mix", luma if channels == 1 else torch.eye(3), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, h, w) float32 latents in -1 … 1 of image: (B, H, W, 3) uint8; h = H / enlarge."""
        batch, height, width, _ = image.shape
        k = self.enlarge
        blocks = image.to(torch.float32).reshape(batch, height // k, k, width // k, k, 3)
        levels = (blocks.mean(dim=(2, 4)) @ self.mix.T).permute(0, 3, 1, 2)
        return levels / 127.5 - 1

    def inputs(self, height: int, width: int) -> tuple[TensorSpec, ...]:
        shape = (-1, height * self.enlarge, width * self.enlarge, 3)
        return (TensorSpec(name=IMAGE, dtype="uint8", shape=shape),)

    def outputs(self, height: int, width: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name=LATENT, dtype="float32", shape=(-1, self.channels, height, width)),)
