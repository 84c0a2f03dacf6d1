"""Teachers whose vae is an AutoencoderTiny: the same latents and images as diffusers, from folder to student."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from rich.progress import Progress

from distill_jobs import stage_one
from distill_jobs.job import run_job
from distill_jobs.parity import write_checked
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.graphs import LatentDecodeGraph, LatentEncodeGraph
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.pipelines.vae import Autoencoder
from distill_jobs.recipe_file import read_recipe
from distill_jobs.sampling import sample, student_network
from distill_jobs.student import load_stock
from engines.noise import Purpose, row_noise
from engines.sampler import sampler_plan
from engines.schedule import NoiseSchedule
from tests.support import tiny_pipelines as tiny
from tests.support.latent_run import latent_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PipelineFolder:
    work = tmp_path_factory.mktemp("taesd")
    scheduler = DDIMScheduler(**{**tiny.SCHEDULER, "rescale_betas_zero_snr": True}, prediction_type="v_prediction")
    teacher = tiny.sd(work / "parts", prediction="v_prediction", scheduler=scheduler, **tiny.ONE_LEVEL)
    teacher.register_modules(vae=tiny.tiny_vae())
    teacher.save_pretrained(work / "teacher", safe_serialization=True)
    return open_folder(work / "teacher")


def test_latents_and_images_equal_diffusers_unscaled(folder: PipelineFolder, tmp_path: Path) -> None:
    """It gives a latent where AutoencoderKL gives a Gaussian."""
    assert (folder.size_px, folder.pixels_per_latent, folder.channels, folder.scaling_factor) == (16, 2, 4, 1.0)
    ours, stock = Autoencoder.load(folder), AutoencoderTiny.from_pretrained(folder.path / "vae")
    images = torch.rand((5, 16, 16, 3), generator=torch.Generator().manual_seed(3)).mul(255).to(torch.uint8)
    pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected, encoded = stock.encode(pixels).latents, ours.encode(pixels)
        torch.testing.assert_close(encoded.sample(torch.randn(5, 4, 8, 8)), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.decode(expected), stock.decode(expected).sample, rtol=0, atol=1e-6)
    encode, decode = LatentEncodeGraph(ours), LatentDecodeGraph(ours)
    encoding, decoding = (graph.inputs(8, 8) for graph in (encode, decode))
    write_checked(encode, [images], encoding, encode.outputs(8, 8), tmp_path / "encode.onnx", 1e-4, (1, 4))
    write_checked(decode, [3 * expected], decoding, decode.outputs(8, 8), tmp_path / "decode.onnx", 1.0, (1, 4))


def test_loading_one_warns_of_nothing(folder: PipelineFolder) -> None:
    """Diffusers writes a field into its config that diffusers does not know, and would tell users of it."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    diffusers_logging.add_handler(handler)
    try:
        Autoencoder.load(folder)
    finally:
        diffusers_logging.remove_handler(handler)
    assert heard == []


def test_its_student_draws_the_same_in_stock_diffusers(
    folder: PipelineFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_one, "GATE_ROWS", 8)
    halvings = {"stage_two": {"batch_size": 4, "halvings": [{"steps": 2, "updates": 1}]}}
    export = {"export": {"name": "latent", "students": [2], "default_steps": 2}}
    recipe = read_recipe(latent_recipe(tmp_path, folder.path, finetune=False, **halvings, **export))
    run_job(recipe, tmp_path / "run", resume=False, progress=Progress(disable=True))
    made = open_folder(tmp_path / "run" / "students" / "d2")
    stock = StableDiffusionPipeline.from_pretrained(made.path, use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(row_noise(7, (4, 8, 8), Purpose.INITIAL))[None]
    drawn = stock("a cat", num_inference_steps=2, guidance_scale=5.0, latents=noise, output_type="pt").images
    network = student_network(load_stock(made.path), 4.0)
    plan, condition = sampler_plan(NoiseSchedule(recipe.schedule), 2), PromptEncoder.load(made).encode(["a cat"])
    with torch.no_grad():
        ours = Autoencoder.load(made).decode(sample(network, plan, condition, [7], (4, 8, 8)))
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), drawn, rtol=0, atol=1e-4)
