"""What a network costs: its parameters, and the FLOPs of its forward pass, counted on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from distill_jobs.adapters import adapter_parameters
from distill_jobs.errors import RecipeError
from distill_jobs.latent_sections import AutoencoderSection, DecoderSection, TextSection
from distill_jobs.making.autoencoder import AutoencoderTraining, new_autoencoder
from distill_jobs.making.prompted import PromptedNetwork, text_config
from distill_jobs.making.words import LatentGuess
from distill_jobs.pipelines.tiny_decoder import TinyDecoder, new_tiny

TEXT_TOKENS = 77
HALF = 2
STOCK_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""That of Stable Diffusion 1.x, 2.x and XL."""


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
    try:
        with torch.device("meta"), torch.no_grad():
            network = UNet2DConditionModel(**config)
            flops = _flops_of_a_row(network)
    except Exception as error:  # what diffusers makes of wrong arguments has no common base
        raise RecipeError(f"recipe: unet: diffusers refuses these arguments: {error}") from None
    own = sum(p.numel() for p in network.parameters())
    return NetworkCost(own if rank is None else adapter_parameters(network, rank), flops)


def _flops_of_a_row(network: UNet2DConditionModel) -> float:
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
    return float(counter.get_total_flops())


def cached_bytes(unet: Mapping[str, Any], tokens: int = TEXT_TOKENS) -> int:
    """Of an image in the cache: mean and deviation of its latent, and the embeddings of its caption, in float16."""
    latent = 2 * unet.get("out_channels", 4) * int(unet["sample_size"]) ** 2
    added = (unet.get("projection_class_embeddings_input_dim") or 0) - 6 * (
        unet.get("addition_time_embed_dim") or 0
    )
    return HALF * int(latent + tokens * int(unet["cross_attention_dim"]) + max(added, 0))


def autoencoder_cost(section: AutoencoderSection, side: int) -> NetworkCost:
    """Parameters and FLOPs of an autoencoder, forth and back. side: of the pictures, in pixels."""
    with torch.device("meta"), torch.no_grad():
        network = AutoencoderTraining(new_autoencoder(section, side, 0))
        latent = side // section.pixels_per_latent
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, side, side), torch.empty(1, section.latent_channels, latent, latent))
    return NetworkCost(sum(p.numel() for p in network.parameters()), float(counter.get_total_flops()))


def words_cost(text: TextSection, unet: dict[str, Any]) -> NetworkCost:
    """Parameters and FLOPs of a text encoder that guesses latents. unet: arguments of its network."""
    side = int(unet["sample_size"])
    with torch.device("meta"), torch.no_grad():
        encoder = CLIPTextModel(text_config(text, text.words, bos_token_id=0, eos_token_id=0, pad_token_id=0))
        prompted = PromptedNetwork(UNet2DConditionModel(**unet), encoder)
        network = LatentGuess(prompted, (int(unet["in_channels"]), side, side))
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, text.tokens, dtype=torch.int64))
    return NetworkCost(sum(p.numel() for p in network.parameters()), float(counter.get_total_flops()))


def encoding_flops(latent_side: int) -> float:
    """Of one image to its latent, by the stock autoencoder."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoencoderKL(**STOCK_AUTOENCODER).encode(torch.empty(1, 3, 8 * latent_side, 8 * latent_side))
    return float(counter.get_total_flops())


def decoder_costs(
    section: DecoderSection, made: AutoencoderSection | None, latent_side: int
) -> tuple[NetworkCost, NetworkCost]:
    """Of a tiny decoder, and of the autoencoder it learns from, decoding one latent.

    made: the autoencoder of a pipeline that the recipe makes; None for a folder's, counted as the stock one.
    """
    with torch.device("meta"), torch.no_grad():
        side = latent_side * (8 if made is None else made.pixels_per_latent)
        vae = AutoencoderKL(**STOCK_AUTOENCODER) if made is None else new_autoencoder(made, side, 0)
        channels, scale = int(vae.config.latent_channels), side // latent_side
        tiny = TinyDecoder(new_tiny(section, channels, scale, 0))
        latent, flops = torch.empty(1, channels, latent_side, latent_side), []
        for decode in (tiny, vae.decode):
            with FlopCounterMode(display=False) as counter:
                decode(latent)
            flops.append(float(counter.get_total_flops()))
    counts = (sum(p.numel() for p in part.parameters()) for part in (tiny, vae))
    found = [NetworkCost(count, each) for count, each in zip(counts, flops, strict=True)]
    return found[0], found[1]
