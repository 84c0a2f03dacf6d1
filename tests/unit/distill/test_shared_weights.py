"""One set of weights for every grid: exact at its start, exact when folded, taught by the right teacher."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from rich.progress import Progress

from distill_jobs.data.digits import class_condition
from distill_jobs.draws import Draws
from distill_jobs.halving import HalvingTables, drawn_points, two_step_target
from distill_jobs.job import run_job
from distill_jobs.objectives import Noisy, Tables, network_v
from distill_jobs.recipe_file import read_recipe
from distill_jobs.sections import GuidanceSection
from distill_jobs.shared_weights import GridRows, Grids
from distill_jobs.student import COND_PROJ, fold_grid, load_stock, predict, takes_grid, told_its_grid
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support.tiny_recipe import OVERRIDES
from tests.support.tiny_run import tiny_student

B = 8
SCHEDULE = NoiseSchedule(ScheduleSpec())
TABLES = Tables.of(SCHEDULE)


def tiny_shared(seed: int) -> UNet2DConditionModel:
    """Untrained, but answering to its grid: the new columns are random instead of zero."""
    shared = told_its_grid(tiny_student(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        columns = shared.get_parameter(COND_PROJ)[:, 256:]
        columns.copy_(torch.randn(columns.shape, generator=generator) * 0.1)
    return shared.eval()


@pytest.fixture
def rows() -> Noisy:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, B, 1, 8, 8, generator=generator).unbind()
    condition = class_condition(torch.arange(B))
    return Noisy(x, condition, class_condition(torch.full((B,), 10)), noise, torch.full((B,), 499))


def test_a_new_shared_network_is_its_student_on_every_grid(rows: Noisy) -> None:
    student, w = tiny_student(0), torch.linspace(0, 4, B)
    shared = told_its_grid(student).eval()
    assert takes_grid(shared)
    assert not takes_grid(student)
    with torch.no_grad():
        expected = predict(student, rows.x, rows.t, rows.condition, w)
        for n in (32, 4, 1):
            got = predict(shared, rows.x, rows.t, rows.condition, w, grid=torch.full((B,), n))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [32, 8, 2, 1])
def test_a_folded_network_is_the_shared_one_on_its_grid(n: int, rows: Noisy) -> None:
    shared, w = tiny_shared(1), torch.linspace(0, 4, B)
    folded = fold_grid(shared, n).eval()
    with torch.no_grad():
        want = predict(shared, rows.x, rows.t, rows.condition, w, grid=torch.full((B,), n))
        other = predict(shared, rows.x, rows.t, rows.condition, w, grid=torch.full((B,), 16))
        got = predict(folded, rows.x, rows.t, rows.condition, w)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert float((other - want).abs().max()) > 1e-4  # the grid matters


def test_rows_are_drawn_on_the_new_grid_by_its_share_and_on_the_others_equally() -> None:
    grids = Grids.of(SCHEDULE, (8, 4, 2), TABLES, 0.5)
    drawn = grids.draw(Draws(0, "d2"), 3, 400)
    assert [int((drawn.grid == n).sum()) for n in (8, 4, 2)] == [100, 100, 200]
    for n in (8, 4, 2):
        t = grids.tables.t[drawn.point[drawn.grid == n]]
        assert set(t.tolist()) == set(SCHEDULE.grid(n)[1:])


def test_of_each_grid_a_share_of_the_rows_is_where_there_is_guidance() -> None:
    bounds = GuidanceSection(min=1, max=9, default=4, log_snr_min=-2, log_snr_max=0.5)
    tables = Tables.of(SCHEDULE, off=bounds.off(SCHEDULE))
    grids = Grids.of(SCHEDULE, (8, 4, 2), tables, 0.5, guided_share=0.75)
    every = [grids.draw(Draws(0, "d2"), update, 400) for update in range(100)]
    grid, point = (torch.cat([getattr(drawn, name) for drawn in every]) for name in ("grid", "point"))
    assert torch.equal(grid, torch.tensor([8] * 8 + [4] * 4 + [2] * 2)[point])
    for n, guided in ((8, {749, 624, 499}), (4, {749, 499}), (2, {999, 499})):  # of 2 steps both have some
        t = grids.tables.t[point[grid == n]].tolist()
        share = 0.75 if n > 2 else 1.0
        for each in SCHEDULE.grid(n)[1:]:
            likely = share / len(guided) if each in guided else (1 - share) / (n - len(guided))
            assert t.count(each) / len(t) == pytest.approx(likely, abs=0.01)


@pytest.mark.parametrize("guided", [[True] * 8, [False] * 8, [True] + [False] * 7])
def test_points_are_equally_often_without_a_share_or_where_all_are_alike(guided: list[bool]) -> None:
    u = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    share = None if len(set(guided)) > 1 else 0.75
    assert drawn_points(u, torch.tensor(guided), share).bincount().tolist() == [100] * 8


def test_the_first_phase_has_one_grid() -> None:
    drawn = Grids.of(SCHEDULE, (8,), TABLES, 0.5).draw(Draws(0, "d8"), 0, 40)
    assert set(drawn.grid.tolist()) == {8}
    assert set(drawn.point.tolist()) == set(range(8))


def test_stage_one_teaches_the_first_grid_and_the_snapshot_the_others_on_grids_twice_as_fine(rows: Noisy) -> None:
    anchor, snapshot, w = tiny_student(0), tiny_shared(1), torch.linspace(0, 4, B)
    grids = Grids.of(SCHEDULE, (4, 2, 1), TABLES, 0.5)
    drawn = GridRows(torch.tensor([4, 4, 4, 2, 2, 1, 1, 4]), torch.tensor([0, 3, 1, 4, 5, 6, 6, 2]))
    at = Noisy(rows.x, rows.condition, rows.null, rows.noise, grids.tables.t[drawn.point])
    got = grids.target(partial(network_v, anchor), snapshot, rows.noise, at, drawn, w)
    with torch.no_grad():
        for i in range(B):
            n, mine = int(drawn.grid[i]), torch.arange(B) == i
            point = drawn.point[mine] - {4: 0, 2: 4, 1: 6}[n]
            teacher, grid = (anchor, None) if n == 4 else (snapshot, torch.tensor([2 * n]))
            own = HalvingTables.of(SCHEDULE, n)
            field = partial(network_v, teacher, w=w[mine], grid=grid)
            want = two_step_target(field, own, rows.noise[mine], at[mine], point)
            torch.testing.assert_close(got[mine], want, rtol=0, atol=2e-6)


def test_a_job_folds_its_last_network_into_every_student(tmp_path: Path) -> None:
    recipe = read_recipe("digits-shared", OVERRIDES)
    folder = run_job(recipe, tmp_path / "run", resume=False, progress=Progress(disable=True))
    shared = load_stock(folder.shared(1))
    assert bool(shared.get_parameter(COND_PROJ)[:, 256:].any())
    for n in (4, 2, 1):
        folded, student = fold_grid(shared, n).state_dict(), load_stock(folder.student(n)).state_dict()
        assert all(torch.equal(folded[name], student[name]) for name in student)


def test_a_kept_network_is_folded_for_its_grids_as_its_phase_left_it(tmp_path: Path) -> None:
    halvings = "[{steps: 4, updates: 4}, {steps: 2, updates: 4, keep: true}, {steps: 1, updates: 4}]"
    recipe = read_recipe("digits-shared", [*OVERRIDES, f"stage_two.halvings={halvings}"])
    assert recipe.stage_two.networks == ((4, 2), (1,))
    assert read_recipe("digits-shared", OVERRIDES).stage_two.networks == ((4, 2, 1),)
    assert read_recipe("digits", OVERRIDES).stage_two.networks == ((4,), (2,), (1,))
    folder = run_job(recipe, tmp_path / "run", resume=False, progress=Progress(disable=True))
    kept, last = load_stock(folder.shared(2)), load_stock(folder.shared(1))
    for n, network in ((4, kept), (2, kept), (1, last)):
        folded, student = fold_grid(network, n).state_dict(), load_stock(folder.student(n)).state_dict()
        assert all(torch.equal(folded[name], student[name]) for name in student)
    assert not torch.equal(kept.get_parameter(COND_PROJ), last.get_parameter(COND_PROJ))
