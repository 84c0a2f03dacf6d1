"""Fixtures shared by the tests of evaluation and export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from distill_jobs.evaluate import evaluate_run
from distill_jobs.recipe import Recipe
from distill_jobs.report import Report
from tests.support.tiny_run import tiny_recipe, write_judged_run, write_tiny_run


@dataclass(frozen=True)
class EvaluatedRun:
    path: Path
    recipe: Recipe
    report: Report


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder of untrained networks with students of 8, 4, 2 and 1 steps."""
    return write_tiny_run(tmp_path_factory.mktemp("run") / "tiny", tiny_recipe())


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedRun:
    """A run with students of 2 and 1 steps, evaluated. Not to be changed: copy it first."""
    recipe = tiny_recipe((2, 1))
    run = write_judged_run(tmp_path_factory.mktemp("evaluated") / "run", recipe)
    return EvaluatedRun(run, recipe, evaluate_run(run, recipe, command="test"))
