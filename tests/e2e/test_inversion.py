"""Edits by inversion, against a real process: encoded under the source prompt, drawn under the other."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from engines.open import open_pipeline
from engines.rows import Drawing, find_encoder
from tests.support.pictures import file_of, photo
from tests.support.serving import serving
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

PHOTO = file_of(photo())
INVERT = {"prompt": "three", "mode": "invert", "source_prompt": "two", "steps": "4", "seed": "5"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("bundles") / "toy", ToyOptions(encoders=(8, 2))).path


@pytest.fixture(scope="module")
def http(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("inversion") / "log"
    with serving([bundle], log=log) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def edit(http: httpx.Client, **fields: str) -> httpx.Response:
    return http.post("/v1/images/edits", data={**INVERT, **fields}, files={"image": PHOTO})


def picture(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))


def drawn(bundle: Path, encoder_steps: int) -> np.ndarray:
    """(64, 64, 3) of the pipeline alone."""
    pipeline = open_pipeline(bundle, rungs=(1,), warm=False)
    known = pipeline.encode([np.asarray(photo())])[0]
    source, target = pipeline.condition(["two"])[0], pipeline.condition(["three"])[0]
    encoder = find_encoder(pipeline.manifest, pipeline.student(4), encoder_steps)
    guidance_scale = pipeline.manifest.guidance.default
    row = Drawing(pipeline.manifest, pipeline.student(4), target, guidance_scale).from_inversion(
        5, known, encoder, source
    )
    while not row.done:
        pipeline.step([row])
    return pipeline.decode([row.latent])[0]


@pytest.mark.parametrize(("fields", "encoder_steps"), [({}, 8), ({"encoder_steps": "2"}, 2)])
def test_an_inversion_is_what_the_pipeline_makes_of_it(
    http: httpx.Client, bundle: Path, fields: dict[str, str], encoder_steps: int
) -> None:
    made = picture(edit(http, **fields))
    assert (np.asarray(made) == drawn(bundle, encoder_steps)).all()
    assert f'"encoder_steps": {encoder_steps}' in str(made.info)


def test_a_job_inverts_as_an_edit_does(http: httpx.Client) -> None:
    body: dict[str, Any] = {**INVERT, "steps": 4, "seed": 5, "task": "edit"}
    body["image"] = base64.b64encode(PHOTO).decode("ascii")
    job = http.post("/v1/jobs", json=body, headers={"prefer": "wait=60"}).json()
    assert (job["status"], job["mode"], job["strength"]) == ("succeeded", "invert", None)
    assert (job["steps"], job["encoder_steps"], job["step"], job["total_steps"]) == (4, 8, 12, 12)
    told = http.get(job["events_url"]).text.strip().rsplit("data: ", 1)[1]
    last = json.loads(told)
    assert (last["step"], last["steps"], last["total_steps"]) == (12, 4, 12)
    assert last["job"] == http.get(job["status_url"]).json()
    got = Image.open(io.BytesIO(http.get(job["images"][0]["url"]).content))
    assert (np.asarray(got) == np.asarray(picture(edit(http)))).all()


def test_steps_without_an_encoder_are_refused_by_the_trained_ones(http: httpx.Client) -> None:
    error = edit(http, encoder_steps="16").json()["error"]
    assert (error["code"], error["param"]) == ("out_of_range", "encoder_steps")
    assert "2, 8" in error["message"]


def test_encoder_steps_of_an_edit_by_noise_are_refused(http: httpx.Client) -> None:
    error = edit(http, encoder_steps="8", mode="noise", source_prompt="").json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_value", "encoder_steps")
