"""A small random UNet2DConditionModel as a step graph, through the project's own exporter: what bundles hold."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from distill_jobs.graphs import StepGraph
from distill_jobs.onnx_export import write_graph
from tests.support.step_rows import LATENT_PX, WIDTH, random_rows


def small_unet(channels: tuple[int, ...] = (32, 64), seed: int = 0) -> UNet2DConditionModel:
    """Random weights, with a guidance projection that matters."""
    torch.manual_seed(seed)
    unet: UNet2DConditionModel = UNet2DConditionModel(
        mid_block_type=None,
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
    unet.eval()
    return unet


def export_step(unet: UNet2DConditionModel, file: Path) -> None:
    """Write the step graph of a UNet."""
    graph = StepGraph(unet)
    example = [torch.from_numpy(array) for array in random_rows(2, seed=0).values()]
    specs = graph.inputs(LATENT_PX, LATENT_PX, tokens=1), graph.outputs(LATENT_PX, LATENT_PX)
    write_graph(graph, example, *specs, file)
