"""A run's bundle in int8, let through by the run's own evaluation: the same grid, seeds and measures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from distill_jobs.cells import Cell, CellResult, Judge
from distill_jobs.contenders import Contender, contenders
from distill_jobs.data.digits import Digits
from distill_jobs.data.source import Condition
from distill_jobs.errors import DivergedError, JobError
from distill_jobs.evaluate import judge_of, row_of
from distill_jobs.gates import AGREEMENT_SLACK, Gate
from distill_jobs.latent_sections import LatentTeacher
from distill_jobs.recipe import Recipe
from distill_jobs.report import JSON_NAME, Report
from distill_jobs.sampling import Network
from engines.backends.base import EngineBackend
from engines.backends.load import load_backend
from engines.bundle import Bundle, check_replaceable, write_bundle
from engines.guidance import weight_from_scale
from engines.manifest import (
    COEFFICIENTS,
    CONDITION,
    GRID,
    GUIDANCE,
    KNOWN,
    LATENT,
    MASK,
    MASKED,
    NEXT_LATENT,
    NOISE,
    TIMESTEP,
    EvaluationRow,
    StudentSpec,
)
from engines.masks import HIDDEN
from engines.pipeline import find_student
from engines.quantize import Int8Options, quantize_bundle
from engines.sampler import COEFFICIENT_NAMES

MOST_DISTANCE = 1.05
"""Of an int8 student's Fréchet distance over its float32 twin's."""

_OUTPUT_ALONE = np.array([float(name == "d") for name in COEFFICIENT_NAMES], np.float32)
"""The step whose next latent is the network's output."""


@dataclass(frozen=True)
class Int8Student(Contender):
    """A student as an engine runs its int8 graph. graph_sha256: of that graph."""

    graph_sha256: str = ""

    @classmethod
    def of(cls, student: Contender, bundle: Bundle) -> Int8Student:
        spec = find_student(bundle.manifest, student.steps, student.sampler)
        known = {field.name: getattr(student, field.name) for field in fields(student)}
        return cls(**{**known, "name": f"{student.title} int8", "graph_sha256": bundle.graph_sha256(spec.graph)})

    def weights_sha256(self) -> str:
        return self.graph_sha256


def quantize_run(
    run_dir: Path,
    recipe: Recipe,
    exported: Bundle,
    destination: Path,
    options: Int8Options,
    *,
    progress: Progress | None = None,
    despite_gates: bool = False,
) -> tuple[Bundle, tuple[Gate, ...]]:
    """Write the int8 twin of a run's bundle, with its own rows in the evaluation, and return it and its gates.

    Nothing is written where a gate is missed, unless despite_gates. Raises: DivergedError naming the first gate
    missed; JobError when the bundle is not of this run, or the run not one on digits.
    """
    check_replaceable(destination)
    display, report = progress or Progress(disable=True), _report(run_dir, recipe, exported)
    task = display.add_task("int8", total=None, loss="")
    candidate = destination.with_name(f".{destination.name}.int8")
    try:
        made = quantize_bundle(
            exported, candidate, options, lambda graph, _: display.update(task, description=f"int8 {graph}")
        )
        everyone = contenders(run_dir, recipe)
        students = [student for student in everyone if student.exported]
        judge = judge_of(run_dir, recipe, everyone[0], Digits.load(), ())
        rows = [row for student in students for row in _measure(judge, student, made, display)]
        found = tuple(int8_gates(report.evaluation.rows, rows, students))
        missed = [gate for gate in found if not gate.passed]
        if missed and not despite_gates:
            first = f"{missed[0].name} is {missed[0].value:.3f}, the limit {missed[0].limit:g}"
            raise DivergedError(
                f"int8 misses {len(missed)} of {len(found)} gates, first: {first}; "
                "serve the float32 bundle, or take int8 with --despite-gates"
            )
        evaluation = report.evaluation.model_copy(update={"rows": (*report.evaluation.rows, *rows)})
        manifest = made.manifest.model_copy(update={"evaluation": evaluation})
        return write_bundle(candidate, destination, manifest), found
    finally:
        shutil.rmtree(candidate, ignore_errors=True)


