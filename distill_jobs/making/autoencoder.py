"""The autoencoder of a pipeline: diffusers' AutoencoderKL, trained to give pictures back, edges included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from distill_jobs.data.captioned import Captioned
from distill_jobs.data.framing import pixels_of
from distill_jobs.draws import Draw, Draws
from distill_jobs.errors import RecipeError
from distill_jobs.latent_sections import AutoencoderSection
from distill_jobs.state import Loss, RowLoss

SCALES = 3
"""The picture, and half and a quarter of its size, at which it is compared."""

HUES = ((0.5, -0.5, 0.0), (0.25, 0.25, -0.5))
"""Red against green and yellow against blue, of red, green and blue."""

HUE_WEIGHT = 20.0
"""Of the squared difference in hue. Where most pictures are yellow, orange is a cheap guess for red in any average
of differences, and stays one; squares ask for the few that are far off first."""


class AutoencoderTraining(nn.Module):
    """An autoencoder as the loop trains it: one call encodes, draws a latent and decodes it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(pictures given back, mean and log-variance of the latents). noise: (B, C, h, w) standard normal."""
        posterior = self.vae.encode(pictures, return_dict=False)[0]
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents, return_dict=False)[0], posterior.mean, posterior.logvar

    def enable_gradient_checkpointing(self) -> None:
        self.vae.enable_gradient_checkpointing()


def new_autoencoder(section: AutoencoderSection, side: int, seed: int) -> AutoencoderKL:
    """A freshly initialised one; the same seed gives the same weights. side: of the pictures, in pixels.

    Raises: RecipeError when diffusers refuses the arguments.
    """
    levels = len(section.block_out_channels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return AutoencoderKL(
                block_out_channels=section.block_out_channels,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=section.layers_per_block,
                latent_channels=section.latent_channels,
                norm_num_groups=section.norm_num_groups,
                sample_size=side,
                scaling_factor=1.0,
            )
        except (TypeError, ValueError) as error:
            raise RecipeError(f"recipe: teacher.autoencoder: diffusers refuses these arguments: {error}") from None


def autoencoder_loss(section: AutoencoderSection, entries: Sequence[Captioned], side: int) -> Loss:
    """The loss on pictures of ``entries``, framed to ``side`` pixels."""
    latent_side = side // section.pixels_per_latent

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        device = next(network.parameters()).device
        seen = pixels_of([entries[i] for i in draws.indices(update, batch, len(entries)).tolist()], side).to(device)
        shape = (batch, section.latent_channels, latent_side, latent_side)
        given_back, mean, log_variance = network(seen, draws.normal(update, shape, Draw.LATENT).to(device))
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)
        return RowLoss(difference(given_back, seen, section.gradient) + section.kl * divergence)

    return loss


def difference(one: Tensor, other: Tensor, gradient: float) -> Tensor:
    """(B,) mean absolute difference of pictures: (B, 3, H, W), ``gradient`` times that of their slopes, and
    HUE_WEIGHT times the mean squared difference of their hues, summed over SCALES sizes.

    Slopes are what makes an edge sharp: an average alone forgives a blurred one.
    """
    total = torch.zeros(len(one), device=one.device)
    wrong, hues = one - other, torch.tensor(HUES, device=one.device)
    for scale in range(SCALES):
        wrong = avg_pool2d(wrong, 2) if scale else wrong
        hue = torch.einsum("kc,bchw->bkhw", hues, wrong)
        total = total + wrong.abs().flatten(1).mean(1) + HUE_WEIGHT * hue.square().flatten(1).mean(1)
        for slope in (wrong.diff(dim=-1), wrong.diff(dim=-2)):
            total = total + gradient * slope.abs().flatten(1).mean(1)
    return total


def save_autoencoder(vae: AutoencoderKL, folder: Path, latents: Tensor) -> None:
    """Write a stock folder in whose latents every channel has zero mean and unit deviation on those given.

    latents: (N, C, h, w), drawn from it. One factor for all channels, which is all that a stock pipeline has,
    leaves channels of colour so small beside those of shape that a network learns them last. So what a channel is
    moved and scaled by is folded into the 1×1 convolutions around the latents; the pictures stay what they were.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    assert isinstance(into, nn.Conv2d)
    assert isinstance(out_of, nn.Conv2d)
    assert into.bias is not None
    assert out_of.bias is not None
    with torch.no_grad():
        into.weight[:channels] /= deviation.reshape(-1, 1, 1, 1)
        into.bias[:channels] = (into.bias[:channels] - mean) / deviation
        into.bias[channels:] -= 2 * deviation.log()
        out_of.bias += out_of.weight[:, :, 0, 0] @ mean
        out_of.weight *= deviation.reshape(1, -1, 1, 1)
    vae.save_pretrained(folder, safe_serialization=True)
