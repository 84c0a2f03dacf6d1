"""Ways to run the same student: diffusers' pipeline, eager torch, and every backend on its exported step graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray

from distill_jobs.data.source import Condition
from distill_jobs.student import predict, stock_scheduler
from engines.backends.base import EngineBackend
from engines.backends.load import BackendName, PrecisionName, load_backend
from engines.bundle import Bundle
from engines.guidance import weight_from_scale
from engines.manifest import COEFFICIENTS, CONDITION, GUIDANCE, KNOWN, LATENT, MASK, NEXT_LATENT, NOISE, TIMESTEP
from engines.sampler import Step
from engines.schedule import NoiseSchedule, ScheduleSpec

Floats = NDArray[np.float32]

PIPELINE = "diffusers pipeline float32"
PIPELINE_BF16 = "diffusers pipeline bfloat16"
EAGER = "eager torch float32"
EAGER_BF16 = "eager torch bfloat16 autocast"
TORCH = "halfstep torch float32"
ORT = "ONNX Runtime float32"
OPENVINO = "OpenVINO float32"
OPENVINO_BF16 = "OpenVINO bfloat16"
OPENVINO_INT8 = "OpenVINO int8"

GUIDANCE_SCALE = 3.0
"""Of every row: diffusers' pipeline takes one for all."""

_ENGINES: dict[str, tuple[BackendName, PrecisionName]] = {
    TORCH: ("torch", "float32"),
    ORT: ("onnxruntime", "float32"),
    OPENVINO: ("openvino", "float32"),
    OPENVINO_BF16: ("openvino", "bfloat16"),
}


@dataclass(frozen=True)
class Batch:
    """Rows to sample. noise: (B, C, h, w); condition: (B, 1, D) one-hot; w: (B,) guidance weights."""

    noise: Floats
    condition: Floats
    w: Floats


Contender = Callable[[Batch, Sequence[Step]], Floats]
"""Takes every row through the steps: (B, C, h, w) latents after the last."""


def draw_batch(rows: int, latent: tuple[int, int, int], width: int, seed: int) -> Batch:
    """Standard normal noise, classes in turn, one guidance."""
    rng = np.random.default_rng([seed, rows])
    return Batch(
        noise=rng.standard_normal((rows, *latent), dtype=np.float32),
        condition=np.eye(width, dtype=np.float32)[np.arange(rows) % width][:, None],
        w=np.full(rows, weight_from_scale(GUIDANCE_SCALE), np.float32),
    )


class StockPipeline:
    """A student as diffusers' users run it: StableDiffusionPipeline and DDIM, without text encoder and VAE."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
        twin = UNet2DConditionModel.from_config(unet.config)
        twin.load_state_dict(unet.state_dict())
        self._dtype = dtype
        self._pipeline = StableDiffusionPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            unet=twin.to(dtype).eval(),
            scheduler=stock_scheduler(NoiseSchedule(ScheduleSpec()), None),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def __call__(self, batch: Batch, steps: Sequence[Step]) -> Floats:
        condition, noise = (torch.from_numpy(a).to(self._dtype) for a in (batch.condition, batch.noise))
        latents: Floats = (
            self._pipeline(
                prompt_embeds=condition,
                latents=noise,
                num_inference_steps=len(steps),
                guidance_scale=GUIDANCE_SCALE,
                output_type="latent",
            )
            .images.float()
            .numpy()
        )
        return latents


class EagerTorch:
    """The stock diffusers UNet, called as its own pipeline would, and the sampler's update."""

    def __init__(self, unet: UNet2DConditionModel, *, bfloat16: bool) -> None:
        self._unet = unet
        self._bfloat16 = bfloat16

    def __call__(self, batch: Batch, steps: Sequence[Step]) -> Floats:
        x_t, condition, w = (torch.from_numpy(a) for a in (batch.noise, batch.condition, batch.w))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            for step in steps:
                timestep = torch.full((len(x_t),), float(step.timestep))
                x_t, _ = step.apply(x_t, predict(self._unet, x_t, timestep, Condition(condition), w))
        latents: Floats = x_t.numpy()
        return latents


class OnEngine:
    """A step graph on a backend: the update is inside the graph."""

    def __init__(self, engine: EngineBackend) -> None:
        self._engine = engine

    def __call__(self, batch: Batch, steps: Sequence[Step]) -> Floats:
        rows = len(batch.noise)
        inputs = {
            LATENT: batch.noise,
            GUIDANCE: batch.w,
            CONDITION: batch.condition,
            NOISE: batch.noise,
            KNOWN: np.zeros_like(batch.noise),
            MASK: np.ones_like(batch.noise[:, :1]),
        }
        for step in steps:
            inputs[TIMESTEP] = np.full(rows, step.timestep, np.float32)
            inputs[COEFFICIENTS] = np.tile(step.row, (rows, 1))
            inputs[LATENT] = self._engine.run(inputs)[NEXT_LATENT]
        return inputs[LATENT]


def contenders(unet: UNet2DConditionModel, bundle: Bundle, int8: Bundle, graph: str) -> dict[str, Contender]:
    """All of them by name, on the same weights. int8: the bundle quantized."""
    found: dict[str, Contender] = {
        PIPELINE: StockPipeline(unet, torch.float32),
        PIPELINE_BF16: StockPipeline(unet, torch.bfloat16),
        EAGER: EagerTorch(unet, bfloat16=False),
        EAGER_BF16: EagerTorch(unet, bfloat16=True),
    }
    for name, (backend, precision) in _ENGINES.items():
        found[name] = OnEngine(load_backend(backend, bundle, graph, precision=precision))
    found[OPENVINO_INT8] = OnEngine(load_backend("openvino", int8, graph))
    return found
