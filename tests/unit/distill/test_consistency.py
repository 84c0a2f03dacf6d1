"""Consistency: exact where the exact solution is known, its average the very one in training, exactly resumed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from distill_jobs.consistency import ConsistencyTables, consistency_loss, pseudo_huber
from distill_jobs.data.source import Condition
from distill_jobs.draws import Draws
from distill_jobs.job import run_job
from distill_jobs.objectives import Noisy, Tables
from distill_jobs.processes import Processes
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import training_seconds
from distill_jobs.sections import ComputeSection, Training
from distill_jobs.state import Phase, RowLoss, TrainingState
from engines.schedule import CLEAN, NoiseSchedule, ScheduleSpec
from tests.support.job_process import JobRun
from tests.support.tiny_recipe import OVERRIDES
from tests.support.tiny_run import tiny_student

SCHEDULE = NoiseSchedule(ScheduleSpec())
FINISH = [
    *OVERRIDES,
    "stage_two.halvings=[{steps: 4, updates: 3}]",
    "consistency={source: 4, grid: 4, students: [2, 1], updates: 12, batch_size: 8, ema: 0.9}",
    "export={name: tiny, students: [4], default_steps: 4}",
]
W, HUBER = 3.0, 1e-3
MEAN, SPREAD = (1 + W) * 0.4 - W * 0.1, 0.5  # of class data N(0.4, s²) among N(0.1, s²), guided


class OnPath(nn.Module):
    """Exact for Gaussian data: on z_t = alpha·m + √(alpha²s² + sigma²)·ξ the v that one step leads to ``target``.

    target: the table index to land on, by table index; CLEAN everywhere makes it the consistency function.
    """

    def __init__(self, target: dict[int, int]) -> None:
        super().__init__()
        self.target = target

    def forward(self, z: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        rows = [self._v(row, int(k)) for row, k in zip(z.double(), timestep, strict=True)]
        return (torch.stack(rows).float(),)

    def _v(self, z: Tensor, here: int) -> Tensor:
        there = self.target.get(here, CLEAN)
        angle = SCHEDULE.angle(here) - SCHEDULE.angle(there)
        xi = (z - SCHEDULE.at(here)[0] * MEAN) / spread(here)
        landed = SCHEDULE.at(there)[0] * MEAN + spread(there) * xi
        return (math.cos(angle) * z - landed) / math.sin(angle)


def spread(index: int) -> float:
    alpha, sigma = SCHEDULE.at(index)
    return float((alpha**2 * SPREAD**2 + sigma**2) ** 0.5)


@pytest.mark.parametrize("points", [4, 64])
def test_the_exact_solution_is_where_training_stays(points: int) -> None:
    grid = SCHEDULE.grid(points)
    chain = OnPath(dict(zip(grid[1:], grid[:-1], strict=True)))
    ends = OnPath({max(k, 0): CLEAN for k in grid})
    tables, generator = ConsistencyTables.of(SCHEDULE, points), torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, points, 1, 8, 8, generator=generator).unbind()
    point = torch.arange(points)
    condition = Condition(torch.zeros(points, 1, 16))
    rows = Noisy(x, condition, condition, noise, tables.t[point])
    w = torch.full((points,), W)

    def loss(student: nn.Module, average: nn.Module) -> Tensor:
        found = consistency_loss(student, average, chain, Tables.of(SCHEDULE), tables, rows, point, w, HUBER)
        return found.detach()

    assert float(loss(ends, ends).max()) < 1e-6
    assert float(loss(chain, ends)[1:].min()) > 1e-3  # one step of the chain does not reach the end
    assert float(loss(chain, chain)[0]) < 1e-6  # but from the last point


def test_the_loss_is_quadratic_below_its_width_and_linear_above() -> None:
    zero = torch.zeros(1, 1, 8, 8)
    assert float(pseudo_huber(zero + 1e-3, zero, 0.1)) == pytest.approx(1e-6 / 0.2, rel=1e-3)
    assert float(pseudo_huber(zero + 10, zero, 0.1)) == pytest.approx(9.9, rel=1e-3)


@pytest.mark.parametrize("ema", [0.5, None])
def test_the_average_is_the_one_in_training(ema: float | None, tmp_path: Path) -> None:
    """After updates and after a restore it holds what the checkpoint calls the average."""
    average, seen = tiny_student(0), []

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        seen.append(float(average.conv_out.bias))
        bias = network.get_parameter("conv_out.bias")
        return RowLoss((bias - 1.0).square().expand(batch))

    training = Training(updates=4, batch_size=2, ema=ema, lr=0.1, warmup=0)
    phase = Phase("toy", training, tiny_student(0), Draws(0, "toy"), loss, average)
    state = TrainingState(phase, Processes(ComputeSection(), tmp_path))
    start = state.tensors()
    for _ in range(3):
        state.advance()
        tensors, names = state.tensors(), [name for name, _ in phase.network.named_parameters()]
        kept = tensors[f"ema.{names.index('conv_out.bias')}" if ema else "network.conv_out.bias"]
        assert float(average.conv_out.bias) == float(kept)
    assert len(set(seen)) == 3
    assert start.keys() <= state.tensors().keys()


@pytest.mark.long
def test_a_killed_finish_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """Its average, from which its targets come, is taken up again too."""
    quiet = Progress(disable=True)
    whole = run_job(read_recipe("digits", FINISH), tmp_path / "whole", resume=False, progress=quiet)
    assert set(training_seconds(whole)) == {"teacher", "stage_one", "d4", "consistency"}
    told = json.loads((whole.consistency / "student.json").read_text())
    asked = read_recipe("digits", FINISH).guidance.model_dump()
    steps = [4, 2, 1]  # all that its grid allows, bundled or not
    assert told == {"sampler": "consistency", "steps": steps, "guidance_scale": asked}
    out = tmp_path / "killed"
    shutil.copytree(whole.path, out)
    shutil.rmtree(out / "consistency")
    for event in (30, 40):
        attempt = JobRun(out, FINISH, dies_at=event)
        assert attempt.exit_code() == -9
        assert attempt.last_report[0] == "consistency"
    assert JobRun(out, FINISH).exit_code() == 0
    weights = Path("consistency") / "unet" / "diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (whole.path / weights).read_bytes()
