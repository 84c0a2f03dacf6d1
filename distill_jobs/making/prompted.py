"""A network and its text encoder as one: told token ids where a UNet is told what an encoder made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from distill_jobs.data.source import Batch, Condition
from distill_jobs.draws import Draw, Draws
from distill_jobs.latent_sections import TextSection
from distill_jobs.pipelines.vae import Encoded


class PromptedNetwork(nn.Module):
    """Called as the UNet is, but with token ids, (B, T) int64, as ``encoder_hidden_states``."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, x_t: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **rest: Any) -> Any:
        told = self.text(encoder_hidden_states).last_hidden_state
        return self.unet(x_t, timestep, encoder_hidden_states=told, **rest)

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()


@dataclass(frozen=True)
class PromptSource:
    """Latents in memory, with captions as token ids: what a text encoder in training needs.

    latents: (N, C, h, w) mean and deviation, float16; ids: (N, T) int64; empty: (1, T), of the empty prompt.
    """

    latents: Encoded
    ids: Tensor
    empty: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.latents.mean.shape
        return channels, height, width

    def batch(self, draws: Draws, update: int, size: int) -> Batch:
        picked = draws.indices(update, size, len(self.ids))
        noise = draws.normal(update, (size, *self.shape), Draw.LATENT)
        latents = Encoded(self.latents.mean[picked].float(), self.latents.std[picked].float())
        return Batch(latents.sample(noise), Condition(self.ids[picked]))

    def null(self, size: int) -> Condition:
        return Condition(self.empty).expand(size)


def new_text_encoder(section: TextSection, tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """A freshly initialised CLIP text model; the same seed gives the same weights."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPTextModel(text_config(section, len(tokenizer), **special))


def text_config(section: TextSection, words: int, **special: Any) -> CLIPTextConfig:
    """Of the encoder of a section. words: of its vocabulary; special: the ids of its start, end and padding."""
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=section.width,
        intermediate_size=4 * section.width,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        max_position_embeddings=section.tokens,
        projection_dim=section.width,
        **special,
    )


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """(N, T) int64; the end of a caption that is too long is left out."""
    rows = tokenizer(list(captions), padding="max_length", truncation=True)["input_ids"]
    return torch.tensor(rows, dtype=torch.int64)
