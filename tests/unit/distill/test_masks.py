"""Random masks: their kinds and shapes, the channels made of them, and that a row's depend on its address alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from distill_jobs.data.digits import Digits, DigitsSource
from distill_jobs.data.masks import NUMBERS, MaskedSource, random_masks
from distill_jobs.draws import Draw, Draws
from distill_jobs.errors import RecipeError
from distill_jobs.job import run_job
from distill_jobs.objectives import Noisy, Tables, guided_v
from distill_jobs.recipe_file import read_recipe
from distill_jobs.sections import InpaintingSection
from distill_jobs.student import load_stock, new_teacher, predict
from engines.masks import HIDDEN
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support.tiny_recipe import OVERRIDES

ROWS, SIDE = 400, 8
DRAWS = Draws(3, "teacher")


def masks(boxes: float, strokes: float) -> Tensor:
    """(ROWS, SIDE, SIDE) bool."""
    numbers = DRAWS.uniforms(5, (ROWS, NUMBERS), Draw.MASK)
    return random_masks(numbers, InpaintingSection(boxes=boxes, strokes=strokes), SIDE, SIDE)[:, 0] > 0


def test_no_mask_is_empty_and_some_hide_everything() -> None:
    drawn = masks(0.4, 0.4)
    assert bool(drawn.any(dim=(1, 2)).all())
    whole = float(drawn.all(dim=2).all(dim=1).float().mean())
    assert 0.15 < whole < 0.3


def test_a_box_is_a_rectangle_of_any_size_and_place() -> None:
    drawn = masks(0.999, 0.0)
    rows, columns = drawn.any(dim=2), drawn.any(dim=1)
    assert torch.equal(drawn, rows[:, :, None] & columns[:, None, :])
    steps = torch.diff(rows.int(), dim=1).abs().sum(dim=1)
    assert int(steps.max()) <= 2  # one run of rows
    assert set(rows.sum(dim=1).tolist()) == set(range(1, SIDE + 1))
    assert bool(drawn[:, 0].any()) and bool(drawn[:, -1].any())  # noqa: PT018


def test_a_stroke_is_in_one_piece() -> None:
    drawn = masks(0.0, 0.999)[:60].float()[:, None]
    for mask in drawn:
        seed = torch.zeros_like(mask)
        seed.view(-1)[int(mask.flatten().argmax())] = 1
        for _ in range(SIDE * SIDE):
            seed = torch.nn.functional.max_pool2d(seed, 3, 1, 1) * mask
        assert torch.equal(seed, mask)


def test_rows_see_the_mask_and_the_image_in_grey_behind_it() -> None:
    source = MaskedSource(DigitsSource(Digits.load()), InpaintingSection())
    batch = source.batch(DRAWS, 2, 16)
    assert batch.extra is not None
    mask, seen = batch.extra.split(1, dim=1)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(seen[mask == 0], batch.x[mask == 0])
    torch.testing.assert_close(seen[mask == 1], torch.full_like(seen[mask == 1], HIDDEN))


@pytest.mark.parametrize("of", [2, 4])
def test_shares_of_a_batch_see_the_masks_of_the_whole(of: int) -> None:
    source = MaskedSource(DigitsSource(Digits.load()), InpaintingSection())
    whole = source.batch(DRAWS, 7, 16).extra
    parts = [source.batch(DRAWS.share(k, of), 7, 16 // of).extra for k in range(of)]
    assert whole is not None
    assert torch.equal(torch.cat([part for part in parts if part is not None]), whole)
    other = source.batch(DRAWS, 8, 16).extra
    assert other is not None
    assert not torch.equal(other, whole)


INPAINT = [
    *OVERRIDES,
    "teacher={updates: 3, batch_size: 8}",
    "stage_one={updates: 3, batch_size: 8, max_relative_error: 10}",
    "stage_two.halvings=[{steps: 2, updates: 3}]",
    "export.students=[2]",
    "export.default_steps=2",
]


def test_guidance_drops_the_condition_and_keeps_the_image() -> None:
    teacher = new_teacher(read_recipe("digits-inpaint", INPAINT).unet, 0).eval()
    source = MaskedSource(DigitsSource(Digits.load()), InpaintingSection())
    data, t = source.batch(DRAWS, 0, 4), torch.full((4,), 500)
    rows = Noisy(data.x, data.condition, source.null(4), data.x, t, data.extra)
    w, tables = torch.full((4,), 2.0), Tables.of(NoiseSchedule(ScheduleSpec()))
    with torch.no_grad():
        c, u = (predict(teacher, data.x, t, told, extra=data.extra) for told in (rows.condition, rows.null))
        torch.testing.assert_close(guided_v(teacher, tables, data.x, rows, w), c + 2 * (c - u), rtol=0, atol=1e-5)


def test_a_job_trains_networks_of_three_channels(tmp_path: Path) -> None:
    recipe = read_recipe("digits-inpaint", INPAINT)
    folder = run_job(recipe, tmp_path / "run", resume=False, progress=Progress(disable=True))
    student = load_stock(folder.student(2))
    assert (student.config.in_channels, student.config.out_channels) == (3, 1)
    seen = student.conv_in.weight[:, 1:]
    assert not torch.equal(seen, load_stock(folder.stage_one).conv_in.weight[:, 1:])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("inpainting={boxes: 0.5, strokes: 0.5}", "leave a share"),
        ("inpainting=null", r"unet\.in_channels must be 1"),
    ],
)
def test_a_wrong_section_is_refused_by_name(override: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        read_recipe("digits-inpaint", [override])
