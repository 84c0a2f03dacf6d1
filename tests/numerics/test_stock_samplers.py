"""The scheduler in a student's folder: diffusers with it and equal noise draws what our sampler draws."""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor

from distill_jobs.data.digits import class_condition
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.pipelines.writing import complete
from distill_jobs.sampling import request_noise, sample, student_network
from distill_jobs.solvers import solve
from distill_jobs.stochastic_scheduler import StochasticScheduler
from distill_jobs.student import COND_PROJ, Trained, load_stock, save_stock, student_of
from engines.noise import Purpose
from engines.sampler import entry_point, sampler_plan
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support import tiny_pipelines as tiny
from tests.support.tiny_run import tiny_student

COSINE = NoiseSchedule(ScheduleSpec())
SCALED = NoiseSchedule(ScheduleSpec(kind="scaled_linear", rescale_zero_terminal_snr=True))
CHAINS = {
    "consistency": Trained.consistency(4),
    "stochastic-2": Trained("stochastic", (2,)),
    "stochastic-4": Trained("stochastic", (4,)),
}
DRAWN = [("consistency", 4), ("consistency", 2), ("consistency", 1), ("stochastic-2", 2), ("stochastic-4", 4)]
SEEDS, W, SHAPE = [3], 4.0, (4, tiny.LATENT_PX, tiny.LATENT_PX)


def scheduler_of(folder: Path) -> Any:
    """As the folder names it."""
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    return getattr(diffusers, name, StochasticScheduler).from_pretrained(folder / "scheduler")


def draw_equal_noise(patch: pytest.MonkeyPatch, scheduler: Any, seeds: list[int], shape: tuple[int, ...]) -> None:
    """Gives a scheduler's next trajectory the noise of requests with these seeds."""
    steps = count()
    patch.setattr(
        sys.modules[type(scheduler).__module__],
        "randn_tensor",
        lambda *_, **__: request_noise(seeds, shape, Purpose.STEP, next(steps)),
    )


# ---- networks alone


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("schedule", [COSINE, SCALED], ids=["cosine", "scaled"])
@pytest.mark.parametrize(
    ("trained", "steps"),
    [
        *((CHAINS[name], steps) for name, steps in DRAWN),
        *((Trained.consistency(64), steps) for steps in (8, 4, 2, 1)),
        *((Trained("stochastic", (n,)), n) for n in (3, 6, 32)),
    ],
    ids=lambda value: value if isinstance(value, int) else f"{value.sampler}{value.steps[0]}",
)
def test_a_folders_scheduler_draws_what_our_sampler_draws(
    trained: Trained,
    steps: int,
    schedule: NoiseSchedule,
    clip: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_stock(tmp_path, tiny_student(0), schedule, clip, trained)
    scheduler, network = scheduler_of(tmp_path), student_network(load_stock(tmp_path), W)
    seeds, condition, shape = [1, 2], class_condition(torch.tensor([3, 7])), (1, 8, 8)
    draw_equal_noise(monkeypatch, scheduler, seeds, shape)
    drawn = solve(network, scheduler, steps, condition, seeds, shape)
    plan = sampler_plan(schedule, steps, trained.sampler, clip=clip)
    assert scheduler.timesteps.tolist() == list(plan.timesteps)
    torch.testing.assert_close(sample(network, plan, condition, seeds, shape), drawn, rtol=0, atol=2e-5)
    if steps > 1:
        other = sample(network, sampler_plan(schedule, steps, clip=clip), condition, seeds, shape)
        assert float((other - drawn).abs().max()) > 1e-2


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("schedule", [COSINE, SCALED], ids=["cosine", "scaled"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])
def test_the_scheduler_of_a_deterministic_student_draws_so_too_told_to_reckon_with_what_it_clips(
    steps: int, schedule: NoiseSchedule, clip: float | None, tmp_path: Path
) -> None:
    save_stock(tmp_path, tiny_student(0), schedule, clip, Trained("deterministic", (steps,)))
    scheduler, network = scheduler_of(tmp_path), student_network(load_stock(tmp_path), W)
    seeds, condition, shape = [1, 2], class_condition(torch.tensor([3, 7])), (1, 8, 8)
    drawn = request_noise(seeds, shape)
    scheduler.set_timesteps(steps)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            v = network(drawn, int(t), condition)
            drawn = scheduler.step(v, t, drawn, use_clipped_model_output=clip is not None).prev_sample
    ours = sample(network, sampler_plan(schedule, steps, clip=clip), condition, seeds, shape)
    torch.testing.assert_close(ours, drawn, rtol=0, atol=2e-5)
    if clip is not None and steps > 2:  # at pure noise there is nothing to reckon with
        untold = solve(network, scheduler, steps, condition, seeds, shape)
        assert float((untold - drawn).abs().max()) > 1e-2


def test_a_folder_says_what_it_was_trained_for(tmp_path: Path) -> None:
    for name, trained in CHAINS.items():
        save_stock(tmp_path / name, tiny_student(0), COSINE, None, trained)
    told = [json.loads((tmp_path / name / "student.json").read_text()) for name in CHAINS]
    assert told == [
        {"sampler": "consistency", "steps": [4, 2, 1]},
        {"sampler": "stochastic", "steps": [2]},
        {"sampler": "stochastic", "steps": [4]},
    ]
    kinds = [type(scheduler_of(tmp_path / name)).__name__ for name in CHAINS]
    assert kinds == ["LCMScheduler", "LCMScheduler", "StochasticScheduler"]
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler_of(tmp_path / "consistency").set_timesteps(8)
    save_stock(tmp_path / "teacher", tiny_student(0), COSINE, None)
    assert not (tmp_path / "teacher" / "student.json").exists()
    assert type(scheduler_of(tmp_path / "teacher")).__name__ == "DDIMScheduler"


def test_two_steps_over_an_odd_table_are_not_the_stock_schedulers(tmp_path: Path) -> None:
    odd = NoiseSchedule(ScheduleSpec(timesteps=999))
    save_stock(tmp_path, tiny_student(0), odd, None, Trained("stochastic", (2,)))
    scheduler = scheduler_of(tmp_path)
    scheduler.set_timesteps(2)
    assert isinstance(scheduler, StochasticScheduler)
    assert scheduler.timesteps.tolist() == list(sampler_plan(odd, 2).timesteps)


def test_the_stochastic_scheduler_computes_in_float32_and_gives_the_samples_type(tmp_path: Path) -> None:
    save_stock(tmp_path, tiny_student(0), COSINE, None, CHAINS["stochastic-4"])
    scheduler = scheduler_of(tmp_path)
    scheduler.set_timesteps(4)
    x_t, v = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).half().unbind()
    half, full = (
        scheduler.step(v.to(kind), 749, x_t.to(kind), torch.Generator().manual_seed(1))
        for kind in (torch.float16, torch.float32)
    )
    assert half.prev_sample.dtype == half.pred_original_sample.dtype == torch.float16
    assert torch.equal(half.prev_sample, full.prev_sample.half())
    with pytest.raises(ValueError, match="500"):
        scheduler.step(v, 500, x_t)


