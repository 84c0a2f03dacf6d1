"""Probes and metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from server.schemas import Health
from server.service import Service


def operations_routes(service: Service) -> APIRouter:
    """``/livez``, ``/readyz`` and ``/metrics``."""
    router = APIRouter(tags=["Operations"])

    @router.head("/livez", include_in_schema=False)
    @router.get("/livez")
    async def livez() -> Health:
        """The process runs and answers."""
        return Health(status="ok")

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses={503: {"model": Health, "description": "Send no new work here"}})
    async def readyz(response: Response) -> Health:
        """Models are loaded and warm, and new work is welcome."""
        if service.engine_down:
            response.status_code = 503
            return Health(status="engine_down")
        if service.draining.is_set():
            response.status_code = 503
            return Health(status="draining")
        return Health(status="ok")

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics of this process."""
        backlog = await service.store.backlog()
        service.metrics.queued_s.set(backlog.seconds)
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
