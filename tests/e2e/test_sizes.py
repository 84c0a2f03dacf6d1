"""A model of several sizes over HTTP: the request chooses, others are refused, and company changes nothing."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.pictures import file_of, mask_file, photo
from tests.support.serving import serving

SIZES = ["64x64", "96x64", "64x128"]
DRAW = "/v1/images/generations"


@pytest.fixture(scope="module")
def http(sized_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("sizes") / "log"
    with serving([sized_bundle], log=log) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def file_in(answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def size_of(answer: httpx.Response) -> str:
    with Image.open(io.BytesIO(file_in(answer))) as image:
        drawn = f"{image.width}x{image.height}"
        assert json.loads(image.info["halfstep"])["size"] == drawn
    assert answer.json()["size"] == drawn
    return drawn


def wish(**fields: Any) -> dict[str, Any]:
    return {"prompt": "seven", "seed": 3, **fields}


def test_models_list_their_sizes_the_default_first(http: httpx.Client) -> None:
    [model] = http.get("/v1/models").json()["data"]
    assert model["sizes"] == SIZES


def test_the_request_chooses_and_the_first_is_the_default(http: httpx.Client) -> None:
    assert size_of(http.post(DRAW, json=wish())) == "64x64"
    assert size_of(http.post(DRAW, json=wish(size="auto"))) == "64x64"
    assert [size_of(http.post(DRAW, json=wish(size=size))) for size in SIZES] == SIZES
    large, small = (http.post(DRAW, json=wish(size=size)).json()["usage"] for size in ("64x128", "64x64"))
    assert large["output_tokens"] == 2 * small["output_tokens"]


@pytest.mark.parametrize("size", ["128x64", "64X64", "64", "1x1"])
def test_a_size_that_it_has_not_is_refused_with_those_it_has(http: httpx.Client, size: str) -> None:
    edit = {"data": {"prompt": "seven", "size": size}, "files": {"image": ("a.png", file_of(photo()))}}
    for answer in (http.post(DRAW, json=wish(size=size)), http.post("/v1/images/edits", **edit)):
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "size", "out_of_range")
        assert error["message"] == "size must be auto or 64x64, 96x64, 64x128."
    job = http.post("/v1/jobs", json={"task": "text_to_image", **wish(size=size)})
    assert (job.status_code, job.json()["error"]["param"]) == (422, "size")


def test_a_job_is_drawn_in_its_size(http: httpx.Client) -> None:
    job = http.post("/v1/jobs", json={"task": "text_to_image", **wish(size="96x64")}, headers={"Prefer": "wait=60"})
    answer = http.get(f"/v1/jobs/{job.json()['id']}/images/0")
    assert Image.open(io.BytesIO(answer.content)).size == (96, 64)


def test_bytes_are_the_same_alone_and_in_the_company_of_other_sizes(http: httpx.Client) -> None:
    wishes = [wish(size=SIZES[i % 3], seed=i, steps=(1, 4, 8)[i % 2]) for i in range(12)]
    alone = [file_in(http.post(DRAW, json=each)) for each in wishes]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda each: file_in(http.post(DRAW, json=each)), wishes))
    assert together == alone


@pytest.mark.parametrize(("taken", "size"), [((300, 200), "96x64"), ((100, 240), "64x128"), ((50, 50), "64x64")])
def test_an_edit_takes_the_size_of_nearest_shape(http: httpx.Client, taken: tuple[int, int], size: str) -> None:
    files = {"image": ("a.png", file_of(photo(taken)))}
    assert size_of(http.post("/v1/images/edits", data={"prompt": "one"}, files=files)) == size
    chosen = {"prompt": "one", "size": "64x64"}
    assert size_of(http.post("/v1/images/edits", data=chosen, files=files)) == "64x64"


def test_what_is_outside_the_mask_stays_at_any_size(http: httpx.Client) -> None:
    sent, box = photo((64, 128)), (8, 64, 40, 120)
    files = {"image": ("a.png", file_of(sent)), "mask": ("m.png", mask_file(box, (64, 128)))}
    answer = http.post("/v1/images/edits", data={"prompt": "one"}, files=files)
    got = np.asarray(Image.open(io.BytesIO(file_in(answer))).convert("RGB"))
    inside = np.zeros((128, 64), np.bool_)
    inside[box[1] : box[3], box[0] : box[2]] = True
    assert (got[~inside] == np.asarray(sent)[~inside]).all()
    assert (got[inside] != np.asarray(sent)[inside]).any()


def test_a1111_clients_get_the_nearest_size_and_are_told(http: httpx.Client) -> None:
    answer = http.post("/sdapi/v1/txt2img", json={"prompt": "one", "width": 900, "height": 600, "steps": 4})
    drawn = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))
    assert drawn.size == (96, 64)
    assert json.loads(answer.json()["info"])["adjusted"]["width"] == {"from": 900, "to": 96}
    wish = {"prompt": "one", "init_images": [base64.b64encode(file_of(photo())).decode()], "steps": 4}
    edited = http.post("/sdapi/v1/img2img", json={**wish, "width": 60, "height": 130})
    assert Image.open(io.BytesIO(base64.b64decode(edited.json()["images"][0]))).size == (64, 128)


def test_steps_are_timed_by_size(http: httpx.Client) -> None:
    text = http.get("/metrics").text
    for size in SIZES:
        assert re.search(rf'halfstep_step_seconds_count\{{[^}}]*size="{size}"[^}}]*\}} [1-9]', text)
