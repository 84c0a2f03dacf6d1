"""The targets of an evaluation: what a student must reach to be exported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict

from engines.manifest import EvaluationRow

AGREEMENT_SLACK = 0.01
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
    return (
        *_distance_gates(by_key, reference_steps),
        *_agreement_gates(by_key, reference_steps),
        *_cost_gates(by_key),
        *_teacher_gates(by_key, reference_steps),
    )


def _distance_gates(rows: _Rows, reference_steps: int) -> Iterator[Gate]:
    """Student over teacher distance at the same guidance."""
    limits = {(4, 1.0): 1.5, (4, 2.0): 1.10, (4, 4.0): 1.10, (1, 1.0): 2.0, (1, 2.0): 2.0, (1, 4.0): 2.0}
    for (steps, scale), limit in limits.items():
        student, teacher = rows.get(("student", steps, scale)), rows.get(("teacher", reference_steps, scale))
        if student is None or teacher is None:
            continue
        ratio = _distance(student) / max(_distance(teacher), 1e-12)
        yield Gate(name=f"{steps}-step distance / teacher's, guidance {scale:g}", value=ratio, limit=limit)


def _agreement_gates(rows: _Rows, reference_steps: int) -> Iterator[Gate]:
    """Smallest lead of a student's class agreement over the teacher's, over all guidance scales."""
    for steps in sorted({steps for model, steps, _ in rows if model == "student"}, reverse=True):
        leads = [
            _agreement(row) - _agreement(rows["teacher", reference_steps, scale])
            for (model, n, scale), row in rows.items()
            if (model, n) == ("student", steps)
        ]
        name = f"{steps}-step class agreement - teacher's, worst guidance"
        yield Gate(name=name, value=min(leads), limit=-AGREEMENT_SLACK, at_least=True)


def _cost_gates(rows: _Rows) -> Iterator[Gate]:
    """A student against the teacher run for as many evaluations, or in one step: nearer to the fine teacher."""
    for steps in sorted({steps for model, steps, _ in rows if model == "student"}, reverse=True):
        pairs = [
            (row, twin)
            for (model, n, _), row in rows.items()
            if (model, n, row.sampler) == ("student", steps, "deterministic") and (twin := _twin(rows, row))
        ]
        if pairs:
            name = f"{steps}-step distance to the teacher / the teacher's at as many evaluations, worst guidance"
            value = max(_paired(row) / max(_paired(twin), 1e-12) for row, twin in pairs)
            yield Gate(name=name, value=value, limit=1.0)


def _twin(rows: _Rows, student: EvaluationRow) -> EvaluationRow | None:
    """The teacher at the same guidance that costs what the student does; for a single step, its single step."""
    of_teacher = (row for (model, _, s), row in rows.items() if (model, s) == ("teacher", student.guidance_scale))
    fits = (row for row in of_teacher if row.evaluations == student.evaluations or row.steps == student.steps == 1)
    return next(fits, None)


def _teacher_gates(rows: _Rows, reference_steps: int) -> Iterator[Gate]:
    """A teacher worth distilling: far better at its finest grid than in one step, and obedient."""
    fine, one = rows.get(("teacher", reference_steps, 1.0)), rows.get(("teacher", 1, 1.0))
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
    return row.metrics["frechet_distance"].mean


def _paired(row: EvaluationRow) -> float:
    return row.metrics["paired_distance"].mean


def _agreement(row: EvaluationRow) -> float:
    return row.metrics["class_agreement"].mean
