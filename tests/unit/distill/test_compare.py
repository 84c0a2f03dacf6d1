"""Several runs in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from distill_jobs.cli import app
from distill_jobs.compare import Comparison, EvaluatedRun, compare_runs
from distill_jobs.errors import JobError, RecipeError, StorageError
from distill_jobs.pipelines.glyphs import TOP_1
from distill_jobs.pipelines.report import DISTANCE
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import read_recipe
from distill_jobs.report import Report
from engines.manifest import EvaluationRow
from tests.support.quality import quality, write_evaluated
from tests.support.tiny_run import tiny_recipe

SCALES = (1.0, 2.0)
TEACHER = tuple(quality("teacher", n, scale, paired=0.4 / n) for n in (16, 2) for scale in SCALES)


def students(paired: float, *more: str) -> tuple[object, ...]:
    models = ("stage one", "student", *more)
    return tuple(quality(model, n, scale, paired=paired) for model in models for n in (2, 1) for scale in SCALES)


def changed(**evaluation: object) -> Recipe:
    recipe = tiny_recipe((2, 1))
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=evaluation)})


def bounded() -> Recipe:
    recipe = tiny_recipe((2, 1))
    bounds = {"log_snr_min": -2.0, "log_snr_max": 3.0}
    return recipe.model_copy(update={"guidance": recipe.guidance.model_copy(update=bounds)})


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_evaluated(tmp_path / "plain", tiny_recipe((2, 1)), (*TEACHER, *students(0.06)))


def test_the_teacher_stands_once_and_rows_bear_their_runs_name(plain: Path, tmp_path: Path) -> None:
    solver = quality("teacher, DPM-Solver++", 4, 1.0)
    rows = (*TEACHER, solver, *students(0.05, "early"))
    write_evaluated(tmp_path / "other", tiny_recipe((2, 1)), rows)
    out = tmp_path / "out"
    arguments = ["compare", str(plain), f"finish={tmp_path / 'other'}", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    comparison = Comparison.model_validate_json((out / "comparison.json").read_bytes())
    assert [row for row in comparison.rows if row.model.startswith("teacher")] == [*TEACHER, solver]
    own = [row.model for row in comparison.rows if row.guidance_scale == 1 and row.steps == 2][1:]
    assert own == ["plain", "finish", "finish, early"]
    assert {choice.best for choice in comparison.choices} == {"finish"}
    text = (out / "comparison.md").read_text(encoding="utf-8")
    assert "| 1 | finish | 2 | 2 |" in text
    assert f"`python -m distill_jobs {' '.join(arguments)}`" in text
    pictures = sorted(file.name for file in (out / "curves").iterdir())
    assert all(f"(curves/{name})" in text for name in pictures)
    assert len(pictures) == 6
    with Image.open(out / "curves" / "recall.png") as picture:
        assert picture.width == 800  # a panel for 2 steps and one for 1


def test_runs_in_the_features_of_other_weights_are_not_compared(plain: Path, tmp_path: Path) -> None:
    """Both would be called Fréchet distance in CLIP features."""
    other = write_evaluated(tmp_path / "other", changed(), (*TEACHER, *students(0.05)))
    report = Report.read(other).model_copy(update={"features": "another"})
    report.write(other)
    with pytest.raises(JobError, match=r"evaluation\.features_path"):
        compare_runs([EvaluatedRun.read(str(plain)), EvaluatedRun.read(str(other))], tmp_path / "out")


@pytest.mark.parametrize(
    ("recipe", "teacher", "difference"),
    [
        (bounded(), "t", "where the teacher is guided differ: everywhere and from log-SNR -2 to 3"),
        (changed(samples=40), "t", "evaluation.samples differ: 30 and 40"),
        (changed(seeds=(1,)), "t", r"evaluation.seeds differ: \(1, 2\) and \(1,\)"),
        (changed(), "another", "they differ in the teacher's weights"),
        (tiny_recipe((2, 1)).model_copy(update={"clip": 1.0}), "t", "clip differ: None and 1.0"),
    ],
)
def test_what_cannot_be_compared_is_named(
    plain: Path, tmp_path: Path, recipe: Recipe, teacher: str, difference: str
) -> None:
    other = write_evaluated(tmp_path / "other", recipe, (*TEACHER, *students(0.05)), teacher)
    runs = [EvaluatedRun.read(str(plain)), EvaluatedRun.read(str(other))]
    with pytest.raises(JobError, match=f"plain and other cannot be compared: {difference}"):
        compare_runs(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_must_differ_and_folders_must_hold_evaluated_runs(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="different names"):
        compare_runs([EvaluatedRun.read(str(plain))] * 2, tmp_path / "out")
    with pytest.raises(JobError, match="'teacher' cannot be the name"):
        compare_runs([EvaluatedRun.read(f"{n}={plain}") for n in ("teacher", "b")], tmp_path / "out")
    with pytest.raises(RecipeError, match="not a run folder"):
        EvaluatedRun.read(str(tmp_path))
    (plain / "report.json").unlink()
    with pytest.raises(JobError, match="not evaluated yet"):
        EvaluatedRun.read(str(plain))


def test_a_report_of_other_teacher_steps_is_not_compared(plain: Path) -> None:
    (plain / "recipe.yaml").write_text(changed(teacher_steps=8).to_yaml(), encoding="utf-8")
    with pytest.raises(JobError, match=r"before its evaluation\.teacher_steps changed; run again"):
        EvaluatedRun.read(str(plain))


def test_runs_on_latents_are_compared_in_latents_and_in_the_tables_of_their_tasks(tmp_path: Path) -> None:
    recipe = read_recipe("sd15")
    steps = recipe.evaluation.teacher_steps

    def latent(*of: EvaluationRow) -> tuple[EvaluationRow, ...]:
        return tuple(row.model_copy(update={"metrics": {DISTANCE: row.metrics[DISTANCE]}}) for row in of)

    finest = latent(quality("teacher", steps, 2.0, paired=0))
    for name, paired in (("one", 0.2), ("two", 0.1)):
        rows = (*finest, *latent(quality("stage one", 4, 2.0), quality("student", 4, 2.0, paired=paired)))
        decoders = (quality("teacher", 50, 2.0), quality("teacher, tiny decoder", 50, 2.0))
        glyphs = (quality("teacher", steps, 2.0), quality("student", 4, 2.0))
        judged = tuple(
            row.model_copy(update={"metrics": {TOP_1: row.metrics["class_agreement"]}}) for row in glyphs
        )
        write_evaluated(tmp_path / name, recipe, rows, tasks={"glyphs": judged, "decoder": decoders})
    runs = [EvaluatedRun.read(str(tmp_path / name)) for name in ("one", "two")]
    compared = compare_runs(runs, tmp_path / "out")
    assert [row.model for row in compared.rows] == ["teacher", "one", "two"]
    assert [(choice.best, choice.candidates[0].agreement_lead) for choice in compared.choices] == [("two", 0.0)]
    assert [row.model for row in compared.tasks["glyphs"]] == ["teacher", "one", "two"]
    of_decoders = [row.model for row in compared.tasks["decoder"]]
    assert of_decoders == ["teacher", "one, teacher, tiny decoder", "two, teacher, tiny decoder"]
    page = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "| 4 | two | 0.1000 | +0.000 | **best** |" in page
    assert "final latents" in page
    assert "digit" not in page
    assert "## Glyphs" in page
    (tmp_path / "two" / "glyph_encoder").mkdir()
    (tmp_path / "two" / "glyph_encoder" / "model.safetensors").write_bytes(b"another judge")
    with pytest.raises(JobError, match="they differ in the glyph encoder"):
        compare_runs([EvaluatedRun.read(str(tmp_path / name)) for name in ("one", "two")], tmp_path / "out")


def test_a_report_that_cannot_be_written_leaves_the_one_before(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = (plain / "report.json").read_bytes(), Path.write_text

    def full(self: Path, data: str, *args: Any, **rest: Any) -> int:
        if "report.json" in self.name:
            write(self, data[:100], *args, **rest)
            raise OSError(28, "No space left on device")
        return write(self, data, *args, **rest)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="No space left"):
        EvaluatedRun.read(str(plain)).report.write(plain)
    assert (plain / "report.json").read_bytes() == before
