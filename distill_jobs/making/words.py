"""What words look like, learned before there is a network: a text encoder that guesses the latent of its prompt.

Trained with the network alone, a text encoder learns slowly what its words look like: their gradient comes through
the whole network, and only from the timesteps at which noise hides the picture. Here it is asked for the latent
itself, which takes a fraction of the time and gives the network embeddings that tell pictures apart.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from distill_jobs.draws import Draws
from distill_jobs.loop import Trainer
from distill_jobs.making.prompted import PromptedNetwork, PromptSource
from distill_jobs.objectives import row_mse
from distill_jobs.phases import train_into
from distill_jobs.sections import Training
from distill_jobs.state import Phase, RowLoss

POOLING = "pooling.safetensors"


class LatentGuess(nn.Module):
    """Token ids: (B, T) int64 to (B, C, h, w), a linear guess from what the network pools of a prompt."""

    def __init__(self, prompted: PromptedNetwork, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.text, self.pooling = prompted.text, prompted.unet.add_embedding
        self.guess = nn.Linear(self.pooling.proj.out_features, math.prod(shape))
        self._shape = shape

    def forward(self, ids: Tensor) -> Tensor:
        guess: Tensor = self.guess(self.pooling(self.text(ids).last_hidden_state))
        return guess.reshape(-1, *self._shape)

    def enable_gradient_checkpointing(self) -> None:
        self.text.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]


def learn_words(
    folder: Path,
    trainer: Trainer,
    training: Training,
    prompted: PromptedNetwork,
    source: PromptSource,
    seed: int,
) -> None:
    """Train the text encoder of ``prompted``, and how its network pools a prompt, into ``folder``.

    The network has ``addition_embed_type: text``. Raises: Interrupted; DivergedError; StorageError.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LatentGuess(prompted, source.shape)

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        rows = source.batch(draws, update, batch)
        device = trainer.processes.device
        return RowLoss(row_mse(network(rows.condition.tokens.to(device)), rows.x.to(device)))

    def fill(staging: Path, weights: dict[str, Tensor]) -> None:
        network.load_state_dict(weights)
        network.text.save_pretrained(staging, safe_serialization=True)
        save_file(network.pooling.state_dict(), staging / POOLING)

    train_into(folder, trainer, Phase("text_encoder", training, network, Draws(seed, "text_encoder"), loss), fill)


def with_words(prompted: PromptedNetwork, folder: Path) -> PromptedNetwork:
    """The same network with the text encoder that ``folder`` holds, which is not trained on, and its pooling."""
    text = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
    text.config._name_or_path = ""
    prompted.unet.add_embedding.load_state_dict(load_file(folder / POOLING))
    return PromptedNetwork(prompted.unet, text.requires_grad_(False))
