"""What a client of ``/v1/jobs`` does."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.support.serving import until

JOBS = "/v1/jobs"


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
