"""Kill a small distillation job at random moments, 200 times, and compare its weights with a run left alone.

Run: python -m tests.chaos.job_kills [--kills 200] [--seed 0]
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from distill_jobs.checkpoint import intact_checkpoint, load_checkpoint
from distill_jobs.recipe_file import read_recipe
from tests.support.job_process import JobRun, ended
from tests.support.tiny_recipe import OVERRIDES, PHASES, weights_of

SHORTEST_S, LONGEST_S = 0.1, 3.0
IN_A_WRITE = 0.5


def main(
    kills: Annotated[int, typer.Option(help="How many.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Run after run is killed until it ends; each must end in the same bytes."""
    with tempfile.TemporaryDirectory(prefix="halfstep-kills-") as folder:
        alone = Path(folder) / "alone"
        assert JobRun(alone, OVERRIDES).exit_code() == 0
        done, runs, torn = 0, 0, 0
        chance = random.Random(seed)
        while done < kills:
            runs += 1
            out = Path(folder) / f"run{runs}"
            while not killed_or_ended(out, chance.uniform(SHORTEST_S, LONGEST_S), chance.random() < IN_A_WRITE):
                done += 1
                torn += writes(out)
                typer.echo(f"{done} kills, {torn} inside a write, {runs} runs")
            assert weights_of(out) == weights_of(alone), f"{out} ended in other bytes"
    typer.echo(f"{done} kills, {torn} of them inside a write, in {runs} runs: all ended in the same bytes")


def killed_or_ended(out: Path, seconds: float, in_a_write: bool) -> bool:
    """Whether the run ended before its SIGKILL after ``seconds``, or, ``in_a_write``, in the next write after them.

    No more updates are lost than lie between two checkpoints.
    """
    attempt = JobRun(out, OVERRIDES)
    process = attempt.start()
    process.join(seconds)
    while in_a_write and process.is_alive() and not writes(out):
        pass
    if process.is_alive():
        process.kill()
    if ended(process) == 0:
        return True
    assert process.exitcode == -9, process.exitcode
    if attempt.reported:
        phase, update = attempt.last_report
        (home,) = [folder for folder in PHASES if folder.endswith(phase)]
        if not (out / home / "phase.json").is_file():
            newest = intact_checkpoint(out / "checkpoints" / phase)
            assert newest is not None, f"no checkpoint of {phase}"
            lost = update - load_checkpoint(newest).update
            assert lost <= read_recipe("digits", OVERRIDES).checkpoint_every, f"{lost} updates lost in {phase}"
    return False


def writes(out: Path) -> bool:
    """Whether a checkpoint is being written; folders come and go meanwhile."""
    try:
        return any(out.glob("checkpoints/*/.*.writing"))
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    typer.run(main)
