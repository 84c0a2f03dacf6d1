"""Networks: the stock UNet as teacher, and as student with the guidance weight as one more input.

Everything is saved as stock diffusers folders (``unet/``, ``scheduler/``), so diffusers samples what we train. A
student's also holds what it was trained for (``student.json``), and the scheduler that draws so.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import DDIMScheduler, LCMScheduler, SchedulerMixin, UNet2DConditionModel
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from distill_jobs import stochastic_scheduler
from distill_jobs.data.source import Condition
from distill_jobs.errors import JobError, RecipeError
from distill_jobs.stochastic_scheduler import StochasticScheduler
from engines.manifest import GuidanceRange
from engines.sampler import Sampler
from engines.schedule import NoiseSchedule

GUIDANCE_WIDTH = 256
COND_PROJ = "time_embedding.cond_proj.weight"
_FREQUENCIES: tuple[float, ...] = tuple(
    torch.exp(torch.arange(GUIDANCE_WIDTH // 2) * -(math.log(10_000.0) / (GUIDANCE_WIDTH // 2 - 1))).tolist()
)
"""Numbers, not an expression, so that exported graphs hold these very ones: w·1000 shows their last bit."""
LARGEST_FILE = "1TB"
"""Diffusers splits weights of 10 GB and more into several files, as SDXL's are in float32."""
SCHEDULER_CODE = Path(stochastic_scheduler.__file__)
"""The only scheduler of a student that diffusers does not have; its folder then has a copy of the file."""
FIRST_WEIGHT, FIRST_BIAS = "time_embedding.linear_1.weight", "time_embedding.linear_1.bias"


@dataclass(frozen=True)
class Trained:
    """What a student was trained for: the sampler whose steps it takes, in how many, and at which guidance."""

    sampler: Sampler
    steps: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    guidance_scale: GuidanceRange | None = None

    @classmethod
    def consistency(cls, grid: int) -> Trained:
        """Of a consistency student: all step counts whose points are points of its grid, most first."""
        return cls("consistency", tuple(n for n in range(grid, 0, -1) if grid % n == 0))


