"""What a pipeline folder must be for us to read it; every refusal names the part."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill_jobs.errors import TeacherError
from distill_jobs.pipelines.folder import (
    AUTOENCODERS,
    FOLD,
    TIME_IDS,
    Layout,
    PipelineFolder,
    read_json,
    weights_variant,
)

LAYOUTS: dict[str, Layout] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
}
LORA = re.compile(r"(?i)(?<![a-z])lora(?![a-z])")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
PARTS: dict[Layout, dict[str, tuple[str, ...]]] = {
    "sd": {
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": TOKENIZERS,
        "unet": ("UNet2DConditionModel",),
        "vae": tuple(AUTOENCODERS),
    },
    "sdxl": {
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer": TOKENIZERS,
        "tokenizer_2": TOKENIZERS,
        "unet": ("UNet2DConditionModel",),
        "vae": tuple(AUTOENCODERS),
    },
}
"""The components a layout needs, and the classes each may have."""


def open_folder(path: Path) -> PipelineFolder:
    """Read and check every config. Raises: TeacherError naming the part and what is wrong with it."""
    if not path.is_dir():
        raise TeacherError(f"{path} is not a folder: give a local diffusers pipeline folder, nothing is downloaded")
    index = read_json(path / "model_index.json")
    layout = LAYOUTS.get(str(index.get("_class_name")))
    if layout is None:
        raise TeacherError(f"{path}: {index.get('_class_name')} is none of: {', '.join(LAYOUTS)}")
    folder = PipelineFolder(path, layout, index)
    _check_parts(folder)
    _check_no_lora(folder)
    try:
        _check_unet(folder)
        _check_vae(folder)
        _check_text(folder)
        _ = folder.schedule, folder.prediction, folder.size_px
    except ValidationError as error:
        first = error.errors()[0]
        raise folder.wrong(f"scheduler: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except KeyError as error:
        raise folder.wrong(f"a config has no {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise folder.wrong(f"a config holds what it cannot: {error}") from None
    return folder


def _check_parts(folder: PipelineFolder) -> None:
    for part, classes in PARTS[folder.layout].items():
        if folder.class_of(part) not in classes:
            raise folder.wrong(
                f"{part} is {folder.class_of(part)}, a {folder.layout} pipeline needs {' or '.join(classes)}"
            )
        if not (folder.path / part).is_dir():
            raise folder.wrong(f"the folder {part} is missing")
        if part.startswith("tokenizer"):
            _check_tokenizer(folder, part)
        else:
            folder.config(part)
            weights_variant(folder.path / part)
    folder.config("scheduler")


def _check_no_lora(folder: PipelineFolder) -> None:
    """Who puts one there expects that it is used."""
    beside = (file for part in ("", *folder.parts) for file in (folder.path / part).glob("*.safetensors"))
    if lora := next((file for file in sorted(beside) if LORA.search(file.stem)), None):
        raise folder.wrong(f"{lora.relative_to(folder.path)} is a LoRA; {FOLD}")


def _check_tokenizer(folder: PipelineFolder, part: str) -> None:
    """Without its files transformers makes one that knows no words, and says nothing."""
    if not any(all((folder.path / part / name).is_file() for name in files) for files in VOCABULARIES):
        raise folder.wrong(f"{part} has neither {' nor '.join(' with '.join(files) for files in VOCABULARIES)}")


def _check_unet(folder: PipelineFolder) -> None:
    unet = folder.config("unet")
    masked = 1 + folder.channels
    if unet.get("out_channels") != folder.channels or folder.extra_channels not in (0, masked):
        raise folder.wrong(
            f"unet takes {unet.get('in_channels')} channels and gives {unet.get('out_channels')}; "
            f"with this vae it must take {folder.channels}, or {folder.channels + masked} to inpaint, "
            f"and give {folder.channels}"
        )
    if unet.get("cross_attention_dim") != folder.width:
        raise folder.wrong(
            f"unet expects conditions {unet.get('cross_attention_dim')} wide, the text encoders give {folder.width}"
        )
    added = ("text_time",) if folder.layout == "sdxl" else (None, "text")
    if unet.get("addition_embed_type", added[0]) not in added:
        supported = " or ".join(map(repr, added))
        raise folder.wrong(
            f"unet: addition_embed_type is {unet['addition_embed_type']!r}; only {supported} is supported"
        )
    if type(side := unet["sample_size"]) is not int:
        raise folder.wrong(
            f"unet: sample_size is {side!r}; it must be the side of the latents it was trained on, a whole number: "
            "correct unet/config.json"
        )
    _refuse_unless(folder, "unet", unet, class_embed_type=None)
    _refuse_unless(folder, "unet", unet, encoder_hid_dim_type=None, encoder_hid_dim=None)
    if folder.layout == "sdxl":
        _check_added_condition(folder, unet)


def _check_added_condition(folder: PipelineFolder, unet: dict[str, Any]) -> None:
    if folder.index.get("requires_aesthetics_score"):
        raise folder.wrong("refiners (requires_aesthetics_score) are not supported; give a base model")
    expected = int(folder.pooled_width or 0) + TIME_IDS * int(unet.get("addition_time_embed_dim") or 0)
    if unet.get("projection_class_embeddings_input_dim") != expected:
        raise folder.wrong(
            f"unet: projection_class_embeddings_input_dim is {unet.get('projection_class_embeddings_input_dim')}, "
            f"the text encoders and time ids give {expected}"
        )


def _check_vae(folder: PipelineFolder) -> None:
    vae = folder.config("vae")
    if vae.get("shift_factor"):
        raise folder.wrong("vae: shift_factor is not supported; such models are not VP diffusion")
    _refuse_unless(folder, "vae", vae, latents_mean=None, latents_std=None)
    _refuse_unless(folder, "vae", vae, in_channels=3, out_channels=3)
    if not folder.scaling_factor > 0:
        raise folder.wrong(f"vae: scaling_factor is {folder.scaling_factor:g}; it must be above 0")


def _check_text(folder: PipelineFolder) -> None:
    lengths = {int(folder.config(part).get("max_position_embeddings", 77)) for part in folder.encoders}
    if len(lengths) > 1:
        raise folder.wrong(f"the text encoders take prompts of different lengths: {sorted(lengths)}")
    for part in folder.encoders:
        if folder.config(part).get("use_attention_mask"):
            raise folder.wrong(f"{part}: use_attention_mask is not supported")


def _refuse_unless(folder: PipelineFolder, part: str, config: dict[str, Any], **expected: Any) -> None:
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise folder.wrong(f"{part}: {name} is {config[name]!r}; only {value!r} is supported")
