"""A latent run to a bundle: the engines draw, edit and inpaint what diffusers does with the same folder."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from rich.progress import Progress

from distill_jobs import stage_one
from distill_jobs.export import export_run
from distill_jobs.job import run_job
from distill_jobs.onnx_export import ExportError
from distill_jobs.pipelines.evaluate import evaluate_latent_run
from distill_jobs.pipelines.report import LatentReport
from distill_jobs.recipe_file import read_recipe
from engines.manifest import CONDITION_GRAPH
from engines.noise import Purpose, row_noise
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from engines.rows import Drawing
from tests.support import tiny_pipelines as tiny
from tests.support.latent_run import latent_recipe
from tests.support.serving import serving

SIDE = tiny.IMAGE_PX
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
SMALL = {
    "stage_two": {"batch_size": 4, "halvings": [{"steps": 2, "updates": 1}]},
    "evaluation": {"samples": 20, "seeds": [1], "guidance_scales": [1, 5], "teacher_steps": 4, "batch_size": 10},
    "export": {"name": "latent", "students": [2], "default_steps": 2},
}


@pytest.fixture(scope="module", params=["sd15", pytest.param("sdxl", marks=pytest.mark.long)])
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    make = tiny.sdxl if request.param == "sdxl" else tiny.sd
    make(made / "parts", **ONE_LEVEL).save_pretrained(made / "teacher", safe_serialization=True)
    recipe = read_recipe(latent_recipe(made, made / "teacher", **SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_one, "GATE_ROWS", 8)
        run_job(recipe, made / "run", resume=False, progress=Progress(disable=True))
    with pytest.raises(ExportError, match="not evaluated yet"):
        export_run(made / "run", made / "bundle", recipe)
    evaluate_latent_run(made / "run", recipe, progress=Progress(disable=True))
    export_run(made / "run", made / "bundle", recipe, despite_gates=True)
    return made


@pytest.fixture(scope="module")
def pipeline(work: Path) -> Pipeline:
    return open_pipeline(work / "bundle", "onnxruntime", rungs=(1, 2), warm=False)


def test_engines_draw_what_diffusers_draws(work: Path, pipeline: Pipeline) -> None:
    kind = StableDiffusionXLPipeline if "sdxl" in work.name else StableDiffusionPipeline
    stock = kind.from_pretrained(work / "run" / "students" / "d2", use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(row_noise(3, (4, 8, 8), Purpose.INITIAL))[None]
    expected = stock("a cat", num_inference_steps=2, guidance_scale=5.0, latents=noise, output_type="np").images
    drawn = pipeline.generate(["a dog", "a cat"], 5.0, [4, 3])[1]
    assert np.abs(drawn - expected[0] * 255).max() <= 1.0


def test_the_manifest_tells_what_was_made(work: Path, pipeline: Pipeline) -> None:
    manifest = pipeline.manifest
    assert manifest.condition.kind == "clip"
    assert manifest.graphs[CONDITION_GRAPH].inputs[0].shape == (-1, tiny.TOKENS)
    assert manifest.prediction_type == "v_prediction"
    assert manifest.schedule.rescale_zero_terminal_snr
    assert manifest.latent.scaling_factor == (0.13025 if "sdxl" in work.name else 0.18215)
    assert str(manifest.sizes[0]) == f"{SIDE}x{SIDE}"
    assert all(graph.parity.max_abs_error <= 1.0 for graph in manifest.graphs.values())
    report = LatentReport.read(work / "run")
    assert manifest.evaluation == report.evaluation
    reference = [row for row in report.evaluation.rows if (row.model, row.steps) == ("teacher", 4)]
    assert [row.metrics["paired_distance"].mean for row in reference] == [0, 0]
    students = [row for row in report.evaluation.rows if row.model == "student"]
    assert all(row.metrics["paired_distance"].mean > 0 for row in students)
    assert len(report.gates) == 2
    assert "guidance_scale" in (work / "run" / "report.md").read_text()


def test_images_go_to_latents_and_back(pipeline: Pipeline) -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    [known] = pipeline.encode([image])
    [condition] = pipeline.condition(["a cat"])
    mask = np.zeros((1, 8, 8), np.float32)
    mask[:, 2:5] = 1
    drawing = Drawing(pipeline.manifest, pipeline.student(2), condition, 3.0)
    edited, inpainted = drawing.from_image(1, known, 0.5), drawing.from_image(1, known, 1.0, mask)
    while not inpainted.done:
        pipeline.step([row for row in (edited, inpainted) if not row.done])
    np.testing.assert_allclose(inpainted.latent[:, 5:], known[:, 5:], atol=1e-6)
    assert np.abs(inpainted.latent[:, 2:5] - known[:, 2:5]).max() > 0.01
    assert pipeline.decode([edited.latent]).shape == (1, SIDE, SIDE, 3)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_server_draws_edits_and_inpaints(work: Path, tmp_path: Path) -> None:
    if "sdxl" in work.name:
        pytest.skip("the server sees bundles alike; one is enough")
    photo = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((SIDE, SIDE, 4), np.uint8)
    mask[:8, :, 3] = 255
    with serving([work / "bundle"], log=tmp_path / "log") as server, httpx.Client(timeout=120) as client:
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
