"""Webhooks: signed, retried, sent only where they may go, and never further."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings
from tests.support.live import live
from tests.support.serving import until
from tests.support.webhook_receiver import LOOPBACK, SECRET, receiver


@pytest.mark.parametrize("first", [500, 302])
def test_a_webhook_is_signed_and_sent_until_it_is_heard(toy_bundle: Path, first: int) -> None:
    """A redirect is a failure like any other."""
    with (
        receiver(first) as (origin, heard),
        live(toy_bundle, webhook_allow=(origin, LOOPBACK), secret=SECRET) as running,
        running.client() as client,
    ):
        job = client.post("/v1/jobs", json={"prompt": "one", "webhook_url": f"{origin}/done?x=1"}).json()
        until(lambda: len(heard) >= 2, "it was sent again")
    for headers, body in heard:
        assert {"type": "job.ended", "id": job["id"], "status": "succeeded"}.items() <= json.loads(body).items()
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        mac = hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()
        assert headers["webhook-signature"] == f"v1,{base64.b64encode(mac).decode()}"
        assert headers["host"] == origin.removeprefix("http://")


def test_a_private_address_hears_nothing_unless_its_network_is_allowed(toy_bundle: Path) -> None:
    with (
        receiver() as (origin, heard),
        live(toy_bundle, webhook_allow=(origin,), secret=SECRET) as running,
        running.client() as client,
    ):
        job = client.post("/v1/jobs", json={"prompt": "one", "webhook_url": origin}).json()
        until(lambda: client.get(job["status_url"]).json()["status"] == "succeeded", "the job ended")

        def postponed() -> bool:
            waiting = running.service.store.jobs.outbox._waiting  # type: ignore[attr-defined]
            return any(entry.delivery.attempt >= 1 for entry in list(waiting.values()))

        until(postponed, "it was tried")
        assert heard == []


@pytest.mark.parametrize(
    "other",
    [
        "http://hooks.example.com.evil.test/",
        "http://u@hooks.example.com/",
        "https://hooks.example.com/",
        "http://hooks.example.com:81/",
    ],
)
def test_other_origins_are_refused(toy_bundle: Path, other: str) -> None:
    settings = {"webhook_allow": ("http://hooks.example.com",), "secret": SECRET}
    with live(toy_bundle, **settings) as running, running.client() as client:
        refused = client.post("/v1/jobs", json={"prompt": "one", "webhook_url": other})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "webhook_not_allowed")


@pytest.mark.parametrize("allow", ["https://x.example/path", "ftp://x.example", "nonsense"])
def test_what_is_no_origin_and_no_network_is_a_wrong_setting(allow: str) -> None:
    with pytest.raises(ValidationError, match="webhook_allow"):
        Settings(webhook_allow=(allow,), secret=SECRET)


def test_webhooks_need_a_secret() -> None:
    with pytest.raises(ValidationError, match="HALFSTEP_SECRET"):
        Settings(webhook_allow=("https://x.example",))
