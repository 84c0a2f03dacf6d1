"""What is measured of decoded pictures beside those of the data."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from distill_jobs.features import FeatureSpace
from distill_jobs.pipelines import pictures
from distill_jobs.pipelines.decoders import decoded
from distill_jobs.pipelines.pictures import TEXT_AGREEMENT, PictureJudge

SAMPLES = 24
DATA = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
CAPTIONS = [str(index) for index in range(len(DATA))]


def means(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3))


def embedded(captions: Sequence[str]) -> Tensor:
    """As CLIP would, had it learned these pictures by heart."""
    return means(torch.stack([DATA[int(caption)] for caption in captions]))


def judge(told: bool = True) -> PictureJudge:
    space = FeatureSpace("mean", "0", means, embedded if told else None)
    batches = ((DATA[first : first + 8], CAPTIONS[first : first + 8]) for first in range(0, 32, 8))
    return PictureJudge.of(space, SAMPLES, batches, decode=lambda latents: latents / 2)


def test_the_datas_own_pictures_are_perfect() -> None:
    found = judge().measure(2 * DATA[:SAMPLES])
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found[TEXT_AGREEMENT] == pytest.approx(1)


def test_pictures_of_other_prompts_agree_less_and_are_as_good_otherwise() -> None:
    found = judge().measure(2 * DATA[:SAMPLES].flip(0))
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert found[TEXT_AGREEMENT] < 0.6


def test_one_picture_for_all_prompts_costs_variety() -> None:
    found = judge().measure(2 * DATA[:1].expand(SAMPLES, -1, -1, -1))
    assert found["precision"] == 1
    assert found["recall"] < 0.5
    assert found["frechet_distance"] > 0.01


def test_parts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = judge().measure(DATA[:SAMPLES])
    monkeypatch.setattr(pictures, "DECODED_ROWS", 5)
    assert judge().measure(DATA[:SAMPLES]) == pytest.approx(whole)


@pytest.mark.parametrize(("batch_size", "parts"), [(10, [10, 10, 4]), (100, [24])])
def test_no_more_is_decoded_at_once_than_the_evaluation_draws(batch_size: int, parts: list[int]) -> None:
    seen: list[int] = []

    class Doubling(nn.Module):
        def decode(self, latents: Tensor) -> Tensor:
            seen.append(len(latents))
            return 2 * latents

    found = decoded(Doubling(), DATA[:SAMPLES], torch.device("cpu"), batch_size)
    assert torch.equal(found, 2 * DATA[:SAMPLES])
    assert seen == parts


def test_a_space_without_words_measures_no_agreement() -> None:
    assert TEXT_AGREEMENT not in judge(told=False).measure(DATA[:SAMPLES])
