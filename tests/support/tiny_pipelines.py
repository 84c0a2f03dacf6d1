"""Stock diffusers pipelines of the true architectures, scaled down to random weights that run in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

LATENT_PX = 8
IMAGE_PX = 16
TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = (("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"))

SD21_UNET: dict[str, Any] = {"use_linear_projection": True, "upcast_attention": True}
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
"""For tests that train or export, which takes its time by layers: here is each kind of them once."""

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "clip_sample": False,
}


def vocabulary() -> dict[str, int]:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in MERGES), START, END]
    return {word: index for index, word in enumerate(words)}


def tokenizer(folder: Path, pad: str = END, size: int = 0) -> CLIPTokenizer:
    """A CLIP tokenizer of all bytes and two words, read from the files SD folders ship.

    size: of its vocabulary at least, made up with words that no text becomes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    words |= {f"never {i}": i for i in range(len(words), size)}
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, pad_token=pad)


def text_config(hidden: int, projection: int = 24, activation: str = "quick_gelu") -> CLIPTextConfig:
    """Of OpenAI's CLIP; OpenCLIP's have the plain gelu."""
    words = vocabulary()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act=activation,
        max_position_embeddings=TOKENS,
        bos_token_id=words[START],
        eos_token_id=words[END],
        pad_token_id=1,
        projection_dim=projection,
    )


def unet(condition: int, **changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": LATENT_PX,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": condition,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes})


def vae(scaling_factor: float = 0.18215) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_PX,
        scaling_factor=scaling_factor,
    )


def tiny_vae() -> AutoencoderTiny:
    """As TAESD, which stands in for the autoencoder of SD models."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).eval()


def clip(folder: Path) -> Path:
    """A CLIP of images and words, as transformers saves it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    CLIPModel(
        CLIPConfig(text_config=text_config(16).to_dict(), vision_config=vision, projection_dim=12)
    ).save_pretrained(folder)
    tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.3, 0.3, 0.3]}'
    )
    return folder


def sd(
    work: Path, *, prediction: str = "epsilon", scheduler: Any = None, **changes: Any
) -> StableDiffusionPipeline:
    """SD 1.x; with prediction v_prediction, SD 2.1 (OpenCLIP's encoder and padding, linear projections).

    changes: of the UNet's config. work: a scratch folder.
    """
    torch.manual_seed(0)
    second = prediction == "v_prediction"
    activation, pad = ("gelu", "!") if second else ("quick_gelu", END)
    config = {**(SD21_UNET if second else {}), **changes}
    kind = StableDiffusionInpaintPipeline if changes.get("in_channels") == 9 else StableDiffusionPipeline
    pipeline = kind(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(32, activation=activation)).eval(),
        tokenizer=tokenizer(work / "tokenizer", pad),
        unet=unet(32, **config).eval(),
        scheduler=scheduler or DDIMScheduler(**SCHEDULER, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl(
    work: Path, *, prediction: str = "epsilon", scheduler: Any = None, **changes: Any
) -> StableDiffusionXLPipeline:
    """Two text encoders of different width and padding, pooled embedding, time ids."""
    torch.manual_seed(0)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }
    pipeline = StableDiffusionXLPipeline(
        vae=vae(0.13025),
        text_encoder=CLIPTextModel(text_config(32)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16, activation="gelu")).eval(),
        tokenizer=tokenizer(work / "tokenizer"),
        tokenizer_2=tokenizer(work / "tokenizer_2", "!"),
        unet=unet(48, **{**added, **changes}).eval(),
        scheduler=scheduler or DDIMScheduler(**SCHEDULER, prediction_type=prediction),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
