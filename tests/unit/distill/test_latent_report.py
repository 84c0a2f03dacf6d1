"""The gates of runs on latents."""

from __future__ import annotations

from distill_jobs.gates import FRECHET
from distill_jobs.pipelines.report import distance_gates, fresh_gates
from engines.manifest import EvaluationRow
from engines.sampler import Sampler
from tests.support.quality import quality

TEACHER = quality("teacher", 4, 1.0, paired=0.4, distance=2.0)


def unseen(row: EvaluationRow) -> EvaluationRow:
    """Where no features were given."""
    metrics = {name: value for name, value in row.metrics.items() if name != FRECHET}
    return row.model_copy(update={"metrics": metrics})


def gates(model: str, steps: int, sampler: Sampler) -> dict[str, float]:
    teacher = TEACHER.model_copy(update={"steps": steps})
    rows = [teacher, quality(model, steps, 1.0, paired=0.8, distance=3.0, sampler=sampler)]
    return {gate.name: gate.value for gate in (*distance_gates(rows), *fresh_gates(rows, rows))}


def test_a_student_is_held_against_the_teacher_in_as_many_steps() -> None:
    assert gates("student", 4, "deterministic") == {"4-step distance / teacher's in 4 steps, guidance 1": 2.0}


def test_other_images_are_judged_by_what_they_look_like() -> None:
    """Fresh noise between the steps makes them; in a single step there is none."""
    assert gates("student", 4, "stochastic") == {"4-step Fréchet distance / teacher's in 4 steps, guidance 1": 1.5}
    assert gates("consistency", 4, "consistency") == {
        "4-step consistency Fréchet distance / teacher's in 4 steps, guidance 1": 1.5
    }
    assert gates("consistency", 1, "consistency") == {
        "1-step consistency distance / teacher's in 1 steps, guidance 1": 2.0
    }


def test_a_student_that_nothing_judges_is_not_passed() -> None:
    rows = [unseen(TEACHER), unseen(quality("student", 4, 1.0, sampler="stochastic"))]
    (gate,) = fresh_gates(rows, rows)
    assert (gate.name, gate.passed) == ("4-step pictures are judged (evaluation.features), guidance 1", False)
    elsewhere = [TEACHER, quality("student", 4, 1.0, distance=1.0, sampler="stochastic")]
    (gate,) = fresh_gates(rows, elsewhere)
    assert (gate.value, gate.passed) == (0.5, True)
