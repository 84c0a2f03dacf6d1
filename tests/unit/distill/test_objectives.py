"""Objectives and students against what they must equal, without training."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

from distill_jobs.data.digits import NULL_CLASS, Digits, class_condition
from distill_jobs.errors import JobError
from distill_jobs.halving import HalvingTables, target_loss, two_step_target
from distill_jobs.objectives import Noisy, Tables, guided_v, network_v, stage_one_loss, teacher_loss
from distill_jobs.recipe_file import read_recipe
from distill_jobs.student import guidance_embedding, load_stock, new_teacher, predict, save_stock, student_of
from engines.sampler import Sampler, deterministic_step
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support.tiny_recipe import OVERRIDES
from tests.support.tiny_run import tiny_student

B = 6
WEIGHTS = torch.linspace(0, 4, B)


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule(ScheduleSpec())


@pytest.fixture(scope="module")
def teacher() -> UNet2DConditionModel:
    return new_teacher(read_recipe("digits", OVERRIDES).unet, seed=1).eval()


@pytest.fixture
def rows() -> Noisy:
    labels = torch.arange(B)
    generator = torch.Generator().manual_seed(0)
    return Noisy(
        x=Digits.load().images[:B],
        condition=class_condition(labels),
        null=class_condition(torch.full((B,), NULL_CLASS)),
        noise=torch.randn(B, 1, 8, 8, generator=generator),
        t=torch.tensor([999, 800, 600, 400, 200, 0]),
    )


def test_digits_are_the_real_set_in_range() -> None:
    data = Digits.load()
    assert data.images.shape == (1797, 1, 8, 8)
    assert (float(data.images.min()), float(data.images.max())) == (-1.0, 1.0)
    assert set(data.labels.tolist()) == set(range(10))


def test_guidance_embedding_is_the_lcm_pipelines() -> None:
    w = torch.tensor([0.0, 0.5, 4.0, 14.0])
    stock = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)  # type: ignore[arg-type]
    assert torch.allclose(guidance_embedding(w), stock, atol=1e-6, rtol=0)


def test_a_new_student_equals_its_teacher_at_every_w(teacher: UNet2DConditionModel, rows: Noisy) -> None:
    student = student_of(teacher).eval()
    with torch.no_grad():
        expected = predict(teacher, rows.x, rows.t, rows.condition)
        for w in (0.0, 0.5, 14.0):
            assert torch.equal(predict(student, rows.x, rows.t, rows.condition, torch.full((B,), w)), expected)


def test_student_of_leaves_the_global_rng_alone(teacher: UNet2DConditionModel) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    student_of(teacher)
    assert torch.equal(torch.get_rng_state(), before)


def test_guided_v_is_the_two_passes_combined(
    teacher: UNet2DConditionModel, schedule: NoiseSchedule, rows: Noisy
) -> None:
    w = torch.linspace(0, 4, B)
    with torch.no_grad():
        c = predict(teacher, rows.x, rows.t, rows.condition)
        u = predict(teacher, rows.x, rows.t, rows.null)
        expected = (1 + w)[:, None, None, None] * c - w[:, None, None, None] * u
        assert torch.allclose(guided_v(teacher, Tables.of(schedule), rows.x, rows, w), expected, atol=1e-5)


def test_rows_at_weight_zero_are_evaluated_with_their_condition_alone(
    teacher: UNet2DConditionModel, schedule: NoiseSchedule, rows: Noisy
) -> None:
    seen: list[int] = []
    watched = teacher.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        with torch.no_grad():
            for zeros in (0, 4, B):
                w = torch.tensor([0.0] * zeros + [2.0] * (B - zeros))
                got = guided_v(teacher, Tables.of(schedule), rows.x, rows, w)
                c, u = (predict(teacher, rows.x, rows.t, each) for each in (rows.condition, rows.null))
                torch.testing.assert_close(got, c + w[:, None, None, None] * (c - u), rtol=0, atol=1e-5)
    finally:
        watched.remove()
    assert seen[::3] == [2 * B, 2 * B - 4, B]


def test_the_target_of_true_guidance_lands_where_two_guided_teacher_steps_do(
    teacher: UNet2DConditionModel, schedule: NoiseSchedule, rows: Noisy
) -> None:
    halving, grid, point, w = HalvingTables.of(schedule, 4), schedule.grid(8), torch.full((B,), 2), WEIGHTS
    here = Noisy(rows.x, rows.condition, rows.null, rows.noise, halving.t[point])
    z = rows.noise
    with torch.no_grad():
        for k in (6, 5):
            at = torch.full((B,), grid[k])
            c, u = (predict(teacher, z, at, each) for each in (rows.condition, rows.null))
            v = c + w[:, None, None, None] * (c - u)
            z, _ = deterministic_step(schedule, grid[k], grid[k - 1]).apply(z, v)
        target = two_step_target(
            partial(guided_v, teacher, Tables.of(schedule), w=w), halving, rows.noise, here, point
        )
    landed, _ = deterministic_step(schedule, grid[6], grid[4]).apply(rows.noise, target)
    torch.testing.assert_close(landed, z, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sampler", ["deterministic", "stochastic"])
def test_a_step_is_guided_where_its_chains_first_teacher_is_evaluated_with_guidance(
    schedule: NoiseSchedule, sampler: Sampler
) -> None:
    """The first teacher stands at 999, 749, 499 and 249 and, in the deterministic chain, between them."""
    off = torch.ones(1000, dtype=torch.bool)
    off[[624, 630]] = False  # a point of the 8-step grid, and one that no teacher stands at
    first = HalvingTables.of(schedule, 4, sampler=sampler)
    by_step = {n: HalvingTables.of(schedule, n, sampler=sampler).guided(off, first).tolist() for n in (4, 2, 1)}
    if sampler == "deterministic":
        assert by_step == {4: [False, False, True, False], 2: [False, True], 1: [True]}
    else:
        assert by_step == {4: [False] * 4, 2: [False] * 2, 1: [False]}
    assert all(HalvingTables.of(schedule, 4, sampler=sampler).guided(torch.zeros(1000, dtype=torch.bool), first))


def test_guidance_is_ahead_where_some_of_it_is_still_to_come(schedule: NoiseSchedule) -> None:
    tables = Tables.of(schedule, off=[*range(400), *range(800, 1000)])
    t = torch.tensor([0, 399, 400, 799, 999])
    assert tables.ahead(torch.full((5,), 3.0), t).tolist() == [0, 0, 3, 3, 3]
    assert tables.applied(torch.full((5,), 3.0), t).tolist() == [0, 0, 3, 3, 0]
    assert Tables.of(schedule).ahead(torch.full((5,), 3.0), t).tolist() == [3] * 5


def test_an_encoders_step_is_guided_between_where_it_begins_and_where_it_ends(schedule: NoiseSchedule) -> None:
    first, off = HalvingTables.encoding(schedule, 4), torch.ones(1000, dtype=torch.bool)
    off[first.middle[1]] = False
    assert first.guided(off, first).tolist() == [False, True, False, False]
    assert HalvingTables.encoding(schedule, 2).guided(off, first).tolist() == [True, False]
    off = torch.ones(1000, dtype=torch.bool)
    off[first.t[1]] = False  # where the step before ends: it is evaluated in the next one
    assert first.guided(off, first).tolist() == [False, True, False, False]


def test_stage_one_loss_is_zero_exactly_where_student_is_the_guided_teacher(
    teacher: UNet2DConditionModel, schedule: NoiseSchedule, rows: Noisy
) -> None:
    loss = stage_one_loss(
        student_of(teacher).eval(), teacher, Tables.of(schedule), rows, torch.tensor([0.0] * 5 + [4.0])
    )
    assert float(loss[:5].max()) < 1e-10
    assert float(loss[5]) > 1e-6


def test_guided_losses_are_errors_of_the_clean_image_times_the_truncated_snr(
    teacher: UNet2DConditionModel, schedule: NoiseSchedule, rows: Noisy
) -> None:
    """max(SNR, 1)·|x - x̂|², by hand from the networks' outputs; at t = 999 there is no signal."""
    student, tables = tiny_student(0), Tables.of(schedule)
    angles = [math.pi / 2 * (t + 1) / 1000 for t in rows.t.tolist()]
    alpha, sigma = (torch.tensor([f(each) for each in angles])[:, None, None, None] for f in (math.cos, math.sin))
    z, w = alpha * rows.x + sigma * rows.noise, WEIGHTS[:, None, None, None]
    with torch.no_grad():
        c, u = (predict(teacher, z, rows.t, each).double() for each in (rows.condition, rows.null))
        given = predict(student, z, rows.t, rows.condition, WEIGHTS).double()
        wanted = (1 + w) * c - w * u
        stage_one = stage_one_loss(student, teacher, tables, rows, WEIGHTS)
        halving = target_loss(student, tables, z, rows, WEIGHTS, wanted.float())
    clean = [alpha.double() * z - sigma.double() * v for v in (given, wanted)]
    snr = [(math.cos(each) / math.sin(each)) ** 2 for each in angles]
    expected = (clean[0] - clean[1]).square().flatten(1).mean(1) * torch.tensor(snr).clamp(min=1)
    for found in (stage_one, halving):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


