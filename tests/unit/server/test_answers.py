"""What a process answers when something inside it breaks, and what its probes say."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from pathlib import Path

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.testclient import TestClient
from starlette.types import Message, Scope

from server.api.answers import failure_error
from server.app import create_app
from server.costs import Offer
from server.jobs import POISON, Backlog, IdempotencyKey, Job, JobEvent, JobFailure, Submission
from server.service import Service
from server.storage import ResultStoreError
from server.stores.base import StoreUnavailableError, UnreadableJobError
from tests.support.offline import offline_client, offline_service

URL = "/v1/images/generations"


@pytest.fixture
def service(toy_bundle: Path) -> Service:
    return offline_service(toy_bundle)


@pytest.fixture
def client(service: Service) -> TestClient:
    return offline_client(service)


def test_what_nobody_caught_is_still_json(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(**_: object) -> Backlog:
        raise ZeroDivisionError("canary-4711")

    monkeypatch.setattr(service.store, "backlog", broken)
    response = client.post(URL, json={"prompt": "seven"})
    assert (response.status_code, response.headers["content-type"]) == (500, "application/json")
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"]
    assert "canary" not in response.text
    assert counted(service, "halfstep_requests_rejected_total")["internal_error"] == 1


def counted(service: Service, name: str) -> dict[str, float]:
    """Samples of a metric by the values of its labels."""
    family = next(f for f in service.metrics.registry.collect() if f"{f.name}_total" == name)
    return {" ".join(s.labels.values()): s.value for s in family.samples if s.name == name}


def test_what_another_release_wrote_is_counted(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unread(job_id: str) -> None:
        raise UnreadableJobError("another version wrote it")

    job = client.post("/v1/jobs", json={"prompt": "seven"}).json()
    monkeypatch.setattr(service.store, "get", unread)
    assert client.get(job["status_url"]).status_code == 500
    assert counted(service, "halfstep_requests_rejected_total")["unreadable_job"] == 1


REFUSED = [
    ("GET", "/nothing", "not_found"),
    ("GET", URL, "method_not_allowed"),
    ("POST", URL, "unsupported_media_type"),
]


@pytest.mark.parametrize(("method", "path", "reason"), REFUSED)
def test_every_refusal_is_counted(
    service: Service, client: TestClient, method: str, path: str, reason: str
) -> None:
    client.request(method, path)
    assert counted(service, "halfstep_requests_rejected_total") == {reason: 1}


@pytest.mark.parametrize("stream", [False, True])
def test_an_accepted_request_that_fails_is_no_refusal(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    submit = service.store.submit

    async def submit_and_fail(job: Job, key: IdempotencyKey | None = None) -> Submission:
        submission = await submit(job, key)
        await service.store.abandon(job.id, JobFailure(code="engine_error", message="It failed."))
        return submission

    monkeypatch.setattr(service.store, "submit", submit_and_fail)
    assert client.post(URL, json={"prompt": "seven", "stream": stream}).status_code == (200 if stream else 500)
    assert counted(service, "halfstep_requests_rejected_total") == {}
    assert counted(service, "halfstep_requests_accepted_total") == {"toy-digits text_to_image": 1}
    assert counted(service, "halfstep_requests_total") == {"toy-digits text_to_image 64x64 failed": 1}


@pytest.mark.anyio
async def test_a_client_gone_before_its_stream_starts_is_cancelled_and_counted(service: Service) -> None:
    body = json.dumps({"prompt": "seven", "stream": True}).encode()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise OSError("the connection is closed")

    headers = [(b"content-type", b"application/json")]
    scope: Scope = {"type": "http", "method": "POST", "path": URL, "query_string": b"", "headers": headers}
    with suppress(OSError):
        await create_app(service)({**scope, "asgi": {"version": "3.0"}}, receive, send)
    assert (await service.store.backlog()).jobs == 0
    assert counted(service, "halfstep_requests_total") == {"toy-digits text_to_image 64x64 cancelled": 1}
    assert counted(service, "halfstep_requests_rejected_total") == {}


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_answer_head(service: Service, client: TestClient, path: str) -> None:
    assert client.head(path).status_code == 200
    service.draining.set()
    assert client.head(path).status_code == client.get(path).status_code


def test_a_request_that_took_the_engine_down_is_not_to_be_sent_again_by_itself() -> None:
    """SDKs send a 500 again, twice by default, and it would take the engine down again each time."""
    assert failure_error(POISON).headers["x-should-retry"] == "false"
    assert failure_error(JobFailure(code="engine_error", message="It failed.")).headers == {}


def test_an_error_of_any_layer_has_the_shape_of_its_path(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(**_: object) -> Backlog:
        raise StoreUnavailableError

    monkeypatch.setattr(service.store, "backlog", away)
    drawn = client.post("/sdapi/v1/txt2img", json={"prompt": "seven"})
    packed = client.post("/sdapi/v1/txt2img", json={}, headers={"content-encoding": "gzip"})
    assert [answer.status_code for answer in (drawn, packed)] == [503, 415]
    assert [answer.json()["error"] for answer in (drawn, packed)] == ["store_unavailable", "unsupported_encoding"]
    assert drawn.headers["retry-after"] == "1"


@pytest.mark.parametrize("lost", [StoreUnavailableError(), KeyError("gone")])
def test_a_store_that_goes_away_ends_a_stream_with_an_error_event(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch, lost: Exception
) -> None:
    async def events(job_id: str) -> AsyncIterator[JobEvent]:
        raise lost
        yield JobEvent(id="1", type="queued", step=0)

    monkeypatch.setattr(service.store, "events", events)
    answer = client.post(URL, json={"prompt": "seven", "stream": True})
    assert answer.status_code == 200
    (line,) = [line for line in answer.text.splitlines() if line]
    assert json.loads(line.removeprefix("data: "))["error"]["code"] == "store_unavailable"


@pytest.mark.parametrize(
    ("lost", "code"),
    [
        (StoreUnavailableError("away"), "store_unavailable"),
        (ResultStoreError("away"), "result_store_unavailable"),
        (UnreadableJobError("another version wrote it"), "unreadable_job"),
        (KeyError("forgotten"), "gone"),
    ],
)
def test_what_goes_wrong_while_a_job_is_followed_is_its_last_event(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch, lost: Exception, code: str
) -> None:
    async def events(job_id: str, after: str | None) -> AsyncIterator[JobEvent]:
        yield JobEvent(id="1", type="queued", step=0)
        raise lost

    job = client.post("/v1/jobs", json={"prompt": "seven"}).json()
    monkeypatch.setattr(service.store, "events", events)
    answer = client.get(job["events_url"])
    assert answer.status_code == 200
    first, last = answer.text.rstrip().split("\n\n")
    assert "event: queued" in first
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code


def test_a_model_without_workers_takes_no_room_from_others(service: Service, client: TestClient) -> None:
    waiting = Backlog(jobs=900, rows=900, seconds=9000.0)

    async def backlog(tenant: str | None = None, *, models: Collection[str] | None = None) -> Backlog:
        return waiting if models is None or "away" in models else Backlog()

    service.store.backlog = backlog  # type: ignore[method-assign]
    there = Offer(engine="fake", ms={})
    service.costs.update({"w": {"toy-digits": there}})
    wish = {"prompt": "seven"}
    assert client.post("/v1/jobs", json=wish).status_code == 202
    service.costs.update({"w": {"toy-digits": there, "away": there}})
    assert client.post("/v1/jobs", json=wish).status_code == 503, "the same workers have all that to do"


def test_the_reference_has_the_body_of_every_event(client: TestClient) -> None:
    told = client.get("/openapi.json").json()
    schemas, found = told["components"]["schemas"], list[str]()
    for path, operations in told["paths"].items():
        for operation in operations.values():
            stream = operation["responses"].get("200", {}).get("content", {}).get("text/event-stream")
            if stream is not None:
                bodies = stream["x-itemSchema"]["properties"]["data"]["contentSchema"]["anyOf"]
                assert all(body["$ref"].rsplit("/", 1)[1] in schemas for body in bodies)
                found.append(path)
    assert found == [URL, "/v1/images/edits", "/v1/jobs/{job_id}/events"]
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told)):
        assert name in schemas


def test_the_reference_is_a_document_as_its_version_has_it(client: TestClient) -> None:
    """Which generators of clients check before they make anything."""
    told = client.get("/openapi.json").json()
    assert told["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(told).validate()


def test_the_reference_calls_required_what_an_answer_always_has(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    optional = {name: set(body["properties"]) - set(body.get("required", ())) for name, body in schemas.items()}
    delivered = {"b64_json", "url", "expires_at", "flagged"}
    assert {name: fields for name, fields in optional.items() if fields} == {
        "ImageBody": delivered,
        "CompletedEvent": delivered,
        "JobImageBody": {"expires_at"},
        "JobEventBody": {"preview", "job"},
    }


def test_the_reference_names_events_as_they_are_sent(client: TestClient) -> None:
    told = client.get("/openapi.json").json()
    followed = told["paths"]["/v1/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]
    sent = ["queued", "running", "step", "completed", "failed", "cancelled", "expired"]
    assert followed["text/event-stream"]["x-itemSchema"]["properties"]["event"]["enum"] == sent
    assert told["components"]["schemas"]["JobEventBody"]["properties"]["type"]["enum"] == sent


def test_every_error_of_the_reference_is_whole_and_says_where_the_time_to_wait_stands(client: TestClient) -> None:
    told = client.get("/openapi.json").json()
    parts = set(told["components"]["schemas"]["ErrorDetail"]["required"])
    for path, operations in told["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                example = response.get("content", {}).get("application/json", {}).get("example")
                assert example is None or set(example["error"]) == parts
                waits = status in ("429", "503") and path != "/readyz"
                assert ("Retry-After" in response.get("headers", {})) is waits
