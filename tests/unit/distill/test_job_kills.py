"""A job that is killed, starved of disk or moved to another machine ends in the bytes of one that was not."""

import random
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from distill_jobs.checkpoint import intact_checkpoint, load_checkpoint
from distill_jobs.job import run_job
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder
from tests.support.job_process import JobRun
from tests.support.tiny_recipe import OVERRIDES, PHASES, weights_of

KILLS = 20
MOST_EVENTS = 50
FOLDERS = {folder.split("/")[-1]: folder for folder in PHASES}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return read_recipe("digits", OVERRIDES)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_job(recipe, tmp_path_factory.mktemp("run") / "whole", resume=False, progress=Progress(disable=True))


def test_twenty_sigkills_over_all_phases_leave_the_same_bytes(
    recipe: Recipe, finished: RunFolder, tmp_path: Path
) -> None:
    """Each kill is at an update or at a file operation inside the run folder, writing checkpoints included."""
    out, chance = tmp_path / "run", random.Random(2210_03142)
    phases, torn = set(), 0
    for _ in range(KILLS):
        attempt = JobRun(out, OVERRIDES, dies_at=chance.randint(1, MOST_EVENTS))
        assert attempt.exit_code() == -9
        torn += bool(list(out.rglob(".*.writing")))
        for folder in out.glob("checkpoints/*"):
            newest = max((p for p in folder.glob("[0-9]*")), default=None)
            assert intact_checkpoint(folder) == newest
        if attempt.reported:
            phase, update = attempt.last_report
            phases.add(phase)
            if (out / FOLDERS[phase] / "phase.json").is_file():
                continue
            newest = intact_checkpoint(out / "checkpoints" / phase)
            assert newest is not None
            assert update - load_checkpoint(newest).update <= recipe.checkpoint_every
    assert torn
    assert phases >= {"teacher", "stage_one", "d4", "d2"}
    assert JobRun(out, OVERRIDES).exit_code() == 0
    assert weights_of(out) == weights_of(finished.path)
    assert not list(out.rglob(".*.writing"))
    assert not (out / "checkpoints").exists()


def test_a_full_disk_stops_the_job_with_its_last_checkpoint_intact(finished: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "run"
    weights = len(weights_of(finished.path)["teacher"])
    assert JobRun(out, OVERRIDES, file_limit=3 * weights).exit_code() == 6  # enough without the optimiser's moments
    newest = intact_checkpoint(out / "checkpoints" / "teacher")
    assert newest is not None
    assert load_checkpoint(newest).update == 0
    assert not list(out.rglob(".*.writing"))
    assert JobRun(out, OVERRIDES).exit_code() == 0
    assert weights_of(out) == weights_of(finished.path)


def test_the_thread_count_of_the_start_holds_to_the_end(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert JobRun(out, OVERRIDES, threads=2, terminated_at=3).exit_code() == 4
    seen = []

    class Watching(Progress):
        def update(self, *args: object, **kwargs: object) -> None:
            seen.append(torch.get_num_threads())
            raise KeyboardInterrupt

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with pytest.raises(KeyboardInterrupt):
            run_job(read_recipe("digits", OVERRIDES), out, resume=True, progress=Watching(disable=True))
    finally:
        torch.set_num_threads(before)
    assert seen == [2]
