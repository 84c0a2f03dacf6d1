"""From encoder students to the bundle: what is measured of them, and the pipeline that inverts and draws again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill_jobs.classifier import classifier_of
from distill_jobs.contenders import STUDENT, TEACHER
from distill_jobs.data.digits import Digits
from distill_jobs.encoders import encoders
from distill_jobs.errors import JobError
from distill_jobs.evaluate import evaluate_run
from distill_jobs.inversion import RECONSTRUCTION, edit_targets, student_route, teacher_route
from distill_jobs.recipe import Recipe
from distill_jobs.report import MARKDOWN_NAME, Report
from distill_jobs.tasks import task_gates
from engines.manifest import EvaluationRow, Measured
from engines.pipeline import Pipeline
from engines.rows import Drawing, find_encoder
from tests.support.tiny_run import SHORT_UNET, exported, tiny_recipe, write_judged_run, write_tiny_run

RECIPE = Recipe.model_validate(
    tiny_recipe((2, 1)).model_dump()
    | {
        "unet": SHORT_UNET,
        "encoder": {"halvings": [{"steps": 2, "updates": 1}], "students": (2,)},
        "export": {"name": "tiny", "students": (2,), "default_steps": 2},
    }
)
IMAGES, LABELS = Digits.load().images[:3], Digits.load().labels[:3]
TARGETS = torch.tensor([5, 8, 4])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judged_run(tmp_path_factory.mktemp("inversion") / "run", RECIPE)


@pytest.fixture(scope="module")
def report(run_dir: Path) -> Report:
    return evaluate_run(run_dir, RECIPE)


@pytest.fixture(scope="module")
def pipeline(run_dir: Path, report: Report) -> Pipeline:
    return exported(run_dir, RECIPE)


def test_the_report_has_a_row_of_the_teacher_and_of_the_student_for_every_encoder(
    run_dir: Path, report: Report
) -> None:
    rows = report.tasks["inversion"]
    assert [(row.model, row.steps, row.evaluations) for row in rows] == [
        (TEACHER, 2, 4),
        (STUDENT, 2, 4),
    ]
    assert "## Inversion" in (run_dir / MARKDOWN_NAME).read_text(encoding="utf-8")
    assert "encoder-2" in report.weights
    with Image.open(run_dir / "sheets" / "edits.png") as sheet:
        assert sheet.width == 6 + 12 * (48 + 6)  # the image, the image again, and every class


def test_the_teacher_draws_edits_where_it_is_guided(run_dir: Path) -> None:
    bounds = RECIPE.guidance.model_copy(update={"log_snr_min": -2.0})
    decoder = teacher_route(run_dir, RECIPE.model_copy(update={"guidance": bounds}), 2).decoder
    assert decoder.unguided == (999,)
    assert [decoder.evaluations(scale) for scale in (1.0, 4.0)] == [2, 3]


def test_rows_are_the_errors_of_their_routes(run_dir: Path, report: Report) -> None:
    digits = Digits.load()[: RECIPE.evaluation.samples]
    (encoder,) = encoders(run_dir, RECIPE)
    routes = {TEACHER: teacher_route(run_dir, RECIPE, 2), STUDENT: student_route(run_dir, RECIPE, encoder)}
    for row in report.tasks["inversion"]:
        route = routes[row.model]
        noise = route.noise(RECIPE, digits.images, digits.labels)
        again = route.draw(RECIPE, noise, digits.labels, 1.0)
        error = float((again - digits.images).square().mean().sqrt())
        assert row.metrics[RECONSTRUCTION].mean == pytest.approx(error, rel=1e-4)
        targets = edit_targets(digits.labels)
        edited = route.draw(RECIPE, noise, targets, RECIPE.guidance.default)
        found = classifier_of(run_dir, Digits.load())(edited)[1].argmax(dim=1)
        assert row.metrics["edit_agreement"].mean == pytest.approx(
            float((found == targets).float().mean()), abs=2e-3
        )


def test_edits_go_to_every_other_class_and_never_to_their_own() -> None:
    labels = torch.zeros(18, dtype=torch.int64) + 4
    assert sorted(edit_targets(labels).tolist()) == sorted([*range(4), *range(5, 10)] * 2)


@pytest.mark.long
def test_the_pipeline_inverts_and_draws_as_the_trained_networks_do(pipeline: Pipeline, run_dir: Path) -> None:
    manifest = pipeline.manifest
    assert [(e.steps, e.graph, e.timesteps) for e in manifest.encoders] == [(2, "invert_2", (0, 499))]
    assert manifest.graphs["invert_2"].parity.max_abs_error <= 1e-4
    source, target = (pipeline.condition([f"{int(k)}" for k in labels]) for labels in (LABELS, TARGETS))
    student = pipeline.student(2)
    rows = [
        Drawing(manifest, student, to, 3.0).from_inversion(7, x, find_encoder(manifest, student), at)
        for x, at, to in zip(IMAGES.numpy(), source, target, strict=True)
    ]
    for _ in range(2):
        pipeline.step(rows)
    (encoder,) = encoders(run_dir, RECIPE)
    route = student_route(run_dir, RECIPE, encoder)
    noise = route.noise(RECIPE, IMAGES, LABELS)
    np.testing.assert_allclose(np.stack([row.latent for row in rows]), noise.numpy(), rtol=0, atol=1e-4)
    for _ in range(2):
        pipeline.step(rows)
    assert all(row.done for row in rows)
    want = route.draw(RECIPE, noise, TARGETS, 3.0).numpy()
    np.testing.assert_allclose(np.stack([row.latent for row in rows]).clip(-1, 1), want, rtol=0, atol=1e-4)


def test_a_missing_encoder_is_named(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path, tiny_recipe((2, 1)))
    with pytest.raises(JobError, match=r"e2 holds no trained network"):
        encoders(run, RECIPE)


def quality(model: str, error: float, agreement: float) -> EvaluationRow:
    metrics = {RECONSTRUCTION: error, "edit_agreement": agreement, "edit_distance": 0.5}
    return EvaluationRow(
        model=model, steps=16, evaluations=32, guidance_scale=2.0,
        metrics={name: Measured(mean=value, spread=0) for name, value in metrics.items()},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "agreement", "passed"), [(0.05, 0.95, [True, True]), (0.07, 0.8, [False, False])]
)
def test_an_encoder_must_beat_the_teacher_and_its_edits_must_agree(
    error: float, agreement: float, passed: list[bool]
) -> None:
    gates = task_gates({"inversion": (quality(TEACHER, 0.06, 1.0), quality(STUDENT, error, agreement))})
    assert [gate.passed for gate in gates] == passed


def test_networks_that_see_masks_invert_images_that_are_hidden_as_a_whole(tmp_path: Path) -> None:
    seeing = {"inpainting": {}, "unet": {**RECIPE.unet, "in_channels": 3}}
    recipe = Recipe.model_validate(RECIPE.model_dump() | seeing)
    run = write_tiny_run(tmp_path / "run", recipe)
    (encoder,) = encoders(run, recipe)
    for route in (teacher_route(run, recipe, 2), student_route(run, recipe, encoder)):
        noise = route.noise(recipe, IMAGES, LABELS)
        assert route.draw(recipe, noise, TARGETS, 2.0).shape == IMAGES.shape
