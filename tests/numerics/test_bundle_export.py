"""A whole run to a bundle: the pipeline, the trainer's sampler and stock diffusers draw the same images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from distill_jobs.contenders import Contender, contenders
from distill_jobs.data.digits import Digits, class_condition
from distill_jobs.data.masks import half_masks, seen_channels
from distill_jobs.errors import DivergedError, JobError
from distill_jobs.export import export_run
from distill_jobs.inpainting import painters
from distill_jobs.int8 import engine_network, int8_gates, quantize_run
from distill_jobs.onnx_export import ExportError
from distill_jobs.sampling import request_noise, sample
from distill_jobs.student import guidance_embedding
from engines.backends.load import load_backend
from engines.bundle import Bundle, verify_bundle
from engines.errors import BundleError, RequestError
from engines.manifest import (
    COEFFICIENTS,
    CONDITION,
    CONDITION_GRAPH,
    DECODE_GRAPH,
    ENCODE_GRAPH,
    GUIDANCE,
    LATENT,
    MASK,
    MASKED,
    NEXT_LATENT,
    NOISE,
    TIMESTEP,
    Evaluation,
    EvaluationRow,
    Measured,
)
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from engines.quantize import Int8Options
from engines.rows import Drawing
from tests.numerics.conftest import EvaluatedRun
from tests.support.tiny_run import spoil, tiny_recipe, tiny_student

RECIPE = tiny_recipe((2, 1))
SCALES = (1.0, 1.5, 5.0, 15.0)
SEEDS = (0, 7, 2**53 - 1, 3)
LABELS = torch.tensor([3, 1, 4, 9])


@pytest.fixture(scope="module")
def run_dir(evaluated: EvaluatedRun) -> Path:
    return evaluated.path


@pytest.fixture(scope="module")
def bundle(run_dir: Path) -> Bundle:
    return export_run(run_dir, run_dir.parent / "bundle", RECIPE, despite_gates=True)


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Pipeline:
    return open_pipeline(bundle.path, "onnxruntime", threads=1, rungs=(1, 4), warm=False)


def pipeline_latents(pipeline: Pipeline, steps: int) -> np.ndarray:
    """Results of rows of different guidance and seed that share every batch."""
    student = pipeline.student(steps)
    conditions = pipeline.condition([f"the digit {int(label)}" for label in LABELS])
    rows = [pipeline.start(c, g, s, student) for c, g, s in zip(conditions, SCALES, SEEDS, strict=True)]
    while not rows[0].done:
        pipeline.step(rows)
    return np.stack([row.latent for row in rows])


def test_the_bundle_verifies_and_describes_the_run(bundle: Bundle) -> None:
    manifest = verify_bundle(bundle.path).manifest
    assert manifest == bundle.manifest
    assert set(manifest.graphs) == {CONDITION_GRAPH, DECODE_GRAPH, ENCODE_GRAPH, "step_2", "step_1"}
    assert [(s.steps, s.sampler, s.timesteps) for s in manifest.students] == [
        (2, "deterministic", (999, 499)),
        (1, "deterministic", (999,)),
    ]
    assert manifest.recipe.text == RECIPE.to_yaml()
    assert manifest.recipe.sha256 == RECIPE.sha256()
    assert "CC BY 4.0" in manifest.licences.data
    assert {row.model for row in manifest.evaluation.rows} == {"teacher", "stage one", "student"}
    assert all(graph.parity.max_abs_error <= 1e-4 for graph in manifest.graphs.values())
    assert str(manifest.sizes[0]) == "64x64"


@pytest.mark.parametrize("prompt", ["3", "three", "A three.", "the digit 3", "a handwritten digit three"])
def test_prompts_name_digits(pipeline: Pipeline, prompt: str) -> None:
    np.testing.assert_array_equal(
        pipeline.condition([prompt])[0], class_condition(torch.tensor([3])).tokens[0].numpy()
    )


def test_unknown_prompts_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match="zero, one"):
        pipeline.condition(["a cat"])


@pytest.mark.parametrize("steps", [1, 2])
def test_the_pipeline_equals_the_trainers_sampler(pipeline: Pipeline, run_dir: Path, steps: int) -> None:
    (student,) = (c for c in contenders(run_dir, RECIPE) if (c.role, c.steps) == ("student", steps))
    unet = student.load()
    got = pipeline_latents(pipeline, steps)
    for i, (scale, seed) in enumerate(zip(SCALES, SEEDS, strict=True)):
        condition = class_condition(LABELS[i : i + 1])
        expected = sample(student.network(unet, scale), student.plan(RECIPE), condition, [seed], student.shape)
        np.testing.assert_allclose(got[i], expected[0].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_pipeline_equals_stock_diffusers(pipeline: Pipeline, run_dir: Path, steps: int) -> None:
    got = pipeline_latents(pipeline, steps)
    np.testing.assert_allclose(got, stock_samples(run_dir / "students" / f"d{steps}", steps), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_our_sampler_equals_stock_diffusers_at_every_exported_step_count(tiny_run: Path, steps: int) -> None:
    recipe = tiny_recipe()
    (student,) = (c for c in contenders(tiny_run, recipe) if (c.role, c.steps) == ("student", steps))
    unet = student.load()
    ours = [
        sample(
            student.network(unet, scale), student.plan(recipe), class_condition(label[None]), [seed], student.shape
        )
        for scale, seed, label in zip(SCALES, SEEDS, LABELS, strict=True)
    ]
    np.testing.assert_allclose(torch.cat(ours).numpy(), stock_samples(student.folder, steps), rtol=0, atol=1e-4)


def stock_samples(folder: Path, steps: int) -> np.ndarray:
    """What diffusers alone makes of a student folder."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    embedding = guidance_embedding(torch.tensor([scale - 1 for scale in SCALES]))
    x, condition = request_noise(SEEDS, (1, 8, 8)), class_condition(LABELS)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            out = unet(x, t, encoder_hidden_states=condition.tokens, timestep_cond=embedding).sample
            x = scheduler.step(out, t, x).prev_sample
    return x.numpy()


