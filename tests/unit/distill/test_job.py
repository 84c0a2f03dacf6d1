"""The job as a job: it resumes to the same bytes, stops cleanly, and refuses what it must."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from typer.testing import CliRunner

from distill_jobs.cli import app
from distill_jobs.errors import DivergedError, LockedError, RecipeError
from distill_jobs.job import run_job
from distill_jobs.loop import Trainer, loss_by_w
from distill_jobs.processes import Processes
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder, stored_recipe, training_seconds
from distill_jobs.state import Phase, RowLoss
from distill_jobs.taken import takeable
from tests.support.tiny_recipe import OVERRIDES, PHASES, weights_of


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return read_recipe("digits", OVERRIDES)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_job(recipe, tmp_path_factory.mktemp("run") / "whole", resume=False, progress=Progress(disable=True))


def test_each_phase_changes_the_network_and_records_its_seconds(finished: RunFolder) -> None:
    assert len(set(weights_of(finished.path).values())) == len(PHASES)
    assert set(training_seconds(finished)) == {"teacher", "stage_one", "d4", "d2", "d1"}


def test_tensorboard_gets_the_loss_of_each_w_bin(recipe: Recipe) -> None:
    rows = RowLoss(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0.0, 0.5, 4.0, 4.0]))
    assert loss_by_w(rows) == {"w_zero": 1.0, "w_bin0": 2.0, "w_bin3": 4.0}


def test_a_started_folder_is_not_started_again(recipe: Recipe, finished: RunFolder) -> None:
    with pytest.raises(RecipeError, match="--resume"):
        run_job(recipe, finished.path, resume=False, progress=Progress(disable=True))


def test_a_changed_recipe_is_refused_by_field(finished: RunFolder) -> None:
    other = read_recipe("digits", [*OVERRIDES, "teacher.lr=0.5"])
    with pytest.raises(RecipeError, match=r"teacher\.lr"):
        run_job(other, finished.path, resume=True, progress=Progress(disable=True))


def test_what_no_phase_depends_on_may_change(recipe: Recipe, finished: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.recipe.write_bytes(finished.recipe.read_bytes())
    folder.teacher.mkdir()
    changes = ["export.description=two", "evaluation.samples=20", "stage_one.max_relative_error=9"]
    changes += [f"{section}.accumulate=2" for section in ("teacher", "stage_one", "stage_two")]
    changes += ["compute.gradient_checkpointing=true"]
    other = read_recipe("digits", [*OVERRIDES, *changes])
    folder.take_up(other, resume=True)
    assert stored_recipe(folder) == other != recipe


def test_a_run_that_ended_before_it_made_anything_takes_another_recipe(recipe: Recipe, tmp_path: Path) -> None:
    folder, other = RunFolder(tmp_path), read_recipe("digits", [*OVERRIDES, "teacher.lr=0.5"])
    folder.take_up(recipe, resume=False)
    folder.machine.write_text("{}")
    (tmp_path / "tensorboard").mkdir()
    folder.take_up(other, resume=False)
    assert stored_recipe(folder) == other
    assert not folder.machine.exists()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RecipeError, match="--resume"):
        folder.take_up(recipe, resume=False)
    with pytest.raises(RecipeError, match=r"teacher\.lr; .*--from"):
        folder.take_up(recipe, resume=True)


@pytest.mark.parametrize("left", ["checkpoints/teacher/00000010/weights", "students/d4/phase.json"])
def test_phases_without_their_recipe_are_not_gone_on_with(left: str, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).write_text('{"name": "d4", "updates": 10, "seconds": 1.0}')
    for resume in (False, True):
        with pytest.raises(RecipeError, match=r"phases but no recipe\.yaml"):
            RunFolder(tmp_path).take_up(recipe, resume=resume)
    assert not RunFolder(tmp_path).recipe.exists()


def test_batches_are_checked_before_any_phase_starts(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "count", property(lambda _: 3))
    monkeypatch.setattr(Processes, "first", lambda _, work: work())
    last = read_recipe("digits", [*OVERRIDES, "teacher.batch_size=9", "stage_one.batch_size=9"])
    with pytest.raises(RecipeError, match=r"stage_two\.batch_size 8 cannot be shared equally by 3 processes"):
        run_job(last, tmp_path / "run", resume=False, progress=Progress(disable=True))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_command_lists_changed_fields_and_computes_nothing(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("it trained"))
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.name != ".lock"}
    sets = [*OVERRIDES, "teacher.lr=0.5", "seed=4"]
    command = ["run", "digits", "--out", str(finished.path), "--resume"]
    result = CliRunner().invoke(app, [*command, *(part for override in sets for part in ("--set", override))])
    assert result.exit_code == 2
    assert "seed, teacher.lr" in result.stderr
    assert before == {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.name != ".lock"}


def test_the_command_of_a_second_job_exits_3(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked():
        result = CliRunner().invoke(app, ["run", "digits", "--out", str(tmp_path / "run")])
    assert result.exit_code == 3
    assert "another job works in" in result.stderr


def test_two_jobs_do_not_share_a_folder(recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(LockedError):
        run_job(recipe, folder.path, resume=False, progress=Progress(disable=True))


def test_a_loss_that_stays_infinite_stops_the_job(tmp_path: Path) -> None:
    wild = read_recipe("digits", [*OVERRIDES, "teacher={updates: 50, batch_size: 8, lr: 1.0e+30, warmup: 0}"])
    with pytest.raises(DivergedError, match="not finite"):
        run_job(wild, tmp_path / "run", resume=False, progress=Progress(disable=True))
    assert not (tmp_path / "run" / "teacher").exists()


def test_stage_one_that_misses_its_gate_stops_before_any_halving(
    recipe: Recipe, finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on, without training stage one again, where more error is allowed."""
    strict = read_recipe("digits", [*OVERRIDES, "stage_one.max_relative_error=1.0e-9"])
    with pytest.raises(DivergedError, match=r"gate.*--from .*run --set stage_one\.updates=16.*max_relative_error"):
        run_job(strict, tmp_path / "run", resume=False, progress=Progress(disable=True))
    assert not (tmp_path / "run" / "students").exists()
    trained, train = [], Trainer.train

    def watched(self: Trainer, phase: Phase) -> tuple[dict[str, torch.Tensor], float]:
        trained.append(phase.name)
        return train(self, phase)

    monkeypatch.setattr(Trainer, "train", watched)
    run = run_job(recipe, tmp_path / "run", resume=True, progress=Progress(disable=True))
    assert trained == ["d4", "d2", "d1"]
    assert weights_of(run.path) == weights_of(finished.path)