# ---- whole pipelines


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of untrained latent students by chain, answering to guidance."""
    work = tmp_path_factory.mktemp("students")
    told = {**tiny.SCHEDULER, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    pipeline = tiny.sd(work / "parts", prediction="v_prediction", scheduler=DDIMScheduler(**told), **tiny.ONE_LEVEL)
    pipeline.save_pretrained(work / "teacher", safe_serialization=True)
    teacher = open_folder(work / "teacher")
    unet = student_of(load_stock(teacher.path))
    with torch.no_grad():
        unet.get_parameter(COND_PROJ).normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    for name, trained in CHAINS.items():
        save_stock(work / name, unet, NoiseSchedule(teacher.schedule), None, trained)
        complete(work / name, teacher)
    return work


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers copies a folder's code to, before it runs it."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def opened(kind: Any, folder: Path) -> Any:
    pipeline = kind.from_pretrained(folder, use_safetensors=True, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_us(folder: Path, name: str, steps: int, known: Tensor | None = None, strength: float = 1.0) -> Tensor:
    """As rows of a request do; with ``known``, from that image noised to the grid point where it enters."""
    opened, network = open_folder(folder), student_network(load_stock(folder), W)
    condition = PromptEncoder.load(opened).encode(["a cat"])
    schedule, x_t = NoiseSchedule(opened.schedule), request_noise(SEEDS, SHAPE)
    plan = sampler_plan(schedule, steps, CHAINS[name].sampler, start=entry_point(steps, strength))
    if known is not None:
        alpha, sigma = schedule.at(plan.steps[0].timestep)
        x_t = alpha * known + sigma * x_t
    with torch.no_grad():
        for position, step in enumerate(plan):
            noise = request_noise(SEEDS, SHAPE, Purpose.STEP, position)
            x_t, _ = step.apply(x_t, network(x_t, step.timestep, condition), noise)
    return x_t


@pytest.mark.usefixtures("code_cache")
@pytest.mark.parametrize(("name", "steps"), DRAWN)
def test_a_pipeline_draws_what_our_sampler_draws(
    name: str, steps: int, students: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = opened(StableDiffusionPipeline, students / name)
    draw_equal_noise(monkeypatch, pipeline.scheduler, SEEDS, SHAPE)
    told = {"num_inference_steps": steps, "guidance_scale": W + 1, "output_type": "latent"}
    drawn = pipeline("a cat", latents=request_noise(SEEDS, SHAPE), **told).images
    torch.testing.assert_close(drawn_by_us(students / name, name, steps), drawn, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("code_cache")
@pytest.mark.parametrize(("name", "steps"), [("consistency", 4), ("stochastic-2", 2), ("stochastic-4", 4)])
def test_image_to_image_is_an_edit_by_noising(
    name: str, steps: int, students: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = opened(StableDiffusionImg2ImgPipeline, students / name)
    known = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(11))
    draw_equal_noise(monkeypatch, pipeline.scheduler, SEEDS, SHAPE)
    monkeypatch.setattr(
        sys.modules[StableDiffusionImg2ImgPipeline.__module__],
        "randn_tensor",
        lambda *_, **__: request_noise(SEEDS, SHAPE),
    )
    told = {"num_inference_steps": steps, "guidance_scale": W + 1, "output_type": "latent"}
    drawn = pipeline("a cat", image=known, strength=0.5, **told).images
    ours = drawn_by_us(students / name, name, steps, known, 0.5)
    torch.testing.assert_close(ours, drawn, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["consistency", "stochastic-2"])
def test_folders_of_stock_schedulers_hold_no_code(name: str, students: Path) -> None:
    assert not list((students / name).rglob("*.py"))
    StableDiffusionPipeline.from_pretrained(students / name, use_safetensors=True)


def test_a_folders_code_is_not_run_unasked(students: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        StableDiffusionPipeline.from_pretrained(students / "stochastic-4", use_safetensors=True)
