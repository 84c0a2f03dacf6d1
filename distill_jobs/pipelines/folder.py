"""A stock diffusers pipeline folder, understood from its configs alone, before any weight is read.

Two layouts: ``sd`` (Stable Diffusion 1.x and 2.x: one text encoder) and ``sdxl`` (two, with pooled embeddings
and time ids). Only local folders and only safetensors: nothing is downloaded and no pickle is opened.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler

from distill_jobs.errors import TeacherError
from engines.sampler import Prediction
from engines.schedule import ScheduleSpec

Layout = Literal["sd", "sdxl"]

TIME_IDS = 6
"""SDXL's micro-conditioning: original height and width, crop top and left, target height and width."""

AUTOENCODERS: dict[str, type[AutoencoderKL | AutoencoderTiny]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
}

FOLD = (
    "fold it in with diffusers (load_lora_weights, fuse_lora, unload_lora_weights, in this order), save_pretrained "
    "into a new folder, and give that"
)
"""What is done with a LoRA, which is never read."""

WEIGHTS = {".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5"}

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v_prediction", "sample": "sample"}


@dataclass(frozen=True)
class PipelineFolder:
    """What the configs of a pipeline folder say; ``open_folder`` checks them. index: model_index.json."""

    path: Path
    layout: Layout
    index: dict[str, Any]

    @property
    def encoders(self) -> tuple[str, ...]:
        """Component names of the text encoders."""
        return ("text_encoder", "text_encoder_2") if self.layout == "sdxl" else ("text_encoder",)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.encoders)

    def wrong(self, what: str) -> TeacherError:
        """The error that names this folder."""
        return TeacherError(f"{self.path}: {what}")

    def config(self, part: str) -> dict[str, Any]:
        """A component's own config."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return self._configs.setdefault(part, read_json(self.path / part / name))

    def class_of(self, part: str) -> str:
        """The class model_index.json gives a component."""
        entry = self.index.get(part)
        return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "missing"

    @property
    def autoencoder(self) -> type[AutoencoderKL | AutoencoderTiny]:
        """The class of the vae."""
        return AUTOENCODERS[self.class_of("vae")]

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.config("vae").get("latent_channels", 4))

    @property
    def extra_channels(self) -> int:
        """Channels the UNet takes beside the latent: 0, or mask and masked latent of an inpainting model."""
        return int(self.config("unet")["in_channels"]) - self.channels

    @property
    def pixels_per_latent(self) -> int:
        """Width of the square of pixels that one latent position stands for."""
        return int(2 ** (len(self.config("vae")["block_out_channels"]) - 1))

    @property
    def size_px(self) -> int:
        """Side of the images the model was trained for."""
        return int(self.config("unet")["sample_size"]) * self.pixels_per_latent

    @property
    def scaling_factor(self) -> float:
        """What encoded latents are multiplied by, to about unit variance.

        Configs of 2022, as SD 1.5's, leave it out and mean diffusers' default.
        """
        own = inspect.signature(self.autoencoder.__init__).parameters["scaling_factor"].default
        return float(self.config("vae").get("scaling_factor", own))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all components that the pipeline is made of, those that are null left out."""
        return tuple(name for name in self.index if self.class_of(name) not in ("missing", "None"))

    @property
    def tokens(self) -> int:
        """Length of a prompt, special tokens included."""
        return int(self.config("text_encoder").get("max_position_embeddings", 77))

    @property
    def width(self) -> int:
        """Width of the condition tokens."""
        return sum(int(self.config(part)["hidden_size"]) for part in self.encoders)

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled embedding, or None where there is none."""
        return int(self.config("text_encoder_2")["projection_dim"]) if self.layout == "sdxl" else None

    @property
    def zeros_for_empty(self) -> bool:
        """Whether the empty condition is zeros instead of an encoded empty prompt."""
        return self.layout == "sdxl" and bool(self.index.get("force_zeros_for_empty_prompt", True))

    @cached_property
    def prediction(self) -> Prediction:
        """What the scheduler says the UNet predicts."""
        name = str(self.config("scheduler").get("prediction_type", "epsilon"))
        if name not in _PREDICTIONS:
            raise self.wrong(f"scheduler: prediction_type {name!r} is none of {', '.join(_PREDICTIONS)}")
        return _PREDICTIONS[name]

    @cached_property
    def schedule(self) -> ScheduleSpec:
        """The noise schedule of the scheduler's config; betas left out are those of its class."""
        config, kind = self.config("scheduler"), self.class_of("scheduler")
        if "FlowMatch" in kind or "EDM" in kind or "beta_schedule" not in config:
            raise self.wrong(f"scheduler: {kind} has no beta schedule; only VP models are distilled here")
        if config.get("trained_betas") is not None:
            raise self.wrong("scheduler: trained_betas are not supported; name a beta_schedule")
        if config.get("thresholding"):
            raise self.wrong("scheduler: thresholding is not supported for latent models")
        name = config["beta_schedule"]
        if name not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            raise self.wrong(
                f"scheduler: beta_schedule {name!r} is none of linear, scaled_linear, squaredcos_cap_v2"
            )
        of_ddim = inspect.signature(DDIMScheduler.__init__).parameters
        of_class = inspect.signature(getattr(diffusers, kind, DDIMScheduler).__init__).parameters
        own = {**of_ddim, **of_class}  # a class whose own library is missing takes anything
        start, end = (config.get(each, own[each].default) for each in ("beta_start", "beta_end"))
        return ScheduleSpec(
            kind=name,
            timesteps=int(config.get("num_train_timesteps", 1000)),
            beta_start=float(start),
            beta_end=float(end),
            rescale_zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        )

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        return {}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises: TeacherError when it is missing or none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise TeacherError(f"{file.parent} has no {file.name}; give a complete diffusers pipeline folder") from None
    except ValueError:
        raise TeacherError(f"{file} is not JSON") from None
    if not isinstance(data, dict):
        raise TeacherError(f"{file} is not a JSON object")
    return data


