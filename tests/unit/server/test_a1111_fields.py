"""AUTOMATIC1111's fields: how a request chooses its model, and what null means."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import verify_bundle
from server.api.a1111_fields import ImageWish, TextWish, adjusted_text, resolve_image, with_files_of
from server.catalogue import Catalogue, Model
from tests.support.pictures import file_of, photo


@pytest.fixture(scope="module")
def catalogue(toy_bundle: Path, sized_bundle: Path) -> Catalogue:
    return Catalogue(Model.of(verify_bundle(path), lambda _: 0.0) for path in (toy_bundle, sized_bundle))


@pytest.mark.parametrize(
    ("asked", "model", "size"),
    [
        (None, "toy-digits", "64x64"),
        ({}, "toy-digits", "64x64"),
        ({"sd_model_checkpoint": "toy-digits"}, "toy-digits", "64x64"),
        ({"sd_model_checkpoint": "toy-sized"}, "toy-sized", "64x128"),
    ],
)
def test_a_request_chooses_its_model(
    catalogue: Catalogue, asked: dict[str, Any] | None, model: str, size: str
) -> None:
    fields: dict[str, Any] = {"prompt": "seven", "width": 512, "height": 1024, "override_settings": asked}
    drawn, _ = adjusted_text(TextWish(**fields), catalogue)
    assert (drawn.model, drawn.size) == (model, size)
    wish = ImageWish(**fields, init_images=[base64.b64encode(file_of(photo())).decode()])
    edited = with_files_of(wish, resolve_image(wish, catalogue)[0])
    assert (edited.model, f"{edited.width}x{edited.height}") == (model, size)


def test_null_means_left_out(catalogue: Catalogue) -> None:
    fields: dict[str, Any] = {
        "prompt": "seven",
        "seed": 5,
        "init_images": [base64.b64encode(file_of(photo())).decode()],
    }
    empty = {name: None for name in ImageWish.model_fields if name not in fields}
    left_out, nulls = (
        resolve_image(wish, catalogue)[0].outline for wish in (ImageWish(**fields), ImageWish(**fields, **empty))
    )
    assert nulls == left_out
    drawn = adjusted_text(TextWish(prompt="seven", seed=None, batch_size=None, n_iter=None), catalogue)[0]
    assert drawn.n == 1
    assert drawn.seed is not None
