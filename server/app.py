"""The ASGI application of one process."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from server.api.access import AccessLog
from server.api.guard import Guard, internal_error
from server.api.openai import openai_routes
from server.api.operations import operations_routes
from server.api.pages import page_routes
from server.errors import ApiError, store_away
from server.service import Service
from server.stores.base import StoreUnavailableError

_STATUS_ERRORS = {
    404: ("not_found", "There is nothing here; GET /docs lists what there is."),
    405: ("method_not_allowed", "This method is not allowed here; the Allow header lists those that are."),
}


def create_app(service: Service) -> ASGIApp:
    """All routes behind the guard. Lifespan and worker belong to the caller."""
    app = FastAPI(
        title="halfstep",
        summary="Images in a few steps, guidance as an input.",
        version="v1",
        docs_url=None,
        redoc_url=None,
    )
    for router in (
        openai_routes(service),
        operations_routes(service.metrics, service.store, service.readiness),
        page_routes(),
    ):
        app.include_router(router)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        if not error.after_acceptance:
            service.metrics.rejected.labels(error.code).inc()
        return _response(error)

    @app.exception_handler(StoreUnavailableError)
    async def store_unavailable(_: Request, __: StoreUnavailableError) -> Response:
        service.metrics.rejected.labels("store_unavailable").inc()
        return _response(store_away())

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        code, message = _STATUS_ERRORS.get(error.status_code, ("http_error", "The request was not understood."))
        service.metrics.rejected.labels(code).inc()
        return _response(ApiError(error.status_code, code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return _response(internal_error())  # Starlette raises it again afterwards, for the guard to log

    return AccessLog(Guard(app, service.metrics, service.settings))


def _response(error: ApiError) -> Response:
    return Response(error.payload(), status_code=error.status, media_type="application/json", headers=error.headers)