def _report(run_dir: Path, recipe: Recipe, exported: Bundle) -> Report:
    """The evaluation that the bundle was exported with."""
    if isinstance(recipe.teacher, LatentTeacher):
        raise JobError(
            "the gate of int8 is the evaluation of digits; make int8 without it: python -m engines quantize"
        )
    if not (run_dir / JSON_NAME).is_file():
        raise JobError(f"{run_dir} is not evaluated yet; run: python -m distill_jobs evaluate {run_dir}")
    report = Report.read(run_dir)
    if exported.manifest.evaluation != report.evaluation:
        raise JobError(f"{exported.path} was not exported from {run_dir} as it is now; export it again")
    return report


def _measure(judge: Judge, student: Contender, made: Bundle, display: Progress) -> Iterator[EvaluationRow]:
    """The rows of one student in int8, one a guidance scale."""
    twin, settings = Int8Student.of(student, made), judge.recipe.evaluation
    spec = find_student(made.manifest, student.steps, student.sampler)
    cells = [Cell(twin, scale, seed) for scale in twin.scales_of(settings) for seed in settings.seeds]
    task = display.add_task(twin.key, total=settings.samples * student.steps * len(cells), loss="")
    engine = load_backend("openvino", made, spec.graph)
    results: dict[Cell, CellResult] = {}
    for cell in cells:
        network = engine_network(engine, spec, weight_from_scale(cell.guidance_scale))
        results[cell] = judge.known(cell) or judge.measure(cell, network, lambda done: display.advance(task, done))
    engine.close()
    for scale in twin.scales_of(settings):
        yield row_of(judge.recipe, twin, scale, results)


def engine_network(engine: EngineBackend, spec: StudentSpec, w: float) -> Network:
    """The network inside a step graph, at guidance weight w: the update is told to give its output."""
    declared = {tensor.name for tensor in engine.inputs}

    def network(x_t: Tensor, timestep: int, condition: Condition) -> Tensor:
        rows, latent = len(x_t), x_t.numpy()
        inputs = {
            LATENT: latent,
            TIMESTEP: np.full(rows, timestep, np.float32),
            GUIDANCE: np.full(rows, w, np.float32),
            CONDITION: condition.tokens.numpy(),
            COEFFICIENTS: np.tile(_OUTPUT_ALONE, (rows, 1)),
            NOISE: latent,
            KNOWN: latent,
            MASKED: np.full_like(latent, HIDDEN),  # an image hidden as a whole, as in the float32 rows
            MASK: np.ones_like(latent[:, :1]),
            GRID: np.full(rows, spec.grid or 0, np.float32),
        }
        given = {name: array for name, array in inputs.items() if name in declared}
        return torch.from_numpy(engine.run(given)[NEXT_LATENT])

    return network


def int8_gates(
    before: Sequence[EvaluationRow], after: Sequence[EvaluationRow], students: Sequence[Contender]
) -> Iterator[Gate]:
    """Every int8 row against the float32 row of the same student and guidance."""
    titles = {f"{student.title} int8": student.title for student in students}
    was = {(row.model, row.steps, row.sampler, row.guidance_scale): row.metrics for row in before}
    for row in after:
        old = was[titles[row.model], row.steps, row.sampler, row.guidance_scale]
        where = f"{row.steps}-step {row.model}, guidance {row.guidance_scale:g}"
        ratio = row.metrics["frechet_distance"].mean / max(old["frechet_distance"].mean, 1e-12)
        yield Gate(name=f"{where}: distance / float32's", value=ratio, limit=MOST_DISTANCE)
        lead = row.metrics["class_agreement"].mean - old["class_agreement"].mean
        yield Gate(name=f"{where}: class agreement - float32's", value=lead, limit=-AGREEMENT_SLACK, at_least=True)
