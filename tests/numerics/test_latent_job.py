"""A stock pipeline folder through a whole job: students are stock pipelines that draw what our sampler draws."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from rich.progress import Progress
from torch import Tensor

from distill_jobs import job, stage_one
from distill_jobs.data import latent_cache
from distill_jobs.data import open as opening
from distill_jobs.data.latents import LatentSource
from distill_jobs.data.open import open_source
from distill_jobs.data.source import Condition, Source
from distill_jobs.draws import Draws
from distill_jobs.errors import DataError, Interrupted, RecipeError
from distill_jobs.inversion import RECONSTRUCTION
from distill_jobs.job import run_job
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.encoders import Encoders, encoders_sha256
from distill_jobs.pipelines.evaluate import evaluate_latent_run
from distill_jobs.pipelines.inversion import LATENT_INVERSION
from distill_jobs.pipelines.packing import whole_image
from distill_jobs.pipelines.pictures import TEXT_AGREEMENT
from distill_jobs.pipelines.teacher import open_teacher
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.pipelines.writing import complete
from distill_jobs.processes import Processes
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import read_recipe
from distill_jobs.sampling import sample
from distill_jobs.sections import ComputeSection
from distill_jobs.student import COND_PROJ, load_stock, predict
from engines.noise import Purpose, row_noise
from engines.sampler import encoder_plan, sampler_plan
from engines.schedule import NoiseSchedule
from tests.support import tiny_pipelines as tiny
from tests.support.latent_run import latent_recipe

ZERO_SNR = {**tiny.SCHEDULER, "rescale_betas_zero_snr": True}
TEACHERS: dict[str, dict[str, Any]] = {
    "sd15": {"prediction": "epsilon"},
    "sd21": {"prediction": "v_prediction", "scheduler": DDIMScheduler(**ZERO_SNR, prediction_type="v_prediction")},
    "sdxl": {"prediction": "epsilon"},
    "inpaint": {
        "prediction": "v_prediction",
        "scheduler": DDIMScheduler(**ZERO_SNR, prediction_type="v_prediction"),
        "in_channels": 9,
    },
}
ENCODER = {"batch_size": 4, "halvings": [{"steps": 4, "updates": 1}], "students": [4]}
OTHER_UNET = {"sample_size": 16, "out_channels": 4, "cross_attention_dim": 32}
STOCK = {
    "sd15": StableDiffusionPipeline,
    "sd21": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "inpaint": StableDiffusionInpaintPipeline,
}


@pytest.fixture(scope="module", params=list(TEACHERS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name, work = request.param, tmp_path_factory.mktemp(request.param)
    make = tiny.sdxl if name == "sdxl" else tiny.sd
    make(work / "parts", **TEACHERS[name], **tiny.ONE_LEVEL).save_pretrained(
        work / "teacher", safe_serialization=True
    )
    changes: dict[str, Any] = {"inpaint": {"inpainting": {}}, "sd21": {"encoder": ENCODER}}.get(name, {})
    recipe = read_recipe(latent_recipe(work, work / "teacher", finetune=name in ("sd15", "sdxl"), **changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_one, "GATE_ROWS", 8)
        run_job(recipe, work / "run", resume=False, progress=Progress(disable=True))
    return name, work


def test_students_draw_the_same_in_stock_pipelines(run: tuple[str, Path]) -> None:
    name, work = run
    folder, recipe = work / "run" / "students" / "d4", read_recipe(work / "run" / "recipe.yaml")
    unet = load_stock(folder)
    assert unet.state_dict()[COND_PROJ].abs().sum() > 0
    pipeline = STOCK[name].from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(row_noise(7, (4, 8, 8), Purpose.INITIAL))[None]
    prompts = PromptEncoder.load(open_folder(folder))
    condition = prompts.encode(["a cat"], whole_image(16) if name == "sdxl" else None)
    plan = sampler_plan(NoiseSchedule(recipe.schedule), 4)
    masked, mask = torch.randn(1, 4, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., 2:5] = 1
    seen = torch.cat([mask, masked], dim=1) if name == "inpaint" else None
    told: dict[str, Any] = {}
    if seen is not None:
        told = {"image": torch.zeros(1, 3, 16, 16), "masked_image_latents": masked, "strength": 1.0}
        told["mask_image"] = mask.repeat_interleave(2, -1).repeat_interleave(2, -2)
    for scale in (1.0, 6.5):
        drawn = pipeline(
            "a cat", num_inference_steps=4, guidance_scale=scale, latents=noise, output_type="latent", **told
        ).images

        def network(x_t: Tensor, timestep: int, told: Condition, w: float = scale - 1) -> Tensor:
            at = torch.tensor([float(timestep)])
            return predict(unet, x_t, at, told, torch.tensor([w]), seen)

        ours = sample(network, plan, condition, [7], (4, 8, 8))
        torch.testing.assert_close(ours, drawn, rtol=0, atol=1e-4)


def test_inversion_is_measured_beside_the_teachers(run: tuple[str, Path]) -> None:
    name, work = run
    if name != "sd21":
        pytest.skip("it trains no encoder")
    recipe = read_recipe(work / "run" / "recipe.yaml")
    report = evaluate_latent_run(work / "run", recipe, progress=Progress(disable=True))
    teacher, student = report.tasks[LATENT_INVERSION]
    assert [(row.model, row.steps, row.evaluations) for row in (teacher, student)] == [
        ("teacher", 4, 8),
        ("student", 4, 8),
    ]
    assert "encoder-4" in report.weights
    errors = [row.metrics[RECONSTRUCTION].mean for row in (teacher, student)]
    [gate] = [gate for gate in report.gates if "reconstruction" in gate.name]
    assert gate.value == pytest.approx(errors[1] / errors[0])
    assert errors[0] == pytest.approx(reconstructed_by_ddim(work / "run", recipe), rel=1e-4)
    assert "## Inversion" in (work / "run" / "report.md").read_text()


def test_data_that_are_not_the_runs_are_not_evaluated_on(
    run: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, work = run
    if name != "sd15":
        pytest.skip("one layout shows it")
    monkeypatch.chdir(work)
    shutil.copytree(work / "run", other := tmp_path / "run")
    kept = json.loads((other / "data.json").read_text())
    (other / "data.json").write_text(json.dumps({**kept, "images": kept["images"] + 1}))
    with pytest.raises(RecipeError, match="images, captions or encoders are not those"):
        evaluate_latent_run(other, read_recipe(other / "recipe.yaml"), progress=Progress(disable=True))


def test_pictures_are_measured_in_the_features_of_a_local_clip(run: tuple[str, Path], tmp_path: Path) -> None:
    name, work = run
    if name != "sd15":
        pytest.skip("one layout shows it")
    recipe = read_recipe(work / "run" / "recipe.yaml")
    chosen = {"features": "clip", "features_path": str(tiny.clip(tmp_path / "clip"))}
    settings = recipe.evaluation.model_copy(update={**chosen, "guidance_scales": (1.0, 5.0)})
    changed = recipe.model_copy(update={"evaluation": settings})
    report = evaluate_latent_run(work / "run", changed, progress=Progress(disable=True))
    measures = {"frechet_distance", "precision", "recall", "coverage", TEXT_AGREEMENT, "paired_distance"}
    assert all(row.metrics.keys() == measures for row in report.evaluation.rows)
    assert (
        report.evaluation.metric == "Fréchet distance in CLIP features, to the data's images of the same captions"
    )
    assert len({row.metrics[TEXT_AGREEMENT].mean for row in report.evaluation.rows}) > 2
    page = (work / "run" / "report.md").read_text(encoding="utf-8")
    heads = "Fréchet distance | text agreement | precision | recall | coverage | distance to the teacher |"
    assert f"| guidance_scale | model | steps | evaluations | {heads}" in page
    drawn = {file.name for file in (work / "run" / "curves").iterdir()}
    assert drawn == {f"{measure}.png" for measure in measures - {"precision"}} | {"trade_off.png"}
    assert all(f"](curves/{picture})" in page for picture in drawn)


def reconstructed_by_ddim(run: Path, recipe: Recipe) -> float:
    """The teacher's error by DDIM's formula, from the images' latents as they are cached."""
    folder = open_folder(run / "teacher")
    processes = Processes(ComputeSection(), run)
    source = open_source(recipe, folder, processes, Progress(disable=True))
    assert isinstance(source, LatentSource)
    draws, samples = Draws(recipe.seed, "evaluation"), recipe.evaluation.samples
    size = recipe.evaluation.batch_size
    known = source.means(draws, 0, size)[:samples]
    condition = source.batch(draws, 0, size).condition[slice(0, samples)]
    unet, schedule = load_stock(run / "teacher"), NoiseSchedule(recipe.schedule)
    x_t = known
    with torch.no_grad():
        for plan in (encoder_plan(schedule, 4), sampler_plan(schedule, 4)):
            for step in plan:
                (alpha, sigma), (alpha_s, sigma_s) = schedule.at(step.timestep), schedule.at(step.target)
                v = predict(unet, x_t, torch.full((samples,), float(step.timestep)), condition)
                x_t = alpha_s * (alpha * x_t - sigma * v) + sigma_s * (sigma * x_t + alpha * v)
    return float((x_t - known).square().mean().sqrt())


