"""Rows at larger guidance count less, where there is guidance in what they learn, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from distill_jobs import finish, stage_one, stage_two
from distill_jobs.data.digits import Digits, DigitsSource
from distill_jobs.draws import Draws
from distill_jobs.halving import HalvingTables
from distill_jobs.loop import Trainer
from distill_jobs.objectives import Noisy
from distill_jobs.phases import Loss, Phases
from distill_jobs.processes import Processes
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sections import ComputeSection
from distill_jobs.signals import StopSignal
from distill_jobs.student import new_teacher, save_stock, student_of
from engines.schedule import NoiseSchedule
from tests.support.tiny_recipe import OVERRIDES

BOUNDS = ["guidance.log_snr_min=-2.0", "guidance.log_snr_max=0.5"]
"""Of the teacher of 8 steps they leave 499, 624 and 749 guided: of 4 steps those from 499 and 749."""

CHAIN = ["stage_two.halvings=[{steps: 4, updates: 6}, {steps: 2, updates: 6}]", "export.students=[4, 2]"]
Seen = dict[tuple[str, int], set[bool]]
"""Whether rows with guidance counted less, by phase and timestep."""


class Watched(Phases):
    """Evaluates each phase's loss on rows whose own losses are 1, and trains nothing."""

    def __init__(self, out: Path, *told: str) -> None:
        recipe = read_recipe("digits", [*OVERRIDES, *CHAIN, *BOUNDS, *told])
        progress = Progress(disable=True)
        trainer = Trainer(Processes(ComputeSection(), out), out / "checkpoints", 5, 1, StopSignal(), progress)
        super().__init__(recipe, RunFolder(out), trainer, DigitsSource(Digits.load()))
        self.seen, self._at = Seen(), Tensor()
        teacher = new_teacher(recipe.unet, recipe.seed)
        save_stock(self.folder.teacher, teacher, self.schedule, recipe.clip)
        for folder in (self.folder.stage_one, self.folder.student(4)):
            save_stock(folder, student_of(teacher), self.schedule, recipe.clip)

    def noisy(self, *told: Any, **named: Any) -> Noisy:
        rows = super().noisy(*told, **named)
        self._at = rows.t
        return rows

    def train(self, name: str, training: object, start: object, loss: Loss, *_: object, **__: object) -> None:
        for update in range(4):
            rows = loss(torch.nn.Identity(), Draws(0, name), update, 32)
            assert rows.w is not None
            for t, w, each in zip(self._at.tolist(), rows.w.tolist(), rows.loss.tolist(), strict=True):
                assert each == pytest.approx(1.0) or each == pytest.approx((1 + w) ** -2)
                if w > 0.1:
                    self.seen.setdefault((name, t), set()).add(each < 0.9)

    @property
    def off(self) -> frozenset[int]:
        return self.recipe.guidance.off(NoiseSchedule(self.recipe.schedule))


@pytest.fixture(autouse=True)
def losses_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*told: Any) -> Tensor:
        [rows] = (each for each in told if isinstance(each, Noisy))
        return torch.ones(len(rows.t))

    monkeypatch.setattr(stage_two, "target_loss", ones)
    monkeypatch.setattr(stage_one, "stage_one_loss", ones)
    monkeypatch.setattr(stage_one, "_gate", lambda *_: None)
    monkeypatch.setattr(finish, "consistency_loss", ones)


def halve(phases: Watched) -> Seen:
    section, source = phases.recipe.stage_two, phases.folder.stage_one
    if section.weights == "shared":
        stage_two._learn_grid(phases, source, section.steps, section.halvings[-1])
        return phases.seen
    chain = stage_two.Chain("d", section, HalvingTables.of, source, lambda n: phases.folder.path / f"to-be-{n}")
    for halving in section.halvings:
        stage_two._halve(phases, chain, halving, source)
    return phases.seen


def test_in_a_halving_by_the_stretch_of_a_step(tmp_path: Path) -> None:
    of_four = {("d4", 249): {False}, ("d4", 499): {True}, ("d4", 749): {True}, ("d4", 999): {False}}
    seen = halve(Watched(tmp_path, "stage_two.w_power=2.0"))
    assert seen == {**of_four, ("d2", 499): {True}, ("d2", 999): {True}}


def test_with_shared_weights_by_that_of_each_grid(tmp_path: Path) -> None:
    seen = halve(Watched(tmp_path, "stage_two.w_power=2.0", "stage_two.weights=shared"))
    assert seen == {("d2", 249): {False}, ("d2", 499): {True}, ("d2", 749): {True}, ("d2", 999): {False, True}}


@pytest.mark.parametrize("weights", ["separate", "shared"])
def test_a_chain_of_one_guidance_divides_all_rows_alike(weights: str, tmp_path: Path) -> None:
    told = ("stage_two.w_power=2.0", "stage_two.guidance=4.0", f"stage_two.weights={weights}")
    seen = halve(Watched(tmp_path, *told))
    assert seen
    assert all(less == {True} for less in seen.values())


def test_in_stage_one_where_there_is_guidance(tmp_path: Path) -> None:
    phases = Watched(tmp_path, "stage_one.w_power=2.0")
    stage_one.train_stage_one(phases)
    assert {t in phases.off for _, t in phases.seen} == {False, True}
    assert all(less == {t not in phases.off} for (_, t), less in phases.seen.items())


def test_in_consistency_where_some_is_ahead(tmp_path: Path) -> None:
    finish_of_four = "consistency={source: 4, grid: 4, students: [2], updates: 4, w_power: 2.0}"
    phases = Watched(tmp_path, finish_of_four)
    finish.train_consistency(phases)
    assert {t: less for (_, t), less in phases.seen.items()} == {
        249: {False},
        499: {True},
        749: {True},
        999: {True},
    }
