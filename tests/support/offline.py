"""A service with its routes and models but no worker: for everything decided before a step runs."""

from __future__ import annotations

from pathlib import Path

from starlette.testclient import TestClient

from engines.bundle import verify_bundle
from server.admission import Admission
from server.app import create_app
from server.auth import Keyring
from server.catalogue import Catalogue, Model
from server.loading import open_files
from server.metrics import Metrics
from server.service import Service
from server.settings import Settings
from server.stores.base import JobStore
from server.stores.memory import MemoryStore

ROW_STEP_S = 0.01


def offline_service(
    bundle: Path,
    settings: Settings | None = None,
    keyring: Keyring | None = None,
    store: JobStore | None = None,
) -> Service:
    """predicted costs: 10 ms a row and step."""
    chosen = settings or Settings()
    catalogue = Catalogue([Model.of(verify_bundle(bundle), lambda r: ROW_STEP_S * r.n * r.steps)])
    admission = Admission(catalogue, chosen.max_queue_s, chosen.max_queued_rows, chosen.tenant_share)
    metrics = Metrics()
    return Service(
        chosen,
        catalogue,
        MemoryStore(chosen.lease_s, chosen.result_ttl_s) if store is None else store,
        admission,
        metrics,
        keyring=keyring,
        files=open_files(chosen, metrics),
    )


def offline_client(service: Service) -> TestClient:
    return TestClient(create_app(service), raise_server_exceptions=False)
