"""A pipeline folder of true size with random weights, and the w-conditioned student that training begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.teacher import load_network
from distill_jobs.pipelines.writing import complete
from distill_jobs.student import GUIDANCE_WIDTH, save_stock, student_of
from engines.schedule import NoiseSchedule
from tests.gpu.architectures import ARCHITECTURES
from tests.support import tiny_pipelines as tiny

SCALING_FACTOR = 0.18215

_TEXT: dict[str, dict[str, int]] = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
_VOCABULARY = 49_408
"""Of CLIP. What texts become are bytes and two words: the true vocabulary would be a download."""


def make_teacher(model: str, folder: Path) -> dict[str, Any]:
    """A stock folder, and how many parameters each part of it has. model: sd15, or tiny to rehearse."""
    architecture = ARCHITECTURES[model]
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=_vae(architecture.vae),
        text_encoder=_text_encoder(_TEXT[model]),
        tokenizer=tiny.tokenizer(folder.with_name("words"), size=_VOCABULARY),
        unet=_unet({"sample_size": architecture.side, **architecture.unet}),
        scheduler=DDIMScheduler(**tiny.SCHEDULER, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    parts = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}


def make_student(teacher: Path, folder: Path) -> None:
    """The teacher's copy that takes w, and heeds it: its new weight is drawn, where training starts at zero."""
    opened = open_folder(teacher)
    student = student_of(load_network(opened).requires_grad_(False))
    nn.init.normal_(student.time_embedding.cond_proj.weight, std=GUIDANCE_WIDTH**-0.5)
    save_stock(folder, student, NoiseSchedule(opened.schedule), clip=None)
    complete(folder, opened)


def _unet(config: dict[str, Any]) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **config).eval()
    condition = torch.randn(1, 4, int(unet.config.cross_attention_dim))
    with torch.no_grad():
        _widen(unet.conv_out, unet(torch.randn(1, 4, 16, 16), 500, condition).sample, 1.0)
    return unet


def _vae(config: dict[str, Any]) -> AutoencoderKL:
    vae = AutoencoderKL(**config, scaling_factor=SCALING_FACTOR).eval()
    with torch.no_grad():
        _widen(vae.decoder.conv_out, vae.decode(torch.randn(1, 4, 8, 8) / SCALING_FACTOR).sample, 0.4)
        mean = vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1).latent_dist.mean
        vae.quant_conv.weight[:4] *= float(1 / (SCALING_FACTOR * mean.std()))
        vae.quant_conv.bias[:4] *= float(1 / (SCALING_FACTOR * mean.std()))
    return vae


def _widen(last: nn.Conv2d, output: Tensor, deviation: float) -> None:
    """Scale the last layer so that outputs have about this deviation, as those of a trained network do."""
    for weight in (last.weight, last.bias):
        assert weight is not None
        weight.data *= float(deviation / output.std())


def _text_encoder(size: dict[str, int]) -> CLIPTextModel:
    words = tiny.vocabulary()
    config = CLIPTextConfig(
        vocab_size=_VOCABULARY,
        max_position_embeddings=tiny.TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=words[tiny.START],
        eos_token_id=words[tiny.END],
        pad_token_id=words[tiny.END],
        **size,
    )
    return CLIPTextModel(config).eval()
