"""What a process answers when something inside it breaks, and what its probes say."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.types import Message, Scope

from server.api.answers import failure_error
from server.app import create_app
from server.jobs import POISON, Backlog, IdempotencyKey, Job, JobFailure, Submission
from server.service import Service
from server.stores.base import StoreUnavailableError
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
    async def broken() -> Backlog:
        raise ZeroDivisionError("canary-4711")

    monkeypatch.setattr(service.store, "backlog", broken)
    response = client.post(URL, json={"prompt": "seven"})
    assert (response.status_code, response.headers["content-type"]) == (500, "application/json")
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"]
    assert "canary" not in response.text


def counted(service: Service, name: str) -> dict[str, float]:
    """Samples of a metric by the values of its labels."""
    family = next(f for f in service.metrics.registry.collect() if f"{f.name}_total" == name)
    return {" ".join(s.labels.values()): s.value for s in family.samples if s.name == name}


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
    async def away() -> Backlog:
        raise StoreUnavailableError

    monkeypatch.setattr(service.store, "backlog", away)
    drawn = client.post("/sdapi/v1/txt2img", json={"prompt": "seven"})
    packed = client.post("/sdapi/v1/txt2img", json={}, headers={"content-encoding": "gzip"})
    assert [answer.status_code for answer in (drawn, packed)] == [503, 415]
    assert [answer.json()["error"] for answer in (drawn, packed)] == ["store_unavailable", "unsupported_encoding"]
    assert drawn.headers["retry-after"] == "1"
