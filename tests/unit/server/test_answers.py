"""What a process answers when something inside it breaks, and what its probes say."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server.jobs import Backlog
from server.service import Service
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
