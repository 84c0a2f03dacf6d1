"""Published students without guidance as an input (Turbo, Lightning): diffusers' images, and refusals by name."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
)
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_jobs.errors import RecipeError, TeacherError
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.importing import import_student
from distill_jobs.pipelines.packing import whole_image
from distill_jobs.pipelines.published import NO_GUIDANCE, open_published
from distill_jobs.pipelines.teacher import load_network
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.student import load_stock, predict
from engines.manifest import GUIDANCE, TIME_IDS, GuidanceRange
from engines.noise import Purpose, row_noise
from engines.open import open_pipeline
from tests.support import tiny_pipelines as tiny

SEED = 3
SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TRAILING = {**SD, "timestep_spacing": "trailing"}
EULER = EulerDiscreteScheduler(**TRAILING)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each layout."""
    work = tmp_path_factory.mktemp("published")
    tiny.sd(work / "sd", scheduler=EULER, **tiny.ONE_LEVEL).save_pretrained(work / "turbo")
    tiny.sdxl(work / "sdxl", scheduler=EULER, **tiny.ONE_LEVEL).save_pretrained(work / "lightning")
    return {"sd": work / "turbo", "sdxl": work / "lightning"}


def with_scheduler(folder: Path, copy: Path, scheduler: SchedulerMixin) -> Path:
    """The folder with another scheduler."""
    shutil.copytree(folder, copy)
    scheduler.save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (copy / "model_index.json").write_text(json.dumps(index))
    return copy


def noise(purpose: Purpose = Purpose.INITIAL, step: int = 0) -> Tensor:
    return torch.from_numpy(row_noise(SEED, (4, 8, 8), purpose, step))[None]


@pytest.mark.parametrize(
    ("layout", "scheduler", "steps"),
    [
        ("sd", EULER, 1),
        ("sd", EULER, 4),
        ("sd", EulerDiscreteScheduler(**TRAILING, prediction_type="v_prediction"), 3),
        ("sd", DDIMScheduler(**tiny.SCHEDULER), 4),
        ("sdxl", EULER, 8),
        ("sdxl", EulerDiscreteScheduler(**TRAILING, prediction_type="sample"), 1),
        ("sdxl", EulerAncestralDiscreteScheduler(**TRAILING), 1),
        ("sdxl", EulerAncestralDiscreteScheduler(**TRAILING), 4),
    ],
    ids=["SD Turbo", "SD Turbo in 4", "v", "DDIM", "Lightning", "Lightning in 1", "SDXL Turbo", "SDXL Turbo in 4"],
)
def test_the_sampler_is_the_schedulers(
    layout: str,
    scheduler: SchedulerMixin,
    steps: int,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fresh = iter([noise(Purpose.STEP, step) for step in range(steps)])
    monkeypatch.setattr(f"{EulerAncestralDiscreteScheduler.__module__}.randn_tensor", lambda *_, **__: next(fresh))
    folder = with_scheduler(folders[layout], tmp_path / "model", scheduler)
    stock = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    told = {"guidance_scale": 0.0, "latents": noise(), "output_type": "latent"}
    expected = stock("a cat", num_inference_steps=steps, **told).images
    published, unet = open_published(folder), load_stock(folder)
    plan = published.plans([steps])[steps]
    framing = whole_image(tiny.IMAGE_PX) if layout == "sdxl" else None
    condition = PromptEncoder.load(published.folder).encode(["a cat"], framing)
    x_t = published.initial_std * noise()
    with torch.no_grad():
        for position, step in enumerate(plan):
            out = predict(unet, x_t, torch.tensor([float(step.timestep)]), condition)
            x_t, _ = step.apply(x_t, out, noise(Purpose.STEP, position))
    assert plan.timesteps == tuple(int(t) for t in stock.scheduler.timesteps)
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-4)


