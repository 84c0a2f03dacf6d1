"""Which student is exported for a step count: the nearest to the teacher among those that obey as it does."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from distill_jobs.contenders import STAGE_ONE, TEACHER
from distill_jobs.gates import AGREEMENT_SLACK
from engines.manifest import EvaluationRow

AGREEMENTS = ("class_agreement", "glyph_top_1", "text_agreement")


class Candidate(BaseModel):
    """One student at one step count.

    paired_distance: to the teacher, mean over its guidance scales. agreement_lead: smallest lead of its agreement,
    with the class, the glyph or the text, over the teacher's; None where none was measured. refused: why it cannot
    be chosen, empty if it can.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    paired_distance: float
    agreement_lead: float | None
    refused: str = ""


class Choice(BaseModel):
    """The candidates of a step count, nearest to the teacher first. best: None if all are refused.

    stochastic: of a sampler that draws fresh noise, so that images are not the teacher's at equal noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    stochastic: bool
    best: str | None
    candidates: tuple[Candidate, ...]


def choices(rows: Sequence[EvaluationRow], reference_steps: int) -> tuple[Choice, ...]:
    """The best student for each step count, of samplers with fresh noise and of the others; most steps first.

    rows: with those of the teacher at reference_steps, at every guidance that a student has.
    """
    teacher = {r.guidance_scale: r for r in rows if (r.model, r.steps) == (TEACHER, reference_steps)}
    groups: dict[tuple[int, bool], dict[str, list[EvaluationRow]]] = {}
    for row in filter(is_student, rows):
        draws_noise = row.sampler != "deterministic" and row.steps > 1
        group = groups.setdefault((row.steps, draws_noise), {})
        group.setdefault(titled(row), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1]))
    return tuple(_choice(*key, students, teacher) for key, students in ordered)


def is_student(row: EvaluationRow) -> bool:
    """Whether a row is neither the teacher's, by any sampler, nor stage one's."""
    return row.model.partition(",")[0] not in (TEACHER, STAGE_ONE)


def titled(row: EvaluationRow) -> str:
    """A row's model, with its sampler where that is not the deterministic one and the name does not say it."""
    return (
        row.model
        if row.sampler == "deterministic" or row.model.endswith(row.sampler)
        else f"{row.model}, {row.sampler}"
    )


def _choice(
    steps: int, stochastic: bool, students: dict[str, list[EvaluationRow]], teacher: dict[float, EvaluationRow]
) -> Choice:
    scales = {row.guidance_scale for own in students.values() for row in own}
    found = [_candidate(model, own, scales, teacher) for model, own in students.items()]
    ranked = sorted(found, key=lambda candidate: (candidate.paired_distance, candidate.model))
    best = next((candidate.model for candidate in ranked if not candidate.refused), None)
    return Choice(steps=steps, stochastic=stochastic, best=best, candidates=tuple(ranked))


def _candidate(
    model: str, own: list[EvaluationRow], scales: set[float], teacher: dict[float, EvaluationRow]
) -> Candidate:
    distances = [row.metrics["paired_distance"].mean for row in own]
    pairs = [(row.metrics, teacher[row.guidance_scale].metrics) for row in own]
    measured = [name for name in AGREEMENTS if all(name in mine and name in its for mine, its in pairs)]
    leads = [mine[name].mean - its[name].mean for name in measured[:1] for mine, its in pairs]
    lead = min(leads, default=None)
    refused = "obeys less than the teacher" if lead is not None and lead < -AGREEMENT_SLACK else ""
    if missing := scales - {row.guidance_scale for row in own}:
        refused = f"does not run at guidance {', '.join(f'{scale:g}' for scale in sorted(missing))}"
    mean = sum(distances) / len(distances)
    return Candidate(model=model, paired_distance=mean, agreement_lead=lead, refused=refused)
