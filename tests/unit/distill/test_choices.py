"""Which student is exported for a step count."""

from __future__ import annotations

from distill_jobs.choices import choices
from distill_jobs.gates import gates
from engines.manifest import EvaluationRow
from tests.support.quality import quality

TEACHER = [quality("teacher", 64, scale, agreement=0.98, paired=0) for scale in (1.0, 2.0)]


def both(model: str, paired: float, agreement: float = 0.98, steps: int = 4) -> list[EvaluationRow]:
    return [quality(model, steps, scale, paired=paired, agreement=agreement) for scale in (1.0, 2.0)]


def test_the_nearest_to_the_teacher_is_best() -> None:
    finish = [quality("consistency", 1, scale, paired=0.05, sampler="consistency") for scale in (1.0, 2.0)]
    rows = [*TEACHER, *both("student", 0.06), *finish, *both("student", 0.2, steps=1)]
    four, one = choices(rows, 64)
    assert (four.steps, four.best, one.steps, one.best) == (4, "student", 1, "consistency")
    assert [candidate.model for candidate in one.candidates] == ["consistency", "student"]
    assert [candidate.paired_distance for candidate in one.candidates] == [0.05, 0.2]


def test_one_that_obeys_less_than_the_teacher_is_refused_however_near() -> None:
    disobedient = both("consistency", 0.01)
    disobedient[1] = quality("consistency", 4, 2.0, paired=0.01, agreement=0.96)
    (four,) = choices([*TEACHER, *both("student", 0.06), *disobedient], 64)
    assert four.best == "student"
    assert four.candidates[0].refused == "obeys less than the teacher"
    (alone,) = choices([*TEACHER, *disobedient], 64)
    assert alone.best is None


def test_a_student_of_one_guidance_is_no_rival_of_one_of_all() -> None:
    (four,) = choices([*TEACHER, *both("student", 0.06), quality("single w", 4, 2.0, paired=0.01)], 64)
    assert four.best == "student"
    assert four.candidates[0].refused == "does not run at guidance 1"


def test_samplers_are_judged_apart_and_teachers_are_no_students() -> None:
    rows = [
        *TEACHER,
        *both("teacher, DPM-Solver++", 0.001),
        *both("stage one", 0.001),
        *both("student", 0.06),
        *(quality("student", 4, scale, paired=0.3, sampler="stochastic") for scale in (1.0, 2.0)),
        *(quality("consistency", 4, scale, paired=0.4, sampler="consistency") for scale in (1.0, 2.0)),
    ]
    assert [(choice.stochastic, choice.best) for choice in choices(rows, 64)] == [
        (False, "student"),
        (True, "student, stochastic"),
    ]


def test_a_student_must_beat_the_teacher_run_for_as_many_evaluations() -> None:
    """Which is half the steps with guidance, and as many without."""
    coarse = [*both("teacher", 0.1, steps=2), *both("teacher", 0.04, steps=4)]
    rows = [*TEACHER, *coarse, *both("student", 0.08), *both("student", 0.5, steps=1)]
    rows[-4] = quality("student", 4, 1.0, paired=0.044)
    found = {gate.name: gate for gate in gates(rows, 64)}
    gate = found["4-step distance to the teacher / the teacher's at as many evaluations, worst guidance"]
    assert (round(gate.value, 9), gate.passed) == (1.1, False)
    assert not [name for name in found if name.startswith("1-step distance to")]  # the teacher was not run in 1


def test_a_teacher_guided_in_an_interval_takes_more_steps_in_as_many_evaluations() -> None:
    rows = [*TEACHER, *both("student", 0.04, steps=8), quality("teacher", 4, 2.0, paired=0.1)]
    rows.append(quality("teacher", 5, 2.0, paired=0.05).model_copy(update={"evaluations": 8}))
    (gate,) = (gate for gate in gates(rows, 64) if "as many evaluations" in gate.name)
    assert round(gate.value, 9) == 0.8


def test_a_consistency_student_is_judged_as_any_other() -> None:
    twins = [*both("teacher", 0.1, steps=1)]
    bad = [
        quality("consistency", n, 2.0, distance=500, agreement=0.1, paired=2.0, sampler="consistency")
        for n in (4, 1)
    ]
    found = {gate.name: gate.passed for gate in gates([*TEACHER, *twins, *bad], 64) if "consistency" in gate.name}
    assert found == {
        "4-step consistency distance / teacher's, guidance 2": False,
        "1-step consistency distance / teacher's, guidance 2": False,
        "4-step consistency class agreement - teacher's, worst guidance": False,
        "1-step consistency class agreement - teacher's, worst guidance": False,
        # In four steps it draws other images, by fresh noise.
        "1-step consistency distance to the teacher / the teacher's at as many evaluations, worst guidance": False,
    }


def test_every_guidance_of_a_recipe_has_its_limit() -> None:
    rows = [quality("teacher", 64, 3.0, distance=1.0), quality("student", 8, 3.0, distance=1.2)]
    (gate,) = (gate for gate in gates(rows, 64) if "distance" in gate.name)
    assert (gate.name, gate.limit, gate.passed) == ("8-step distance / teacher's, guidance 3", 1.1, False)


def test_an_odd_number_of_steps_is_held_against_the_next_cheaper_teacher() -> None:
    rows = [*TEACHER, quality("teacher", 2, 2.0, paired=0.1), quality("student", 5, 2.0, paired=0.2)]
    (gate,) = (gate for gate in gates(rows, 64) if "as many evaluations" in gate.name)
    assert (gate.value, gate.passed) == (2.0, False)