def test_an_imported_bundle_draws_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    """With no input for guidance: a bundle says what its networks are told."""
    written = import_student(
        folders["sd"],
        tmp_path / "bundle",
        name="turbo",
        steps=(1, 4),
        scales=(None, None, None),
        licence="theirs",
        progress=Progress(disable=True),
    )
    manifest = written.manifest
    assert manifest.guidance == NO_GUIDANCE
    assert manifest.latent.initial_std == pytest.approx(0.99766, abs=1e-5)
    assert [(s.steps, s.sampler) for s in manifest.students] == [(1, "deterministic"), (4, "deterministic")]
    assert manifest.students[1].timesteps == (999, 749, 499, 249)
    assert GUIDANCE not in {spec.name for spec in manifest.graphs["step"].inputs}
    stock = DiffusionPipeline.from_pretrained(folders["sd"], use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    engine = open_pipeline(tmp_path / "bundle", "onnxruntime", rungs=(1, 2), warm=True)
    told = {"guidance_scale": 0.0, "latents": noise(), "output_type": "np"}
    for steps in (1, 4):
        expected = stock("a cat", num_inference_steps=steps, **told).images[0] * 255
        drawn = engine.generate(["a dog", "a cat"], 1.0, [4, SEED], steps)[1]
        assert np.abs(drawn - expected).max() <= 1.0


@pytest.mark.long
def test_an_imported_sdxl_draws_the_same_at_each_size(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its networks are told the size, as diffusers tells them."""
    written = import_student(
        folders["sdxl"],
        tmp_path / "bundle",
        name="lightning",
        steps=(4,),
        scales=(None, None, None),
        licence="theirs",
        progress=Progress(disable=True),
        sizes=("16x16", "24x16", "16x48"),
    )
    assert TIME_IDS in {spec.name for spec in written.manifest.graphs["step"].inputs}
    stock = DiffusionPipeline.from_pretrained(folders["sdxl"], use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    engine = open_pipeline(tmp_path / "bundle", "openvino", rungs=(1, 2), warm=False)
    for size in written.manifest.sizes:
        latents = row_noise(SEED, (4, size.latent_height, size.latent_width), Purpose.INITIAL)
        told = {"guidance_scale": 0.0, "latents": torch.from_numpy(latents)[None], "output_type": "np"}
        told |= {"height": size.height, "width": size.width, "num_inference_steps": 4}
        expected = stock("a cat", **told).images[0] * 255
        drawn = engine.generate(["a dog", "a cat"], 1.0, [4, SEED], 4, size=size)[1]
        assert np.abs(drawn - expected).max() <= 1.0


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (EulerDiscreteScheduler(**SD, timestep_spacing="leading"), (1,), "timestep_spacing is 'leading'"),
        (EulerDiscreteScheduler(**SD), (1,), "timestep_spacing is 'linspace'"),
        (EulerDiscreteScheduler(**TRAILING, use_karras_sigmas=True), (1,), "use_karras_sigmas is True"),
        (EulerDiscreteScheduler(**TRAILING, rescale_betas_zero_snr=True), (1,), "rescale_betas_zero_snr is True"),
        (EULER, None, "import --steps N"),
        (PNDMScheduler(**SD), (1,), "its scheduler is PNDMScheduler"),
        (EulerAncestralDiscreteScheduler(**SD), (1,), "timestep_spacing is 'linspace'"),
        (EulerAncestralDiscreteScheduler(**TRAILING, prediction_type="sample"), (1,), "prediction_type is sample"),
        (DDIMScheduler(**{**tiny.SCHEDULER, "set_alpha_to_one": False}), (1,), "set_alpha_to_one is False"),
        (DDIMScheduler(**tiny.SCHEDULER), (3,), "would not end 3 steps at the points"),
        (DDIMScheduler(**tiny.SCHEDULER, rescale_betas_zero_snr=True), (1,), "undefined at zero SNR"),
    ],
    ids=[
        *("leading", "linspace", "karras", "zero snr of Euler", "no steps", "another", "ancestral", "ancestral x"),
        *("last alpha", "strides", "zero snr"),
    ],
)
def test_what_would_be_another_sampler_is_refused_by_name(
    scheduler: SchedulerMixin,
    steps: tuple[int, ...] | None,
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = with_scheduler(folders["sd"], tmp_path / "model", scheduler)
    with pytest.raises(TeacherError, match=message):
        open_published(folder).plans(steps)


def test_a_student_made_here_is_run_in_the_steps_of_its_training(folders: dict[str, Path], tmp_path: Path) -> None:
    told = {**TRAILING, "clip_sample": False}
    finish = with_scheduler(folders["sd"], tmp_path / "finish", LCMScheduler(**told, original_inference_steps=8))
    (finish / "student.json").write_text('{"sampler": "consistency", "steps": [64, 32, 16, 8, 4, 2, 1]}')
    assert list(open_published(finish).plans(None)) == [8, 4, 2, 1]
    with pytest.raises(TeacherError, match=r"it was trained for \(8, 4, 2, 1\) steps, not for \[3, 5\]"):
        open_published(finish).plans((4, 5, 3))
    chain = with_scheduler(folders["sd"], tmp_path / "chain", DDIMScheduler(**tiny.SCHEDULER))
    (chain / "student.json").write_text('{"sampler": "deterministic", "steps": [4]}')
    assert list(open_published(chain).plans(None)) == [4]


@pytest.mark.parametrize("steps", ["[]", "[0]"])
def test_a_student_of_no_steps_is_refused(steps: str, folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["sd"], tmp_path / "copy")
    (copied / "student.json").write_text(f'{{"sampler": "deterministic", "steps": {steps}}}')
    with pytest.raises(TeacherError, match=r"student\.json cannot be read"):
        open_published(copied)


def test_weights_without_a_place_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Such as those of the guidance weight, under a config that says nothing of it."""
    folder = shutil.copytree(folders["sd"], tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "time_embedding.cond_proj.weight": torch.zeros(8, 256)}, file)
    with pytest.raises(TeacherError, match=r"the weights hold time_embedding\.cond_proj\.weight"):
        load_network(open_folder(folder))


def test_guidance_is_refused_where_it_is_no_input(folders: dict[str, Path]) -> None:
    with pytest.raises(TeacherError, match="takes no guidance weight"):
        open_published(folders["sd"]).guidance((None, 7, None))


def test_a_student_made_here_is_asked_for_the_guidance_of_its_training(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    trained = GuidanceRange(min=1, max=9, default=4)
    usual, scales = (None, None, None), (2.0, 7.0, 3.0)
    of_ours = replace(open_published(folders["sd"]), guided=True, trained=(4,), asked=trained)
    assert of_ours.guidance(usual) == trained
    assert of_ours.guidance((2.0, None, None)) == GuidanceRange(min=2, max=9, default=4)
    with pytest.raises(TeacherError, match="it was trained for guidance 1 to 9, not for 1 to 12"):
        of_ours.guidance((None, 12.0, None))
    older = replace(of_ours, asked=None)
    with pytest.raises(TeacherError, match=r"student\.json does not say which guidance"):
        older.guidance((None, 7.0, None))
    assert older.guidance(scales) == GuidanceRange(min=2, max=7, default=3)
    others = replace(older, trained=())
    assert others.guidance(usual).max == 15
    for wrong in ((0.5, None, None), (None, math.inf, None), (None, None, 16.0), (None, math.nan, None)):
        with pytest.raises(RecipeError, match="guidance needs"):
            others.guidance(wrong)
