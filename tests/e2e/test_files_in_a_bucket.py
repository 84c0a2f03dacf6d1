"""``response_format: url`` with an S3-compatible store: presigned addresses, swept, and told when it is away."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from server.metrics import Metrics
from server.storage import FileGoneError, ResultStore, ResultStoreError, expires_at
from tests.support.fake_s3 import BUCKET, FakeS3, fake_s3
from tests.support.live import Live, live

GENERATIONS, JOBS = "/v1/images/generations", "/v1/jobs"
PLACE = f"s3://{BUCKET}/results"
STORED = {"prompt": "one", "seed": 1, "response_format": "url"}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    with fake_s3() as made:
        for name, value in made.environment().items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def running(toy_bundle: Path, s3: FakeS3) -> Iterator[Live]:
    with live(toy_bundle, result_store=PLACE) as made:
        yield made


@pytest.fixture
def http(running: Live) -> Iterator[httpx.Client]:
    with running.client() as client:
        yield client


def test_an_address_is_the_buckets_own(http: httpx.Client, s3: FakeS3) -> None:
    inline = http.post(GENERATIONS, json={"prompt": "one", "seed": 1}).json()["data"][0]["b64_json"]
    (image,) = http.post(GENERATIONS, json=STORED).json()["data"]
    assert image["url"].startswith(f"{s3.url}/{BUCKET}/results/{image['expires_at']}/")
    file = httpx.get(image["url"])
    assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
    assert file.content == base64.b64decode(inline)
    assert s3.refused == 0
    parts = urlsplit(image["url"])
    assert httpx.get(parts._replace(path=parts.path.replace("-0.png", "-1.png")).geturl()).status_code == 403
    assert httpx.get(parts._replace(query="").geturl()).status_code == 403


def test_a_job_gives_the_file_itself_too(http: httpx.Client, s3: FakeS3) -> None:
    job = http.post(JOBS, json={**STORED, "n": 2}, headers={"prefer": "wait=60"}).json()
    for k, image in enumerate(job["images"]):
        assert httpx.get(image["url"]).content == http.get(f"{job['status_url']}/images/{k}").content
    s3.objects.clear()
    gone = http.get(f"{job['status_url']}/images/0")
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "gone")


def test_a_sweep_takes_what_is_over_in_its_own_prefix_alone(s3: FakeS3) -> None:
    store = ResultStore.open(PLACE, 60, Metrics())
    s3.objects["elsewhere/1/x.png"] = (b"", "")

    async def swept() -> int:
        old = [await store.write("old", 1, k, "png", b"x") for k in range(3)]
        store._clock = lambda: expires_at(old[0]) + 1.0
        new = await store.write("new", 1, 0, "png", b"y")
        found = await store.sweep()
        with pytest.raises(FileGoneError):
            await store.read(old[0])
        assert await store.read(new) == b"y"
        return found

    assert asyncio.run(swept()) == 3
    assert "elsewhere/1/x.png" in s3.objects
    assert s3.refused == 0


@pytest.mark.parametrize("fault", ["down", "wrong key"])
def test_a_bucket_that_refuses_fails_what_needs_it_and_nothing_else(
    toy_bundle: Path, s3: FakeS3, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("server.finishing.STORE_PATIENCE_S", 0.0)
    if fault == "wrong key":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with live(toy_bundle, result_store=PLACE) as running, running.client() as http:
        s3.down = fault == "down"
        failed = http.post(GENERATIONS, json=STORED)
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "result_store_unavailable")
        assert http.post(GENERATIONS, json={"prompt": "one"}).status_code == 200
        assert http.get("/readyz").status_code == 200
        assert running.count("halfstep_result_store_failures_total", operation="write") >= 1
        if fault == "down":
            s3.down = False
            assert http.post(GENERATIONS, json=STORED).status_code == 200


def test_what_no_signature_covers_is_refused_by_the_stand_in(s3: FakeS3) -> None:
    """The tests above would say nothing if it let everything through."""
    assert httpx.put(f"{s3.url}/{BUCKET}/x", content=b"x").status_code == 403
    assert s3.objects == {}


def test_a_missing_bucket_is_an_error_and_no_missing_file(s3: FakeS3) -> None:
    store = ResultStore.open("s3://another/results", 60, Metrics())
    with pytest.raises(ResultStoreError):
        asyncio.run(store.write("j", 1, 0, "png", b"x"))
