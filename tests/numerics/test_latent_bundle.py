"""A latent run to a bundle: the engines draw, edit and inpaint what diffusers does with the same folder."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from rich.progress import Progress

from distill_jobs import stage_one
from distill_jobs.export import export_run
from distill_jobs.inpainting import BLENDED, SEEING
from distill_jobs.job import run_job
from distill_jobs.onnx_export import ExportError
from distill_jobs.pipelines.evaluate import evaluate_latent_run
from distill_jobs.pipelines.inpainting import INSIDE, LATENT_INPAINTING, OUTSIDE, Scene
from distill_jobs.pipelines.report import LatentReport
from distill_jobs.recipe_file import read_recipe
from engines.manifest import CONDITION_GRAPH
from engines.masks import hide, latent_mask
from engines.noise import Purpose, row_noise
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from engines.rows import Drawing
from tests.support import tiny_pipelines as tiny
from tests.support.latent_run import latent_recipe
from tests.support.serving import serving

SIDE = tiny.IMAGE_PX
ZERO_SNR = {**tiny.SCHEDULER, "rescale_betas_zero_snr": True}
V_TEACHER: dict[str, Any] = {
    "prediction": "v_prediction",
    "scheduler": DDIMScheduler(**ZERO_SNR, prediction_type="v_prediction"),
}
TEACHERS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd21": V_TEACHER,
    "inpaint": {**V_TEACHER, "in_channels": 9},
    "sdxl": {},
}
STOCK = {"inpaint": StableDiffusionInpaintPipeline, "sdxl": StableDiffusionXLPipeline}
SMALL = {
    "stage_two": {"batch_size": 4, "halvings": [{"steps": 2, "updates": 1}]},
    "evaluation": {"samples": 20, "seeds": [1], "guidance_scales": [1, 5], "teacher_steps": 4, "batch_size": 10},
    "export": {"name": "latent", "students": [2], "default_steps": 2},
}


@dataclass(frozen=True)
class Made:
    """kind: of teacher; path: of all that was made of it."""

    kind: str
    path: Path

    def stock(self) -> Any:
        """The student in its pipeline of diffusers."""
        kind = STOCK.get(self.kind, StableDiffusionPipeline)
        stock = kind.from_pretrained(self.path / "run" / "students" / "d2", use_safetensors=True)
        stock.set_progress_bar_config(disable=True)
        return stock


pytestmark = pytest.mark.long  # test_made_bundle.py takes one through the same path in make test


@pytest.fixture(scope="module", params=list(TEACHERS))
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    kind, made = request.param, tmp_path_factory.mktemp(request.param)
    make = tiny.sdxl if kind == "sdxl" else tiny.sd
    teacher = make(made / "parts", **TEACHERS[kind], **tiny.ONE_LEVEL)
    teacher.save_pretrained(made / "teacher", safe_serialization=True)
    changes = {"inpainting": {}} if kind == "inpaint" else {}
    finetune = TEACHERS[kind] == {}
    recipe = read_recipe(latent_recipe(made, made / "teacher", finetune=finetune, **SMALL, **changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_one, "GATE_ROWS", 8)
        run_job(recipe, made / "run", resume=False, progress=Progress(disable=True))
    with pytest.raises(ExportError, match="not evaluated yet"):
        export_run(made / "run", made / "bundle", recipe)
    evaluate_latent_run(made / "run", recipe, progress=Progress(disable=True))
    export_run(made / "run", made / "bundle", recipe, despite_gates=True)
    return Made(kind, made)


@pytest.fixture(scope="module")
def pipeline(work: Made) -> Pipeline:
    return open_pipeline(work.path / "bundle", "onnxruntime", rungs=(1, 2), warm=False)


def behind_a_mask(mask: np.ndarray, masked: np.ndarray) -> dict[str, Any]:
    """What diffusers' inpainting is told. mask: (1, h, w); masked: (C, h, w) latent of what it leaves."""
    pixels = torch.from_numpy(mask)[None].repeat_interleave(2, -1).repeat_interleave(2, -2)
    image = torch.zeros(1, 3, SIDE, SIDE)  # not looked at: its latent is given
    told = {"image": image, "mask_image": pixels, "masked_image_latents": torch.from_numpy(masked)[None]}
    return {**told, "strength": 1.0}