def test_a_gate_that_was_passed_is_asked_again_of_a_stricter_recipe(finished: RunFolder, tmp_path: Path) -> None:
    strict = read_recipe("digits", [*OVERRIDES, "stage_one.max_relative_error=1.0e-9"])
    assert {"teacher", "stage_one", "d1"} <= takeable(strict, finished).names
    with pytest.raises(DivergedError, match="gate"):
        run_job(strict, tmp_path / "run", resume=False, progress=Progress(disable=True), taken_from=finished.path)


def test_sigterm_ends_with_a_checkpoint_and_its_own_exit_code(tmp_path: Path, finished: RunFolder) -> None:
    out = tmp_path / "run"
    sets = [part for override in OVERRIDES for part in ("--set", override)]
    command = [sys.executable, "-m", "distill_jobs", "run", "digits", "--out", str(out), *sets]
    job = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=Path.cwd(), env={**os.environ, "COLUMNS": "200"}
    )
    while not (out / "checkpoints").exists():
        assert job.poll() is None, job.stderr and job.stderr.read()
        time.sleep(0.01)  # without taking the core that the job starts on
    job.send_signal(signal.SIGTERM)
    _, stderr = job.communicate(timeout=120)
    assert job.returncode == 4, stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert "torchvision" not in stderr
    recipe = read_recipe("digits", OVERRIDES)
    assert weights_of(run_job(recipe, out, resume=True, progress=Progress(disable=True)).path) == weights_of(
        finished.path
    )
