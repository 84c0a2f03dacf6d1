"""Published students of the latent consistency kind: the same images as diffusers, and refusals with the reason."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any, Never

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from rich.progress import Progress
from torch import Tensor
from typer.testing import CliRunner

from distill_jobs import commands
from distill_jobs.cli import app
from distill_jobs.errors import RecipeError, TeacherError
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.importing import import_student
from distill_jobs.pipelines.published import lcm_timesteps, open_published
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.sampling import sample, student_network
from distill_jobs.sections import StoredWeights
from distill_jobs.student import load_stock
from engines.noise import Purpose, row_noise
from engines.open import open_pipeline
from engines.schedule import NoiseSchedule
from tests.support import tiny_pipelines as tiny

SCALES = (1.0, 15.0, 8.5)
SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("lcm")
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    stock = tiny.sd(
        work / "parts",
        scheduler=scheduler,
        time_cond_proj_dim=256,
        **tiny.ONE_LEVEL,
    )
    parts = {name: getattr(stock, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipeline = LatentConsistencyModelPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(work / "lcm", safe_serialization=True)
    return work / "lcm"


def noise(purpose: Purpose, step: int = 0) -> Tensor:
    return torch.from_numpy(row_noise(SEED, (4, 8, 8), purpose, step))[None]


def draw_equal_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the scheduler's next trajectory the row's own noise."""
    drawn = count()
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: noise(Purpose.STEP, next(drawn))
    )