def drawn_by_diffusers(stock: Any, **told: Any) -> np.ndarray:
    """(H, W, 3) in 0 … 255, of seed 3."""
    noise = torch.from_numpy(row_noise(3, (4, 8, 8), Purpose.INITIAL))[None]
    told = {**told, "guidance_scale": 5.0, "latents": noise, "output_type": "np"}
    found: np.ndarray = stock("a cat", num_inference_steps=2, **told).images[0] * 255
    return found


def test_engines_draw_what_diffusers_draws(work: Made, pipeline: Pipeline) -> None:
    seen = pipeline.blank(pipeline.manifest.sizes[0])
    told = {} if seen is None else behind_a_mask(np.ones((1, 8, 8), np.float32), seen)
    drawn = pipeline.generate(["a dog", "a cat"], 5.0, [4, 3])[1]
    assert np.abs(drawn - drawn_by_diffusers(work.stock(), **told)).max() <= 1.0


def test_engines_inpaint_what_diffusers_inpaints(work: Made, pipeline: Pipeline) -> None:
    if work.kind != "inpaint":
        pytest.skip("its networks see no mask")
    photo = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    generated = np.zeros((SIDE, SIDE), bool)
    generated[4:10] = True
    size = pipeline.manifest.sizes[0]
    mask = latent_mask(generated, size)
    known, masked = pipeline.encode([photo, hide(photo, generated, size)])
    [condition] = pipeline.condition(["a cat"])
    row = Drawing(pipeline.manifest, pipeline.student(2), condition, 5.0, masked).from_image(3, known, 1.0, mask)
    while not row.done:
        pipeline.step([row])
    [drawn] = pipeline.decode([row.latent])
    assert np.abs(drawn - drawn_by_diffusers(work.stock(), **behind_a_mask(mask, masked))).max() <= 1.0
    whole = drawn_by_diffusers(work.stock(), **behind_a_mask(np.ones_like(mask), pipeline.blank(size)))
    assert np.abs(drawn - whole).max() > 1.0


def test_the_manifest_tells_what_was_made(work: Made, pipeline: Pipeline) -> None:
    manifest = pipeline.manifest
    assert manifest.condition.kind == "clip"
    assert manifest.graphs[CONDITION_GRAPH].inputs[0].shape == (-1, tiny.TOKENS)
    assert manifest.prediction_type == "v_prediction"
    assert manifest.schedule.rescale_zero_terminal_snr
    assert manifest.sees_masks == (work.kind == "inpaint")
    assert manifest.latent.scaling_factor == (0.13025 if work.kind == "sdxl" else 0.18215)
    assert str(manifest.sizes[0]) == f"{SIDE}x{SIDE}"
    assert all(graph.parity.max_abs_error <= 1.0 for graph in manifest.graphs.values())
    report = LatentReport.read(work.path / "run")
    assert manifest.evaluation == report.evaluation
    reference = [row for row in report.evaluation.rows if (row.model, row.steps) == ("teacher", 4)]
    assert [row.metrics["paired_distance"].mean for row in reference] == [0, 0]
    students = [row for row in report.evaluation.rows if row.model == "student"]
    assert all(row.metrics["paired_distance"].mean > 0 for row in students)
    assert len(report.gates) == (3 if work.kind == "inpaint" else 2)
    assert "guidance_scale" in (work.path / "run" / "report.md").read_text()