def test_outside_its_interval_the_target_is_the_teacher_with_its_condition(
    teacher: UNet2DConditionModel, schedule: NoiseSchedule, rows: Noisy
) -> None:
    """A new student is that teacher at any w: its loss is none there, and what it was elsewhere."""
    spread = replace(rows, t=torch.tensor([0, 120, 350, 600, 850, 999]))
    guidance = read_recipe("digits", ["guidance.log_snr_min=-2.0", "guidance.log_snr_max=3.0"]).guidance
    student, w = student_of(teacher).eval(), torch.full((B,), 2.0)
    everywhere = stage_one_loss(student, teacher, Tables.of(schedule), spread, w)
    limited = stage_one_loss(student, teacher, Tables.of(schedule, off=guidance.off(schedule)), spread, w)
    inside = torch.tensor([False, False, True, True, False, False])
    assert bool((everywhere > 1e-6).all())
    torch.testing.assert_close(limited, torch.where(inside, everywhere, 0.0), rtol=1e-5, atol=1e-10)


def test_a_teacher_learns_the_v_of_noisy_rows(
    teacher: UNet2DConditionModel, schedule: NoiseSchedule, rows: Noisy
) -> None:
    """z = alpha·x + sigma·noise, v = alpha·noise - sigma·x; at t = 999 the noise and the negative image."""
    angles = [math.pi / 2 * (t + 1) / 1000 for t in rows.t.tolist()]
    alpha, sigma = (torch.tensor([f(each) for each in angles])[:, None, None, None] for f in (math.cos, math.sin))
    with torch.no_grad():
        found = teacher_loss(teacher, Tables.of(schedule), rows, torch.zeros(B, dtype=torch.bool))
        given = predict(teacher, alpha * rows.x + sigma * rows.noise, rows.t, rows.condition)
    expected = (given - (alpha * rows.noise - sigma * rows.x)).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_teacher_loss_sees_the_null_condition_on_dropped_rows(
    teacher: UNet2DConditionModel, schedule: NoiseSchedule, rows: Noisy
) -> None:
    tables = Tables.of(schedule)
    dropped = torch.tensor([True] + [False] * (B - 1))
    with torch.no_grad():
        mixed = teacher_loss(teacher, tables, rows, dropped)
        none = teacher_loss(teacher, tables, rows, torch.zeros(B, dtype=torch.bool))
        all_ = teacher_loss(teacher, tables, rows, torch.ones(B, dtype=torch.bool))
    assert torch.allclose(mixed[0], all_[0])
    assert torch.allclose(mixed[1:], none[1:])
    assert not torch.allclose(mixed[0], none[0])