def test_every_phase_is_a_whole_pipeline(run: tuple[str, Path]) -> None:
    _, work = run
    for phase in ("teacher", "stage_one", "students/d1"):
        folder = open_folder(work / "run" / phase)
        assert folder.prediction == "v_prediction"
        assert folder.schedule.rescale_zero_terminal_snr


def test_a_phases_encoders_are_the_teachers(run: tuple[str, Path]) -> None:
    """So that evaluating a run finds its latents in the cache."""
    _, work = run
    (work / "teacher" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    teacher, phase = open_folder(work / "teacher"), open_folder(work / "run" / "teacher")
    assert encoders_sha256(teacher) == encoders_sha256(phase)
    assert not (phase.path / "vae" / "diffusion_pytorch_model.bin").exists()


def test_half_precision_weights_take_their_plain_name(tmp_path: Path) -> None:
    tiny.sd(tmp_path / "parts", **tiny.ONE_LEVEL).save_pretrained(
        tmp_path / "teacher", safe_serialization=True, variant="fp16"
    )
    for part in ("unet", "scheduler"):
        shutil.copytree(tmp_path / "teacher" / part, tmp_path / "student" / part)
    complete(tmp_path / "student", open_folder(tmp_path / "teacher"))
    assert (tmp_path / "student" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "student" / "text_encoder" / "model.safetensors").is_file()


def test_a_teacher_that_was_fine_tuned_from_another_network_is_not_taken(
    run: tuple[str, Path], tmp_path: Path
) -> None:
    name, work = run
    if name != "sd15":
        pytest.skip("its teacher is not fine-tuned, or that of sd15 shows it")
    recipe, other = read_recipe(work / "recipe.yaml"), tmp_path / "other"
    shutil.copytree(work / "run", other)
    given = other / "given.json"
    given.write_text(json.dumps({**json.loads(given.read_text()), "sha256": "of the folder as it was then"}))
    with pytest.raises(RecipeError, match="fine-tuned from"):
        run_job(recipe, tmp_path / "run", resume=False, progress=Progress(disable=True), taken_from=other)


def test_a_resumed_run_reads_its_recipe_without_the_teacher(run: tuple[str, Path]) -> None:
    _, work = run
    text = (work / "run" / "recipe.yaml").read_text()
    moved = text.replace(str(work / "teacher"), str(work / "gone"))
    (work / "moved.yaml").write_text(moved)
    assert read_recipe(work / "moved.yaml").unet == read_recipe(work / "recipe.yaml").unet


def test_the_empty_condition_keeps_the_framing() -> None:
    time_ids = torch.arange(12.0).reshape(2, 6)
    shown = Condition(torch.ones(2, 3, 4), torch.ones(2, 5), time_ids)
    empty = Condition(torch.zeros(2, 3, 4), torch.zeros(2, 5)).framed_as(shown)
    torch.testing.assert_close(empty.time_ids, time_ids)
    mixed = empty.where(torch.tensor([True, False]), shown)
    assert mixed.pooled is not None
    assert mixed.pooled[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": OTHER_UNET, "schedule": {"kind": "scaled_linear"}}, "its unet has .*leave unet out"),
        ({"unet": OTHER_UNET}, "with kind: cosine, the default, .*rescale_zero_terminal_snr"),
        ({"unet": {"sample_size": 16}, "schedule": {"kind": "linear"}}, "unet.out_channels must be given"),
        ({"inpainting": {}}, "unet.in_channels must be 9: inpainting is for teachers that see the mask"),
        ({"schedule": {"beta_end": 0.5}}, "may change rescale_zero_terminal_snr"),
        ({"schedule": None}, "give teacher.v_finetune"),
        ({"data": "digits"}, "captioned images need teacher.folder"),
        ({"data": {"kind": "laion", "path": "x"}}, "kind: image_folder, webdataset or glyphs"),
        ({"clip": 1.0}, "latents have no bound"),
        ({"data": {"kind": "webdataset", "path": "nowhere"}}, "data.path: nowhere is not there"),
        ({"data": {"kind": "image_folder", "path": "nowhere"}}, "data.path: nowhere is not there"),
        ({"export": {"name": "latent", "students": [4], "upscale": 2}}, "export.upscale is for digits"),
    ],
    ids=[
        "unet",
        "unet and no kind of schedule",
        "unet in part",
        "inpainting",
        "schedule",
        "no fine-tune",
        "digits",
        "kind",
        "clip",
        "shards",
        "images",
        "upscale",
    ],
)
def test_what_does_not_fit_the_teacher_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny.sd(tmp_path / "parts", **tiny.ONE_LEVEL).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    file = latent_recipe(tmp_path, tmp_path / "teacher", finetune=changes != {"schedule": None}, **changes)
    with pytest.raises(RecipeError, match=message):
        run_job(read_recipe(file), tmp_path / "run", resume=False, progress=Progress(disable=True))