def test_inpainting_is_measured_within_masks_and_outside_them(work: Made) -> None:
    report = LatentReport.read(work.path / "run")
    if work.kind != "inpaint":
        assert report.tasks == {}
        return
    rows = {(row.model, row.steps): row for row in report.tasks[LATENT_INPAINTING]}
    assert set(rows) == {("teacher", 4), ("teacher", 2), (SEEING, 2), (BLENDED, 2)}
    inside = {key: row.metrics[INSIDE].mean for key, row in rows.items()}
    outside = {key: row.metrics[OUTSIDE].mean for key, row in rows.items()}
    assert inside["teacher", 4] == 0
    assert min(value for key, value in inside.items() if key != ("teacher", 4)) > 0
    assert outside[BLENDED, 2] == 0
    assert outside[SEEING, 2] > 0
    assert {row.guidance_scale for row in rows.values()} == {5.0}
    assert rows["teacher", 2].evaluations == 2 * rows[SEEING, 2].evaluations
    [gate] = [gate for gate in report.gates if "within masks" in gate.name]
    assert gate.value == pytest.approx(inside[SEEING, 2] / inside["teacher", 2])
    assert "to the image outside it" in (work.path / "run" / "report.md").read_text()


def test_distances_are_of_their_own_side_of_the_mask() -> None:
    masks = torch.zeros(2, 1, 4, 4)
    masks[..., 2:] = 1
    scene = Scene(known=torch.zeros(2, 3, 4, 4), masks=masks, seen=torch.zeros(2, 4, 4, 4))
    drawn = 3 * masks.expand(2, 3, 4, 4) + 0.5 * (1 - masks)
    assert scene.inside(drawn, torch.zeros_like(drawn)) == pytest.approx(3)
    assert scene.outside(drawn) == pytest.approx(0.5)


def test_images_go_to_latents_and_back(pipeline: Pipeline) -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    size = pipeline.manifest.sizes[0]
    [known] = pipeline.encode([image])
    [condition] = pipeline.condition(["a cat"])
    mask = np.zeros((1, 8, 8), np.float32)
    mask[:, 2:5] = 1
    drawing = Drawing(pipeline.manifest, pipeline.student(2), condition, 3.0, pipeline.blank(size))
    edited, inpainted = drawing.from_image(1, known, 0.5), drawing.from_image(1, known, 1.0, mask)
    while not inpainted.done:
        pipeline.step([row for row in (edited, inpainted) if not row.done])
    if not pipeline.manifest.sees_masks:  # else nothing is blended: pixels are put back
        np.testing.assert_allclose(inpainted.latent[:, 5:], known[:, 5:], atol=1e-6)
    assert np.abs(inpainted.latent[:, 2:5] - known[:, 2:5]).max() > 0.01
    assert pipeline.decode([edited.latent]).shape == (1, SIDE, SIDE, 3)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_server_draws_edits_and_inpaints(work: Made, tmp_path: Path) -> None:
    if work.kind == "sdxl":
        pytest.skip("the server sees bundles alike but for what networks see")
    photo = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((SIDE, SIDE, 4), np.uint8)
    mask[:8, :, 3] = 255
    with serving([work.path / "bundle"], log=tmp_path / "log") as server, httpx.Client(timeout=120) as client:
        wish = {"prompt": "a cat", "seed": 3, "guidance_scale": 5.0}
        answers = [client.post(f"{server.url}/v1/images/generations", json=wish)]
        edit = {"prompt": "a dog", "seed": "3"}
        for files in ({"image": png(photo)}, {"image": png(photo), "mask": png(mask)}):
            sent = {name: (f"{name}.png", data) for name, data in files.items()}
            answers.append(client.post(f"{server.url}/v1/images/edits", data=edit, files=sent))
        long = client.post(f"{server.url}/v1/images/generations", json={**wish, "prompt": "x " * 200})
    images = []
    for answer in answers:
        assert answer.status_code == 200, answer.text
        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
        images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert images[0].shape == (SIDE, SIDE, 3)
    np.testing.assert_array_equal(images[2][:8], photo[:8])
    assert (long.status_code, long.json()["error"]["code"]) == (400, "prompt_too_long")
