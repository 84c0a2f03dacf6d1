"""The gate of stage one: the same rows however they are split, and no more at a time than training has."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.progress import Progress
from torch import Tensor, nn

from distill_jobs.data.digits import Digits, DigitsSource
from distill_jobs.draws import Draws
from distill_jobs.errors import DivergedError
from distill_jobs.loop import Trainer
from distill_jobs.objectives import Noisy
from distill_jobs.phases import Phases
from distill_jobs.processes import Processes
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sections import ComputeSection
from distill_jobs.signals import StopSignal
from distill_jobs.stage_one import equal_parts, guidance_errors, train_stage_one
from distill_jobs.student import new_teacher, student_of
from tests.support.tiny_recipe import OVERRIDES


class Watched(Phases):
    """Keeps the number of rows of each call."""

    seen: list[int]

    def noisy(
        self, draws: Draws, update: int, batch: int, t: Tensor | None = None, late_share: float = 0.0
    ) -> Noisy:
        self.seen.append(batch)
        return super().noisy(draws, update, batch, t, late_share)


def phases_of(out: Path, *overrides: str) -> Watched:
    processes = Processes(ComputeSection(), out)
    trainer = Trainer(processes, out / "checkpoints", 5, 1, StopSignal(), Progress(disable=True))
    recipe = read_recipe("digits", [*OVERRIDES, *overrides])
    phases = Watched(recipe, RunFolder(out), trainer, DigitsSource(Digits.load()))
    phases.seen = []
    return phases


def test_the_gate_sees_the_same_rows_in_the_parts_that_training_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = phases_of(tmp_path)
    teacher: nn.Module = new_teacher(whole.recipe.unet, 0)
    student = student_of(new_teacher(whole.recipe.unet, 1))
    errors = guidance_errors(whole, student, teacher)
    assert whole.seen == [8] * 8
    parts = phases_of(tmp_path, "stage_one.accumulate=2")
    monkeypatch.setattr(Processes, "count", 2)
    split = guidance_errors(parts, student, teacher)
    assert parts.seen == [2] * 32
    assert split == pytest.approx(errors, rel=1e-5)


def test_the_gate_asks_for_guidance_where_the_teacher_has_it(tmp_path: Path) -> None:
    """A new student is the teacher without guidance, and is far off it where that is guided."""
    errors = {}
    for name, bounds in {
        "all": [],
        "some": ["guidance.log_snr_max=0"],
        "last": ["guidance.log_snr_max=-15"],
    }.items():
        phases = phases_of(tmp_path / name, *bounds)
        teacher = new_teacher(phases.recipe.unet, 0)
        errors[name] = guidance_errors(phases, student_of(teacher), teacher)[5.0]
    assert errors["all"] > 1.5 * errors["some"] > 0
    assert errors["some"] > 20 * errors["last"]


@pytest.mark.parametrize(("rows", "least", "parts"), [(512, 3, 4), (8, 1, 1), (8, 8, 8), (4, 9, 4)])
def test_parts_are_equal_and_as_few_as_may_be(rows: int, least: int, parts: int) -> None:
    assert equal_parts(rows, least) == parts


def test_an_error_that_is_no_number_is_refused(tmp_path: Path) -> None:
    phases = phases_of(tmp_path)
    phases.folder.gate.write_text('{"relative_v_error": {"1": 0.01, "2": NaN, "3": 0.02}}', encoding="utf-8")
    with pytest.raises(DivergedError, match="relative v-error nan at guidance_scale 2"):
        train_stage_one(phases)
