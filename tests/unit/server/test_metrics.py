"""What metrics say to those who alert and scale on them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from engines.bundle import verify_bundle
from server.jobs import Backlog
from server.metrics import Metrics
from server.settings import Settings
from server.stores.base import StoreUnavailableError
from tests.support.offline import offline_client, offline_service

MODEL = {"model": "toy-digits"}


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("halfstep_poison_jobs_total", {**MODEL, "stage": "steps"}),
        ("halfstep_poison_jobs_total", {**MODEL, "stage": "engine"}),
        ("halfstep_engine_deaths_total", {}),
        ("halfstep_retries_total", {}),
        ("halfstep_takeovers_total", {"what": "engine", "outcome": "given_up"}),
        ("halfstep_requests_accepted_total", {**MODEL, "task": "text_to_image"}),
        ("halfstep_requests_total", {**MODEL, "task": "edit", "size": "64x64", "status": "failed"}),
    ],
)
def test_what_alerts_watch_is_counted_from_0(toy_bundle: Path, name: str, labels: dict[str, str]) -> None:
    """Of a series that begins at 1, Prometheus sees no increase."""
    metrics = Metrics()
    metrics.offers([verify_bundle(toy_bundle)])
    metrics.uses({"toy-digits": "fake 1 float32"}, preferred=True)
    assert metrics.registry.get_sample_value(name, labels) == 0


def test_a_process_without_its_store_tells_no_queue() -> None:
    metrics = Metrics()
    metrics.store_holds(Backlog(jobs=3, rows=3, seconds=12.0), [])
    assert metrics.registry.get_sample_value("halfstep_queued_seconds") == 12
    metrics.store_away()
    assert math.isnan(metrics.registry.get_sample_value("halfstep_queued_seconds") or 0)


def test_what_waits_is_told_of_each_model(toy_bundle: Path) -> None:
    service = offline_service(toy_bundle)
    client, value = offline_client(service), service.metrics.registry.get_sample_value
    assert client.post("/v1/jobs", json={"prompt": "seven"}).status_code == 202
    assert client.get("/metrics").status_code == 200
    assert value("halfstep_model_queued_seconds", {"model": "toy-digits"}) == value("halfstep_queued_seconds") != 0


def test_metrics_with_a_port_of_their_own_are_there_alone(toy_bundle: Path) -> None:
    client = offline_client(offline_service(toy_bundle, Settings(metrics_port=0)))
    assert [client.get(path).status_code for path in ("/metrics", "/livez", "/readyz")] == [404, 200, 200]


def test_a_store_that_is_full_is_down_and_its_queue_is_known(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full() -> None:
        raise StoreUnavailableError("OOM command not allowed")

    service = offline_service(toy_bundle)
    client, value = offline_client(service), service.metrics.registry.get_sample_value
    assert client.get("/metrics").status_code == 200
    assert value("halfstep_store_up") == 1
    monkeypatch.setattr(service.store, "ping", full)
    assert client.get("/metrics").status_code == 200
    assert (value("halfstep_store_up"), value("halfstep_queued_seconds")) == (0, 0)


def test_a_model_that_the_store_no_longer_holds_waits_for_nothing() -> None:
    metrics = Metrics()

    def queued() -> float | None:
        return metrics.registry.get_sample_value("halfstep_model_queued_seconds", {"model": "m"})

    metrics.store_holds(Backlog(jobs=1, rows=1, seconds=3.0), [], {"m": Backlog(jobs=1, rows=1, seconds=3.0)})
    assert queued() == 3.0
    metrics.store_holds(Backlog(), [], {})
    assert queued() is None
