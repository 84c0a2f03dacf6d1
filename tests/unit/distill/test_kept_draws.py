"""What kept latents are known by: all that they depend on, and not how a recipe's file happens to be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill_jobs.pipelines.kept import KeptDraws, fingerprint_of

UNET = {"in_channels": 6, "block_out_channels": [48, 96]}


def test_the_order_of_a_recipes_fields_is_no_part_of_it() -> None:
    turned = dict(reversed(UNET.items()))
    assert list(turned) != list(UNET)
    assert fingerprint_of([UNET, 4.0], []) == fingerprint_of([turned, 4.0], [])


@pytest.mark.parametrize(
    ("parts", "tensors"),
    [
        ([{**UNET, "in_channels": 4}, 4.0], [torch.zeros(2)]),
        ([{**UNET, "block_out_channels": [96, 48]}, 4.0], [torch.zeros(2)]),
        ([4.0, UNET], [torch.zeros(2)]),
        ([UNET, 4.0], [torch.ones(2)]),
        ([UNET, 4.0], [torch.zeros(2, 1)]),
        ([UNET, 4.0], [None]),
        ([UNET, 4.0], []),
    ],
)
def test_everything_else_is(parts: list[object], tensors: list[Tensor | None]) -> None:
    assert fingerprint_of(parts, tensors) != fingerprint_of([UNET, 4.0], [torch.zeros(2)])


def test_latents_are_drawn_once_taken_from_another_run_and_never_where_they_are_of_something_else(
    tmp_path: Path,
) -> None:
    drawn: list[float] = []

    def draw(value: float) -> Tensor:
        drawn.append(value)
        return torch.full((2, 1), value)

    own, lender = tmp_path / "own", tmp_path / "lender"
    KeptDraws(lender).latents("a", "same", lambda: draw(1.0))
    kept = KeptDraws(own, (lender,))
    assert kept.latents("a", "same", lambda: draw(2.0)).tolist() == [[1.0], [1.0]]
    assert kept.latents("a", "other", lambda: draw(3.0)).tolist() == [[3.0], [3.0]]
    assert KeptDraws(own).latents("a", "other", lambda: draw(4.0)).tolist() == [[3.0], [3.0]]
    assert (drawn, kept.lent) == ([1.0, 3.0], ["a"])
    (own / "a" / "latents.safetensors").write_bytes(b"spoilt")
    assert KeptDraws(own).latents("a", "other", lambda: draw(5.0)).tolist() == [[5.0], [5.0]]