@pytest.mark.parametrize(("n", "points"), [(32, (1, 2, 17, 32)), (4, (1, 2, 3, 4)), (1, (1,))])
def test_one_step_with_the_target_lands_where_two_teacher_steps_do(
    n: int, points: tuple[int, ...], schedule: NoiseSchedule, rows: Noisy
) -> None:
    """Each row at its own guidance, which the network answers to."""
    student, halving, grid = tiny_student(0), HalvingTables.of(schedule, n), schedule.grid(2 * n)
    for i in points:
        point = torch.full((B,), i - 1)
        t = halving.t[point]
        first, second = (deterministic_step(schedule, grid[2 * i - k], grid[2 * i - k - 1]) for k in range(2))
        with torch.no_grad():
            here = Noisy(rows.x, rows.condition, rows.null, rows.noise, t)
            middle, _ = first.apply(rows.noise, predict(student, rows.noise, t, rows.condition, WEIGHTS))
            at_middle = torch.full((B,), first.target)
            end, _ = second.apply(middle, predict(student, middle, at_middle, rows.condition, WEIGHTS))
            target = two_step_target(partial(network_v, student, w=WEIGHTS), halving, rows.noise, here, point)
            other = two_step_target(
                partial(network_v, student, w=WEIGHTS.flip(0)), halving, rows.noise, here, point
            )
        landed, _ = deterministic_step(schedule, grid[2 * i], grid[2 * i - 2]).apply(rows.noise, target)
        assert torch.allclose(landed, end, atol=4e-6)
        assert float((target - other).abs().max()) > 1e-3


