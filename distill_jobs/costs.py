"""What a network costs: its parameters, and the FLOPs of its forward pass, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from distill_jobs.adapters import adapter_parameters
from distill_jobs.errors import RecipeError
from distill_jobs.latent_sections import AutoencoderSection
from distill_jobs.making.autoencoder import AutoencoderTraining, new_autoencoder

TEXT_TOKENS = 77


@dataclass(frozen=True)
class NetworkCost:
    """parameters: of one network; flops: of its forward pass on one row."""

    parameters: int
    flops: float


def network_cost(config: dict[str, Any], rank: int | None = None) -> NetworkCost:
    """Parameters and FLOPs of a UNet2DConditionModel, built and run on the meta device: no weights, no memory.

    rank: count the parameters of adapters of this rank instead of its own.
    Raises: RecipeError when diffusers refuses the arguments.
    """
    with torch.device("meta"), torch.no_grad():
        try:
            network = UNet2DConditionModel(**config)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"recipe: unet: diffusers refuses these arguments: {error}") from None
        made = network.config
        size = made.sample_size
        width = made.time_cond_proj_dim
        pooled = (made.projection_class_embeddings_input_dim or 0) - 6 * (made.addition_time_embed_dim or 0)
        added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)} if pooled > 0 else None
        with FlopCounterMode(display=False) as counter:
            network(
                torch.empty(1, made.in_channels, size, size),
                torch.zeros(1),
                encoder_hidden_states=torch.empty(1, TEXT_TOKENS, made.cross_attention_dim),
                timestep_cond=None if width is None else torch.empty(1, width),
                added_cond_kwargs=added,
            )
    own = sum(p.numel() for p in network.parameters())
    return NetworkCost(own if rank is None else adapter_parameters(network, rank), float(counter.get_total_flops()))


def autoencoder_cost(section: AutoencoderSection, side: int) -> NetworkCost:
    """Parameters and FLOPs of an autoencoder, forth and back. side: of the pictures, in pixels."""
    with torch.device("meta"), torch.no_grad():
        network = AutoencoderTraining(new_autoencoder(section, side, 0))
        latent = side // section.pixels_per_latent
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, side, side), torch.empty(1, section.latent_channels, latent, latent))
    return NetworkCost(sum(p.numel() for p in network.parameters()), float(counter.get_total_flops()))
