"""Rows that start from an image: entry by noising, inpainting, inversion, and the pixels that must not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.errors import RequestError
from engines.masks import HIDDEN_LEVEL, hide, latent_mask, paste_known
from engines.noise import Purpose, row_noise
from engines.open import open_pipeline
from engines.pipeline import Pipeline, find_student
from engines.rows import Drawing, Row, find_encoder
from engines.sampler import Sampler, encoder_plan
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support.pictures import photo
from tests.support.toy_bundle import ToyOptions, make_toy_bundle


@pytest.fixture(scope="module")
def pipeline(toy_bundle: Path) -> Pipeline:
    return open_pipeline(toy_bundle, rungs=(1, 2, 4, 8), warm=False)


@pytest.fixture(scope="module")
def known(pipeline: Pipeline) -> np.ndarray:
    return pipeline.encode([np.asarray(photo())])[0]


def drawing(pipeline: Pipeline, prompt: str = "seven", guidance_scale: float = 2.0, steps: int = 4) -> Drawing:
    return Drawing(pipeline.manifest, pipeline.student(steps), pipeline.condition([prompt])[0], guidance_scale)


def run(pipeline: Pipeline, rows: list[Row]) -> list[bytes]:
    while alive := [row for row in rows if not row.done]:
        for key in {row.batch_key for row in alive}:
            pipeline.step([row for row in alive if row.batch_key == key])
    return [row.latent.tobytes() for row in rows]


def test_encoding_undoes_decoding(pipeline: Pipeline) -> None:
    latents = np.random.default_rng(0).uniform(-1, 1, (3, 1, 8, 8)).astype(np.float32)
    again = pipeline.encode(list(pipeline.decode(list(latents))))
    assert np.abs(again - latents).max() <= 1 / 127.5


@pytest.mark.parametrize(("strength", "left"), [(1.0, 4), (0.99, 3), (0.75, 3), (0.5, 2), (0.3, 1), (0.01, 1)])
def test_strength_enters_at_a_trained_point(
    pipeline: Pipeline, known: np.ndarray, strength: float, left: int
) -> None:
    row = drawing(pipeline).from_image(7, known, strength)
    assert row.steps_left == left
    alpha, sigma = pipeline.manifest.noise_level(row.step.timestep)
    assert np.allclose(row.latent, alpha * known + sigma * row.noise, atol=1e-6)


def test_rows_of_every_task_share_batches_and_keep_their_bytes(pipeline: Pipeline, known: np.ndarray) -> None:
    mask = np.zeros((1, 8, 8), np.float32)
    mask[:, 2:6, 1:7] = 1

    def everyone() -> list[Row]:
        return [
            drawing(pipeline).from_noise(1),
            drawing(pipeline, "three", 4.5).from_image(2, known, 0.75),
            drawing(pipeline, "nine", 1.0).from_image(3, known, 1.0, mask),
            drawing(pipeline, "two", 3.0).from_image(4, known, 0.5, mask),
        ]

    rows = everyone()
    assert len({row.batch_key for row in rows}) == 1
    together = run(pipeline, rows)
    alone = [run(pipeline, [row])[0] for row in everyone()]
    assert together == alone


def test_rows_at_timesteps_of_their_own_share_batches_with_those_on_the_grid(
    pipeline: Pipeline, known: np.ndarray
) -> None:
    """As LCM's four steps, which the schedule's grid has not."""
    on_grid = drawing(pipeline)
    points = {"timesteps": (999, 759, 499, 259), "sampler": "consistency"}
    own = replace(on_grid, student=on_grid.student.model_copy(update=points))

    def everyone() -> list[Row]:
        return [own.from_noise(1), own.from_image(2, known, 0.75), on_grid.from_noise(1)]

    rows = everyone()
    assert [row.step.timestep for row in rows] == [999, 759, 999]
    assert len({row.batch_key for row in rows}) == 1
    together = run(pipeline, rows)
    assert together == [run(pipeline, [row])[0] for row in everyone()]
    assert together[0] != together[2]


def test_fresh_noise_is_of_the_step_it_is_drawn_for(pipeline: Pipeline) -> None:
    deterministic = drawing(pipeline)
    student = deterministic.student.model_copy(update={"sampler": "stochastic"})
    row = replace(deterministic, student=student).from_noise(7)
    shape = row.latent.shape
    wanted = [row_noise(7, shape, Purpose.STEP, step) for step in range(3)] + [row_noise(7, shape, Purpose.INITIAL)]
    for noise in wanted:  # the last step adds none
        np.testing.assert_array_equal(row.step_noise(), noise)
        row.position += 1


def test_inpainting_ends_on_the_known_latent_outside_the_mask(pipeline: Pipeline, known: np.ndarray) -> None:
    mask = np.zeros((1, 8, 8), np.float32)
    mask[:, 2:6, 1:7] = 1
    row = drawing(pipeline).from_image(3, known, 1.0, mask)
    run(pipeline, [row])
    outside = mask[0] == 0
    assert np.abs(row.latent[0][outside] - known[0][outside]).max() < 1e-6
    assert np.abs(row.latent[0][~outside] - known[0][~outside]).max() > 0.01


def test_a_cell_is_generated_if_any_of_its_pixels_is(pipeline: Pipeline) -> None:
    generated = np.zeros((64, 64), np.bool_)
    generated[8, 15] = True
    cells = latent_mask(generated, pipeline.manifest.sizes[0])
    assert cells.sum() == 1
    assert cells[0, 1, 1] == 1


def test_what_is_generated_is_hidden_by_whole_cells(pipeline: Pipeline) -> None:
    known, generated = np.asarray(photo()), np.zeros((64, 64), np.bool_)
    generated[8, 15] = True
    hidden = hide(known, generated, pipeline.manifest.sizes[0])
    assert (hidden[8:16, 8:16] == HIDDEN_LEVEL).all()
    outside = np.ones((64, 64), np.bool_)
    outside[8:16, 8:16] = False
    assert (hidden[outside] == known[outside]).all()


def test_known_pixels_come_back_exactly_and_the_seam_is_inside() -> None:
    known, drawn = np.asarray(photo(seed=1)), np.asarray(photo(seed=2))
    generated = np.zeros((64, 64), np.bool_)
    generated[10:50, 20:60] = True
    pasted = paste_known(drawn, known, generated)
    assert (pasted[~generated] == known[~generated]).all()
    assert (pasted[12:48, 22:58] == drawn[12:48, 22:58]).all()
    assert not (pasted[10, 20:60] == drawn[10, 20:60]).all()


def test_the_seam_is_wider_in_a_larger_image_and_its_levels_are_the_nearest() -> None:
    known, drawn = np.zeros((256, 300, 3), np.uint8), np.full((256, 300, 3), 100, np.uint8)
    generated = np.zeros((256, 300), np.bool_)
    generated[:, 50:] = True
    pasted = paste_known(drawn, known, generated)
    assert (pasted[..., 0] == [0] * 50 + [33, 67] + [100] * 248).all()


def test_a_mask_of_everything_has_no_seam() -> None:
    known, drawn = np.asarray(photo(seed=1)), np.asarray(photo(seed=2))
    assert (paste_known(drawn, known, np.ones((64, 64), np.bool_)) == drawn).all()


def test_inversion_needs_an_encoder(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match="mode noise"):
        find_encoder(pipeline.manifest, pipeline.student(4))


def test_an_encoder_is_the_wanted_one_or_of_as_many_steps_or_of_the_most(tmp_path: Path) -> None:
    manifest = make_toy_bundle(tmp_path / "toy", ToyOptions(encoders=(8, 4))).manifest
    eight, four, two = (find_student(manifest, n) for n in (8, 4, 2))
    assert [find_encoder(manifest, student).steps for student in (eight, four, two)] == [8, 4, 8]
    assert find_encoder(manifest, eight, wanted=4).steps == 4
    with pytest.raises(RequestError, match="4, 8"):
        find_encoder(manifest, eight, wanted=16)


def test_an_image_is_inverted_without_guidance_and_drawn_with_it(tmp_path: Path) -> None:
    manifest = make_toy_bundle(tmp_path / "toy", ToyOptions(encoders=(4,))).manifest
    student = find_student(manifest, 4)
    source, target, known = (np.full(shape, k, np.float32) for k, shape in enumerate([(1, 1), (1, 1), (1, 8, 8)]))
    row = Drawing(manifest, student, target, 3.0).from_inversion(7, known, find_encoder(manifest, student), source)
    assert [(leg.w, leg.condition is source) for leg in row.legs] == [(0.0, True), (2.0, False)]


@pytest.mark.parametrize("sampler", ["stochastic", "consistency"])
def test_inversion_is_not_drowned_in_fresh_noise(tmp_path: Path, sampler: Sampler) -> None:
    manifest = make_toy_bundle(tmp_path / "toy", ToyOptions(encoders=(4,))).manifest
    fresh = find_student(manifest, 4).model_copy(update={"sampler": sampler})
    with pytest.raises(RequestError, match=f"that of 4 steps is {sampler}") as told:
        find_encoder(manifest, fresh)
    assert told.value.param == "sampler"
    assert find_encoder(manifest, fresh.model_copy(update={"steps": 1})).steps == 4  # a single step adds none


@pytest.mark.parametrize("end", ["zero SNR", "as Stable Diffusion's"])
def test_inpainting_with_all_steps_starts_from_pure_noise(tmp_path: Path, end: str) -> None:
    """On a schedule that leaves some of the image at its end, too."""
    manifest = make_toy_bundle(tmp_path / "toy", ToyOptions()).manifest
    if end != "zero SNR":
        left = ScheduleSpec(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
        manifest = manifest.model_copy(update={"schedule": left})
    drawing = Drawing(manifest, find_student(manifest, 4), np.zeros((1, 1), np.float32), 2.0)
    known, mask = np.full((1, 8, 8), 5, np.float32), np.ones((1, 8, 8), np.float32)
    row = drawing.from_image(3, known, 1.0, mask)
    np.testing.assert_array_equal(row.latent, row.noise)
    alpha, sigma = manifest.noise_level(row.step.timestep)
    edited = drawing.from_image(3, known, 1.0)
    np.testing.assert_allclose(edited.latent, alpha * known + sigma * row.noise, rtol=1e-6)


def test_an_encoder_goes_from_the_clean_end_to_noise() -> None:
    plan = encoder_plan(NoiseSchedule(ScheduleSpec()), 4)
    assert plan.timesteps == (0, 249, 499, 749)
    assert [step.target for step in plan] == [249, 499, 749, 999]
    with pytest.raises(ValueError, match="fewer than"):
        encoder_plan(NoiseSchedule(ScheduleSpec()), 1000)