def test_a_stochastic_students_step_lands_where_two_teacher_steps_of_its_own_grid_do(
    schedule: NoiseSchedule, rows: Noisy
) -> None:
    n, w, grid = 4, WEIGHTS, schedule.grid(4)
    student, halving = tiny_student(0), HalvingTables.of(schedule, n, sampler="stochastic")
    for i in range(2, n + 1):
        point = torch.full((B,), i - 1)
        here = Noisy(rows.x, rows.condition, rows.null, rows.noise, halving.t[point])
        z = rows.noise
        with torch.no_grad():
            for t, s in ((grid[i], grid[i - 1]), (grid[i - 1], grid[i - 2])):
                v = predict(student, z, torch.full((B,), t), rows.condition, w)
                z, _ = deterministic_step(schedule, t, s).apply(z, v)
            target = two_step_target(partial(network_v, student, w=w), halving, rows.noise, here, point)
        landed, _ = deterministic_step(schedule, grid[i], grid[i - 2]).apply(rows.noise, target)
        assert torch.allclose(landed, z, atol=2e-6)


def test_a_stochastic_students_last_step_is_its_teachers(schedule: NoiseSchedule, rows: Noisy) -> None:
    student, halving = tiny_student(0), HalvingTables.of(schedule, 4, sampler="stochastic")
    point, w, t = torch.zeros(B, dtype=torch.long), WEIGHTS, torch.full((B,), schedule.grid(4)[1])
    here = Noisy(rows.x, rows.condition, rows.null, rows.noise, halving.t[point])
    assert torch.equal(here.t, t)
    with torch.no_grad():
        own = predict(student, rows.noise, t, rows.condition, w)
        assert torch.equal(two_step_target(partial(network_v, student, w=w), halving, rows.noise, here, point), own)


def test_a_stock_folder_brings_the_same_network_back(
    teacher: UNet2DConditionModel, schedule: NoiseSchedule, rows: Noisy, tmp_path: object
) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path)) / "student"
    student = student_of(teacher).eval()
    save_stock(folder, student, schedule, None)
    w = torch.full((B,), 2.0)
    with torch.no_grad():
        again = predict(load_stock(folder), rows.x, rows.t, rows.condition, w)
        assert torch.equal(again, predict(student, rows.x, rows.t, rows.condition, w))


def test_a_missing_network_says_what_to_run(tmp_path: object) -> None:
    from pathlib import Path

    with pytest.raises(JobError, match="python -m distill_jobs run"):
        load_stock(Path(str(tmp_path)))