@pytest.mark.parametrize("trained", [50, 30, 100])
def test_the_timesteps_are_the_schedulers(trained: int) -> None:
    """Not the grid's where the steps do not divide the training points: 999, 759, 499, 259."""
    stock = LCMScheduler(original_inference_steps=trained)
    for n in range(1, trained + 1):
        stock.set_timesteps(n)
        assert lcm_timesteps(n, trained, 1000) == tuple(stock.timesteps.tolist()), n


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_the_consistency_sampler_is_the_schedulers(
    steps: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = LatentConsistencyModelPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    draw_equal_noise(monkeypatch)
    told = {"guidance_scale": 4.0, "latents": noise(Purpose.INITIAL), "output_type": "latent"}
    expected = pipeline("a cat", num_inference_steps=steps, **told).images
    published = open_published(folder)
    plan = published.plans([steps])[steps]
    condition = PromptEncoder.load(published.folder).encode(["a cat"])
    found = sample(student_network(load_stock(folder), 3.0), plan, condition, [SEED], (4, 8, 8))
    assert plan.timesteps == tuple(pipeline.scheduler.timesteps.tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_betas_that_a_config_leaves_out_are_the_schedulers_own(folder: Path, tmp_path: Path) -> None:
    """LCMScheduler's defaults are others than DDIM's."""
    copy = Path(shutil.copytree(folder, tmp_path / "lcm"))
    file = copy / "scheduler" / "scheduler_config.json"
    told = json.loads(file.read_text())
    file.write_text(
        json.dumps({name: value for name, value in told.items() if name not in ("beta_start", "beta_end")})
    )
    stock = LCMScheduler.from_pretrained(copy / "scheduler")
    found = NoiseSchedule(open_published(copy).folder.schedule)
    np.testing.assert_allclose(found.alpha**2, stock.alphas_cumprod.numpy(), rtol=0, atol=6e-6)


def test_a_scheduler_whose_own_library_is_missing_is_read_by_its_config(folder: Path, tmp_path: Path) -> None:
    """diffusers has a stand-in for it then, which takes anything."""
    copy = Path(shutil.copytree(folder, tmp_path / "sde"))
    for file in (copy / "model_index.json", copy / "scheduler" / "scheduler_config.json"):
        file.write_text(file.read_text().replace("LCMScheduler", "DPMSolverSDEScheduler"))
    assert open_folder(copy).schedule == open_folder(folder).schedule


def test_four_steps_are_the_default_and_one_to_eight_are_served(folder: Path) -> None:
    plans = open_published(folder).plans(None)
    assert next(iter(plans)) == 4
    assert sorted(plans) == list(range(1, 9))
    assert plans[4].timesteps == (999, 759, 499, 259)


@pytest.mark.long
@pytest.mark.parametrize(("weights", "levels"), [("float32", 1.0), ("float16", 3.0)])
def test_an_imported_bundle_draws_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: StoredWeights, levels: float
) -> None:
    written = import_student(
        folder,
        tmp_path / "bundle",
        name="lcm",
        steps=(4, 1),
        scales=SCALES,
        licence="theirs",
        progress=Progress(disable=True),
        weights=weights,
    )
    manifest = written.manifest
    assert {graph.rounded is None for graph in manifest.graphs.values()} == {weights == "float32"}
    assert all(graph.rounded is None or graph.rounded.max_abs_error > 0 for graph in manifest.graphs.values())
    assert (manifest.prediction_type, manifest.default_steps, manifest.licences.teacher) == ("epsilon", 4, "theirs")
    assert manifest.students[0].timesteps == (999, 759, 499, 259)
    assert {student.sampler for student in manifest.students} == {"consistency"}
    stock = LatentConsistencyModelPipeline.from_pretrained(folder, use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    told = {"guidance_scale": 4.0, "latents": noise(Purpose.INITIAL), "output_type": "np"}
    engine = open_pipeline(tmp_path / "bundle", "onnxruntime", rungs=(1,), warm=False)
    for steps in (4, 1):
        draw_equal_noise(monkeypatch)
        expected = stock("a cat", num_inference_steps=steps, **told).images[0] * 255
        assert np.abs(engine.generate(["a cat"], 4.0, [SEED], steps)[0] - expected).max() <= levels


@pytest.mark.parametrize(
    ("file", "changes", "steps", "message"),
    [
        (
            "unet/config.json",
            {"time_cond_proj_dim": None},
            (1,),
            "takes no guidance weight",
        ),
        ("unet/config.json", {"time_cond_proj_dim": 128}, (1,), "only 256 values, or none"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "DDIMScheduler"]},
            (1,),
            r"model_index\.json names DDIMScheduler as its scheduler, .* LCMScheduler; give both the one",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, (1,), "prediction_type is sample"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, (1,), "clip_sample is True"),
        ("model_index.json", {}, (51,), "51 steps: LCMScheduler takes 1 to 50, its original_inference_steps"),
    ],
    ids=["no weight", "weight", "scheduler", "prediction", "clip", "steps"],
)
def test_what_cannot_be_run_is_refused_with_the_reason(
    file: str, changes: dict[str, object], steps: tuple[int, ...], message: str, folder: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    told = json.loads((copied / file).read_text())
    (copied / file).write_text(json.dumps({**told, **changes}))
    wanted = {"name": "lcm", "steps": steps, "scales": SCALES, "licence": "x", "progress": Progress(disable=True)}
    with pytest.raises(TeacherError, match=message):
        import_student(copied, tmp_path / "bundle", **wanted)
    assert not (tmp_path / "bundle").exists()


def test_a_name_that_no_bundle_may_have_is_refused_before_anything_is_made(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'My Model' is no model id"):
        import_student(
            folder,
            tmp_path / "bundle",
            name="My Model",
            steps=None,
            scales=(None, None, None),
            licence="",
            progress=Progress(disable=True),
        )
    assert not list(tmp_path.iterdir())


def test_export_takes_a_published_student_as_import_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def imported(*places: Path, **told: Any) -> Never:
        asked.append((*places, told["name"], told["steps"], told["scales"], told["sizes"]))
        raise RecipeError("far enough")

    monkeypatch.setattr(commands, "import_student", imported)
    runner, bundle = CliRunner(), tmp_path / "lcm"
    result = runner.invoke(app, ["export", str(folder), str(bundle), "--sizes", "16x16"])
    assert (result.exit_code, result.output) == (RecipeError.exit_code, "Error: far enough\n")
    assert asked == [(folder, bundle, "lcm", None, (None, None, None), ["16x16"])]
    result = runner.invoke(app, ["export", str(folder), str(bundle), "--decoder", "tiny"])
    assert "no gates and no tiny decoder" in result.output
    result = runner.invoke(app, ["export", str(tmp_path), str(bundle)])
    assert "is not a run folder" in result.output
    assert len(asked) == 1
