"""Probes and metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from server.metrics import Metrics
from server.schemas import Health, Readiness
from server.stores.base import JobStore, StoreUnavailableError


def operations_routes(
    metrics: Metrics, store: JobStore, readiness: Callable[[], Awaitable[Readiness]], *, scraped: bool = True
) -> APIRouter:
    """``/livez``, ``/readyz`` and, where it is scraped here, ``/metrics``."""
    router = APIRouter(tags=["Operations"])

    @router.head("/livez", include_in_schema=False)
    @router.get("/livez")
    async def livez() -> Health:
        """The process runs and answers."""
        return Health(status="ok")

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses={503: {"model": Health, "description": "Send no new work here"}})
    async def readyz(response: Response) -> Health:
        """Work is welcome: models are warm, the store answers, and the process is not about to end."""
        status = await readiness()
        if status != "ok":
            response.status_code = 503
        return Health(status=status)

    if not scraped:
        return router

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """Prometheus metrics: of this process, and of the store all processes share while it answers."""
        try:
            backlog, totals = await store.backlog(), await store.totals()
            models = {total.model for total in totals}
            of_each = {model: await store.backlog(models=(model,)) for model in models}
            metrics.store_holds(backlog, totals, of_each, takes_work=await _takes_work(store))
        except StoreUnavailableError:
            metrics.store_away()
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


async def _takes_work(store: JobStore) -> bool:
    """A full store still answers, and takes nothing in."""
    try:
        await store.ping()
    except StoreUnavailableError:
        return False
    return True
