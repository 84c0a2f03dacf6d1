"""Student folders in diffusers' own pipelines for edits: image to image, and inpainting by blending."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from torch import Tensor

from distill_jobs.data.source import Condition
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.packing import whole_image
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.pipelines.writing import complete
from distill_jobs.sampling import student_network
from distill_jobs.student import COND_PROJ, load_stock, save_stock, student_of
from engines.sampler import entry_point, sampler_plan
from engines.schedule import NoiseSchedule
from tests.support import tiny_pipelines as tiny

LEAVING = "sd, not rescaled"
"""Its schedule ends with some of the image left."""
SHAPE = (1, 4, tiny.LATENT_PX, tiny.LATENT_PX)
STEPS, SCALE, SEED = 4, 5.0, 3


@pytest.fixture(scope="module", params=["sd", "sdxl", LEAVING])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, but answering to guidance."""
    work, make = tmp_path_factory.mktemp("student"), tiny.sdxl if request.param == "sdxl" else tiny.sd
    told = {**tiny.SCHEDULER, "rescale_betas_zero_snr": request.param != LEAVING}
    scheduler = DDIMScheduler(**told, prediction_type="v_prediction")
    pipeline = make(work / "parts", prediction="v_prediction", scheduler=scheduler, **tiny.ONE_LEVEL)
    pipeline.save_pretrained(work / "teacher", safe_serialization=True)
    teacher = open_folder(work / "teacher")
    unet = student_of(load_stock(teacher.path))
    with torch.no_grad():
        unet.get_parameter(COND_PROJ).normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    save_stock(work / "d4", unet, NoiseSchedule(teacher.schedule), None)
    complete(work / "d4", teacher)
    return work / "d4"


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def drawn_by_diffusers(kind: Any, student: Path, strength: float, **told: Any) -> Tensor:
    stock = kind.from_pretrained(student, use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    told = {**told, "num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
    generator = torch.Generator().manual_seed(SEED)
    found: Tensor = stock("a cat", strength=strength, generator=generator, **told).images
    return found


def drawn_by_us(student: Path, known: Tensor, strength: float, mask: Tensor | None = None) -> Tensor:
    """As rows of a request do: from the image noised to the point of entry; behind a mask, whole, from noise."""
    folder, network = open_folder(student), student_network(load_stock(student), SCALE - 1)
    framing = whole_image(tiny.IMAGE_PX) if folder.layout == "sdxl" else None
    condition: Condition = PromptEncoder.load(folder).encode(["a cat"], framing)
    schedule, noise = NoiseSchedule(folder.schedule), normal(SEED)
    plan = sampler_plan(schedule, STEPS, start=entry_point(STEPS, strength))
    alpha, sigma = schedule.at(plan.steps[0].timestep)
    x_t = noise if mask is not None and strength == 1 else alpha * known + sigma * noise
    with torch.no_grad():
        for step in plan:
            x_t, _ = step.apply(x_t, network(x_t, step.timestep, condition))
            if mask is not None:
                x_t = mask * x_t + (1 - mask) * (step.coefficients.e * known + step.coefficients.f * noise)
    return x_t


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_image_to_image_is_an_edit_by_noising(student: Path, strength: float) -> None:
    sdxl = open_folder(student).layout == "sdxl"
    kind = StableDiffusionXLImg2ImgPipeline if sdxl else StableDiffusionImg2ImgPipeline
    known = normal(11)
    drawn = drawn_by_diffusers(kind, student, strength, image=known)
    torch.testing.assert_close(drawn_by_us(student, known, strength), drawn, rtol=0, atol=1e-4)
    if strength < 1:  # else nothing is left of the image
        assert float((drawn_by_us(student, normal(12), strength) - drawn).abs().max()) > 1e-2


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_without_channels_for_it_is_blending(student: Path, strength: float) -> None:
    if open_folder(student).layout == "sdxl":
        pytest.skip("the same blending; one layout shows it")
    known, mask = normal(11), torch.zeros(1, 1, tiny.LATENT_PX, tiny.LATENT_PX)
    mask[..., 2:5, 1:] = 1
    pixels = mask.repeat_interleave(2, -1).repeat_interleave(2, -2)
    told = {"image": known, "mask_image": pixels, "masked_image_latents": torch.zeros(SHAPE)}  # the last: not read
    drawn = drawn_by_diffusers(StableDiffusionInpaintPipeline, student, strength, **told)
    torch.testing.assert_close(drawn_by_us(student, known, strength, mask), drawn, rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn * (1 - mask), known * (1 - mask), rtol=0, atol=1e-6)
    assert float(((drawn - known) * mask).abs().max()) > 1e-2
