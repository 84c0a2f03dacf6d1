"""The native jobs API against a listening process: looking, following, cancelling, expiry."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.support.job_calls import JOBS, ended, error, events, submit
from tests.support.live import Live, live
from tests.support.serving import until

# ---- the way of a job


def test_a_job_is_accepted_made_and_fetched(api: httpx.Client) -> None:
    response = api.post(JOBS, json={"prompt": "seven", "n": 2, "seed": 7, "output_format": "webp"})
    job = response.json()
    assert (response.status_code, response.headers["location"]) == (202, job["status_url"])
    assert {job["events_url"].removesuffix("/events"), job["cancel_url"]} == {job["status_url"]}
    state = ended(api, job)
    assert (state["status"], state["step"], state["steps"], state["eta_ms"]) == ("succeeded", 4, 4, None)
    assert [image["seed"] for image in state["images"]] == [7, 8]
    for image in state["images"]:
        file = api.get(image["url"])
        assert file.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(file.content)).format == "WEBP"


def test_its_images_are_those_of_the_openai_api(api: httpx.Client) -> None:
    fields = {"prompt": "three", "seed": 5, "steps": 8, "guidance_scale": 3}
    state = ended(api, submit(api, **fields))
    direct = api.post("/v1/images/generations", json=fields).json()["data"][0]["b64_json"]
    assert api.get(state["images"][0]["url"]).content == base64.b64decode(direct)


def test_waiting_for_the_end_is_a_preference(running: Live, api: httpx.Client) -> None:
    made = api.post(JOBS, json={"prompt": "one"}, headers={"prefer": "respond-async, wait=30"})
    assert (made.status_code, made.json()["status"]) == (200, "succeeded")
    assert made.headers["preference-applied"] == "wait=30"
    quoted = api.post(JOBS, json={"prompt": "one"}, headers={"prefer": 'Wait = "30"'})
    assert (quoted.status_code, quoted.headers.get("preference-applied")) == (200, "wait=30")
    running.bench.hold()
    early = api.post(JOBS, json={"prompt": "one"}, headers={"prefer": "wait=1"})
    assert (early.status_code, early.json()["status"]) in ((202, "queued"), (202, "running"))
    assert api.post(JOBS, json={"prompt": "one"}, headers={"prefer": "wait=soon"}).status_code == 202


def test_a_queued_job_says_how_long(running: Live, api: httpx.Client) -> None:
    running.bench.hold()
    jobs = [submit(api, n=10) for _ in range(12)]
    last = api.get(jobs[-1]["status_url"]).json()
    assert (last["status"], last["step"]) == ("queued", 0)
    assert last["queue_position"] > 0
    assert last["eta_ms"] > 0
    for job in jobs:
        api.delete(job["cancel_url"])


# ---- events


def test_events_tell_the_whole_story_and_replay_from_anywhere(api: httpx.Client) -> None:
    job = submit(api, n=2, steps=8, partial_images=2)
    told = events(api, job["events_url"])
    kinds = [event["event"] for event in told]
    assert kinds[:2] == ["queued", "running"]
    assert kinds[-1] == "completed"
    assert set(kinds) == {"queued", "running", "step", "completed"}
    previews = [event["preview"] for event in told if "preview" in event]
    assert {(p["image_index"], p["partial_image_index"]) for p in previews} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert told[-1]["job"]["status"] == "succeeded"
    for k in (0, len(told) // 2, len(told) - 1):
        assert events(api, job["events_url"], after=told[k]["id"]) == told[k + 1 :]
    assert api.get(job["events_url"], headers={"last-event-id": told[-1]["id"]}).status_code == 204


def test_events_come_as_they_happen(running: Live, api: httpx.Client) -> None:
    running.bench.hold()
    job = submit(api, steps=8)
    with api.stream("GET", job["events_url"]) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("event: "))
        assert [next(lines), next(lines)] == ["event: queued", "event: running"]
        running.bench.allow()
        assert list(lines)[-1] == "event: completed"


def test_a_line_without_news_is_kept_open(
    running: Live, api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.event_stream.KEEP_ALIVE_S", 0.01)
    running.bench.hold()
    wish = {"prompt": "seven", "stream": True}
    with api.stream("POST", "/v1/images/generations", json=wish) as stream:
        assert stream.headers["x-accel-buffering"] == "no"
        lines = stream.iter_lines()
        assert [next(lines) for _ in range(3)] == [": still there", "", ": still there"]
        running.bench.allow()
        assert "event: image_generation.completed" in list(lines)


@pytest.mark.parametrize("after", ["x", "-1", "1-2-3", "0-0", "9" * 50])
def test_what_is_no_event_id_is_400(api: httpx.Client, after: str) -> None:
    job = submit(api)
    assert error(api.get(job["events_url"], headers={"last-event-id": after})) == (400, "invalid_event_id")


# ---- cancelling


def test_a_cancelled_job_stops_and_cancelling_twice_is_fine(running: Live, api: httpx.Client) -> None:
    running.bench.hold()
    job = submit(api)
    assert [api.delete(job["cancel_url"]).status_code for _ in range(2)] == [200, 200]
    state = api.get(job["status_url"]).json()
    assert (state["status"], state["images"]) == ("cancelled", [])
    without = api.get(f"{job['status_url']}/images/0")
    assert error(without) == (409, "no_images")
    assert without.headers["x-should-retry"] == "false"
    assert events(api, job["events_url"])[-1]["event"] == "cancelled"


def test_what_has_ended_cannot_be_cancelled(api: httpx.Client) -> None:
    job = submit(api)
    ended(api, job)
    refused = api.delete(job["cancel_url"])
    assert error(refused) == (409, "already_ended")
    assert refused.headers["x-should-retry"] == "false"


# ---- too early, too late, not there


def test_an_image_before_its_time_is_409(running: Live, api: httpx.Client) -> None:
    running.bench.hold()
    job = submit(api)
    early = api.get(f"{job['status_url']}/images/0")
    assert error(early) == (409, "not_ready")
    assert "x-should-retry" not in early.headers


def test_a_job_after_its_time_is_410_and_an_unknown_one_404(toy_bundle: Path) -> None:
    with live(toy_bundle, result_ttl_s=0.001) as running, running.client() as api:
        job = submit(api)
        until(lambda: api.get(job["status_url"]).status_code == 410, "its time was over")
        for url in (job["status_url"], job["events_url"], f"{job['status_url']}/images/0"):
            assert error(api.get(url)) == (410, "gone")
        other = job["id"][:-1] + ("0" if job["id"][-1] != "0" else "1")
        assert error(api.get(f"{JOBS}/{other}")) == (404, "job_not_found")


@pytest.mark.parametrize("name", ["..%2f", "%00", "%0d%0aX:y", "%ff", "a" * 10_000, "x" * 32, "ﬀ"])
def test_strange_ids_are_404(api: httpx.Client, name: str) -> None:
    for tail in ("", "/events", "/images/0"):
        status, code = error(api.get(f"{JOBS}/{name}{tail}"))
        assert (status, code) in ((404, "job_not_found"), (404, "not_found"))
    assert error(api.delete(f"{JOBS}/{name}"))[0] == 404


@pytest.mark.parametrize("index", ["1", "-1", "00", "x", "%00", "1e0", "9" * 400])
def test_strange_image_numbers_are_404(api: httpx.Client, index: str) -> None:
    job = submit(api)
    ended(api, job)
    assert error(api.get(f"{job['status_url']}/images/{index}")) == (404, "not_found")


def test_head_answers_where_get_does(api: httpx.Client) -> None:
    job = submit(api)
    until(lambda: api.get(job["status_url"]).json()["status"] == "succeeded", "the job ended")
    for path in (job["status_url"], f"{job['status_url']}/images/0", "/v1/models", "/", "/docs", "/static/app.js"):
        got, head = api.get(path), api.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
    assert api.head(f"{JOBS}/x").status_code == 404


def test_a_wrong_method_lists_all_that_are_allowed(api: httpx.Client) -> None:
    response = api.put(f"{JOBS}/x")
    assert (response.status_code, response.headers["allow"]) == (405, "DELETE, GET, HEAD")
