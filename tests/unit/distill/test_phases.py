"""What phases are asked for: guidance weights over the range, late timesteps, and which rows know their class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from distill_jobs.data.digits import NULL_CLASS, Digits, DigitsSource
from distill_jobs.draws import Draws
from distill_jobs.loop import Trainer
from distill_jobs.phases import LATE, Loss, Phases
from distill_jobs.processes import Processes
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sections import ComputeSection
from distill_jobs.signals import StopSignal
from distill_jobs.stage_one import train_teacher
from distill_jobs.stage_two import train_stage_two
from tests.support.tiny_recipe import OVERRIDES

ROWS = 4000


class Asked(nn.Module):
    """Stands in for a network: keeps the timesteps and classes that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.classes = torch.empty(0), torch.empty(0)

    def forward(self, x_t: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        self.t, self.classes = timestep, encoder_hidden_states[:, 0].argmax(dim=1)
        return (x_t,)


class Watched(Phases):
    """Evaluates each phase's loss once, and trains nothing. teacher, students: the networks, by phase."""

    def __init__(self, out: Path, *told: str) -> None:
        recipe = read_recipe("digits", [*OVERRIDES, *told])
        trainer = Trainer(
            Processes(ComputeSection(), out), out / "checkpoints", 5, 1, StopSignal(), Progress(disable=True)
        )
        super().__init__(recipe, RunFolder(out), trainer, DigitsSource(Digits.load()))
        self.teacher_asked, self.asked = Asked(), dict[str, Asked]()

    def frozen(self, folder: Path) -> nn.Module:
        self.teacher_asked = Asked()
        return self.teacher_asked

    def train(self, name: str, training: object, start: object, loss: Loss, *_: object, **__: object) -> None:
        self.asked[name] = Asked()
        loss(self.asked[name], Draws(0, name), 0, ROWS)


@pytest.mark.parametrize(("least", "most"), [(1.0, 5.0), (2.0, 10.0)])
def test_guidance_is_uniform_over_its_range_but_for_a_share_at_its_lowest(
    least: float, most: float, tmp_path: Path
) -> None:
    scales = f"guidance={{min: {least}, max: {most}, default: 3.0}}"
    phases = Watched(tmp_path, scales, "evaluation.guidance_scales=[3.0]")
    w = phases.weights(Draws(0, "stage_one"), 3, ROWS, 0.25)
    lowest = w == least - 1
    assert int(lowest.sum()) == ROWS // 4
    even = (torch.arange(ROWS * 3 // 4) + 0.5) / (ROWS * 3 // 4)
    torch.testing.assert_close(
        w[~lowest].sort().values, least - 1 + (most - least) * even, rtol=0, atol=(most - least) / ROWS
    )


def test_a_teacher_is_taught_late_timesteps_and_the_empty_class_by_their_shares(tmp_path: Path) -> None:
    section = "teacher={updates: 1, batch_size: 8, condition_dropout: 0.25, late_share: 0.4}"
    phases = Watched(tmp_path, section)
    train_teacher(phases)
    asked = phases.asked["teacher"]
    late = (asked.t >= LATE * phases.schedule.timesteps).float().mean()
    assert float(late) == pytest.approx(0.4 + 0.6 * (1 - LATE), abs=2e-3)
    own = phases._source.batch(Draws(0, "teacher"), 0, ROWS).condition.tokens[:, 0].argmax(dim=1)
    dropped = asked.classes == NULL_CLASS
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(asked.classes[~dropped], own[~dropped])


def test_of_two_networks_one_is_taught_the_classes_and_the_other_none(tmp_path: Path) -> None:
    halvings = "stage_two.halvings=[{steps: 4, updates: 1}]"
    phases = Watched(tmp_path, "stage_two.guidance=at_sampling", halvings, "export.students=[4]")
    taught: dict[str, list[set[int]]] = {}
    own = phases.train

    def train(name: str, *told: Any, **named: Any) -> None:
        own(name, *told, **named)
        both = (phases.asked[name], phases.teacher_asked)
        taught[name] = [set(each.classes.tolist()) for each in both]

    phases.train = train  # type: ignore[method-assign]
    train_stage_two(phases)
    assert taught == {"d4": [set(range(10))] * 2, "u4": [{NULL_CLASS}] * 2}
