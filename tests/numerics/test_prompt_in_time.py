"""UNets that are told the prompt with the timestep too (``addition_embed_type: text``), from folder to engine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from distill_jobs.data.source import Condition
from distill_jobs.errors import TeacherError
from distill_jobs.graphs import StepGraph
from distill_jobs.parity import step_rows, write_checked
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.pipelines.writing import complete
from distill_jobs.sampling import student_network
from distill_jobs.student import (
    COND_PROJ,
    GUIDANCE_WIDTH,
    fold_grid,
    load_stock,
    predict,
    save_stock,
    student_of,
    told_its_grid,
)
from engines.backends.onnxruntime import OnnxRuntimeBackend
from engines.backends.openvino import OpenVinoBackend
from engines.backends.torch import TorchBackend
from engines.manifest import GuidanceRange
from engines.sampler import sampler_plan
from engines.schedule import NoiseSchedule
from tests.support import tiny_pipelines as tiny

TOLD_IN_TIME: dict[str, Any] = {
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_dim": 24,
}
SHAPE = (4, tiny.LATENT_PX, tiny.LATENT_PX)
RANGE = GuidanceRange(min=1, max=10, default=5)
STEPS = (4, 2, 1)
B = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PipelineFolder:
    work = tmp_path_factory.mktemp("told")
    scheduler = DDIMScheduler(**{**tiny.SCHEDULER, "rescale_betas_zero_snr": True}, prediction_type="v_prediction")
    pipeline = tiny.sd(work, prediction="v_prediction", scheduler=scheduler, **tiny.ONE_LEVEL, **TOLD_IN_TIME)
    pipeline.save_pretrained(work / "teacher", safe_serialization=True)
    return open_folder(work / "teacher")


@pytest.fixture(scope="module")
def teacher(folder: PipelineFolder) -> UNet2DConditionModel:
    return load_stock(folder.path)


@pytest.fixture(scope="module")
def condition(folder: PipelineFolder) -> Condition:
    return PromptEncoder.load(folder).encode(["a cat", "a dog", "dog", "", "cat cat cat"])


@pytest.fixture(scope="module")
def student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """Answers to w."""
    return with_random_columns(student_of(teacher), slice(None))


@pytest.fixture(scope="module")
def shared(student: UNet2DConditionModel) -> UNet2DConditionModel:
    """Answers to w and to its grid."""
    return with_random_columns(told_its_grid(student), slice(GUIDANCE_WIDTH, None))


def with_random_columns(unet: UNet2DConditionModel, columns: slice) -> UNet2DConditionModel:
    """Those of ``cond_proj``, which start at zero."""
    with torch.no_grad():
        chosen = unet.get_parameter(COND_PROJ)[:, columns]
        chosen.copy_(torch.randn(chosen.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return unet.eval()


def asked(unet: UNet2DConditionModel, told: Condition, w: Tensor | None = None, n: int | None = None) -> Tensor:
    """What a network gives for one noise and timesteps over the whole range, whatever it is told."""
    noise = torch.randn((B, *SHAPE), generator=torch.Generator().manual_seed(0))
    grid = None if n is None else torch.full((B,), float(n))
    with torch.no_grad():
        return predict(unet, noise, torch.tensor([999.0, 749, 499, 249, 0]), told, w, grid=grid)


def test_the_prompt_comes_with_the_timestep(teacher: UNet2DConditionModel, condition: Condition) -> None:
    """Else all below would hold of a network that is never told."""
    assert teacher.config.addition_embed_type == "text"
    by_attention = student_of(teacher).eval()
    with torch.no_grad():
        by_attention.add_embedding.norm2.weight.zero_()
        by_attention.add_embedding.norm2.bias.zero_()
    other = asked(by_attention, condition, torch.zeros(B))
    assert float((asked(teacher, condition) - other).abs().max()) > 1e-3


def test_students_equal_their_teacher_at_initialisation(
    teacher: UNet2DConditionModel, condition: Condition
) -> None:
    student = student_of(teacher).eval()
    grown = told_its_grid(student).eval()
    w, expected = torch.linspace(0, 9, B), asked(teacher, condition)
    torch.testing.assert_close(asked(student, condition, w), expected, rtol=0, atol=1e-6)
    for n in STEPS:
        torch.testing.assert_close(asked(grown, condition, w, n), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", STEPS)
def test_a_folded_student_is_the_shared_one(
    n: int, student: UNet2DConditionModel, shared: UNet2DConditionModel, condition: Condition
) -> None:
    w = torch.linspace(0, 9, B)
    want, folded = asked(shared, condition, w, n), asked(fold_grid(shared, n).eval(), condition, w)
    torch.testing.assert_close(folded, want, rtol=0, atol=2e-6)
    assert float((want - asked(student, condition, w)).abs().max()) > 1e-4  # the grid matters


@pytest.mark.parametrize("kind", ["shared", pytest.param("folded", marks=pytest.mark.long)])
def test_the_step_graph_equals_torch_in_every_engine(
    kind: str,
    folder: PipelineFolder,
    shared: UNet2DConditionModel,
    condition: Condition,
    tmp_path: Path,
) -> None:
    unet = shared if kind == "shared" else fold_grid(shared, 2)
    step, size = StepGraph(unet).eval(), SHAPE[1:]
    plans = [sampler_plan(NoiseSchedule(folder.schedule), n) for n in STEPS]
    told = condition.tokens.repeat(7, 1, 1)[:32]
    rows = step_rows(step, plans, RANGE, told, SHAPE, folder.pixels_per_latent)
    specs = step.inputs(*size, folder.tokens), step.outputs(*size)
    spec = write_checked(step, rows, *specs, tmp_path / "step.onnx", 1e-4)
    assert (spec.lowered or {}).get("float16") is not None
    engines = [kind(tmp_path / "step.onnx", spec) for kind in (OnnxRuntimeBackend, OpenVinoBackend, TorchBackend)]
    for batch in (1, B):
        given = [tensor[:batch] for tensor in rows]
        with torch.no_grad():
            expected = step(*given)
        feed = {name: tensor.numpy() for name, tensor in zip(step.names, given, strict=True)}
        for engine in engines:
            found = engine.run(feed)
            for output, want in zip(spec.outputs, expected, strict=True):
                np.testing.assert_allclose(found[output.name], want.numpy(), rtol=0, atol=1e-4)
    several = {name: tensor[:B].numpy() for name, tensor in zip(step.names, rows, strict=True)}
    for engine in engines[:2]:  # those that promise a row the same bits in any company
        together, alone = engine.run(several), engine.run({name: tensor[:1] for name, tensor in several.items()})
        for output in spec.outputs:
            np.testing.assert_array_equal(together[output.name][:1], alone[output.name])


def test_stock_diffusers_draws_with_the_folder_of_a_student(
    folder: PipelineFolder, shared: UNet2DConditionModel, condition: Condition, tmp_path: Path
) -> None:
    n, schedule = 4, NoiseSchedule(folder.schedule)
    unet = fold_grid(shared, n).eval()
    save_stock(tmp_path / "d4", unet, schedule, None)
    complete(tmp_path / "d4", folder)
    assert open_folder(tmp_path / "d4").prediction == "v_prediction"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "d4", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    ours, drawn = [], []
    for scale in (1.0, 6.5):
        noise = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(3))
        told = {"guidance_scale": scale, "num_inference_steps": n, "output_type": "latent"}
        drawn.append(pipeline("a dog", latents=noise, **told).images)
        ours.append(walked(unet, schedule, condition[slice(1, 2)], noise, scale))
    torch.testing.assert_close(torch.cat(ours), torch.cat(drawn), rtol=0, atol=1e-4)
    assert float((drawn[0] - drawn[1]).abs().max()) > 1e-3  # guidance matters


def walked(
    unet: UNet2DConditionModel, schedule: NoiseSchedule, told: Condition, noise: Tensor, scale: float
) -> Tensor:
    network, x_t = student_network(unet, scale - 1), noise
    with torch.no_grad():
        for step in sampler_plan(schedule, 4):
            x_t, _ = step.apply(x_t, network(x_t, step.timestep, told), 0.0)
    return x_t


@pytest.mark.parametrize("kind", ["image", "text_image", "text_time"])
def test_what_else_comes_with_the_timestep_is_refused_by_name(
    kind: str, folder: PipelineFolder, tmp_path: Path
) -> None:
    copied = tmp_path / "copy"
    for part in ("unet", "scheduler"):
        shutil.copytree(folder.path / part, copied / part)
    complete(copied, folder)
    config = copied / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "addition_embed_type": kind}))
    message = f"addition_embed_type is {kind!r}; only None or 'text' is supported"
    with pytest.raises(TeacherError, match=re.escape(message)):
        open_folder(copied)
