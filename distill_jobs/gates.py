"""The targets of an evaluation: what a student must reach to be exported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from pydantic import BaseModel, ConfigDict

from distill_jobs.contenders import CONSISTENCY, STUDENT, TEACHER
from engines.guidance import weight_from_scale
from engines.manifest import EvaluationRow

EXPORTED = (STUDENT, CONSISTENCY)
FRECHET = "frechet_distance"
AGREEMENT_SLACK = 0.01
FEW_STEPS = 4
"""From which on a student is held to the limits below; with fewer to the one after them."""
OFF_LIMIT, GUIDED_LIMIT = 1.5, 1.10
"""Of a student's Fréchet distance over the teacher's: without guidance, where there is most variety, and with."""
FEWEST_STEPS_LIMIT = 2.0
_Rows = dict[tuple[str, int, float], EvaluationRow]


class Gate(BaseModel):
    """A target: ``value`` must be at most ``limit``, or at least where ``at_least``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def gates(rows: Sequence[EvaluationRow], reference_steps: int) -> tuple[Gate, ...]:
    """The targets that these rows can answer; those about a missing model or guidance are left out."""
    by_key = {(row.model, row.steps, row.guidance_scale): row for row in rows}
    exported = [row for row in rows if row.model in EXPORTED]
    exported.sort(key=lambda row: (EXPORTED.index(row.model), -row.steps, row.guidance_scale))
    return (
        *_distance_gates(exported, by_key, reference_steps),
        *_agreement_gates(exported, by_key, reference_steps),
        *_cost_gates(exported, by_key),
        *_teacher_gates(by_key, reference_steps),
    )


def title(row: EvaluationRow) -> str:
    """A student in the name of a gate: ``4-step``, ``4-step consistency``."""
    return f"{row.steps}-step {CONSISTENCY}" if row.model == CONSISTENCY else f"{row.steps}-step"


def draws_afresh(row: EvaluationRow) -> bool:
    """Whether fresh noise between its steps makes its images others than the teacher's of the same noise."""
    return row.sampler != "deterministic" and row.steps > 1


def _distance_gates(exported: Sequence[EvaluationRow], rows: _Rows, reference_steps: int) -> Iterator[Gate]:
    """Student over teacher distance at the same guidance."""
    for row in exported:
        if (teacher := rows.get((TEACHER, reference_steps, row.guidance_scale))) is None:
            continue
        limit = FEWEST_STEPS_LIMIT if row.steps < FEW_STEPS else OFF_LIMIT if _off(row) else GUIDED_LIMIT
        ratio = _distance(row) / max(_distance(teacher), 1e-12)
        yield Gate(
            name=f"{title(row)} distance / teacher's, guidance {row.guidance_scale:g}", value=ratio, limit=limit
        )


def _agreement_gates(exported: Sequence[EvaluationRow], rows: _Rows, reference_steps: int) -> Iterator[Gate]:
    """Smallest lead of a student's class agreement over the teacher's, over all guidance scales."""
    for student, its in groupby(exported, title):
        leads = (_agreement(row) - _agreement(rows[TEACHER, reference_steps, row.guidance_scale]) for row in its)
        name = f"{student} class agreement - teacher's, worst guidance"
        yield Gate(name=name, value=min(leads), limit=-AGREEMENT_SLACK, at_least=True)


def _cost_gates(exported: Sequence[EvaluationRow], rows: _Rows) -> Iterator[Gate]:
    """A student against the teacher run for as many evaluations, or in one step: nearer to the fine teacher."""
    for student, its in groupby(exported, title):
        judged = ((row, _twin(row, rows)) for row in its if not draws_afresh(row))
        ratios = [_paired(row) / max(_paired(twin), 1e-12) for row, twin in judged if twin is not None]
        if ratios:
            name = f"{student} distance to the teacher / the teacher's at as many evaluations, worst guidance"
            yield Gate(name=name, value=max(ratios), limit=1.0)


def _twin(student: EvaluationRow, rows: _Rows) -> EvaluationRow | None:
    """The teacher at the same guidance that costs what the student does, or the next cheaper one, down to half.

    Where even one step costs more, that one.
    """
    scale = student.guidance_scale
    alike = [row for (name, _, of), row in rows.items() if name == TEACHER and of == scale]
    affordable = [row for row in alike if row.evaluations <= student.evaluations <= 2 * row.evaluations]
    if affordable:
        return max(affordable, key=lambda row: (row.evaluations, row.steps))
    return rows.get((TEACHER, 1, scale)) if student.steps == 1 else None


def _off(row: EvaluationRow) -> bool:
    return weight_from_scale(row.guidance_scale) == 0


def _teacher_gates(rows: _Rows, reference_steps: int) -> Iterator[Gate]:
    """A teacher worth distilling: far better at its finest grid than in one step, and obedient."""
    fine, one = rows.get((TEACHER, reference_steps, 1.0)), rows.get((TEACHER, 1, 1.0))
    if fine is None:
        return
    if one is not None:
        ratio = _distance(fine) / max(_distance(one), 1e-12)
        yield Gate(
            name=f"teacher {reference_steps}-step distance / its 1-step, guidance 1", value=ratio, limit=0.05
        )
    name = f"teacher {reference_steps}-step class agreement, guidance 1"
    yield Gate(name=name, value=_agreement(fine), limit=0.95, at_least=True)


def _distance(row: EvaluationRow) -> float:
    return row.metrics[FRECHET].mean


def _paired(row: EvaluationRow) -> float:
    return row.metrics["paired_distance"].mean


def _agreement(row: EvaluationRow) -> float:
    return row.metrics["class_agreement"].mean