def test_the_pipeline_blends_what_is_known_as_the_trainers_sampler_does(pipeline: Pipeline, run_dir: Path) -> None:
    (painter,) = (p for p in painters(run_dir, RECIPE) if p.student.steps == 2)
    images, masks = Digits.load().images[:4], half_masks(4, 8, 8)
    conditions = pipeline.condition([str(int(label)) for label in LABELS])
    rows = [
        Drawing(pipeline.manifest, pipeline.student(2), c, 5.0).from_image(seed, image, 1.0, mask)
        for c, seed, image, mask in zip(conditions, SEEDS, images.numpy(), masks.numpy(), strict=True)
    ]
    while not rows[0].done:
        pipeline.step(rows)
    got = torch.from_numpy(np.stack([row.latent for row in rows])).clamp(-1, 1)
    want = painter.paint(RECIPE, images, masks, LABELS, 5.0, SEEDS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_images_are_the_decoded_latents(pipeline: Pipeline) -> None:
    latents = pipeline_latents(pipeline, 2)
    images = pipeline.decode(list(latents))
    levels = np.rint((latents.clip(-1, 1) + 1) * 127.5)[:, 0]
    assert np.abs(images[:, ::8, ::8, 0] - levels).max() <= 1


def test_a_run_without_its_own_evaluation_is_not_exported(run_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    tiny_student(50).save_pretrained(run / "students" / "d2" / "unet")
    with pytest.raises(ExportError, match="other weights"):
        export_run(run, tmp_path / "bundle", RECIPE, despite_gates=True)
    (run / "report.json").unlink()
    with pytest.raises(ExportError, match="not evaluated"):
        export_run(run, tmp_path / "bundle", RECIPE, despite_gates=True)
    assert not (tmp_path / "bundle").exists()


def test_a_student_that_gives_nan_is_never_exported(
    evaluated: EvaluatedRun, tmp_path: Path, bundle: Bundle
) -> None:
    run, out = tmp_path / "run", tmp_path / "out" / "bundle"
    shutil.copytree(evaluated.path, run)
    shutil.copytree(bundle.path, out)
    spoil(run / "students" / "d2" / "unet")
    weights = {c.key: c.weights_sha256() for c in contenders(run, RECIPE)}
    evaluated.report.model_copy(update={"weights": weights}).write(run)
    with pytest.raises(ExportError, match="step_2: the model gives NaN"):
        export_run(run, out, RECIPE, despite_gates=True)
    assert [folder.name for folder in out.parent.iterdir()] == ["bundle"]  # no remains
    assert verify_bundle(out).manifest == bundle.manifest  # the older one still stands


def test_students_that_miss_a_gate_are_not_exported(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(ExportError, match="--despite-gates"):  # an untrained network misses them
        export_run(run_dir, out, RECIPE)
    assert not out.exists()


def test_a_folder_that_is_no_bundle_is_not_replaced(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(BundleError, match="not a bundle"):
        export_run(run_dir, tmp_path, RECIPE, despite_gates=True)
    assert (tmp_path / "thesis.txt").exists()


# ---- in int8


@pytest.fixture(scope="module")
def measured_run(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may take further results."""
    return Path(shutil.copytree(run_dir, tmp_path_factory.mktemp("int8") / "run"))


def test_the_network_inside_a_step_graph_is_the_students(run_dir: Path, bundle: Bundle) -> None:
    student = contenders(run_dir, RECIPE)[-1]
    spec, engine = bundle.manifest.students[-1], load_backend("onnxruntime", bundle, "step_1")
    noise, condition = request_noise(SEEDS, student.shape), class_condition(LABELS)
    with torch.inference_mode():
        want = student.network(student.load(), 3.0)(noise, 999, condition)
    torch.testing.assert_close(engine_network(engine, spec, 2.0)(noise, 999, condition), want, atol=1e-5, rtol=0)


def test_a_network_that_sees_masks_is_shown_an_image_hidden_as_a_whole(bundle: Bundle) -> None:
    """As the float32 rows are, which int8 is held against."""
    given: dict[str, np.ndarray] = {}

    def run(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given.update(rows)
        return {NEXT_LATENT: rows[LATENT]}

    names = (LATENT, TIMESTEP, GUIDANCE, CONDITION, COEFFICIENTS, NOISE, MASK, MASKED)
    engine: Any = SimpleNamespace(inputs=[SimpleNamespace(name=name) for name in names], run=run)
    noise, condition = request_noise(SEEDS, (1, 8, 8)), class_condition(LABELS)
    engine_network(engine, bundle.manifest.students[-1], 2.0)(noise, 999, condition)
    assert set(given) == set(names)
    assert set(np.unique(given[MASK])) == {1}
    np.testing.assert_array_equal(given[MASKED], seen_channels(noise, torch.ones_like(noise))[:, 1:].numpy())


@pytest.mark.long
def test_int8_has_its_own_rows_in_the_evaluation(
    measured_run: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf", reason="int8 needs halfstep[int8]")
    target, options = tmp_path / "int8", Int8Options(batches=2)
    monkeypatch.setattr("distill_jobs.int8.MOST_DISTANCE", 0.0)
    made, gates = quantize_run(measured_run, RECIPE, bundle, target, options, despite_gates=True)
    manifest = verify_bundle(target).manifest
    rows = [row for row in manifest.evaluation.rows if row.model == "student int8"]
    assert [(row.steps, row.guidance_scale) for row in rows] == [(2, 1.0), (2, 2.0), (1, 1.0), (1, 2.0)]
    assert manifest.evaluation.samples == bundle.manifest.evaluation.samples
    ratios = [gate for gate in gates if "distance" in gate.name]
    assert len(ratios) == len(rows)
    assert all(0.5 < gate.value < 2 and not gate.passed for gate in ratios)

    def made_before(_: Bundle, folder: Path, *rest: object) -> Bundle:
        return replace(made, path=Path(shutil.copytree(target, folder)))

    monkeypatch.setattr("distill_jobs.int8.quantize_bundle", made_before)
    with pytest.raises(DivergedError, match="2-step student int8, guidance 1: distance"):
        quantize_run(measured_run, RECIPE, bundle, tmp_path / "gated", options)
    assert [folder.name for folder in tmp_path.iterdir()] == ["int8"]


def test_int8_is_held_against_float32_row_by_row() -> None:
    def row(model: str, distance: float, agreement: float) -> EvaluationRow:
        values = {"frechet_distance": distance, "class_agreement": agreement}
        metrics = {name: Measured(mean=value, spread=0) for name, value in values.items()}
        return EvaluationRow(model=model, steps=1, evaluations=1, guidance_scale=2, metrics=metrics)

    student = Contender("student", 1, Path(), (1, 8, 8))
    before = [row("teacher", 1.0, 1.0), row("student", 2.0, 0.95)]
    good = list(int8_gates(before, [row("student int8", 2.09, 0.945)], [student]))
    assert [(round(gate.value, 3), gate.passed) for gate in good] == [(1.045, True), (-0.005, True)]
    bad = list(int8_gates(before, [row("student int8", 2.11, 0.935)], [student]))
    assert [gate.passed for gate in bad] == [False, False]


def test_int8_of_another_runs_bundle_is_refused(measured_run: Path, bundle: Bundle, tmp_path: Path) -> None:
    manifest = bundle.manifest.model_copy(
        update={"evaluation": Evaluation(metric="", samples=0, seeds=(), rows=())}
    )
    with pytest.raises(JobError, match="was not exported from"):
        quantize_run(measured_run, RECIPE, replace(bundle, manifest=manifest), tmp_path / "int8", Int8Options())