def weights_variant(part: Path) -> str | None:
    """The variant of a component's safetensors: None for the plain file, else such as fp16.

    Raises: TeacherError when there is none: pickles are never opened.
    """
    names = sorted(file.name for file in part.glob("*.safetensors"))
    stems = ("diffusion_pytorch_model", "model")
    if any(
        name.startswith(tuple(f"{stem}{end}" for stem in stems for end in (".safetensors", "-"))) for name in names
    ):
        return None
    variants = [name.split(".")[1] for name in names if name.startswith(stems) and name.count(".") == 2]
    if split := [variant for variant in variants if "-of-" in variant]:
        variant = split[0].partition("-")[0]
        raise TeacherError(
            f"{part} holds weights of a variant ({variant}) in several files, which are not read; save them in one "
            f"(save_pretrained(…, variant={variant!r}, max_shard_size='100GB')), or without a variant"
        )
    if variants:
        return variants[0]
    pickles = _first(file.name for file in part.iterdir() if file.suffix in {".bin", ".ckpt", ".pt", ".pth"})
    if pickles:
        raise TeacherError(
            f"{part} holds {pickles} only: pickles run code and are never opened; convert to safetensors"
        )
    raise TeacherError(f"{part} holds no safetensors weights")


def files_read(part: Path) -> dict[str, Path]:
    """A component's files by their plain names; of weights only the safetensors that are read."""
    files = sorted(path for path in part.iterdir() if path.is_file())
    if not any(file.suffix in WEIGHTS for file in files):
        return {file.name: file for file in files}
    variant = weights_variant(part)
    found = {file.name: file for file in files if file.suffix not in WEIGHTS}
    for file in files:
        plain = file.name.replace(f".{variant}.", ".") if variant else file.name
        chosen = plain != file.name if variant else file.name.count(".") == 1
        if file.suffix == ".safetensors" and chosen:
            found[plain] = file
    return found


def _first(names: Iterable[str]) -> str | None:
    return next(iter(sorted(names)), None)
