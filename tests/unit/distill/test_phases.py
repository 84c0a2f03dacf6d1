"""What phases train: from which network, at which guidance and timesteps, and which rows know their class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from distill_jobs import stage_one
from distill_jobs.data.digits import NULL_CLASS, Digits, DigitsSource
from distill_jobs.draws import Draws
from distill_jobs.loop import Trainer
from distill_jobs.phases import LATE, Loss, Phases
from distill_jobs.processes import Processes
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sections import ComputeSection
from distill_jobs.signals import StopSignal
from distill_jobs.stage_two import train_encoders, train_stage_two
from distill_jobs.student import load_stock
from tests.support.tiny_recipe import OVERRIDES
from tests.support.tiny_run import tiny_recipe, write_tiny_run

ROWS, LAYER = 4000, "conv_in.weight"


class Asked(nn.Module):
    """Stands in for a network: keeps the timesteps and classes that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.classes = torch.empty(0), torch.empty(0)

    def forward(self, x_t: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        self.t, self.classes = timestep, encoder_hidden_states[:, 0].argmax(dim=1)
        return (x_t,)


class Watched(Phases):
    """Evaluates each phase's loss once, and trains nothing.

    asked, teachers: the networks, and those that they learn from, by phase; followed: the folders of the latter.
    """

    def __init__(self, out: Path, recipe: Recipe) -> None:
        trainer = Trainer(
            Processes(ComputeSection(), out), out / "checkpoints", 5, 1, StopSignal(), Progress(disable=True)
        )
        super().__init__(recipe, RunFolder(out), trainer, DigitsSource(Digits.load()))
        self.asked, self.teachers = dict[str, Asked](), dict[str, Asked]()
        self.begun, self.followed = dict[str, Tensor](), dict[str, Path]()
        self._frozen = Asked(), out

    def frozen(self, folder: Path) -> nn.Module:
        self._frozen = Asked(), folder
        return self._frozen[0]

    def train(
        self,
        name: str,
        training: object,
        start: Callable[[], nn.Module],
        loss: Loss,
        *_: object,
        **__: object,
    ) -> None:
        self.asked[name], (self.teachers[name], self.followed[name]) = Asked(), self._frozen
        if self.followed[name].is_dir():
            self.begun[name] = start().get_parameter(LAYER)
        loss(self.asked[name], Draws(0, name), 0, ROWS)


def watched(out: Path, *told: str) -> Watched:
    return Watched(out, read_recipe("digits", [*OVERRIDES, *told]))


@pytest.mark.parametrize(("least", "most"), [(1.0, 5.0), (2.0, 10.0)])
def test_guidance_is_uniform_over_its_range_but_for_a_share_at_its_lowest(
    least: float, most: float, tmp_path: Path
) -> None:
    scales = f"guidance={{min: {least}, max: {most}, default: 3.0}}"
    phases = watched(tmp_path, scales, "evaluation.guidance_scales=[3.0]")
    w = phases.weights(Draws(0, "stage_one"), 3, ROWS, 0.25)
    lowest = w == least - 1
    assert int(lowest.sum()) == ROWS // 4
    even = (torch.arange(ROWS * 3 // 4) + 0.5) / (ROWS * 3 // 4)
    torch.testing.assert_close(
        w[~lowest].sort().values, least - 1 + (most - least) * even, rtol=0, atol=(most - least) / ROWS
    )


def test_a_teacher_is_taught_late_timesteps_and_the_empty_class_by_their_shares(tmp_path: Path) -> None:
    section = "teacher={updates: 1, batch_size: 8, condition_dropout: 0.25, late_share: 0.4}"
    phases = watched(tmp_path, section)
    stage_one.train_teacher(phases)
    asked = phases.asked["teacher"]
    late = (asked.t >= LATE * phases.schedule.timesteps).float().mean()
    assert float(late) == pytest.approx(0.4 + 0.6 * (1 - LATE), abs=2e-3)
    own = phases._source.batch(Draws(0, "teacher"), 0, ROWS).condition.tokens[:, 0].argmax(dim=1)
    dropped = asked.classes == NULL_CLASS
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(asked.classes[~dropped], own[~dropped])


def test_stage_one_learns_late_timesteps_by_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_one, "_gate", lambda *_: None)
    phases = watched(tmp_path, "stage_one={updates: 1, batch_size: 8, late_share: 0.4}")
    stage_one.train_stage_one(phases)
    late = (phases.asked["stage_one"].t >= LATE * phases.schedule.timesteps).float().mean()
    assert float(late) == pytest.approx(0.4 + 0.6 * (1 - LATE), abs=2e-3)


def test_of_two_networks_one_is_taught_the_classes_and_the_other_none(tmp_path: Path) -> None:
    halvings = "stage_two.halvings=[{steps: 4, updates: 1}]"
    phases = watched(tmp_path, "stage_two.guidance=at_sampling", halvings, "export.students=[4]")
    train_stage_two(phases)
    both = (phases.asked, phases.teachers)
    taught = {name: [set(each[name].classes.tolist()) for each in both] for name in phases.asked}
    assert taught == {"d4": [set(range(10))] * 2, "u4": [{NULL_CLASS}] * 2}


def test_every_network_of_a_chain_begins_as_the_one_that_it_learns_from(tmp_path: Path) -> None:
    chains = {"encoder": {"halvings": [{"steps": n, "updates": 1} for n in (4, 2)], "students": (2,)}}
    recipe = Recipe.model_validate(tiny_recipe((4, 2, 1)).model_dump() | chains)
    phases = Watched(write_tiny_run(tmp_path, recipe), recipe)
    train_stage_two(phases)
    train_encoders(phases)
    folder = phases.folder
    assert phases.followed == {
        "d4": folder.stage_one,
        "d2": folder.student(4),
        "d1": folder.student(2),
        "e4": folder.stage_one,
        "e2": folder.encoder(4),
    }
    for name, source in phases.followed.items():
        assert torch.equal(phases.begun[name], load_stock(source).get_parameter(LAYER))
    assert len({tensor.sum().item() for tensor in phases.begun.values()}) == 4