@pytest.mark.parametrize("given", [{}, {"unet": OTHER_UNET, "schedule": {"kind": "scaled_linear"}}])
def test_a_student_is_no_teacher(given: dict[str, Any], tmp_path: Path) -> None:
    student = tiny.sd(tmp_path / "parts", time_cond_proj_dim=256, **tiny.ONE_LEVEL)
    student.save_pretrained(tmp_path / "teacher", safe_serialization=True)
    with pytest.raises(RecipeError, match=r"takes the guidance weight .*it is distilled already; .*import"):
        open_teacher(read_recipe(latent_recipe(tmp_path, tmp_path / "teacher", **given)))


def test_a_hundredth_of_the_images_may_be_unreadable_and_no_more(tmp_path: Path) -> None:
    tiny.sd(tmp_path / "parts", **tiny.ONE_LEVEL).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    data = {"kind": "image_folder", "path": str(tmp_path / "images"), "cache": str(tmp_path / "cache")}
    file = latent_recipe(tmp_path, tmp_path / "teacher", data={**data, "unreadable": "skip"})
    (tmp_path / "images" / "3.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"1 of 12 images cannot be read: .*3\.png; more than 1%"):
        run_job(read_recipe(file), tmp_path / "run", resume=False, progress=Progress(disable=True))


def test_latents_stop_at_a_signal_and_a_resume_needs_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.sd(tmp_path / "parts", **tiny.ONE_LEVEL).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    recipe = read_recipe(latent_recipe(tmp_path, tmp_path / "teacher"))
    load = Encoders.load

    def stopped(*args: Any) -> Encoders:
        signal.raise_signal(signal.SIGTERM)
        return load(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Encoders, "load", stopped)
        with pytest.raises(Interrupted, match="latents"):
            run_job(recipe, tmp_path / "run", resume=False, progress=Progress(disable=True))
    monkeypatch.setattr(job, "_train", lambda _: (tmp_path / "run" / "teacher").mkdir(exist_ok=True))
    run_job(recipe, tmp_path / "run", resume=True, progress=Progress(disable=True))
    run_job(recipe, tmp_path / "run", resume=True, progress=Progress(disable=True))
    (tmp_path / "images" / "3.png").write_bytes((tmp_path / "images" / "4.png").read_bytes())
    with pytest.raises(RecipeError, match=r"not those that .* was started with, .* \(12 images then, 12 now\)"):
        run_job(recipe, tmp_path / "run", resume=True, progress=Progress(disable=True))


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ((0.6, 0.1, 2.0), "prediction_type is epsilon, but on the data the unet gives v_prediction"),
        ((float("nan"),) * 3, "its unet gives NaN"),
    ],
    ids=["another", "nan"],
)
def test_a_teacher_that_is_not_what_its_folder_says_is_refused(
    errors: tuple[float, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.sd(tmp_path / "parts", **tiny.ONE_LEVEL).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    recipe = read_recipe(latent_recipe(tmp_path, tmp_path / "teacher"))
    found = dict(zip(("epsilon", "v_prediction", "sample"), errors, strict=True))
    monkeypatch.setattr(stage_one, "prediction_errors", lambda *_, **__: found)
    for module in (latent_cache, opening):
        monkeypatch.setattr(module, "SHARD_ROWS", 5)  # of 12 images
    with pytest.raises(RecipeError, match=message):
        run_job(recipe, tmp_path / "run", resume=False, progress=Progress(disable=True))
    shards = [file for file in recipe.data.cache.rglob("*.safetensors") if not file.name.startswith("null-")]  # type: ignore[union-attr]
    assert len(shards) == 1, "refused before the other images are encoded"


@pytest.mark.parametrize("unreadable", [0, 5], ids=["readable", "unreadable"])
def test_what_is_shown_of_the_data_first_are_the_first_images_if_any_can_be_read(
    unreadable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.sd(tmp_path / "parts", **tiny.ONE_LEVEL).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    recipe = read_recipe(latent_recipe(tmp_path, tmp_path / "teacher"), ["data.unreadable=skip"])
    for k in range(unreadable):
        (tmp_path / "images" / f"{k}.png").write_bytes(b"x")
    for module in (latent_cache, opening):
        monkeypatch.setattr(module, "SHARD_ROWS", 5)  # of 12 images
    monkeypatch.setattr(opening, "MOST_SKIPPED", 1.0)
    processes, shown = Processes(ComputeSection(), tmp_path / "run"), list[Source]()
    source = open_source(recipe, open_teacher(recipe), processes, Progress(disable=True), first=shown.append)
    (first,) = (each for each in shown if isinstance(each, LatentSource))
    assert isinstance(source, LatentSource)
    assert (len(first.cache), len(source.cache)) == ((7, 7) if unreadable else (5, 12))


@pytest.mark.parametrize(("kept", "message"), [(None, "whose folder is missing"), ("pytorch_model.bin", "pickles")])
def test_parts_that_students_could_not_take_over_are_refused_before_training(
    kept: str | None, message: str, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    tiny.sd(tmp_path / "parts", **tiny.ONE_LEVEL).save_pretrained(teacher, safe_serialization=True)
    index = json.loads((teacher / "model_index.json").read_text(encoding="utf-8"))
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (teacher / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    if kept is not None:
        (teacher / "safety_checker").mkdir()
        (teacher / "safety_checker" / kept).write_bytes(b"")
    with pytest.raises(RecipeError, match=f"safety_checker.*{message}"):
        open_teacher(read_recipe(latent_recipe(tmp_path, teacher)))


def test_a_teacher_of_symbolic_links_is_taken_over_whole(tmp_path: Path) -> None:
    """As snapshots of a download cache are: links to ../../blobs, which would lead nowhere from another folder."""
    real, teacher = tmp_path / "blobs", tmp_path / "snapshots" / "a"
    tiny.sd(tmp_path / "parts", **tiny.ONE_LEVEL).save_pretrained(real, safe_serialization=True)
    for file in (path for path in real.rglob("*") if path.is_file()):
        link = teacher / file.relative_to(real)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(file, link.parent))
    folder = tmp_path / "far" / "away" / "student"
    shutil.copytree(real / "unet", folder / "unet")
    shutil.copytree(real / "scheduler", folder / "scheduler")
    complete(folder, open_folder(teacher))
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert encoders_sha256(open_folder(folder)) == encoders_sha256(open_folder(teacher))
