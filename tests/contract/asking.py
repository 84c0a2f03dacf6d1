"""Requests to an API in this process, over a store that a test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from server.app import create_app
from server.request import DenoiseRequest
from server.service import Service
from server.stores.base import StoreUnavailableError

MODELS = ("toy-digits",)
PATIENCE_S = 120
REQUEST = DenoiseRequest(model="toy-digits", prompt="one", seed=1, guidance_scale=2.0, steps=4, width=64, height=64)

Serve = Callable[..., Service]


@asynccontextmanager
async def asking(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=PATIENCE_S) as client:
        yield client


def keyed(name: str) -> dict[str, str]:
    return {"idempotency-key": name}


def outcome(answer: httpx.Response) -> tuple[int, str]:
    """Status, and the id or the code."""
    body = answer.json()
    if answer.status_code in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1
    return answer.status_code, body["id"] if "id" in body else body["error"]["code"]


def counted(service: Service, name: str) -> dict[str, float]:
    """Samples of a metric by their last label."""
    samples = [s for family in service.metrics.registry.collect() for s in family.samples if s.name == name]
    return {list(sample.labels.values())[-1]: sample.value for sample in samples}


async def away(*_: Any) -> Any:
    raise StoreUnavailableError("away")
