"""A small random UNet2DConditionModel as a real step graph, exported by torch: what exporters emit.

The sinusoids, the update and the blend are those of shipped bundles; the weights are random.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

LATENT_PX = 8
WIDTH = 16
INPUTS = ("latent", "timestep", "guidance", "condition", "coefficients", "noise", "known", "mask")
OUTPUTS = ("next_latent", "clean")


def guidance_embedding(w: Tensor, width: int = 256) -> Tensor:
    """(B,) → (B, width): LatentConsistencyModelPipeline.get_guidance_scale_embedding, float32."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = (w * 1000.0)[:, None] * frequencies[None]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class StepModule(torch.nn.Module):
    """w-embedding, UNet, update and blend: one step of rows."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        condition: Tensor,
        coefficients: Tensor,
        noise: Tensor,
        known: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        embedding = guidance_embedding(guidance)
        out = self.unet(latent, timestep, condition, timestep_cond=embedding, return_dict=False)[0]
        p, q, r, a, b, d, c, e, f = coefficients[:, :, None, None, None].unbind(1)
        clean = torch.minimum(torch.maximum(p * latent + q * out, -r), r)
        y = a * latent + b * clean + d * out + c * noise
        return mask * y + (1 - mask) * (e * known + f * noise), clean


def small_unet(channels: tuple[int, ...] = (32, 64), seed: int = 0) -> UNet2DConditionModel:
    """Random weights, with a guidance projection that matters."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=LATENT_PX,
        in_channels=1,
        out_channels=1,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (len(channels) - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (len(channels) - 1),
        cross_attention_dim=WIDTH,
        attention_head_dim=16,
        norm_num_groups=8,
        time_cond_proj_dim=256,
    )
    return unet.eval()


def example_rows(batch: int = 2) -> tuple[Tensor, ...]:
    """Inputs of the right shapes, in the order of INPUTS."""
    image = (batch, 1, LATENT_PX, LATENT_PX)
    return (
        torch.randn(image),
        torch.full((batch,), 500.0),
        torch.full((batch,), 2.0),
        torch.randn(batch, 1, WIDTH),
        torch.rand(batch, 9),
        torch.randn(image),
        torch.randn(image),
        torch.ones(image),
    )


def export_step(unet: UNet2DConditionModel, file: Path) -> StepModule:
    """Write the step graph of a UNet; returns the torch module it came from."""
    module = StepModule(unet).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            example_rows(),
            dynamo=True,
            opset_version=21,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_shapes=tuple({0: batch} for _ in INPUTS),
            verbose=False,
        )
    assert program is not None
    program.save(str(file), external_data=False)
    return module
