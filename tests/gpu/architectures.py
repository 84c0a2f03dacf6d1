"""The real architectures with random weights, at true size: speed needs no quality."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill_jobs.graphs import StepGraph
from distill_jobs.latent_sections import DecoderSection
from distill_jobs.pipelines.graphs import LatentDecodeGraph
from distill_jobs.pipelines.packing import Packing
from distill_jobs.pipelines.tiny_decoder import TinyDecoder, new_tiny
from distill_jobs.pipelines.vae import Autoencoder
from distill_jobs.student import GUIDANCE_WIDTH

Graph = Literal["step", "decode", "decode_tiny"]

_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_TINY: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
}
_TINY_VAE: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Architecture:
    """unet, vae: what differs from diffusers' defaults; side: of a square latent; packing: of its condition.

    tiny_width: channels of the tiny decoder.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    side: int
    packing: Packing
    tiny_width: int = 64

    @property
    def unet_config(self) -> dict[str, Any]:
        """Of a student: it takes the guidance weight."""
        latent = {"sample_size": self.side, "in_channels": 4, "out_channels": 4}
        return {**latent, "time_cond_proj_dim": GUIDANCE_WIDTH, **self.unet}

    @cached_property
    def step(self) -> StepGraph:
        """One denoising step; the weights are drawn once."""
        torch.manual_seed(0)
        return StepGraph(UNet2DConditionModel(**self.unet_config).eval(), self.packing.unpack)

    @cached_property
    def decode(self) -> LatentDecodeGraph:
        """Latents to images."""
        return LatentDecodeGraph(self._autoencoder)

    @cached_property
    def decode_tiny(self) -> LatentDecodeGraph:
        """Likewise, by the decoder that a ``decoder`` section trains."""
        section = DecoderSection(updates=1, width=self.tiny_width)
        shape = self._autoencoder.channels, self._autoencoder.pixels_per_latent
        return LatentDecodeGraph(TinyDecoder(new_tiny(section, *shape, 0)).eval())

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        torch.manual_seed(0)
        return Autoencoder(AutoencoderKL(**self.vae).eval(), 0.18215)

    def network(self, graph: Graph) -> nn.Module:
        """diffusers' own network in a graph: the UNet, or the decoder of an autoencoder. Not to be altered."""
        networks = {
            "step": lambda: self.step.unet,
            "decode": lambda: self._autoencoder.vae.decoder,
            "decode_tiny": lambda: self.decode_tiny.decoder.decoder,
        }
        return networks[graph]()

    def step_flops(self) -> int:
        """Floating-point operations of one row's network, products alone, counted without computing any."""
        with torch.device("meta"):
            unet = UNet2DConditionModel(**self.unet_config)
            packed = torch.empty(1, self.packing.rows, self.packing.width)
            latent, one = torch.empty(1, 4, self.side, self.side), torch.empty(1)
            cond = torch.empty(1, GUIDANCE_WIDTH)
            told = self.packing.unpack(packed)
            added = None if told.pooled is None else {"text_embeds": told.pooled, "time_ids": told.time_ids}
            with FlopCounterMode(display=False) as counter:
                unet(latent, one, told.tokens, timestep_cond=cond, added_cond_kwargs=added)
        return int(counter.get_total_flops())


ARCHITECTURES = {
    "sd15": Architecture({"cross_attention_dim": 768}, _VAE, 64, Packing(77, 768, None, 512)),
    "sdxl": Architecture(_SDXL, _VAE, 128, Packing(77, 2048, 1280, 1024)),
    "tiny": Architecture(_TINY, _TINY_VAE, 8, Packing(7, 32, None, 16), tiny_width=8),
}