def guidance_embedding(w: Tensor) -> Tensor:
    """(B, 256) float32 Fourier embedding of guidance weights w: (B,).

    Equals LatentConsistencyModelPipeline.get_guidance_scale_embedding: w·1000, [sin, cos].
    """
    frequencies = torch.tensor(_FREQUENCIES, dtype=torch.float32, device=w.device)
    angles = (w.to(torch.float32) * 1000.0)[:, None] * frequencies[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def grid_embedding(n: Tensor) -> Tensor:
    """(B, 256) float32 Fourier embedding of log2 N, for step counts n: (B,)."""
    return guidance_embedding(torch.log2(n.to(torch.float32)))


def new_teacher(config: dict[str, Any], seed: int) -> UNet2DConditionModel:
    """A freshly initialised UNet; the same seed gives the same weights.

    Raises: RecipeError when diffusers refuses the arguments.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return UNet2DConditionModel(**config)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"recipe: unet: diffusers refuses these arguments: {error}") from None


def student_of(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """A w-conditioned copy of a teacher: exactly the teacher at initialisation, whatever w is.

    The one new weight, ``time_embedding.cond_proj``, starts at zero.
    """
    config = {k: v for k, v in teacher.config.items() if not k.startswith("_")}
    with torch.random.fork_rng():  # initialisation that is overwritten below must not move the caller's RNG
        student = UNet2DConditionModel(**{**config, "time_cond_proj_dim": GUIDANCE_WIDTH})
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if unexpected or set(missing) != {COND_PROJ}:
        raise JobError(f"the teacher's weights do not fit its student: {sorted([*missing, *unexpected])}")
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def told_its_grid(student: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of a student that takes its grid too: exactly the student at initialisation, whatever the grid is.

    Its ``cond_proj`` reads [embed(w); embed(log2 N)]; the columns of the second half start at zero.
    """
    config = {k: v for k, v in student.config.items() if not k.startswith("_")}
    wide = {**config, "time_cond_proj_dim": 2 * GUIDANCE_WIDTH}
    weights = dict(student.state_dict())
    columns = weights[COND_PROJ]
    weights[COND_PROJ] = torch.cat([columns, torch.zeros_like(columns)], dim=1)
    return _built(wide, weights)


def fold_grid(shared: UNet2DConditionModel, n: int) -> UNet2DConditionModel:
    """The student that ``shared`` is on the n-step grid, as a plain w-conditioned network; equal to rounding.

    For a fixed grid its columns add a constant before ``linear_1``, which goes into that layer's bias.
    """
    config = {k: v for k, v in shared.config.items() if not k.startswith("_")}
    weights = {name: tensor.clone() for name, tensor in shared.state_dict().items()}
    of_w, of_grid = weights[COND_PROJ].split(GUIDANCE_WIDTH, dim=1)
    added = of_grid.double() @ grid_embedding(torch.tensor([n]))[0].double()
    bias = weights[FIRST_BIAS].double() + weights[FIRST_WEIGHT].double() @ added
    weights |= {COND_PROJ: of_w.contiguous(), FIRST_BIAS: bias.float()}
    narrow = {**config, "time_cond_proj_dim": GUIDANCE_WIDTH}
    return _built(narrow, weights)


def takes_grid(unet: UNet2DConditionModel) -> bool:
    """Whether a network is one for all step counts."""
    return bool(unet.config.time_cond_proj_dim == 2 * GUIDANCE_WIDTH)


def takes_guidance(unet: UNet2DConditionModel) -> bool:
    """Whether a network is told the guidance weight."""
    return unet.config.time_cond_proj_dim is not None


def takes_time_ids(unet: UNet2DConditionModel) -> bool:
    """Whether a network is told how the image is framed, as SDXL's are."""
    return bool(unet.config.addition_embed_type == "text_time")


def sees_masks(unet: UNet2DConditionModel) -> bool:
    """Whether a network takes a mask and the image behind it beside the latent."""
    return bool(unet.config.in_channels > unet.config.out_channels)


def with_weights(network: UNet2DConditionModel, weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """A network built as ``network`` is, holding these weights."""
    return _built(network.config, weights)


def _built(config: Mapping[str, Any], weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """The network of a config, holding these very tensors; no others are made."""
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(config)
    twin.load_state_dict(weights, assign=True)
    return twin


def predict(
    unet: nn.Module,
    x_t: Tensor,
    timestep: Tensor,
    condition: Condition,
    w: Tensor | None = None,
    extra: Tensor | None = None,
    grid: Tensor | None = None,
) -> Tensor:
    """Network output, float32 and shaped as x_t: (B, C, h, w).

    timestep: (B,); w: (B,) guidance weights, for students; extra: (B, K, h, w) further input channels; grid: (B,)
    step counts, for students with one set of weights for all of them.
    """
    added = None
    if condition.pooled is not None:
        added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    out: Tensor = unet(
        x_t if extra is None else torch.cat([x_t, extra], dim=1),
        timestep,
        encoder_hidden_states=condition.tokens,
        timestep_cond=None if w is None else _timestep_cond(w, grid),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return out.to(torch.float32)


def _timestep_cond(w: Tensor, grid: Tensor | None) -> Tensor:
    guidance = guidance_embedding(w)
    return guidance if grid is None else torch.cat([guidance, grid_embedding(grid)], dim=1)


def stock_scheduler(schedule: NoiseSchedule, clip: float | None, trained: Trained | None = None) -> SchedulerMixin:
    """The diffusers scheduler that walks our grid with our coefficients.

    trained: what a student was trained for; None for networks that are run with DDIM's steps in any number.
    """
    told = {
        "num_train_timesteps": schedule.timesteps,
        **_stock_schedule(schedule),
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # not read with this spacing; pipelines warn of any other
        "prediction_type": "v_prediction",
        "set_alpha_to_one": True,
        "clip_sample": clip is not None,
        "clip_sample_range": clip or 1.0,
    }
    if trained is None or trained.sampler == "deterministic":
        return DDIMScheduler(**told)
    points = math.gcd(trained.steps[0], schedule.timesteps)  # LCMScheduler's must divide the table
    if trained.sampler == "consistency" or trained.steps[0] == points == 2:  # in 2 steps both samplers are the same
        return LCMScheduler(**told, original_inference_steps=points)
    return StochasticScheduler(**told)


def _stock_schedule(schedule: NoiseSchedule) -> dict[str, Any]:
    """Diffusers' own schedule by its name; the cosine, which it does not have, as a table."""
    spec = schedule.spec
    if spec.kind == "cosine":
        return {"trained_betas": schedule.betas().tolist()}
    return {
        "beta_schedule": spec.kind,
        "beta_start": spec.beta_start,
        "beta_end": spec.beta_end,
        "rescale_betas_zero_snr": spec.rescale_zero_terminal_snr,
    }


def save_stock(
    folder: Path,
    unet: UNet2DConditionModel,
    schedule: NoiseSchedule,
    clip: float | None,
    trained: Trained | None = None,
) -> None:
    """Write a stock diffusers folder: unet/ (one safetensors file, however large) and scheduler/.

    trained: of a student, which is written to student.json.
    """
    unet.save_pretrained(folder / "unet", safe_serialization=True, max_shard_size=LARGEST_FILE)
    scheduler = stock_scheduler(schedule, clip, trained)
    scheduler.save_pretrained(folder / "scheduler")
    if isinstance(scheduler, StochasticScheduler):
        shutil.copyfile(SCHEDULER_CODE, folder / "scheduler" / SCHEDULER_CODE.name)
    if trained is not None:
        (folder / "student.json").write_bytes(TypeAdapter(Trained).dump_json(trained, exclude_none=True) + b"\n")


def load_stock(folder: Path) -> UNet2DConditionModel:
    """The UNet of a stock folder, in eval mode. Raises: JobError when it is not there."""
    if not (folder / "unet" / "config.json").is_file():
        raise JobError(f"{folder} holds no trained network; run the job first: python -m distill_jobs run RECIPE")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
    return unet.eval()


def weights_sha256(folder: Path, part: str = "unet") -> str:
    """Hash of the weights of a part of a stock folder. Raises: JobError when there are none."""
    file = folder / part / "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        raise JobError(f"{folder} holds no trained network; finish the job first, with --resume")
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
