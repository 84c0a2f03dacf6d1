"""The other chains, from job to bundle: what the pipeline draws is what the trained students draw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress

from distill_jobs.classifier import save_classifier, split_digits, train_classifier
from distill_jobs.contenders import STUDENT, contenders
from distill_jobs.data.digits import Digits, class_condition
from distill_jobs.evaluate import evaluate_run
from distill_jobs.export import export_run
from distill_jobs.job import run_job
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import read_recipe
from distill_jobs.sampling import sample
from engines.manifest import GRID
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from tests.support.tiny_recipe import OVERRIDES

SEEDS, LABELS = (0, 7, 3), torch.tensor([3, 1, 4])
SHORT = [
    *OVERRIDES,
    "stage_two.halvings=[{steps: 4, updates: 3}, {steps: 2, updates: 3}]",
    "export={name: tiny, students: [4, 2], default_steps: 4}",
    "evaluation={samples: 20, seeds: [1], guidance_scales: [2.0], teacher_steps: 4, batch_size: 20}",
]


Chain = tuple[Path, Recipe, Pipeline]


def exported(name: str, folder: Path, *overrides: str) -> Chain:
    recipe = read_recipe(name, [*SHORT, *overrides])
    run = run_job(recipe, folder / "run", resume=False, progress=Progress(disable=True)).path
    rough = train_classifier(split_digits(Digits.load())[0], epochs=1)
    save_classifier(rough, run / "classifier" / "classifier.safetensors")
    evaluate_run(run, recipe)
    bundle = export_run(run, folder / "bundle", recipe, despite_gates=True)
    return run, recipe, open_pipeline(bundle.path, "onnxruntime", threads=1, rungs=(1, 4), warm=False)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The network as it was kept for 4 and 2 steps, and as it is at the end for one."""
    halvings = "[{steps: 4, updates: 3}, {steps: 2, updates: 3, keep: true}, {steps: 1, updates: 3}]"
    own = (f"stage_two.halvings={halvings}", "export.students=[4, 2, 1]")
    return exported("digits-shared", tmp_path_factory.mktemp("shared"), *own)


@pytest.fixture(scope="module")
def stochastic(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return exported("digits-stochastic", tmp_path_factory.mktemp("stochastic"))


@pytest.fixture(scope="module")
def consistency(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A finish of the 4-step student beside the students that it was made from."""
    finish = "consistency={source: 4, grid: 4, students: [2, 1], updates: 3, batch_size: 8}"
    return exported("digits-consistency", tmp_path_factory.mktemp("consistency"), finish)


@pytest.mark.parametrize(
    "name", ["shared", *(pytest.param(name, marks=pytest.mark.long) for name in ("stochastic", "consistency"))]
)
def test_the_pipeline_draws_what_the_students_draw(name: str, request: pytest.FixtureRequest) -> None:
    run, recipe, pipeline = request.getfixturevalue(name)
    samplers = {"shared": {"deterministic"}, "consistency": {"deterministic", "consistency"}}.get(name, {name})
    manifest = pipeline.manifest
    assert {s.sampler for s in manifest.students} == samplers
    assert {row.sampler for row in manifest.evaluation.rows} == samplers | {"deterministic"}  # the teacher's
    conditions = pipeline.condition([f"the digit {int(label)}" for label in LABELS])
    for contender in (c for c in contenders(run, recipe) if c.role == STUDENT):
        told = json.loads((contender.folder / "student.json").read_text())
        assert told["sampler"] == contender.sampler
        assert contender.steps in told["steps"]
        student = pipeline.student(contender.steps, contender.sampler)
        rows = [pipeline.start(c, 3.0, s, student) for c, s in zip(conditions, SEEDS, strict=True)]
        while not rows[0].done:
            pipeline.step(rows)
        network = contender.network(contender.load(), 3.0)
        want = sample(network, contender.plan(recipe), class_condition(LABELS), SEEDS, contender.shape)
        np.testing.assert_allclose(np.stack([row.latent for row in rows]), want.numpy(), rtol=0, atol=1e-4)


def test_shared_weights_are_a_graph_for_each_kept_network_whose_rows_share_a_batch(shared: Chain) -> None:
    _, _, pipeline = shared
    assert {s.steps: s.graph for s in pipeline.manifest.students} == {4: "step_4_2", 2: "step_4_2", 1: "step_1"}
    for graph in ("step_4_2", "step_1"):
        assert GRID in {spec.name for spec in pipeline.manifest.graphs[graph].inputs}
    [condition] = pipeline.condition(["seven"])
    four, two = (pipeline.start(condition, 2.0, 5, pipeline.student(n)) for n in (4, 2))
    assert four.batch_key == two.batch_key
    pipeline.step([four, two])
    alone = pipeline.start(condition, 2.0, 5, pipeline.student(2))
    pipeline.step([alone])
    np.testing.assert_allclose(two.latent, alone.latent, rtol=0, atol=1e-5)
