"""From inpainting networks to the bundle: what is measured of them, and the pipeline that draws into a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill_jobs.data.digits import Digits, class_condition
from distill_jobs.data.masks import half_masks
from distill_jobs.evaluate import evaluate_run
from distill_jobs.inpainting import BLENDED, SEEING, Painter, painters
from distill_jobs.recipe import Recipe
from distill_jobs.report import MARKDOWN_NAME, Report
from distill_jobs.sampling import sample
from distill_jobs.tasks import task_gates
from engines.manifest import KNOWN, MASKED, EvaluationRow, Measured
from engines.masks import HIDDEN, hide, latent_mask
from engines.pipeline import Pipeline
from engines.rows import Drawing, Row
from tests.support.tiny_run import SHORT_UNET, exported, tiny_recipe, write_judged_run

RECIPE = Recipe.model_validate(
    tiny_recipe((2, 1)).model_dump()
    | {
        "inpainting": {"boxes": 0.4, "strokes": 0.4},
        "unet": {**SHORT_UNET, "in_channels": 3},
        "export": {"name": "tiny", "students": (2,), "default_steps": 2},
    }
)
DIGITS = Digits.load()[:3]
MASKS = half_masks(3, 8, 8)
SEEDS, SCALE = (4, 8, 15), 3.0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judged_run(tmp_path_factory.mktemp("inpainting") / "run", RECIPE)


@pytest.fixture(scope="module")
def report(run_dir: Path) -> Report:
    return evaluate_run(run_dir, RECIPE)


@pytest.fixture(scope="module")
def pipeline(run_dir: Path, report: Report) -> Pipeline:
    return exported(run_dir, RECIPE)


def seeing(run_dir: Path) -> Painter:
    (painter,) = (p for p in painters(run_dir, RECIPE) if p.seeing)
    return painter


def test_the_report_has_a_row_of_both_forms(run_dir: Path, report: Report) -> None:
    rows = report.tasks["inpainting"]
    assert [(row.model, row.steps, row.evaluations) for row in rows] == [(SEEING, 2, 2), (BLENDED, 2, 2)]
    assert rows[0].metrics["text_agreement"] == rows[1].metrics["text_agreement"]  # one network, one empty page
    assert "## Inpainting" in (run_dir / MARKDOWN_NAME).read_text(encoding="utf-8")
    with Image.open(run_dir / "sheets" / "inpainting.png") as sheet:
        assert sheet.width == 6 + 8 * (48 + 6)


def test_a_painter_leaves_what_is_known_and_paints_by_what_it_sees(run_dir: Path) -> None:
    other = DIGITS.images.flip(0)
    for painter in painters(run_dir, RECIPE):
        painted = painter.paint(RECIPE, DIGITS.images, MASKS, DIGITS.labels, SCALE, SEEDS)
        assert torch.equal(painted[MASKS == 0], DIGITS.images[MASKS == 0])
        beside = painter.paint(RECIPE, other, MASKS, DIGITS.labels, SCALE, SEEDS)
        assert not torch.equal(painted[MASKS == 1], beside[MASKS == 1])


def draw(pipeline: Pipeline, rows: list[Row]) -> torch.Tensor:
    while not rows[0].done:
        pipeline.step(rows)
    return torch.from_numpy(np.stack([row.latent for row in rows]))


def test_the_pipeline_draws_into_a_mask_as_the_trained_network_does(pipeline: Pipeline, run_dir: Path) -> None:
    manifest = pipeline.manifest
    assert manifest.sees_masks
    names = {spec.name for spec in manifest.graphs["step_2"].inputs}
    assert MASKED in names
    assert KNOWN not in names
    size, student = manifest.sizes[0], pipeline.student(2)
    conditions = pipeline.condition([str(int(label)) for label in DIGITS.labels])
    pixels = pipeline.decode(list(DIGITS.images.numpy()))
    areas = MASKS[:, 0].numpy().repeat(8, axis=1).repeat(8, axis=2) > 0
    known = pipeline.encode(list(pixels))
    behind = pipeline.encode([hide(image, area, size) for image, area in zip(pixels, areas, strict=True)])
    rows = [
        Drawing(manifest, student, c, SCALE, b).from_image(seed, k, 1.0, latent_mask(area, size))
        for c, b, seed, k, area in zip(conditions, behind, SEEDS, known, areas, strict=True)
    ]
    got = draw(pipeline, rows).clamp(-1, 1)
    want = seeing(run_dir).paint(RECIPE, torch.from_numpy(known), MASKS, DIGITS.labels, SCALE, SEEDS)
    torch.testing.assert_close(got[MASKS == 1], want[MASKS == 1], rtol=0, atol=2e-4)


def test_text_alone_is_a_mask_of_everything(pipeline: Pipeline, run_dir: Path) -> None:
    student, painter = pipeline.student(2), seeing(run_dir)
    blank = pipeline.blank(pipeline.manifest.sizes[0])
    assert blank is not None
    np.testing.assert_allclose(blank, HIDDEN, rtol=0, atol=1e-6)
    conditions = pipeline.condition([str(int(label)) for label in DIGITS.labels])
    got = draw(pipeline, [pipeline.start(c, SCALE, s, student) for c, s in zip(conditions, SEEDS, strict=True)])
    network = painter.student.network(painter.unet, SCALE)
    plan = painter.student.plan(RECIPE)
    want = sample(network, plan, class_condition(DIGITS.labels), SEEDS, painter.student.shape)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_row_without_what_its_network_sees_is_not_run(pipeline: Pipeline) -> None:
    condition = pipeline.condition(["1"])[0]
    row = Drawing(pipeline.manifest, pipeline.student(2), condition, SCALE).from_noise(1)
    with pytest.raises(ValueError, match=r"Pipeline\.blank"):
        pipeline.step([row])


def quality(agreement: float) -> EvaluationRow:
    metrics = {"inpaint_agreement": agreement, "text_agreement": 0.96, "hidden_agreement": 0.4}
    return EvaluationRow(
        model=SEEING,
        steps=4,
        evaluations=4,
        guidance_scale=2.0,
        metrics={name: Measured(mean=value, spread=0) for name, value in metrics.items()},
    )


@pytest.mark.parametrize(("agreement", "passed"), [(0.92, True), (0.90, False)])
def test_a_mask_is_no_excuse_to_disobey(agreement: float, passed: bool) -> None:
    (gate,) = task_gates({"inpainting": (quality(agreement),)})
    assert gate.passed is passed
