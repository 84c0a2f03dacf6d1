"""Evaluation of tiny untrained networks: what it measures, keeps, and writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill_jobs import cells
from distill_jobs.classifier import accuracy, classifier_of, split_digits, train_classifier
from distill_jobs.contenders import contenders
from distill_jobs.data.digits import Digits
from distill_jobs.errors import JobError
from distill_jobs.evaluate import evaluate_run
from distill_jobs.gates import Gate, gates
from distill_jobs.report import Report
from distill_jobs.sampling import Network
from engines.manifest import EvaluationRow
from tests.numerics.conftest import EvaluatedRun
from tests.support.quality import quality
from tests.support.tiny_run import spoil, tiny_recipe, tiny_student, write_tiny_run

RECIPE = tiny_recipe((2, 1))


def row(report: Report, model: str, steps: int, scale: float) -> EvaluationRow:
    return next(r for r in report.evaluation.rows if (r.model, r.steps, r.guidance_scale) == (model, steps, scale))


def test_the_classifier_is_accurate_and_depends_on_its_seed_alone() -> None:
    train, held_out = split_digits(Digits.load())
    assert (len(train), len(held_out)) == (1438, 359)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = train_classifier(train)
    assert torch.equal(before, torch.random.get_rng_state())
    assert accuracy(model, held_out) >= 0.98
    one, two = train_classifier(train, epochs=1), train_classifier(train, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_classifier_is_kept_and_read_back_equal(evaluated: EvaluatedRun) -> None:
    run = evaluated.path
    images = Digits.load().images[:50]
    first, again = classifier_of(run, Digits.load()), classifier_of(run, Digits.load())
    assert torch.equal(first(images)[0], again(images)[0])
    assert [f.suffix for f in (run / "classifier").iterdir()] == [".safetensors"]


def test_the_report_holds_every_contender_at_every_guidance(evaluated: EvaluatedRun) -> None:
    run, report = evaluated.path, evaluated.report
    expected = {
        (model, steps, steps * (2 if model == "teacher" and scale > 1 else 1), scale)
        for model, steps in [
            ("teacher", 16), ("teacher", 2), ("teacher", 1), ("stage one", 16), ("student", 2), ("student", 1)
        ]
        for scale in (1.0, 2.0)
    }  # fmt: skip
    rows = report.evaluation.rows
    assert {(r.model, r.steps, r.evaluations, r.guidance_scale) for r in rows} == expected
    assert Report.read(run) == report
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "Not FID" in text
    assert text.partition("## Quality")[2].count("| student |") == 4
    assert "## Gates" in text
    for measured in (r.metrics[name] for r in rows for name in cells.METRICS):
        assert np.isfinite(measured.mean)
        assert measured.spread >= 0


def test_the_reference_is_at_no_distance_from_itself(evaluated: EvaluatedRun) -> None:
    report = evaluated.report
    assert row(report, "teacher", 16, 1.0).metrics["paired_distance"].mean == 0
    assert row(report, "student", 1, 1.0).metrics["paired_distance"].mean > 0


def test_a_second_evaluation_measures_nothing_again(
    evaluated: EvaluatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, report = evaluated.path, evaluated.report

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(cells.Judge, "measure", never)
    again = evaluate_run(run, RECIPE)
    assert again.evaluation == report.evaluation
    assert again.timings == report.timings


def test_an_interrupted_evaluation_goes_on_and_a_new_student_is_measured_anew(
    evaluated: EvaluatedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated.path, run)
    shutil.rmtree(run / "evaluation" / "student-2-g2-s1")
    tiny_student(99).save_pretrained(run / "students" / "d1" / "unet")
    measured: list[str] = []
    original = cells.Judge.measure

    def counted(self: cells.Judge, cell: cells.Cell, network: Network, advance: object) -> cells.CellResult:
        measured.append(cell.key)
        return original(self, cell, network, advance)  # type: ignore[arg-type]

    monkeypatch.setattr(cells.Judge, "measure", counted)
    report = evaluate_run(run, RECIPE)
    ones = [f"student-1-g{scale}-s{seed}" for scale in (1, 2) for seed in (1, 2)]
    assert sorted(measured) == sorted([*ones, "student-2-g2-s1"])
    kept = row(evaluated.report, "student", 2, 2.0)
    assert row(report, "student", 2, 2.0) == kept


def test_sheets_have_a_row_per_model_and_a_column_per_guidance(evaluated: EvaluatedRun) -> None:
    run = evaluated.path
    assert sorted(f.name for f in (run / "sheets").iterdir()) == ["inpainting.png", "steps_1.png", "steps_2.png"]
    with Image.open(run / "sheets" / "steps_1.png") as sheet:
        block_width, block_height = 5 * 9 * 6, 2 * 9 * 6
        assert sheet.width == 150 + 2 * (block_width + 12)
        assert sheet.height == 28 + 3 * (block_height + 12)


def test_the_report_shows_a_curve_of_every_measure_and_the_best_students(evaluated: EvaluatedRun) -> None:
    text = (evaluated.path / "report.md").read_text(encoding="utf-8")
    pictures = sorted(file.name for file in (evaluated.path / "curves").iterdir())
    assert len(pictures) == 6
    assert all(f"](curves/{name})" in text for name in pictures)
    assert [(choice.steps, len(choice.candidates)) for choice in evaluated.report.choices] == [(2, 1), (1, 1)]
    assert "## Which student for which step count" in text


def test_a_missing_student_is_named(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path, RECIPE)
    shutil.rmtree(run / "students" / "d1")
    with pytest.raises(JobError, match=r"d1 holds no trained network"):
        contenders(run, RECIPE)


def test_a_student_that_gives_nan_is_named(evaluated: EvaluatedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated.path, run)
    spoil(run / "students" / "d1" / "unet")
    with pytest.raises(JobError, match="student-1-g1-s1: the network gives NaN"):
        evaluate_run(run, RECIPE)


def test_gates_compare_students_with_the_reference_teacher() -> None:
    rows = [
        quality("teacher", 64, 1.0, distance=2.0, agreement=0.96),
        quality("teacher", 1, 1.0, distance=50.0, agreement=0.5),
        quality("teacher", 64, 2.0, distance=10.0, agreement=0.98),
        quality("student", 4, 1.0, distance=2.9, agreement=0.955),
        quality("student", 4, 2.0, distance=11.5, agreement=0.98),
        quality("student", 1, 2.0, distance=19.0, agreement=0.965),
    ]
    found = {gate.name: gate for gate in gates(rows, 64)}
    verdicts = {name: (round(gate.value, 3), gate.passed) for name, gate in found.items()}
    assert verdicts == {
        "4-step distance / teacher's, guidance 1": (1.45, True),
        "4-step distance / teacher's, guidance 2": (1.15, False),
        "1-step distance / teacher's, guidance 2": (1.9, True),
        "4-step class agreement - teacher's, worst guidance": (-0.005, True),
        "1-step class agreement - teacher's, worst guidance": (-0.015, False),
        "teacher 64-step distance / its 1-step, guidance 1": (0.04, True),
        "teacher 64-step class agreement, guidance 1": (0.96, True),
    }


def test_a_gate_without_a_number_fails() -> None:
    assert not Gate(name="x", value=float("nan"), limit=1.0).passed
