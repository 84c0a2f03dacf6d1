"""The image encoder of the glyph table: trained on the glyphs to tell them apart, wherever and in whatever colour.

Its features are the space in which the nearest glyph is looked for. It never sees a generated picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from distill_jobs.data.scenes import Scenes
from distill_jobs.draws import Draw, Draws
from distill_jobs.loop import Trainer
from distill_jobs.phases import stands, train_into
from distill_jobs.sections import Training
from distill_jobs.state import Loss, Phase, RowLoss

FEATURES = 128
WIDTHS = (32, 64, 128, 192)
SHARPNESS = 20.0
"""What cosines are multiplied by to be logits."""

TRAINING = Training(updates=2500, batch_size=128, lr=2e-3, warmup=100, ema=0.995)
SOFTENED, NOISE = 0.3, 0.1
"""Share of the pictures that lose their fine detail, and the largest deviation of noise: generated pictures are
neither as sharp nor as clean as drawn ones."""

WEIGHTS = "model.safetensors"


class GlyphEncoder(nn.Module):
    """(B, 3, S, S) pictures in -1 … 1 to (B, 128) features of unit length; and to logits, while it learns."""

    def __init__(self, side: int, glyphs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTHS[-1] * (side // 16) ** 2, FEATURES))
        self.directions = nn.Parameter(torch.randn(glyphs, FEATURES) / FEATURES**0.5)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, G) logits."""
        return SHARPNESS * self.features(pictures) @ normalize(self.directions).T

    def features(self, pictures: Tensor) -> Tensor:
        """(B, 128), of unit length."""
        return normalize(self.body(pictures))


def glyph_encoder(folder: Path, scenes: Scenes, trainer: Trainer) -> GlyphEncoder:
    """The encoder of a run, trained into ``folder`` where it does not stand. Raises: Interrupted; DivergedError."""
    seed, glyphs = scenes.held.seed, len(scenes.seen)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = GlyphEncoder(scenes.side, glyphs)
    if not stands(folder, trainer.processes):
        phase = Phase("glyph_encoder", TRAINING, network, Draws(seed, "glyph_encoder"), _telling_apart(scenes))
        train_into(folder, trainer, phase, lambda staging, weights: save_file(weights, staging / WEIGHTS))
    network.load_state_dict(load_file(folder / WEIGHTS))
    return network.cpu().eval().requires_grad_(False)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """(B, 3, S, S) float32 in -1 … 1 of RGB pictures."""
    levels = np.stack([np.asarray(picture, np.float32) for picture in pictures])
    return torch.from_numpy(levels).permute(0, 3, 1, 2) / 127.5 - 1


def _telling_apart(scenes: Scenes) -> Loss:
    """Cross-entropy of the glyph that a picture shows alone: as it is, placed, or in another colour."""

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        shown = draws.indices(update, batch, len(scenes.seen))
        chances = draws.uniforms(update, (batch, 2), Draw.MASK)
        rngs = [np.random.default_rng(int(chance * 2**53)) for chance in chances[:, 0].tolist()]
        drawn = [scenes.single(scenes.seen[i], rng).picture for i, rng in zip(shown.tolist(), rngs, strict=True)]
        seen = as_tensor([_softened(p) if c < SOFTENED else p for p, c in zip(drawn, chances[:, 1], strict=True)])
        noise = NOISE * chances[:, 1].float().reshape(-1, 1, 1, 1)
        seen = seen + noise * draws.normal(update, tuple(seen.shape))
        device = next(network.parameters()).device
        return RowLoss(cross_entropy(network(seen.to(device)), shown.to(device), reduction="none"))

    return loss


def _softened(picture: Image.Image) -> Image.Image:
    half = (picture.width // 2, picture.height // 2)
    return picture.resize(half, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)
