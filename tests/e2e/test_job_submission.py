"""Submitting a job to a listening process: keys, deadlines, and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.api.body import IMAGES_BODY_BYTES
from tests.support.job_calls import JOBS, ended, error, submit
from tests.support.live import Live
from tests.support.serving import until

# ---- idempotency


def test_a_key_and_a_body_are_one_job_however_often(running: Live, api: httpx.Client) -> None:
    running.bench.hold()
    headers = {"idempotency-key": "order 66"}
    with ThreadPoolExecutor(10) as pool:
        jobs = list(pool.map(lambda _: submit(api, headers, prompt="two"), range(50)))
    assert len({job["id"] for job in jobs}) == 1
    running.bench.allow()
    ended(api, jobs[0])
    assert submit(api, headers, prompt="two")["id"] == jobs[0]["id"]
    reused = api.post(JOBS, json={"prompt": "three"}, headers=headers)
    assert error(reused) == (422, "idempotency_key_reuse")
    assert reused.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("key", ["", "k" * 256, "k\xe4"])
def test_what_is_no_key_is_400(api: httpx.Client, key: str) -> None:
    response = api.post(JOBS, json={"prompt": "one"}, headers={b"idempotency-key": key.encode("latin-1")})
    assert error(response) == (400, "invalid_idempotency_key")


def test_the_longest_key_is_accepted(api: httpx.Client) -> None:
    submit(api, {"idempotency-key": "k" * 255})


# ---- priority and deadline


def test_a_deadline_that_passes_expires_the_job_before_it_steps(running: Live, api: httpx.Client) -> None:
    running.bench.hold()
    first = submit(api, n=10, seed=1)
    until(lambda: api.get(first["status_url"]).json()["status"] == "running", "the first one runs")
    until(lambda: len(running.bench.batches) > 0, "it steps")
    blocked = [submit(api, n=10) for _ in range(6)]
    late = api.post(JOBS, json={"prompt": "nine", "deadline_ms": 60_000}).json()
    assert late["deadline_ms"] == 60_000
    api.delete(late["cancel_url"])
    soon = api.post(JOBS, json={"prompt": "nine", "deadline_ms": 3000})
    assert soon.status_code == 202, soon.text
    running_classes = len(running.bench.batches)
    assert ended(api, soon.json())["status"] == "expired"
    assert not [classes for _, classes in running.bench.batches[running_classes:] if 9 in classes]
    assert error(api.get(f"{soon.json()['status_url']}/images/0")) == (409, "no_images")
    for job in (first, *blocked):
        api.delete(job["cancel_url"])


def test_a_deadline_that_cannot_be_met_is_503_at_once(running: Live, api: httpx.Client) -> None:
    running.bench.hold()
    jobs = [submit(api, n=10) for _ in range(5)]
    refused = api.post(JOBS, json={"prompt": "one", "deadline_ms": 100})
    assert error(refused) == (503, "deadline_unmeetable")
    assert int(refused.headers["retry-after-ms"]) > 0
    for job in jobs:
        api.delete(job["cancel_url"])


# ---- bad requests

BAD = [
    ({"prompt": ""}, 422, "empty_prompt"),
    ({"prompt": 7}, 422, "invalid_type"),
    ({"steps": 3}, 422, "out_of_range"),
    ({"priority": 10}, 422, "out_of_range"),
    ({"priority": -1}, 422, "out_of_range"),
    ({"priority": True}, 422, "invalid_type"),
    ({"deadline_ms": 0}, 422, "out_of_range"),
    ({"deadline_ms": "soon"}, 422, "invalid_type"),
    ({"stream": True}, 422, "unknown_field"),
    ({"task": "upscale"}, 422, "unsupported_value"),
    ({"webhook_url": "http://127.0.0.1/"}, 422, "webhook_not_allowed"),
    ({"webhook_url": "file:///etc/passwd"}, 422, "webhook_not_allowed"),
    ({"webhook_url": "http://["}, 422, "webhook_not_allowed"),
    ({"webhook_url": 5}, 422, "invalid_type"),
    ({"model": "canary-4711"}, 404, "model_not_found"),
]


@pytest.mark.parametrize(("fields", "status", "code"), BAD, ids=[str(case[0]) for case in BAD])
def test_bad_bodies(api: httpx.Client, fields: dict[str, Any], status: int, code: str) -> None:
    response = api.post(JOBS, json={"prompt": "one", **fields})
    assert error(response) == (status, code)
    assert "canary" not in response.text


RAW = [
    (b"", 400, "invalid_json"),
    (b'{"prompt": NaN}', 400, "invalid_json"),
    (b'{"prompt": "a", "prompt": "b"}', 400, "duplicate_key"),
    (b"[" * 100_000, 400, "too_deep"),
    (b'{"prompt": "\xff"}', 400, "invalid_encoding"),
    (b"[]", 422, "invalid_type"),
    (b"null", 422, "invalid_type"),
    (b'{"prompt": "\\ud800"}', 422, "invalid_prompt"),
    (b'{"prompt": "' + b"a" * IMAGES_BODY_BYTES + b'"}', 413, "payload_too_large"),
]


@pytest.mark.parametrize(("body", "status", "code"), RAW, ids=[str(case[0][:20]) for case in RAW])
def test_raw_bodies(api: httpx.Client, body: bytes, status: int, code: str) -> None:
    assert error(api.post(JOBS, content=body, headers={"content-type": "application/json"})) == (status, code)
