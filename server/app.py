"""The ASGI application of one process."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import structlog
from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from server.api.a1111 import a1111_routes
from server.api.a1111_errors import error_at
from server.api.a1111_settings import a1111_settings_routes
from server.api.access import AccessLog
from server.api.document import openapi_document
from server.api.files import file_routes
from server.api.gate import Gate
from server.api.guard import Guard, internal_error
from server.api.job_submission import job_submission_routes
from server.api.jobs import job_routes
from server.api.openai import openai_routes
from server.api.operations import operations_routes
from server.api.pages import page_routes
from server.errors import ApiError, result_store_away, store_away, unreadable_job
from server.service import Service
from server.storage import ResultStoreError
from server.stores.base import StoreUnavailableError, UnreadableJobError

_log = structlog.get_logger()

_STATUS_ERRORS = {
    404: ("not_found", "There is nothing here; GET /docs lists what there is."),
    405: ("method_not_allowed", "This method is not allowed here; the Allow header lists those that are."),
}


def create_app(service: Service) -> ASGIApp:
    """All routes behind guard and gate, whose refusals pages of allowed origins may read, too.

    Lifespan and worker belong to the caller.
    """
    settings = service.settings
    gate = Gate(
        create_api(service), service.keyring, service.rates, settings.rate_limit, service.store, service.metrics
    )
    return AccessLog(_cors(Guard(gate, service.metrics, settings), settings.cors_origins))


def routers(service: Service) -> tuple[APIRouter, ...]:
    """Every route there is, but for ``/openapi.json``."""
    return (
        openai_routes(service),
        job_submission_routes(service),
        job_routes(service),
        a1111_routes(service),
        a1111_settings_routes(service),
        file_routes(service),
        operations_routes(
            service.metrics, service.store, service.readiness, scraped=service.settings.metrics_port is None
        ),
        page_routes(),
    )


def create_api(service: Service) -> FastAPI:
    """The routes and their errors."""
    app = FastAPI(
        title="halfstep",
        summary="Images in a few steps, guidance as an input.",
        version="v1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.openapi = partial(openapi_document, app, keys=service.keyring is not None)  # type: ignore[method-assign]
    parts = routers(service)
    for router in parts:
        app.include_router(router)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        if not error.after_acceptance:
            service.metrics.rejected.labels(error.code).inc()
        return _response(request, error)

    @app.exception_handler(StoreUnavailableError)
    async def store_unavailable(request: Request, _: StoreUnavailableError) -> Response:
        service.metrics.rejected.labels("store_unavailable").inc()
        return _response(request, store_away())

    @app.exception_handler(UnreadableJobError)
    async def unreadable(request: Request, error: UnreadableJobError) -> Response:
        service.metrics.rejected.labels("unreadable_job").inc()
        _log.error("job_unreadable", reason=str(error))
        return _response(request, unreadable_job())

    @app.exception_handler(ResultStoreError)
    async def result_store_unavailable(request: Request, _: ResultStoreError) -> Response:
        return _response(request, result_store_away())

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code, message = _STATUS_ERRORS.get(error.status_code, ("http_error", "The request was not understood."))
        service.metrics.rejected.labels(code).inc()
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _allowed((app, *parts), request)
        return _response(request, ApiError(error.status_code, code, message, headers=headers))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, _: Exception) -> Response:
        return _response(request, internal_error())  # Starlette raises it again, for the guard to log and count

    return app


def _allowed(parts: Iterable[FastAPI | APIRouter], request: Request) -> str:
    """Methods of all routes with this path; Starlette names those of the first alone."""
    routes = (route for part in parts for route in part.routes if isinstance(route, Route))
    matching = (route for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return ", ".join(sorted({method for route in matching for method in route.methods or ()}))


def _cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """Lets pages of these origins call the API with a key; cookies are never asked for."""
    if not origins:
        return app
    told = ["x-request-id", "x-should-retry", "retry-after", "retry-after-ms", "location", "preference-applied"]
    methods = ["GET", "POST", "DELETE"]
    return CORSMiddleware(app, origins, methods, allow_headers=["*"], expose_headers=told)


def _response(request: Request, refusal: ApiError) -> Response:
    error = error_at(request.scope["path"], refusal)
    return Response(error.payload(), status_code=error.status, media_type="application/json", headers=error.headers)
