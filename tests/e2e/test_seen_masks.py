"""A model whose networks see the mask, against a real process: masks, edits and text in one server."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from engines.masks import hide, latent_mask, paste_known
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from engines.rows import Drawing, Row
from tests.support.pictures import file_of, mask_file, photo
from tests.support.serving import serving
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

BOX = (16, 16, 40, 48)
PHOTO, MASK = file_of(photo()), mask_file(BOX)
AREA = np.zeros((64, 64), np.bool_)
AREA[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
SEED = 5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("bundles") / "toy", ToyOptions(seeing=True)).path


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return open_pipeline(bundle, rungs=(1,), warm=False)


@pytest.fixture(scope="module")
def http(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("seen-masks") / "log"
    with serving([bundle], log=log) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def edited(http: httpx.Client, files: dict[str, bytes], **fields: str) -> np.ndarray:
    answer = http.post("/v1/images/edits", data={"prompt": "three", "seed": str(SEED), **fields}, files=files)
    return pixels(answer)


def pixels(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


def drawing(pipeline: Pipeline, masked: np.ndarray | None) -> Drawing:
    manifest = pipeline.manifest
    condition = pipeline.condition(["three"])[0]
    return Drawing(manifest, pipeline.student(None), condition, manifest.guidance.default, masked)


def drawn(pipeline: Pipeline, row: Row) -> np.ndarray:
    while not row.done:
        pipeline.step([row])
    return np.asarray(pipeline.decode([row.latent])[0])


def test_an_inpainting_sees_the_rest_of_the_image_and_keeps_it(http: httpx.Client, pipeline: Pipeline) -> None:
    size, known = pipeline.manifest.sizes[0], np.asarray(photo())
    got = edited(http, {"image": PHOTO, "mask": MASK})
    assert (got[~AREA] == known[~AREA]).all()
    latent, masked = pipeline.encode([known])[0], pipeline.encode([hide(known, AREA, size)])[0]
    row = drawing(pipeline, masked).from_image(SEED, latent, 1.0, latent_mask(AREA, size))
    assert (got == paste_known(drawn(pipeline, row), known, AREA)).all()


def test_what_is_drawn_depends_on_what_is_beside_it_alone(http: httpx.Client) -> None:
    inside, beside = np.asarray(photo()).copy(), np.asarray(photo()).copy()
    inside[AREA] = 200
    beside[:8] = 0

    def with_image(image: np.ndarray) -> np.ndarray:
        return edited(http, {"image": file_of(Image.fromarray(image)), "mask": MASK}, strength="1")

    first = edited(http, {"image": PHOTO, "mask": MASK}, strength="1")
    away = (slice(BOX[1] + 2, BOX[3] - 2), slice(BOX[0] + 2, BOX[2] - 2))  # from the seam, where both are mixed
    assert (with_image(inside)[away] == first[away]).all()
    assert not (with_image(beside)[away] == first[away]).all()


def test_text_and_edits_see_an_empty_page(http: httpx.Client, pipeline: Pipeline) -> None:
    blank = pipeline.blank(pipeline.manifest.sizes[0])
    answer = http.post("/v1/images/generations", json={"prompt": "three", "seed": SEED})
    assert (pixels(answer) == drawn(pipeline, drawing(pipeline, blank).from_noise(SEED))).all()
    latent = pipeline.encode([np.asarray(photo())])[0]
    row = drawing(pipeline, blank).from_image(SEED, latent, 0.5)
    assert (edited(http, {"image": PHOTO}, strength="0.5") == drawn(pipeline, row)).all()
