"""``response_format: url``: files in a folder, at addresses that are signed and end."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from server import start
from server.errors import StartError
from server.settings import Settings
from tests.support.keys import bearer, write_key_file
from tests.support.live import Live, live
from tests.support.pictures import file_of, photo
from tests.support.serving import until
from tests.support.webhook_receiver import LOOPBACK, SECRET, receiver

GENERATIONS, JOBS = "/v1/images/generations", "/v1/jobs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "results"


@pytest.fixture(scope="module")
def running(toy_bundle: Path, folder: Path) -> Iterator[Live]:
    with live(toy_bundle, result_store=str(folder), secret=SECRET) as made:
        yield made


@pytest.fixture
def http(running: Live) -> Iterator[httpx.Client]:
    with running.client() as client:
        yield client


def draw(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post(GENERATIONS, json={"prompt": "one", "seed": 1, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_the_sdk_gets_addresses_of_the_same_files(running: Live, http: httpx.Client) -> None:
    inline = draw(http, n=2)["data"]
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as sdk:
        answer = sdk.images.generate(prompt="one", n=2, response_format="url", extra_body={"seed": 1})
    assert answer.data is not None
    for image, sent in zip(answer.data, inline, strict=True):
        assert image.b64_json is None
        assert image.url is not None
        file = httpx.get(image.url)
        assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
        assert file.content == base64.b64decode(sent["b64_json"])
        assert set(sent) == {"b64_json", "seed"}


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_files_have_their_own_type(http: httpx.Client, kind: str) -> None:
    (image,) = draw(http, response_format="url", output_format=kind)["data"]
    file = http.get(image["url"])
    assert file.headers["content-type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(file.content)).format == kind.upper()


def test_an_edit_gives_an_address(http: httpx.Client) -> None:
    files = {"image": ("a.png", file_of(photo()))}
    fields = {"prompt": "three", "response_format": "url"}
    (image,) = http.post("/v1/images/edits", data=fields, files=files).json()["data"]
    assert Image.open(io.BytesIO(http.get(image["url"]).content)).format == "PNG"


def test_the_last_events_of_a_stream_have_the_addresses(http: httpx.Client) -> None:
    fields = {"prompt": "one", "stream": True, "partial_images": 1, "response_format": "url"}
    lines = http.post(GENERATIONS, json=fields).text.splitlines()
    first, last = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
    assert "b64_json" in first
    assert "b64_json" not in last
    assert http.get(last["url"]).status_code == 200


def test_a_job_tells_addresses_and_still_gives_its_files_itself(http: httpx.Client) -> None:
    job = http.post(
        JOBS, json={"prompt": "one", "n": 2, "response_format": "url"}, headers={"prefer": "wait=60"}
    ).json()
    assert job["status"] == "succeeded"
    for k, image in enumerate(http.get(job["status_url"]).json()["images"]):
        assert image["expires_at"] >= time.time()
        assert http.get(image["url"]).content == http.get(f"{job['status_url']}/images/{k}").content


def test_what_expired_or_was_changed_or_deleted_is_told_apart(
    running: Live, folder: Path, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = draw(http, response_format="url")["data"]
    changed = http.get(image["url"].replace("-1-0.png", "-2-0.png"))
    assert (changed.status_code, changed.json()["error"]["code"]) == (403, "invalid_signature")
    bare = http.get(image["url"].partition("?")[0])
    assert (bare.status_code, bare.json()["error"]["code"]) == (403, "invalid_signature")
    monkeypatch.setattr(running.service.links, "_clock", lambda: image["expires_at"] + 1.0)
    expired = http.get(image["url"])
    assert (expired.status_code, expired.json()["error"]["code"]) == (403, "url_expired")
    monkeypatch.undo()
    for file in (folder / str(image["expires_at"])).iterdir():
        file.unlink()
    gone = http.get(image["url"])
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "file_not_found")


def test_a_webhook_names_the_addresses(toy_bundle: Path, tmp_path: Path) -> None:
    settings = {"result_store": str(tmp_path / "results"), "secret": SECRET}
    with (
        receiver() as (origin, heard),
        live(toy_bundle, webhook_allow=(origin, LOOPBACK), **settings) as running,
        running.client() as client,
    ):
        client.post(JOBS, json={"prompt": "one", "response_format": "url", "webhook_url": origin})
        until(lambda: heard, "it was told")
        (image,) = json.loads(heard[0][1])["images"]
        assert client.get(image["url"]).headers["content-type"] == "image/png"


@pytest.mark.parametrize(("path", "status"), [(GENERATIONS, 400), (JOBS, 422)])
def test_without_a_store_the_field_is_refused_by_name(toy_bundle: Path, path: str, status: int) -> None:
    with live(toy_bundle) as running, running.client() as client:
        refused = client.post(path, json={"prompt": "one", "response_format": "url"})
        assert client.get("/files/1/a.png?expires=1&signature=x").status_code == 404
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (status, "unsupported_value", "response_format")
    assert "HALFSTEP_RESULT_STORE" in error["message"]


def test_an_address_needs_no_key_and_its_job_does(toy_bundle: Path, tmp_path: Path) -> None:
    keys = write_key_file(tmp_path / "keys.json")
    settings = {"api_keys": tmp_path / "keys.json", "result_store": str(tmp_path / "results"), "secret": SECRET}
    with live(toy_bundle, **settings) as running, running.client() as client:
        body = {"prompt": "one", "response_format": "url"}
        job = client.post(JOBS, json=body, headers={"prefer": "wait=60", **bearer(keys["a"])}).json()
        assert client.get(job["images"][0]["url"]).status_code == 200
        assert client.get(job["status_url"]).status_code == 401


def test_another_api_opens_an_address_if_it_has_the_same_secret(
    running: Live, http: httpx.Client, toy_bundle: Path, folder: Path
) -> None:
    (image,) = draw(http, response_format="url")["data"]
    path = image["url"].removeprefix(running.url)
    for secret, status in ((SECRET, 200), (SECRET.upper(), 403)):
        with live(toy_bundle, result_store=str(folder), secret=secret) as other, other.client() as client:
            assert client.get(path).status_code == status


def test_what_an_ended_process_left_is_swept_by_the_next(toy_bundle: Path, tmp_path: Path) -> None:
    left = tmp_path / "results" / "1000000020" / "an-attempt-that-died-1-0.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    with live(toy_bundle, result_store=str(tmp_path / "results")):
        until(lambda: not left.exists(), "it is swept")


def test_a_store_that_is_away_fails_what_needs_it_and_nothing_else(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.finishing.STORE_RETRY_S", 0.01)
    monkeypatch.setattr("server.finishing.STORE_PATIENCE_S", 0.05)
    folder = tmp_path / "results"
    with live(toy_bundle, result_store=str(folder)) as running, running.client() as client:
        folder.rmdir()
        folder.write_text("")
        failed = client.post(GENERATIONS, json={"prompt": "one", "response_format": "url"})
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "result_store_unavailable")
        assert int(failed.headers["retry-after"]) >= 1
        assert draw(client)["data"][0]["b64_json"]
        assert running.count("halfstep_result_store_failures_total", operation="write") >= 2


def test_an_outage_is_waited_out_once_and_not_by_every_job(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits takes room in its worker, and images without addresses would find none."""
    monkeypatch.setattr("server.finishing.STORE_RETRY_S", 0.01)
    monkeypatch.setattr("server.finishing.STORE_PATIENCE_S", 0.3)
    folder = tmp_path / "results"
    with live(toy_bundle, result_store=str(folder)) as running, running.client() as client:
        folder.rmdir()
        folder.write_text("")
        body = {"prompt": "one", "response_format": "url"}
        tries = []
        for _ in range(3):
            assert client.post(GENERATIONS, json=body).status_code == 503
            tries.append(running.count("halfstep_result_store_failures_total", operation="write"))
        assert tries[0] > 3
        assert tries[1:] == [tries[0] + 1, tries[0] + 2]
        folder.unlink()
        assert client.post(GENERATIONS, json=body).status_code == 200


def test_a_store_that_comes_back_in_time_loses_nothing(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.finishing.STORE_RETRY_S", 0.01)
    folder = tmp_path / "results"
    with live(toy_bundle, result_store=str(folder)) as running, running.client() as client:
        folder.rmdir()
        folder.write_text("")
        job = client.post(JOBS, json={"prompt": "one", "response_format": "url"}).json()
        until(lambda: running.count("halfstep_result_store_failures_total", operation="write") >= 2, "it was tried")
        folder.unlink()
        until(lambda: client.get(job["status_url"]).json()["status"] == "succeeded", "it was stored")
        (image,) = client.get(job["status_url"]).json()["images"]
        assert client.get(image["url"]).status_code == 200


def test_apis_that_share_a_folder_need_a_secret(toy_bundle: Path, tmp_path: Path) -> None:
    settings = Settings(bundles=(toy_bundle,), redis="redis://127.0.0.1:1/0", result_store=str(tmp_path))
    with pytest.raises(StartError, match="HALFSTEP_SECRET"):
        start.api(settings)
