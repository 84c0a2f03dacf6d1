"""The native jobs API against a listening process: acceptance, following, cancelling, idempotency, expiry."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from server.api.body import IMAGES_BODY_BYTES
from tests.support.live import Live, live
from tests.support.serving import until

JOBS = "/v1/jobs"


@pytest.fixture(scope="module")
def running(toy_bundle: Path) -> Iterator[Live]:
    with live(toy_bundle) as made:
        yield made


@pytest.fixture
def client(running: Live) -> Iterator[httpx.Client]:
    with running.client() as made:
        yield made
    running.bench.allow()


def submit(client: httpx.Client, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    response = client.post(JOBS, json={"prompt": "one", **fields}, headers=headers)
    assert response.status_code == 202, response.text
    return dict(response.json())


def ended(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        state = client.get(job["status_url"]).json()
        return state if state["status"] not in ("queued", "running") else None

    return until(look, "the job ended")  # type: ignore[return-value]


def error(response: httpx.Response) -> tuple[int, str]:
    assert len(response.content) <= 4096
    return response.status_code, response.json()["error"]["code"]


def events(client: httpx.Client, url: str, after: str | None = None) -> list[dict[str, Any]]:
    """All events of a job up to its end."""
    headers = {"last-event-id": after} if after else {}
    text = client.get(url, headers=headers).text
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.partition(": ")[::2] for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append({"id": lines["id"], "event": lines["event"], **json.loads(lines["data"])})
    return found


# ---- the way of a job


def test_a_job_is_accepted_made_and_fetched(client: httpx.Client) -> None:
    response = client.post(JOBS, json={"prompt": "seven", "n": 2, "seed": 7, "output_format": "webp"})
    job = response.json()
    assert (response.status_code, response.headers["location"]) == (202, job["status_url"])
    assert {job["events_url"].removesuffix("/events"), job["cancel_url"]} == {job["status_url"]}
    state = ended(client, job)
    assert (state["status"], state["step"], state["steps"], state["eta_ms"]) == ("succeeded", 4, 4, None)
    assert [image["seed"] for image in state["images"]] == [7, 8]
    for image in state["images"]:
        file = client.get(image["url"])
        assert file.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(file.content)).format == "WEBP"


def test_its_images_are_those_of_the_openai_api(client: httpx.Client) -> None:
    import base64

    fields = {"prompt": "three", "seed": 5, "steps": 8, "guidance_scale": 3}
    state = ended(client, submit(client, **fields))
    direct = client.post("/v1/images/generations", json=fields).json()["data"][0]["b64_json"]
    assert client.get(state["images"][0]["url"]).content == base64.b64decode(direct)


def test_waiting_for_the_end_is_a_preference(running: Live, client: httpx.Client) -> None:
    made = client.post(JOBS, json={"prompt": "one"}, headers={"prefer": "respond-async, wait=30"})
    assert (made.status_code, made.json()["status"]) == (200, "succeeded")
    assert made.headers["preference-applied"] == "wait=30"
    running.bench.hold()
    early = client.post(JOBS, json={"prompt": "one"}, headers={"prefer": "wait=1"})
    assert (early.status_code, early.json()["status"]) in ((202, "queued"), (202, "running"))
    assert client.post(JOBS, json={"prompt": "one"}, headers={"prefer": "wait=soon"}).status_code == 202


def test_a_queued_job_says_how_long(running: Live, client: httpx.Client) -> None:
    running.bench.hold()
    jobs = [submit(client, n=10) for _ in range(12)]
    last = client.get(jobs[-1]["status_url"]).json()
    assert (last["status"], last["step"]) == ("queued", 0)
    assert last["queue_position"] > 0
    assert last["eta_ms"] > 0
    for job in jobs:
        client.delete(job["cancel_url"])


# ---- events


def test_events_tell_the_whole_story_and_replay_from_anywhere(client: httpx.Client) -> None:
    job = submit(client, n=2, steps=8, partial_images=2)
    told = events(client, job["events_url"])
    kinds = [event["event"] for event in told]
    assert kinds[:2] == ["queued", "running"]
    assert kinds[-1] == "completed"
    assert set(kinds) == {"queued", "running", "step", "completed"}
    previews = [event["preview"] for event in told if "preview" in event]
    assert {(p["image_index"], p["partial_image_index"]) for p in previews} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert told[-1]["job"]["status"] == "succeeded"
    for k in (0, len(told) // 2, len(told) - 1):
        assert events(client, job["events_url"], after=told[k]["id"]) == told[k + 1 :]


def test_events_come_as_they_happen(running: Live, client: httpx.Client) -> None:
    running.bench.hold()
    job = submit(client, steps=8)
    with client.stream("GET", job["events_url"]) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("event: "))
        assert [next(lines), next(lines)] == ["event: queued", "event: running"]
        running.bench.allow()
        assert list(lines)[-1] == "event: completed"


@pytest.mark.parametrize("after", ["x", "-1", "1-2-3", "9" * 50])
def test_what_is_no_event_id_is_400(client: httpx.Client, after: str) -> None:
    job = submit(client)
    assert error(client.get(job["events_url"], headers={"last-event-id": after})) == (400, "invalid_event_id")


# ---- cancelling


def test_a_cancelled_job_stops_and_cancelling_twice_is_fine(running: Live, client: httpx.Client) -> None:
    running.bench.hold()
    job = submit(client)
    assert [client.delete(job["cancel_url"]).status_code for _ in range(2)] == [200, 200]
    state = client.get(job["status_url"]).json()
    assert (state["status"], state["images"]) == ("cancelled", [])
    assert error(client.get(f"{job['status_url']}/images/0")) == (409, "no_images")
    assert events(client, job["events_url"])[-1]["event"] == "cancelled"


def test_what_has_ended_cannot_be_cancelled(client: httpx.Client) -> None:
    job = submit(client)
    ended(client, job)
    assert error(client.delete(job["cancel_url"])) == (409, "already_ended")


# ---- too early, too late, not there


def test_an_image_before_its_time_is_409(running: Live, client: httpx.Client) -> None:
    running.bench.hold()
    job = submit(client)
    assert error(client.get(f"{job['status_url']}/images/0")) == (409, "not_ready")


def test_a_job_after_its_time_is_410_and_an_unknown_one_404(toy_bundle: Path) -> None:
    with live(toy_bundle, result_ttl_s=0.001) as running, running.client() as client:
        job = submit(client)
        until(lambda: client.get(job["status_url"]).status_code == 410, "its time was over")
        for url in (job["status_url"], job["events_url"], f"{job['status_url']}/images/0"):
            assert error(client.get(url)) == (410, "gone")
        other = job["id"][:-1] + ("0" if job["id"][-1] != "0" else "1")
        assert error(client.get(f"{JOBS}/{other}")) == (404, "job_not_found")


@pytest.mark.parametrize("name", ["..%2f", "%00", "%0d%0aX:y", "%ff", "a" * 10_000, "x" * 32, "ﬀ"])
def test_strange_ids_are_404(client: httpx.Client, name: str) -> None:
    for tail in ("", "/events", "/images/0"):
        status, code = error(client.get(f"{JOBS}/{name}{tail}"))
        assert (status, code) in ((404, "job_not_found"), (404, "not_found"))
    assert error(client.delete(f"{JOBS}/{name}"))[0] == 404


@pytest.mark.parametrize("index", ["1", "-1", "00", "x", "%00", "1e0", "9" * 400])
def test_strange_image_numbers_are_404(client: httpx.Client, index: str) -> None:
    job = submit(client)
    ended(client, job)
    assert error(client.get(f"{job['status_url']}/images/{index}")) == (404, "not_found")


def test_a_wrong_method_lists_all_that_are_allowed(client: httpx.Client) -> None:
    response = client.put(f"{JOBS}/x")
    assert (response.status_code, response.headers["allow"]) == (405, "DELETE, GET")


# ---- idempotency


def test_a_key_and_a_body_are_one_job_however_often(running: Live, client: httpx.Client) -> None:
    running.bench.hold()
    headers = {"idempotency-key": "order 66"}
    with ThreadPoolExecutor(10) as pool:
        jobs = list(pool.map(lambda _: submit(client, headers, prompt="two"), range(50)))
    assert len({job["id"] for job in jobs}) == 1
    running.bench.allow()
    ended(client, jobs[0])
    assert submit(client, headers, prompt="two")["id"] == jobs[0]["id"]
    reused = client.post(JOBS, json={"prompt": "three"}, headers=headers)
    assert error(reused) == (422, "idempotency_key_reuse")
    assert reused.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("key", ["", "k" * 256, "k\xe4"])
def test_what_is_no_key_is_400(client: httpx.Client, key: str) -> None:
    response = client.post(JOBS, json={"prompt": "one"}, headers={b"idempotency-key": key.encode("latin-1")})
    assert error(response) == (400, "invalid_idempotency_key")


def test_the_longest_key_is_accepted(client: httpx.Client) -> None:
    submit(client, {"idempotency-key": "k" * 255})


# ---- priority and deadline


def test_a_deadline_that_passes_expires_the_job_before_it_steps(running: Live, client: httpx.Client) -> None:
    running.bench.hold()
    first = submit(client, n=10, seed=1)
    until(lambda: client.get(first["status_url"]).json()["status"] == "running", "the first one runs")
    until(lambda: len(running.bench.batches) > 0, "it steps")
    blocked = [submit(client, n=10) for _ in range(6)]
    late = client.post(JOBS, json={"prompt": "nine", "deadline_ms": 60_000}).json()
    assert late["deadline_ms"] == 60_000
    client.delete(late["cancel_url"])
    soon = client.post(JOBS, json={"prompt": "nine", "deadline_ms": 3000})
    assert soon.status_code == 202, soon.text
    running_classes = len(running.bench.batches)
    assert ended(client, soon.json())["status"] == "expired"
    assert not [classes for _, classes in running.bench.batches[running_classes:] if 9 in classes]
    assert error(client.get(f"{soon.json()['status_url']}/images/0")) == (409, "no_images")
    for job in (first, *blocked):
        client.delete(job["cancel_url"])


def test_a_deadline_that_cannot_be_met_is_503_at_once(running: Live, client: httpx.Client) -> None:
    running.bench.hold()
    jobs = [submit(client, n=10) for _ in range(5)]
    refused = client.post(JOBS, json={"prompt": "one", "deadline_ms": 100})
    assert error(refused) == (503, "deadline_unmeetable")
    assert int(refused.headers["retry-after-ms"]) > 0
    for job in jobs:
        client.delete(job["cancel_url"])


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
def test_bad_bodies(client: httpx.Client, fields: dict[str, Any], status: int, code: str) -> None:
    response = client.post(JOBS, json={"prompt": "one", **fields})
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
def test_raw_bodies(client: httpx.Client, body: bytes, status: int, code: str) -> None:
    assert error(client.post(JOBS, content=body, headers={"content-type": "application/json"})) == (status, code)
