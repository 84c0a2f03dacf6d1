"""Encoder students: what they learn, and the job that trains them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from distill_jobs.data.digits import class_condition
from distill_jobs.errors import RecipeError
from distill_jobs.halving import HalvingTables, two_step_target
from distill_jobs.job import run_job
from distill_jobs.objectives import Noisy, network_v
from distill_jobs.plan import plan_of
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder, training_seconds
from distill_jobs.student import predict
from engines.sampler import encoder_plan
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support.job_process import JobRun
from tests.support.tiny_recipe import OVERRIDES
from tests.support.tiny_run import tiny_student

B = 4
SCHEDULE = NoiseSchedule(ScheduleSpec())
ENCODER = [
    *OVERRIDES,
    "teacher.updates=4",
    "stage_one.updates=4",
    "stage_two.halvings=[{steps: 4, updates: 3}, {steps: 2, updates: 3}]",
    "export.students=[4, 2]",
    "export.default_steps=2",
    "encoder={halvings: [{steps: 4, updates: 9}, {steps: 2, updates: 6}], students: [4, 2], batch_size: 8}",
]
KILLED_AT = 30
FOLDERS = ("encoders/e4", "encoders/e2")


def weights(run: Path) -> dict[str, bytes]:
    return {f: (run / f / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for f in FOLDERS}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return read_recipe("digits", ENCODER)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_job(recipe, tmp_path_factory.mktemp("run") / "whole", resume=False, progress=Progress(disable=True))


@pytest.mark.parametrize("n", [1, 2, 8])
def test_one_encoder_step_on_the_target_lands_where_two_of_its_teacher_do(n: int) -> None:
    teacher, tables, w = tiny_student(0), HalvingTables.encoding(SCHEDULE, n), torch.linspace(0, 4, B)
    fine, coarse = encoder_plan(SCHEDULE, 2 * n).steps, encoder_plan(SCHEDULE, n).steps
    generator = torch.Generator().manual_seed(n)
    condition, null = class_condition(torch.arange(B)), class_condition(torch.full((B,), 10))
    assert tables.t.tolist() == [step.timestep for step in coarse]
    for j, whole in enumerate(coarse):
        z = torch.randn(B, 1, 8, 8, generator=generator)
        at = Noisy(z, condition, null, z, tables.t[torch.full((B,), j)])
        with torch.no_grad():
            target = two_step_target(partial(network_v, teacher, w=w), tables, z, at, torch.full((B,), j))
            want = z
            for step in fine[2 * j : 2 * j + 2]:
                timestep = torch.full((B,), float(step.timestep))
                want, _ = step.apply(want, predict(teacher, want, timestep, condition, w))
        got, _ = whole.apply(z, target)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_every_halving_of_the_encoder_changes_the_network_and_records_its_seconds(finished: RunFolder) -> None:
    assert len(set(weights(finished.path).values())) == len(FOLDERS)
    assert set(training_seconds(finished)) == {"teacher", "stage_one", "d4", "d2", "e4", "e2"}
    assert not (finished.path / "checkpoints").exists()


@pytest.mark.long
def test_a_job_killed_among_its_encoders_ends_in_the_same_bytes(finished: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished.path, out)
    shutil.rmtree(out / "encoders")
    killed = JobRun(out, ENCODER, dies_at=KILLED_AT)
    assert killed.exit_code() == -9
    assert killed.last_report[0] == "e4"
    run_job(read_recipe("digits", ENCODER), out, resume=True, progress=Progress(disable=True))
    assert weights(out) == weights(finished.path)


def test_the_plan_counts_the_encoders(recipe: Recipe) -> None:
    assert [phase.name for phase in plan_of(recipe).phases] == ["teacher", "stage_one", "d4", "d2", "e4", "e2"]


FROM_512 = json.dumps([{"steps": 2**k, "updates": 1} for k in range(9, 2, -1)])


@pytest.mark.parametrize(
    ("encoder", "named"),
    [
        ("{halvings: [{steps: 4, updates: 1}], students: [2]}", "not among"),
        ("{halvings: [{steps: 8, updates: 1}, {steps: 2, updates: 1}], students: [2]}", "must halve"),
        ("{halvings: [{steps: 8, updates: 1, newest_share: 0.9}], students: [8]}", "weights: shared"),
        (f"{{halvings: {FROM_512}, students: [8]}}", "finer than"),
        ("{students: [8]}", "encoder.halvings"),
        ("{halvings: [{steps: 64, updates: 1}], students: [64]}", "no student of as many steps"),
    ],
)
def test_a_wrong_encoder_section_is_refused_by_name(encoder: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        read_recipe("digits", [f"encoder={encoder}"])


def test_an_encoder_of_a_stochastic_chain_is_refused() -> None:
    section = "encoder={halvings: [{steps: 8, updates: 1}], students: [8]}"
    with pytest.raises(RecipeError, match="deterministic"):
        read_recipe("digits-stochastic", [section])
