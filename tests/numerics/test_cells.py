"""Results kept between evaluations: completed from their images, and taken from another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distill_jobs import cells, evaluate
from distill_jobs.evaluate import evaluate_run
from distill_jobs.sampling import Network
from distill_jobs.solvers import TITLES
from tests.numerics.conftest import EvaluatedRun
from tests.support.tiny_run import tiny_recipe, tiny_student


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the cells that are sampled; sheets are left out."""
    keys: list[str] = []
    original = cells.Judge.measure

    def counted(self: cells.Judge, cell: cells.Cell, network: Network, advance: object) -> cells.CellResult:
        keys.append(cell.key)
        return original(self, cell, network, advance)  # type: ignore[arg-type]

    monkeypatch.setattr(cells.Judge, "measure", counted)
    monkeypatch.setattr(evaluate, "write_sheets", lambda *_: None)
    return keys


@pytest.fixture
def copy(evaluated: EvaluatedRun, tmp_path: Path) -> EvaluatedRun:
    run = tmp_path / "run"
    shutil.copytree(evaluated.path, run)
    return EvaluatedRun(run, evaluated.recipe, evaluated.report)


def forget_diversity(run: Path, drop_images_of: str) -> None:
    """Make the results those of a time before diversity was measured, some without images."""
    for cell in (run / "evaluation").iterdir():
        result = json.loads((cell / "result.json").read_text())
        result["metrics"] = {k: v for k, v in result["metrics"].items() if k not in ("recall", "coverage")}
        del result["features"]
        (cell / "result.json").write_text(json.dumps(result))
        if cell.name.startswith(drop_images_of):
            (cell / "images.safetensors").unlink()


def test_a_measure_added_later_is_taken_from_the_images(copy: EvaluatedRun, measured: list[str]) -> None:
    forget_diversity(copy.path, drop_images_of="student-1-g2")
    report = evaluate_run(copy.path, copy.recipe)
    assert sorted(measured) == ["student-1-g2-s1", "student-1-g2-s2"]
    assert report.evaluation == copy.report.evaluation
    measured.clear()
    evaluate_run(copy.path, copy.recipe)
    assert measured == []


def test_a_reference_without_its_images_is_sampled_again(copy: EvaluatedRun, measured: list[str]) -> None:
    (copy.path / "evaluation" / "teacher-16-g1-s1" / "images.safetensors").unlink()
    report = evaluate_run(copy.path, copy.recipe)
    assert measured == ["teacher-16-g1-s1"]
    assert report.evaluation == copy.report.evaluation


def test_equal_cells_are_taken_from_another_run(
    evaluated: EvaluatedRun, copy: EvaluatedRun, measured: list[str]
) -> None:
    """The other run's student of 1 step is another network; its rows are measured, all others taken."""
    shutil.rmtree(copy.path / "evaluation")
    shutil.rmtree(copy.path / "classifier")
    tiny_student(99).save_pretrained(copy.path / "students" / "d1" / "unet")
    report = evaluate_run(copy.path, copy.recipe, lenders=[evaluated.path])
    assert sorted(measured) == [f"student-1-g{scale}-s{seed}" for scale in (1, 2) for seed in (1, 2)]
    taken = [row for row in evaluated.report.evaluation.rows if (row.model, row.steps) != ("student", 1)]
    assert [row for row in report.evaluation.rows if (row.model, row.steps) != ("student", 1)] == taken
    measured.clear()
    assert evaluate_run(copy.path, copy.recipe).evaluation == report.evaluation  # the other is not needed any more
    assert measured == []


def test_a_teacher_guided_elsewhere_is_measured_again_and_so_is_the_distance_to_it(
    copy: EvaluatedRun, measured: list[str]
) -> None:
    """Without guidance nothing changes: those cells are taken."""
    bounds = copy.recipe.guidance.model_copy(update={"log_snr_min": -2.0})
    evaluate_run(copy.path, copy.recipe.model_copy(update={"guidance": bounds}))
    assert {key.split("-g")[0] for key in measured} == {
        "teacher-16",
        "teacher-2",
        "teacher-1",
        "stage_one-16",
        "student-2",
        "student-1",
    }
    assert {key.split("-g")[1] for key in measured} == {"2-s1", "2-s2"}


def test_another_count_is_another_cell(evaluated: EvaluatedRun, copy: EvaluatedRun, measured: list[str]) -> None:
    fewer = copy.recipe.model_copy(
        update={"evaluation": copy.recipe.evaluation.model_copy(update={"samples": 20, "seeds": (1,)})}
    )
    shutil.rmtree(copy.path / "evaluation")
    evaluate_run(copy.path, fewer, lenders=[evaluated.path])
    assert len(measured) == 6 * 2


def test_solvers_of_diffusers_are_rows_of_the_teacher(copy: EvaluatedRun, measured: list[str]) -> None:
    solvers = {"solvers": ("ddim", "dpm-solver++"), "solver_steps": (4, 2)}
    recipe = copy.recipe.model_copy(
        update={"evaluation": tiny_recipe((2, 1)).evaluation.model_copy(update=solvers)}
    )
    report = evaluate_run(copy.path, recipe)
    assert len(measured) == 2 * 2 * 2 * 2
    rows = {(row.model, row.steps, row.guidance_scale): row.metrics for row in report.evaluation.rows}
    for scale in (1.0, 2.0):
        ours, stock = rows["teacher", 2, scale], rows[f"teacher, {TITLES['ddim']}", 2, scale]
        for name, value in ours.items():
            assert stock[name].mean == pytest.approx(value.mean, rel=1e-3, abs=1e-3), name
        of_four = [rows[f"teacher, {name}", 4, scale]["paired_distance"].mean for name in TITLES.values()]
        assert of_four[0] != pytest.approx(of_four[1], rel=1e-3)
